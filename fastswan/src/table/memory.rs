//! A table in ordinary memory.

use std::time::Instant;

use fastswan_ebpf::{EXCEPTION_LISTS, LISTS, MAX_PORTS, PORT_BUCKETS, PassReason};

use super::{
    Capacity, Devices, OffloadTable, Port, Ports, Removals, Slot, TableConfig, TableCounters, TableError,
    TableUpdate, Traffic,
    mmap::Region,
    store::{Regions, Store, read_back},
};
use crate::policy::Family;

/// A table that no program reads: for tests, simulation and answers to "what would happen".
///
/// It has the layout, the limits and the lookup of a [`BpfTable`](super::BpfTable).
///
/// ```
/// use fastswan::table::{Cell, Change, Forwarding, Probes, ReadBack as _, Slot, TableConfig, TableUpdate, Verdict};
/// use fastswan::{MemoryTable, OffloadTable as _};
///
/// let mut table = MemoryTable::new(&TableConfig::default());
/// let tunnel = Cell { source: "10.1.0.0/16".parse()?, destination: "10.2.0.0/16".parse()? };
/// let fast = Verdict::Fast { slot: Slot(0), probes: Probes::default() };
/// let forwarding = Forwarding { ifindex: 7, max_length: 1400, rewrite: None };
/// let mut update = TableUpdate::default();
/// update.push(Change::Slot(Slot(0), Some(Ok(forwarding))));
/// update.push(Change::Cell(tunnel, Some(fast)));
/// table.apply(&update)?;
/// assert_eq!(table.verdict("10.1.0.5".parse()?, "10.2.0.9".parse()?), Some(fast));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
            slots: Region::allocate(slots),
            ways: Region::allocate(config.ways() as usize),
            forwarded: Region::allocate(slots),
            port_buckets: Region::allocate(PORT_BUCKETS),
            ports: Region::allocate(MAX_PORTS),
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

    fn renew_lease(&mut self, _: Instant) {}

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

impl Ports for MemoryTable {
    fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        self.store.set_port(port)
    }

    fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        self.store.remove_port(ifindex, vlan);
    }

    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        self.store.port(ifindex, vlan)
    }
}

/// No packet is redirected, and none lost.
impl Devices for MemoryTable {
    fn refresh_devices(&mut self) {}

    fn takes_redirects(&self, _: u32) -> bool {
        true
    }
}

impl TableCounters for MemoryTable {
    fn traffic(&self, slot: Slot) -> Traffic {
        self.store.traffic(slot)
    }

    fn passes(&self) -> Vec<(PassReason, u64)> {
        self.store.passes()
    }

    fn lost(&self) -> Option<u64> {
        Some(0)
    }
}

read_back!(MemoryTable);
