//! What a table holds: cells and their verdicts, facts, exceptions, and slots.

use std::fmt;

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use crate::policy::{MacAddr, PortMatch};

/// A region of the plane of addresses: the packets from `source` to `destination`.
///
/// Among the cells that contain a packet, the one with the longest destination, then the longest source,
/// decides. Both prefixes are of one family and without host bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cell {
    /// Destination prefix.
    pub destination: IpNet,
    /// Source prefix.
    pub source: IpNet,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.source, self.destination)
    }
}

/// Number of a policy in the table: the index of its [`Forwarding`] and of its counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// What happens to the packets of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// They go to the kernel.
    Pass(PassReason),
    /// They leave the way the slot says.
    Fast {
        /// Whose packets they are.
        slot: Slot,
        /// What is looked up before.
        probes: Probes,
    },
}

/// What must be looked up for each packet of a fast cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Probes {
    /// Host facts about destinations inside the cell differ.
    pub destination: bool,
    /// Host facts about sources inside the cell differ.
    pub source: bool,
    /// Guards lie inside the cell's source, or it inside one: a packet from a guard passes.
    pub guards: bool,
}

/// Which address of a packet a host fact is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The destination.
    Destination,
    /// The source.
    Source,
}

/// What the host does with the addresses of one prefix. The longest prefix that contains an address counts.
///
/// A destination that is looked up and has no fact is not routed. A source without one may be fast, unless the
/// port asks for the reverse path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fact {
    /// An address that is the host's own, broadcast, unroutable or the like: never fast.
    Denied,
    /// Routed to a device, by its interface index. For sources, 0 is a device that does not matter: packets from
    /// there are routed back somehow.
    Via(u32),
}

/// Packets that must reach the kernel because a policy asks for a protocol or ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Exception {
    /// The addresses.
    pub cell: Cell,
    /// Upper-layer protocol; 0 is every protocol.
    pub protocol: u8,
    /// Source port, or ICMP type.
    pub source_port: PortMatch,
    /// Destination port, or ICMP code.
    pub destination_port: PortMatch,
}

/// How the fast packets of one policy leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forwarding {
    /// Interface index of the device.
    pub ifindex: u32,
    /// Longest packet in bytes, from the IP header on.
    pub max_length: u16,
    /// Source and destination address to write; `None` leaves the Ethernet addresses as they are.
    pub rewrite: Option<(MacAddr, MacAddr)>,
}

/// How a slot's packets leave, or why they pass.
pub type Standing = Result<Forwarding, PassReason>;
