//! Headers as they lie in a frame.
//!
//! Fields are in network order and may lie at any address.

use aya_ebpf::programs::XdpContext;

use crate::PassReason;

/// The type of frames that carry IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// The type of frames that carry IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LENGTH: usize = size_of::<Ethernet>();

/// Ethernet (IEEE 802.3), without tags.
#[repr(C, packed)]
#[allow(missing_docs)]
pub struct Ethernet {
    pub addresses: Addresses,
    pub ether_type: u16,
}

/// Destination and source of an Ethernet header, in two pieces that are read and written at once.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Addresses {
    /// The destination, and the beginning of the source.
    pub first: u64,
    /// What is left of the source.
    pub rest: u32,
}

impl Addresses {
    /// Both as they lie in a frame.
    #[must_use]
    pub const fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (destination, source);
        Self {
            first: u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]),
            rest: u32::from_ne_bytes([s2, s3, s4, s5]),
        }
    }
}

/// What a tag adds to an Ethernet header (IEEE 802.1Q).
#[repr(C, packed)]
#[allow(missing_docs)]
pub struct Vlan {
    pub control: u16,
    pub ether_type: u16,
}

/// IPv4 without options (RFC 791).
#[repr(C, packed)]
#[allow(missing_docs)]
pub struct Ipv4 {
    pub version_and_length: u8,
    pub traffic_class: u8,
    pub total_length: u16,
    pub identification: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

/// IPv6 (RFC 8200).
#[repr(C, packed)]
#[allow(missing_docs)]
pub struct Ipv6 {
    pub version_class_flow: u32,
    pub payload_length: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u64; 2],
    pub destination: [u64; 2],
}

/// The bytes of a frame that lie in one piece.
#[derive(Clone, Copy)]
pub struct Frame {
    /// Where it begins.
    pub start: usize,
    /// Where it ends: behind its last byte.
    pub end: usize,
}

impl Frame {
    /// The frame that a program is run on.
    #[inline(always)]
    #[must_use]
    pub fn of(context: &XdpContext) -> Self {
        Self { start: context.data(), end: context.data_end() }
    }

    /// The header of type `T` that begins `offset` bytes into the frame.
    ///
    /// # Errors
    ///
    /// If not all of it is there.
    #[inline(always)]
    pub fn header<T>(self, offset: usize) -> Result<*mut T, PassReason> {
        let header = self.start + offset;
        if header + size_of::<T>() > self.end {
            return Err(PassReason::Truncated);
        }
        Ok(header as *mut T)
    }
}
