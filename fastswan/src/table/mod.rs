//! What the data path reads.
//!
//! An [`OffloadTable`] holds the cells that the [`Compiler`](crate::Compiler) made, the host facts that
//! belong to them, the exceptions, how each policy's packets leave, and the ports. [`BpfTable`] keeps it in
//! BPF maps for the XDP program, [`MemoryTable`] in ordinary memory for tests and simulation; both run the
//! same code over the same layout (`fastswan-ebpf`).
//!
//! A batch of changes is one [`TableUpdate`]. A packet sees all of a batch, nothing of it, or, if the batch
//! is being written at that moment, it is passed to the kernel.

use std::{fmt, io, net::IpAddr, time::Duration};

use fastswan_ebpf::{MAX_TUPLES, PassReason};
use ipnet::IpNet;

#[cfg(feature = "guard")]
pub(crate) use self::bpf::begin_removal;
pub use self::{bpf::BpfTable, memory::MemoryTable};
pub(crate) use self::{
    bpf::{MapsError, array, grace_period},
    counters::Counters,
};
use crate::policy::{Family, MacAddr, PortMatch};

mod bpf;
mod counters;
mod devices;
mod memory;
mod mmap;
mod space;
mod split;
mod store;

/// A region of the plane of addresses: the packets from `source` to `destination`.
///
/// Among the cells that contain a packet, the one with the longest destination, then the longest source,
/// decides. Both prefixes are of one family and without host bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cell {
    /// Destination prefix.
    pub destination: IpNet,
    /// Source prefix.
    pub source: IpNet,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.source, self.destination)
    }
}

/// Number of a policy in the table: the index of its [`Forwarding`] and of its counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// What happens to the packets of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// They go to the kernel.
    Pass(PassReason),
    /// They leave the way the slot says.
    Fast {
        /// Whose packets they are.
        slot: Slot,
        /// What is looked up before.
        probes: Probes,
    },
}

/// What must be looked up for each packet of a fast cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Probes {
    /// Host facts about destinations inside the cell differ.
    pub destination: bool,
    /// Host facts about sources inside the cell differ.
    pub source: bool,
    /// Guards lie inside the cell's source, or it inside one: a packet from a guard passes.
    pub guards: bool,
}

/// Which address of a packet a host fact is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The destination.
    Destination,
    /// The source.
    Source,
}

/// What the host does with the addresses of one prefix. The longest prefix that contains an address counts.
///
/// A destination that is looked up and has no fact is not routed. A source without one may be fast, unless the
/// port asks for the reverse path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fact {
    /// An address that is the host's own, broadcast, unroutable or the like: never fast.
    Denied,
    /// Routed to a device, by its interface index. For sources, 0 is a device that does not matter: packets from
    /// there are routed back somehow.
    Via(u32),
}

/// Packets that must reach the kernel because a policy asks for a protocol or ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Exception {
    /// The addresses.
    pub cell: Cell,
    /// Upper-layer protocol; 0 is every protocol.
    pub protocol: u8,
    /// Source port, or ICMP type.
    pub source_port: PortMatch,
    /// Destination port, or ICMP code.
    pub destination_port: PortMatch,
}

/// How the fast packets of one policy leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forwarding {
    /// Interface index of the device.
    pub ifindex: u32,
    /// Longest packet in bytes, from the IP header on.
    pub max_length: u16,
    /// Source and destination address to write; `None` leaves the Ethernet addresses as they are.
    pub rewrite: Option<(MacAddr, MacAddr)>,
}

/// How a slot's packets leave, or why they pass.
pub type Standing = Result<Forwarding, PassReason>;

/// A batch of changes. Keys that are not named stay as they are; what is there already may be set again, and
/// what is not there may be removed. Each key is named once, but a slot may be freed and then filled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableUpdate {
    /// Cells to set, or to remove.
    pub cells: Vec<(Cell, Option<Verdict>)>,
    /// Host facts to set, or to remove. Prefixes are without host bits.
    pub facts: Vec<((Side, IpNet), Option<Fact>)>,
    /// Guards to add (`true`) or to remove: sources that a forward or sub policy, or another one that is not
    /// part of the cells, is about. Prefixes are without host bits.
    pub guards: Vec<(IpNet, bool)>,
    /// Exceptions to add (`true`) or to remove.
    pub exceptions: Vec<(Exception, bool)>,
    /// Slots to fill, or to free. A slot that was freed and is filled again starts with counters at zero.
    pub slots: Vec<(Slot, Option<Standing>)>,
    /// The kernel's index of the policy that a filled slot belongs to, or 0. A process that takes over finds the
    /// policy's counters by it; those of slots without one end with the process.
    pub owners: Vec<(Slot, u32)>,
}

