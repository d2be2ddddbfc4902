//! What the XDP program should do with a frame, written a second time and without regard to speed.
//!
//! The model takes the same [`TableUpdate`]s as a table. It keeps them as they come and scans them, so that it
//! shares neither layout nor lookup with the program ([`Contents`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use fastswan::{
    PassReason,
    forwarder::RunAction,
    policy::{Family, MacAddr},
    table::{self, Contents, Port, Slot, TableUpdate, Traffic},
};

/// A table that is switched on and always has a lease.
#[derive(Clone, Debug, Default)]
pub struct Model {
    contents: Contents,
    ports: BTreeMap<(u32, u16), Port>,
    /// Devices that cannot be redirected to.
    unavailable: BTreeSet<u32>,
}

/// A frame that leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// Out of the interface it came in on, or of another.
    pub action: RunAction,
    /// The frame as it leaves.
    pub frame: Vec<u8>,
    /// Whose packet it is.
    pub slot: Slot,
    /// What is counted.
    pub traffic: Traffic,
}

impl Model {
    /// Applies a batch of changes.
    pub fn apply(&mut self, update: &TableUpdate) {
        self.contents.apply(update);
    }

    /// Makes a device one that cannot be redirected to.
    pub fn forget_device(&mut self, ifindex: u32) {
        self.unavailable.insert(ifindex);
    }

    /// Adds or changes a port.
    pub fn set_port(&mut self, port: Port) {
        self.ports.insert((port.ifindex, port.vlan), port);
    }

    /// What is to happen to a frame in one piece that comes in on an interface.
    ///
    /// # Errors
    ///
    /// The reason why the frame is passed to the kernel.
    pub fn forward(&self, frame: &[u8], ifindex: u32) -> Result<Forwarded, PassReason> {
        let (vlan, ether_type, packet) = untag(frame)?;
        let family = match ether_type {
            0x0800 => Family::V4,
            0x86dd => Family::V6,
            _ => return Err(PassReason::NotIp),
        };
        let port = self.ports.get(&(ifindex, vlan.ok_or(PassReason::UnknownPort)?));
        let port = port.ok_or(PassReason::UnknownPort)?;
        if frame[..6] != port.address.0 {
            return Err(PassReason::OtherDestinationMac);
        }
        let packet = match family {
            Family::V4 if port.forwards.v4 => Packet::v4(packet)?,
            Family::V6 if port.forwards.v6 => Packet::v6(packet)?,
            _ => return Err(PassReason::NotForwarding),
        };
        // Only a table without exceptions for the family lets ports go unread.
        if self.contents.exceptions.iter().any(|e| Family::of(&e.cell.destination) == family) {
            packet.ports_are_in_the_frame()?;
        }
        let (slot, forwarding) = self.contents.decide(&packet.to_decide(), Some(port))?;
        if self.unavailable.contains(&forwarding.ifindex) {
            return Err(PassReason::EgressUnavailable);
        }

        let mut forwarded = Vec::with_capacity(frame.len());
        let (source, destination) = match forwarding.rewrite {
            Some((source, destination)) => (source, destination),
            None => (mac(&frame[6..12]), mac(&frame[..6])),
        };
        forwarded.extend(destination.0);
        forwarded.extend(source.0);
        forwarded.extend(ether_type.to_be_bytes());
        forwarded.extend(packet.with_ttl_decremented(family));
        let action = if forwarding.ifindex == ifindex { RunAction::Transmit } else { RunAction::Redirect };
        let traffic = Traffic { packets: 1, bytes: packet.bytes.len() as u64 };
        Ok(Forwarded { action, frame: forwarded, slot, traffic })
    }
}

fn mac(bytes: &[u8]) -> MacAddr {
    MacAddr(bytes.try_into().unwrap_or_default())
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Result<[u8; N], PassReason> {
    let bytes = from.get(at..at + N).ok_or(PassReason::Truncated)?;
    bytes.try_into().map_err(|_| PassReason::Truncated)
}

fn number(from: &[u8], at: usize) -> Result<u16, PassReason> {
    bytes(from, at).map(u16::from_be_bytes)
}

/// The VLAN id (`None` for one that no port can have), the type of what follows the tags, and that itself.
fn untag(frame: &[u8]) -> Result<(Option<u16>, u16, &[u8]), PassReason> {
    const CUSTOMER: u16 = 0x8100;
    const SERVICE: u16 = 0x88a8;
    let mut tags = Vec::new();
    let mut at = 12;
    let ether_type = loop {
        let ether_type = number(frame, at)?;
        if tags.len() == 2 || !matches!(ether_type, CUSTOMER | SERVICE) {
            break ether_type;
        }
        let control = number(frame, at + 2)?;
        number(frame, at + 4)?;
        tags.push((ether_type, control & 0xfff));
        at += 4;
    };
    let id = match tags[..] {
        [] => Some(0),
        [(CUSTOMER, id)] | [(CUSTOMER, 0), (CUSTOMER, id)] => Some(id),
        // Told before the type is looked at.
        _ => return Err(PassReason::UnknownPort),
    };
    Ok((id, ether_type, &frame[at + 2..]))
}

struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    header: usize,
    bytes: &'a [u8],
    /// With whatever follows the packet in its frame.
    rest_of_frame: &'a [u8],
}

