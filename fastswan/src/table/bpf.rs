//! A table in the maps of the XDP program.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{
        Map, MapData, MapError,
        xdp::{DevMapHash, XdpMapError},
    },
};
use fastswan_ebpf::{PORT_SLOTS, PassReason, Shared};
use rustix::thread::{MembarrierCommand, membarrier};

use super::{
    Capacity, Fact, OffloadTable, Port, Side, Slot, TableConfig, TableError, TableUpdate, Traffic, Verdict,
    mmap::Region,
    redirect::takes_redirected_frames,
    store::{Regions, Store},
};
use crate::sys::monotonic_coarse_nanoseconds;

/// The table that the XDP program of an [`XdpForwarder`](crate::XdpForwarder) reads.
///
/// Writing to it takes no system call, but for the devices of new policies, and for slots that are used
/// again: before a slot gets another policy, the kernel is asked for a grace period (`membarrier(2)`), so
/// that no packet is counted for the wrong one.
pub struct BpfTable {
    store: Store,
    devices: DevMapHash<MapData>,
    /// Which device each slot uses.
    device_of: HashMap<Slot, u32>,
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
    #[error(transparent)]
    Map(#[from] MapError),
}

impl BpfTable {
    /// The lengths that the maps must be created with.
    pub(crate) fn map_lengths(config: &TableConfig, cpus: u32) -> [(&'static str, u32); 5] {
        [
            ("CELLS_V4", config.buckets()),
            ("CELLS_V6", config.buckets()),
            ("FORWARDINGS", config.slots),
            ("TRAFFIC", config.slots.saturating_mul(cpus)),
            ("PASSES", cpus),
        ]
    }

    /// Takes the maps of an object that was just loaded with [`Self::map_lengths`].
    pub(crate) fn take(
        ebpf: &mut Ebpf,
        config: &TableConfig,
        cpus: u32,
        clock_offset: i64,
    ) -> Result<Self, MapsError> {
        let buckets = config.buckets() as usize;
        let slots = config.slots as usize;
        let cpus = cpus as usize;
        let regions = Regions {
            control: map(ebpf, "CONTROL", 1)?,
            cells_v4: map(ebpf, "CELLS_V4", buckets)?,
            cells_v6: map(ebpf, "CELLS_V6", buckets)?,
            tuples_v4: map(ebpf, "TUPLES_V4", 3)?,
            tuples_v6: map(ebpf, "TUPLES_V6", 3)?,
            exceptions_v4: map(ebpf, "EXCEPTIONS_V4", 1)?,
            exceptions_v6: map(ebpf, "EXCEPTIONS_V6", 1)?,
            forwardings: map(ebpf, "FORWARDINGS", slots)?,
            ports: map(ebpf, "PORTS", PORT_SLOTS)?,
            traffic: map(ebpf, "TRAFFIC", slots * cpus)?,
            passes: map(ebpf, "PASSES", cpus)?,
        };
        let devices = ebpf.take_map("DEVICES").ok_or(MapsError::Missing("DEVICES"))?;
        Ok(Self {
            store: Store::new(regions, config),
            devices: devices.try_into()?,
            device_of: HashMap::new(),
            clock_offset,
        })
    }

    /// Makes the devices of an update reachable before packets are sent there.
    fn add_devices(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        let mut devices = BTreeSet::new();
        for (slot, forwarding) in &update.forwardings {
            let Some(forwarding) = forwarding else { continue };
            self.device_of.insert(*slot, forwarding.ifindex);
            devices.insert(forwarding.ifindex);
        }
        for ifindex in devices {
            self.add_device(ifindex)?;
        }
        Ok(())
    }

    /// Lets packets be redirected to a device, unless they would be lost on the way.
    fn add_device(&mut self, ifindex: u32) -> Result<(), TableError> {
        let reason = match takes_redirected_frames(ifindex) {
            Ok(true) => {
                // Even if it is there: the kernel drops devices that unregister.
                return self
                    .devices
                    .insert(ifindex, ifindex, None, 0)
                    .map_err(|error| TableError::Device { ifindex, error: io_error(error) });
            }
            Ok(false) => "its driver takes none; a veth device does when its peer has GRO on".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            ifindex,
            reason,
            "no packet is redirected to a device: only what arrives there is fast"
        );
        let _ = self.devices.remove(ifindex);
        Ok(())
    }

    fn remove_devices(&mut self, update: &TableUpdate) {
        for (slot, forwarding) in &update.forwardings {
            if forwarding.is_some() {
                continue;
            }
            let Some(ifindex) = self.device_of.remove(slot) else { continue };
            if !self.device_of.values().any(|&used| used == ifindex) {
                // It is gone already if the device is.
                let _ = self.devices.remove(ifindex);
            }
        }
    }
}

fn map<T: Shared>(ebpf: &mut Ebpf, name: &'static str, length: usize) -> Result<Region<T>, MapsError> {
    let Some(Map::Array(data)) = ebpf.map(name) else { return Err(MapsError::Missing(name)) };
    let fd: BorrowedFd<'_> = data.fd().as_fd();
    Region::map(fd, length).map_err(|error| MapsError::Mmap { name, error })
}

fn io_error(error: XdpMapError) -> io::Error {
    match error {
        XdpMapError::MapError(MapError::SyscallError(error)) => error.io_error,
        other => io::Error::other(other),
    }
}

/// Returns when every packet that was in the program at the call has left it.
///
/// `MEMBARRIER_CMD_GLOBAL` waits for an RCU grace period, and XDP programs run inside RCU read sections.
fn grace_period() {
    if membarrier(MembarrierCommand::Global).is_err() {
        // Not available with nohz_full. A packet is in the program for microseconds.
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl OffloadTable for BpfTable {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        if let Err(error) = self.add_devices(update) {
            self.store.set_enabled(false);
            return Err(error);
        }
        self.store.apply(update, grace_period)?;
        self.remove_devices(update);
        Ok(())
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.store.set_enabled(enabled);
    }

    fn renew_lease(&mut self, lease: Duration) {
        let now = monotonic_coarse_nanoseconds().saturating_add_signed(self.clock_offset);
        self.store.renew_lease(now, lease);
    }

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
