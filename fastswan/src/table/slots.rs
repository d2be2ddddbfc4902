//! Which ways packets of slots go, and what was counted for them.
//!
//! A slot names a way: a device and addresses, or the reason why packets pass. Slots whose packets go the same way share it, and
//! a change of a slot is one write. What is counted has a column for each CPU. One column more belongs to no CPU: there
//! lies what earlier processes counted ([`Counters`](super::Counters)).
//!
//! Everything is written while the sequence number is odd.

// Numbers are packed into words, and unpacked from them.
#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeMap;

use fastswan_ebpf::{Forwarded, PassReason, SlotRecord, Way};
use hashbrown::{HashMap, HashSet};

use super::{Forwarding, Slot, Standing, TableError, Traffic, mmap::Region};
use crate::policy::MacAddr;

#[derive(Debug)]
pub(super) struct Slots {
    records: Region<SlotRecord>,
    /// In columns as long as `records`.
    forwarded: Region<Forwarded>,
    ways: Ways,
    /// Freed since the last grace period: packets may still be counted for them.
    retired: HashSet<Slot>,
}

impl Slots {
    /// All are free.
    pub(super) fn new(records: Region<SlotRecord>, forwarded: Region<Forwarded>, ways: Region<Way>) -> Self {
        Self { records, forwarded, ways: Ways::new(ways), retired: HashSet::new() }
    }

    /// Whether a slot was freed, and packets may still be counted for it.
    pub(super) fn is_retired(&self, slot: Slot) -> bool {
        self.retired.contains(&slot)
    }

    /// Forgets what was counted for slots that were freed. No packet may be on its way that was found before.
    pub(super) fn recycle(&mut self) {
        for slot in std::mem::take(&mut self.retired) {
            self.clear(slot);
        }
    }

    /// Forgets what was counted for a slot.
    pub(super) fn clear(&self, slot: Slot) {
        for forwarded in self.columns(slot) {
            forwarded.packets.store(0);
            forwarded.bytes.store(0);
        }
    }

    /// Sets or frees a slot.
    pub(super) fn set(&mut self, slot: Slot, standing: Option<&Standing>) -> Result<(), TableError> {
        let before = self.record(slot)?.way();
        let way = standing.map_or(Way::FREE, |standing| self.ways.acquire(*standing));
        self.record(slot)?.set_way(way);
        self.ways.release(before);
        if standing.is_some() {
            self.retired.remove(&slot);
        } else {
            self.set_policy(slot, 0)?;
            self.retired.insert(slot);
        }
        Ok(())
    }

    /// Notes the kernel's index of a slot's policy, 0 if it has none.
    pub(super) fn set_policy(&self, slot: Slot, policy: u32) -> Result<(), TableError> {
        self.record(slot)?.set_policy(policy);
        Ok(())
    }

    pub(super) fn standing(&self, slot: Slot) -> Option<Standing> {
        self.ways.standing(self.record(slot).ok()?.way())
    }

    pub(super) fn traffic(&self, slot: Slot) -> Traffic {
        let mut sum = Traffic::default();
        for forwarded in self.columns(slot) {
            sum.packets += forwarded.packets.load();
            sum.bytes += forwarded.bytes.load();
        }
        sum
    }

    /// Lets packets be redirected to a device from CPUs with lower numbers only, or from all.
    pub(super) fn limit_cpus(&mut self, ifindex: u32, limit: Option<u16>) {
        self.ways.limit_cpus(ifindex, limit);
    }

    /// What each CPU has counted for a slot, and what earlier processes have.
    fn columns(&self, slot: Slot) -> impl Iterator<Item = &Forwarded> {
        self.forwarded.iter().skip(slot.0 as usize).step_by(self.records.len().max(1))
    }

    fn record(&self, slot: Slot) -> Result<&SlotRecord, TableError> {
        let no_such_slot = TableError::NoSuchSlot { slot, limit: self.records.len() };
        self.records.get(slot.0 as usize).ok_or(no_such_slot)
    }
}

/// The ways of packets, which slots share.
#[derive(Debug)]
struct Ways {
    /// The first is that of free slots.
    records: Region<Way>,
    known: HashMap<Standing, Entry>,
    free: Vec<u32>,
    /// Those from here on have never been used.
    unused: u32,
    /// From how many CPUs each device takes redirected packets, if not from all.
    cpus: BTreeMap<u32, u16>,
}

#[derive(Debug)]
struct Entry {
    index: u32,
    users: u32,
}

impl Ways {
    fn new(records: Region<Way>) -> Self {
        let unused = Way::FREE + 1;
        Self { records, known: HashMap::new(), free: Vec::new(), unused, cpus: BTreeMap::new() }
    }

