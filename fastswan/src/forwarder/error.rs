//! What can go wrong with the program and its ports.

use std::{error::Error, io, path::PathBuf};

use super::AttachMode;

/// The program could not be loaded, attached or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwarderError {
    /// The process lacks privileges.
    #[error("{attempt}: {error}; run with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or as root")]
    NotPermitted {
        /// What was tried, on which object.
        attempt: String,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The kernel is older than the first with packet offload and what the program needs.
    #[error("Linux {found} is too old: fastswan needs Linux 6.2 or later")]
    KernelTooOld {
        /// The running version.
        found: String,
    },
    /// There is no such interface in this network namespace.
    #[error("no interface named {interface} in this network namespace: check its name with `ip link`")]
    NoSuchInterface {
        /// The name that was asked for.
        interface: String,
    },
    /// The driver of an interface does not run XDP programs itself.
    #[error(
        "the driver of {interface} has no native XDP ({error}): use AttachMode::Generic or \
         AttachMode::Automatic, or another device"
    )]
    NoNativeXdp {
        /// The interface.
        interface: String,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Another program is attached. It is never detached by this library.
    #[error(
        "{interface} already runs an XDP program ({}): find its owner with `bpftool link` and stop it first",
        .program.map_or("of unknown number".to_owned(), |id| format!("number {id}"))
    )]
    AlreadyAttached {
        /// The interface.
        interface: String,
        /// The number of that program, if the kernel tells.
        program: Option<u32>,
    },
    /// An interface takes VLAN tags off received frames, so that tagged and untagged frames look alike.
    #[error("{interface} strips VLAN tags of received frames: run `ethtool -K {interface} rxvlan off`")]
    StripsVlanTags {
        /// The interface.
        interface: String,
    },
    /// An interface hands over frames that its sender, on this same host, has not completed: checksums are
    /// still to be computed and VLAN tags to be inserted.
    #[error(
        "{interface} ({kind}) is a software port, whose frames may lack checksums and VLAN tags: turn them \
         on at the sender with `ethtool -K DEVICE tx off txvlan off` and say so with \
         `AttachConfig::complete_frames(true)`"
    )]
    IncompleteFrames {
        /// The interface.
        interface: String,
        /// What kind of interface it is, as in `ip link add type`; empty if the kernel does not say.
        kind: String,
    },
    /// A directory to pin in is not on a BPF file system.
    #[error(
        "{} is not on a BPF file system: choose a directory below /sys/fs/bpf, or run `mount -t bpf bpf DIRECTORY`",
        .directory.display()
    )]
    NotABpfFileSystem {
        /// The directory.
        directory: PathBuf,
    },
    /// Another process has taken over.
    #[error("another process has taken over the ports in {}: this one has none any longer", .directory.display())]
    Superseded {
        /// Where the ports are pinned.
        directory: PathBuf,
    },
    /// An interface was not attached by this forwarder.
    #[error("{interface} is not attached: attach it first")]
    NotAttached {
        /// The interface.
        interface: String,
    },
    /// Attaching failed for another reason.
    #[error("attaching to {interface} in {mode:?} mode failed: {error}")]
    Attach {
        /// The interface.
        interface: String,
        /// The mode that was tried.
        mode: AttachMode,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Something else failed.
    #[error("{attempt} failed: {error}")]
    Bpf {
        /// What was tried, on which object.
        attempt: String,
        /// Why it failed.
        #[source]
        error: Box<dyn Error + Send + Sync>,
    },
}

impl ForwarderError {
    /// An error of a call that may fail for lack of privileges.
    pub(super) fn new(attempt: impl Into<String>, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let (attempt, error) = (attempt.into(), error.into());
        match errno(error.as_ref()) {
            Some(code @ libc::EPERM) => {
                Self::NotPermitted { attempt, error: io::Error::from_raw_os_error(code) }
            }
            _ => Self::Bpf { attempt, error },
        }
    }
}

/// The errno at the bottom of an error.
pub(super) fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        if let Some(code) = error.downcast_ref::<rustix::io::Errno>() {
            return Some(code.raw_os_error());
        }
        next = error.source();
    }
    None
}
