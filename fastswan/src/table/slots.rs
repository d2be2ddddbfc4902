//! How packets of slots leave, and what was counted for them.
//!
//! A slot has a record in a column for each CPU: what the program reads and what it counts for a packet lie in one cache
//! line. A change is written to all columns, while the sequence number is odd. One column more belongs to no CPU: there lie
//! the kernel's index of the slot's policy, and what earlier processes counted ([`Counters`](super::Counters)).
//!
//! Addresses to write are in a table of their own, where slots with the same next hop share an entry.

// Numbers are packed into words, and unpacked from them.
#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, HashMap, HashSet};

use fastswan_ebpf::{NextHop, PassReason, SlotRecord};

use super::{Forwarding, Slot, Standing, TableError, Traffic, mmap::Region};
use crate::policy::MacAddr;

/// Source and destination address.
type Addresses = (MacAddr, MacAddr);

#[derive(Debug)]
pub(super) struct Slots {
    records: Region<SlotRecord>,
    /// How many there are: the length of a column.
    count: usize,
    next_hops: NextHops,
    /// Freed since the last grace period: packets may still be counted for them.
    retired: HashSet<Slot>,
    /// From how many CPUs each device takes redirected packets, if not from all.
    cpus: BTreeMap<u32, u16>,
}

impl Slots {
    /// All are free.
    pub(super) fn new(records: Region<SlotRecord>, count: usize, next_hops: Region<NextHop>) -> Self {
        let next_hops = NextHops::new(next_hops);
        Self { records, count, next_hops, retired: HashSet::new(), cpus: BTreeMap::new() }
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
        for record in self.columns(slot) {
            record.packets.store(0);
            record.bytes.store(0);
        }
    }

    /// Sets or frees a slot.
    pub(super) fn set(&mut self, slot: Slot, standing: Option<&Standing>) -> Result<(), TableError> {
        let before = self.last(slot)?.next_hop();
        let next_hop = match standing {
            Some(Ok(Forwarding { rewrite: Some(addresses), .. })) => self.next_hops.acquire(*addresses),
            _ => SlotRecord::NO_NEXT_HOP,
        };
        let way = match standing {
            Some(Ok(Forwarding { ifindex, max_length, .. })) => {
                SlotRecord::way(*ifindex, *max_length, self.cpus_of(*ifindex))
            }
            Some(Err(reason)) => SlotRecord::passing(*reason),
            None => SlotRecord::FREE,
        };
        for record in self.columns(slot) {
            record.set_next_hop(next_hop);
            record.way.store(way);
        }
        self.next_hops.release(before);
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
        self.last(slot)?.set_policy(policy);
        Ok(())
    }

    pub(super) fn standing(&self, slot: Slot) -> Option<Standing> {
        let record = self.last(slot).ok()?;
        let way = record.way.load();
        if SlotRecord::device(way) == 0 {
            return PassReason::from_index(SlotRecord::reason(way)?).map(Err);
        }
        Some(Ok(Forwarding {
            ifindex: SlotRecord::device(way),
            max_length: SlotRecord::max_length(way) as u16,
            rewrite: self.next_hops.addresses(record.next_hop()),
        }))
    }

    pub(super) fn traffic(&self, slot: Slot) -> Traffic {
        let mut sum = Traffic::default();
        for record in self.columns(slot) {
            sum.packets += record.packets.load();
            sum.bytes += record.bytes.load();
        }
        sum
    }

    /// Lets packets be redirected to a device from CPUs with lower numbers only, or from all.
    pub(super) fn limit_cpus(&mut self, ifindex: u32, limit: Option<u16>) {
        let before = self.cpus_of(ifindex);
        match limit {
            Some(limit) => drop(self.cpus.insert(ifindex, limit)),
            None => drop(self.cpus.remove(&ifindex)),
        }
        let now = self.cpus_of(ifindex);
        if now != before {
            for record in self.records.iter() {
                let way = record.way.load();
                if SlotRecord::device(way) == ifindex {
                    record.way.store(SlotRecord::way(ifindex, SlotRecord::max_length(way) as u16, now));
                }
            }
        }
    }

    fn cpus_of(&self, ifindex: u32) -> u16 {
        self.cpus.get(&ifindex).copied().unwrap_or(u16::MAX)
    }

    /// The records of a slot.
    fn columns(&self, slot: Slot) -> impl Iterator<Item = &SlotRecord> {
        self.records.iter().skip(slot.0 as usize).step_by(self.count)
    }

