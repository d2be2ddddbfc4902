//! What outlives a process: links to ports, and counters, pinned in a directory of a BPF file system.
//!
//! ```text
//! DIRECTORY/owner             the program of the process that took over last (`next` while it does)
//! DIRECTORY/ports/INDEX       the link to the port with this interface index
//! DIRECTORY/ID/MAP            the maps with the counters of the program with this number
//! DIRECTORY/namespace/COOKIE  a directory: the network namespace whose interface indices those are
//! ```
//!
//! Whoever changes any of it holds a lock on the directory, but not longer: the lock of a process that is stopped
//! must not keep the next one from taking over.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Component, Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use aya::{Ebpf, maps::MapData, programs::ProgramInfo};
use rustix::fs::{FlockOperation, flock, fstatfs};

use super::{
    ForwarderError,
    hook::xdp::{Joined, Link, Program},
};
use crate::{
    sys::{bpf, network_namespace},
    table::{Counters, MapsError, array},
};

/// `linux/magic.h`
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// How long another process may take to take over.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks at something that is waited for.
const PAUSE: Duration = Duration::from_millis(10);

const OWNER: &str = "owner";
const PORTS: &str = "ports";
const NAMESPACE: &str = "namespace";

/// The directory, locked.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    _lock: File,
}

impl Pins {
    /// Makes the directory if it is not there, waits for its lock, and makes sure that it is this network namespace's.
    pub(super) fn lock(directory: &Path) -> Result<Self, ForwarderError> {
        let error = |error: io::Error| ForwarderError::new(making(directory), error);
        let parent = directory.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
        // The kernel answers EPERM when it is to pin elsewhere, or to make a name with a dot, which says little.
        let file_system = File::open(parent).and_then(|parent| Ok(fstatfs(parent)?)).map_err(error)?;
        if file_system.f_type.to_ne_bytes()[..4] != BPF_FS_MAGIC.to_ne_bytes() {
            return Err(ForwarderError::NotABpfFileSystem { directory: directory.to_owned() });
        }
        let has_dot = |component: Component<'_>| match component {
            Component::Normal(name) => name.as_encoded_bytes().contains(&b'.'),
            _ => false,
        };
        let new = directory.strip_prefix(parent).unwrap_or(directory);
        if new.components().any(has_dot) {
            return Err(ForwarderError::DotInName { directory: directory.to_owned() });
        }
        fs::create_dir_all(directory.join(PORTS)).map_err(error)?;
        let lock = File::open(directory).map_err(error)?;
        let deadline = Instant::now() + PATIENCE;
        while let Err(errno) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if Instant::now() > deadline {
                let attempt = format!("locking {}", directory.display());
                return Err(ForwarderError::new(attempt, io::Error::from(errno)));
            }
            sleep(PAUSE);
        }
        let pins = Self { directory: directory.to_owned(), _lock: lock };
        pins.settle_in_namespace()?;
        Ok(pins)
    }

    /// Marks the directory as this network namespace's. What is left of another one goes, unless its ports are there:
    /// a port of the same index is another interface here.
    fn settle_in_namespace(&self) -> Result<(), ForwarderError> {
        let ours = network_namespace()
            .map_err(|error| ForwarderError::new("reading the cookie of the network namespace", error))?
            .to_string();
        let marks = self.directory.join(NAMESPACE);
        let entries = fs::read_dir(&marks).into_iter().flatten().flatten();
        let others: Vec<_> = entries.map(|entry| entry.file_name()).filter(|name| *name != *ours).collect();
        if !others.is_empty() {
            let is_alive = |ifindex| self.link(ifindex).is_some_and(|(_, joined)| joined.ifindex.is_some());
            if self.ports().into_iter().any(is_alive) {
                return Err(ForwarderError::OtherNamespace { directory: self.directory.clone() });
            }
            self.remove_all()?;
        }
        fs::create_dir_all(marks.join(&ours)).map_err(|error| ForwarderError::new(making(&marks), error))
    }

    /// The path of the link to a port.
    pub(super) fn port(&self, ifindex: u32) -> PathBuf {
        self.directory.join(PORTS).join(ifindex.to_string())
    }

    /// The interface indices of the ports whose links are pinned.
    pub(super) fn ports(&self) -> Vec<u32> {
        numbers(&self.directory.join(PORTS))
    }

    /// The link that is pinned for a port, and what it joins.
    pub(super) fn link(&self, ifindex: u32) -> Option<(Link, Joined)> {
        let link = Link::from_pin(&self.port(ifindex)).ok()?;
        let joined = link.joined().ok()?;
        Some((link, joined))
    }

    /// Pins the link to a port.
    pub(super) fn add_port(&self, ifindex: u32, link: &Link) -> Result<(), ForwarderError> {
        let path = self.port(ifindex);
        link.pin(&path).map_err(|error| ForwarderError::new(format!("pinning {}", path.display()), error))
    }

    /// Gives up a port: detaches the program, whoever else holds the link, and removes the pin.
    pub(super) fn remove_port(&self, ifindex: u32) -> Result<(), ForwarderError> {
        if let Some((link, _)) = self.link(ifindex) {
            link.detach()
                .map_err(|error| ForwarderError::new(format!("detaching from port #{ifindex}"), error))?;
        }
        self.unpin_port(ifindex)
    }

    /// Removes the pin of a port.
    pub(super) fn unpin_port(&self, ifindex: u32) -> Result<(), ForwarderError> {
        remove(&self.port(ifindex))
    }

    /// The number of the program of the process that took over last.
    pub(super) fn owner(&self) -> Option<u32> {
        owner(&self.directory)
    }

    /// The program of the process that took over last.
    pub(super) fn owner_program(&self) -> Option<Program> {
        Program::from_pin(&self.directory.join(OWNER), self.owner()?).ok()
    }

    /// The counters of a program.
    pub(super) fn counters(&self, program: u32) -> Result<Counters, MapsError> {
        let folder = self.counters_folder(program);
        let [slots, forwarded, passes] = Counters::MAPS.map(|name| MapData::from_pin(folder.join(name)));
        Counters::map([&slots?, &forwarded?, &passes?])
    }

    /// Pins the counters of a program.
    pub(super) fn add_counters(&self, program: u32, ebpf: &Ebpf) -> Result<(), ForwarderError> {
        let folder = self.counters_folder(program);
        fs::create_dir_all(&folder).map_err(|error| ForwarderError::new(making(&folder), error))?;
        for name in Counters::MAPS {
            let path = folder.join(name);
            remove(&path)?;
            let map = array(ebpf, name).map_err(|error| ForwarderError::new("looking for a map", error))?;
            bpf::pin(map.fd().as_fd(), &path)
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

    /// Removes the pins of the counters of all programs but these: a process that ended while it took over left them.
    pub(super) fn remove_stale_counters(&self, kept: &[u32]) {
        numbers(&self.directory)
            .into_iter()
            .filter(|program| !kept.contains(program))
            .for_each(|program| self.remove_counters(program));
    }

    /// Makes a program the owner, at once and for good.
    pub(super) fn set_owner(&self, program: &Program) -> Result<(), ForwarderError> {
        let (path, next) = (self.directory.join(OWNER), self.directory.join("next"));
        let error =
            |attempt: &str, error| ForwarderError::new(format!("{attempt} {}", next.display()), error);
        remove(&next)?;
        program.pin(&next).map_err(|failure| error("pinning", failure))?;
        fs::rename(&next, &path).map_err(|failure| {
            let _ = fs::remove_file(&next);
            error("renaming", failure)
        })
    }

    /// Removes everything but the directory.
    pub(super) fn remove_all(&self) -> Result<(), ForwarderError> {
        for ifindex in self.ports() {
            self.remove_port(ifindex)?;
        }
        self.remove_stale_counters(&[]);
        let marks = self.directory.join(NAMESPACE);
        for mark in fs::read_dir(&marks).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(mark.path());
        }
        let _ = fs::remove_dir(marks);
        remove(&self.directory.join(OWNER))
    }

    fn counters_folder(&self, program: u32) -> PathBuf {
        self.directory.join(program.to_string())
    }
}

/// The number of the program that a directory belongs to, if there is one.
pub(super) fn owner(directory: &Path) -> Option<u32> {
    Some(ProgramInfo::from_pin(directory.join(OWNER)).ok()?.id())
}

/// The names in a directory that are numbers.
fn numbers(directory: &Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
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
