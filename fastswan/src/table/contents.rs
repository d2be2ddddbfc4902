//! A table as plain maps: what it holds, and what follows from that for a packet.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::{
    Cell, Change, Exception, Fact, Forwarding, Port, ReversePath, Side, Slot, Standing, TableUpdate, Verdict,
};

/// What a table holds, as plain maps.
///
/// It takes the same [`TableUpdate`]s as an [`OffloadTable`](super::OffloadTable), has no limits, and is searched from
/// one end to the other: slow, and simple enough to judge the other tables by. Of what
/// [decides](Self::decide) over a packet only the table is here: headers, ports and devices are looked at before and
/// after.
///
/// ```
/// use fastswan::table::Contents;
///
/// let (mut old, mut new) = (Contents::default(), Contents::default());
/// new.guards.insert("10.9.0.0/16".parse()?);
/// let update = new.replacing(&old);
/// old.apply(&update);
/// assert_eq!(old, new);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The cells.
    pub cells: BTreeMap<Cell, Verdict>,
    /// The host facts.
    pub facts: BTreeMap<(Side, IpNet), Fact>,
    /// The guards.
    pub guards: BTreeSet<IpNet>,
    /// The exceptions.
    pub exceptions: BTreeSet<Exception>,
    /// How the packets of each slot that is not free leave, or why they pass.
    pub slots: BTreeMap<Slot, Standing>,
    /// The kernel's index of the policy that a slot belongs to, if it has one.
    pub owners: BTreeMap<Slot, u32>,
}

/// What a table looks at in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Upper-layer protocol.
    pub protocol: u8,
    /// The ports that the kernel compares with a selector's: ICMP type and code for ICMP, 0 and 0 for protocols that
    /// have none, `None` if they cannot be read.
    pub ports: Option<(u16, u16)>,
    /// Bytes, from the IP header on.
    pub length: usize,
}

impl Packet {
    /// A packet of 0 bytes of a protocol (255, reserved) that has no ports.
    #[must_use]
    pub fn new(source: IpAddr, destination: IpAddr) -> Self {
        Self { source, destination, protocol: 255, ports: Some((0, 0)), length: 0 }
    }

    /// The same of another protocol, with these ports.
    #[must_use]
    pub fn with_protocol(self, protocol: u8, ports: Option<(u16, u16)>) -> Self {
        Self { protocol, ports, ..self }
    }

    /// The same of another length.
    #[must_use]
    pub fn with_length(self, length: usize) -> Self {
        Self { length, ..self }
    }
}

impl Contents {
    /// Applies a batch of changes.
    pub fn apply(&mut self, update: &TableUpdate) {
        for change in update.changes() {
            match change {
                Change::Cell(cell, verdict) => set(&mut self.cells, cell, verdict),
                Change::Fact(side, prefix, fact) => set(&mut self.facts, (side, prefix), fact),
                Change::Guard(prefix, there) => add_or_remove(&mut self.guards, prefix, there),
                Change::Exception(exception, there) => add_or_remove(&mut self.exceptions, exception, there),
                Change::Slot(slot, standing) => {
                    if standing.is_none() {
                        self.owners.remove(&slot);
                    }
                    set(&mut self.slots, slot, standing);
                }
                Change::Owner(slot, policy) => set(&mut self.owners, slot, Some(policy).filter(|p| *p != 0)),
            }
        }
    }

    /// What makes these contents of older ones.
    #[must_use]
    pub fn replacing(&self, old: &Self) -> TableUpdate {
        let owners = changes(&old.owners, &self.owners);
        // An owner goes with its slot.
        let owners =
            owners.into_iter().filter(|(slot, policy)| policy.is_some() || self.slots.contains_key(slot));
        TableUpdate {
            cells: changes(&old.cells, &self.cells),
            facts: changes(&old.facts, &self.facts),
            guards: additions_and_removals(&old.guards, &self.guards),
            exceptions: additions_and_removals(&old.exceptions, &self.exceptions),
            slots: changes(&old.slots, &self.slots),
            owners: owners.map(|(slot, policy)| (slot, policy.unwrap_or(0))).collect(),
        }
    }

