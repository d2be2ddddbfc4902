//! What lies where in the maps. Numbers are in host order unless a name says otherwise.

use core::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Zeroable;

use crate::PassReason;

/// Entries of a bucket; four IPv4 entries fill one cache line.
pub const BUCKET_ENTRIES: usize = 4;
/// Longest list of tuples.
pub const MAX_TUPLES: usize = 64;
/// [`Control::ask_mask`] when the kernel is asked about no packet.
pub const ASK_NEVER: u64 = u64::MAX;
/// Ports that a table holds, whatever their interfaces and VLANs.
pub const MAX_PORTS: usize = 4096;
/// Buckets of the hash that finds them: two entries for each bucket of four, so that there is always room in one of two.
pub const PORT_BUCKETS: usize = MAX_PORTS / 2;
/// Words of a port's key.
pub const PORT_WORDS: usize = 1;

/// Types that may lie in memory which user space and the program share.
///
/// # Safety
///
/// The type is `repr(C)`, consists of nothing but [`Word`]s, and thus has no padding, is valid for every bit
/// pattern (zero included) and may be written through a shared reference.
pub unsafe trait Shared: Zeroable + Sync + 'static {}

/// One 64-bit number in shared memory.
#[repr(transparent)]
#[derive(Debug, Default)]
pub struct Word(AtomicU64);

impl Word {
    /// Reads it.
    #[inline(always)]
    #[must_use]
    pub fn load(&self) -> u64 {
        if cfg!(target_arch = "bpf") {
            // Volatile, so that the reads stay in program order; the architectures that reorder them all the
            // same need the program's `fence`.
            // SAFETY: the pointer comes from a reference.
            unsafe { self.0.as_ptr().read_volatile() }
        } else {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// Writes it.
    #[inline(always)]
    pub fn store(&self, value: u64) {
        if cfg!(target_arch = "bpf") {
            // SAFETY: the pointer comes from a reference, and the memory is writable for both sides.
            unsafe { self.0.as_ptr().write_volatile(value) }
        } else {
            self.0.store(value, Ordering::Relaxed);
        }
    }

    /// Adds to it. Not atomic: for counters with one writer, which per-CPU ones have.
    #[inline(always)]
    pub fn add(&self, value: u64) {
        self.store(self.load().wrapping_add(value));
    }

    /// The atomic itself, for a writer or reader that needs an ordering.
    #[inline(always)]
    #[must_use]
    pub fn atomic(&self) -> &AtomicU64 {
        &self.0
    }
}

/// The control record.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Control {
    /// Even: the maps are consistent. Odd: a batch is being written.
    pub sequence: Word,
    /// The kill switch: 0 passes everything.
    pub enabled: Word,
    /// The mirror is known to be alive and caught up until the kernel's ticks (`bpf_jiffies64`) are so many.
    pub deadline: Word,
    /// A deadline further ahead than so many ticks does not count.
    pub lease: Word,
    /// Removals that the kernel has begun, as the guard counts them; 0 without one.
    pub removals: Word,
    /// The removals whose consequences are in the maps: everything passes unless it is all of them.
    pub acknowledged: Word,
    /// The kernel's routes are asked about a packet that would be forwarded if these bits of the number of those that its
    /// slot has forwarded on its CPU are 0. [`ASK_NEVER`] asks about none.
    pub ask_mask: Word,
    /// Not 0 if there are exceptions of IPv4.
    pub exceptions_v4: Word,
    /// Not 0 if there are exceptions of IPv6.
    pub exceptions_v6: Word,
    /// Where the hash of ports begins, see [`start`](crate::start); all are of one tuple, whose number is 0.
    pub ports_start: Word,
    /// Its buckets.
    pub ports_buckets: Word,
}

/// How many lists there are of tuples of cells, facts and guards.
pub const LISTS: usize = 4;

/// The lists of tuples that a family has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum List {
    /// Pairs of prefix lengths of cells: longest destination first, then longest source.
    Cells = 0,
    /// Prefix lengths of facts about destinations, longest first.
    Destinations = 1,
    /// Prefix lengths of facts about sources, longest first.
    Sources = 2,
    /// Prefix lengths of guards.
    Guards = 3,
}

/// How many lists there are of tuples of exceptions.
pub const EXCEPTION_LISTS: usize = 2;

