//! Writes and reads the layout of `fastswan-ebpf`, wherever it lies.
//!
//! A batch is bracketed by [`Control::sequence`]: odd while it is being written. A reader that meets an odd
//! number, or another one after its lookup than before, passes its packet. So entries may be moved, the hash
//! may be seeded anew and lists may be shifted without any reader seeing a mixture.

// Buckets and slots are indexed by numbers that were masked to the size of what they index.
#![allow(clippy::cast_possible_truncation)]

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::atomic::{Ordering, fence},
    time::Duration,
};

use fastswan_ebpf::{
    BUCKET_ENTRIES, Bucket, Buckets, Control, ExceptionList, FamilyControl, Forwarding as ForwardingRecord,
    Hashed, KEY_WORDS_V4, KEY_WORDS_V6, List, MAX_EXCEPTIONS, MAX_TUPLES, PORT_PROBES, PORT_SLOTS,
    PassReason, Passes, Port as PortRecord, Traffic as TrafficRecord, TupleList, Value, Word, first_hit,
    hash, packed_mac, port_key, port_slot, upper_layer,
};
use ipnet::IpNet;

use super::{
    Capacity, Cell, Exception, Fact, Forwarding, Port, ReversePath, Side, Slot, TableConfig, TableError,
    TableUpdate, Traffic, Verdict, mmap::Region,
};
use crate::policy::{Family, PortMatch};

/// A seed is tried this often before the hash counts as full.
const SEED_ATTEMPTS: u32 = 16;

/// The memory that a table lies in.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) control: Region<Control>,
    pub(super) cells_v4: Region<Bucket<KEY_WORDS_V4>>,
    pub(super) cells_v6: Region<Bucket<KEY_WORDS_V6>>,
    pub(super) tuples_v4: Region<TupleList<KEY_WORDS_V4>>,
    pub(super) tuples_v6: Region<TupleList<KEY_WORDS_V6>>,
    pub(super) exceptions_v4: Region<ExceptionList<KEY_WORDS_V4>>,
    pub(super) exceptions_v6: Region<ExceptionList<KEY_WORDS_V6>>,
    pub(super) forwardings: Region<ForwardingRecord>,
    pub(super) ports: Region<PortRecord>,
    pub(super) traffic: Region<TrafficRecord>,
    pub(super) passes: Region<Passes>,
}

/// A table over some memory.
#[derive(Debug)]
pub(super) struct Store {
    control: Region<Control>,
    v4: FamilyStore<KEY_WORDS_V4>,
    v6: FamilyStore<KEY_WORDS_V6>,
    forwardings: Region<ForwardingRecord>,
    ports: Region<PortRecord>,
    traffic: Region<TrafficRecord>,
    passes: Region<Passes>,
    capacity: Capacity,
    /// Slots that were freed since the last grace period: packets may still be counted for them.
    retired: HashSet<Slot>,
}

impl Store {
    /// Takes over memory that is all zero.
    pub(super) fn new(regions: Regions, config: &TableConfig) -> Self {
        let store = Self {
            control: regions.control,
            v4: FamilyStore::new(regions.cells_v4, regions.tuples_v4, regions.exceptions_v4),
            v6: FamilyStore::new(regions.cells_v6, regions.tuples_v6, regions.exceptions_v6),
            forwardings: regions.forwardings,
            ports: regions.ports,
            traffic: regions.traffic,
            passes: regions.passes,
            capacity: config.capacity(),
            retired: HashSet::new(),
        };
        store.v4.publish(&store.control[0].v4);
        store.v6.publish(&store.control[0].v6);
        store
    }

    pub(super) fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Applies a batch. `grace_period` returns when every packet that was being looked up at its call is done.
    pub(super) fn apply(
        &mut self,
        update: &TableUpdate,
        grace_period: impl FnOnce(),
    ) -> Result<(), TableError> {
        let refilled = |(slot, forwarding): &(Slot, Option<Forwarding>)| {
            forwarding.is_some() && self.retired.contains(slot)
        };
        if update.forwardings.iter().any(refilled) {
            grace_period();
            for slot in self.retired.drain() {
                clear_traffic(&self.traffic, self.capacity.slots, slot);
            }
        }
        self.begin();
        let result = self.write(update);
        if result.is_err() {
            self.set_enabled(false);
        }
        self.end();
        result
    }

