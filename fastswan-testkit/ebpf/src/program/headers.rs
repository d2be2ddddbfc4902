//! What changes in the headers of a frame that is forwarded.
//!
//! Addresses are made of words, so that they are written in words: a processor is slow to read a word that has just been
//! written in bytes, and the program under test reads words.

use fastswan_ebpf::wire::{Addresses, Ethernet, Frame, Ipv4, Ipv6};
use fastswan_testkit_ebpf::{NEXT_HOP, PORT};

/// Bytes behind the Ethernet header.
#[inline(always)]
pub(super) fn packet_length(frame: Frame) -> usize {
    frame.end - frame.start - size_of::<Ethernet>()
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
    let ethernet = frame.header::<Ethernet>(0).ok()?;
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
