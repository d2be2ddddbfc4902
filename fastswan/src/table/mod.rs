//! What the data path reads.
//!
//! An [`OffloadTable`] holds the cells that the [`Compiler`](crate::Compiler) made, the host facts that
//! belong to them, the exceptions, and how each policy's packets leave. Where packets may come in, what was counted
//! and what can be looked up are traits of their own: [`Ports`], [`TableCounters`], [`ReadBack`].
//!
//! [`BpfTable`] keeps all of it in BPF maps for the XDP program, [`MemoryTable`] in ordinary memory for tests and
//! simulation; both run the same code over the same layout (`fastswan-ebpf`). [`Contents`] keeps it as plain maps, to
//! judge the others by.
//!
//! A batch of changes is one [`TableUpdate`]. A packet sees all of a batch, nothing of it, or, if the batch
//! is being written at that moment, it is passed to the kernel.

use std::{net::IpAddr, time::Instant};

use fastswan_ebpf::PassReason;

#[cfg(feature = "bpf")]
pub use self::bpf::BpfTable;
#[cfg(feature = "guard")]
pub(crate) use self::maps::begin_removal;
pub use self::{
    contents::{Contents, Packet},
    entries::{Cell, Exception, Fact, Forwarding, Probes, Side, Slot, Standing, Verdict},
    error::TableError,
    memory::MemoryTable,
    size::{Capacity, Room, TableConfig},
    update::{Change, TableUpdate},
};
#[cfg(feature = "bpf")]
pub(crate) use self::{
    counters::Counters,
    maps::{MapsError, array},
    verify::verify,
};
pub use crate::host::{Forwards, Port, ReversePath};

#[cfg(feature = "bpf")]
mod bpf;
#[cfg(feature = "bpf")]
mod clock;
mod contents;
#[cfg(feature = "bpf")]
mod counters;
#[cfg(feature = "bpf")]
mod devices;
mod entries;
mod error;
#[cfg(feature = "bpf")]
mod losses;
#[cfg(feature = "bpf")]
mod maps;
mod memory;
mod mmap;
#[cfg(feature = "bpf")]
mod net_device;
mod size;
mod slots;
mod space;
mod split;
mod store;
mod update;
#[cfg(feature = "bpf")]
mod verify;

/// Packets and bytes (from the IP header on) that took the fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl std::ops::Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { packets: self.packets + other.packets, bytes: self.bytes + other.bytes }
    }
}

impl std::fmt::Display for Traffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} packets, {} bytes", self.packets, self.bytes)
    }
}

/// Removals of policies, associations and devices in the kernel, as numbers of the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removals {
    /// Begun, says the guard; 0 if there is none.
    pub begun: u64,
    /// Acknowledged by the driver, which writes the table.
    pub acknowledged: u64,
}

/// What the kernel's own routes said of packets that the table makes fast: the program asks about one packet in many
/// (`LoadConfig::ask_back`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Asked {
    /// Packets that they were asked about.
    pub asked: u64,
    /// Those of them that they lead elsewhere, or nowhere: they passed ([`PassReason::FibDiffers`]).
    pub differs: u64,
}

/// What the data path reads, as it is written.
///
/// Methods that change something take effect for packets that arrive after they return.
pub trait OffloadTable: Send {
    /// Applies a batch of changes, all or nothing as far as packets are concerned.
    ///
    /// # Errors
    ///
    /// [`TableError`] if it does not fit or names something that does not exist. The table then holds an
    /// undefined part of the batch, and the kill switch is on.
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError>;

    /// Turns the fast path on, or off: the kill switch. A new table is off.
    fn set_enabled(&mut self, enabled: bool);

    /// Declares that what is written may be forwarded by until then. When no renewal comes in time, every packet
    /// passes to the kernel.
    ///
    /// A moment, not a duration: whoever computes how long it is until then may be kept from running afterwards.
    fn renew_lease(&mut self, until: Instant);

