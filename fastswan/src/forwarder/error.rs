//! What can go wrong with the program and its ports.

use std::{error::Error, io, ops::RangeInclusive, path::PathBuf};

use aya::programs::links::LinkType;
use rustix::thread::{CapabilitySet, capabilities};

use super::{AttachMode, PortProblem};
use crate::netlink::PortLink;

/// The program could not be loaded, attached or run.
///
/// The text of each error says what was tried, on which object, what the kernel said and what to do; so none has a
/// [`source`](Error::source) that would say it again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwarderError {
    /// The kernel forbids it.
    #[error("{attempt}: {error}; {}", remedy(.lacks))]
    NotPermitted {
        /// What was tried, on which object.
        attempt: String,
        /// The capabilities among those needed that the process lacks. If none, something else forbids it.
        lacks: Vec<&'static str>,
        /// What the kernel said.
        error: io::Error,
    },
    /// A filter of system calls keeps the process from opening a socket.
    #[error(
        "{attempt}: {error}; the process must be allowed sockets of AF_NETLINK and AF_UNIX (systemd: \
         RestrictAddressFamilies=)"
    )]
    SocketsForbidden {
        /// What was tried, on which object.
        attempt: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// No test has held this library against so old a kernel.
    #[error(
        "Linux {found} is unjudged: fastswan has been held against the decisions of Linux {oldest} and later only, and \
         older ones may decide otherwise; run a later one, or, if you answer for it, say \
         `LoadConfig::allow_unjudged_kernel(true)`"
    )]
    UnjudgedKernel {
        /// The running version.
        found: String,
        /// The first that is judged.
        oldest: String,
    },
    /// The kernel lacks something that the program needs.
    #[error("{attempt} failed: {error}; that takes {needs}")]
    Unsupported {
        /// What was tried.
        attempt: String,
        /// What it needs, and since when Linux has it.
        needs: &'static str,
        /// What the kernel said.
        error: String,
    },
    /// The table cannot have this size.
    #[error("TableConfig::{field} is {value}: give a number from {} to {}", .range.start(), .range.end())]
    TableSize {
        /// The field of [`TableConfig`](crate::table::TableConfig).
        field: &'static str,
        /// What it is.
        value: u32,
        /// What it may be.
        range: RangeInclusive<u32>,
    },
    /// There is too little memory for the table.
    #[error("{attempt} failed: {error}; make the table smaller (TableConfig), or allow more memory")]
    NoMemory {
        /// What was tried.
        attempt: String,
        /// What the kernel said.
        error: String,
    },
    /// There is no such interface in this network namespace.
    #[error("no interface {interface:?} in this network namespace: check its name with `ip link`")]
    NoSuchInterface {
        /// The name that was asked for, or the index behind `#`.
        interface: String,
    },
    /// What was asked for is how `ip link` shows an interface that is joined to another one.
    #[error("{given} is no name: `ip link` shows the interface {name} like that; give {name}")]
    NotAName {
        /// What was asked for.
        given: String,
        /// The interface's name.
        name: String,
    },
    /// An interface is to be attached that is attached already, or is named before.
    #[error("{interface} is meant twice, by {} and {}: name it once", .named[0], .named[1])]
    NamedTwice {
        /// The interface.
        interface: String,
        /// The two names or indices by which it was given.
        named: [String; 2],
    },
    /// The interface does not show the program all of a packet.
    #[error(transparent)]
    Unsuitable(#[from] PortProblem),
    /// The driver of an interface does not run XDP programs itself.
    #[error(
        "the driver of {interface} has no native XDP ({error}): use AttachMode::Generic or \
         AttachMode::Automatic, or another device"
    )]
    NoNativeXdp {
        /// The interface.
        interface: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// Another program is attached. It is never detached by this library.
    #[error(
        "{interface} already runs an XDP program ({}): {}",
        .program.map_or("of unknown number".to_owned(), |id| format!("number {id}")),
        .held.remedy(.interface, *.generic)
    )]
    AlreadyAttached {
        /// The interface.
        interface: String,
        /// The number of that program, if the kernel tells.
        program: Option<u32>,
        /// It runs in the kernel's stack.
        generic: bool,
        /// What keeps it there.
        held: HeldBy,
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
    /// A directory to pin in has a name that a BPF file system does not take.
    #[error(
        "{} cannot be made: a BPF file system allows no dots in names; choose a name without",
        .directory.display()
    )]
    DotInName {
        /// The directory.
        directory: PathBuf,
    },
    /// A directory to pin in belongs to a mirror of another network namespace, whose interfaces have indices of their
    /// own.
    #[error(
        "{directory} holds the pins of another network namespace, whose ports are still attached: choose another \
         directory for this one, or, if nothing runs there any longer, remove it with `rm -r {directory}`",
        directory = .directory.display()
    )]
    OtherNamespace {
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
    /// A gateway was asked to attach or detach, and has no forwarder.
    #[error("the gateway has no forwarder to attach or detach with: build it `with_forwarder`")]
    NoForwarder,
    /// Attaching failed for another reason.
    #[error("attaching to {interface} in {mode:?} mode failed: {error}")]
    Attach {
        /// The interface.
        interface: String,
        /// The mode that was tried.
        mode: AttachMode,
        /// What the kernel said.
        error: io::Error,
    },
    /// Something else failed.
    #[error("{attempt} failed: {}", chain(.error.as_ref()))]
    Bpf {
        /// What was tried, on which object.
        attempt: String,
        /// Why it failed.
        error: Box<dyn Error + Send + Sync>,
    },
}

