//! What the fields of headers mean.

use fastswan_ebpf::wire::{Frame, Ipv4};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const DCCP: u8 = 33;
const GRE: u8 = 47;
pub(super) const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const MOBILITY: u8 = 135;
const UDP_LITE: u8 = 136;

/// Whether the one's complement sum over the header is right (RFC 1071).
#[inline(always)]
pub(super) fn checksum_is_good(header: *const Ipv4) -> bool {
    let words = header.cast::<u32>();
    let mut sum = 0_u64;
    let mut word = 0;
    while word < size_of::<Ipv4>() / 4 {
        // SAFETY: `header` was bounds-checked by `Frame::header`.
        sum += u64::from(unsafe { words.add(word).read_unaligned() });
        word += 1;
    }
    // From 35 bits to 19, to 17, to 16.
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum == 0xffff
}

/// The checksum after the TTL went down by one (RFC 1624). Of the two ways to write zero it is 0, never
/// 0xffff, as the kernel has it.
#[inline(always)]
pub(super) fn checksum_after_ttl_decrement(checksum: u16) -> u16 {
    let sum = u32::from(checksum) + u32::from(0x0100_u16.to_be());
    (sum + u32::from(sum >= 0xffff)) as u16
}

/// Whether an IPv6 next header is an extension header or anything else that is not the packet's last header.
#[inline(always)]
pub(super) fn is_extension_header(next_header: u8) -> bool {
    // Hop-by-hop, routing, fragment, AH, no next header, destination options, mobility, HIP, Shim6,
    // experiments (RFC 8200, IANA's registry).
    matches!(next_header, 0 | 43 | 44 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254)
}

/// Whether an ICMPv6 type is one of neighbour discovery's (RFC 4861). Where the kernel is a proxy for the destination, it
/// takes these for itself (`ip6_forward_proxy_check`).
#[inline(always)]
pub(super) fn is_neighbour_discovery(icmp_type: u8) -> bool {
    matches!(icmp_type, 133..=137)
}

/// Where the kernel finds what it compares with a selector's ports (`xfrm_flowi_sport`, `xfrm_flowi_dport`).
pub(super) enum Ports {
    /// Source and destination port are the first four bytes.
    Ports,
    /// ICMP type and code are the first two.
    TypeAndCode,
    /// Nowhere: both are 0.
    Zero,
    /// Elsewhere, or not in all kernels.
    Unknown,
}

/// Source and destination port as routing rules see them, in network order; 0 and 0 for protocols that have none
/// (`proto_ports_offset`).
#[inline(always)]
pub(super) fn ports_for_rules(frame: Frame, transport: usize, protocol: u8) -> [u16; 2] {
    if !matches!(protocol, TCP | UDP | UDP_LITE | SCTP | DCCP) {
        return [0, 0];
    }
    match frame.header::<[u16; 2]>(transport) {
        // SAFETY: bounds-checked.
        Ok(ports) => unsafe { ports.read_unaligned() },
        Err(_) => [0, 0],
    }
}

#[inline(always)]
pub(super) fn ports_of(protocol: u8) -> Ports {
    match protocol {
        TCP | UDP | SCTP | UDP_LITE => Ports::Ports,
        ICMP | ICMPV6 => Ports::TypeAndCode,
        DCCP | GRE | MOBILITY => Ports::Unknown,
        _ => Ports::Zero,
    }
}
