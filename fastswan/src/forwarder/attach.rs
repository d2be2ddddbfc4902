//! Where and how to attach, and finding the interface that is meant.

use std::{fmt, io};

use super::{
    AttachMode, ForwarderError, PortProblem,
    error::errno,
    hook::xdp::{Link, Program},
    port::{merges_packets, unsuitable},
};
use crate::{
    netlink::{PortLink, find_link, read_link},
    sys::network_namespace,
};

/// Which interface is meant.
///
/// ```
/// use fastswan::forwarder::Interface;
///
/// assert_eq!(Interface::from("lan0"), Interface::Name("lan0".to_owned()));
/// assert_eq!(Interface::from(7), Interface::Index(7));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Interface {
    /// The interface that has this name, or this alternative name, when it is looked for.
    Name(String),
    /// The interface with this index.
    Index(u32),
}

impl From<&str> for Interface {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

impl From<String> for Interface {
    fn from(name: String) -> Self {
        Self::Name(name)
    }
}

impl From<u32> for Interface {
    fn from(ifindex: u32) -> Self {
        Self::Index(ifindex)
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Index(ifindex) => write!(f, "#{ifindex}"),
        }
    }
}

/// Where and how to attach the program.
///
/// Needs Linux 6.12, as the [forwarder](super::XdpForwarder) does.
///
/// ```
/// use fastswan::forwarder::{AttachConfig, AttachMode};
///
/// let lan = AttachConfig::new("lan0").mode(AttachMode::Native);
/// // The machine on the other end of this veth sends complete frames: `ethtool -K DEVICE tx off txvlan off`.
/// let container = AttachConfig::new("veth7").complete_frames(true);
/// # let _ = (lan, container);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachConfig {
    pub(crate) interface: Interface,
    pub(super) mode: AttachMode,
    pub(super) complete_frames: bool,
}

impl AttachConfig {
    /// Attaches to this interface of the thread's network namespace, automatically native or generic.
    #[must_use]
    pub fn new(interface: impl Into<Interface>) -> Self {
        Self { interface: interface.into(), mode: AttachMode::default(), complete_frames: false }
    }

    /// Sets the mode.
    #[must_use]
    pub fn mode(mut self, mode: AttachMode) -> Self {
        self.mode = mode;
        self
    }

    /// States that the sender to this software port (veth, tap, bridge) sends complete frames: TX checksum
    /// and TX VLAN offload are off there. XDP cannot tell, and a packet forwarded without its checksum is lost. What is
    /// switched on later and can be seen from here is a [`PortProblem`].
    #[must_use]
    pub fn complete_frames(mut self, complete: bool) -> Self {
        self.complete_frames = complete;
        self
    }
}

/// An interface that the program runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attachment {
    /// Its name when it was attached.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// How it is attached; never [`AttachMode::Automatic`].
    pub mode: AttachMode,
    /// Why it is generic although it was to be automatic.
    pub fallback: Option<String>,
}

/// An interface that the program can be attached to. Tell the table about the ports of its index
/// ([`HostFacts::ports`](crate::HostFacts::ports)) before you attach: then its first packet can be fast.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResolvedPort {
    /// Its name at the moment.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
}

/// A port that the program is to be attached to.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) config: AttachConfig,
    pub(super) link: PortLink,
    /// What its sender leaves undone, and the embedder answers for.
    pub(super) excused: Vec<PortProblem>,
    /// Where it was found.
    pub(super) namespace: u64,
}

impl Candidate {
    /// Finds the interfaces, each of which may be meant once, and looks whether they are suitable.
    pub(super) fn find_all(configs: &[AttachConfig]) -> Result<Vec<Self>, ForwarderError> {
        let mut candidates: Vec<Self> = Vec::new();
        for config in configs {
            let candidate = Self::find(config)?;
            if let Some(other) = candidates.iter().find(|other| other.link.ifindex == candidate.link.ifindex)
            {
                return Err(ForwarderError::NamedTwice {
                    interface: candidate.link.name,
                    named: [other.config.interface.to_string(), config.interface.to_string()],
                });
            }
            candidates.push(candidate);
        }
        Ok(candidates)
    }

