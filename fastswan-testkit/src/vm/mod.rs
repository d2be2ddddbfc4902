//! Guests: Debian kernels of other versions, with the software NIC, under QEMU's emulation.
//!
//! Everything comes from Debian packages, found through this machine's own apt configuration, and is kept in a folder
//! that may be removed at any time:
//!
//! ```text
//! FOLDER/trees/KERNEL      kernel, headers and compiler      (trees.rs)
//! FOLDER/trees/root        strongSwan and tools
//! FOLDER/images/KERNEL     kernel, modules, initial RAM disk (image.rs)
//! FOLDER/runs/KERNEL/NAME  what the last run of a name left  (boot.rs)
//! ```
//!
//! A guest mounts a folder of the host, runs one command in it, and powers off. It may be booted again in the same folder, where
//! the console of each boot is kept.

mod boot;
mod image;
mod trees;

use std::{
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::fcntl::{Flock, FlockArg};

pub use self::boot::{Guest, Run};
pub use self::image::Image;

/// A kernel that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// The long-term kernel of Debian trixie.
    V6_12,
    /// A recent one, from trixie-backports.
    V7,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V6_12, Self::V7];

    /// What it is called on command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V7 => "7",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A guest could not be made or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// Building an image unpacks device files and enters other roots.
    #[error("images of guests are built by root: run as root, or with sudo")]
    NotRoot,
    /// A program of a Debian package is missing.
    #[error("cannot run {program}: {error}; run `apt-get install {package}`")]
    Missing {
        /// The program.
        program: &'static str,
        /// Its package.
        package: &'static str,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// apt does not know where Debian's packages are.
    #[error(
        "apt's configuration names no Debian repository with the component main: add one in \
         /etc/apt/sources.list.d and run `apt-get update`"
    )]
    NoRepository,
    /// A program failed.
    #[error("{attempt} failed:\n{message}")]
    Failed {
        /// What was tried.
        attempt: String,
        /// The end of what the program said.
        message: String,
    },
    /// A system call failed.
    #[error("{attempt}: {error}")]
    System {
        /// What was tried, on which object.
        attempt: String,
        /// Why it failed.
        #[source]
        error: io::Error,
    },
    /// A guest did not come to its end.
    #[error("the guest with Linux {kernel} {what}; its console said:\n{console}")]
    Guest {
        /// Its kernel.
        kernel: Kernel,
        /// What became of it.
        what: String,
        /// What its console said when the kernel got into trouble, or last.
        console: String,
        /// Whether it ran into a breakpoint that its kernel had already taken away. Where a kernel patches itself, it puts
        /// such a one in the way of other CPUs for a moment, and QEMU 7.2 does not always emulate that right.
        stale_breakpoint: bool,
    },
}

impl VmError {
    /// Whether it is the emulator's fault, so that another attempt makes sense.
    #[must_use]
    pub fn is_of_the_emulator(&self) -> bool {
        matches!(self, Self::Guest { stale_breakpoint: true, .. })
    }

    fn system(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let attempt = attempt.into();
        move |error| Self::System { attempt, error }
    }
}

/// The folder that trees, images and runs are kept in, locked against other processes.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    _lock: Flock<File>,
}

impl Store {
    /// Makes the folder if need be, and waits until no other process uses it.
    ///
    /// # Errors
    ///
    /// [`VmError::System`].
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, VmError> {
        let folder = folder.into();
        create_folder(&folder)?;
        let path = folder.join("lock");
        let lock = File::create(&path).map_err(VmError::system(format!("opening {}", path.display())))?;
        let lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((lock, _)) => {
                eprintln!("waiting for another process that uses {}", folder.display());
                Flock::lock(lock, FlockArg::LockExclusive)
                    .map_err(|(_, errno)| VmError::system("waiting for it")(errno.into()))?
            }
        };
        Ok(Self { folder, _lock: lock })
    }

    /// The image of a kernel with the test NIC, built now if it is not there, or not of what it would be built of.
    ///
    /// # Errors
    ///
    /// [`VmError`].
    pub fn image(&self, kernel: Kernel) -> Result<Image, VmError> {
        Image::build(&self.folder, kernel)
    }

    /// A fresh folder for runs of this name, which a guest mounts. Those of other names stay as they are.
    ///
    /// # Errors
    ///
    /// [`VmError::System`].
    pub fn run_folder(&self, kernel: Kernel, name: &str) -> Result<PathBuf, VmError> {
        let folder = self.folder.join("runs").join(kernel.name()).join(name);
        remove_folder(&folder)?;
        create_folder(&folder)?;
        Ok(folder)
    }
}

fn remove_file(path: &Path) -> Result<(), VmError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(VmError::system(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

fn create_folder(folder: &Path) -> Result<(), VmError> {
    fs::create_dir_all(folder).map_err(VmError::system(format!("making {}", folder.display())))
}

fn remove_folder(folder: &Path) -> Result<(), VmError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(VmError::system(format!("removing {}", folder.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Runs a program of a Debian package, and returns what it prints.
fn run(
    attempt: &str,
    package: &'static str,
    program: &'static str,
    command: &mut Command,
) -> Result<String, VmError> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| VmError::Missing {
        program,
        package,
        error,
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(VmError::Failed {
        attempt: attempt.to_owned(),
        message: last_lines(&String::from_utf8_lossy(&said), 20),
    })
}

/// The last lines of a text.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