    fn write(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        // Removals first: what they free may be needed.
        for (cell, verdict) in &update.cells {
            if verdict.is_none() {
                self.set_cell(cell, None)?;
            }
        }
        for ((side, prefix), fact) in &update.facts {
            if fact.is_none() {
                self.set_fact(*side, prefix, None)?;
            }
        }
        for (slot, forwarding) in &update.forwardings {
            self.set_forwarding(*slot, forwarding.as_ref())?;
        }
        for (cell, verdict) in &update.cells {
            if let Some(verdict) = verdict {
                self.set_cell(cell, Some(stored_verdict(*verdict)))?;
            }
        }
        for ((side, prefix), fact) in &update.facts {
            if let Some(fact) = fact {
                self.set_fact(*side, prefix, Some(stored_fact(*fact)))?;
            }
        }
        if let Some(exceptions) = &update.exceptions {
            self.set_exceptions(exceptions)?;
        }
        let control = &self.control[0];
        self.v4.publish(&control.v4);
        self.v6.publish(&control.v6);
        Ok(())
    }

    fn set_cell(&mut self, cell: &Cell, value: Option<Value>) -> Result<(), TableError> {
        match Pattern::of_cell(cell) {
            Some(AnyPattern::V4(pattern)) => self.v4.set(List::Cells, &pattern, value),
            Some(AnyPattern::V6(pattern)) => self.v6.set(List::Cells, &pattern, value),
            None => Err(NoRoom::MixedFamilies),
        }
        .map_err(|no_room| self.full(no_room, Family::of(&cell.destination)))
    }

    fn set_fact(&mut self, side: Side, prefix: &IpNet, value: Option<Value>) -> Result<(), TableError> {
        let list = match side {
            Side::Destination => List::Destinations,
            Side::Source => List::Sources,
        };
        match Pattern::of_side(side, prefix) {
            AnyPattern::V4(pattern) => self.v4.set(list, &pattern, value),
            AnyPattern::V6(pattern) => self.v6.set(list, &pattern, value),
        }
        .map_err(|no_room| self.full(no_room, Family::of(prefix)))
    }

