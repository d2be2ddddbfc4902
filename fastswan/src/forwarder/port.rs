//! Whether an interface shows the program all of a packet: before the program is attached, and as long as it is.
//!
//! The kernel tells of changed features as of any change of a link, and does not say what has changed; looking again takes
//! a few system calls for each port.

use std::io;

use crate::{
    netlink::{PortLink, members, read_link},
    sys::active_features,
};

/// Features of an interface that take a VLAN tag off a frame before XDP sees it, and what `ethtool -K` calls them.
const STRIPPING: [(&str, &str); 2] =
    [("rx-vlan-hw-parse", "rxvlan"), ("rx-vlan-stag-hw-parse", "rx-vlan-stag-hw-parse")];

/// Features of a software port's sender that leave a frame to be completed by a device.
const UNFINISHED: [(&str, &str); 5] = [
    ("tx-vlan-hw-insert", "txvlan"),
    ("tx-vlan-stag-hw-insert", "tx-vlan-stag-hw-insert"),
    ("tx-checksum-ip-generic", "tx"),
    ("tx-checksum-ipv4", "tx"),
    ("tx-checksum-ipv6", "tx"),
];

/// Kinds of software interfaces that receive what their senders have sent, and not what another interface of this host
/// has received: those are merged (GRO) and have lost their VLAN tags. No kind is that of hardware.
const RECEIVING: [&str; 5] = ["", "veth", "tun", "dummy", "netdevsim"];

/// Why an interface is no port, or is none any longer. Its packets must pass, as they do when the table does not know the
/// port ([`Ports::remove_port`](crate::table::Ports::remove_port)), until it has none.
///
/// Displayed with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PortProblem {
    /// The interface was deleted, or moved to another network namespace.
    #[error("{interface} is gone: it is attached again when an interface of that name comes")]
    Gone {
        /// Its name when it was attached.
        interface: String,
    },
    /// The interface does not run the program any longer.
    #[error(
        "{interface} runs {} instead of this one: find out who has changed that",
        .program.map_or("no XDP program".to_owned(), |id| format!("the XDP program number {id}"))
    )]
    Replaced {
        /// The interface.
        interface: String,
        /// The number of the program that it runs.
        program: Option<u32>,
    },
    /// The interface is the loopback interface.
    #[error(
        "{interface} is the loopback interface, on which nothing comes in to be forwarded: name the interface that packets \
         arrive on"
    )]
    Loopback {
        /// The interface.
        interface: String,
    },
    /// The interface takes VLAN tags off received frames, so that tagged and untagged frames look alike.
    #[error(
        "{interface} strips VLAN tags of received frames ({feature}): run `ethtool -K {interface} {option} off`"
    )]
    StripsVlanTags {
        /// The interface.
        interface: String,
        /// The kernel's name of the feature: for C-tags or for S-tags.
        feature: &'static str,
        /// What `ethtool` calls it.
        option: &'static str,
    },
    /// An interface hands over frames that its sender, on this same host, has not completed: checksums are
    /// still to be computed and VLAN tags to be inserted.
    #[error(
        "{interface} ({kind}) is a software port, whose frames may lack checksums and VLAN tags: have the sender \
         complete them, with `ethtool -K DEVICE tx off txvlan off` at its end, and say so with \
         `AttachConfig::complete_frames(true)`"
    )]
    IncompleteFrames {
        /// The interface.
        interface: String,
        /// What kind of interface it is, as in `ip link add type`; empty if the kernel does not say.
        kind: String,
    },
    /// The sender of a software port, which can be seen from here, does not complete its frames, or began not to after
    /// the embedder had said that it does.
    #[error(
        "{sender}, the sender of {interface}, leaves its frames unfinished ({feature}): run \
         `ethtool -K {sender} {option} off`"
    )]
    UnfinishedFrames {
        /// The interface.
        interface: String,
        /// The one that it is joined to.
        sender: String,
        /// The kernel's name of the feature.
        feature: &'static str,
        /// What `ethtool` calls it.
        option: &'static str,
    },
    /// The interface receives what another one of this host has received, and generic XDP comes after packets were merged
    /// (GRO) and VLAN tags taken off there.
    #[error(
        "{interface} is on top of {}, so generic XDP sees its packets merged and without their VLAN tags: attach \
         to the interface that the frames arrive on, which knows its VLANs",
        .lower.as_deref().unwrap_or("another interface")
    )]
    OnTopOfAnother {
        /// The interface.
        interface: String,
        /// The one below, if the kernel tells.
        lower: Option<String>,
    },
    /// The interface could not be asked about.
    #[error("asking about {interface} failed: {error}")]
    Unknown {
        /// Its name when it was attached.
        interface: String,
        /// Why.
        error: String,
    },
}

/// A port, and why it is none any longer, if so.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStatus {
    /// Its name when it was attached.
    pub interface: String,
    /// Its index when it was attached.
    pub ifindex: u32,
    /// Why its packets must pass.
    pub problem: Option<PortProblem>,
}

/// The features that make frames look like what they are not. Which of them a software port may have the embedder says.
pub(super) fn unsuitable(link: &PortLink) -> io::Result<Vec<PortProblem>> {
    let interface = &link.name;
    let mut problems = Vec::new();
    for (feature, option) in active(interface, &STRIPPING)? {
        problems.push(PortProblem::StripsVlanTags { interface: interface.clone(), feature, option });
    }
    if link.kind == "veth"
        && let Some(peer) = link.joined_to
    {
        let sender = read_link(peer)?.name;
        for (feature, option) in active(&sender, &UNFINISHED)? {
            let (interface, sender) = (interface.clone(), sender.clone());
            problems.push(PortProblem::UnfinishedFrames { interface, sender, feature, option });
        }
    }
    Ok(problems)
}

type Feature = (&'static str, &'static str);

fn active(interface: &str, among: &'static [Feature]) -> io::Result<impl Iterator<Item = Feature>> {
    let active = match active_features(interface) {
        // A device without any.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Vec::new(),
        result => result?,
    };
    Ok(among.iter().copied().filter(move |(name, _)| active.iter().any(|active| active == name)))
}

/// Whether generic XDP on an interface sees packets that another one has merged.
pub(super) fn merges_packets(link: &PortLink) -> io::Result<Option<PortProblem>> {
    let lower = match link.kind.as_str() {
        _ if link.hardware => return Ok(None),
        kind if RECEIVING.contains(&kind) => return Ok(None),
        "bridge" => match members(link.ifindex)?.into_iter().next() {
            Some(member) => Some(member.name),
            None => return Ok(None),
        },
        _ => match link.joined_to {
            Some(lower) => Some(read_link(lower)?.name),
            None => members(link.ifindex)?.into_iter().next().map(|member| member.name),
        },
    };
    Ok(Some(PortProblem::OnTopOfAnother { interface: link.name.clone(), lower }))
}
