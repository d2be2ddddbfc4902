//! Headers as they lie in a frame, and what changes in those of a frame that is forwarded.
//!
//! Fields are in network order and may lie at any address. Addresses are made of words, so that they are written in words:
//! a processor is slow to read a word that has just been written in bytes, and the program under test reads words.

use aya_ebpf::programs::XdpContext;
use fastswan_testkit_ebpf::{NEXT_HOP, PORT};

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;

#[repr(C, packed)]
pub(super) struct Ethernet {
    pub(super) addresses: Addresses,
    pub(super) ether_type: u16,
}

/// Destination and source.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    first: u64,
    rest: u32,
}

impl Addresses {
    pub(super) const fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (destination, source);
        Self {
            first: u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]),
            rest: u32::from_ne_bytes([s2, s3, s4, s5]),
        }
    }
}

#[repr(C, packed)]
pub(super) struct Ipv4 {
    pub(super) version_and_length: u8,
    pub(super) traffic_class: u8,
    pub(super) total_length: u16,
    pub(super) identification: u16,
    pub(super) fragment: u16,
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    pub(super) checksum: u16,
    pub(super) source: u32,
    pub(super) destination: u32,
}

#[repr(C, packed)]
pub(super) struct Ipv6 {
    pub(super) version_class_flow: u32,
    pub(super) payload_length: u16,
    pub(super) next_header: u8,
    pub(super) hop_limit: u8,
    pub(super) source: [u64; 2],
    pub(super) destination: [u64; 2],
}

/// The bytes of a frame that lie in one piece.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    start: usize,
    end: usize,
}

impl Frame {
    #[inline(always)]
    pub(super) fn of(context: &XdpContext) -> Self {
        Self { start: context.data(), end: context.data_end() }
    }

    /// The header of type `T` that begins `offset` bytes into the frame, if all of it is there.
    #[inline(always)]
    pub(super) fn header<T>(self, offset: usize) -> Option<*mut T> {
        let header = self.start + offset;
        if header + size_of::<T>() > self.end {
            return None;
        }
        Some(header as *mut T)
    }

    /// Bytes behind the Ethernet header.
    #[inline(always)]
    pub(super) fn packet_length(self) -> usize {
        self.end - self.start - size_of::<Ethernet>()
    }
}

/// Takes 1 off the TTL and has the checksum follow (RFC 1624), unless the packet has lived long enough. The header is
/// one that [`Frame::header`] gave.
#[inline(always)]
pub(super) fn forward_v4(ip: *mut Ipv4) -> Option<()> {
    // SAFETY: bounds-checked; fields of packed structures are read byte for byte if need be.
    unsafe {
        if (*ip).ttl <= 1 {
            return None;
        }
        (*ip).ttl -= 1;
        let sum = u32::from((*ip).checksum) + u32::from(0x0100_u16.to_be());
        (*ip).checksum = (sum + u32::from(sum >= 0xffff)) as u16;
    }
    Some(())
}

/// Takes 1 off the hop limit.
#[inline(always)]
pub(super) fn forward_v6(ip: *mut Ipv6) -> Option<()> {
    // SAFETY: bounds-checked.
    unsafe {
        if (*ip).hop_limit <= 1 {
            return None;
        }
        (*ip).hop_limit -= 1;
    }
    Some(())
}

/// Writes the Ethernet addresses that a forwarded frame leaves with.
#[inline(always)]
pub(super) fn address(frame: Frame) -> Option<()> {
    let ethernet = frame.header::<Ethernet>(0)?;
    write_addresses(ethernet, const { Addresses::new(NEXT_HOP, PORT) });
    Some(())
}

/// Writes the addresses of a header that [`Frame::header`] gave.
#[inline(always)]
pub(super) fn write_addresses(header: *mut Ethernet, addresses: Addresses) {
    // SAFETY: bounds-checked. Word by word: the compiler copies the whole byte by byte.
    unsafe {
        (*header).addresses.first = addresses.first;
        (*header).addresses.rest = addresses.rest;
    }
}

/// Reads an address of IPv6, word by word.
///
/// # Safety
///
/// The pointer is one into a header that [`Frame::header`] gave.
#[inline(always)]
pub(super) unsafe fn address_v6(address: *const [u64; 2]) -> [u64; 2] {
    let words = address.cast::<u64>();
    // SAFETY: the caller says so.
    unsafe { [words.read_unaligned(), words.add(1).read_unaligned()] }
}

/// Writes one.
///
/// # Safety
///
/// Likewise.
#[inline(always)]
pub(super) unsafe fn write_address_v6(address: *mut [u64; 2], [first, second]: [u64; 2]) {
    let words = address.cast::<u64>();
    // SAFETY: the caller says so.
    unsafe {
        words.write_unaligned(first);
        words.add(1).write_unaligned(second);
    }
}
