//! Packets near the borders of what policies are about.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastswan::{
    Policy, Selector,
    policy::{Direction, Family},
};
use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};

use super::addresses::{PORT, SENDER, SPECIAL_V4, SPECIAL_V6, place};
use crate::frames::Frame;

const ETHERNET_LENGTH: usize = 14;

/// A packet, as a frame and as policies see it.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    /// Or ICMP type and code; 0 if there are none.
    pub(super) ports: (u16, u16),
    pub(super) frame: Vec<u8>,
    /// Nothing about it but its addresses, protocol and ports keeps it from being fast.
    pub(super) plain: bool,
}

impl Packet {
    /// A packet that one of the policies is nearly, or exactly, about.
    pub(super) fn near(policies: &[Policy], rng: &mut StdRng) -> Self {
        let outbound = |policy: &&Policy| policy.id.direction == Direction::Out;
        let aim = policies.choose(rng);
        let aim = aim.filter(outbound).or_else(|| policies.choose(rng)).map_or_else(
            || {
                let everything = place(rng.random(), 0, 0, 0, 0);
                Selector::between(everything, everything).expect("prefixes of one family")
            },
            |policy| policy.id.selector,
        );
        let source = address(aim.source, policies, rng);
        let mut destination = address(aim.destination, policies, rng);
        if destination == source {
            // If it were the gateway's own, the gateway's answer would look the same.
            destination = address_of(bits(destination) ^ 1, destination.is_ipv4());
        }
        let protocol = protocol(&aim, rng);
        let ports = (port(aim.source_port.port, rng), port(aim.destination_port.port, rng));
        Self::new(source, destination, protocol, ports, rng)
    }

    /// A UDP packet with nothing special about it.
    pub(super) fn plain(source: &str, destination: &str) -> Self {
        let address = |text: &str| text.parse().expect("an address");
        let frame = Frame::v4(source, destination).udp(7, 7).macs(SENDER, PORT).payload(16).build();
        Self {
            source: address(source),
            destination: address(destination),
            protocol: 17,
            ports: (7, 7),
            frame,
            plain: true,
        }
    }

    fn new(source: IpAddr, destination: IpAddr, protocol: u8, ports: (u16, u16), rng: &mut StdRng) -> Self {
        let v4 = source.is_ipv4();
        let texts = (source.to_string(), destination.to_string());
        let frame = if v4 { Frame::v4(&texts.0, &texts.1) } else { Frame::v6(&texts.0, &texts.1) };
        let type_and_code = (ports.0 & 0xff, ports.1 & 0xff);
        let (mut frame, mut ports) = match protocol {
            17 => (frame.udp(ports.0, ports.1), ports),
            6 => (frame.tcp(ports.0, ports.1), ports),
            1 | 58 if v4 == (protocol == 1) => {
                let [kind, code] =
                    [type_and_code.0, type_and_code.1].map(|byte| u8::try_from(byte).unwrap_or(0));
                (frame.icmp(kind, code), type_and_code)
            }
            // The payload is where ports would be.
            _ => (frame.protocol(protocol), if protocol == 132 { (0x0001, 0x0203) } else { (0, 0) }),
        };
        let mut payload = rng.random_range(8..40);
        let mut ttl = 64;
        let mut plain = !is_special(source) && !is_special(destination);
        let mut macs = (SENDER, PORT);
        match rng.random_range(0..100) {
            0..3 => {
                let (offset, more) = *[(0, true), (5, true), (5, false)].choose(rng).expect("fragments");
                frame = frame.fragment(offset, more);
                // To the kernel, the first fragment has none either.
                ports = (0, 0);
                plain = false;
            }
            3 => (ttl, plain) = (rng.random_range(0..2), false),
            4 => (payload, plain) = (rng.random_range(1380..1440), false),
            5 if v4 => (frame, plain) = (frame.ip_options(&[1, 1, 1, 0]), false),
            5 => (frame, plain) = (frame.hop_by_hop(), false),
            6 if rng.random() => (macs.1, plain) = (SENDER, false),
            6 if v4 => (frame, plain) = (frame.wrong_checksum(), false),
            7 => frame = frame.padding(rng.random_range(1..20)),
            _ => {}
        }
        let frame = frame.macs(macs.0, macs.1).ttl(ttl).payload(payload).build();
        Self { source, destination, protocol, ports, frame, plain }
    }

