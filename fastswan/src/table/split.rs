//! Large updates, a little at a time.

use fastswan_ebpf::PassReason;

use super::{TableUpdate, Verdict};

impl TableUpdate {
    /// The same changes as a sequence of updates, so that none keeps packets waiting for long: while an update
    /// is being written, every packet passes. After each of them every packet's answer is that of the table
    /// before the first, of the table after the last, or to pass.
    ///
    /// An update of at most `limit` changes stays whole. Otherwise there are three steps, and no update of the
    /// first and the last names more than `limit` cells, or 1 if that is 0:
    ///
    /// 1. Cells that are to be fast, and those that are to go, pass with [`PassReason::Updating`], and those
    ///    that are to pass do so. Afterwards, if a packet's first cell is one of these, it passes. If not, its
    ///    first cell is the same in the old table and in the new one, since the table now has the cells of
    ///    both; so only facts, guards, exceptions and slots make a difference to it.
    /// 2. Those change, in one update: one cell may depend on several of them. Packets whose first cell does
    ///    not change go from the old answer to the new one, and no other packet is fast.
    /// 3. Cells become fast or go. A cell that becomes fast is first for the packets that it is first for in
    ///    the new table, since all of the new table's cells are there. One that goes uncovers a cell that is
    ///    final or still passes, for the same reason. So their order does not matter.
    ///
    /// In between the table holds the old cells and the new ones. If that is more than it has room for,
    /// applying a part fails with [`TableError::Full`](super::TableError::Full); applying the whole update
    /// then still makes the new table.
    pub fn split(self, limit: usize) -> impl Iterator<Item = Self> {
        if self.len() <= limit {
            return vec![self].into_iter();
        }
        let limit = limit.max(1);
        let hidden: Vec<_> = self
            .cells
            .iter()
            .map(|(cell, verdict)| match verdict {
                Some(Verdict::Pass(_)) => (*cell, *verdict),
                _ => (*cell, Some(Verdict::Pass(PassReason::Updating))),
            })
            .collect();
        let is_final = |verdict: &Option<Verdict>| !matches!(verdict, Some(Verdict::Pass(_)));
        let shown: Vec<_> = self.cells.into_iter().filter(|(_, verdict)| is_final(verdict)).collect();
        let of_cells = |cells: &[_]| Self { cells: cells.to_vec(), ..Self::default() };
        let mut parts: Vec<Self> = hidden.chunks(limit).map(of_cells).collect();
        parts.push(Self { cells: Vec::new(), ..self });
        parts.extend(shown.chunks(limit).map(of_cells));
        parts.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        net::IpAddr,
    };

    use ipnet::IpNet;
    use proptest::{
        collection::{btree_map, btree_set},
        option,
        prelude::*,
        strategy::ValueTree,
        test_runner::TestRunner,
    };

    use super::*;
    use crate::{
        policy::PortMatch,
        table::{Cell, Exception, Fact, Forwarding, Probes, Side, Slot, Standing},
    };