    fn set_exceptions(&mut self, exceptions: &[Exception]) -> Result<(), TableError> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for exception in exceptions {
            match Pattern::of_cell(&exception.cell) {
                Some(AnyPattern::V4(pattern)) => v4.push((pattern, exception)),
                Some(AnyPattern::V6(pattern)) => v6.push((pattern, exception)),
                None => {
                    return Err(self.full(NoRoom::MixedFamilies, Family::of(&exception.cell.destination)));
                }
            }
        }
        let v4 = self.v4.set_exceptions(&v4).map_err(|no_room| (no_room, Family::V4));
        v4.and_then(|()| self.v6.set_exceptions(&v6).map_err(|no_room| (no_room, Family::V6)))
            .map_err(|(no_room, family)| self.full(no_room, family))
    }

    fn set_forwarding(&mut self, slot: Slot, forwarding: Option<&Forwarding>) -> Result<(), TableError> {
        let Some(record) = self.forwardings.get(slot.0 as usize) else {
            return Err(TableError::NoSuchSlot { slot, limit: self.capacity.slots });
        };
        let Some(forwarding) = forwarding else {
            record.device_and_length.store(0);
            self.retired.insert(slot);
            return Ok(());
        };
        let (source, destination) = forwarding.rewrite.unwrap_or_default();
        record.destination.store(packed_mac(destination.0));
        record.source.store(packed_mac(source.0));
        let length = u64::from(forwarding.max_length) << 32;
        record.device_and_length.store(u64::from(forwarding.ifindex) | length);
        Ok(())
    }

    pub(super) fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        let key = port_key(port.ifindex, port.vlan);
        let free = || self.port_candidates(key).find(|record| record.key.load() == 0);
        let Some(record) = self.port(key).or_else(free) else {
            return Err(TableError::TooManyPorts {
                ifindex: port.ifindex,
                vlan: port.vlan,
                limit: PORT_SLOTS,
            });
        };
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
        record.address.store(packed_mac(port.address.0));
        record.flags_and_receiver.store(u64::from(port.receiver) << 32 | flags);
        record.key.store(key);
        self.end();
        Ok(())
    }

    pub(super) fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        if let Some(record) = self.port(port_key(ifindex, vlan)) {
            self.begin();
            record.key.store(0);
            self.end();
        }
    }

    fn port(&self, key: u64) -> Option<&PortRecord> {
        self.port_candidates(key).find(|record| record.key.load() == key)
    }

    fn port_candidates(&self, key: u64) -> impl Iterator<Item = &PortRecord> {
        let first = port_slot(key) as usize;
        (first..first + PORT_PROBES).filter_map(|slot| self.ports.get(slot % PORT_SLOTS))
    }

    pub(super) fn set_enabled(&self, enabled: bool) {
        // A packet that sees the fast path on sees all that was written before.
        self.control[0].enabled.atomic().store(u64::from(enabled), Ordering::Release);
    }

    /// `now` is in nanoseconds of the program's clock.
    pub(super) fn renew_lease(&self, now: u64, lease: Duration) {
        let lease = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX / 2);
        let control = &self.control[0];
        control.lease.store(lease);
        control.deadline.atomic().store(now.saturating_add(lease), Ordering::Release);
    }

    pub(super) fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict> {
        let cell = Cell { destination: destination.into(), source: source.into() };
        let value = match Pattern::of_cell(&cell)? {
            AnyPattern::V4(pattern) => self.v4.first_hit(List::Cells, &pattern.key),
            AnyPattern::V6(pattern) => self.v6.first_hit(List::Cells, &pattern.key),
        }?;
        match value.kind() {
            Value::FAST => Some(Verdict::Fast {
                slot: Slot(value.payload()),
                probe_destination: value.probes_destination(),
                probe_source: value.probes_source(),
            }),
            _ => PassReason::from_index(value.payload()).map(Verdict::Pass),
        }
    }

    pub(super) fn fact(&self, side: Side, address: IpAddr) -> Option<Fact> {
        let list = match side {
            Side::Destination => List::Destinations,
            Side::Source => List::Sources,
        };
        let value = match Pattern::of_side(side, &address.into()) {
            AnyPattern::V4(pattern) => self.v4.first_hit(list, &pattern.key),
            AnyPattern::V6(pattern) => self.v6.first_hit(list, &pattern.key),
        }?;
        match value.kind() {
            Value::VIA => Some(Fact::Via(value.payload())),
            _ => Some(Fact::Denied),
        }
    }

    pub(super) fn traffic(&self, slot: Slot) -> Traffic {
        let mut sum = Traffic::default();
        for record in per_cpu(&self.traffic, self.capacity.slots, slot) {
            sum.packets += record.packets.load();
            sum.bytes += record.bytes.load();
        }
        sum
    }

    pub(super) fn passes(&self) -> Vec<(PassReason, u64)> {
        let count = |reason: PassReason| -> u64 {
            self.passes.iter().map(|passes| passes.packets[reason as usize].load()).sum()
        };
        PassReason::ALL.iter().map(|&reason| (reason, count(reason))).filter(|&(_, n)| n > 0).collect()
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

    fn full(&self, no_room: NoRoom, family: Family) -> TableError {
        let (what, limit) = match no_room {
            NoRoom::Entries => ("an entry", self.capacity.cells),
            NoRoom::Tuples => ("a pair of prefix lengths", MAX_TUPLES),
            NoRoom::Exceptions => ("an exception", MAX_EXCEPTIONS),
            NoRoom::MixedFamilies => return TableError::MixedFamilies,
        };
        TableError::Full { what, family, limit }
    }
}

fn stored_verdict(verdict: Verdict) -> Value {
    match verdict {
        Verdict::Pass(reason) => Value::pass(reason),
        Verdict::Fast { slot, probe_destination, probe_source } => {
            Value::fast(slot.0, probe_destination, probe_source)
        }
    }
}

fn stored_fact(fact: Fact) -> Value {
    match fact {
        Fact::Denied => Value::denied(),
        Fact::Via(ifindex) => Value::via(ifindex),
    }
}

fn per_cpu(
    traffic: &Region<TrafficRecord>,
    slots: usize,
    slot: Slot,
) -> impl Iterator<Item = &TrafficRecord> {
    traffic.iter().skip(slot.0 as usize).step_by(slots)
}

fn clear_traffic(traffic: &Region<TrafficRecord>, slots: usize, slot: Slot) {
    for record in per_cpu(traffic, slots, slot) {
        record.packets.store(0);
        record.bytes.store(0);
    }
}

/// Why an entry could not be stored.
#[derive(Clone, Copy, Debug)]
enum NoRoom {
    Entries,
    Tuples,
    Exceptions,
    MixedFamilies,
}

