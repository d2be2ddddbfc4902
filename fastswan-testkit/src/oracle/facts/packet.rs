//! Packets near the borders of what was changed, and of the policies.

use std::net::IpAddr;

use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};

use super::{aims::Aims, draw::Draw, tunnels::Tunnel, world::Device};
use crate::{
    frames::Frame,
    oracle::{
        addresses::{SENDER, SPECIAL_V4, SPECIAL_V6},
        packets::border,
    },
};

pub(super) const ETHERNET: usize = 14;
/// What tells the packets of this judge from all others; a number follows.
const MARK: [u8; 4] = *b"fsfj";
/// Bytes of the mark and the number.
const MARKED: usize = 8;

/// A packet that arrives at a port.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) tos: u8,
    pub(super) port: Device,
    /// In bytes, from the IP header on.
    pub(super) length: usize,
    pub(super) frame: Vec<u8>,
    /// Nothing but its addresses, type of service and length keeps it from being fast.
    pub(super) is_plain: bool,
    /// Where its mark is.
    mark: usize,
}

impl Packet {
    pub(super) fn random(tunnels: &[Tunnel], aims: &Aims, rng: &mut StdRng) -> Self {
        let tunnel = tunnels.choose(rng).expect("there are tunnels");
        let v6 = tunnel.is_v6();
        let near = |nets: &[IpNet], rng: &mut StdRng| {
            let nets: Vec<IpNet> = nets.iter().copied().filter(|net| net.addr().is_ipv6() == v6).collect();
            nets.choose(rng).map(|net| border(*net, rng))
        };
        let special = |rng: &mut StdRng| {
            let special = if v6 { SPECIAL_V6.choose(rng) } else { SPECIAL_V4.choose(rng) };
            special.and_then(|text| text.parse().ok())
        };
        let usual = |prefix: IpNet, networks: [&str; 4], rng: &mut StdRng| {
            let prefix = if prefix.prefix_len() > 0 {
                prefix
            } else {
                networks.choose(rng).and_then(|text| text.parse().ok()).unwrap_or(prefix)
            };
            // Most hosts have addresses that nothing is special about.
            if rng.random_bool(0.15) { border(prefix, rng) } else { Draw { rng, tunnels }.address(prefix) }
        };
        let destination = match rng.random_range(0..100) {
            0..60 => near(&aims.destinations, rng),
            60..63 => special(rng),
            _ => None,
        };
        let destination = destination.unwrap_or_else(|| {
            let far = ["10.2.0.0/16", "10.9.0.0/16", "172.16.0.0/12", "203.0.113.0/24"];
            let far_v6 = ["2001:db8:2::/48", "2001:db8:9::/48", "2001:db8:10::/44", "2000::/3"];
            usual(tunnel.destination, if v6 { far_v6 } else { far }, rng)
        });
        let source = match rng.random_range(0..100) {
            0..30 => near(&aims.sources, rng),
            30..32 => special(rng),
            _ => None,
        };
        let source = source.unwrap_or_else(|| {
            let near = ["10.1.0.0/16", "10.7.0.0/16", "10.1.0.0/16", "203.0.113.0/24"];
            let near_v6 = ["2001:db8:1::/48", "2001:db8:7::/48", "2001:db8:1::/48", "2001:db8:9::/48"];
            usual(tunnel.source, if v6 { near_v6 } else { near }, rng)
        });
        let port = if rng.random_bool(0.75) { Device::Lan0 } else { Device::Lan1 };
        let tos = match rng.random_range(0..10) {
            0..3 => aims.tos.choose(rng).copied().unwrap_or(0),
            3 => *[0x02, 0x04, 0x08, 0x10, 0x1c, 0x20, 0xb8].choose(rng).expect("some"),
            _ => 0,
        };
        let length = match rng.random_range(0..10) {
            0..3 => aims.lengths.choose(rng).copied(),
            3 => [1279, 1280, 1281, 1399, 1400, 1401, 1425, 1446, 1447, 1500].choose(rng).copied(),
            _ => None,
        };
        let length = length.unwrap_or_else(|| rng.random_range(64..120));
        let of_port = |rng: &mut StdRng| {
            if rng.random_bool(0.5) { aims.ports.choose(rng).copied() } else { None }
                .unwrap_or_else(|| rng.random())
        };
        let upper = if aims.solicitations && v6 && rng.random() {
            Upper::Icmp(135)
        } else {
            match rng.random_range(0..10) {
                0..6 => Upper::Udp(of_port(rng), of_port(rng)),
                6..9 => Upper::Tcp(of_port(rng), of_port(rng)),
                _ => Upper::Icmp(if v6 { 128 } else { 8 }),
            }
        };
        let (ttl, own_mac) = match rng.random_range(0..100) {
            0 => (1, true),
            1 => (64, false),
            _ => (if matches!(upper, Upper::Icmp(135)) { 255 } else { 64 }, true),
        };
        Self::new((source, destination), port, tos, length, upper, ttl, own_mac)
    }

