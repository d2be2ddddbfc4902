//! Writes and reads the layout of `fastswan-ebpf`, wherever it lies.
//!
//! A batch is bracketed by [`Control::sequence`]: odd while it is being written. A reader that meets an odd
//! number, or another one after its lookup than before, passes its packet. So a reader sees no mixture of what
//! was before and what comes after, in whatever order it is written.

// Numbers are packed into words, and unpacked from them.
#![allow(clippy::cast_possible_truncation)]

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    sync::atomic::{Ordering, fence},
};

use fastswan_ebpf::{
    ASK_NEVER, Bucket, Control, EXCEPTION_LISTS, EXCEPTION_WORDS_V4, EXCEPTION_WORDS_V6, ExceptionList,
    Forwarded, KEY_WORDS_V4, KEY_WORDS_V6, LISTS, List, MAX_PORTS, MAX_TUPLES, PORT_WORDS, PassReason,
    Passes, Port as PortRecord, SlotRecord, TupleList, Value, Way, address_word, port_key, port_position,
    upper_layer, word_address,
};
use ipnet::IpNet;

use super::{
    Asked, Capacity, Cell, Exception, Fact, Forwards, Port, Probes, Removals, ReversePath, Side, Slot,
    Standing, TableConfig, TableError, TableUpdate, Traffic, Verdict,
    mmap::Region,
    slots::Slots,
    space::{NoRoom, Pattern, TupleSpace},
};
use crate::policy::{Family, MacAddr};

/// Cells whose memory is waited for at once.
const AT_ONCE: usize = 16;

/// The memory that a table lies in.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) control: Region<Control>,
    pub(super) cells_v4: Region<Bucket<KEY_WORDS_V4>>,
    pub(super) cells_v6: Region<Bucket<KEY_WORDS_V6>>,
    pub(super) tuples_v4: Region<TupleList<KEY_WORDS_V4>>,
    pub(super) tuples_v6: Region<TupleList<KEY_WORDS_V6>>,
    pub(super) exceptions_v4: Region<Bucket<EXCEPTION_WORDS_V4>>,
    pub(super) exceptions_v6: Region<Bucket<EXCEPTION_WORDS_V6>>,
    pub(super) exception_tuples_v4: Region<TupleList<EXCEPTION_WORDS_V4>>,
    pub(super) exception_tuples_v6: Region<TupleList<EXCEPTION_WORDS_V6>>,
    pub(super) slots: Region<SlotRecord>,
    pub(super) ways: Region<Way>,
    pub(super) forwarded: Region<Forwarded>,
    pub(super) port_buckets: Region<Bucket<PORT_WORDS>>,
    pub(super) ports: Region<PortRecord>,
    pub(super) passes: Region<Passes>,
}

/// A table over some memory.
#[derive(Debug)]
pub(super) struct Store {
    control: Region<Control>,
    v4: TupleSpace<KEY_WORDS_V4, LISTS>,
    v6: TupleSpace<KEY_WORDS_V6, LISTS>,
    exceptions_v4: TupleSpace<EXCEPTION_WORDS_V4, EXCEPTION_LISTS>,
    exceptions_v6: TupleSpace<EXCEPTION_WORDS_V6, EXCEPTION_LISTS>,
    slots: Slots,
    port_index: TupleSpace<PORT_WORDS, 1>,
    ports: Region<PortRecord>,
    /// Records of ports that are free.
    free_ports: BTreeSet<u32>,
    passes: Region<Passes>,
    capacity: Capacity,
    /// Those in the table: different ones may share entries.
    exceptions: HashSet<Exception>,
}

