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
        Direction, Family, IPPROTO_ESP, Mark, Mode, OffloadDev, OffloadKind, Overhead, Policy, PolicyId,
        SaId, SecurityAssociation, Selector, Template,
    },
    table::{Capacity, Cell, Exception, Fact, Forwarding, Side, Slot, TableUpdate, Verdict},
};

/// The packet-offload device.
pub(super) const NIC: u32 = 7;
/// Another device.
pub(super) const LAN: u32 = 8;

pub(super) const AMPLE: Capacity =
    Capacity { cells: 1 << 20, tuples: 1 << 12, fact_lengths: 129, exceptions: 64, slots: 1 << 16 };

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
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) cells: BTreeMap<Cell, Verdict>,
    pub(super) facts: BTreeMap<(Side, IpNet), Fact>,
    pub(super) forwardings: BTreeMap<Slot, Forwarding>,
    pub(super) exceptions: Vec<Exception>,
}

impl Model {
    /// Applies an update that changes only what it must.
    pub(super) fn apply(&mut self, update: &TableUpdate) {
        write(&mut self.cells, &update.cells);
        write(&mut self.facts, &update.facts);
        for (slot, forwarding) in &update.forwardings {
            match forwarding {
                Some(forwarding) => {
                    assert_ne!(self.forwardings.insert(*slot, *forwarding), Some(*forwarding));
                }
                None => assert!(self.forwardings.remove(slot).is_some(), "{slot:?} was not in use"),
            }
        }
        if let Some(exceptions) = &update.exceptions {
            assert_ne!(&self.exceptions, exceptions);
            self.exceptions.clone_from(exceptions);
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
        let (slot, probe_destination, probe_source) = match first {
            None => return Err(PassReason::NoPolicy),
            Some((_, Verdict::Pass(reason))) => return Err(*reason),
            Some((_, Verdict::Fast { slot, probe_destination, probe_source })) => {
                (*slot, *probe_destination, *probe_source)
            }
        };
        if probe_destination {
            match self.fact(Side::Destination, packet.destination) {
                Some(Fact::Via(ifindex)) if ifindex == self.forwardings[&slot].ifindex => {}
                Some(Fact::Via(_)) => return Err(PassReason::RouteElsewhere),
                Some(Fact::Denied) | None => return Err(PassReason::DeniedDestination),
            }
        }
        if probe_source && self.fact(Side::Source, packet.source) == Some(Fact::Denied) {
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
            assert!(cells().count() + facts().count() <= capacity.cells);
            let tuples: BTreeSet<_> =
                cells().map(|cell| (cell.destination.prefix_len(), cell.source.prefix_len())).collect();
            assert!(tuples.len() <= capacity.tuples);
            for side in [Side::Destination, Side::Source] {
                let lengths: BTreeSet<u8> =
                    facts().filter(|(of, _)| *of == side).map(|(_, prefix)| prefix.prefix_len()).collect();
                assert!(lengths.len() <= capacity.fact_lengths);
            }
            let exceptions =
                self.exceptions.iter().filter(|exception| Family::of(&exception.cell.destination) == family);
            assert!(exceptions.count() <= capacity.exceptions);
        }
        assert!(self.forwardings.keys().all(|slot| (slot.0 as usize) < capacity.slots));
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

/// An outbound software policy with an ESP tunnel to 192.0.2.2 under reqid 1.
pub(super) fn tunnel(source: &str, destination: &str) -> Policy {
    let selector = Selector::between(source.parse().unwrap(), destination.parse().unwrap()).unwrap();
    Policy { templates: vec![template()], ..Policy::new(PolicyId::new(Direction::Out, selector)) }
}

/// The same, packet-offloaded to the NIC.
pub(super) fn offloaded(source: &str, destination: &str) -> Policy {
    Policy { offload: Some(to(NIC, OffloadKind::Packet)), ..tunnel(source, destination) }
}

pub(super) fn to(ifindex: u32, kind: OffloadKind) -> OffloadDev {
    OffloadDev { ifindex, kind, inbound: false }
}

pub(super) fn template() -> Template {
    Template {
        mode: Mode::Tunnel,
        protocol: IPPROTO_ESP,
        spi: 0,
        source: "192.0.2.1".parse().unwrap(),
        destination: "192.0.2.2".parse().unwrap(),
        reqid: 1,
        optional: false,
    }
}

/// The association of [`template`] on the NIC.
pub(super) fn association() -> SecurityAssociation {
    SecurityAssociation {
        id: SaId {
            destination: template().destination,
            spi: 0x100,
            protocol: IPPROTO_ESP,
            mark: Mark::default(),
        },
        source: template().source,
        reqid: template().reqid,
        mode: Mode::Tunnel,
        if_id: 0,
        selector: None,
        offload: Some(to(NIC, OffloadKind::Packet)),
        overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16)),
    }
}