/// What entries of one tuple have in common, and the key of one of them.
#[derive(Clone, Copy, Debug)]
struct Pattern<const K: usize> {
    key: [u64; K],
    mask: [u64; K],
    /// Prefix lengths of destination and source.
    lengths: (u8, u8),
}

enum AnyPattern {
    V4(Pattern<KEY_WORDS_V4>),
    V6(Pattern<KEY_WORDS_V6>),
}

impl Pattern<0> {
    /// `None` if the prefixes are of different families.
    fn of_cell(cell: &Cell) -> Option<AnyPattern> {
        let lengths = (cell.destination.prefix_len(), cell.source.prefix_len());
        match (cell.destination, cell.source) {
            (IpNet::V4(destination), IpNet::V4(source)) => {
                let word = |destination, source| {
                    [u64::from(u32::from(destination)) << 32 | u64::from(u32::from(source))]
                };
                Some(AnyPattern::V4(Pattern {
                    key: word(destination.network(), source.network()),
                    mask: word(destination.netmask(), source.netmask()),
                    lengths,
                }))
            }
            (IpNet::V6(destination), IpNet::V6(source)) => {
                let words = |destination, source| {
                    let [d0, d1] = halves(u128::from(destination));
                    let [s0, s1] = halves(u128::from(source));
                    [d0, d1, s0, s1]
                };
                Some(AnyPattern::V6(Pattern {
                    key: words(destination.network(), source.network()),
                    mask: words(destination.netmask(), source.netmask()),
                    lengths,
                }))
            }
            _ => None,
        }
    }

    fn of_side(side: Side, prefix: &IpNet) -> AnyPattern {
        let everything = Family::of(prefix).everything();
        let cell = match side {
            Side::Destination => Cell { destination: *prefix, source: everything },
            Side::Source => Cell { destination: everything, source: *prefix },
        };
        // Both prefixes are of one family by construction; the fallback can only name the empty prefix.
        Self::of_cell(&cell).unwrap_or(AnyPattern::V4(Pattern { key: [0], mask: [0], lengths: (0, 0) }))
    }
}

fn halves(bits: u128) -> [u64; 2] {
    [(bits >> 64) as u64, bits as u64]
}

/// The tables of one family.
#[derive(Debug)]
struct FamilyStore<const K: usize> {
    cells: Region<Bucket<K>>,
    tuples: Region<TupleList<K>>,
    exceptions: Region<ExceptionList<K>>,
    exception_count: usize,
    seed: u64,
    /// The lists as they are in `tuples`.
    lists: [Vec<TupleState<K>>; 3],
}

/// A tuple that has entries.
#[derive(Clone, Copy, Debug)]
struct TupleState<const K: usize> {
    lengths: (u8, u8),
    mask: [u64; K],
    number: u8,
    entries: usize,
}

struct BucketSlice<'a, const K: usize>(&'a [Bucket<K>]);

impl<const K: usize> Buckets<K> for BucketSlice<'_, K> {
    fn bucket(&self, index: u64) -> Option<&Bucket<K>> {
        self.0.get(usize::try_from(index).ok()?)
    }
}

/// An entry as it lies in the hash.
#[derive(Clone, Copy)]
struct Entry<const K: usize> {
    key: [u64; K],
    number: u8,
    value: Value,
}

impl<const K: usize> FamilyStore<K> {
    fn new(
        cells: Region<Bucket<K>>,
        tuples: Region<TupleList<K>>,
        exceptions: Region<ExceptionList<K>>,
    ) -> Self {
        Self {
            cells,
            tuples,
            exceptions,
            exception_count: 0,
            seed: random(),
            lists: [const { Vec::new() }; 3],
        }
    }

    fn bucket_mask(&self) -> u64 {
        self.cells.len() as u64 - 1
    }

    /// Writes what the program needs to know to read the tables.
    fn publish(&self, control: &FamilyControl) {
        control.seed.store(self.seed);
        control.bucket_mask.store(self.bucket_mask());
        control.exceptions.store(self.exception_count as u64);
        for (length, list) in control.tuples.iter().zip(&self.lists) {
            length.store(list.len() as u64);
        }
    }

    fn first_hit(&self, list: List, key: &[u64; K]) -> Option<Value> {
        let length = self.lists[list as usize].len() as u64;
        let tuples = &self.tuples[list as usize];
        first_hit(&BucketSlice(&self.cells), tuples, length, key, self.seed, self.bucket_mask())
    }