    /// How much it holds.
    fn capacity(&self) -> Capacity;

    /// How many removals a guard has counted, and up to which of them the table has been acknowledged to hold what
    /// follows: as long as these differ, every packet passes to the kernel. Without a guard both are 0.
    fn removals(&self) -> Removals {
        Removals::default()
    }

    /// Declares that the table holds what follows from all removals up to this one, the [`Removals::begun`] of an
    /// earlier call of [`Self::removals`].
    fn acknowledge(&mut self, removals: u64) {
        let _ = removals;
    }

    /// Has the kernel's own routes asked about one packet in many that would be fast, or about none, as it is with a new
    /// table. A packet for which they do not lead to its policy's device passes: see [`TableCounters::asked`].
    fn set_asking(&mut self, asking: bool) {
        let _ = asking;
    }

    /// What becomes readable when a guard has counted a removal, or the kernel's routes have disagreed, so that a driver need
    /// not look at [`Self::removals`] and [`TableCounters::asked`] all the time: [drain](Self::drain_removal_signal) it, then
    /// look. `None` if there is no such thing.
    #[cfg(unix)]
    fn removal_signal(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    /// Makes what signals removals unreadable until the next one.
    fn drain_removal_signal(&mut self) {}
}

/// Where packets may come in. Frames of an (interface, VLAN) that is no port pass to the kernel.
pub trait Ports {
    /// Adds a port, or changes the one with the same (interface, VLAN).
    ///
    /// # Errors
    ///
    /// [`TableError::TooManyPorts`]. The others stay, and frames of this one pass: log it and go on.
    fn set_port(&mut self, port: &Port) -> Result<(), TableError>;

    /// Removes a port; its frames pass from now on.
    fn remove_port(&mut self, ifindex: u32, vlan: u16);

    /// The port of an (interface, VLAN), if there is one.
    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port>;
}

/// What a table has counted.
pub trait TableCounters {
    /// What a slot has forwarded.
    fn traffic(&self, slot: Slot) -> Traffic;

    /// Packets that were passed, by reason. Reasons without packets are left out.
    fn passes(&self) -> Vec<(PassReason, u64)>;

    /// Packets that are counted as forwarded and did not leave: that could not be handed to their device, or that its
    /// driver did not take, since its queue was full, for instance. `None` if that is not counted.
    fn lost(&self) -> Option<u64> {
        None
    }

    /// What the kernel's own routes were asked, and how often they disagreed.
    fn asked(&self) -> Asked {
        Asked::default()
    }
}

/// The devices that packets are redirected to, which came in elsewhere. Packets for one that takes none pass
/// ([`PassReason::EgressUnavailable`]), and those that come in on a CPU that it has no channel for
/// ([`PassReason::NoChannel`]).
pub trait Devices {
    /// Asks the kernel again which devices take redirected packets, and from which CPUs. Call it when devices have
    /// changed. Runs in the network namespace that the devices are in.
    fn refresh_devices(&mut self) {}

    /// Whether packets are redirected to a device; `false` also for one that no slot names.
    fn takes_redirects(&self, ifindex: u32) -> bool {
        let _ = ifindex;
        true
    }
}

/// What a table holds, as the data path finds it.
pub trait ReadBack {
    /// The cell's verdict for a packet between two addresses.
    fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict>;

    /// The host fact for an address.
    fn fact(&self, side: Side, address: IpAddr) -> Option<Fact>;

    /// Whether a guard is about a source.
    fn is_guarded(&self, source: IpAddr) -> bool;

    /// Whether an exception is about a packet. `ports` are those that the kernel compares with a selector's: ICMP type
    /// and code for ICMP, 0 and 0 for protocols that have none, `None` if they cannot be read.
    fn is_exception(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        ports: Option<(u16, u16)>,
    ) -> bool;

    /// How a slot's packets leave, or why they pass; `None` if it is free.
    fn standing(&self, slot: Slot) -> Option<Standing>;
}
