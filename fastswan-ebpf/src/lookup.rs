//! Tuple-space lookup over a bucketed hash.
//!
//! Entries with the same pair of prefix lengths form a tuple. A lookup masks the packet's key for one tuple
//! after the other, in the order of the list, and the first entry found decides. An entry lies in one of two
//! buckets that its hash names; the second is read only if the first has spilled.

use crate::layout::{BUCKET_ENTRIES, Bucket, MAX_TUPLES, TupleList, Value};

/// Where buckets lie: a map for the program, mapped memory for user space.
pub trait Buckets<const K: usize> {
    /// The bucket with this index, or `None` beyond the end.
    fn bucket(&self, index: u64) -> Option<&Bucket<K>>;
}

/// A hash and what follows from it.
#[derive(Clone, Copy, Debug)]
pub struct Hashed {
    /// The bucket that an entry lies in if there is room.
    pub primary: u64,
    /// The bucket that it lies in otherwise.
    pub secondary: u64,
    /// What marks the entry in either, see [`Value::identity`].
    pub identity: u64,
}

// Odd constants with well spread bits: the golden ratio, and the finalizer of MurmurHash3.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
const FINISH: u64 = 0xff51_afd7_ed55_8ccd;

/// Where the hash of keys begins that belong to the tuple with this number.
#[inline(always)]
#[must_use]
pub const fn start(number: u8, seed: u64) -> u64 {
    seed ^ (number as u64).wrapping_mul(FINISH)
}

/// Hashes a masked key, from the [`start`] of its tuple on, for so many buckets: two to 2³². What entries of the tuple are
/// [recognised](Value::numbered) by comes with the hash.
#[inline(always)]
#[must_use]
pub fn hash<const K: usize>(key: &[u64; K], start: u64, numbered: u64, buckets: u64) -> Hashed {
    let mut hash = start;
    let mut word = 0;
    while word < K {
        hash = (hash ^ key[word]).wrapping_mul(SPREAD);
        hash ^= hash >> 32;
        word += 1;
    }
    hash = hash.wrapping_mul(FINISH);
    hash ^= hash >> 29;
    // A half of the hash each, as a fraction of the buckets. The tag comes from the bits that matter least.
    let primary = (hash >> 32).wrapping_mul(buckets) >> 32;
    let mut secondary = (hash & 0xffff_ffff).wrapping_mul(buckets) >> 32;
    if secondary == primary {
        secondary = if primary == 0 { 1 } else { primary - 1 };
    }
    Hashed { primary, secondary, identity: Value::identity(numbered, hash) }
}

/// The value that the first tuple with a matching entry has for a key.
#[inline(always)]
#[must_use]
pub fn first_hit<const K: usize>(
    buckets: &impl Buckets<K>,
    list: &TupleList<K>,
    key: &[u64; K],
) -> Option<Value> {
    first_hit_of::<K, 0, MAX_TUPLES>(buckets, list, key)
}

/// The same of the tuples from `FROM` on, up to the one before `TO`.
#[inline(always)]
#[must_use]
pub fn first_hit_of<const K: usize, const FROM: usize, const TO: usize>(
    buckets: &impl Buckets<K>,
    list: &TupleList<K>,
    key: &[u64; K],
) -> Option<Value> {
    let length = list.length.load();
    let bucket_count = list.buckets.load();
    let mut index = FROM;
    while index < TO {
        if index as u64 >= length {
            break;
        }
        let tuple = &list.tuples[index];
        let mut masked = [0; K];
        let mut word = 0;
        while word < K {
            masked[word] = key[word] & tuple.mask[word].load();
            word += 1;
        }
        let hashed = hash(&masked, tuple.start.load(), tuple.identity.load(), bucket_count);
        if let Some(value) = find(buckets, &masked, &hashed) {
            return Some(value);
        }
        index += 1;
    }
    None
}

/// The value of the entry with this key, which is masked and hashed already.
#[inline(always)]
#[must_use]
pub fn find<const K: usize>(buckets: &impl Buckets<K>, key: &[u64; K], hashed: &Hashed) -> Option<Value> {
    let bucket = buckets.bucket(hashed.primary)?;
    if let Some(value) = find_in(bucket, key, hashed.identity) {
        return Some(value);
    }
    if bucket.values[0].load() & Value::SPILLED == 0 {
        return None;
    }
    find_in(buckets.bucket(hashed.secondary)?, key, hashed.identity)
}

/// No two entries of a bucket have the same identity, so at most one key is to be compared. Choosing the entry
/// takes no branch: the verifier follows every path through a lookup.
#[inline(always)]
fn find_in<const K: usize>(bucket: &Bucket<K>, key: &[u64; K], identity: u64) -> Option<Value> {
    let mut found = 0;
    let mut position = 0;
    let mut entry = 0;
    while entry < BUCKET_ENTRIES {
        let stored = bucket.values[entry].load();
        let chosen = Value::mask_if(stored, identity);
        found |= stored & chosen;
        position |= entry & chosen as usize;
        entry += 1;
    }
    if found == 0 {
        return None;
    }
    let keys = &bucket.keys[position % BUCKET_ENTRIES];
    let mut difference = 0;
    let mut word = 0;
    while word < K {
        difference |= keys[word].load() ^ key[word];
        word += 1;
    }
    if difference == 0 { Some(Value(found)) } else { None }
}