    /// Finds an interface, and looks whether it is suitable in the mode that is asked for.
    pub(super) fn find(config: &AttachConfig) -> Result<Self, ForwarderError> {
        let link = find(&config.interface)?;
        if link.loopback {
            return Err(PortProblem::Loopback { interface: link.name }.into());
        }
        let problems = unsuitable(&link)
            .map_err(|error| ForwarderError::new(format!("asking about {}", link.name), error))?;
        let namespace = network_namespace()
            .map_err(|error| ForwarderError::new("reading the cookie of the network namespace", error))?;
        let excused = match problems {
            problems if !link.hardware => {
                if !config.complete_frames {
                    let PortLink { name: interface, kind, .. } = link;
                    return Err(PortProblem::IncompleteFrames { interface, kind }.into());
                }
                if config.mode == AttachMode::Generic {
                    refuse_merged_packets(&link)?;
                }
                problems
            }
            problems => match problems.into_iter().next() {
                Some(problem) => return Err(problem.into()),
                None => Vec::new(),
            },
        };
        Ok(Self { config: config.clone(), link, excused, namespace })
    }

    pub(super) fn resolved(&self) -> ResolvedPort {
        ResolvedPort { interface: self.link.name.clone(), ifindex: self.link.ifindex }
    }

    /// Attaches the program to the interface, which runs none.
    pub(super) fn attach(&self, program: &Program) -> Result<(Link, Attachment), ForwarderError> {
        let (link, mode, fallback) = match self.config.mode {
            mode @ (AttachMode::Native | AttachMode::Generic) => {
                (self.attach_link(program, mode)?, mode, None)
            }
            AttachMode::Automatic => match self.attach_link(program, AttachMode::Native) {
                Ok(link) => (link, AttachMode::Native, None),
                Err(error @ (ForwarderError::NoNativeXdp { .. } | ForwarderError::Attach { .. })) => {
                    refuse_merged_packets(&self.link)?;
                    let link = self.attach_link(program, AttachMode::Generic)?;
                    (link, AttachMode::Generic, Some(error.to_string()))
                }
                Err(error) => return Err(error),
            },
        };
        let (interface, ifindex) = (self.link.name.clone(), self.link.ifindex);
        tracing::info!(interface, ifindex, ?mode, fallback, "attached the XDP program");
        Ok((link, Attachment { interface, ifindex, mode, fallback }))
    }

    fn attach_link(&self, program: &Program, mode: AttachMode) -> Result<Link, ForwarderError> {
        let PortLink { ifindex, ref name, .. } = self.link;
        Link::attach(program, ifindex, mode == AttachMode::Generic).map_err(|error| {
            let interface = name.clone();
            match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) if mode == AttachMode::Native => {
                    ForwarderError::NoNativeXdp { interface, error }
                }
                Some(libc::EBUSY | libc::EEXIST) => {
                    ForwarderError::taken(&read_link(ifindex).unwrap_or_else(|_| self.link.clone()))
                }
                Some(libc::ENODEV) => ForwarderError::NoSuchInterface { interface },
                Some(libc::EPERM | libc::EACCES) => {
                    ForwarderError::new(format!("attaching to {interface}"), error)
                }
                _ => ForwarderError::Attach { interface, mode, error },
            }
        })
    }
}

fn refuse_merged_packets(link: &PortLink) -> Result<(), ForwarderError> {
    let merges = merges_packets(link)
        .map_err(|error| ForwarderError::new(format!("asking about {}", link.name), error))?;
    merges.map_or(Ok(()), |problem| Err(problem.into()))
}

/// Finds an interface.
pub(super) fn find(interface: &Interface) -> Result<PortLink, ForwarderError> {
    let found = match interface {
        Interface::Name(name) => find_link(name),
        Interface::Index(ifindex) => read_link(*ifindex),
    };
    found.map_err(|error| not_found(interface, error))
}

fn not_found(interface: &Interface, error: io::Error) -> ForwarderError {
    match errno(&error) {
        // EINVAL: an index that no interface can have.
        Some(libc::ENODEV | libc::EINVAL) => {}
        _ => return ForwarderError::new(format!("asking about {interface}"), error),
    }
    if let Interface::Name(given) = interface
        && let Some((name, _)) = given.split_once('@')
        && find_link(name).is_ok()
    {
        return ForwarderError::NotAName { given: given.clone(), name: name.to_owned() };
    }
    ForwarderError::NoSuchInterface { interface: interface.to_string() }
}
