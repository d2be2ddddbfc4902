//! The kernel as judge: what becomes of packets, and where a tunnel's outer packets would go.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::sys::socket::{MsgFlags, recv};

use super::{
    packet::{ETHERNET, Packet, mark, number_in},
    tunnels::Tunnel,
    world::{Device, Wires, World},
};

/// How long nothing must be heard until all that was sent has been dealt with.
const QUIET: Duration = Duration::from_millis(2);
/// The same for packets that are asked about once more.
const VERY_QUIET: Duration = Duration::from_millis(25);

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It leaves by a device: what does, from the IP header on.
    Forwarded(Device, Vec<u8>),
    /// Its sender is told why it is not forwarded.
    Answered,
    /// It is dropped or delivered.
    Gone,
    /// It cannot arrive: its port hears nothing.
    Unsent,
}

/// The Ethernet header of a tunnel's outer packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Header {
    /// The tunnel's packets do not leave with it.
    #[default]
    OfNoConcern,
    /// The kernel does not know the next hop's address.
    Unresolved,
    /// Destination, source and type.
    Known(Vec<u8>),
}

/// Where a tunnel's outer packets would go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outer {
    /// The device.
    pub(super) device: Option<Device>,
    /// The longest packet.
    pub(super) mtu: u32,
    pub(super) header: Header,
}

/// The kernel of a world. Used on a thread that is on its gateway.
pub(super) struct Kernel {
    socket: Socket,
    pub(super) wires: Wires,
    /// The number of the next packet.
    next: u32,
    /// Interface indices of devices.
    indices: BTreeMap<u32, Device>,
    /// What has been asked since the host changed.
    outer: HashMap<(IpAddr, IpAddr, u8), Outer>,
}

impl Kernel {
    pub(super) fn new(world: &World) -> anyhow::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        let index = |device: Device| Ok((world.gateway.ifindex(device.name())?, device));
        Ok(Self {
            socket,
            wires: Wires::open(world)?,
            next: 0,
            indices: Device::ALL.into_iter().map(index).collect::<anyhow::Result<_>>()?,
            outer: HashMap::new(),
        })
    }

    /// The host has changed.
    pub(super) fn forget(&mut self) -> anyhow::Result<()> {
        self.outer.clear();
        self.wires.listen(Duration::ZERO)?;
        Ok(())
    }

    /// Gives packets numbers by which they are known again.
    pub(super) fn number(&mut self, packets: &mut [Packet]) {
        for packet in packets {
            packet.number(self.next);
            self.next = self.next.wrapping_add(1);
        }
    }

    /// What becomes of packets that were numbered one after the other.
    pub(super) fn judge(&mut self, packets: &[Packet]) -> anyhow::Result<Vec<Fate>> {
        self.judge_patiently(packets, QUIET)
    }

    /// The same, with more time.
    pub(super) fn judge_again(&mut self, packets: &[Packet]) -> anyhow::Result<Vec<Fate>> {
        self.judge_patiently(packets, VERY_QUIET)
    }

    fn judge_patiently(&mut self, packets: &[Packet], patience: Duration) -> anyhow::Result<Vec<Fate>> {
        let Some((first, _)) = packets.first().and_then(|packet| number_in(&packet.frame)) else {
            return Ok(Vec::new());
        };
        let mut fates = Vec::new();
        for packet in packets {
            let is_sent = self.wires.send(packet.port, &packet.frame)?;
            fates.push(if is_sent { Fate::Gone } else { Fate::Unsent });
        }
        for seen in self.wires.listen(patience)? {
            let Some((number, at)) = number_in(&seen.frame) else { continue };
            let Some(index) =
                usize::try_from(number.wrapping_sub(first)).ok().filter(|at| *at < packets.len())
            else {
                continue;
            };
            fates[index] = match (packets[index].is_forwarded_as(&seen.frame, at), &fates[index]) {
                (true, _) => Fate::Forwarded(seen.device, seen.frame[ETHERNET..].to_vec()),
                (false, forwarded @ Fate::Forwarded(..)) => forwarded.clone(),
                (false, _) => Fate::Answered,
            };
        }
        Ok(fates)
    }

    /// Where the packets of a tunnel would go, for inner packets with a type of service.
    pub(super) fn outer(&mut self, tunnel: &Tunnel, tos: u8) -> anyhow::Result<Outer> {
        let key = (tunnel.local, tunnel.peer, tos);
        if let Some(known) = self.outer.get(&key) {
            return Ok(known.clone());
        }
        let outer = self.ask(tunnel, tos)?;
        self.outer.insert(key, outer.clone());
        Ok(outer)
    }

    fn ask(&mut self, tunnel: &Tunnel, tos: u8) -> anyhow::Result<Outer> {
        // The ECN bits are no part of a route.
        let tos = tos & 0xfc;
        let Some(Answer { ifindex, mtu }) = self.route(tunnel, tos)? else { return Ok(Outer::default()) };
        let Some(device) = self.indices.get(&ifindex).copied() else { return Ok(Outer::default()) };
        let of_device = mtu_of(device, tunnel.is_v6())?;
        let mtu = mtu.map_or(of_device, |mtu| mtu.min(of_device));
        let header = if tunnel.by_neighbour && tos == 0 { self.header(tunnel)? } else { Header::OfNoConcern };
        Ok(Outer { device: Some(device), mtu, header })
    }

    /// The kernel's route for packets from the tunnel's source to its destination, as its output asks for it.
    fn route(&mut self, tunnel: &Tunnel, tos: u8) -> anyhow::Result<Option<Answer>> {
        self.socket.send(&question(tunnel, tos), 0)?;
        let mut buffer = vec![0; 1 << 13];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        answer(&buffer[..length])
    }

    /// The Ethernet header of a packet that the host itself sends from the tunnel's source to its destination.
    fn header(&mut self, tunnel: &Tunnel) -> anyhow::Result<Header> {
        const NOBODYS_PORT: u16 = 9;
        // An address that is no longer the host's.
        let Ok(socket) = UdpSocket::bind((tunnel.local, 0)) else { return Ok(Header::OfNoConcern) };
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        if socket.send_to(&mark(number), (tunnel.peer, NOBODYS_PORT)).is_err() {
            return Ok(Header::Unresolved);
        }
        let seen = self.wires.listen(QUIET)?;
        let own = seen.iter().find(|seen| number_in(&seen.frame).is_some_and(|(found, _)| found == number));
        Ok(own.map_or(Header::Unresolved, |seen| Header::Known(seen.frame[..ETHERNET].to_vec())))
    }

    /// Whether IPv4 packets that leave by a device bypass IPsec (`IN_DEV_ORCONF` of `disable_xfrm`).
    pub(super) fn bypasses_xfrm(device: Device) -> bool {
        ["all", device.name()].iter().any(|name| {
            let value = fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/disable_xfrm"));
            value.is_ok_and(|value| value.trim() != "0")
        })
    }
}

