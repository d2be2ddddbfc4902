//! The counters of a table, for a process that takes over from an earlier one.
//!
//! Counters have a column for each CPU. Behind the last one is a column that no CPU writes to: there a process puts
//! what those before it have counted.

use std::{collections::HashMap, os::fd::AsFd as _};

use aya::maps::MapData;
use fastswan_ebpf::{Passes, Shared, SlotRecord};

use super::{maps::MapsError, mmap::Region};

/// The maps that a table's counters are in, and whose they are.
#[derive(Debug)]
pub(crate) struct Counters {
    slots: Region<SlotRecord>,
    passes: Region<Passes>,
}

impl Counters {
    /// The names of the maps, as in the object.
    pub(crate) const MAPS: [&'static str; 2] = ["SLOTS", "PASSES"];

    /// Maps the maps with those names.
    pub(crate) fn map([slots, passes]: [&MapData; 2]) -> Result<Self, MapsError> {
        let [slots_name, passes_name] = Self::MAPS;
        Ok(Self { slots: map(slots, slots_name)?, passes: map(passes, passes_name)? })
    }

    /// The columns of the slots, the last of which belongs to no CPU.
    fn columns(&self) -> impl DoubleEndedIterator<Item = &[SlotRecord]> {
        let slots = self.slots.len() / self.passes.len().max(1);
        self.slots.chunks_exact(slots.max(1))
    }

    /// Adds what an earlier table has passed, and what it has forwarded for the policies that are in this one too.
    ///
    /// Slots must not be filled or freed meanwhile, and no packet be counted by the earlier table.
    pub(crate) fn inherit(&self, earlier: &Self) {
        let mut traffic: HashMap<u32, (u64, u64)> = HashMap::new();
        for (slot, record) in earlier.columns().next_back().into_iter().flatten().enumerate() {
            let policy = record.policy();
            if policy != 0 {
                let sum = traffic.entry(policy).or_default();
                for record in earlier.columns().filter_map(|column| column.get(slot)) {
                    sum.0 += record.packets.load();
                    sum.1 += record.bytes.load();
                }
            }
        }
        for record in self.columns().next_back().into_iter().flatten() {
            if let Some((packets, bytes)) = traffic.get(&record.policy()) {
                record.packets.add(*packets);
                record.bytes.add(*bytes);
            }
        }
        if let Some(inherited) = self.passes.last() {
            for column in earlier.passes.iter() {
                inherited.asked.add(column.asked.load());
                for (sum, packets) in inherited.packets.iter().zip(&column.packets) {
                    sum.add(packets.load());
                }
            }
        }
    }
}

fn map<T: Shared>(map: &MapData, name: &'static str) -> Result<Region<T>, MapsError> {
    let info = map.info()?;
    if info.value_size() as usize != size_of::<T>() {
        return Err(MapsError::OtherLayout { name, size: info.value_size() });
    }
    Region::map(map.fd().as_fd(), info.max_entries() as usize)
        .map_err(|error| MapsError::Mmap { name, error })
}
