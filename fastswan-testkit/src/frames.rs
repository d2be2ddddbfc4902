//! Ethernet frames to try things with, built with `etherparse`.
//!
//! A frame is right in every field that the story does not make wrong: lengths and checksums follow from the
//! rest.
//!
//! ```
//! use fastswan_testkit::frames::Frame;
//!
//! let frame = Frame::v4("10.1.0.5", "10.2.0.9").udp(1000, 2000).payload(100).ttl(2).padding(18).build();
//! assert_eq!(frame.len(), 14 + 20 + 8 + 100 + 18);
//! ```

use std::net::IpAddr;

use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpDscp, IpEcn,
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6FragmentHeader, Ipv6Header, SingleVlanHeader,
    TcpHeader, UdpHeader, VlanId,
};
use fastswan::policy::MacAddr;

/// An IEEE 802.1Q or 802.1ad tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    ether_type: EtherType,
    id: u16,
}

impl Tag {
    /// A customer tag (`0x8100`); 0 is a priority tag.
    #[must_use]
    pub fn vlan(id: u16) -> Self {
        Self { ether_type: EtherType::VLAN_TAGGED_FRAME, id }
    }

    /// A service tag (`0x88a8`).
    #[must_use]
    pub fn service(id: u16) -> Self {
        Self { ether_type: EtherType::PROVIDER_BRIDGING, id }
    }
}

/// A frame that is being described.
#[derive(Clone, Debug)]
pub struct Frame {
    source: IpAddr,
    destination: IpAddr,
    macs: (MacAddr, MacAddr),
    tags: Vec<Tag>,
    ether_type: Option<u16>,
    ttl: u8,
    tos: u8,
    upper: Upper,
    payload: usize,
    options: Vec<u8>,
    fragment: Option<(u16, bool)>,
    extension: Option<IpNumber>,
    total_length: Option<u16>,
    wrong_checksum: bool,
    padding: usize,
    truncated: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Upper {
    Udp(u16, u16),
    Tcp(u16, u16),
    Icmp(u8, u8),
    Other(u8),
}

impl Frame {
    /// An IPv4 packet.
    ///
    /// # Panics
    ///
    /// If an address is none.
    #[must_use]
    pub fn v4(source: &str, destination: &str) -> Self {
        Self::between(source, destination)
    }

    /// An IPv6 packet.
    ///
    /// # Panics
    ///
    /// If an address is none.
    #[must_use]
    pub fn v6(source: &str, destination: &str) -> Self {
        Self::between(source, destination)
    }

    fn between(source: &str, destination: &str) -> Self {
        let address = |text: &str| text.parse().unwrap_or_else(|_| panic!("{text} is not an address"));
        Self {
            source: address(source),
            destination: address(destination),
            macs: (MacAddr([2, 0, 0, 0, 0, 0xaa]), MacAddr([2, 0, 0, 0, 0, 1])),
            tags: Vec::new(),
            ether_type: None,
            ttl: 64,
            tos: 0,
            upper: Upper::Udp(1000, 2000),
            payload: 0,
            options: Vec::new(),
            fragment: None,
            extension: None,
            total_length: None,
            wrong_checksum: false,
            padding: 0,
            truncated: None,
        }
    }

    /// Ethernet addresses.
    #[must_use]
    pub fn macs(mut self, source: MacAddr, destination: MacAddr) -> Self {
        self.macs = (source, destination);
        self
    }

    /// VLAN tags, outermost first.
    #[must_use]
    pub fn tags(mut self, tags: &[Tag]) -> Self {
        self.tags = tags.to_vec();
        self
    }

    /// The type in the Ethernet header, or in the last tag, whatever follows.
    #[must_use]
    pub fn ether_type(mut self, ether_type: u16) -> Self {
        self.ether_type = Some(ether_type);
        self
    }

    /// TTL or hop limit.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// Type of service or traffic class: all eight bits.
    #[must_use]
    pub fn tos(mut self, tos: u8) -> Self {
        self.tos = tos;
        self
    }

    /// UDP with these ports.
    #[must_use]
    pub fn udp(mut self, source: u16, destination: u16) -> Self {
        self.upper = Upper::Udp(source, destination);
        self
    }

    /// A TCP segment with these ports.
    #[must_use]
    pub fn tcp(mut self, source: u16, destination: u16) -> Self {
        self.upper = Upper::Tcp(source, destination);
        self
    }

    /// ICMP or ICMPv6 with this type and code.
    #[must_use]
    pub fn icmp(mut self, kind: u8, code: u8) -> Self {
        self.upper = Upper::Icmp(kind, code);
        self
    }

    /// Another protocol, with nothing but the payload behind the IP header.
    #[must_use]
    pub fn protocol(mut self, protocol: u8) -> Self {
        self.upper = Upper::Other(protocol);
        self
    }

