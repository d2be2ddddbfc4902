//! The host whose routing is judged, and the wires behind its four devices.
//!
//! ```text
//!                    gateway
//! wire0 ──── lan0 10.1.0.1    192.0.2.1 out0 ──── exit0
//!            2001:db8:1::1    2001:db8:f::1
//! wire1 ──── lan1 10.7.0.1    198.51.100.1 out1 ──── exit1
//!            2001:db8:7::1    2001:db8:e::1
//! ```
//!
//! All far ends are in one namespace that has no address and answers nothing. Devices of the gateway ask for no neighbour
//! (`arp off`), so that a packet that is routed to a device leaves by it.

use std::{
    fs::File,
    io::{self, IoSliceMut, Write as _},
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::Context as _;
use fastswan::policy::MacAddr;
use ipnet::IpNet;
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{LinkAddr, MsgFlags, recvmsg, setsockopt, sockopt::RcvBufForce},
};

use crate::{
    lab::{self, LabError, Namespace, batch},
    oracle::addresses::{PORT, SENDER},
    sys::packet_socket,
};

/// A device of the gateway, and what is at the other end of its wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Device {
    Lan0,
    Lan1,
    Out0,
    Out1,
}

impl Device {
    pub(super) const ALL: [Self; 4] = [Self::Lan0, Self::Lan1, Self::Out0, Self::Out1];
    /// Those that packets enter by.
    pub(super) const PORTS: [Self; 2] = [Self::Lan0, Self::Lan1];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lan0 => "lan0",
            Self::Lan1 => "lan1",
            Self::Out0 => "out0",
            Self::Out1 => "out1",
        }
    }

    /// The other end of its wire.
    pub(super) fn far_end(self) -> &'static str {
        match self {
            Self::Lan0 => "wire0",
            Self::Lan1 => "wire1",
            Self::Out0 => "exit0",
            Self::Out1 => "exit1",
        }
    }

    pub(super) fn mac(self) -> MacAddr {
        match self {
            Self::Lan0 => PORT,
            Self::Lan1 => MacAddr([2, 0, 0, 0, 0, 4]),
            Self::Out0 => MacAddr([2, 0, 0, 0, 0, 2]),
            Self::Out1 => MacAddr([2, 0, 0, 0, 0, 5]),
        }
    }

    fn far_mac(self) -> MacAddr {
        match self {
            Self::Lan0 => SENDER,
            Self::Lan1 => MacAddr([2, 0, 0, 0, 0, 0xa4]),
            Self::Out0 => MacAddr([2, 0, 0, 0, 0, 3]),
            Self::Out1 => MacAddr([2, 0, 0, 0, 0, 6]),
        }
    }

    pub(super) fn addresses(self) -> &'static [&'static str] {
        match self {
            Self::Lan0 => &["10.1.0.1/16", "2001:db8:1::1/48"],
            Self::Lan1 => &["10.7.0.1/16", "2001:db8:7::1/48"],
            Self::Out0 => &["192.0.2.1/24", "2001:db8:f::1/48"],
            Self::Out1 => &["198.51.100.1/24", "2001:db8:e::1/48"],
        }
    }
}

/// Neighbours of the gateway, with the last byte of their Ethernet addresses.
const NEIGHBOURS: [(&str, Device, u8); 6] = [
    ("192.0.2.2", Device::Out0, 0xb2),
    ("192.0.2.3", Device::Out0, 0xb3),
    ("198.51.100.2", Device::Out1, 0xb4),
    ("2001:db8:f::2", Device::Out0, 0xb5),
    ("2001:db8:f::3", Device::Out0, 0xb6),
    ("2001:db8:e::2", Device::Out1, 0xb7),
];

/// Routes of the gateway, beside those of its own networks.
const ROUTES: [&str; 8] = [
    "0.0.0.0/0 via 192.0.2.2",
    "10.2.0.0/16 via 192.0.2.2",
    "10.3.0.0/16 via 192.0.2.3",
    "10.4.0.0/16 via 198.51.100.2",
    "::/0 via 2001:db8:f::2",
    "2001:db8:2::/48 via 2001:db8:f::2",
    "2001:db8:3::/48 via 2001:db8:f::3",
    "2001:db8:4::/48 via 2001:db8:e::2",
];

/// Whether an address is the gateway's own, or the first or last of a network of its own.
pub(super) fn is_own(address: IpAddr) -> bool {
    let networks = Device::ALL.into_iter().flat_map(Device::addresses);
    networks.filter_map(|text| text.parse::<IpNet>().ok()).any(|own| {
        let v4 = own.addr().is_ipv4();
        [own.addr(), own.network()].contains(&address) || v4 && own.broadcast() == address
    })
}

/// The gateway and its wires.
#[derive(Debug)]
pub(super) struct World {
    pub(super) gateway: Namespace,
    pub(super) far: Namespace,
}

impl World {
    /// Its gateway has no routes but those of its own networks so far: [`base`].
    pub(super) fn new() -> Result<Self, LabError> {
        let (gateway, far) = (Namespace::new("facts")?, Namespace::new("far")?);
        far.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        for key in ["ipv6.conf.default", "ipv4.conf.all", "ipv4.conf.default"] {
            gateway.sysctl(&format!("net.{key}.accept_redirects"), "0")?;
        }
        for key in ["all", "default"] {
            gateway.sysctl(&format!("net.ipv4.conf.{key}.send_redirects"), "0")?;
        }
        // Whether a packet was answered is told by its answer.
        gateway.sysctl("net.ipv4.icmp_ratelimit", "0")?;
        gateway.sysctl("net.ipv6.icmp.ratelimit", "0")?;
        join(&gateway, &far)?;
        gateway.forward()?;
        Ok(Self { gateway, far })
    }
}

