//! Messages by which routers tell the host something.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, Ipv4Header, Ipv6Header};
use fastswan::policy::MacAddr;
use ipnet::IpNet;

const ROUTER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xb5]);

/// A router advertisement (RFC 4861 section 4.2) with an MTU and a prefix on the link.
pub(super) fn advertisement(
    router: Ipv6Addr,
    to: MacAddr,
    mtu: Option<u32>,
    prefix: Option<IpNet>,
    lifetime: u16,
) -> Vec<u8> {
    const ON_LINK: u8 = 0x80;
    // Hop limit, flags, lifetime; the rest of the fixed part is times that are not told.
    let hop_limit_and_flags = [64, 0];
    let [high, low] = lifetime.to_be_bytes();
    let mut body = vec![0; 8];
    if let Some(mtu) = mtu {
        body.extend([5, 1, 0, 0]);
        body.extend(mtu.to_be_bytes());
    }
    if let Some(IpNet::V6(prefix)) = prefix {
        let seconds = 1_u32.to_be_bytes();
        body.extend([3, 4, prefix.prefix_len(), ON_LINK]);
        body.extend(seconds);
        body.extend(seconds);
        body.extend([0; 4]);
        body.extend(prefix.network().octets());
    }
    let [hop_limit, flags] = hop_limit_and_flags;
    let message = Icmpv6Type::Unknown { type_u8: 134, code_u8: 0, bytes5to8: [hop_limit, flags, high, low] };
    v6(router, "ff02::1".parse().expect("an address"), to, 255, message, &body)
}

/// A router tells that packets from the host to an address must be shorter (RFC 1191, RFC 4443 section 3.2). It
/// quotes an echo request, or for IPv4 a reply, which the kernel's own handler takes (`icmp_err`).
pub(super) fn too_big(destination: IpAddr, own: IpAddr, to: MacAddr, mtu: u16) -> Vec<u8> {
    match (destination, own) {
        (IpAddr::V4(destination), IpAddr::V4(own)) => {
            let echo = Icmpv4Header::with_checksum(
                Icmpv4Type::Unknown { type_u8: 0, code_u8: 0, bytes5to8: [0, 1, 0, 1] },
                &[],
            );
            let mut quoted = v4_header(own, destination, 1400, 64).to_bytes().to_vec();
            quoted.extend(echo.to_bytes());
            let [high, low] = mtu.to_be_bytes();
            let message = Icmpv4Type::Unknown { type_u8: 3, code_u8: 4, bytes5to8: [0, 0, high, low] };
            let icmp = Icmpv4Header::with_checksum(message, &quoted).to_bytes().to_vec();
            let upper = [icmp, quoted].concat();
            let length = u16::try_from(upper.len()).unwrap_or(0);
            let header = v4_header(Ipv4Addr::new(192, 0, 2, 2), own, length, 64).to_bytes().to_vec();
            [ethernet(to, 0x0800), header, upper].concat()
        }
        (IpAddr::V6(destination), IpAddr::V6(own)) => {
            let message = Icmpv6Type::Unknown { type_u8: 128, code_u8: 0, bytes5to8: [0, 1, 0, 1] };
            let quoted = packet_v6(own, destination, 64, message, &[0; 64]);
            let message =
                Icmpv6Type::Unknown { type_u8: 2, code_u8: 0, bytes5to8: u32::from(mtu).to_be_bytes() };
            let router = "2001:db8:f::2".parse().expect("an address");
            v6(router, own, to, 64, message, &quoted)
        }
        _ => Vec::new(),
    }
}

fn ethernet(to: MacAddr, ether_type: u16) -> Vec<u8> {
    [&to.0[..], &ROUTER.0, &ether_type.to_be_bytes()].concat()
}

fn v4_header(source: Ipv4Addr, destination: Ipv4Addr, payload: u16, ttl: u8) -> Ipv4Header {
    let header = Ipv4Header::new(payload, ttl, IpNumber::ICMP, source.octets(), destination.octets());
    let mut header = header.expect("a short packet");
    header.dont_fragment = true;
    header.header_checksum = header.calc_header_checksum();
    header
}

fn v6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    to: MacAddr,
    hop_limit: u8,
    message: Icmpv6Type,
    body: &[u8],
) -> Vec<u8> {
    [ethernet(to, 0x86dd), packet_v6(source, destination, hop_limit, message, body)].concat()
}

fn packet_v6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    hop_limit: u8,
    message: Icmpv6Type,
    body: &[u8],
) -> Vec<u8> {
    let (source, destination) = (source.octets(), destination.octets());
    let icmp = Icmpv6Header::with_checksum(message, source, destination, body).expect("a short packet");
    let header = Ipv6Header {
        payload_length: u16::try_from(8 + body.len()).unwrap_or(0),
        next_header: IpNumber::IPV6_ICMP,
        hop_limit,
        source,
        destination,
        ..Ipv6Header::default()
    };
    [&header.to_bytes()[..], &icmp.to_bytes(), body].concat()
}
