//! What tests compile to: a table as plain maps, and policies to fill a database with.
#![cfg_attr(not(test), allow(dead_code))]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use crate::{
    policy::{
        Direction, Family, OffloadDev, OffloadKind, Overhead, Policy, PolicyId, SecurityAssociation,
        Selector, Template,
    },
    table::{Capacity, Cell, Exception, Fact, Probes, Side, Slot, Standing, TableUpdate, Verdict},
};

/// The packet-offload device.
pub(super) const NIC: u32 = 7;
/// Another device.
pub(super) const LAN: u32 = 8;

pub(super) const AMPLE: Capacity = Capacity {
    cells_v4: 1 << 20,
    cells_v6: 1 << 20,
    tuples: 1 << 12,
    fact_lengths: 129,
    guard_lengths: 129,
    exceptions: 64,
    exception_tuples: 1 << 12,
    slots: 1 << 16,
};

/// A packet as the rule sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
}

impl Packet {
    /// A UDP packet that no policy in a test asks the ports of.
    pub(super) fn between(source: IpAddr, destination: IpAddr) -> Self {
        Self { source, destination, protocol: 17, source_port: 40_000, destination_port: 40_001 }
    }
}

/// The table that all updates add up to.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub(super) cells: BTreeMap<Cell, Verdict>,
    pub(super) facts: BTreeMap<(Side, IpNet), Fact>,
    pub(super) guards: BTreeSet<IpNet>,
    pub(super) slots: BTreeMap<Slot, Standing>,
    pub(super) exceptions: BTreeSet<Exception>,
}

impl Model {
    /// Applies an update that changes only what it must.
    pub(super) fn apply(&mut self, update: &TableUpdate) {
        write(&mut self.cells, &update.cells);
        write(&mut self.facts, &update.facts);
        for (guard, there) in &update.guards {
            let changed = if *there { self.guards.insert(*guard) } else { self.guards.remove(guard) };
            assert!(changed, "guard {guard} did not change");
        }
        for (slot, standing) in &update.slots {
            match standing {
                // A slot may be told again.
                Some(standing) => drop(self.slots.insert(*slot, *standing)),
                None => assert!(self.slots.remove(slot).is_some(), "{slot:?} was not in use"),
            }
        }
        for (exception, there) in &update.exceptions {
            let changed =
                if *there { self.exceptions.insert(*exception) } else { self.exceptions.remove(exception) };
            assert!(changed, "{exception:?} did not change");
        }
    }

    /// What the data path does with a packet, after the checks that do not depend on policies.
    pub(super) fn decide(&self, packet: &Packet) -> Result<Slot, PassReason> {
        let is_exception = |exception: &Exception| {
            holds(&exception.cell, packet)
                && (exception.protocol == 0 || exception.protocol == packet.protocol)
                && exception.source_port.matches(packet.source_port)
                && exception.destination_port.matches(packet.destination_port)
        };
        if self.exceptions.iter().any(is_exception) {
            return Err(PassReason::Exception);
        }
        let first = self
            .cells
            .iter()
            .filter(|(cell, _)| holds(cell, packet))
            .max_by_key(|(cell, _)| (cell.destination.prefix_len(), cell.source.prefix_len()));
        let (slot, probes) = match first {
            None => return Err(PassReason::NoPolicy),
            Some((_, Verdict::Pass(reason))) => return Err(*reason),
            Some((_, Verdict::Fast { slot, probes })) => (*slot, *probes),
        };
        let device = self.slots.get(&slot).copied().unwrap_or(Err(PassReason::EgressUnavailable))?.ifindex;
        let Probes { destination, source, guards } = probes;
        if guards && self.guards.iter().any(|guard| guard.contains(&packet.source)) {
            return Err(PassReason::Guarded);
        }
        if destination {
            match self.fact(Side::Destination, packet.destination) {
                Some(Fact::Via(ifindex)) if ifindex == device => {}
                Some(Fact::Via(_)) => return Err(PassReason::RouteElsewhere),
                Some(Fact::Denied) | None => return Err(PassReason::DeniedDestination),
            }
        }
        if source && self.fact(Side::Source, packet.source) == Some(Fact::Denied) {
            return Err(PassReason::DeniedSource);
        }
        Ok(slot)
    }