/// The lists of tuples of a family's exceptions. Their keys are a packet's addresses and then its
/// [`upper_layer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ExceptionList {
    /// Exceptions as they are, for packets whose ports can be read.
    Ports = 0,
    /// The same exceptions without their ports, for packets whose ports cannot be read: they may be any.
    Protocols = 1,
}

/// The bits of a key that count for the entries that carry the tuple's number, and what the lookup would have to compute of
/// that number again and again.
#[repr(C)]
#[derive(Debug)]
pub struct Tuple<const K: usize> {
    /// Ones where the key counts.
    pub mask: [Word; K],
    /// Where its hash begins, see [`start`](crate::start).
    pub start: Word,
    /// What its entries have of their [`identity`](Value::identity) without the tag. A tuple's number is from 0 to 255,
    /// different from every other of the hash.
    pub identity: Word,
}

/// A list of tuples, in the order in which they are looked up: all that a lookup needs to know but the buckets.
#[repr(C)]
#[derive(Debug)]
pub struct TupleList<const K: usize> {
    /// How many there are.
    pub length: Word,
    /// Buckets of their hash.
    pub buckets: Word,
    /// The tuples.
    pub tuples: [Tuple<K>; MAX_TUPLES],
}

/// A bucket of the hash.
///
/// The values come first, so that one cache line tells whether a key need be compared.
#[repr(C)]
#[derive(Debug)]
pub struct Bucket<const K: usize> {
    /// What the entries say; see [`Value`]. Bit 63 of the first marks the bucket as spilled.
    pub values: [Word; BUCKET_ENTRIES],
    /// Their keys, masked.
    pub keys: [[Word; K]; BUCKET_ENTRIES],
}

/// What an entry of the hash says, in 64 bits.
///
/// | bits | meaning |
/// |---|---|
/// | 0–31 | payload: slot, reason, interface index or count |
/// | 32–34 | kind |
/// | 35–37 | probe the destination, the source, the guards |
/// | 38–45 | number of the tuple |
/// | 46–61 | tag: bits of the key's hash |
/// | 62 | 1 in every entry |
/// | 63 | in a bucket's first entry, whether it is used or not: the bucket has spilled into another |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(pub u64);

impl Value {
    const KIND_SHIFT: u32 = 32;
    const KIND_MASK: u64 = 7 << Self::KIND_SHIFT;
    const PROBE_DESTINATION: u64 = 1 << 35;
    const PROBE_SOURCE: u64 = 1 << 36;
    const PROBE_GUARDS: u64 = 1 << 37;
    const NUMBER_SHIFT: u32 = 38;
    const TAG_SHIFT: u32 = 46;
    const TAG_MASK: u64 = 0xffff << Self::TAG_SHIFT;
    const USED: u64 = 1 << 62;
    const IDENTITY_MASK: u64 = ((1 << 63) - 1) & !((1 << Self::NUMBER_SHIFT) - 1);
    /// The bucket has spilled into another.
    pub const SPILLED: u64 = 1 << 63;

    /// Kind of a fast cell; the payload is its slot.
    pub const FAST: u64 = 1;
    /// Kind of a cell that passes; the payload is its reason.
    pub const PASS: u64 = 2;
    /// Kind of a fact: never forwarded to or from.
    pub const DENIED: u64 = 3;
    /// Kind of a fact: routed to the device with the payload's index.
    pub const VIA: u64 = 4;
    /// Kind of a guard or an exception, which only need be there; the payload is how many have asked for it.
    pub const PRESENT: u64 = 5;

    /// A fast cell, and what to look up for each of its packets.
    #[must_use]
    pub fn fast(slot: u32, destination: bool, source: bool, guards: bool) -> Self {
        let mut value = Self::of_kind(Self::FAST, slot);
        for (flag, set) in [
            (Self::PROBE_DESTINATION, destination),
            (Self::PROBE_SOURCE, source),
            (Self::PROBE_GUARDS, guards),
        ] {
            if set {
                value.0 |= flag;
            }
        }
        value
    }

    /// A cell that passes.
    #[must_use]
    pub fn pass(reason: PassReason) -> Self {
        Self::of_kind(Self::PASS, reason as u32)
    }

    /// An address that packets are never forwarded to, or from.
    #[must_use]
    pub const fn denied() -> Self {
        Self::of_kind(Self::DENIED, 0)
    }

    /// An address that is routed to a device.
    #[must_use]
    pub fn via(ifindex: u32) -> Self {
        Self::of_kind(Self::VIA, ifindex)
    }