    fn new(
        (source, destination): (IpAddr, IpAddr),
        port: Device,
        tos: u8,
        length: usize,
        upper: Upper,
        ttl: u8,
        own_mac: bool,
    ) -> Self {
        let texts = (source.to_string(), destination.to_string());
        let (frame, header) = if source.is_ipv4() {
            (Frame::v4(&texts.0, &texts.1), 20)
        } else {
            (Frame::v6(&texts.0, &texts.1), 40)
        };
        let (frame, upper_header) = match upper {
            Upper::Udp(from, to) => (frame.udp(from, to), 8),
            Upper::Tcp(from, to) => (frame.tcp(from, to), 20),
            Upper::Icmp(kind) => (frame.icmp(kind, 0), 8),
        };
        let payload = length.saturating_sub(header + upper_header).max(MARKED);
        let destination_mac = if own_mac { port.mac() } else { SENDER };
        let frame = frame.macs(SENDER, destination_mac).tos(tos).ttl(ttl).payload(payload).build();
        let is_solicitation = matches!(upper, Upper::Icmp(133..=137)) && source.is_ipv6();
        Self {
            source,
            destination,
            tos,
            port,
            length: frame.len() - ETHERNET,
            is_plain: ttl > 1 && own_mac && !is_solicitation,
            mark: frame.len() - payload,
            frame,
        }
    }

    /// Its protocol, or next header.
    pub(super) fn protocol(&self) -> u8 {
        self.frame[ETHERNET + if self.source.is_ipv4() { 9 } else { 6 }]
    }

    /// Gives it a number by which it is known again.
    pub(super) fn number(&mut self, number: u32) {
        self.frame[self.mark..self.mark + MARKED].copy_from_slice(&mark(number));
    }

    /// Whether a frame with its number at some place is what becomes of it on its way through a router, whole.
    pub(super) fn is_forwarded_as(&self, frame: &[u8], at: usize) -> bool {
        let changing: &[usize] = if self.source.is_ipv4() { &[8, 10, 11] } else { &[7] };
        let (sent, seen) = (&self.frame[ETHERNET..], frame.get(ETHERNET..).unwrap_or_default());
        at == self.mark
            && seen.len() == sent.len()
            && (0..seen.len()).all(|at| changing.contains(&at) || sent[at] == seen[at])
    }
}

/// What packets are known again by.
pub(super) fn mark(number: u32) -> [u8; MARKED] {
    let mut mark = [0; MARKED];
    mark[..MARK.len()].copy_from_slice(&MARK);
    mark[MARK.len()..].copy_from_slice(&number.to_be_bytes());
    mark
}

/// The number in a frame, and where it is.
pub(super) fn number_in(frame: &[u8]) -> Option<(u32, usize)> {
    let at = frame.windows(MARK.len()).position(|window| window == MARK)?;
    let number = frame.get(at + MARK.len()..)?.first_chunk()?;
    Some((u32::from_be_bytes(*number), at))
}

#[derive(Clone, Copy, Debug)]
enum Upper {
    Udp(u16, u16),
    Tcp(u16, u16),
    /// An ICMP type.
    Icmp(u8),
}