    pub(super) fn fact(&self, side: Side, address: IpAddr) -> Option<Fact> {
        self.facts
            .iter()
            .filter(|((of, prefix), _)| *of == side && prefix.contains(&address))
            .max_by_key(|((_, prefix), _)| prefix.prefix_len())
            .map(|(_, fact)| *fact)
    }

    /// Asserts that it is no larger than a table may be.
    pub(super) fn assert_fits(&self, capacity: Capacity) {
        for family in [Family::V4, Family::V6] {
            let cells = || self.cells.keys().filter(|cell| Family::of(&cell.destination) == family);
            let facts = || self.facts.keys().filter(|(_, prefix)| Family::of(prefix) == family);
            let guards = || self.guards.iter().filter(|guard| Family::of(guard) == family);
            assert!(cells().count() + facts().count() + guards().count() <= capacity.cells(family));
            let tuples: BTreeSet<_> =
                cells().map(|cell| (cell.destination.prefix_len(), cell.source.prefix_len())).collect();
            assert!(tuples.len() <= capacity.tuples);
            for side in [Side::Destination, Side::Source] {
                let lengths: BTreeSet<u8> =
                    facts().filter(|(of, _)| *of == side).map(|(_, prefix)| prefix.prefix_len()).collect();
                assert!(lengths.len() <= capacity.fact_lengths);
            }
            let lengths: BTreeSet<u8> = guards().map(IpNet::prefix_len).collect();
            assert!(lengths.len() <= capacity.guard_lengths);
            let exceptions =
                self.exceptions.iter().filter(|exception| Family::of(&exception.cell.destination) == family);
            assert!(exceptions.count() <= capacity.exceptions);
        }
        assert!(self.slots.keys().all(|slot| (slot.0 as usize) < capacity.slots));
    }
}

fn write<K: Copy + Ord + std::fmt::Debug, V: Copy + PartialEq + std::fmt::Debug>(
    map: &mut BTreeMap<K, V>,
    changes: &[(K, Option<V>)],
) {
    for (key, value) in changes {
        match value {
            Some(value) => assert_ne!(map.insert(*key, *value), Some(*value), "{key:?} did not change"),
            None => assert!(map.remove(key).is_some(), "{key:?} was not there"),
        }
    }
}

fn holds(cell: &Cell, packet: &Packet) -> bool {
    cell.destination.contains(&packet.destination) && cell.source.contains(&packet.source)
}

/// An outbound software policy with the template of its family.
pub(super) fn tunnel(source: &str, destination: &str) -> Policy {
    let selector = Selector::between(source.parse().unwrap(), destination.parse().unwrap()).unwrap();
    let templates = [template_of(selector.family())].into();
    Policy { templates, ..Policy::new(PolicyId::new(Direction::Out, selector)) }
}

/// The same, packet-offloaded to the NIC.
pub(super) fn offloaded(source: &str, destination: &str) -> Policy {
    Policy { offload: Some(to(NIC, OffloadKind::Packet)), ..tunnel(source, destination) }
}

pub(super) fn to(ifindex: u32, kind: OffloadKind) -> OffloadDev {
    OffloadDev { ifindex, kind, inbound: false }
}

/// An ESP tunnel to 192.0.2.2 or `2001:db8:f::2` under reqid 1.
pub(super) fn template_of(family: Family) -> Template {
    let (source, destination) = match family {
        Family::V4 => ("192.0.2.1", "192.0.2.2"),
        Family::V6 => ("2001:db8:f::1", "2001:db8:f::2"),
    };
    Template::esp_tunnel(source.parse().unwrap(), destination.parse().unwrap(), 1)
}

pub(super) fn template() -> Template {
    template_of(Family::V4)
}

/// The association of the family's template on the NIC.
pub(super) fn association_of(family: Family) -> SecurityAssociation {
    SecurityAssociation {
        offload: Some(to(NIC, OffloadKind::Packet)),
        overhead: Some(Overhead::aes_gcm_tunnel(family, false, 16)),
        ..SecurityAssociation::for_template(&template_of(family), 0x100)
    }
}

pub(super) fn association() -> SecurityAssociation {
    association_of(Family::V4)
}
