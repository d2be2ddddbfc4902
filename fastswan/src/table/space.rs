//! Tuple spaces as the writer sees them: a bucketed hash, and the lists of tuples that its entries belong to.
//!
//! The store brackets changes with the sequence number, so entries may be moved, the hash may be seeded anew
//! and lists may be shifted without any reader seeing a mixture.

// Buckets are indexed by numbers that were masked to the size of what they index.
#![allow(clippy::cast_possible_truncation)]

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    hint::black_box,
};

use fastswan_ebpf::{
    BUCKET_ENTRIES, Bucket, Buckets, Hashed, MAX_TUPLES, TupleList, Value, Word, first_hit, hash, start,
};

use super::mmap::Region;

/// A seed is tried this often before the hash counts as full.
const SEED_ATTEMPTS: u32 = 16;
/// So many buckets are looked at for one that has room.
const SEARCHED_BUCKETS: usize = 256;

/// Why an entry could not be stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum NoRoom {
    Entries,
    Tuples,
}

/// What entries of one tuple have in common, and the key of one of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern<const K: usize> {
    /// Masked.
    pub(super) key: [u64; K],
    pub(super) mask: [u64; K],
}

/// Entries with `K` words of key, and `L` lists of their tuples.
#[derive(Debug)]
pub(super) struct TupleSpace<const K: usize, const L: usize> {
    buckets: Region<Bucket<K>>,
    /// How many entries lie elsewhere that have each bucket for their first.
    spilled: Vec<u32>,
    tuples: Region<TupleList<K>>,
    seed: u64,
    /// The lists as they are in `tuples`.
    lists: [Vec<TupleState<K>>; L],
}

/// A tuple that has entries.
#[derive(Clone, Copy, Debug)]
struct TupleState<const K: usize> {
    mask: [u64; K],
    number: u8,
    entries: usize,
}

/// An entry as it lies in the hash.
#[derive(Clone, Copy)]
struct Entry<const K: usize> {
    key: [u64; K],
    number: u8,
    value: Value,
}

/// Where an entry lies.
#[derive(Clone, Copy)]
struct Place {
    bucket: usize,
    entry: usize,
}

/// A bucket that was looked at for room.
struct Searched {
    bucket: usize,
    /// The entry that could move here, and which of the buckets looked at it lies in.
    from: Option<(usize, Place)>,
}

struct BucketSlice<'a, const K: usize>(&'a [Bucket<K>]);

impl<const K: usize> Buckets<K> for BucketSlice<'_, K> {
    fn bucket(&self, index: u64) -> Option<&Bucket<K>> {
        self.0.get(usize::try_from(index).ok()?)
    }
}

impl<const K: usize, const L: usize> TupleSpace<K, L> {
    /// Takes over memory that is all zero: two buckets or more, and `L` lists of tuples.
    pub(super) fn new(buckets: Region<Bucket<K>>, tuples: Region<TupleList<K>>) -> Self {
        let spilled = vec![0; buckets.len()];
        let space = Self { buckets, spilled, tuples, seed: random(), lists: [const { Vec::new() }; L] };
        space.write_lists();
        space
    }

    /// The length of a list.
    pub(super) fn tuples(&self, list: usize) -> usize {
        self.lists[list].len()
    }

    /// Where the hash of the tuple with number 0 begins.
    pub(super) fn start(&self) -> u64 {
        start(0, self.seed)
    }

    /// What the first tuple of a list with a matching entry has for a packet's key.
    pub(super) fn first_hit(&self, list: usize, key: &[u64; K]) -> Option<Value> {
        first_hit(&BucketSlice(&self.buckets), &self.tuples[list], key)
    }

    /// Sets or removes the entry of one list with this key and mask. If it does not fit, all is as before.
    pub(super) fn set(
        &mut self,
        list: usize,
        pattern: &Pattern<K>,
        value: Option<Value>,
    ) -> Result<(), NoRoom> {
        let position = self.position(list, pattern);
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
        let number = self.lists[list][position].number;
        let entry = Entry { key: pattern.key, number, value };
        if let Some(place) = self.find(&entry.key, number) {
            self.store_value(place, value.stored(self.hashed(&entry.key, number).identity));
            return Ok(());
        }
        let inserted = self.insert(entry);
        self.lists[list][position].entries += usize::from(inserted.is_ok());
        self.drop_if_empty(list, position);
        inserted
    }

