//! The kernel as judge: which of its policies it chooses for a packet.
//!
//! No device here encrypts and no association exists, so the kernel asks for one (`XFRM_MSG_ACQUIRE`) for every
//! packet that a policy with a template is chosen for, and names the policy. Packets for which it does not are sent in
//! clear, dropped or delivered. That is so for offloaded policies as well: their device hears of the state that waits
//! for an association, and may refuse it.

use std::{
    fs::File,
    io::{self, Write as _},
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
};

use anyhow::{Context as _, ensure};
use fastswan::policy::{DefaultPolicy, MacAddr, OffloadDev, OffloadKind, PolicyType};
use ipnet::IpNet;
use netlink_sys::{Socket, protocols::NETLINK_XFRM};
use nix::{
    errno::Errno,
    sys::{
        socket::{MsgFlags, recv, setsockopt, sockopt::ReceiveTimeout},
        time::{TimeVal, TimeValLike as _},
    },
};

use super::{
    addresses::{PORT, SENDER},
    packets::Packet,
};
use crate::{
    guest::nic::Pair,
    lab::{self, End, LabError, Namespace, join},
    requests::{BATCH, Change, Requests, request},
    sys::packet_socket,
    xfrm::{Group, inject},
};

const OUT: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const EXIT: MacAddr = MacAddr([2, 0, 0, 0, 0, 3]);
/// The gateway's neighbour, which is nobody, so that the last namespace has nothing to do with its packets.
const NEIGHBOUR: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xbb]);

/// The host whose kernel judges, between a wire that packets come from and one that they leave to.
///
/// Inside the networks that policies are about are addresses of its own, networks that it does not reach, and some
/// that are not behind its outer device. IPv4 packets to those bypass IPsec, so that no policy is chosen for them.
#[derive(Debug)]
pub(super) struct Lab {
    gateway: Namespace,
    wire: Namespace,
    exit: Namespace,
    /// Between the gateway and the exit, if its policies are really offloaded.
    nic: Option<Pair>,
    /// Interface indices of the gateway's devices.
    pub(super) ingress: u32,
    pub(super) egress: u32,
}

/// Networks behind the inner device, besides its own.
const ELSEWHERE_V4: &str = "10.2.88.0/24";
/// IPv6 has no way to let packets bypass IPsec by device: those to here leave by the inner device under any policy.
const ELSEWHERE_V6: [&str; 2] = ["2001:db8:1::/48", "2001:db8:2:88::/64"];

impl Lab {
    /// One whose devices offload nothing.
    pub(super) fn new() -> Result<Self, LabError> {
        Self::with(None)
    }

    /// One whose outer device is a port of the software NIC.
    pub(super) fn with_nic() -> anyhow::Result<Self> {
        Ok(Self::with(Some(Pair::new().context("making a pair of ports: is the test NIC loaded?")?))?)
    }

    fn with(nic: Option<Pair>) -> Result<Self, LabError> {
        let (gateway, wire, exit) =
            (Namespace::new("oracle")?, Namespace::new("wire")?, Namespace::new("exit")?);
        for quiet in [&wire, &exit] {
            quiet.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        }
        for key in ["ipv6.conf.default", "ipv4.conf.all", "ipv4.conf.default"] {
            gateway.sysctl(&format!("net.{key}.accept_redirects"), "0")?;
        }
        for key in ["all", "default"] {
            gateway.sysctl(&format!("net.ipv4.conf.{key}.send_redirects"), "0")?;
        }
        let end = |namespace, device, mac, addresses| End { namespace, device, mac, addresses };
        let inner = end(&gateway, "in0", PORT, &["10.1.0.1/16", "2001:db8:1::1/48"]);
        let outer = end(&gateway, "out0", OUT, &["192.0.2.1/24", "2001:db8:f::1/48"]);
        join(inner, end(&wire, "wire0", SENDER, &[]), 1500)?;
        let outside = end(&exit, "exit0", EXIT, &[]);
        if nic.is_some() {
            for (end, port) in [outer, outside].into_iter().zip(Pair::PORTS) {
                end.plug(port.name(), 1500)?;
            }
        } else {
            join(outer, outside, 1500)?;
        }
        gateway.forward()?;
        gateway.sysctl("net.ipv4.conf.in0.disable_xfrm", "1")?;
        for (neighbour, everything) in [("192.0.2.2", "0.0.0.0/0"), ("2001:db8:f::2", "::/0")] {
            gateway.ip(&format!("neighbour replace {neighbour} lladdr {NEIGHBOUR} dev out0"))?;
            gateway.ip(&format!("route add {everything} via {neighbour}"))?;
        }
        for command in [
            "address add 10.2.0.1/32 dev lo",
            "address add 2001:db8:2::1/128 dev lo",
            "route add blackhole 10.2.66.0/24",
            "route add unreachable 10.3.77.0/24",
            "route add blackhole 2001:db8:2:66::/64",
            &format!("route add {ELSEWHERE_V4} dev in0"),
            &format!("route add {} dev in0", ELSEWHERE_V6[1]),
        ] {
            gateway.ip(command)?;
        }
        let (ingress, egress) = (gateway.ifindex("in0")?, gateway.ifindex("out0")?);
        Ok(Self { gateway, wire, exit, nic, ingress, egress })
    }

