//! The counters of a table, for a process that takes over from an earlier one.
//!
//! Counters have a column for each CPU. Behind the last one is a column that no CPU writes to: there a process puts
//! what those before it have counted.

use std::{collections::HashMap, os::fd::AsFd as _};

use aya::maps::MapData;
use fastswan_ebpf::{Forwarded, Passes, Shared, SlotRecord};

use super::{maps::MapsError, mmap::Region};

/// The maps that a table's counters are in, and whose they are.
#[derive(Debug)]
pub(crate) struct Counters {
    slots: Region<SlotRecord>,
    forwarded: Region<Forwarded>,
    passes: Region<Passes>,
}

impl Counters {
    /// The names of the maps, as in the object.
    pub(crate) const MAPS: [&'static str; 3] = ["SLOTS", "FORWARDED", "PASSES"];

    /// Maps the maps with those names.
    pub(crate) fn map([slots, forwarded, passes]: [&MapData; 3]) -> Result<Self, MapsError> {
        let [slots_name, forwarded_name, passes_name] = Self::MAPS;
        Ok(Self {
            slots: map(slots, slots_name)?,
            forwarded: map(forwarded, forwarded_name)?,
            passes: map(passes, passes_name)?,
        })
    }

    /// What was counted for slots: columns, the last of which belongs to no CPU.
    fn columns(&self) -> impl DoubleEndedIterator<Item = &[Forwarded]> {
        self.forwarded.chunks_exact(self.slots.len().max(1))
    }

    /// Adds what an earlier table has passed, and what it has forwarded for the policies that are in this one too.
    ///
    /// Slots must not be filled or freed meanwhile, and no packet be counted by the earlier table.
    pub(crate) fn inherit(&self, earlier: &Self) {
        let mut traffic: HashMap<u32, (u64, u64)> = HashMap::new();
        for (slot, record) in earlier.slots.iter().enumerate() {
            let policy = record.policy();
            if policy != 0 {
                let sum = traffic.entry(policy).or_default();
                for forwarded in earlier.columns().filter_map(|column| column.get(slot)) {
                    sum.0 += forwarded.packets.load();
                    sum.1 += forwarded.bytes.load();
                }
            }
        }
        let inherited = self.columns().next_back().into_iter().flatten();
        for (record, inherited) in self.slots.iter().zip(inherited) {
            if let Some((packets, bytes)) = traffic.get(&record.policy()) {
                inherited.packets.add(*packets);
                inherited.bytes.add(*bytes);
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