    /// Has the memory of an entry of one list brought closer, whether it is there or not.
    pub(super) fn approach(&self, list: usize, pattern: &Pattern<K>) {
        if let Some(position) = self.position(list, pattern) {
            let hashed = self.hashed(&pattern.key, self.lists[list][position].number);
            let bucket = &self.buckets[hashed.primary as usize];
            black_box((bucket.values[0].load(), bucket.keys[0][0].load()));
        }
    }

    /// Counts one more, or one less, who asks for the entry of one list to be there. If it does not fit, all is
    /// as before.
    pub(super) fn count(&mut self, list: usize, pattern: &Pattern<K>, more: bool) -> Result<(), NoRoom> {
        let count = self.get(list, pattern).map_or(0, Value::payload);
        let count = if more { count.saturating_add(1) } else { count.saturating_sub(1) };
        self.set(list, pattern, (count > 0).then(|| Value::present(count)))
    }

    /// The value of the entry of one list with this key and mask.
    fn get(&self, list: usize, pattern: &Pattern<K>) -> Option<Value> {
        let number = self.lists[list][self.position(list, pattern)?].number;
        let place = self.find(&pattern.key, number)?;
        Some(Value(self.value_at(place).load()))
    }

    /// How many buckets there are.
    pub(super) fn bucket_count(&self) -> u64 {
        self.buckets.len() as u64
    }

    fn position(&self, list: usize, pattern: &Pattern<K>) -> Option<usize> {
        self.lists[list].iter().position(|tuple| tuple.mask == pattern.mask)
    }

    fn remove(&mut self, list: usize, position: usize, pattern: &Pattern<K>) {
        if let Some(place) = self.find(&pattern.key, self.lists[list][position].number) {
            self.take(place);
            self.lists[list][position].entries -= 1;
            self.drop_if_empty(list, position);
        }
    }

    fn insert_tuple(&mut self, list: usize, pattern: &Pattern<K>) -> Result<usize, NoRoom> {
        if self.lists[list].len() == MAX_TUPLES {
            return Err(NoRoom::Tuples);
        }
        let taken: HashSet<u8> = self.lists.iter().flatten().map(|tuple| tuple.number).collect();
        let number = (0..=u8::MAX).find(|number| !taken.contains(number)).ok_or(NoRoom::Tuples)?;
        let tuples = &mut self.lists[list];
        // A longer prefix has a greater mask: longest destination first, then longest source.
        let position = tuples.partition_point(|tuple| tuple.mask > pattern.mask);
        tuples.insert(position, TupleState { mask: pattern.mask, number, entries: 0 });
        self.write_list(list);
        Ok(position)
    }

    fn drop_if_empty(&mut self, list: usize, position: usize) {
        if self.lists[list][position].entries == 0 {
            self.lists[list].remove(position);
            self.write_list(list);
        }
    }

    fn write_list(&self, list: usize) {
        let record = &self.tuples[list];
        record.length.store(self.lists[list].len() as u64);
        record.buckets.store(self.bucket_count());
        for (record, tuple) in record.tuples.iter().zip(&self.lists[list]) {
            store_words(&record.mask, &tuple.mask);
            record.start.store(start(tuple.number, self.seed));
            record.identity.store(Value::numbered(tuple.number));
        }
    }

    fn write_lists(&self) {
        (0..L).for_each(|list| self.write_list(list));
    }

    fn hashed(&self, key: &[u64; K], number: u8) -> Hashed {
        hash(key, start(number, self.seed), Value::numbered(number), self.bucket_count())
    }

    fn find(&self, key: &[u64; K], number: u8) -> Option<Place> {
        let hashed = self.hashed(key, number);
        let find = |bucket| {
            places_of(bucket).find(|&place| {
                let identity = Value::identity_of(self.value_at(place).load());
                identity == Some(hashed.identity) && self.key_at(place) == *key
            })
        };
        let primary = hashed.primary as usize;
        match find(primary) {
            None if self.has_spilled(primary) => find(hashed.secondary as usize),
            found => found,
        }
    }

    /// Stores an entry that is not there yet.
    fn insert(&mut self, entry: Entry<K>) -> Result<(), NoRoom> {
        if self.place(&entry) {
            return Ok(());
        }
        let before = (self.seed, self.contents(), self.spilled.clone());
        let mut entries: Vec<_> = self.places().filter_map(|place| self.entry_at(place)).collect();
        entries.push(entry);
        for _ in 0..SEED_ATTEMPTS {
            self.seed = random();
            for bucket in self.buckets.iter() {
                bucket.values.iter().for_each(|value| value.store(0));
            }
            self.spilled.fill(0);
            if entries.iter().all(|entry| self.place(entry)) {
                self.write_lists();
                return Ok(());
            }
        }
        self.seed = before.0;
        for (place, (value, key)) in self.places().zip(before.1) {
            self.value_at(place).store(value);
            store_words(&self.buckets[place.bucket].keys[place.entry], &key);
        }
        self.spilled = before.2;
        Err(NoRoom::Entries)
    }