    /// Whether its policies are really offloaded.
    pub(super) fn offloads(&self) -> bool {
        self.nic.is_some()
    }

    /// What its policies are offloaded to, or as good as.
    pub(super) fn device(&self) -> OffloadDev {
        OffloadDev { ifindex: self.egress, kind: OffloadKind::Packet, inbound: false }
    }

    /// The gateway's associations, and what waits for one, as `ip` prints them.
    pub(super) fn states(&self) -> Result<String, LabError> {
        self.gateway.ip("xfrm state")
    }

    /// Runs a closure on a thread that is on the gateway.
    pub(super) fn enter<T: Send>(&self, story: impl FnOnce() -> T + Send) -> T {
        self.gateway.enter(story)
    }
}

/// Whoever has policies and chooses among them.
pub(super) trait Judge {
    /// Makes changes. A source tells one event for each.
    fn make(&mut self, changes: &[Change]) -> anyhow::Result<()>;

    /// The index of the policy that is chosen for a packet, if one is, and the packet leaves by the outer device.
    fn choose(&mut self, packet: &Packet) -> anyhow::Result<Option<u32>>;
}

/// The kernel of a lab. Used on a thread that is on its gateway.
pub(super) struct Kernel {
    requests: Requests,
    acquires: Socket,
    /// A listener that is full. The kernel keeps an association in mind that it has asked for, and does not ask for
    /// it again, but not if one that wanted to hear it did not.
    _full: Socket,
    wire: File,
    answers: OwnedFd,
    exit: OwnedFd,
    elsewhere: Vec<IpNet>,
    buffer: Vec<u8>,
}

impl Kernel {
    /// The kernel, without policies.
    pub(super) fn new(lab: &Lab) -> anyhow::Result<Self> {
        let full = full_listener()?;
        let mut acquires = Socket::new(NETLINK_XFRM)?;
        acquires.bind_auto()?;
        acquires.add_membership(Group::Acquire as u32)?;
        let listen = |namespace: &Namespace, device, ether_type: i32| {
            let ifindex = namespace.ifindex(device)?;
            let socket = namespace
                .enter(|| packet_socket(ifindex, u16::try_from(ether_type).map_err(io::Error::other)?))
                .with_context(|| format!("listening at {device}"))?;
            anyhow::Ok(socket)
        };
        let answers = listen(&lab.wire, "wire0", libc::ETH_P_ARP)?;
        setsockopt(&answers, ReceiveTimeout, &TimeVal::seconds(5))?;
        let mut kernel = Self {
            requests: Requests::open()?,
            acquires,
            _full: full,
            wire: lab.wire.enter(|| lab::wire("wire0"))?,
            answers,
            exit: listen(&lab.exit, "exit0", libc::ETH_P_ALL)?,
            elsewhere: ELSEWHERE_V6.map(str::parse).into_iter().collect::<Result<_, _>>()?,
            buffer: vec![0; 1 << 16],
        };
        kernel.make(&[
            Change::Flush(PolicyType::Main),
            Change::Flush(PolicyType::Sub),
            Change::Default(DefaultPolicy::default()),
        ])?;
        Ok(kernel)
    }