    /// Bytes behind the last header.
    #[must_use]
    pub fn payload(mut self, bytes: usize) -> Self {
        self.payload = bytes;
        self
    }

    /// IPv4 options: a multiple of 4 bytes, at most 40.
    #[must_use]
    pub fn ip_options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// A fragment at an offset, in units of 8 bytes.
    #[must_use]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some((offset, more));
        self
    }

    /// An IPv6 hop-by-hop header.
    #[must_use]
    pub fn hop_by_hop(mut self) -> Self {
        self.extension = Some(IpNumber::IPV6_HEADER_HOP_BY_HOP);
        self
    }

    /// An IPv6 header of destination options.
    #[must_use]
    pub fn destination_options(mut self) -> Self {
        self.extension = Some(IpNumber::IPV6_DESTINATION_OPTIONS);
        self
    }

    /// A length field that says this (for IPv6: this less 40), whatever the packet has.
    #[must_use]
    pub fn total_length(mut self, length: u16) -> Self {
        self.total_length = Some(length);
        self
    }

    /// An IPv4 header checksum that is wrong.
    #[must_use]
    pub fn wrong_checksum(mut self) -> Self {
        self.wrong_checksum = true;
        self
    }

    /// Bytes of Ethernet padding behind the packet.
    #[must_use]
    pub fn padding(mut self, bytes: usize) -> Self {
        self.padding = bytes;
        self
    }

    /// Only the first bytes of the frame.
    #[must_use]
    pub fn truncated(mut self, bytes: usize) -> Self {
        self.truncated = Some(bytes);
        self
    }

    /// The frame.
    ///
    /// # Panics
    ///
    /// If a description is impossible: addresses of two families, options of a wrong length, a payload
    /// longer than a packet.
    #[must_use]
    pub fn build(self) -> Vec<u8> {
        let mut frame = self.ethernet();
        frame.extend(self.packet());
        frame.extend(std::iter::repeat_n(0xee, self.padding));
        if let Some(length) = self.truncated {
            frame.truncate(length);
        }
        frame
    }

    fn ethernet(&self) -> Vec<u8> {
        let network = if self.source.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        let last = self.ether_type.map_or(network, EtherType);
        let mut types: Vec<EtherType> = self.tags.iter().map(|tag| tag.ether_type).collect();
        types.push(last);
        let (source, destination) = self.macs;
        let header = Ethernet2Header { source: source.0, destination: destination.0, ether_type: types[0] };
        let mut bytes = header.to_bytes().to_vec();
        for (tag, ether_type) in self.tags.iter().zip(&types[1..]) {
            let vlan_id = VlanId::try_new(tag.id).expect("a VLAN id has 12 bits");
            let tag = SingleVlanHeader { vlan_id, ether_type: *ether_type, ..SingleVlanHeader::default() };
            bytes.extend(tag.to_bytes());
        }
        bytes
    }