    /// A table as plain maps.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Table {
        cells: BTreeMap<Cell, Verdict>,
        facts: BTreeMap<(Side, IpNet), Fact>,
        guards: BTreeSet<IpNet>,
        exceptions: BTreeSet<Exception>,
        slots: BTreeMap<Slot, Standing>,
    }

    impl Table {
        fn apply(&mut self, update: &TableUpdate) {
            set(&mut self.cells, &update.cells);
            set(&mut self.facts, &update.facts);
            set(&mut self.slots, &update.slots);
            add_or_remove(&mut self.guards, &update.guards);
            add_or_remove(&mut self.exceptions, &update.exceptions);
        }

        /// What makes this table of an older one.
        fn replacing(&self, old: &Self) -> TableUpdate {
            TableUpdate {
                cells: changes(&old.cells, &self.cells),
                facts: changes(&old.facts, &self.facts),
                guards: additions_and_removals(&old.guards, &self.guards),
                exceptions: additions_and_removals(&old.exceptions, &self.exceptions),
                slots: changes(&old.slots, &self.slots),
                ..TableUpdate::default()
            }
        }

        /// How a packet leaves, and whose it is, or why it passes.
        fn decide(&self, packet: &Packet) -> Result<(Slot, Forwarding), PassReason> {
            let Packet { source, destination, protocol } = *packet;
            let holds =
                |cell: &Cell| cell.source.contains(&source) && cell.destination.contains(&destination);
            if self.exceptions.iter().any(|other| holds(&other.cell) && other.protocol == protocol) {
                return Err(PassReason::Exception);
            }
            let cells = self.cells.iter().filter(|(cell, _)| holds(cell));
            let lengths = |cell: &Cell| (cell.destination.prefix_len(), cell.source.prefix_len());
            let (_, verdict) = cells.max_by_key(|(cell, _)| lengths(cell)).ok_or(PassReason::NoPolicy)?;
            let (slot, probes) = match verdict {
                Verdict::Pass(reason) => return Err(*reason),
                Verdict::Fast { slot, probes } => (*slot, *probes),
            };
            let forwarding = (*self.slots.get(&slot).ok_or(PassReason::EgressUnavailable)?)?;
            if probes.guards && self.guards.iter().any(|guard| guard.contains(&source)) {
                return Err(PassReason::Guarded);
            }
            match self.fact(Side::Destination, destination) {
                _ if !probes.destination => {}
                Some(Fact::Via(device)) if device == forwarding.ifindex => {}
                Some(Fact::Via(_)) => return Err(PassReason::RouteElsewhere),
                Some(Fact::Denied) | None => return Err(PassReason::DeniedDestination),
            }
            if probes.source && self.fact(Side::Source, source) == Some(Fact::Denied) {
                return Err(PassReason::DeniedSource);
            }
            Ok((slot, forwarding))
        }

        fn fact(&self, wanted: Side, address: IpAddr) -> Option<Fact> {
            let facts = self.facts.iter();
            facts
                .filter(|((side, prefix), _)| *side == wanted && prefix.contains(&address))
                .max_by_key(|((_, prefix), _)| prefix.prefix_len())
                .map(|(_, fact)| *fact)
        }
    }

    fn set<K: Copy + Ord, V: Copy>(map: &mut BTreeMap<K, V>, changes: &[(K, Option<V>)]) {
        for (key, value) in changes {
            match value {
                Some(value) => map.insert(*key, *value),
                None => map.remove(key),
            };
        }
    }

    fn add_or_remove<T: Copy + Ord>(to: &mut BTreeSet<T>, changes: &[(T, bool)]) {
        for (item, add) in changes {
            if *add {
                to.insert(*item);
            } else {
                to.remove(item);
            }
        }
    }

    fn changes<K: Copy + Ord, V: Copy + PartialEq>(
        old: &BTreeMap<K, V>,
        new: &BTreeMap<K, V>,
    ) -> Vec<(K, Option<V>)> {
        let removed = old.keys().filter(|key| !new.contains_key(key)).map(|key| (*key, None));
        let set = new.iter().filter(|(key, value)| old.get(key) != Some(value));
        removed.chain(set.map(|(key, value)| (*key, Some(*value)))).collect()
    }

    fn additions_and_removals<T: Copy + Ord>(old: &BTreeSet<T>, new: &BTreeSet<T>) -> Vec<(T, bool)> {
        let removed = old.difference(new).map(|item| (*item, false));
        removed.chain(new.difference(old).map(|item| (*item, true))).collect()
    }

    #[derive(Clone, Copy, Debug)]
    struct Packet {
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
    }

    fn packets() -> impl Iterator<Item = Packet> {
        let address = |last| IpAddr::from([10, 0, 0, last]);
        (0..4).flat_map(move |source| {
            (0..4).flat_map(move |destination| {
                let packet = move |protocol| Packet {
                    source: address(source),
                    destination: address(destination),
                    protocol,
                };
                [packet(6), packet(17)]
            })
        })
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (0..4_u8, 29..=32_u8)
            .prop_map(|(host, length)| IpNet::new([10, 0, 0, host].into(), length).unwrap().trunc())
    }

    fn cell() -> impl Strategy<Value = Cell> {
        (prefix(), prefix()).prop_map(|(destination, source)| Cell { destination, source })
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        let probes = any::<[bool; 3]>().prop_map(|[destination, source, guards]| Probes {
            destination,
            source,
            guards,
        });
        prop_oneof![
            4 => (0..4_u32, probes).prop_map(|(slot, probes)| Verdict::Fast { slot: Slot(slot), probes }),
            1 => Just(Verdict::Pass(PassReason::Shadowed)),
        ]
    }

    fn fact() -> impl Strategy<Value = Fact> {
        prop_oneof![Just(Fact::Denied), Just(Fact::Via(7)), Just(Fact::Via(8))]
    }

    fn standing() -> impl Strategy<Value = Standing> {
        let forwarding = |(ifindex, max_length)| Ok(Forwarding { ifindex, max_length, rewrite: None });
        prop_oneof![
            4 => (7..=8_u32, 1400..1402_u16).prop_map(forwarding),
            1 => Just(Err(PassReason::NoSa)),
        ]
    }

    fn exception() -> impl Strategy<Value = Exception> {
        let any = PortMatch::default();
        (cell(), prop_oneof![Just(6), Just(17)]).prop_map(move |(cell, protocol)| Exception {
            cell,
            protocol,
            source_port: any,
            destination_port: any,
        })
    }

    fn table() -> impl Strategy<Value = Table> {
        let side = prop_oneof![Just(Side::Source), Just(Side::Destination)];
        let cells = btree_map(cell(), verdict(), 0..12);
        let facts = btree_map((side, prefix()), fact(), 0..8);
        let guards = btree_set(prefix(), 0..3);
        let exceptions = btree_set(exception(), 0..3);
        let slots = btree_map((0..4_u32).prop_map(Slot), standing(), 0..5);
        (cells, facts, guards, exceptions, slots).prop_map(|(cells, facts, guards, exceptions, slots)| {
            Table { cells, facts, guards, exceptions, slots }
        })
    }

    /// Two tables, the second of which has much of the first.
    fn tables() -> impl Strategy<Value = (Table, Table)> {
        (table(), table(), option::of(any::<u8>())).prop_map(|(old, mut new, kept)| {
            if let Some(kept) = kept {
                // Differences in few things, so that one of them alone decides.
                let keeps = |bit: u8| kept & bit != 0;
                if keeps(1) {
                    new.cells.clone_from(&old.cells);
                }
                if keeps(2) {
                    new.facts.clone_from(&old.facts);
                }
                if keeps(4) {
                    new.guards.clone_from(&old.guards);
                }
                if keeps(8) {
                    new.exceptions.clone_from(&old.exceptions);
                }
                if keeps(16) {
                    new.slots.clone_from(&old.slots);
                }
                new.cells.extend(old.cells.iter().skip(usize::from(kept >> 5)));
            }
            (old, new)
        })
    }

    /// Packets that are fast as neither table says, after one of the parts.
    fn wrong(old: &Table, new: &Table, parts: impl Iterator<Item = TableUpdate>) -> Vec<Packet> {
        let mut table = old.clone();
        let mut wrong = Vec::new();
        for part in parts {
            table.apply(&part);
            wrong.extend(packets().filter(|packet| {
                let decided = table.decide(packet);
                decided.is_ok() && decided != old.decide(packet) && decided != new.decide(packet)
            }));
        }
        assert_eq!(&table, new, "all parts together make the new table");
        wrong
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn a_packet_is_never_decided_as_neither_table_does((old, new) in tables(), limit in 0..6_usize) {
            let update = new.replacing(&old);
            let whole = update.len() <= limit;
            let parts: Vec<_> = update.clone().split(limit).collect();
            if whole {
                prop_assert_eq!(&parts, &[update]);
            }
            prop_assert!(parts.iter().all(|part| part.cells.len() <= limit.max(1)));
            let wrong = wrong(&old, &new, parts.into_iter());
            prop_assert!(wrong.is_empty(), "{:?}", wrong);
        }
    }

    #[test]
    fn other_ways_to_take_an_update_apart_are_found_to_be_wrong() {
        let mut runner = TestRunner::deterministic();
        let (mut one_by_one, mut reversed, mut fast) = (0, 0, 0);
        for _ in 0..512 {
            let (old, new) = tables().new_tree(&mut runner).unwrap().current();
            let update = new.replacing(&old);
            let cells = update
                .cells
                .iter()
                .map(|change| TableUpdate { cells: vec![*change], ..TableUpdate::default() });
            let rest = TableUpdate { cells: Vec::new(), ..update.clone() };
            one_by_one += wrong(&old, &new, cells.chain([rest])).len();
            let parts: Vec<_> = update.split(1).collect();
            if parts.len() > 1 {
                reversed += wrong(&old, &new, parts.iter().rev().chain(&parts).cloned()).len();
            }
            fast += packets().filter(|packet| old.decide(packet).is_ok()).count();
        }
        assert!(one_by_one > 100 && reversed > 100 && fast > 1000, "{one_by_one}, {reversed}, {fast}");
    }
}