    /// Forgets what was seen so far.
    fn forget(&mut self) -> io::Result<()> {
        for socket in [self.acquires.as_raw_fd(), self.exit.as_raw_fd()] {
            loop {
                match receive(socket, &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(Some(_)) => {}
                    // The kernel asks for its own packets too, to many neighbours. What was lost is forgotten.
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                    Ok(None) => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// The index of the policy whose association a packet needs, as far as the kernel has asked for it.
    fn acquired(&mut self, packet: &Packet) -> io::Result<Option<u32>> {
        while let Some(length) = receive(self.acquires.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT)?
        {
            // Others are about what the kernel itself has sent.
            if let Some(index) = acquired(&self.buffer[..length], packet) {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// Whether a packet has left in clear.
    fn has_left(&mut self, packet: &Packet) -> io::Result<bool> {
        while let Some(length) = receive(self.exit.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT)? {
            if packet.is_forwarded_as(&self.buffer[..length]) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns when the kernel is done with all that was sent: when it has answered a question that came after.
    fn settle(&mut self) -> anyhow::Result<()> {
        self.wire.write_all(&question())?;
        let answer = receive(self.answers.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        ensure!(answer.is_some(), "the kernel does not answer an ARP request");
        Ok(())
    }
}

impl Judge for Kernel {
    fn make(&mut self, changes: &[Change]) -> anyhow::Result<()> {
        for changes in changes.chunks(BATCH) {
            let results = self.requests.make(changes.iter().map(request))?;
            for (result, change) in results.into_iter().zip(changes) {
                result.with_context(|| format!("{change:?}"))?;
            }
        }
        Ok(())
    }

    fn choose(&mut self, packet: &Packet) -> anyhow::Result<Option<u32>> {
        self.forget()?;
        self.wire.write_all(&packet.frame)?;
        // Nearly always the kernel is done when the frame has been sent.
        let mut chosen = self.acquired(packet)?;
        if chosen.is_none() && !self.has_left(packet)? {
            self.settle()?;
            chosen = self.acquired(packet)?;
        }
        let elsewhere = || self.elsewhere.iter().any(|net| net.contains(&packet.destination));
        Ok(chosen.filter(|_| !elsewhere()))
    }
}

/// A listener to acquires that takes none, which the kernel notices.
fn full_listener() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.set_rx_buf_sz(1_u32)?;
    socket.set_broadcast_error(true)?;
    socket.bind_auto()?;
    socket.add_membership(Group::Acquire as u32)?;
    // A message without a meaning (`NLMSG_NOOP`).
    let mut nothing = vec![0; 1024];
    nothing[..4].copy_from_slice(&1024_u32.to_ne_bytes());
    nothing[4] = 1;
    for _ in 0..8 {
        inject(Group::Acquire, &nothing)?;
    }
    Ok(socket)
}

/// Receives a message; `None` if there is none, or none in time.
fn receive(socket: RawFd, buffer: &mut [u8], flags: MsgFlags) -> io::Result<Option<usize>> {
    match recv(socket, buffer, flags) {
        Ok(length) => Ok(Some(length)),
        Err(Errno::EAGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The index of the policy that an acquire is about, if a packet is its cause (`struct xfrm_user_acquire`).
fn acquired(message: &[u8], packet: &Packet) -> Option<u32> {
    const ACQUIRE: u16 = 0x17;
    const SELECTOR: usize = 16 + 24 + 16;
    const POLICY_INDEX: usize = SELECTOR + 56 + 56 + 64 + 32 + 4;
    let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    let index = u32::from_ne_bytes(*message.get(POLICY_INDEX..)?.first_chunk()?);
    let is = |at: usize, address: IpAddr| match address {
        IpAddr::V4(address) => message[at..].starts_with(&address.octets()),
        IpAddr::V6(address) => message[at..].starts_with(&address.octets()),
    };
    let same = is(SELECTOR, packet.destination) && is(SELECTOR + 16, packet.source);
    (kind == ACQUIRE && same).then_some(index)
}

/// An ARP request for the gateway's address from a host that has none yet (RFC 5227).
fn question() -> Vec<u8> {
    let mut frame = [PORT.0, SENDER.0].concat();
    // ARP; Ethernet, IPv4, their lengths, a request.
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(SENDER.0);
    frame.extend([0; 4 + 6]);
    frame.extend([10, 1, 0, 1]);
    frame
}