impl TableUpdate {
    /// How many changes it names.
    #[must_use]
    pub fn len(&self) -> usize {
        let Self { cells, facts, guards, exceptions, slots, owners } = self;
        cells.len() + facts.len() + guards.len() + exceptions.len() + slots.len() + owners.len()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How much a table holds. Beyond these limits the [`Compiler`](crate::Compiler) lets regions pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Cells, host facts and guards together, of IPv4.
    pub cells_v4: usize,
    /// The same of IPv6.
    pub cells_v6: usize,
    /// Different pairs of prefix lengths of cells, of each family.
    pub tuples: usize,
    /// Different prefix lengths of host facts, of each family and side.
    pub fact_lengths: usize,
    /// Different prefix lengths of guards, of each family.
    pub guard_lengths: usize,
    /// Exceptions, of each family.
    pub exceptions: usize,
    /// Different combinations of prefix lengths, "any protocol" or one, and port masks of exceptions, of each
    /// family.
    pub exception_tuples: usize,
    /// Slots.
    pub slots: usize,
}

impl Capacity {
    /// Cells, host facts and guards together, of a family.
    #[must_use]
    pub fn cells(&self, family: Family) -> usize {
        match family {
            Family::V4 => self.cells_v4,
            Family::V6 => self.cells_v6,
        }
    }
}

/// How large a table is made.
///
/// The default takes about 16 MiB, and 256 KiB for each CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableConfig {
    /// Cells, host facts and guards together, of IPv4. Takes 32 bytes each, after rounding up to a power of two.
    pub cells_v4: u32,
    /// The same of IPv6. Takes 80 bytes each, after rounding up to a power of two.
    pub cells_v6: u32,
    /// Exceptions, of each family. Takes 96 bytes each for IPv4 and 192 for IPv6, after rounding up to a power
    /// of two.
    pub exceptions: u32,
    /// Policies that can be fast at the same time. Takes 32 bytes each, and 16 for each CPU.
    pub slots: u32,
}

impl Default for TableConfig {
    fn default() -> Self {
        Self { cells_v4: 131_072, cells_v6: 131_072, exceptions: 4096, slots: 16_384 }
    }
}

impl TableConfig {
    /// What a table of this size holds.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        Capacity {
            cells_v4: self.cells_v4 as usize,
            cells_v6: self.cells_v6 as usize,
            tuples: MAX_TUPLES,
            fact_lengths: MAX_TUPLES,
            guard_lengths: MAX_TUPLES,
            exceptions: self.exceptions as usize,
            exception_tuples: MAX_TUPLES,
            slots: self.slots as usize,
        }
    }

    fn cell_buckets(&self, family: Family) -> u32 {
        buckets_for(match family {
            Family::V4 => self.cells_v4,
            Family::V6 => self.cells_v6,
        })
    }

    /// Each exception has an entry in two lists.
    fn exception_buckets(&self) -> u32 {
        buckets_for(self.exceptions.saturating_mul(2))
    }
}

/// Two entries for each bucket of four, so that there is nearly always room in one of two buckets.
fn buckets_for(entries: u32) -> u32 {
    entries.clamp(4, 1 << 31).div_ceil(2).next_power_of_two()
}

/// An (interface, VLAN) pair from which packets may be fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// Interface index of the device that the program is attached to.
    pub ifindex: u32,
    /// VLAN id, 0 for untagged and priority-tagged frames.
    pub vlan: u16,
    /// Interface index of the device that the kernel would receive the packet on: `ifindex`, or a VLAN device.
    pub receiver: u32,
    /// The address that frames must be sent to.
    pub address: MacAddr,
    /// Forwarding is on for the receiver, per family.
    pub forwards: Forwards,
    /// The receiver's reverse path filter for IPv4 (RFC 3704).
    pub reverse_path: ReversePath,
}

/// Which families a port forwards (`net.ipv4.conf.*.forwarding`, `net.ipv6.conf.*.forwarding`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Forwards {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

/// What a port asks of the route back to a packet's source (`net.ipv4.conf.*.rp_filter`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReversePath {
    /// Nothing.
    #[default]
    Off,
    /// It must lead through the receiving device.
    Strict,
    /// There must be one.
    Loose,
}

/// Packets and bytes (from the IP header on) that took the fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Removals of policies, associations and devices in the kernel, as numbers of the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removals {
    /// Begun, says the guard; 0 if there is none.
    pub begun: u64,
    /// Acknowledged by whoever writes the table.
    pub acknowledged: u64,
}