    /// Whether a selector is about it.
    pub(super) fn matches(&self, selector: &Selector) -> bool {
        selector.source.contains(&self.source)
            && selector.destination.contains(&self.destination)
            && (selector.protocol == 0 || selector.protocol == self.protocol)
            && selector.source_port.matches(self.ports.0)
            && selector.destination_port.matches(self.ports.1)
    }

    /// Whether a frame is what becomes of it on its way through a router.
    pub(super) fn is_forwarded_as(&self, frame: &[u8]) -> bool {
        let changing: &[usize] = if self.source.is_ipv4() { &[8, 10, 11] } else { &[7] };
        let (Some(sent), Some(seen)) = (self.frame.get(ETHERNET_LENGTH..), frame.get(ETHERNET_LENGTH..))
        else {
            return false;
        };
        // Ethernet padding is not forwarded.
        !seen.is_empty()
            && seen.len() <= sent.len()
            && (0..seen.len()).all(|at| changing.contains(&at) || sent[at] == seen[at])
    }
}

/// Whether an address is one that hosts do not forward from or to, or seldom: the fast path leaves those to the
/// kernel without asking (RFC 6890, RFC 4291).
pub(super) fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let first = address.octets()[0];
            matches!(first, 0 | 127 | 224..) || address.is_link_local()
        }
        IpAddr::V6(address) => {
            let embeds_v4 = matches!(address.segments(), [0, 0, 0, 0, 0, 0 | 0xffff, ..]);
            let local = matches!(address.segments()[0], 0xfe80..=0xfeff);
            embeds_v4 || local || address.is_multicast()
        }
    }
}

/// An address at a border of a prefix, or inside, or somewhere else.
fn address(prefix: IpNet, policies: &[Policy], rng: &mut StdRng) -> IpAddr {
    let family = Family::of(&prefix);
    if rng.random_bool(0.02) {
        return match family {
            Family::V4 => SPECIAL_V4.choose(rng).and_then(|text| text.parse().ok()),
            Family::V6 => SPECIAL_V6.choose(rng).and_then(|text| text.parse().ok()),
        }
        .unwrap_or(prefix.addr());
    }
    let short = if family == Family::V4 { 16 } else { 48 };
    let somewhere_else = if prefix.prefix_len() < short { 0.8 } else { 0.1 };
    if rng.random_bool(somewhere_else)
        && let Some(other) = policies.choose(rng)
        && other.id.selector.family() == family
    {
        let selector = &other.id.selector;
        let other = if rng.random() { selector.source } else { selector.destination };
        return border(other, rng);
    }
    border(prefix, rng)
}

/// An address at a border of a prefix, inside of it or beside it.
pub(super) fn border(prefix: IpNet, rng: &mut StdRng) -> IpAddr {
    let (first, last) = (bits(prefix.network()), bits(prefix.broadcast()));
    let inside = || first.checked_add(1);
    let chosen = match rng.random_range(0..16) {
        0 => first.wrapping_sub(1),
        1 => last.wrapping_add(1),
        2 | 3 => first,
        4 | 5 => last,
        6..9 => inside().filter(|second| *second <= last).unwrap_or(first),
        // Where narrower prefixes are likely to be.
        9..12 => first | rng.random_range(0..16) & (last - first),
        _ => first | rng.random::<u128>() & (last - first),
    };
    address_of(chosen, prefix.addr().is_ipv4())
}

fn address_of(bits: u128, v4: bool) -> IpAddr {
    match u32::try_from(bits & u128::from(u32::MAX)) {
        Ok(bits) if v4 => Ipv4Addr::from(bits).into(),
        _ => Ipv6Addr::from(bits).into(),
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn protocol(aim: &Selector, rng: &mut StdRng) -> u8 {
    let icmp = if aim.destination.addr().is_ipv4() { 1 } else { 58 };
    match aim.protocol {
        0 => *[17, 17, 17, 6, 6, icmp, 50, 47, 132].choose(rng).expect("protocols"),
        named if rng.random_bool(0.8) => named,
        _ => *[17, 6, icmp].choose(rng).expect("protocols"),
    }
}

/// A port that a policy names, or one beside it.
fn port(named: u16, rng: &mut StdRng) -> u16 {
    match rng.random_range(0..10) {
        0..5 => named,
        5 => named.wrapping_add(1),
        6 => named.wrapping_sub(1),
        7 => *[500, 4500, 443, 22, 8, 128, 0x1142].choose(rng).expect("ports"),
        _ => rng.random(),
    }
}