    /// The record of a slot that belongs to no CPU.
    fn last(&self, slot: Slot) -> Result<&SlotRecord, TableError> {
        let limit = self.count;
        let exists = (slot.0 as usize) < limit;
        let position = self.records.len().checked_sub(limit).map(|start| start + slot.0 as usize);
        let record = position.filter(|_| exists).and_then(|position| self.records.get(position));
        record.ok_or(TableError::NoSuchSlot { slot, limit })
    }
}

/// Addresses to write, which slots share.
#[derive(Debug)]
struct NextHops {
    /// The first says nothing: to change nothing is no next hop.
    records: Region<NextHop>,
    known: HashMap<Addresses, Entry>,
    free: Vec<u32>,
    /// Those from here on have never been used.
    unused: u32,
}

#[derive(Debug)]
struct Entry {
    index: u32,
    users: u32,
}

impl NextHops {
    fn new(records: Region<NextHop>) -> Self {
        Self { records, known: HashMap::new(), free: Vec::new(), unused: SlotRecord::NO_NEXT_HOP + 1 }
    }

    /// The index of these addresses. There is one for each slot, and each slot has one at most, but for the moment when it
    /// gets another: two more than slots are enough.
    fn acquire(&mut self, addresses: Addresses) -> u32 {
        let Self { records, known, free, unused } = self;
        let entry = known.entry(addresses).or_insert_with(|| {
            let index = free.pop().unwrap_or_else(|| {
                *unused += 1;
                *unused - 1
            });
            let (source, destination) = addresses;
            records[index as usize].set(destination.0, source.0);
            Entry { index, users: 0 }
        });
        entry.users += 1;
        entry.index
    }

    fn release(&mut self, index: u32) {
        let Some(addresses) = self.addresses(index) else { return };
        if let Some(entry) = self.known.get_mut(&addresses) {
            entry.users -= 1;
            if entry.users == 0 {
                self.known.remove(&addresses);
                self.free.push(index);
            }
        }
    }

    fn addresses(&self, index: u32) -> Option<Addresses> {
        if index == SlotRecord::NO_NEXT_HOP {
            return None;
        }
        let (destination, source) = self.records.get(index as usize)?.addresses();
        Some((MacAddr(source), MacAddr(destination)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::TableConfig;

    const COLUMNS: usize = 3;

    fn slots(count: u32) -> Slots {
        let config = TableConfig { slots: count, ..TableConfig::default() };
        let records = Region::allocate(count as usize * COLUMNS);
        Slots::new(records, count as usize, Region::allocate(config.next_hops() as usize))
    }

    /// Leaves by a device, for the neighbour with this number; 0 is none.
    fn towards(neighbour: u8) -> Forwarding {
        let mac = |last| MacAddr([2, 0, 0, 0, 0, last]);
        let rewrite = (neighbour != 0).then(|| (mac(0xff), mac(neighbour)));
        Forwarding { ifindex: 7, max_length: 1400, rewrite }
    }

    #[test]
    fn a_change_reaches_every_column() {
        let mut slots = slots(4);
        slots.set(Slot(2), Some(&Ok(towards(1)))).unwrap();
        let ways: Vec<u64> = slots.records.iter().map(|record| record.way.load()).collect();
        let way = SlotRecord::way(7, 1400, u16::MAX);
        assert_eq!(ways, [[0, 0, way, 0]; COLUMNS].concat());
        slots.limit_cpus(7, Some(2));
        assert!(slots.columns(Slot(2)).all(|record| SlotRecord::cpus(record.way.load()) == 2));
        slots.set(Slot(2), None).unwrap();
        assert!(slots.records.iter().all(|record| record.way.load() == SlotRecord::FREE));
        assert!(matches!(slots.set(Slot(4), None), Err(TableError::NoSuchSlot { slot: Slot(4), limit: 4 })));
    }

    /// Slots that go the same way share a next hop; each gets another as often as it likes, and there is always room.
    #[test]
    fn next_hops_are_shared_and_used_again() {
        let mut slots = slots(8);
        for slot in 0..8 {
            slots.set(Slot(slot), Some(&Ok(towards(1)))).unwrap();
        }
        assert_eq!(slots.next_hops.unused, 2);
        for turn in 0..50_u8 {
            for slot in 0..8 {
                // All different in one turn, some the same and some none in the next.
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
        assert!(slots.next_hops.known.is_empty());
        assert!(slots.next_hops.unused as usize <= slots.next_hops.records.len());
    }
}
