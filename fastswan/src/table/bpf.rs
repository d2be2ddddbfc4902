//! A table in the maps of the XDP program.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    os::fd::{AsFd as _, BorrowedFd},
    time::Instant,
};

use aya::{
    Ebpf,
    maps::{Map, MapData, RingBuf},
};
use fastswan_ebpf::{ASK_NEVER, EXCEPTION_LISTS, LISTS, MAX_PORTS, PORT_BUCKETS, PassReason};

use super::{
    Asked, Capacity, Devices, OffloadTable, Port, Ports, Removals, Slot, TableConfig, TableCounters,
    TableError, TableUpdate, Traffic,
    clock::{Clock, whole_ticks},
    devices::DeviceMap,
    losses::Losses,
    maps::{MapsError, map},
    store::{Regions, Store, read_back},
};
use crate::{policy::Family, sys::grace_period};

/// The table that the XDP program of an [`XdpForwarder`](crate::XdpForwarder) reads.
///
/// Writing to it takes no system call, but for devices that no other slot uses, and for slots that are used
/// again: before a slot gets another policy, the kernel is asked for a grace period (`membarrier(2)`), so
/// that no packet is counted for the wrong one.
///
/// Needs Linux 6.12, as the [forwarder](crate::XdpForwarder) does that it comes with.
///
/// ```no_run
/// use fastswan::XdpForwarder;
/// use fastswan::table::{TableConfig, TableCounters as _};
///
/// let (_forwarder, table) = XdpForwarder::load(TableConfig::default())?;
/// for (reason, packets) in table.passes() {
///     println!("{}: {packets}", reason.name());
/// }
/// # Ok::<(), fastswan::forwarder::ForwarderError>(())
/// ```
pub struct BpfTable {
    store: Store,
    devices: DeviceMap,
    /// `None` if they are not counted.
    losses: Option<Losses>,
    /// The VLANs of each interface that have ports.
    ports_on: BTreeMap<u32, BTreeSet<u16>>,
    removals: RingBuf<MapData>,
    clock: Clock,
    /// Until when the lease was renewed last.
    renewed: Option<Instant>,
    /// When the kernel is asked, as [`Control::ask_mask`](fastswan_ebpf::Control::ask_mask).
    ask_mask: u64,
}

impl fmt::Debug for BpfTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The device map cannot be shown, and the rest is too much to show.
        f.debug_struct("BpfTable").field("capacity", &self.store.capacity()).finish_non_exhaustive()
    }
}

impl BpfTable {
    /// The lengths that the maps must be created with. Counters have a column for each CPU, and one more for
    /// what earlier processes counted ([`Counters`](super::Counters)).
    pub(crate) fn map_lengths(config: &TableConfig, cpus: u32) -> [(&'static str, u32); 8] {
        [
            ("CELLS_V4", config.cell_buckets(Family::V4)),
            ("CELLS_V6", config.cell_buckets(Family::V6)),
            ("EXCEPTIONS_V4", config.exception_buckets()),
            ("EXCEPTIONS_V6", config.exception_buckets()),
            ("SLOTS", config.slots),
            ("WAYS", config.ways()),
            ("FORWARDED", config.slots.saturating_mul(cpus + 1)),
            ("PASSES", cpus + 1),
        ]
    }

    /// Takes the maps of an object that was just loaded with [`Self::map_lengths`].
    pub(crate) fn take(
        ebpf: &mut Ebpf,
        config: &TableConfig,
        cpus: u32,
        ask_mask: u64,
    ) -> Result<Self, MapsError> {
        let buckets = |family| config.cell_buckets(family) as usize;
        let exception_buckets = config.exception_buckets() as usize;
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
            slots: map(ebpf, "SLOTS", config.slots as usize)?,
            ways: map(ebpf, "WAYS", config.ways() as usize)?,
            forwarded: map(ebpf, "FORWARDED", config.slots as usize * columns)?,
            port_buckets: map(ebpf, "PORT_BUCKETS", PORT_BUCKETS)?,
            ports: map(ebpf, "PORTS", MAX_PORTS)?,
            passes: map(ebpf, "PASSES", columns)?,
        };
        let devices_id = match ebpf.map("DEVICES") {
            Some(Map::DevMapHash(data)) => data.info()?.id(),
            _ => return Err(MapsError::Missing("DEVICES")),
        };
        let devices = ebpf.take_map("DEVICES").ok_or(MapsError::Missing("DEVICES"))?;
        let removals = ebpf.take_map("REMOVALS").ok_or(MapsError::Missing("REMOVALS"))?;
        let losses = Losses::attach(ebpf, map(ebpf, "LOSSES", 1)?, devices_id);
        let losses = losses.inspect_err(|error| {
            tracing::info!(%error, "packets that are lost on their way to a device are not counted");
        });
        Ok(Self {
            store: Store::new(regions, config),
            devices: DeviceMap::new(devices.try_into()?),
            losses: losses.ok(),
            ports_on: BTreeMap::new(),
            removals: removals.try_into()?,
            clock: Clock::take(ebpf)?,
            renewed: None,
            ask_mask,
        })
    }
}

