//! What a mirror wants done.

use std::{net::IpAddr, time::Instant};

use super::holds::HoldId;
use crate::table::{Port, TableUpdate};

/// What is to be done next, in this order: [`Mirror::poll_action`](super::Mirror::poll_action).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// Turn the fast path off at once.
    Disable,
    /// Ask the host source for everything ([`HostSource::resync`](crate::HostSource::resync)): the kernel has contradicted it,
    /// and nothing is fast before it has told.
    ResyncHost,
    /// Write the table, then call [`Mirror::handle_written`](super::Mirror::handle_written). Until then there is nothing
    /// else to do but [`Action::Disable`].
    Write(TableUpdate),
    /// Remove a port: its frames pass from now on.
    RemovePort {
        /// Interface index.
        ifindex: u32,
        /// VLAN id, or 0.
        vlan: u16,
    },
    /// Add a port, or change it. If there is no room, call
    /// [`Mirror::handle_port_refused`](super::Mirror::handle_port_refused) and go on.
    SetPort(Port),
    /// Renew the lease until then. The table holds what every input had to tell one lease earlier.
    Renew {
        /// The end of the lease.
        until: Instant,
    },
    /// Have the program ask the kernel's routes about one packet in many, or about none
    /// ([`OffloadTable::set_asking`](crate::OffloadTable::set_asking)), and report the differences with
    /// [`Mirror::handle_differences`](super::Mirror::handle_differences). Optional: without, nothing is asked.
    AskBack(bool),
    /// Turn the fast path on.
    Enable,
    /// Attach the program to these interfaces, all of which exist and have their ports in the table; then call
    /// [`Mirror::handle_attached`](super::Mirror::handle_attached) for each.
    Attach {
        /// Their interface indices.
        interfaces: Vec<u32>,
    },
    /// Wait until all that the kernel had begun to remove is to be read
    /// ([`PolicySource::settle`](crate::PolicySource::settle)), then call
    /// [`Mirror::handle_settled`](super::Mirror::handle_settled).
    Settle {
        /// The number of removals that had begun.
        removals: u64,
    },
    /// Tell the table that it holds what follows from all removals up to this one
    /// ([`OffloadTable::acknowledge`](crate::OffloadTable::acknowledge)).
    Acknowledge {
        /// The number of the last of them.
        removals: u64,
    },
    /// Have the kernel find these neighbours, or hear from them again
    /// ([`HostSource::solicit`](crate::HostSource::solicit)). Optional: without, it does so when it has packets for them.
    ///
    /// At most 64 in a second are to be found, and as many in all that have been sought lately and do not answer: those whose
    /// address policies wait for, at once, then after 4 s, 8 s and so on up to 64 s. At most 512 are to be heard from again: those
    /// that packets went to in the last minute ([`Mirror::handle_traffic`](super::Mirror::handle_traffic)), every 2 s. More of
    /// either take turns. There are none while nothing may be fast, or if the host is [vouched](crate::HostFacts::vouched) for.
    Solicit {
        /// Each by its device's interface index and its address.
        neighbours: Vec<(u32, IpAddr)>,
    },
    /// The table makes nothing fast any longer that is held by this. Packets that are in the program at the moment may
    /// still be: wait a grace period before you report it.
    Held(HoldId),
}