impl<'a> Packet<'a> {
    fn v4(frame: &'a [u8]) -> Result<Self, PassReason> {
        let header: [u8; 20] = bytes(frame, 0)?;
        match (header[0] >> 4, header[0] & 0xf) {
            (4, 5) => {}
            (4, 6..) => return Err(PassReason::Options),
            _ => return Err(PassReason::BadHeader),
        }
        if number(&header, 6)? & !0x4000 != 0 {
            return Err(PassReason::Fragment);
        }
        let length = usize::from(number(&header, 2)?);
        let packet = frame.get(..length).filter(|_| length >= 20).ok_or(PassReason::BadLength)?;
        let words = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        if words.sum::<u32>() % 0xffff != 0 {
            return Err(PassReason::BadChecksum);
        }
        if header[8] <= 1 {
            return Err(PassReason::TtlExpired);
        }
        let source = Ipv4Addr::from(bytes::<4>(&header, 12)?);
        let destination = Ipv4Addr::from(bytes::<4>(&header, 16)?);
        let special = |address: Ipv4Addr| {
            address.octets()[0] == 0
                || address.is_loopback()
                || address.is_link_local()
                || address.octets()[0] >= 224
        };
        if special(source) {
            return Err(PassReason::MartianSource);
        }
        if special(destination) {
            return Err(PassReason::MartianDestination);
        }
        Ok(Self {
            source: source.into(),
            destination: destination.into(),
            protocol: header[9],
            header: 20,
            bytes: packet,
            rest_of_frame: frame,
        })
    }

    fn v6(frame: &'a [u8]) -> Result<Self, PassReason> {
        let header: [u8; 40] = bytes(frame, 0)?;
        if header[0] >> 4 != 6 {
            return Err(PassReason::BadHeader);
        }
        match header[6] {
            44 => return Err(PassReason::Fragment),
            0 | 43 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254 => return Err(PassReason::ExtensionHeader),
            _ => {}
        }
        let payload = usize::from(number(&header, 4)?);
        let packet = frame.get(..40 + payload).filter(|_| payload > 0).ok_or(PassReason::BadLength)?;
        if header[7] <= 1 {
            return Err(PassReason::TtlExpired);
        }
        let source = Ipv6Addr::from(bytes::<16>(&header, 8)?);
        let destination = Ipv6Addr::from(bytes::<16>(&header, 24)?);
        let special = |address: Ipv6Addr| {
            address.segments()[0] & 0xff80 == 0xfe80 || address.is_multicast() || address.to_ipv4().is_some()
        };
        if special(source) {
            return Err(PassReason::MartianSource);
        }
        if special(destination) {
            return Err(PassReason::MartianDestination);
        }
        // Router and neighbour solicitations and advertisements, and redirects.
        if header[6] == 58 && (133..=137).contains(&packet[40]) {
            return Err(PassReason::NeighbourDiscovery);
        }
        Ok(Self {
            source: source.into(),
            destination: destination.into(),
            protocol: header[6],
            header: 40,
            bytes: packet,
            rest_of_frame: frame,
        })
    }

    /// How many bytes after the header the kernel reads ports from.
    fn port_bytes(&self) -> usize {
        match self.protocol {
            6 | 17 | 132 | 136 => 4,
            1 | 58 => 2,
            _ => 0,
        }
    }

    fn ports_are_in_the_frame(&self) -> Result<(), PassReason> {
        let end = self.header + self.port_bytes();
        self.rest_of_frame.get(..end).map(drop).ok_or(PassReason::Truncated)
    }

    /// What the kernel compares with a selector's ports, or `None` if that cannot be told.
    fn ports(&self) -> Option<(u16, u16)> {
        match (self.protocol, self.port_bytes(), &self.bytes[self.header..]) {
            // DCCP: since some kernel it has none. GRE: its key. Mobility: its type.
            (33 | 47 | 135, ..) => None,
            (_, 4, [a, b, c, d, ..]) => Some((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))),
            (_, 2, [kind, code, ..]) => Some((u16::from(*kind), u16::from(*code))),
            (_, 0, _) => Some((0, 0)),
            _ => None,
        }
    }

    /// What the table looks at.
    fn to_decide(&self) -> table::Packet {
        table::Packet::new(self.source, self.destination)
            .with_protocol(self.protocol, self.ports())
            .with_length(self.bytes.len())
    }

    fn with_ttl_decremented(&self, family: Family) -> Vec<u8> {
        let mut packet = self.bytes.to_vec();
        match family {
            Family::V4 => {
                packet[8] -= 1;
                // Anew, over the whole header.
                packet[10..12].fill(0);
                let words = packet[..20].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
                let mut sum: u32 = words.sum();
                while sum > 0xffff {
                    sum = (sum & 0xffff) + (sum >> 16);
                }
                let [.., high, low] = (!sum).to_be_bytes();
                packet[10..12].copy_from_slice(&[high, low]);
            }
            Family::V6 => packet[7] -= 1,
        }
        packet
    }
}
