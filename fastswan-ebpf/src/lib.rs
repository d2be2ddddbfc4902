//! The map layouts that fastswan and its XDP program share, and the lookup that both run over them.
//!
//! User space writes these maps through memory mappings while the program reads them, so every field is a
//! [`Word`]. One [`Control::sequence`] guards them all: it is odd while a batch of changes is being written,
//! and the program passes a packet to the kernel if the number was odd or changed during its lookup.
//!
//! | map | value | index |
//! |---|---|---|
//! | `CONTROL` | [`Control`] | 0 |
//! | `CELLS_V4`, `CELLS_V6` | [`Bucket`] | hash of a masked key |
//! | `TUPLES_V4`, `TUPLES_V6` | [`TupleList`] | [`List`] |
//! | `EXCEPTIONS_V4`, `EXCEPTIONS_V6` | [`Bucket`] | hash of a masked key |
//! | `UPPER_TUPLES_V4`, `UPPER_TUPLES_V6` | [`TupleList`] | [`ExceptionList`] |
//! | `SLOTS` | [`SlotRecord`] | slot |
//! | `WAYS` | [`Way`] | of a slot |
//! | `FORWARDED` | [`Forwarded`] | CPU × slots + slot |
//! | `PORT_BUCKETS` | [`Bucket`] | hash of a [`port_key`] |
//! | `PORTS` | [`Port`] | [`port_position`], or payload of the entry with its key |
//! | `PASSES` | [`Passes`] | CPU |
//! | `DEVICES` | (device map) | interface index |
//! | `CLOCK` | [`Word`] | 0: ticks of the clock that leases are judged by |
//! | `REMOVALS` | (ring buffer) | |
//! | `LOSSES` | [`Losses`] | 0 |
//! | `INGRESS` | 1 | (hash) index of an interface that has ports |

#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![no_std]
// Shared memory needs it; each block says why it is sound.
#![allow(unsafe_code)]
// Words are packed from, and unpacked into, smaller numbers; the masks and shifts beside show which.
#![allow(clippy::cast_possible_truncation)]

mod check;
mod layout;
mod lookup;
mod reason;
mod record;
mod special;
#[cfg(target_arch = "bpf")]
pub mod wire;

pub use check::Check;
pub use layout::{
    ADDRESS_MASK, ASK_NEVER, BUCKET_ENTRIES, Bucket, Control, EXCEPTION_LISTS, ExceptionList, Forwarded,
    LISTS, List, Losses, MAX_PORTS, MAX_TUPLES, PORT_BUCKETS, PORT_WORDS, Passes, Port, Shared, SlotRecord,
    Tuple, TupleList, UPPER_LAYER_BITS, Value, Way, Word, address_word, port_key, port_position, upper_layer,
    word_address,
};
pub use lookup::{Buckets, Hashed, find, first_hit, first_hit_of, hash, start};
pub use reason::PassReason;
pub use record::{CAST_MARKER, SEVERAL_BUFFERS};
pub use special::{is_special_v4, is_special_v6};

/// Words of an IPv4 key: destination in the upper half, source in the lower.
pub const KEY_WORDS_V4: usize = 1;
/// Words of an IPv6 key: two for the destination, then two for the source.
pub const KEY_WORDS_V6: usize = 4;
/// Words of an exception's key for IPv4: the same, and [`upper_layer`].
pub const EXCEPTION_WORDS_V4: usize = KEY_WORDS_V4 + 1;
/// Likewise for IPv6.
pub const EXCEPTION_WORDS_V6: usize = KEY_WORDS_V6 + 1;