impl Store {
    /// Takes over memory that is all zero.
    pub(super) fn new(regions: Regions, config: &TableConfig) -> Self {
        let store = Self {
            control: regions.control,
            v4: TupleSpace::new(regions.cells_v4, regions.tuples_v4),
            v6: TupleSpace::new(regions.cells_v6, regions.tuples_v6),
            exceptions_v4: TupleSpace::new(regions.exceptions_v4, regions.exception_tuples_v4),
            exceptions_v6: TupleSpace::new(regions.exceptions_v6, regions.exception_tuples_v6),
            slots: Slots::new(regions.slots, regions.forwarded, regions.ways),
            // The program needs no list of tuples to find ports: all are of the one with number 0.
            port_index: TupleSpace::new(regions.port_buckets, Region::allocate(1)),
            ports: regions.ports,
            free_ports: (0..MAX_PORTS as u32).collect(),
            passes: regions.passes,
            capacity: config.capacity(),
            exceptions: HashSet::new(),
        };
        store.set_ask_mask(ASK_NEVER);
        store.publish();
        store
    }

    pub(super) fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Applies a batch. `grace_period` returns when every packet that was being looked up at its call is done.
    pub(super) fn apply(&mut self, update: &TableUpdate, grace_period: impl Fn()) -> Result<(), TableError> {
        let refilled =
            |(slot, standing): &(Slot, Option<Standing>)| standing.is_some() && self.slots.is_retired(*slot);
        if update.slots.iter().any(refilled) {
            grace_period();
            self.slots.recycle();
        }
        let handed_over = handed_over(&update.slots);
        self.begin();
        if !handed_over.is_empty() {
            // Packets pass meanwhile, since the slots are still the old policies'. It takes a full table to
            // get here.
            grace_period();
            for slot in handed_over {
                self.slots.clear(slot);
            }
        }
        let result = self.write(update);
        self.publish();
        if result.is_err() {
            self.set_enabled(false);
        }
        self.end();
        result
    }

    fn write(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        let TableUpdate { cells, facts, guards, exceptions, slots, owners } = update;
        // The order of `TableUpdate::changes`. Removals first: what they free may be needed.
        for (cell, verdict) in cells {
            if verdict.is_none() {
                self.set_cell(cell, None)?;
            }
        }
        for ((side, prefix), fact) in facts {
            if fact.is_none() {
                self.set_fact(*side, prefix, None)?;
            }
        }
        for (guard, there) in guards {
            if !there {
                self.set_guard(guard, false)?;
            }
        }
        for (exception, there) in exceptions {
            if !there {
                self.set_exception(exception, false)?;
            }
        }
        for (slot, standing) in slots {
            self.slots.set(*slot, standing.as_ref())?;
        }
        for (slot, policy) in owners {
            self.slots.set_policy(*slot, *policy)?;
        }
        for chunk in cells.chunks(AT_ONCE) {
            for (cell, _) in chunk {
                self.approach(cell);
            }
            for (cell, verdict) in chunk {
                if let Some(verdict) = verdict {
                    self.set_cell(cell, Some(stored_verdict(*verdict)))?;
                }
            }
        }
        for ((side, prefix), fact) in facts {
            if let Some(fact) = fact {
                self.set_fact(*side, prefix, Some(stored_fact(*fact)))?;
            }
        }
        for (guard, there) in guards {
            if *there {
                self.set_guard(guard, true)?;
            }
        }
        for (exception, there) in exceptions {
            if *there {
                self.set_exception(exception, true)?;
            }
        }
        Ok(())
    }

    /// Writes what the program needs to know beside the lists of tuples.
    fn publish(&self) {
        let control = &self.control[0];
        let exceptions = ExceptionList::Ports as usize;
        control.exceptions_v4.store(self.exceptions_v4.tuples(exceptions) as u64);
        control.exceptions_v6.store(self.exceptions_v6.tuples(exceptions) as u64);
        control.ports_start.store(self.port_index.start());
        control.ports_buckets.store(self.port_index.bucket_count());
    }

    fn set_cell(&mut self, cell: &Cell, value: Option<Value>) -> Result<(), TableError> {
        let pattern = AnyPattern::of_cell(cell).ok_or(TableError::MixedFamilies)?;
        self.set(List::Cells, &pattern, value)
    }