    /// A guard or an exception.
    #[must_use]
    pub fn present(count: u32) -> Self {
        Self::of_kind(Self::PRESENT, count)
    }

    const fn of_kind(kind: u64, payload: u32) -> Self {
        Self(payload as u64 | kind << Self::KIND_SHIFT)
    }

    /// The same, as stored: with the tuple's number and the hash's tag.
    #[must_use]
    pub fn stored(self, identity: u64) -> u64 {
        self.0 & !(Self::IDENTITY_MASK | Self::SPILLED) | identity
    }

    /// The bits by which an entry is recognised before its key is compared, without the tag: the number of its tuple.
    #[inline(always)]
    #[must_use]
    pub const fn numbered(number: u8) -> u64 {
        (number as u64) << Self::NUMBER_SHIFT | Self::USED
    }

    /// The bits by which an entry is recognised, with the tag that is taken from its hash.
    #[inline(always)]
    #[must_use]
    pub const fn identity(numbered: u64, hash: u64) -> u64 {
        numbered | hash << Self::TAG_SHIFT & Self::TAG_MASK
    }

    /// All ones if a stored word is an entry with this identity, else 0.
    #[inline(always)]
    #[must_use]
    pub fn mask_if(stored: u64, identity: u64) -> u64 {
        let difference = opaque((stored & Self::IDENTITY_MASK) ^ identity);
        // Bit 63 of the difference is 0, so only a difference of 0 becomes negative.
        (difference.wrapping_sub(1).cast_signed() >> 63).cast_unsigned()
    }

    /// The identity of a stored word, or `None` if it is no entry.
    #[must_use]
    pub fn identity_of(stored: u64) -> Option<u64> {
        (stored & Self::USED != 0).then_some(stored & Self::IDENTITY_MASK)
    }

    /// The number of the tuple that a stored entry belongs to.
    #[must_use]
    pub fn number(stored: u64) -> u8 {
        (stored >> Self::NUMBER_SHIFT) as u8
    }

    /// The kind.
    #[inline(always)]
    #[must_use]
    pub fn kind(self) -> u64 {
        (self.0 & Self::KIND_MASK) >> Self::KIND_SHIFT
    }

    /// The payload.
    #[inline(always)]
    #[must_use]
    pub fn payload(self) -> u32 {
        self.0 as u32
    }

    /// The destination is to be looked up.
    #[inline(always)]
    #[must_use]
    pub fn probes_destination(self) -> bool {
        self.0 & Self::PROBE_DESTINATION != 0
    }

    /// The source is to be looked up.
    #[inline(always)]
    #[must_use]
    pub fn probes_source(self) -> bool {
        self.0 & Self::PROBE_SOURCE != 0
    }

    /// The source is to be looked up among the guards.
    #[inline(always)]
    #[must_use]
    pub fn probes_guards(self) -> bool {
        self.0 & Self::PROBE_GUARDS != 0
    }
}

/// The same number. The compiler cannot make a branch of what depends on it: which entry of a bucket it is, no processor
/// foresees.
#[inline(always)]
fn opaque(number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    let number = {
        let mut number = number;
        // SAFETY: this changes nothing. (Without an instruction the verifier would see two lines of source for the next one.)
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(pure, nomem, nostack)) };
        number
    };
    number
}

/// Bits of [`upper_layer`].
pub const UPPER_LAYER_BITS: u32 = 40;

/// Protocol, source port and destination port in one number.
#[inline(always)]
#[must_use]
pub const fn upper_layer(protocol: u8, source_port: u16, destination_port: u16) -> u64 {
    (protocol as u64) << 32 | (source_port as u64) << 16 | destination_port as u64
}

/// Which way packets of a slot go, and whose they are.
#[repr(C)]
#[derive(Debug, Default)]
pub struct SlotRecord {
    /// Index of the [`Way`] in bits 0–31; in bits 32–63 the kernel's index of the policy, 0 if it has none. The program does
    /// not read that: it tells whoever takes over from a process that is gone whose counters these are.
    pub way_and_policy: Word,
}

impl SlotRecord {
    /// The index of the [`Way`].
    #[inline(always)]
    #[must_use]
    pub fn way(&self) -> u32 {
        self.way_and_policy.load() as u32
    }

    /// The kernel's index of the policy.
    #[must_use]
    pub fn policy(&self) -> u32 {
        (self.way_and_policy.load() >> 32) as u32
    }