impl ForwarderError {
    /// An error of a call that may fail for lack of privileges or memory.
    pub(super) fn new(attempt: impl Into<String>, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let (attempt, error) = (attempt.into(), error.into());
        let lacks = lacking();
        match errno(error.as_ref()) {
            Some(code @ (libc::EPERM | libc::EACCES)) if code == libc::EPERM || !lacks.is_empty() => {
                Self::NotPermitted { attempt, lacks, error: io::Error::from_raw_os_error(code) }
            }
            Some(code @ libc::EAFNOSUPPORT) => {
                Self::SocketsForbidden { attempt, error: io::Error::from_raw_os_error(code) }
            }
            Some(libc::ENOMEM) => Self::NoMemory { attempt, error: chain(error.as_ref()) },
            _ => Self::Bpf { attempt, error },
        }
    }

    /// The error that an interface runs a program which is not ours to replace.
    pub(super) fn taken(link: &PortLink) -> Self {
        let held = link.program.map_or(HeldBy::Unknown, HeldBy::find);
        let PortLink { program, generic, .. } = *link;
        Self::AlreadyAttached { interface: link.name.clone(), program, generic, held }
    }
}

/// What keeps a foreign XDP program attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeldBy {
    /// A link, of a process or pinned.
    Link,
    /// Nothing: it was attached for good, as `ip link` does.
    Nothing,
    /// The process may not ask (it takes `CAP_SYS_ADMIN`).
    Unknown,
}

impl HeldBy {
    fn find(program: u32) -> Self {
        for link in aya::programs::loaded_links() {
            match link {
                Ok(link) if link.program_id() == program && link.link_type().ok() == Some(LinkType::Xdp) => {
                    return Self::Link;
                }
                // Another kind of link, or one that has just gone.
                Ok(_) => {}
                Err(error) if errno(&error) == Some(libc::ENOENT) => {}
                Err(_) => return Self::Unknown,
            }
        }
        Self::Nothing
    }

    fn remedy(self, interface: &str, generic: bool) -> String {
        let link = "find its owner with `bpftool link` and stop it first";
        let mode = if generic { "xdpgeneric" } else { "xdp" };
        let nothing = format!("if nobody needs it, run `ip link set dev {interface} {mode} off`");
        match self {
            Self::Link => link.to_owned(),
            Self::Nothing => format!("no process holds it; {nothing}"),
            Self::Unknown => format!("{link}, or, if that does not list it: {nothing}"),
        }
    }
}

/// The capabilities that the process needs and lacks.
pub(super) fn lacking() -> Vec<&'static str> {
    let Ok(sets) = capabilities(None) else { return Vec::new() };
    let has = |set| sets.effective.contains(set);
    let admin = has(CapabilitySet::SYS_ADMIN);
    [
        ("CAP_BPF", admin || has(CapabilitySet::BPF)),
        ("CAP_NET_ADMIN", has(CapabilitySet::NET_ADMIN)),
        ("CAP_PERFMON", admin || has(CapabilitySet::PERFMON)),
    ]
    .into_iter()
    .filter_map(|(name, has)| (!has).then_some(name))
    .collect()
}

fn remedy(lacks: &[&'static str]) -> String {
    if lacks.is_empty() {
        return "the process has the capabilities: a security module, a lockdown, a filter of system calls, or a \
                user namespace forbids it"
            .to_owned();
    }
    let lacks = lacks.join(", ");
    format!("the process lacks {lacks}: run it with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or as root")
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

/// An error and its causes, each said once.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_its_cause_once() {
        let cause = io::Error::from_raw_os_error(libc::EBADF);
        let text = cause.to_string();
        let error = ForwarderError::new("pinning lan0", cause);
        assert_eq!(error.to_string(), format!("pinning lan0 failed: {text}"));
        assert!(error.source().is_none());
    }
}