    fn packet(&self) -> Vec<u8> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let upper = self.upper_layer();
                let length = u16::try_from(upper.len()).expect("a packet has at most 65,535 bytes");
                let mut header = Ipv4Header::new(
                    length,
                    self.ttl,
                    self.protocol_number(),
                    source.octets(),
                    destination.octets(),
                )
                .expect("a packet has at most 65,535 bytes");
                (header.dscp, header.ecn) = split(self.tos);
                header.options = self.options[..].try_into().expect("options of a right length");
                header.total_len += u16::try_from(self.options.len()).expect("few options");
                header.dont_fragment = self.fragment.is_none();
                if let Some((offset, more)) = self.fragment {
                    header.fragment_offset = IpFragOffset::try_new(offset).expect("an offset has 13 bits");
                    header.more_fragments = more;
                }
                if let Some(length) = self.total_length {
                    header.total_len = length;
                }
                header.header_checksum = header.calc_header_checksum();
                if self.wrong_checksum {
                    header.header_checksum ^= 0x0100;
                }
                [header.to_bytes().to_vec(), upper].concat()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let (next_header, upper) = self.with_extension_headers(self.upper_layer());
                let length = u16::try_from(upper.len()).expect("a packet has at most 65,535 bytes");
                let header = Ipv6Header {
                    traffic_class: self.tos,
                    flow_label: Ipv6FlowLabel::default(),
                    payload_length: self.total_length.map_or(length, |length| length.saturating_sub(40)),
                    next_header,
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                [header.to_bytes().to_vec(), upper].concat()
            }
            _ => panic!("{} and {} are of different families", self.source, self.destination),
        }
    }

    fn with_extension_headers(&self, upper: Vec<u8>) -> (IpNumber, Vec<u8>) {
        let last = self.protocol_number();
        if let Some((offset, more)) = self.fragment {
            let offset = IpFragOffset::try_new(offset).expect("an offset has 13 bits");
            let header = Ipv6FragmentHeader::new(last, offset, more, 1);
            return (IpNumber::IPV6_FRAGMENTATION_HEADER, [header.to_bytes().to_vec(), upper].concat());
        }
        match self.extension {
            // 8 bytes: next header, length 0, a PadN option that fills the rest (RFC 8200 section 4.2).
            Some(number) => (number, [vec![last.0, 0, 1, 4, 0, 0, 0, 0], upper].concat()),
            None => (last, upper),
        }
    }

    fn protocol_number(&self) -> IpNumber {
        match self.upper {
            Upper::Udp(..) => IpNumber::UDP,
            Upper::Tcp(..) => IpNumber::TCP,
            Upper::Icmp(..) if self.source.is_ipv4() => IpNumber::ICMP,
            Upper::Icmp(..) => IpNumber::IPV6_ICMP,
            Upper::Other(number) => IpNumber(number),
        }
    }

    fn upper_layer(&self) -> Vec<u8> {
        let payload: Vec<u8> = (0..=u8::MAX).cycle().take(self.payload).collect();
        let header = match (self.upper, self.source, self.destination) {
            (Upper::Udp(from, to), IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = udp(from, to, payload.len());
                let checksum = header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), &payload);
                header.checksum = checksum.expect("a packet has at most 65,535 bytes");
                header.to_bytes().to_vec()
            }
            (Upper::Udp(from, to), IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut header = udp(from, to, payload.len());
                let checksum = header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), &payload);
                header.checksum = checksum.expect("a packet has at most 65,535 bytes");
                header.to_bytes().to_vec()
            }
            (Upper::Tcp(from, to), source, destination) => {
                let mut header = TcpHeader::new(from, to, 1, 64_000);
                let checksum = match (source, destination) {
                    (IpAddr::V4(source), IpAddr::V4(destination)) => {
                        header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), &payload)
                    }
                    (IpAddr::V6(source), IpAddr::V6(destination)) => {
                        header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), &payload)
                    }
                    _ => panic!("{source} and {destination} are of different families"),
                };
                header.checksum = checksum.expect("a packet has at most 65,535 bytes");
                header.to_bytes().to_vec()
            }
            (Upper::Icmp(kind, code), IpAddr::V4(_), _) => {
                let unknown = Icmpv4Type::Unknown { type_u8: kind, code_u8: code, bytes5to8: [0, 1, 0, 1] };
                Icmpv4Header::with_checksum(unknown, &payload).to_bytes().to_vec()
            }
            (Upper::Icmp(kind, code), IpAddr::V6(source), IpAddr::V6(destination)) => {
                let unknown = Icmpv6Type::Unknown { type_u8: kind, code_u8: code, bytes5to8: [0, 1, 0, 1] };
                Icmpv6Header::with_checksum(unknown, source.octets(), destination.octets(), &payload)
                    .expect("a packet has at most 65,535 bytes")
                    .to_bytes()
                    .to_vec()
            }
            (Upper::Other(_), ..) => Vec::new(),
            (_, source, destination) => panic!("{source} and {destination} are of different families"),
        };
        [header, payload].concat()
    }
}

/// A type of service as its two parts.
fn split(tos: u8) -> (IpDscp, IpEcn) {
    let dscp = IpDscp::try_new(tos >> 2).expect("6 bits");
    (dscp, IpEcn::try_new(tos & 3).expect("2 bits"))
}

fn udp(source_port: u16, destination_port: u16, payload: usize) -> UdpHeader {
    let length = u16::try_from(UdpHeader::LEN + payload).expect("a packet has at most 65,535 bytes");
    UdpHeader { source_port, destination_port, length, checksum: 0 }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    #[test]
    fn a_frame_parses_back_with_right_checksums() {
        for frame in [Frame::v4("10.1.0.5", "10.2.0.9"), Frame::v6("2001:db8:1::5", "2001:db8:2::9")] {
            let frame = frame.tags(&[Tag::vlan(5)]).udp(1000, 2000).payload(33).ttl(7).padding(9).build();
            let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
            let Some(TransportSlice::Udp(udp)) = &sliced.transport else { panic!("{sliced:?}") };
            assert_eq!((udp.source_port(), udp.destination_port(), udp.payload().len()), (1000, 2000, 33));
            let checksum = match &sliced.net {
                Some(NetSlice::Ipv4(ip)) => {
                    let header = ip.header().to_header();
                    assert_eq!(
                        (header.time_to_live, header.header_checksum),
                        (7, header.calc_header_checksum())
                    );
                    udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap()
                }
                Some(NetSlice::Ipv6(ip)) => {
                    assert_eq!(ip.header().hop_limit(), 7);
                    udp.to_header().calc_checksum_ipv6(&ip.header().to_header(), udp.payload()).unwrap()
                }
                other => panic!("{other:?}"),
            };
            assert_eq!(udp.checksum(), checksum);
            assert_eq!(sliced.vlan_ids()[..], [VlanId::try_new(5).unwrap()]);
        }
    }
}