    fn set(&mut self, list: List, pattern: &Pattern<K>, value: Option<Value>) -> Result<(), NoRoom> {
        let position = self.lists[list as usize].iter().position(|tuple| tuple.lengths == pattern.lengths);
        let Some(value) = value else {
            if let Some(position) = position {
                self.remove(list, position, pattern);
            }
            return Ok(());
        };
        let position = match position {
            Some(position) => position,
            None => self.insert_tuple(list, pattern)?,
        };
        let number = self.lists[list as usize][position].number;
        let entry = Entry { key: pattern.key, number, value };
        if let Some(place) = self.find(&entry.key, number) {
            self.put(place, &entry);
            return Ok(());
        }
        self.insert(entry)?;
        self.lists[list as usize][position].entries += 1;
        Ok(())
    }

    fn remove(&mut self, list: List, position: usize, pattern: &Pattern<K>) {
        let tuple = &mut self.lists[list as usize][position];
        let number = tuple.number;
        if let Some(place) = self.find(&pattern.key, number) {
            self.clear(place);
            let tuple = &mut self.lists[list as usize][position];
            tuple.entries -= 1;
            if tuple.entries == 0 {
                self.lists[list as usize].remove(position);
                self.write_list(list);
            }
        }
    }

    fn insert_tuple(&mut self, list: List, pattern: &Pattern<K>) -> Result<usize, NoRoom> {
        if self.lists[list as usize].len() == MAX_TUPLES {
            return Err(NoRoom::Tuples);
        }
        let taken: HashSet<u8> = self.lists.iter().flatten().map(|tuple| tuple.number).collect();
        let number = (0..=u8::MAX).find(|number| !taken.contains(number)).ok_or(NoRoom::Tuples)?;
        let tuples = &mut self.lists[list as usize];
        // Longest destination first, then longest source.
        let position = tuples.partition_point(|tuple| tuple.lengths > pattern.lengths);
        let tuple = TupleState { lengths: pattern.lengths, mask: pattern.mask, number, entries: 0 };
        tuples.insert(position, tuple);
        self.write_list(list);
        Ok(position)
    }

    fn write_list(&self, list: List) {
        for (record, tuple) in self.tuples[list as usize].0.iter().zip(&self.lists[list as usize]) {
            store_words(&record.mask, &tuple.mask);
            record.number.store(u64::from(tuple.number));
        }
    }

    fn hashed(&self, key: &[u64; K], number: u8) -> Hashed {
        hash(key, u64::from(number), self.seed, self.bucket_mask())
    }

    fn find(&self, key: &[u64; K], number: u8) -> Option<Place> {
        let hashed = self.hashed(key, number);
        [hashed.primary, hashed.secondary].into_iter().find_map(|bucket| {
            let place = |entry| Place { bucket: bucket as usize, entry };
            (0..BUCKET_ENTRIES).map(place).find(|&place| {
                let identity = Value::identity_of(self.value_at(place).load());
                identity == Some(hashed.identity) && self.key_at(place) == *key
            })
        })
    }

    /// Stores an entry that is not there yet.
    fn insert(&mut self, entry: Entry<K>) -> Result<(), NoRoom> {
        if self.place(&entry) {
            return Ok(());
        }
        let mut entries = self.entries();
        entries.push(entry);
        for _ in 0..SEED_ATTEMPTS {
            self.seed = random();
            for bucket in self.cells.iter() {
                bucket.values.iter().for_each(|value| value.store(0));
            }
            if entries.iter().all(|entry| self.place(entry)) {
                return Ok(());
            }
        }
        Err(NoRoom::Entries)
    }

    /// Stores an entry in one of its buckets, if need be after moving another one into its other bucket.
    fn place(&self, entry: &Entry<K>) -> bool {
        let hashed = self.hashed(&entry.key, entry.number);
        let (primary, secondary) = (hashed.primary as usize, hashed.secondary as usize);
        let identity = hashed.identity;
        let place = self
            .free_place(primary, identity)
            .or_else(|| self.free_place(secondary, identity))
            .or_else(|| self.make_room(primary, identity))
            .or_else(|| self.make_room(secondary, identity));
        let Some(place) = place else { return false };
        if place.bucket != primary {
            self.mark_spilled(primary);
        }
        self.put(place, entry);
        true
    }