/// What the data path reads.
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

    /// Declares the mirror alive and caught up for the next `lease`. When no renewal comes in time, every
    /// packet passes to the kernel.
    fn renew_lease(&mut self, lease: Duration);

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

    /// Adds a port, or changes the one with the same (interface, VLAN).
    ///
    /// # Errors
    ///
    /// [`TableError::TooManyPorts`].
    fn set_port(&mut self, port: &Port) -> Result<(), TableError>;

    /// Removes a port; its frames pass from now on.
    fn remove_port(&mut self, ifindex: u32, vlan: u16);

    /// The port of an (interface, VLAN), if there is one.
    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port>;

    /// How much it holds.
    fn capacity(&self) -> Capacity;

    /// The cell's verdict for a packet between two addresses, as the data path finds it.
    fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict>;

    /// The host fact for an address, as the data path finds it.
    fn fact(&self, side: Side, address: IpAddr) -> Option<Fact>;

    /// Whether a guard is about a source, as the data path finds it.
    fn is_guarded(&self, source: IpAddr) -> bool;

    /// Whether an exception is about a packet, as the data path finds it. `ports` are those that the kernel
    /// compares with a selector's: ICMP type and code for ICMP, 0 and 0 for protocols that have none, `None`
    /// if they cannot be read.
    fn is_exception(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        ports: Option<(u16, u16)>,
    ) -> bool;

    /// How a slot's packets leave, or why they pass; `None` if it is free.
    fn standing(&self, slot: Slot) -> Option<Standing>;

    /// What a slot has forwarded.
    fn traffic(&self, slot: Slot) -> Traffic;

    /// Packets that were passed, by reason. Reasons without packets are left out.
    fn passes(&self) -> Vec<(PassReason, u64)>;
}

/// The ports and what can be looked up, as a field that has the same functions knows it: for an [`OffloadTable`] that
/// differs in how it is written.
macro_rules! delegate_lookups {
    ($field:ident) => {
        fn set_port(&mut self, port: &$crate::table::Port) -> Result<(), $crate::table::TableError> {
            self.$field.set_port(port)
        }

        fn remove_port(&mut self, ifindex: u32, vlan: u16) {
            self.$field.remove_port(ifindex, vlan);
        }

        fn port(&self, ifindex: u32, vlan: u16) -> Option<$crate::table::Port> {
            self.$field.port(ifindex, vlan)
        }

        fn capacity(&self) -> $crate::table::Capacity {
            self.$field.capacity()
        }

        fn verdict(
            &self,
            source: std::net::IpAddr,
            destination: std::net::IpAddr,
        ) -> Option<$crate::table::Verdict> {
            self.$field.verdict(source, destination)
        }

        fn fact(&self, side: $crate::table::Side, address: std::net::IpAddr) -> Option<$crate::table::Fact> {
            self.$field.fact(side, address)
        }

        fn is_guarded(&self, source: std::net::IpAddr) -> bool {
            self.$field.is_guarded(source)
        }

        fn is_exception(
            &self,
            source: std::net::IpAddr,
            destination: std::net::IpAddr,
            protocol: u8,
            ports: Option<(u16, u16)>,
        ) -> bool {
            self.$field.is_exception(source, destination, protocol, ports)
        }

        fn standing(&self, slot: $crate::table::Slot) -> Option<$crate::table::Standing> {
            self.$field.standing(slot)
        }

        fn traffic(&self, slot: $crate::table::Slot) -> $crate::table::Traffic {
            self.$field.traffic(slot)
        }

        fn passes(&self) -> Vec<(fastswan_ebpf::PassReason, u64)> {
            self.$field.passes()
        }
    };
}
pub(crate) use delegate_lookups;

/// A table could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A batch does not fit.
    #[error("the table is full: {what} of {family:?} does not fit into {limit}; make the table larger")]
    Full {
        /// What there is no room for.
        what: &'static str,
        /// The family it is about.
        family: Family,
        /// How many fit.
        limit: usize,
    },
    /// There is no room for another port.
    #[error("port #{ifindex} VLAN {vlan} does not fit: the table holds at most {limit} ports")]
    TooManyPorts {
        /// Its interface.
        ifindex: u32,
        /// Its VLAN.
        vlan: u16,
        /// How many ports fit.
        limit: usize,
    },
    /// A batch names a slot that the table does not have.
    #[error("slot {} does not exist: the table has {limit} slots; make the table larger", slot.0)]
    NoSuchSlot {
        /// The slot.
        slot: Slot,
        /// How many there are.
        limit: usize,
    },
    /// A cell joins prefixes of different families.
    #[error("a cell joins an IPv4 and an IPv6 prefix: give both prefixes of one family")]
    MixedFamilies,
    /// Packets cannot be redirected to a device.
    #[error(
        "cannot redirect packets to device #{ifindex}: {error}; check that it is in the network namespace of \
         the thread that writes the table"
    )]
    Device {
        /// Its interface index.
        ifindex: u32,
        /// Why the kernel refused it.
        #[source]
        error: io::Error,
    },
}
