//! A table in the maps of the XDP program.

use std::{
    fmt,
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError},
};
#[cfg(feature = "guard")]
use fastswan_ebpf::Control;
use fastswan_ebpf::{EXCEPTION_LISTS, LISTS, PORT_SLOTS, Shared};

use super::{
    Capacity, OffloadTable, Removals, TableConfig, TableError, TableUpdate,
    devices::Devices,
    mmap::Region,
    store::{Regions, Store, of_store},
};
use crate::{
    policy::Family,
    sys::{grace_period, monotonic_coarse_nanoseconds},
};

/// The table that the XDP program of an [`XdpForwarder`](crate::XdpForwarder) reads.
///
/// Writing to it takes no system call, but for devices that no other slot uses, and for slots that are used
/// again: before a slot gets another policy, the kernel is asked for a grace period (`membarrier(2)`), so
/// that no packet is counted for the wrong one.
pub struct BpfTable {
    store: Store,
    devices: Devices,
    /// What to add to `CLOCK_MONOTONIC_COARSE` here to get the program's time: a time namespace shifts the
    /// one and not the other.
    clock_offset: i64,
}

impl fmt::Debug for BpfTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The device map cannot be shown, and the rest is too much to show.
        f.debug_struct("BpfTable").field("capacity", &self.store.capacity()).finish_non_exhaustive()
    }
}

/// The maps that a loaded object has are not the ones that this library knows.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapsError {
    #[error("the object has no map {0}")]
    Missing(&'static str),
    #[error("map {name} cannot be mapped: {error}")]
    Mmap { name: &'static str, error: rustix::io::Errno },
    #[error("map {name} has values of {size} bytes, which is another layout")]
    OtherLayout { name: &'static str, size: u32 },
    #[error(transparent)]
    Map(#[from] MapError),
}

impl BpfTable {
    /// The lengths that the maps must be created with. Counters have a column for each CPU, and one more for
    /// what earlier processes counted ([`Counters`](super::Counters)).
    pub(crate) fn map_lengths(config: &TableConfig, cpus: u32) -> [(&'static str, u32); 7] {
        [
            ("CELLS_V4", config.cell_buckets(Family::V4)),
            ("CELLS_V6", config.cell_buckets(Family::V6)),
            ("EXCEPTIONS_V4", config.exception_buckets()),
            ("EXCEPTIONS_V6", config.exception_buckets()),
            ("FORWARDINGS", config.slots),
            ("TRAFFIC", config.slots.saturating_mul(cpus + 1)),
            ("PASSES", cpus + 1),
        ]
    }

    /// Takes the maps of an object that was just loaded with [`Self::map_lengths`].
    pub(crate) fn take(
        ebpf: &mut Ebpf,
        config: &TableConfig,
        cpus: u32,
        clock_offset: i64,
    ) -> Result<Self, MapsError> {
        let buckets = |family| config.cell_buckets(family) as usize;
        let exception_buckets = config.exception_buckets() as usize;
        let slots = config.slots as usize;
        let columns = cpus as usize + 1;
        let regions = Regions {
            control: map(ebpf, "CONTROL", 1)?,
            cells_v4: map(ebpf, "CELLS_V4", buckets(Family::V4))?,
            cells_v6: map(ebpf, "CELLS_V6", buckets(Family::V6))?,
            tuples_v4: map(ebpf, "TUPLES_V4", LISTS)?,
            tuples_v6: map(ebpf, "TUPLES_V6", LISTS)?,
            exceptions_v4: map(ebpf, "EXCEPTIONS_V4", exception_buckets)?,
            exceptions_v6: map(ebpf, "EXCEPTIONS_V6", exception_buckets)?,
            exception_tuples_v4: map(ebpf, "UPPER_TUPLES_V4", EXCEPTION_LISTS)?,
            exception_tuples_v6: map(ebpf, "UPPER_TUPLES_V6", EXCEPTION_LISTS)?,
            forwardings: map(ebpf, "FORWARDINGS", slots)?,
            ports: map(ebpf, "PORTS", PORT_SLOTS)?,
            traffic: map(ebpf, "TRAFFIC", slots * columns)?,
            passes: map(ebpf, "PASSES", columns)?,
        };
        let devices = ebpf.take_map("DEVICES").ok_or(MapsError::Missing("DEVICES"))?;
        Ok(Self {
            store: Store::new(regions, config),
            devices: Devices::new(devices.try_into()?),
            clock_offset,
        })
    }
}

/// Counts a removal, so that everything passes until it is acknowledged.
#[cfg(feature = "guard")]
pub(crate) fn begin_removal(ebpf: &Ebpf) -> Result<(), MapsError> {
    let control: Region<Control> = map(ebpf, "CONTROL", 1)?;
    control[0].removals.atomic().fetch_add(1, std::sync::atomic::Ordering::AcqRel);
    Ok(())
}

/// An array map of an object.
pub(crate) fn array<'e>(ebpf: &'e Ebpf, name: &'static str) -> Result<&'e MapData, MapsError> {
    match ebpf.map(name) {
        Some(Map::Array(data)) => Ok(data),
        _ => Err(MapsError::Missing(name)),
    }
}

fn map<T: Shared>(ebpf: &Ebpf, name: &'static str, length: usize) -> Result<Region<T>, MapsError> {
    let fd: BorrowedFd<'_> = array(ebpf, name)?.fd().as_fd();
    Region::map(fd, length).map_err(|error| MapsError::Mmap { name, error })
}

impl OffloadTable for BpfTable {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        let reachable = self.devices.enter(&update.slots);
        if reachable.is_err() {
            self.store.set_enabled(false);
        }
        let applied = reachable.and_then(|()| self.store.apply(update, grace_period));
        self.devices.leave();
        applied
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.store.set_enabled(enabled);
    }

    fn renew_lease(&mut self, lease: Duration) {
        let now = monotonic_coarse_nanoseconds().saturating_add_signed(self.clock_offset);
        self.store.renew_lease(now, lease);
    }

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

of_store!(BpfTable);

impl super::Devices for BpfTable {}