    /// Stores an entry in one of its buckets, if need be after others have moved into their other buckets.
    fn place(&mut self, entry: &Entry<K>) -> bool {
        let hashed = self.hashed(&entry.key, entry.number);
        let (primary, secondary) = (hashed.primary as usize, hashed.secondary as usize);
        let place = self
            .free_place(primary, hashed.identity)
            .or_else(|| self.free_place(secondary, hashed.identity))
            .or_else(|| self.make_room(primary, secondary, hashed.identity));
        place.map(|place| self.put(place, entry, &hashed)).is_some()
    }

    /// A free place in a bucket, unless the bucket has an entry that looks the same before its key is
    /// compared: a lookup compares one key only.
    fn free_place(&self, bucket: usize, identity: u64) -> Option<Place> {
        if self.looks_like(bucket, identity) {
            return None;
        }
        places_of(bucket).find(|&place| Value::identity_of(self.value_at(place).load()).is_none())
    }

    fn looks_like(&self, bucket: usize, identity: u64) -> bool {
        places_of(bucket).any(|place| Value::identity_of(self.value_at(place).load()) == Some(identity))
    }

    /// Makes room in one of two full buckets: an entry of it moves into its other bucket, whence if need be another one
    /// has moved before, and so on. The fewest that can be are moved.
    fn make_room(&mut self, primary: usize, secondary: usize, identity: u64) -> Option<Place> {
        let roots = [primary, secondary].into_iter().filter(|&bucket| !self.looks_like(bucket, identity));
        let mut searched: Vec<_> = roots.map(|bucket| Searched { bucket, from: None }).collect();
        let mut at = 0;
        while let Some(&Searched { bucket, .. }) = searched.get(at) {
            for place in places_of(bucket) {
                let entry = self.entry_at(place)?;
                let hashed = self.hashed(&entry.key, entry.number);
                let (primary, secondary) = (hashed.primary as usize, hashed.secondary as usize);
                let other = if bucket == primary { secondary } else { primary };
                if let Some(free) = self.free_place(other, hashed.identity) {
                    return Some(self.shift(&searched, (at, place), free));
                }
                let is_new = searched.len() < SEARCHED_BUCKETS
                    && searched.iter().all(|searched| searched.bucket != other)
                    && !self.looks_like(other, hashed.identity);
                if is_new {
                    searched.push(Searched { bucket: other, from: Some((at, place)) });
                }
            }
            at += 1;
        }
        None
    }

    /// Moves an entry into a free place, into its place the one that could move there, and so on. Gives the place that is
    /// free in the end.
    fn shift(&mut self, searched: &[Searched], last: (usize, Place), mut free: Place) -> Place {
        let mut from = Some(last);
        while let Some((bucket, place)) = from {
            if let Some(entry) = self.entry_at(place) {
                self.take(place);
                self.put(free, &entry, &self.hashed(&entry.key, entry.number));
            }
            free = place;
            from = searched[bucket].from;
        }
        free
    }

    fn places(&self) -> impl Iterator<Item = Place> + use<K, L> {
        (0..self.buckets.len()).flat_map(places_of)
    }

    /// Values and keys of all places.
    fn contents(&self) -> Vec<(u64, [u64; K])> {
        self.places().map(|place| (self.value_at(place).load(), self.key_at(place))).collect()
    }

    fn entry_at(&self, place: Place) -> Option<Entry<K>> {
        let stored = self.value_at(place).load();
        Value::identity_of(stored)?;
        Some(Entry { key: self.key_at(place), number: Value::number(stored), value: Value(stored) })
    }

    /// Stores an entry, which is hashed already, in a free place.
    fn put(&mut self, place: Place, entry: &Entry<K>, hashed: &Hashed) {
        store_words(&self.buckets[place.bucket].keys[place.entry], &entry.key);
        self.store_value(place, entry.value.stored(hashed.identity));
        let primary = hashed.primary as usize;
        if place.bucket != primary {
            self.spilled[primary] += 1;
            self.mark_spilled(primary);
        }
    }

    /// Takes the entry out of a place.
    fn take(&mut self, place: Place) {
        if let Some(entry) = self.entry_at(place) {
            let primary = self.hashed(&entry.key, entry.number).primary as usize;
            self.store_value(place, 0);
            if place.bucket != primary {
                self.spilled[primary] -= 1;
                self.mark_spilled(primary);
            }
        }
    }