    /// The index of this way. There is one for each slot, and each slot has one at most, but for the moment when it gets
    /// another: two more than slots are enough.
    fn acquire(&mut self, standing: Standing) -> u32 {
        if let Some(entry) = self.known.get_mut(&standing) {
            entry.users += 1;
            return entry.index;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.unused += 1;
            self.unused - 1
        });
        let record = &self.records[index as usize];
        let exit = match standing {
            Ok(Forwarding { ifindex, max_length, .. }) => {
                Way::exit(ifindex, max_length, self.cpus_of(ifindex))
            }
            Err(reason) => Way::passing(reason),
        };
        record.exit.store(exit);
        let rewrite = standing.ok().and_then(|forwarding| forwarding.rewrite);
        record.set_addresses(rewrite.map(|(source, destination)| (destination.0, source.0)));
        self.known.insert(standing, Entry { index, users: 1 });
        index
    }

    fn release(&mut self, index: u32) {
        let Some(standing) = self.standing(index) else { return };
        if let Some(entry) = self.known.get_mut(&standing) {
            entry.users -= 1;
            if entry.users == 0 {
                self.known.remove(&standing);
                self.free.push(index);
            }
        }
    }

    /// `None` for the way of free slots.
    fn standing(&self, index: u32) -> Option<Standing> {
        if index == Way::FREE {
            return None;
        }
        let record = self.records.get(index as usize)?;
        let exit = record.exit.load();
        if Way::device(exit) == 0 {
            return PassReason::from_index(Way::reason(exit)?).map(Err);
        }
        Some(Ok(Forwarding {
            ifindex: Way::device(exit),
            max_length: Way::max_length(exit) as u16,
            rewrite: record.addresses().map(|(destination, source)| (MacAddr(source), MacAddr(destination))),
        }))
    }

    fn limit_cpus(&mut self, ifindex: u32, limit: Option<u16>) {
        match limit {
            Some(limit) => drop(self.cpus.insert(ifindex, limit)),
            None => drop(self.cpus.remove(&ifindex)),
        }
        let cpus = self.cpus_of(ifindex);
        for record in self.records.iter().take(self.unused as usize) {
            let exit = record.exit.load();
            if Way::device(exit) == ifindex {
                record.exit.store(Way::exit(ifindex, Way::max_length(exit) as u16, cpus));
            }
        }
    }

    fn cpus_of(&self, ifindex: u32) -> u16 {
        self.cpus.get(&ifindex).copied().unwrap_or(u16::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::TableConfig;

    const COLUMNS: usize = 3;

    fn slots(count: u32) -> Slots {
        let config = TableConfig { slots: count, ..TableConfig::default() };
        let records = Region::allocate(count as usize);
        let forwarded = Region::allocate(count as usize * COLUMNS);
        Slots::new(records, forwarded, Region::allocate(config.ways() as usize))
    }

    /// Leaves by a device, for the neighbour with this number; 0 is none.
    fn towards(neighbour: u8) -> Forwarding {
        let mac = |last| MacAddr([2, 0, 0, 0, 0, last]);
        let rewrite = (neighbour != 0).then(|| (mac(0xff), mac(neighbour)));
        Forwarding { ifindex: 7, max_length: 1400, rewrite }
    }

    #[test]
    fn a_slot_stands_as_it_was_set() {
        let mut slots = slots(4);
        let standings = [Ok(towards(0)), Ok(towards(1)), Err(PassReason::NoSa)];
        for standing in standings {
            slots.set(Slot(2), Some(&standing)).unwrap();
            slots.set_policy(Slot(2), 9).unwrap();
            assert_eq!(slots.standing(Slot(2)), Some(standing));
        }
        slots.set(Slot(2), None).unwrap();
        assert!(slots.records.iter().all(|record| record.way_and_policy.load() == 0));
        assert!(matches!(slots.set(Slot(4), None), Err(TableError::NoSuchSlot { slot: Slot(4), limit: 4 })));
    }

    #[test]
    fn traffic_is_the_sum_of_all_columns() {
        let slots = slots(4);
        for (number, forwarded) in slots.forwarded.iter().enumerate() {
            forwarded.packets.store(1 << number);
            forwarded.bytes.store(100 << number);
        }
        let sum = 1 << 2 | 1 << 6 | 1 << 10;
        assert_eq!(slots.traffic(Slot(2)), Traffic { packets: sum, bytes: 100 * sum });
        slots.clear(Slot(2));
        assert_eq!(slots.traffic(Slot(2)), Traffic::default());
        assert_eq!(self::slots(0).traffic(Slot(0)), Traffic::default(), "a table without slots");
        assert_eq!(slots.traffic(Slot(1)).packets, 1 << 1 | 1 << 5 | 1 << 9);
    }

    /// Ways before and after are limited, those of other devices not.
    #[test]
    fn cpus_are_those_of_the_device() {
        let mut slots = slots(4);
        let other = Forwarding { ifindex: 8, ..towards(0) };
        slots.set(Slot(0), Some(&Ok(towards(0)))).unwrap();
        slots.set(Slot(1), Some(&Ok(other))).unwrap();
        slots.limit_cpus(7, Some(2));
        slots.set(Slot(2), Some(&Ok(towards(1)))).unwrap();
        let cpus = |slots: &Slots| {
            [0, 1, 2]
                .map(|slot| Way::cpus(slots.ways.records[slots.records[slot].way() as usize].exit.load()))
        };
        assert_eq!(cpus(&slots), [2, u32::from(u16::MAX), 2]);
        slots.limit_cpus(7, None);
        assert_eq!(cpus(&slots), [u32::from(u16::MAX); 3]);
    }

    /// Slots that go the same way share it; each gets another as often as it likes, and there is always room.
    #[test]
    fn ways_are_shared_and_used_again() {
        let mut slots = slots(8);
        for slot in 0..8 {
            slots.set(Slot(slot), Some(&Ok(towards(1)))).unwrap();
        }
        assert_eq!(slots.ways.unused, 2);
        for turn in 0..50_u8 {
            for slot in 0..8 {
                // All different in one turn, some the same and some without addresses in the next.
                let neighbour = if turn % 2 == 0 { turn + slot } else { slot % 3 };
                slots.set(Slot(slot.into()), Some(&Ok(towards(neighbour)))).unwrap();
            }
            for slot in 0..8 {
                let neighbour = if turn % 2 == 0 { turn + slot } else { slot % 3 };
                assert_eq!(slots.standing(Slot(slot.into())), Some(Ok(towards(neighbour))));
            }
        }
        for slot in 0..8 {
            slots.set(Slot(slot), None).unwrap();
        }
        assert!(slots.ways.known.is_empty());
        assert!(slots.ways.unused as usize <= slots.ways.records.len());
    }
}