    /// Whose packet it is and how it leaves. Without a port the reverse path is not asked for.
    ///
    /// # Errors
    ///
    /// Why it passes.
    pub fn decide(&self, packet: &Packet, port: Option<&Port>) -> Result<(Slot, Forwarding), PassReason> {
        if self.exceptions.iter().any(|exception| is_about(exception, packet)) {
            return Err(PassReason::Exception);
        }
        let (slot, probes) = match self.verdict(packet.source, packet.destination) {
            None => return Err(PassReason::NoPolicy),
            Some(Verdict::Pass(reason)) => return Err(reason),
            Some(Verdict::Fast { slot, probes }) => (slot, probes),
        };
        let forwarding = (*self.slots.get(&slot).ok_or(PassReason::EgressUnavailable)?)?;
        if probes.guards && self.guards.iter().any(|guard| guard.contains(&packet.source)) {
            return Err(PassReason::Guarded);
        }
        if probes.destination {
            match self.fact(Side::Destination, packet.destination) {
                None | Some(Fact::Denied) => return Err(PassReason::DeniedDestination),
                Some(Fact::Via(device)) if device != forwarding.ifindex => {
                    return Err(PassReason::RouteElsewhere);
                }
                Some(Fact::Via(_)) => {}
            }
        }
        // The kernel has no reverse path filter for IPv6.
        let reverse_path =
            port.filter(|_| packet.source.is_ipv4()).map_or(ReversePath::Off, |p| p.reverse_path);
        if probes.source || reverse_path != ReversePath::Off {
            match (self.fact(Side::Source, packet.source), reverse_path) {
                (None, ReversePath::Off) => {}
                (None, _) => return Err(PassReason::ReversePath),
                (Some(Fact::Denied), _) => return Err(PassReason::DeniedSource),
                (Some(Fact::Via(device)), ReversePath::Strict)
                    if port.is_some_and(|p| p.receiver != device) =>
                {
                    return Err(PassReason::ReversePath);
                }
                (Some(Fact::Via(_)), _) => {}
            }
        }
        if packet.length > usize::from(forwarding.max_length) {
            return Err(PassReason::TooLong);
        }
        Ok((slot, forwarding))
    }

    /// The verdict of the first cell for a packet between two addresses.
    #[must_use]
    pub fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict> {
        self.cells
            .iter()
            .filter(|(cell, _)| holds(cell, source, destination))
            .max_by_key(|(cell, _)| (cell.destination.prefix_len(), cell.source.prefix_len()))
            .map(|(_, verdict)| *verdict)
    }

    /// The host fact for an address.
    #[must_use]
    pub fn fact(&self, side: Side, address: IpAddr) -> Option<Fact> {
        self.facts
            .iter()
            .filter(|((of, prefix), _)| *of == side && prefix.contains(&address))
            .max_by_key(|((_, prefix), _)| prefix.prefix_len())
            .map(|(_, fact)| *fact)
    }
}

fn holds(cell: &Cell, source: IpAddr, destination: IpAddr) -> bool {
    cell.source.contains(&source) && cell.destination.contains(&destination)
}

fn is_about(exception: &Exception, packet: &Packet) -> bool {
    // Ports that cannot be read may be any.
    let ports_match = packet.ports.is_none_or(|(source, destination)| {
        exception.source_port.matches(source) && exception.destination_port.matches(destination)
    });
    holds(&exception.cell, packet.source, packet.destination)
        && (exception.protocol == 0 || exception.protocol == packet.protocol)
        && ports_match
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
    match value {
        Some(value) => drop(map.insert(key, value)),
        None => drop(map.remove(&key)),
    }
}

fn add_or_remove<T: Ord>(to: &mut BTreeSet<T>, item: T, add: bool) {
    if add {
        to.insert(item);
    } else {
        to.remove(&item);
    }
}

/// What makes a map of an older one: removals, then what is new or different.
fn changes<K: Copy + Ord, V: Copy + PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> Vec<(K, Option<V>)> {
    let removed = old.keys().filter(|key| !new.contains_key(key)).map(|key| (*key, None));
    let set = new.iter().filter(|(key, value)| old.get(key) != Some(value));
    removed.chain(set.map(|(key, value)| (*key, Some(*value)))).collect()
}

/// What makes a set of an older one: removals (`false`), then additions.
fn additions_and_removals<T: Copy + Ord>(old: &BTreeSet<T>, new: &BTreeSet<T>) -> Vec<(T, bool)> {
    let removed = old.difference(new).map(|item| (*item, false));
    removed.chain(new.difference(old).map(|item| (*item, true))).collect()
}
