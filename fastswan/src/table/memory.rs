//! A table in ordinary memory.

use std::{net::IpAddr, time::Duration};

use fastswan_ebpf::{PORT_SLOTS, PassReason};

use super::{
    Capacity, Fact, OffloadTable, Port, Side, Slot, TableConfig, TableError, TableUpdate, Traffic, Verdict,
    mmap::Region,
    store::{Regions, Store},
};

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
        let buckets = config.buckets() as usize;
        let slots = config.slots as usize;
        let regions = Regions {
            control: Region::allocate(1),
            cells_v4: Region::allocate(buckets),
            cells_v6: Region::allocate(buckets),
            tuples_v4: Region::allocate(3),
            tuples_v6: Region::allocate(3),
            exceptions_v4: Region::allocate(1),
            exceptions_v6: Region::allocate(1),
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

    fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        self.store.set_port(port)
    }

    fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        self.store.remove_port(ifindex, vlan);
    }

    fn capacity(&self) -> Capacity {
        self.store.capacity()
    }

    fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict> {
        self.store.verdict(source, destination)
    }

    fn fact(&self, side: Side, address: IpAddr) -> Option<Fact> {
        self.store.fact(side, address)
    }

    fn traffic(&self, slot: Slot) -> Traffic {
        self.store.traffic(slot)
    }

    fn passes(&self) -> Vec<(PassReason, u64)> {
        self.store.passes()
    }
}
