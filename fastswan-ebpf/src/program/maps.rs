//! The maps of the programs, and what is set when they are loaded.

use aya_ebpf::{
    macros::map,
    maps::{Array, DevMapHash, HashMap, RingBuf},
};
use fastswan_ebpf::{
    Bucket, Control, EXCEPTION_LISTS, EXCEPTION_WORDS_V4, EXCEPTION_WORDS_V6, Forwarded, KEY_WORDS_V4,
    KEY_WORDS_V6, LISTS, Losses, MAX_PORTS, PORT_BUCKETS as PORT_BUCKET_COUNT, PORT_WORDS, Passes, Port,
    SlotRecord, TupleList, Way, Word,
};

/// `BPF_F_MMAPABLE`
const MMAPABLE: u32 = 1 << 10;

// User space sets lengths of 1 to what it needs when it loads the maps.
#[map]
pub(super) static CONTROL: Array<Control> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static CELLS_V4: Array<Bucket<KEY_WORDS_V4>> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static CELLS_V6: Array<Bucket<KEY_WORDS_V6>> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static TUPLES_V4: Array<TupleList<KEY_WORDS_V4>> = Array::with_max_entries(LISTS as u32, MMAPABLE);
#[map]
pub(super) static TUPLES_V6: Array<TupleList<KEY_WORDS_V6>> = Array::with_max_entries(LISTS as u32, MMAPABLE);
#[map]
pub(super) static EXCEPTIONS_V4: Array<Bucket<EXCEPTION_WORDS_V4>> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static EXCEPTIONS_V6: Array<Bucket<EXCEPTION_WORDS_V6>> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static UPPER_TUPLES_V4: Array<TupleList<EXCEPTION_WORDS_V4>> =
    Array::with_max_entries(EXCEPTION_LISTS as u32, MMAPABLE);
#[map]
pub(super) static UPPER_TUPLES_V6: Array<TupleList<EXCEPTION_WORDS_V6>> =
    Array::with_max_entries(EXCEPTION_LISTS as u32, MMAPABLE);
#[map]
pub(super) static SLOTS: Array<SlotRecord> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static WAYS: Array<Way> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static FORWARDED: Array<Forwarded> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static PORT_BUCKETS: Array<Bucket<PORT_WORDS>> =
    Array::with_max_entries(PORT_BUCKET_COUNT as u32, MMAPABLE);
#[map]
pub(super) static PORTS: Array<Port> = Array::with_max_entries(MAX_PORTS as u32, MMAPABLE);
#[map]
pub(super) static PASSES: Array<Passes> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(super) static DEVICES: DevMapHash = DevMapHash::with_max_entries(256, 0);
#[map]
pub(super) static CLOCK: Array<Word> = Array::with_max_entries(1, MMAPABLE);
/// Wakes whoever waits for removals, or for routes that do not agree; what is in it means nothing.
#[map]
pub(super) static REMOVALS: RingBuf = RingBuf::with_byte_size(4096, 0);
#[map]
pub(super) static LOSSES: Array<Losses> = Array::with_max_entries(1, MMAPABLE);
/// Interfaces that have ports.
#[map]
pub(super) static INGRESS: HashMap<u32, u32> = HashMap::with_max_entries(MAX_PORTS as u32, 0);

/// Slots that the table has, the length of a column of `FORWARDED`. Set when the program is loaded.
#[unsafe(no_mangle)]
pub(super) static SLOT_COUNT: u32 = 0;
/// Not 0 where the processor may reorder reads. Set when the program is loaded.
#[unsafe(no_mangle)]
pub(super) static WEAKLY_ORDERED: u32 = 0;
/// Where the flags of the kernel's record of a frame (`xdp_buff`) lie in it, in bytes; 0 if that is not known. Set when the program is
/// loaded, and then the calls that [`CAST_MARKER`](fastswan_ebpf::CAST_MARKER) marks are written anew.
#[unsafe(no_mangle)]
pub(super) static BUFFER_FLAGS: u32 = 0;