/// Joins the two by veth pairs, as [`lab::join`] does one, in few processes: worlds are made all the time.
fn join(gateway: &Namespace, far: &Namespace) -> Result<(), LabError> {
    let pair = |device: Device| {
        let (name, mac, in_gateway) = (device.name(), device.mac(), gateway.name());
        let (far_name, far_mac, in_far) = (device.far_end(), device.far_mac(), far.name());
        format!(
            "link add {name} address {mac} mtu 1500 netns {in_gateway} type veth \
             peer name {far_name} address {far_mac} mtu 1500 netns {in_far}\n"
        )
    };
    batch(&[], &Device::ALL.map(pair).concat())?;
    for (namespace, name) in [(gateway, Device::name as fn(Device) -> &'static str), (far, Device::far_end)] {
        namespace
            .enter(|| Device::ALL.into_iter().try_for_each(|device| lab::complete_frames(name(device))))?;
        // Nothing that is merged may be longer than a byte.
        let merge_nothing =
            Device::ALL.map(|device| format!("link set {} gro_max_size 1\n", name(device))).concat();
        batch(&["-n", namespace.name()], &merge_nothing)?;
    }
    let addresses = Device::ALL.into_iter().flat_map(|device| {
        device.addresses().iter().map(move |address| {
            let detection = if address.contains(':') { "nodad" } else { "" };
            format!("address add {address} dev {} {detection}\n", device.name())
        })
    });
    let up = Device::ALL.map(|device| format!("link set {} up arp off\n", device.name()));
    batch(&["-n", gateway.name()], &addresses.chain(up).collect::<String>())?;
    let up = Device::ALL.map(|device| format!("link set {} up\n", device.far_end()));
    batch(&["-n", far.name()], &up.concat())
}

/// What gives the gateway neighbours and routes, as arguments of `ip`.
pub(super) fn base() -> impl Iterator<Item = String> {
    let neighbours = NEIGHBOURS.iter().map(|(address, device, last)| {
        let mac = MacAddr([2, 0, 0, 0, 0, *last]);
        format!("neighbour replace {address} lladdr {mac} dev {}", device.name())
    });
    neighbours.chain(ROUTES.iter().map(|route| format!("route add {route}")))
}

/// A frame that the gateway has sent.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// The device that it left by.
    pub(super) device: Device,
    pub(super) frame: Vec<u8>,
}

/// The far ends of all wires.
#[derive(Debug)]
pub(super) struct Wires {
    /// Where frames are sent from, in the order of [`Device::ALL`].
    senders: Vec<File>,
    listeners: Vec<(Device, OwnedFd)>,
    buffer: Vec<u8>,
}

/// Room for frames that arrive while nobody reads.
const RECEIVE_BUFFER: usize = 8 << 20;

impl Wires {
    pub(super) fn open(world: &World) -> anyhow::Result<Self> {
        let all = u16::try_from(libc::ETH_P_ALL)?;
        let listen = |device: Device| -> anyhow::Result<(Device, OwnedFd)> {
            let open = || -> io::Result<OwnedFd> { packet_socket(if_nametoindex(device.far_end())?, all) };
            let socket =
                world.far.enter(open).with_context(|| format!("listening at {}", device.far_end()))?;
            setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
            Ok((device, socket))
        };
        let senders = Device::ALL.map(|device| world.far.enter(|| lab::wire(device.far_end())));
        Ok(Self {
            senders: senders.into_iter().collect::<Result<_, _>>()?,
            listeners: Device::ALL.into_iter().map(listen).collect::<Result<_, _>>()?,
            buffer: vec![0; 1 << 16],
        })
    }

    /// Sends a frame to a device of the gateway. Returns whether it was sent: not if the wire is down.
    pub(super) fn send(&mut self, device: Device, frame: &[u8]) -> anyhow::Result<bool> {
        match self.senders[device as usize].write_all(frame) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENXIO | libc::ENOBUFS)) =>
            {
                Ok(false)
            }
            result => result.map(|()| true).with_context(|| format!("sending to {}", device.name())),
        }
    }

    /// What the gateway has sent, until nothing comes for so long.
    pub(super) fn listen(&mut self, patience: Duration) -> anyhow::Result<Vec<Seen>> {
        let patience = PollTimeout::try_from(patience)?;
        let mut seen = Vec::new();
        loop {
            let mut polled: Vec<PollFd<'_>> = self
                .listeners
                .iter()
                .map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
                .collect();
            if poll(&mut polled, patience)? == 0 {
                return Ok(seen);
            }
            for (device, listener) in &self.listeners {
                loop {
                    let flags = MsgFlags::MSG_DONTWAIT;
                    let mut parts = [IoSliceMut::new(&mut self.buffer)];
                    let received = recvmsg::<LinkAddr>(listener.as_raw_fd(), &mut parts, None, flags);
                    let (length, from) = match received {
                        Ok(message) => (message.bytes, message.address),
                        Err(Errno::EAGAIN) => break,
                        // That its device is down is told once.
                        Err(Errno::EINTR | Errno::ENETDOWN) => continue,
                        Err(error) => return Err(error).context("listening"),
                    };
                    if from.is_none_or(|from| from.pkttype() != libc::PACKET_OUTGOING) {
                        seen.push(Seen { device: *device, frame: self.buffer[..length].to_vec() });
                    }
                }
            }
        }
    }
}
