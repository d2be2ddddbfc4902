//! What host sources say.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::{Hook, HostFacts, Link, Neighbour, PathMtu, Route, Rule};
use crate::policy::Family;

/// What a [`HostSource`](crate::HostSource) says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostEvent {
    /// Everything that the source knows now. It replaces all that it said before.
    Snapshot(HostFacts),
    /// What has changed since, in this order. Nothing else has.
    Changes(Vec<HostChange>),
    /// What the source said may no longer be true, and a [`HostEvent::Snapshot`] will follow. Until then nothing may be
    /// fast.
    Stale(HostStaleCause),
}

/// Something about the host that is not as it was told before.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostChange {
    /// There is such a link now; it replaces one of the same interface index.
    Link(Link),
    /// The link with this interface index is gone.
    LinkGone(u32),
    /// These are all routes that a table has for exactly this prefix now; none is left out.
    Routes {
        /// The table.
        table: u32,
        /// The prefix, without host bits.
        destination: IpNet,
        /// The routes for it in this table, in the order in which the kernel has them, or none.
        routes: Vec<Route>,
    },
    /// These are all rules of a family now. No rule at all means that nothing is known about its routes, and then nothing of
    /// it is fast.
    Rules(Family, Vec<Rule>),
    /// A neighbour has this Ethernet address now.
    Neighbour(Neighbour),
    /// The Ethernet address of a neighbour is not known any longer.
    NeighbourGone {
        /// Interface index of the device.
        ifindex: u32,
        /// Its address.
        destination: IpAddr,
    },
    /// What a device can do may have changed, such as taking redirected frames.
    Device {
        /// Its interface index; `None` is any device.
        ifindex: Option<u32>,
    },
    /// The kernel has learnt this path MTU; it replaces the one of the same address.
    PathMtu(PathMtu),
    /// No path MTU is learnt for this address any longer.
    PathMtuGone(IpAddr),
    /// These are all families now of which more path MTUs may have been learnt than were told.
    UnclearPathMtus(Vec<Family>),
    /// A device of the host has this IPv4 address now, and none had it before.
    Address(Ipv4Addr),
    /// No device of the host has this IPv4 address any longer.
    AddressGone(Ipv4Addr),
    /// These are all hooks now.
    Hooks(Vec<Hook>),
}

/// Why a host source lost track.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HostStaleCause {
    /// Something has changed, and is being read.
    Changed,
    /// The kernel had more notifications than the socket's receive buffer holds (`ENOBUFS`).
    Overrun,
    /// The facts could not be read. The source tries again; a tracing event says what failed.
    Unreadable,
    /// The source asked for a resynchronisation itself.
    Requested,
}

impl HostStaleCause {
    /// Its name in metrics and events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Overrun => "overrun",
            Self::Unreadable => "unreadable",
            Self::Requested => "requested",
        }
    }
}