    /// Large tables are far away: the processor waits for several cells at once if it is told of them before.
    fn approach(&self, cell: &Cell) {
        match AnyPattern::of_cell(cell) {
            Some(AnyPattern::V4(pattern)) => self.v4.approach(List::Cells as usize, &pattern),
            Some(AnyPattern::V6(pattern)) => self.v6.approach(List::Cells as usize, &pattern),
            None => {}
        }
    }

    fn set_fact(&mut self, side: Side, prefix: &IpNet, value: Option<Value>) -> Result<(), TableError> {
        self.set(list_of(side), &AnyPattern::of_side(side, prefix), value)
    }

    fn set_guard(&mut self, prefix: &IpNet, there: bool) -> Result<(), TableError> {
        let pattern = AnyPattern::of_side(Side::Source, prefix);
        self.set(List::Guards, &pattern, there.then(|| Value::present(1)))
    }

    fn set(&mut self, list: List, pattern: &AnyPattern, value: Option<Value>) -> Result<(), TableError> {
        let (result, family) = match pattern {
            AnyPattern::V4(pattern) => (self.v4.set(list as usize, pattern, value), Family::V4),
            AnyPattern::V6(pattern) => (self.v6.set(list as usize, pattern, value), Family::V6),
        };
        let what = ("an entry", "a pair of prefix lengths");
        result.map_err(|no_room| full(no_room, family, self.capacity.cells(family), what))
    }

    fn set_exception(&mut self, exception: &Exception, there: bool) -> Result<(), TableError> {
        if self.exceptions.contains(exception) == there {
            return Ok(());
        }
        let pattern = AnyPattern::of_cell(&exception.cell).ok_or(TableError::MixedFamilies)?;
        let (result, family) = match pattern {
            AnyPattern::V4(Pattern { key: [key], mask: [mask] }) => {
                let patterns = upper_layers(exception)
                    .map(|(upper, upper_mask)| Pattern { key: [key, upper], mask: [mask, upper_mask] });
                (count(&mut self.exceptions_v4, &patterns, there), Family::V4)
            }
            AnyPattern::V6(Pattern { key: [d0, d1, s0, s1], mask: [e0, e1, t0, t1] }) => {
                let patterns = upper_layers(exception).map(|(upper, upper_mask)| Pattern {
                    key: [d0, d1, s0, s1, upper],
                    mask: [e0, e1, t0, t1, upper_mask],
                });
                (count(&mut self.exceptions_v6, &patterns, there), Family::V6)
            }
        };
        let what = ("an exception", "a combination of prefix lengths and ports");
        result.map_err(|no_room| full(no_room, family, self.capacity.exceptions, what))?;
        if there {
            self.exceptions.insert(*exception);
        } else {
            self.exceptions.remove(exception);
        }
        Ok(())
    }

    /// Lets packets be redirected to a device from CPUs with lower numbers only, or from all.
    pub(super) fn limit_cpus(&mut self, ifindex: u32, limit: Option<u16>) {
        self.slots.limit_cpus(ifindex, limit);
    }

