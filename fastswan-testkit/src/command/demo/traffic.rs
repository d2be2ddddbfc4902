//! What the client sends: UDP in bursts, pings, and TCP streams whose content the peer checks.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type};
use fastswan_testkit::site::Site;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};

use super::tunnels::{DELETED, SHADOWED, Tunnel};

/// What a flow consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Udp,
    Tcp,
    Icmp,
}

/// Packets of one protocol to one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    tunnel: Tunnel,
    protocol: Protocol,
}

const fn flow(tunnel: Tunnel, protocol: Protocol) -> Flow {
    Flow { tunnel, protocol }
}

const FLOWS: [Flow; 8] = [
    flow(Tunnel::v4(2), Protocol::Udp),
    flow(Tunnel::v4(2), Protocol::Tcp),
    flow(Tunnel::v4(3), Protocol::Icmp),
    flow(DELETED, Protocol::Udp),
    flow(SHADOWED, Protocol::Udp),
    flow(Tunnel::v6(2), Protocol::Udp),
    flow(Tunnel::v6(2), Protocol::Tcp),
    flow(Tunnel::v6(3), Protocol::Icmp),
];

const PORT: u16 = 7000;
/// Between two bursts.
const PAUSE: Duration = Duration::from_millis(2);
const BURST: usize = 4;
/// How many bursts go out for one ping.
const BURSTS_PER_PING: usize = 10;
/// What a TCP stream consists of.
const BLOCK: [u8; 8192] = {
    let mut block = [0; 8192];
    let mut at = 0;
    while at < block.len() {
        block[at] = at.to_le_bytes()[0] ^ at.to_le_bytes()[1];
        at += 1;
    }
    block
};

/// Threads that send until they are told to stop.
#[derive(Debug)]
pub(super) struct Traffic {
    orders: Arc<Orders>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
    /// Receivers that nobody reads from: without them the peer would answer that the port is closed.
    _sinks: Vec<UdpSocket>,
}

/// What the threads look at before they send.
#[derive(Debug, Default)]
struct Orders {
    stop: AtomicBool,
    hold: AtomicBool,
}

impl Traffic {
    pub(super) fn start(site: &Site) -> anyhow::Result<Self> {
        let orders = Arc::new(Orders::default());
        let mut threads = Vec::new();
        let mut sinks = Vec::new();
        let mut datagrams = Vec::new();
        for flow in FLOWS {
            let (from, to) = (flow.tunnel.client(), SocketAddr::new(flow.tunnel.host(), PORT));
            match flow.protocol {
                Protocol::Udp => {
                    sinks.push(site.peer.enter(|| UdpSocket::bind(to))?);
                    let socket = site.client.enter(|| UdpSocket::bind((from, 0)))?;
                    socket.connect(to)?;
                    datagrams.push((flow, Sender::Udp(socket)));
                }
                Protocol::Icmp => {
                    datagrams.push((flow, site.client.enter(|| Sender::ping(to.ip()))?));
                }
                Protocol::Tcp => {
                    let listener = site.peer.enter(|| TcpListener::bind(to))?;
                    let orders = Arc::clone(&orders);
                    let peer = thread::spawn(move || receive_stream(&listener));
                    let stream = site.client.enter(|| TcpStream::connect(to)).context("connecting")?;
                    threads.push(thread::spawn(move || send_stream(stream, &orders, peer)));
                }
            }
        }
        let for_datagrams = Arc::clone(&orders);
        threads.push(thread::spawn(move || send_datagrams(&datagrams, &for_datagrams)));
        Ok(Self { orders, threads, _sinks: sinks })
    }

    /// Stops sending to the tunnel whose policy is going to be deleted, or goes on.
    pub(super) fn hold(&self, hold: bool) {
        self.orders.hold.store(hold, Ordering::Relaxed);
    }

    /// Ends all flows and waits until the streams have arrived.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.orders.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    }
}

fn send_datagrams(flows: &[(Flow, Sender)], orders: &Orders) -> anyhow::Result<()> {
    for burst in 0.. {
        if orders.stop.load(Ordering::Relaxed) {
            break;
        }
        for (flow, sender) in flows {
            let on_hold = flow.tunnel == DELETED && orders.hold.load(Ordering::Relaxed);
            let due = flow.protocol != Protocol::Icmp || burst % BURSTS_PER_PING == 0;
            if !on_hold && due {
                sender.send(burst).with_context(|| format!("sending to {}", flow.tunnel))?;
            }
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

#[derive(Debug)]
enum Sender {
    Udp(UdpSocket),
    Ping4(OwnedFd, Ipv4Addr),
    Ping6(OwnedFd, Ipv6Addr),
}

impl Sender {
    fn ping(to: IpAddr) -> nix::Result<Self> {
        let open = |family, protocol| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
        Ok(match to {
            IpAddr::V4(to) => Self::Ping4(open(AddressFamily::Inet, SockProtocol::Icmp)?, to),
            IpAddr::V6(to) => Self::Ping6(open(AddressFamily::Inet6, SockProtocol::IcmpV6)?, to),
        })
    }

    fn send(&self, burst: usize) -> anyhow::Result<()> {
        let echo = IcmpEchoHeader { id: 7, seq: burst.to_le_bytes()[0].into() };
        let payload = [0; 56];
        match self {
            Self::Udp(socket) => {
                for number in 0..BURST {
                    // From the shortest packets to the longest.
                    let length = (burst * BURST + number) * 97 % 1300;
                    socket.send(&BLOCK[..length])?;
                }
            }
            Self::Ping4(socket, to) => {
                let header = Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &payload);
                let to = SockaddrIn::from(std::net::SocketAddrV4::new(*to, 0));
                let message = [header.to_bytes().to_vec(), payload.to_vec()].concat();
                sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty())?;
            }
            Self::Ping6(socket, to) => {
                // The kernel computes the checksum (RFC 3542 section 3.1).
                let header = Icmpv6Header::new(Icmpv6Type::EchoRequest(echo));
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(*to, 0, 0, 0));
                let message = [header.to_bytes().to_vec(), payload.to_vec()].concat();
                sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty())?;
            }
        }
        Ok(())
    }
}

/// Sends blocks until it is told to stop, and fails if they do not all arrive.
fn send_stream(
    mut stream: TcpStream,
    orders: &Orders,
    peer: JoinHandle<anyhow::Result<usize>>,
) -> anyhow::Result<()> {
    let mut sent = 0;
    while !orders.stop.load(Ordering::Relaxed) {
        stream.write_all(&BLOCK)?;
        sent += BLOCK.len();
        thread::sleep(PAUSE * 2);
    }
    stream.shutdown(Shutdown::Write)?;
    let received = peer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    ensure!(sent == received, "of {sent} bytes of a TCP stream {received} arrived");
    Ok(())
}

fn receive_stream(listener: &TcpListener) -> anyhow::Result<usize> {
    let (mut stream, _) = listener.accept()?;
    let mut content = Vec::new();
    stream.read_to_end(&mut content)?;
    let right = content.chunks(BLOCK.len()).all(|block| block == &BLOCK[..block.len()]);
    ensure!(right, "a TCP stream arrived with other content");
    Ok(content.len())
}
