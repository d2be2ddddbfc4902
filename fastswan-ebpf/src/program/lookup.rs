//! Lookups in the maps, each a function of its own to the verifier.

use aya_ebpf::maps::Array;
use fastswan_ebpf::{
    Bucket, Buckets, ExceptionList, KEY_WORDS_V4, KEY_WORDS_V6, List, MAX_TUPLES, TupleList,
    UPPER_LAYER_BITS, Value, first_hit_of,
};

use super::maps::{
    CELLS_V4, CELLS_V6, EXCEPTIONS_V4, EXCEPTIONS_V6, TUPLES_V4, TUPLES_V6, UPPER_TUPLES_V4, UPPER_TUPLES_V6,
};

/// Buckets in a map.
pub(super) struct Entries<'a, const K: usize>(pub(super) &'a Array<Bucket<K>>);

impl<const K: usize> Buckets<K> for Entries<'_, K> {
    #[inline(always)]
    fn bucket(&self, index: u64) -> Option<&Bucket<K>> {
        self.0.get(index as u32)
    }
}

pub(super) fn first_hit_v4(list: List, key: &[u64; KEY_WORDS_V4]) -> Option<Value> {
    found(lookup_v4(list as u64, key[0]))
}

pub(super) fn first_hit_v6(list: List, key: &[u64; KEY_WORDS_V6]) -> Option<Value> {
    found(lookup_v6(list as u64, key[0], key[1], key[2], key[3]))
}

/// The first tuples of cells, in which a packet is looked up without a call. Most gateways have no more; the verifier follows each
/// once for every way to get to the lookup.
const FIRST: usize = 8;

/// The cell of a packet.
#[inline(always)]
pub(super) fn cell_v4(key: &[u64; KEY_WORDS_V4]) -> Option<Value> {
    cell(&TUPLES_V4, &CELLS_V4, key, |key| rest_of_cells_v4(key[0]))
}

/// The same for IPv6.
#[inline(always)]
pub(super) fn cell_v6(key: &[u64; KEY_WORDS_V6]) -> Option<Value> {
    cell(&TUPLES_V6, &CELLS_V6, key, |key| rest_of_cells_v6(key[0], key[1], key[2], key[3]))
}

#[inline(always)]
fn cell<const K: usize>(
    tuples: &Array<TupleList<K>>,
    cells: &Array<Bucket<K>>,
    key: &[u64; K],
    rest: impl Fn(&[u64; K]) -> u64,
) -> Option<Value> {
    let Some(list) = tuples.get(List::Cells as u32) else { return Some(Value(UNREADABLE)) };
    let value = first_hit_of::<K, 0, FIRST>(&Entries(cells), list, key);
    if value.is_some() || list.length.load() <= FIRST as u64 {
        return value;
    }
    found(rest(key))
}

pub(super) fn is_exception_v4(list: ExceptionList, key: &[u64; KEY_WORDS_V4], upper: u64) -> bool {
    lookup_exception_v4(list as u64, key[0], upper) != 0
}

pub(super) fn is_exception_v6(list: ExceptionList, key: &[u64; KEY_WORDS_V6], upper: u64) -> bool {
    // A function takes five numbers at most.
    let list_and_upper = (list as u64) << UPPER_LAYER_BITS | upper;
    lookup_exception_v6(list_and_upper, key[0], key[1], key[2], key[3]) != 0
}

/// No entry is 0.
#[inline(always)]
fn found(stored: u64) -> Option<Value> {
    (stored != 0).then_some(Value(stored))
}

/// A lookup is a function of its own to the verifier, which then follows its paths once and not once for each
/// way to get there. Only numbers may be passed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_v4(list: u64, key: u64) -> u64 {
    lookup::<_, 0>(&TUPLES_V4, &CELLS_V4, list, &[key])
}

/// The same for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_v6(list: u64, destination0: u64, destination1: u64, source0: u64, source1: u64) -> u64 {
    let key = [destination0, destination1, source0, source1];
    lookup::<_, 0>(&TUPLES_V6, &CELLS_V6, list, &key)
}

/// The same of the tuples of cells behind the first.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rest_of_cells_v4(key: u64) -> u64 {
    lookup::<_, FIRST>(&TUPLES_V4, &CELLS_V4, List::Cells as u64, &[key])
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rest_of_cells_v6(destination0: u64, destination1: u64, source0: u64, source1: u64) -> u64 {
    let key = [destination0, destination1, source0, source1];
    lookup::<_, FIRST>(&TUPLES_V6, &CELLS_V6, List::Cells as u64, &key)
}

/// Likewise for exceptions.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_exception_v4(list: u64, key: u64, upper: u64) -> u64 {
    lookup::<_, 0>(&UPPER_TUPLES_V4, &EXCEPTIONS_V4, list, &[key, upper])
}

/// The list is in the bits above the upper layer.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_exception_v6(
    list_and_upper: u64,
    destination0: u64,
    destination1: u64,
    source0: u64,
    source1: u64,
) -> u64 {
    // A comparison and no shift: the verifier does not connect a number with what it was shifted from.
    let upper = list_and_upper & ((1 << UPPER_LAYER_BITS) - 1);
    let list = if list_and_upper == upper { ExceptionList::Ports } else { ExceptionList::Protocols };
    let key = [destination0, destination1, source0, source1, upper];
    lookup::<_, 0>(&UPPER_TUPLES_V6, &EXCEPTIONS_V6, list as u64, &key)
}

/// What a lookup that cannot be made gives: of whatever list, it makes the packet pass.
const UNREADABLE: u64 = Value::denied().0;

/// Looks a key up in a list, from one of its tuples on.
#[inline(always)]
fn lookup<const K: usize, const FROM: usize>(
    tuples: &Array<TupleList<K>>,
    entries: &Array<Bucket<K>>,
    list: u64,
    key: &[u64; K],
) -> u64 {
    match tuples.get(list as u32) {
        None => UNREADABLE,
        Some(list) => {
            first_hit_of::<K, FROM, MAX_TUPLES>(&Entries(entries), list, key).map_or(0, |value| value.0)
        }
    }
}