    /// A free place in a bucket, unless the bucket has an entry that looks the same before its key is
    /// compared: a lookup compares one key only.
    fn free_place(&self, bucket: usize, identity: u64) -> Option<Place> {
        let mut free = None;
        for entry in 0..BUCKET_ENTRIES {
            let place = Place { bucket, entry };
            match Value::identity_of(self.value_at(place).load()) {
                None => free = free.or(Some(place)),
                Some(other) if other == identity => return None,
                Some(_) => {}
            }
        }
        free
    }

    /// Moves an entry out of a full bucket into its other one.
    fn make_room(&self, bucket: usize, identity: u64) -> Option<Place> {
        let places = || (0..BUCKET_ENTRIES).map(move |entry| Place { bucket, entry });
        let looks_the_same = |place| Value::identity_of(self.value_at(place).load()) == Some(identity);
        if places().any(looks_the_same) {
            return None;
        }
        places().find_map(|place| {
            let entry = self.entry_at(place)?;
            let hashed = self.hashed(&entry.key, entry.number);
            let (primary, secondary) = (hashed.primary as usize, hashed.secondary as usize);
            let other = if bucket == primary { secondary } else { primary };
            let free = self.free_place(other, hashed.identity)?;
            if other == secondary {
                self.mark_spilled(primary);
            }
            self.put(free, &entry);
            self.clear(place);
            Some(place)
        })
    }

    fn entries(&self) -> Vec<Entry<K>> {
        let places = (0..self.cells.len())
            .flat_map(|bucket| (0..BUCKET_ENTRIES).map(move |entry| Place { bucket, entry }));
        places.filter_map(|place| self.entry_at(place)).collect()
    }

    fn entry_at(&self, place: Place) -> Option<Entry<K>> {
        let stored = self.value_at(place).load();
        Value::identity_of(stored)?;
        Some(Entry { key: self.key_at(place), number: Value::number(stored), value: Value(stored) })
    }

    fn put(&self, place: Place, entry: &Entry<K>) {
        let identity = self.hashed(&entry.key, entry.number).identity;
        store_words(&self.cells[place.bucket].keys[place.entry], &entry.key);
        self.store_value(place, entry.value.stored(identity));
    }

    fn clear(&self, place: Place) {
        self.store_value(place, 0);
    }

    /// The bucket's mark lies in a value but does not belong to it.
    fn store_value(&self, place: Place, stored: u64) {
        let value = self.value_at(place);
        value.store(stored | value.load() & Value::SPILLED);
    }

    fn mark_spilled(&self, bucket: usize) {
        let value = &self.cells[bucket].values[0];
        value.store(value.load() | Value::SPILLED);
    }

    fn value_at(&self, place: Place) -> &Word {
        &self.cells[place.bucket].values[place.entry]
    }

    fn key_at(&self, place: Place) -> [u64; K] {
        self.cells[place.bucket].keys[place.entry].each_ref().map(Word::load)
    }

    fn set_exceptions(&mut self, exceptions: &[(Pattern<K>, &Exception)]) -> Result<(), NoRoom> {
        if exceptions.len() > MAX_EXCEPTIONS {
            return Err(NoRoom::Exceptions);
        }
        for (record, (pattern, exception)) in self.exceptions[0].0.iter().zip(exceptions) {
            let protocol_mask = if exception.protocol == 0 { 0 } else { u8::MAX };
            let PortMatch { port: source, mask: source_mask } = exception.source_port;
            let PortMatch { port: destination, mask: destination_mask } = exception.destination_port;
            store_words(&record.key, &pattern.key);
            store_words(&record.mask, &pattern.mask);
            record.upper.store(upper_layer(exception.protocol, source, destination));
            record.upper_mask.store(upper_layer(protocol_mask, source_mask, destination_mask));
        }
        self.exception_count = exceptions.len();
        Ok(())
    }
}

/// Where an entry lies.
#[derive(Clone, Copy)]
struct Place {
    bucket: usize,
    entry: usize,
}

fn store_words<const K: usize>(words: &[Word; K], values: &[u64; K]) {
    for (word, value) in words.iter().zip(values) {
        word.store(*value);
    }
}

/// A number that nobody can foresee: the standard library seeds its hashers from the system's randomness.
fn random() -> u64 {
    RandomState::new().hash_one(0_u64)
}