    /// The bucket's mark lies in a value but does not belong to it.
    fn store_value(&self, place: Place, stored: u64) {
        let value = self.value_at(place);
        value.store(stored | value.load() & Value::SPILLED);
    }

    fn has_spilled(&self, bucket: usize) -> bool {
        self.buckets[bucket].values[0].load() & Value::SPILLED != 0
    }

    /// Says in a bucket whether it has spilled.
    fn mark_spilled(&self, bucket: usize) {
        let value = &self.buckets[bucket].values[0];
        let mark = if self.spilled[bucket] > 0 { Value::SPILLED } else { 0 };
        value.store(value.load() & !Value::SPILLED | mark);
    }

    fn value_at(&self, place: Place) -> &Word {
        &self.buckets[place.bucket].values[place.entry]
    }

    fn key_at(&self, place: Place) -> [u64; K] {
        self.buckets[place.bucket].keys[place.entry].each_ref().map(Word::load)
    }
}

fn places_of(bucket: usize) -> impl Iterator<Item = Place> {
    (0..BUCKET_ENTRIES).map(move |entry| Place { bucket, entry })
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{policy::Family, table::TableConfig};

    const ALL: [u64; 1] = [u64::MAX];

    fn space(buckets: usize) -> TupleSpace<1, 1> {
        TupleSpace::new(Region::allocate(buckets), Region::allocate(1))
    }

    fn pattern(key: u64) -> Pattern<1> {
        Pattern { key: [key], mask: ALL }
    }

    /// How many entries lie elsewhere that have each bucket for their first, by looking at all of them.
    fn spilled(space: &TupleSpace<1, 1>) -> Vec<u32> {
        let mut spilled = vec![0; space.buckets.len()];
        for place in space.places() {
            if let Some(entry) = space.entry_at(place) {
                let primary = space.hashed(&entry.key, entry.number).primary as usize;
                spilled[primary] += u32::from(primary != place.bucket);
            }
        }
        spilled
    }

    /// A table takes what it is made for, whatever its size and its seed, and is not hashed anew for it.
    #[test]
    fn there_is_room_for_as_many_as_configured() {
        for cells_v4 in (1..40).chain([100, 1000, 10_000, 100_000]) {
            let config = TableConfig { cells_v4, ..TableConfig::default() };
            let mut space = space(config.cell_buckets(Family::V4) as usize);
            let seed = space.seed;
            for key in 0..u64::from(cells_v4) {
                space.set(0, &pattern(key), Some(Value::present(key as u32))).unwrap();
            }
            for key in 0..u64::from(cells_v4) {
                assert_eq!(space.first_hit(0, &[key]).map(Value::payload), Some(key as u32));
            }
            assert!(cells_v4 < 100 || space.seed == seed, "{cells_v4} cells were hashed anew");
        }
    }

    /// More than that are taken as long as there are places, nearly.
    #[test]
    fn nearly_all_places_can_be_filled() {
        let mut space = space(1000);
        let refused = (0..3900).find(|&key| space.set(0, &pattern(key), Some(Value::present(1))).is_err());
        assert_eq!(refused, None);
        let refused = (3900..4001).find(|&key| space.set(0, &pattern(key), Some(Value::present(1))).is_err());
        assert!(refused.is_some());
        assert!((0..refused.unwrap()).all(|key| space.first_hit(0, &[key]).is_some()));
        assert_eq!(space.spilled, spilled(&space));
    }

    proptest! {
        /// After any changes a space holds what was set last, and a bucket is marked if one of its entries lies elsewhere.
        #[test]
        fn a_space_is_a_map(changes in prop::collection::vec((0..40_u64, prop::option::of(any::<u32>())), 0..300)) {
            let mut space = space(12);
            let mut model = std::collections::BTreeMap::new();
            for (key, value) in changes {
                let set = space.set(0, &pattern(key), value.map(Value::via));
                match value {
                    Some(value) if set.is_ok() => drop(model.insert(key, value)),
                    Some(_) => prop_assert!(model.len() > 36),
                    None => drop(model.remove(&key)),
                }
            }
            for key in 0..40 {
                prop_assert_eq!(space.first_hit(0, &[key]).map(Value::payload), model.get(&key).copied());
            }
            let expected = spilled(&space);
            prop_assert_eq!(&space.spilled, &expected);
            for (bucket, spilled) in expected.iter().enumerate() {
                prop_assert_eq!(space.has_spilled(bucket), *spilled > 0);
            }
        }
    }
}