    pub(super) fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        let full = || TableError::TooManyPorts { ifindex: port.ifindex, vlan: port.vlan, limit: MAX_PORTS };
        let pattern = port_pattern(port.ifindex, port.vlan);
        let known = self.port_record(port.ifindex, port.vlan);
        let number = known.or_else(|| self.free_port(port.ifindex, port.vlan)).ok_or_else(full)?;
        let mut flags = 0;
        for (flag, set) in [
            (PortRecord::FORWARDS_V4, port.forwards.v4),
            (PortRecord::FORWARDS_V6, port.forwards.v6),
            (PortRecord::REVERSE_PATH_STRICT, port.reverse_path == ReversePath::Strict),
            (PortRecord::REVERSE_PATH_LOOSE, port.reverse_path == ReversePath::Loose),
        ] {
            if set {
                flags |= flag;
            }
        }
        self.begin();
        let record = &self.ports[number as usize];
        record.key.store(port_key(port.ifindex, port.vlan));
        record.address.store(address_word(port.address.0));
        record.flags_and_receiver.store(u64::from(port.receiver) << 32 | flags);
        let entered = self.port_index.set(0, &pattern, Some(Value::present(number)));
        if entered.is_err() {
            record.key.store(0);
        }
        self.publish();
        self.end();
        entered.map_err(|_| {
            self.free_ports.insert(number);
            full()
        })
    }

    /// Takes a free record, where the program looks first if it can be.
    fn free_port(&mut self, ifindex: u32, vlan: u16) -> Option<u32> {
        let position = port_position(ifindex, vlan);
        self.free_ports.take(&position).or_else(|| self.free_ports.pop_last())
    }

    pub(super) fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        if let Some(number) = self.port_record(ifindex, vlan) {
            self.begin();
            self.ports[number as usize].key.store(0);
            // A removal always fits.
            let _ = self.port_index.set(0, &port_pattern(ifindex, vlan), None);
            self.publish();
            self.end();
            self.free_ports.insert(number);
        }
    }

    pub(super) fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        let record = &self.ports[self.port_record(ifindex, vlan)? as usize];
        let flags_and_receiver = record.flags_and_receiver.load();
        let is_set = |flag: u64| flags_and_receiver & flag != 0;
        Some(Port {
            ifindex,
            vlan,
            receiver: (flags_and_receiver >> 32) as u32,
            address: MacAddr(word_address(record.address.load())),
            forwards: Forwards { v4: is_set(PortRecord::FORWARDS_V4), v6: is_set(PortRecord::FORWARDS_V6) },
            reverse_path: if is_set(PortRecord::REVERSE_PATH_STRICT) {
                ReversePath::Strict
            } else if is_set(PortRecord::REVERSE_PATH_LOOSE) {
                ReversePath::Loose
            } else {
                ReversePath::Off
            },
        })
    }

    /// Which record a port has.
    fn port_record(&self, ifindex: u32, vlan: u16) -> Option<u32> {
        self.port_index.first_hit(0, &[port_key(ifindex, vlan)]).map(Value::payload)
    }

    pub(super) fn set_enabled(&self, enabled: bool) {
        // A packet that sees the fast path on sees all that was written before.
        self.control[0].enabled.atomic().store(u64::from(enabled), Ordering::Release);
    }

    /// From `now` on, by the program's clock. Both are ticks.
    pub(super) fn renew_lease(&self, now: u64, lease: u64) {
        let control = &self.control[0];
        control.lease.store(lease);
        control.deadline.atomic().store(now.saturating_add(lease), Ordering::Release);
    }

    pub(super) fn set_ask_mask(&self, mask: u64) {
        self.control[0].ask_mask.store(mask);
    }

    pub(super) fn removals(&self) -> Removals {
        let control = &self.control[0];
        Removals {
            // What is read of the source from now on is no older.
            begun: control.removals.atomic().load(Ordering::Acquire),
            acknowledged: control.acknowledged.load(),
        }
    }

    pub(super) fn acknowledge(&self, removals: u64) {
        // A packet that sees it sees all that was written before.
        self.control[0].acknowledged.atomic().store(removals, Ordering::Release);
    }

    pub(super) fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict> {
        let cell = Cell { destination: destination.into(), source: source.into() };
        let value = self.first_hit(List::Cells, &AnyPattern::of_cell(&cell)?)?;
        match value.kind() {
            Value::FAST => Some(Verdict::Fast {
                slot: Slot(value.payload()),
                probes: Probes {
                    destination: value.probes_destination(),
                    source: value.probes_source(),
                    guards: value.probes_guards(),
                },
            }),
            _ => PassReason::from_index(value.payload()).map(Verdict::Pass),
        }
    }

    pub(super) fn fact(&self, side: Side, address: IpAddr) -> Option<Fact> {
        let value = self.first_hit(list_of(side), &AnyPattern::of_side(side, &address.into()))?;
        match value.kind() {
            Value::VIA => Some(Fact::Via(value.payload())),
            _ => Some(Fact::Denied),
        }
    }

    pub(super) fn is_guarded(&self, source: IpAddr) -> bool {
        self.first_hit(List::Guards, &AnyPattern::of_side(Side::Source, &source.into())).is_some()
    }

    pub(super) fn is_exception(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        ports: Option<(u16, u16)>,
    ) -> bool {
        let list = if ports.is_some() { ExceptionList::Ports } else { ExceptionList::Protocols };
        let (source_port, destination_port) = ports.unwrap_or_default();
        let upper = upper_layer(protocol, source_port, destination_port);
        let cell = Cell { destination: destination.into(), source: source.into() };
        match AnyPattern::of_cell(&cell) {
            Some(AnyPattern::V4(Pattern { key: [key], .. })) => {
                self.exceptions_v4.first_hit(list as usize, &[key, upper]).is_some()
            }
            Some(AnyPattern::V6(Pattern { key: [d0, d1, s0, s1], .. })) => {
                self.exceptions_v6.first_hit(list as usize, &[d0, d1, s0, s1, upper]).is_some()
            }
            None => false,
        }
    }

    fn first_hit(&self, list: List, pattern: &AnyPattern) -> Option<Value> {
        match pattern {
            AnyPattern::V4(pattern) => self.v4.first_hit(list as usize, &pattern.key),
            AnyPattern::V6(pattern) => self.v6.first_hit(list as usize, &pattern.key),
        }
    }

    pub(super) fn standing(&self, slot: Slot) -> Option<Standing> {
        self.slots.standing(slot)
    }

    pub(super) fn traffic(&self, slot: Slot) -> Traffic {
        self.slots.traffic(slot)
    }

    pub(super) fn passes(&self) -> Vec<(PassReason, u64)> {
        let count = |reason: PassReason| -> u64 {
            self.passes.iter().map(|passes| passes.packets[reason as usize].load()).sum()
        };
        PassReason::ALL.iter().map(|&reason| (reason, count(reason))).filter(|&(_, n)| n > 0).collect()
    }

    pub(super) fn asked(&self) -> Asked {
        let mut sum = Asked::default();
        for passes in self.passes.iter() {
            sum.asked += passes.asked.load();
            sum.differs += passes.packets[PassReason::FibDiffers as usize].load();
        }
        sum
    }

    fn begin(&self) {
        let sequence = self.control[0].sequence.atomic();
        sequence.store(sequence.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
        // Whoever sees a write of the batch sees the odd number too.
        fence(Ordering::Release);
    }

    fn end(&self) {
        let sequence = self.control[0].sequence.atomic();
        // Whoever sees the even number sees all writes of the batch.
        sequence.store(sequence.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }
}

/// Slots that are freed and then filled in one batch.
fn handed_over(slots: &[(Slot, Option<Standing>)]) -> HashSet<Slot> {
    let mut freed = HashSet::new();
    let mut handed_over = HashSet::new();
    for (slot, standing) in slots {
        if standing.is_none() {
            freed.insert(*slot);
        } else if freed.contains(slot) {
            handed_over.insert(*slot);
        }
    }
    handed_over
}

/// Counts one exception more, or one less, for the entries of both lists that it has.
fn count<const K: usize>(
    space: &mut TupleSpace<K, EXCEPTION_LISTS>,
    patterns: &[Pattern<K>; EXCEPTION_LISTS],
    more: bool,
) -> Result<(), NoRoom> {
    space.count(0, &patterns[0], more)?;
    let second = space.count(1, &patterns[1], more);
    if second.is_err() {
        space.count(0, &patterns[0], !more)?;
    }
    second
}

/// What an exception asks of the upper layer, and the mask of it: by [`ExceptionList`].
fn upper_layers(exception: &Exception) -> [(u64, u64); EXCEPTION_LISTS] {
    let protocol_mask = if exception.protocol == 0 { 0 } else { u8::MAX };
    let (source, destination) = (exception.source_port, exception.destination_port);
    let ports_mask = upper_layer(protocol_mask, source.mask, destination.mask);
    let upper = upper_layer(exception.protocol, source.port, destination.port);
    [ports_mask, upper_layer(protocol_mask, 0, 0)].map(|mask| (upper & mask, mask))
}

fn list_of(side: Side) -> List {
    match side {
        Side::Destination => List::Destinations,
        Side::Source => List::Sources,
    }
}

/// `what` names an entry, of which there may be `limit`, and what its tuple is.
fn full(no_room: NoRoom, family: Family, limit: usize, what: (&'static str, &'static str)) -> TableError {
    match no_room {
        NoRoom::Entries => TableError::Full { what: what.0, family, limit },
        NoRoom::Tuples => TableError::Full { what: what.1, family, limit: MAX_TUPLES },
    }
}

fn stored_verdict(verdict: Verdict) -> Value {
    match verdict {
        Verdict::Pass(reason) => Value::pass(reason),
        Verdict::Fast { slot, probes: Probes { destination, source, guards } } => {
            Value::fast(slot.0, destination, source, guards)
        }
    }
}

fn stored_fact(fact: Fact) -> Value {
    match fact {
        Fact::Denied => Value::denied(),
        Fact::Via(ifindex) => Value::via(ifindex),
    }
}

/// Addresses as keys and masks.
enum AnyPattern {
    V4(Pattern<KEY_WORDS_V4>),
    V6(Pattern<KEY_WORDS_V6>),
}

impl AnyPattern {
    /// `None` if the prefixes are of different families.
    fn of_cell(cell: &Cell) -> Option<Self> {
        match (cell.destination, cell.source) {
            (IpNet::V4(destination), IpNet::V4(source)) => {
                let word = |destination, source| {
                    [u64::from(u32::from(destination)) << 32 | u64::from(u32::from(source))]
                };
                Some(Self::V4(Pattern {
                    key: word(destination.network(), source.network()),
                    mask: word(destination.netmask(), source.netmask()),
                }))
            }
            (IpNet::V6(destination), IpNet::V6(source)) => {
                let words = |destination, source| {
                    let [d0, d1] = halves(u128::from(destination));
                    let [s0, s1] = halves(u128::from(source));
                    [d0, d1, s0, s1]
                };
                Some(Self::V6(Pattern {
                    key: words(destination.network(), source.network()),
                    mask: words(destination.netmask(), source.netmask()),
                }))
            }
            _ => None,
        }
    }

    fn of_side(side: Side, prefix: &IpNet) -> Self {
        let everything = Family::of(prefix).everything();
        let cell = match side {
            Side::Destination => Cell { destination: *prefix, source: everything },
            Side::Source => Cell { destination: everything, source: *prefix },
        };
        // Both prefixes are of one family by construction; the fallback can only name the empty prefix.
        Self::of_cell(&cell).unwrap_or(Self::V4(Pattern { key: [0], mask: [0] }))
    }
}

fn port_pattern(ifindex: u32, vlan: u16) -> Pattern<PORT_WORDS> {
    Pattern { key: [port_key(ifindex, vlan)], mask: [u64::MAX] }
}

fn halves(bits: u128) -> [u64; 2] {
    [(bits >> 64) as u64, bits as u64]
}

/// Reads back what a table has in its field `store`, a [`Store`].
macro_rules! read_back {
    ($table:ty) => {
        impl $crate::table::ReadBack for $table {
            fn verdict(
                &self,
                source: std::net::IpAddr,
                destination: std::net::IpAddr,
            ) -> Option<$crate::table::Verdict> {
                self.store.verdict(source, destination)
            }

            fn fact(
                &self,
                side: $crate::table::Side,
                address: std::net::IpAddr,
            ) -> Option<$crate::table::Fact> {
                self.store.fact(side, address)
            }

            fn is_guarded(&self, source: std::net::IpAddr) -> bool {
                self.store.is_guarded(source)
            }

            fn is_exception(
                &self,
                source: std::net::IpAddr,
                destination: std::net::IpAddr,
                protocol: u8,
                ports: Option<(u16, u16)>,
            ) -> bool {
                self.store.is_exception(source, destination, protocol, ports)
            }

            fn standing(&self, slot: $crate::table::Slot) -> Option<$crate::table::Standing> {
                self.store.standing(slot)
            }
        }
    };
}
pub(super) use read_back;