impl OffloadTable for BpfTable {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        self.devices.enter(&update.slots, &mut self.store);
        let applied = self.store.apply(update, grace_period);
        self.devices.leave(&mut self.store);
        applied
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.store.set_enabled(enabled);
    }

    fn renew_lease(&mut self, until: Instant) {
        // A loop that turns often asks for the time only where that makes a difference.
        let is_same = |renewed| (renewed..renewed + self.clock.tick()).contains(&until);
        if self.renewed.is_some_and(is_same) {
            return;
        }
        // In this order: while this thread is kept from running between the two, the lease gets shorter, not longer.
        match self.clock.now() {
            Ok(now) => {
                let left = until.saturating_duration_since(Instant::now());
                self.store.renew_lease(now, whole_ticks(left, self.clock.tick()));
                self.renewed = Some(until);
            }
            Err(error) => {
                tracing::warn!(%error, "the program does not tell the time: the lease is not renewed");
            }
        }
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

    fn set_asking(&mut self, asking: bool) {
        self.store.set_ask_mask(if asking { self.ask_mask } else { ASK_NEVER });
    }

    fn removal_signal(&self) -> Option<BorrowedFd<'_>> {
        Some(self.removals.as_fd())
    }

    fn drain_removal_signal(&mut self) {
        while self.removals.next().is_some() {}
    }
}

impl Ports for BpfTable {
    fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        self.store.set_port(port)?;
        let vlans = self.ports_on.entry(port.ifindex).or_default();
        if let Some(losses) = self.losses.as_mut().filter(|_| vlans.is_empty()) {
            losses.watch(port.ifindex, true);
        }
        vlans.insert(port.vlan);
        Ok(())
    }

    fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        self.store.remove_port(ifindex, vlan);
        if let Some(vlans) = self.ports_on.get_mut(&ifindex)
            && vlans.remove(&vlan)
            && vlans.is_empty()
        {
            self.ports_on.remove(&ifindex);
            if let Some(losses) = &mut self.losses {
                losses.watch(ifindex, false);
            }
        }
    }

    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        self.store.port(ifindex, vlan)
    }
}

impl Devices for BpfTable {
    fn refresh_devices(&mut self) {
        self.devices.refresh(&mut self.store);
    }

    fn takes_redirects(&self, ifindex: u32) -> bool {
        self.devices.takes_redirects(ifindex)
    }
}

impl TableCounters for BpfTable {
    fn traffic(&self, slot: Slot) -> Traffic {
        self.store.traffic(slot)
    }

    fn passes(&self) -> Vec<(PassReason, u64)> {
        self.store.passes()
    }

    fn lost(&self) -> Option<u64> {
        self.losses.as_ref().map(Losses::count)
    }

    fn asked(&self) -> Asked {
        self.store.asked()
    }
}

read_back!(BpfTable);
