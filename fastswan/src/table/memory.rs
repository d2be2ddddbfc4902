//! A table in ordinary memory.

use std::time::Duration;

use fastswan_ebpf::{EXCEPTION_LISTS, LISTS, PORT_SLOTS};

use super::{
    Capacity, OffloadTable, Removals, TableConfig, TableError, TableUpdate,
    mmap::Region,
    store::{Regions, Store, of_store},
};
use crate::policy::Family;

/// A table that no program reads: for tests, simulation and answers to "what would happen".
///
/// It has the layout, the limits and the lookup of a [`BpfTable`](super::BpfTable).
#[derive(Debug)]
pub struct MemoryTable {
    store: Store,
}

impl MemoryTable {
    /// An empty table.
    #[must_use]
    pub fn new(config: &TableConfig) -> Self {
        let buckets = |family| config.cell_buckets(family) as usize;
        let exception_buckets = config.exception_buckets() as usize;
        let slots = config.slots as usize;
        let regions = Regions {
            control: Region::allocate(1),
            cells_v4: Region::allocate(buckets(Family::V4)),
            cells_v6: Region::allocate(buckets(Family::V6)),
            tuples_v4: Region::allocate(LISTS),
            tuples_v6: Region::allocate(LISTS),
            exceptions_v4: Region::allocate(exception_buckets),
            exceptions_v6: Region::allocate(exception_buckets),
            exception_tuples_v4: Region::allocate(EXCEPTION_LISTS),
            exception_tuples_v6: Region::allocate(EXCEPTION_LISTS),
            forwardings: Region::allocate(slots),
            ports: Region::allocate(PORT_SLOTS),
            traffic: Region::allocate(slots),
            passes: Region::allocate(1),
        };
        Self { store: Store::new(regions, config) }
    }
}

impl OffloadTable for MemoryTable {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        self.store.apply(update, || {})
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.store.set_enabled(enabled);
    }

    fn renew_lease(&mut self, _: Duration) {}

    fn capacity(&self) -> Capacity {
        self.store.capacity()
    }

    fn removals(&self) -> Removals {
        self.store.removals()
    }

    fn acknowledge(&mut self, removals: u64) {
        self.store.acknowledge(removals);
    }
}

of_store!(MemoryTable);

impl super::Devices for MemoryTable {}