    /// Sets the index of the way.
    pub fn set_way(&self, way: u32) {
        self.way_and_policy.store(u64::from(self.policy()) << 32 | u64::from(way));
    }

    /// Sets the kernel's index of the policy.
    pub fn set_policy(&self, policy: u32) {
        self.way_and_policy.store(u64::from(policy) << 32 | u64::from(self.way()));
    }
}

/// What one CPU has forwarded for a slot.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Forwarded {
    /// Packets.
    pub packets: Word,
    /// Bytes, from the IP header on.
    pub bytes: Word,
}

/// How packets leave, or why they pass. Slots whose packets go the same way share it, so that there are few: a packet meets
/// one that is close.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Way {
    /// Interface index in bits 0–31, longest packet in bits 32–47; packets are redirected there from CPUs whose numbers
    /// are lower than bits 48–63. Without an interface, bits 32–63 are the number of a [`PassReason`] plus 1; 0 is the
    /// way of a free slot.
    pub exit: Word,
    /// The first eight bytes of the frame: the destination, and the beginning of the source.
    pub first: Word,
    /// Bits 0–31: the other four, in memory order. Bit 32: the addresses are to be written.
    pub rest: Word,
    /// Not used: four words are half a cache line.
    pub unused: Word,
}

impl Way {
    /// The index of a free slot's way.
    pub const FREE: u32 = 0;
    /// The addresses are to be written.
    const REWRITES: u64 = 1 << 32;

    /// The [`exit`](Self::exit) of packets that leave.
    #[must_use]
    pub fn exit(device: u32, max_length: u16, cpus: u16) -> u64 {
        u64::from(device) | u64::from(max_length) << 32 | u64::from(cpus) << 48
    }

    /// The exit of packets that pass.
    #[must_use]
    pub fn passing(reason: PassReason) -> u64 {
        (reason as u64 + 1) << 32
    }

    /// The interface index, 0 if packets pass.
    #[inline(always)]
    #[must_use]
    pub fn device(exit: u64) -> u32 {
        exit as u32
    }

    /// The longest packet.
    #[inline(always)]
    #[must_use]
    pub fn max_length(exit: u64) -> u64 {
        exit >> 32 & 0xffff
    }

    /// CPUs with lower numbers may redirect packets to the device.
    #[inline(always)]
    #[must_use]
    pub fn cpus(exit: u64) -> u32 {
        (exit >> 48) as u32
    }

    /// The number of the reason why packets pass; `None` for a free slot.
    #[inline(always)]
    #[must_use]
    pub fn reason(exit: u64) -> Option<u32> {
        ((exit >> 32) as u32).checked_sub(1)
    }

    /// Whether what was read of [`rest`](Self::rest) says that the addresses are to be written.
    #[inline(always)]
    #[must_use]
    pub fn rewrites(rest: u64) -> bool {
        rest & Self::REWRITES != 0
    }

    /// Sets both addresses, destination and source, or none.
    pub fn set_addresses(&self, addresses: Option<([u8; 6], [u8; 6])>) {
        let Some(([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5])) = addresses else {
            self.first.store(0);
            self.rest.store(0);
            return;
        };
        self.first.store(u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]));
        self.rest.store(u64::from(u32::from_ne_bytes([s2, s3, s4, s5])) | Self::REWRITES);
    }

    /// Destination and source, if they are to be written.
    #[must_use]
    pub fn addresses(&self) -> Option<([u8; 6], [u8; 6])> {
        let rest = self.rest.load();
        let [d0, d1, d2, d3, d4, d5, s0, s1] = self.first.load().to_ne_bytes();
        let [s2, s3, s4, s5] = (rest as u32).to_ne_bytes();
        Self::rewrites(rest).then_some(([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]))
    }
}

/// A port. If it can be, it lies at its [`port_position`]; the payload of the [`Value`] that its [`port_key`] is found by is
/// its index anyway.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Port {
    /// Its [`port_key`], 0 if the record is free.
    pub key: Word,
    /// The address that frames must be sent to, as [`address_word`] has it.
    pub address: Word,
    /// The flags below in bits 0–31; in bits 32–63 the device that the kernel would receive packets on.
    pub flags_and_receiver: Word,
    /// Not used: four words are half a cache line.
    pub unused: Word,
}

