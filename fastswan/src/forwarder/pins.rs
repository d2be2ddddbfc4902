//! What outlives a process: links to ports, and counters, pinned in a directory of a BPF file system.
//!
//! ```text
//! DIRECTORY/owner         the program of the process that took over last (`next` while it does)
//! DIRECTORY/ports/INDEX   the link to the port with this interface index
//! DIRECTORY/ID/MAP        the maps with the counters of the program with this number
//! ```
//!
//! Whoever changes any of it holds a lock on the directory, but not longer: the lock of a process that is stopped
//! must not keep the next one from taking over.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::MapData,
    programs::{
        ProgramInfo, Xdp,
        links::{FdLink, PinnedLink},
    },
};
use rustix::fs::{FlockOperation, flock, fstatfs};

use super::{ForwarderError, link::read_link};
use crate::table::{Counters, MapsError, array};

/// `linux/magic.h`
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// How long another process may take to take over.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the kernel may take to let go of a link.
const RELEASE: Duration = Duration::from_secs(2);

/// Between two looks at something that is waited for.
const PAUSE: Duration = Duration::from_millis(10);

/// The directory, locked.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    _lock: File,
}

impl Pins {
    /// Makes the directory if it is not there, and waits for its lock.
    pub(super) fn lock(directory: &Path) -> Result<Self, ForwarderError> {
        let error = |error: io::Error| ForwarderError::new(making(directory), error);
        let parent = directory.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(directory);
        // The kernel answers EPERM when it is to pin elsewhere, which says little.
        let file_system = File::open(parent).and_then(|parent| Ok(fstatfs(parent)?)).map_err(error)?;
        if file_system.f_type.to_ne_bytes()[..4] != BPF_FS_MAGIC.to_ne_bytes() {
            return Err(ForwarderError::NotABpfFileSystem { directory: directory.to_owned() });
        }
        fs::create_dir_all(directory.join("ports")).map_err(error)?;
        let lock = File::open(directory).map_err(error)?;
        let deadline = Instant::now() + PATIENCE;
        while let Err(errno) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if Instant::now() > deadline {
                let attempt = format!("locking {}", directory.display());
                return Err(ForwarderError::new(attempt, io::Error::from(errno)));
            }
            sleep(PAUSE);
        }
        Ok(Self { directory: directory.to_owned(), _lock: lock })
    }

    /// The path of the link to a port.
    pub(super) fn port(&self, ifindex: u32) -> PathBuf {
        self.directory.join("ports").join(ifindex.to_string())
    }

    /// The interface indices of the ports whose links are pinned.
    pub(super) fn ports(&self) -> Vec<u32> {
        let entries = fs::read_dir(self.directory.join("ports")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// The link to a port, if it is pinned, and the number of the program that it runs.
    pub(super) fn link(&self, ifindex: u32) -> Option<(FdLink, u32)> {
        let link = FdLink::from(PinnedLink::from_pin(self.port(ifindex)).ok()?);
        let program = link.info().ok()?.program_id();
        Some((link, program))
    }

    /// Gives up a port. Unless somebody else holds its link, the program is detached.
    pub(super) fn remove_port(&self, ifindex: u32) -> Result<(), ForwarderError> {
        remove(&self.port(ifindex))
    }

    /// The program of the process that took over last.
    pub(super) fn owner(&self) -> Option<u32> {
        owner(&self.directory)
    }

    /// The counters of a program.
    pub(super) fn counters(&self, program: u32) -> Result<Counters, MapsError> {
        let folder = self.counters_folder(program);
        let [slots, traffic, passes] = Counters::MAPS.map(|name| MapData::from_pin(folder.join(name)));
        Counters::map([&slots?, &traffic?, &passes?])
    }

    /// Pins the counters of a program.
    pub(super) fn add_counters(&self, program: u32, ebpf: &Ebpf) -> Result<(), ForwarderError> {
        let folder = self.counters_folder(program);
        fs::create_dir_all(&folder).map_err(|error| ForwarderError::new(making(&folder), error))?;
        for name in Counters::MAPS {
            let path = folder.join(name);
            remove(&path)?;
            let map = array(ebpf, name).map_err(|error| ForwarderError::new("looking for a map", error))?;
            map.pin(&path)
                .map_err(|error| ForwarderError::new(format!("pinning {}", path.display()), error))?;
        }
        Ok(())
    }

    /// Removes the pins of a program's counters, which is of no consequence if it fails.
    pub(super) fn remove_counters(&self, program: u32) {
        let folder = self.counters_folder(program);
        for name in Counters::MAPS {
            let _ = fs::remove_file(folder.join(name));
        }
        let _ = fs::remove_dir(folder);
    }

    /// Makes a program the owner, at once and for good.
    pub(super) fn set_owner(&self, program: &mut Xdp) -> Result<(), ForwarderError> {
        let (path, next) = (self.directory.join(OWNER), self.directory.join("next"));
        remove(&next)?;
        program
            .pin(&next)
            .map_err(|error| ForwarderError::new(format!("pinning {}", next.display()), error))?;
        fs::rename(&next, &path)
            .map_err(|error| ForwarderError::new(format!("renaming {}", next.display()), error))
    }

    /// Removes everything but the directory.
    pub(super) fn remove_all(&self) -> Result<(), ForwarderError> {
        for ifindex in self.ports() {
            self.remove_port(ifindex)?;
        }
        if let Some(owner) = self.owner() {
            self.remove_counters(owner);
        }
        remove(&self.directory.join(OWNER))
    }

    fn counters_folder(&self, program: u32) -> PathBuf {
        self.directory.join(program.to_string())
    }
}

/// Waits until a port runs no program, but not for long: the kernel lets go of a link a moment after its pin is removed.
pub(super) fn wait_for_release(ifindex: u32) {
    let deadline = Instant::now() + RELEASE;
    while Instant::now() < deadline && !read_link(ifindex).is_ok_and(|port| port.program.is_none()) {
        sleep(PAUSE);
    }
}

const OWNER: &str = "owner";

/// The number of the program that a directory belongs to, if there is one.
pub(super) fn owner(directory: &Path) -> Option<u32> {
    Some(ProgramInfo::from_pin(directory.join(OWNER)).ok()?.id())
}

/// Removes a file if it is there.
fn remove(path: &Path) -> Result<(), ForwarderError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ForwarderError::new(format!("removing {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn making(directory: &Path) -> String {
    format!("making {}", directory.display())
}