/// The longest packet of a family that a device takes; 0 if there is no such device.
fn mtu_of(device: Device, v6: bool) -> anyhow::Result<u32> {
    let links = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{}/mtu", device.name()));
    let of_v6 = || -> io::Result<u32> { links?.trim().parse().map_err(io::Error::other) };
    let output =
        std::process::Command::new("ip").args(["-o", "link", "show", "dev", device.name()]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mtu = text.split(" mtu ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0);
    Ok(if v6 { of_v6().unwrap_or(0).min(mtu) } else { mtu })
}

/// What the kernel says of a route.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    ifindex: u32,
    mtu: Option<u32>,
}

const HEADER: usize = 16;
/// Length of `struct rtmsg`.
const ROUTE: usize = 12;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_METRICS: u16 = 8;
const RTAX_MTU: u16 = 2;
const RTN_UNICAST: u8 = 1;

/// `RTM_GETROUTE` (`linux/rtnetlink.h`).
fn question(tunnel: &Tunnel, tos: u8) -> Vec<u8> {
    const GETROUTE: u16 = 26;
    const REQUEST: u16 = 1;
    let (family, bits): (u8, u8) = if tunnel.is_v6() { (10, 128) } else { (2, 32) };
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut body = vec![family, bits, bits, tos, 0, 0, 0, 0, 0, 0, 0, 0];
    for (kind, address) in [(RTA_DST, tunnel.peer), (RTA_SRC, tunnel.local)] {
        let value = octets(address);
        let length = u16::try_from(4 + value.len()).unwrap_or(0);
        body.extend(length.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(value);
    }
    let mut message = u32::try_from(HEADER + body.len()).unwrap_or(0).to_ne_bytes().to_vec();
    message.extend(GETROUTE.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// `None` if there is no route that leads on.
fn answer(message: &[u8]) -> anyhow::Result<Option<Answer>> {
    const ERROR: u16 = 2;
    const NEWROUTE: u16 = 24;
    let kind =
        u16::from_ne_bytes(*message.get(4..).and_then(<[u8]>::first_chunk).context("a short message")?);
    if kind == ERROR {
        return Ok(None);
    }
    ensure!(kind == NEWROUTE, "the kernel answers with a message of type {kind}");
    let route = message.get(HEADER..HEADER + ROUTE).context("a short message")?;
    if route[7] != RTN_UNICAST {
        return Ok(None);
    }
    let attributes = attributes(&message[HEADER + ROUTE..]);
    let number = |value: &[u8]| value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
    let Some(ifindex) = attributes.get(&RTA_OIF).copied().and_then(number) else { return Ok(None) };
    let metrics = attributes.get(&RTA_METRICS).copied().unwrap_or_default();
    let mtu = self::attributes(metrics).get(&RTAX_MTU).copied().and_then(number).filter(|mtu| *mtu != 0);
    Ok(Some(Answer { ifindex, mtu }))
}

/// Attributes by kind.
fn attributes(mut bytes: &[u8]) -> BTreeMap<u16, &[u8]> {
    let mut attributes = BTreeMap::new();
    while let [a, b, c, d, ..] = *bytes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = bytes.get(4..length) else { break };
        attributes.insert(u16::from_ne_bytes([c, d]) & 0x3fff, value);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    attributes
}