impl Port {
    /// Forwards IPv4.
    pub const FORWARDS_V4: u64 = 1;
    /// Forwards IPv6.
    pub const FORWARDS_V6: u64 = 2;
    /// Sources must be routed back through the receiver.
    pub const REVERSE_PATH_STRICT: u64 = 4;
    /// Sources must have a route.
    pub const REVERSE_PATH_LOOSE: u64 = 8;
}

/// The bytes that an Ethernet address takes of the eight that begin with it.
pub const ADDRESS_MASK: u64 = address_word([0xff; 6]);

/// An Ethernet address as the first bytes of a word, in memory order. The others are 0.
#[inline(always)]
#[must_use]
pub const fn address_word([m0, m1, m2, m3, m4, m5]: [u8; 6]) -> u64 {
    u64::from_ne_bytes([m0, m1, m2, m3, m4, m5, 0, 0])
}

/// The address that a word begins with.
#[inline(always)]
#[must_use]
pub const fn word_address(word: u64) -> [u8; 6] {
    let [mac @ .., _, _] = word.to_ne_bytes();
    mac
}

/// Interface and VLAN as a number, which is never 0.
#[inline(always)]
#[must_use]
pub const fn port_key(ifindex: u32, vlan: u16) -> u64 {
    1 << 63 | (ifindex as u64) << 16 | vlan as u64
}

/// Where a port lies unless another is there. Interfaces that were made one after the other do not meet.
#[inline(always)]
#[must_use]
pub const fn port_position(ifindex: u32, vlan: u16) -> u32 {
    ifindex.wrapping_add((vlan as u32).wrapping_mul(0x9e5)) & (MAX_PORTS as u32 - 1)
}

/// What is lost after the program has given it away, and what must be known to count it.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Losses {
    /// The id of the device map.
    pub devices: Word,
    /// Where in the kernel's `struct net_device` the interface index lies, in bytes.
    pub ifindex_offset: Word,
    /// Packets that could not be handed to the device.
    pub redirects: Word,
    /// Packets that its driver has not taken.
    pub frames: Word,
}

/// What one CPU has passed, by reason, and what it has asked the kernel.
#[repr(C)]
#[derive(Debug)]
pub struct Passes {
    /// Packets, by [`PassReason`].
    pub packets: [Word; PassReason::COUNT],
    /// Packets that the kernel's routes were asked about.
    pub asked: Word,
    /// When user space was last woken because they did not agree, in nanoseconds of `bpf_ktime_get_coarse_ns`.
    pub woken: Word,
    /// Written by the program's fence; its value means nothing.
    pub scratch: Word,
}

macro_rules! shared {
    ($($type:ty $(, $k:ident)?;)+) => {
        $(
            // SAFETY: `repr(C)` and made of words only, as the definitions above show; valid when zero.
            unsafe impl $(<const $k: usize>)? Zeroable for $type {}
            // SAFETY: likewise.
            unsafe impl $(<const $k: usize>)? Shared for $type {}
        )+
    };
}

shared! {
    Word;
    Control;
    TupleList<K>, K;
    Bucket<K>, K;
    SlotRecord;
    Forwarded;
    Way;
    Port;
    Losses;
    Passes;
}

// Both sides and the maps must agree on sizes; they are part of the committed bytecode.
const _: () = {
    assert!(size_of::<Word>() == 8 && align_of::<Word>() == 8);
    // What a packet meets lies in the first line.
    assert!(size_of::<Control>() == 88 && core::mem::offset_of!(Control, exceptions_v4) == 56);
    assert!(
        size_of::<TupleList<1>>() == 16 + MAX_TUPLES * 24
            && size_of::<TupleList<4>>() == 16 + MAX_TUPLES * 48
    );
    assert!(
        size_of::<TupleList<2>>() == 16 + MAX_TUPLES * 32
            && size_of::<TupleList<5>>() == 16 + MAX_TUPLES * 56
    );
    assert!(size_of::<Bucket<1>>() == 64 && size_of::<Bucket<4>>() == 160);
    assert!(size_of::<Bucket<2>>() == 96 && size_of::<Bucket<5>>() == 192);
    // A list's tuples have different numbers, and a number has 8 bits.
    assert!(LISTS * MAX_TUPLES <= 256);
    assert!(size_of::<SlotRecord>() == 8 && size_of::<Forwarded>() == 16 && size_of::<Way>() == 32);
    assert!(size_of::<Port>() == 32 && MAX_PORTS.is_power_of_two());
    assert!(size_of::<Losses>() == 32);
    assert!(size_of::<Passes>() == (PassReason::COUNT + 3) * 8);
};
