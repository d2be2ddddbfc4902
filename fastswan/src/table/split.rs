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
    use std::net::IpAddr;

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
        table::{Cell, Contents, Exception, Fact, Forwarding, Packet, Probes, Side, Slot, Standing},
    };

    fn packets() -> impl Iterator<Item = Packet> {
        let address = |last| IpAddr::from([10, 0, 0, last]);
        (0..4).flat_map(move |source| {
            (0..4).flat_map(move |destination| {
                let packet = Packet::new(address(source), address(destination));
                [6, 17].map(|protocol| packet.with_protocol(protocol, Some((1, 2))))
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

    fn table() -> impl Strategy<Value = Contents> {
        let side = prop_oneof![Just(Side::Source), Just(Side::Destination)];
        let cells = btree_map(cell(), verdict(), 0..12);
        let facts = btree_map((side, prefix()), fact(), 0..8);
        let guards = btree_set(prefix(), 0..3);
        let exceptions = btree_set(exception(), 0..3);
        let slots = btree_map((0..4_u32).prop_map(Slot), standing(), 0..5);
        (cells, facts, guards, exceptions, slots).prop_map(|(cells, facts, guards, exceptions, slots)| {
            Contents { cells, facts, guards, exceptions, slots, ..Contents::default() }
        })
    }

    /// Two tables, the second of which has much of the first.
    fn tables() -> impl Strategy<Value = (Contents, Contents)> {
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
    fn wrong(old: &Contents, new: &Contents, parts: impl Iterator<Item = TableUpdate>) -> Vec<Packet> {
        let mut table = old.clone();
        let mut wrong = Vec::new();
        for part in parts {
            table.apply(&part);
            wrong.extend(packets().filter(|packet| {
                let decided = table.decide(packet, None);
                decided.is_ok() && decided != old.decide(packet, None) && decided != new.decide(packet, None)
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
            fast += packets().filter(|packet| old.decide(packet, None).is_ok()).count();
        }
        assert!(one_by_one > 100 && reversed > 100 && fast > 1000, "{one_by_one}, {reversed}, {fast}");
    }
}
