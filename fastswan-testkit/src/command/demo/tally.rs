//! Frames that the client sent and the peer received, counted by tunnel and by who forwarded them.

use std::{
    collections::HashMap,
    net::IpAddr,
    ops::{Add, AddAssign, Sub},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice, checksum::Sum16BitWords,
};
use fastswan_testkit::{capture::Capture, site::Site};

use super::tunnels::{CLIENT, FAST_MAC, TUNNELS, Tunnel};

/// The client's TTL less the gateway.
const TTL_AT_PEER: u8 = 63;

/// Frames to the host behind a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    /// That the client sent.
    pub(super) sent: u64,
    /// That the XDP program forwarded.
    pub(super) fast: u64,
    /// That the gateway's kernel forwarded.
    pub(super) kernel: u64,
    /// That arrived with a wrong checksum or TTL, whoever forwarded them.
    pub(super) damaged: u64,
}

impl Count {
    /// Sent and not received in good order. Less than 0 if frames arrived that nobody sent, or twice.
    pub(super) fn lost(self) -> i64 {
        self.sent.cast_signed() - (self.fast + self.kernel).cast_signed()
    }
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            fast: self.fast + other.fast,
            kernel: self.kernel + other.kernel,
            damaged: self.damaged + other.damaged,
        }
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Count {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            fast: self.fast - before.fast,
            kernel: self.kernel - before.kernel,
            damaged: self.damaged - before.damaged,
        }
    }
}

/// By the tunnel's host behind the peer.
type Counts = HashMap<IpAddr, Count>;

/// Two threads that count, one at either end.
#[derive(Debug)]
pub(super) struct Tally {
    counts: Arc<Mutex<Counts>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
}

impl Tally {
    pub(super) fn start(site: &Site) -> std::io::Result<Self> {
        let counts = Arc::new(Mutex::new(Counts::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let threads = [(Capture::open(&site.client)?, true), (Capture::open(&site.peer)?, false)];
        let threads = threads.map(|(capture, at_client)| {
            let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
            thread::spawn(move || follow(capture, at_client, &counts, &stop))
        });
        Ok(Self { counts, stop, threads: threads.into() })
    }

    pub(super) fn of(&self, tunnel: Tunnel) -> Count {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(&tunnel.host()).copied().unwrap_or_default()
    }

    pub(super) fn total(&self) -> Count {
        TUNNELS.into_iter().map(|tunnel| self.of(tunnel)).fold(Count::default(), Add::add)
    }

    pub(super) fn stop(mut self) -> std::io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    }
}

fn follow(
    mut capture: Capture,
    at_client: bool,
    counts: &Mutex<Counts>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let Some(captured) = capture.next(Duration::from_millis(100))? else { continue };
        let passed_by = if at_client { captured.sent } else { captured.received };
        let Some(packet) = read(captured.frame).filter(|_| passed_by) else { continue };
        let count = if at_client {
            Count { sent: 1, ..Count::default() }
        } else if !packet.intact {
            Count { damaged: 1, ..Count::default() }
        } else if packet.fast {
            Count { fast: 1, ..Count::default() }
        } else {
            Count { kernel: 1, ..Count::default() }
        };
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(packet.destination).or_default() += count;
    }
    Ok(())
}

/// A packet of the client's.
struct Packet {
    destination: IpAddr,
    fast: bool,
    intact: bool,
}

/// Reads a frame; `None` if it is not the client's to a host behind the peer.
fn read(frame: &[u8]) -> Option<Packet> {
    let (ethernet, rest) = Ethernet2Header::from_slice(frame).ok()?;
    let (source, destination, protocol, ttl, upper) = match ethernet.ether_type {
        EtherType::IPV4 => {
            let header = Ipv4HeaderSlice::from_slice(rest).ok()?;
            let upper = rest.get(header.slice().len()..usize::from(header.total_len()))?;
            let right = header.header_checksum() == header.to_header().calc_header_checksum();
            // A wrong header is a TTL that no packet has.
            let ttl = if right { header.ttl() } else { 0 };
            let addresses = (header.source_addr().into(), header.destination_addr().into());
            (addresses.0, addresses.1, header.protocol(), ttl, upper)
        }
        EtherType::IPV6 => {
            let header = Ipv6HeaderSlice::from_slice(rest).ok()?;
            let upper = rest.get(40..40 + usize::from(header.payload_length()))?;
            let addresses = (header.source_addr().into(), header.destination_addr().into());
            (addresses.0, addresses.1, header.next_header(), header.hop_limit(), upper)
        }
        _ => return None,
    };
    let from_client = source == CLIENT.0 || source == CLIENT.1;
    let to_tunnel = TUNNELS.into_iter().any(|tunnel| tunnel.host() == destination);
    (from_client && to_tunnel).then(|| Packet {
        destination,
        fast: ethernet.source == FAST_MAC.0,
        intact: ttl == TTL_AT_PEER && checksum(source, destination, protocol, upper) == 0,
    })
}

/// The checksum over an upper layer with its own checksum field: 0 if that is right (RFC 1071).
fn checksum(source: IpAddr, destination: IpAddr, protocol: IpNumber, upper: &[u8]) -> u16 {
    let length = u32::try_from(upper.len()).unwrap_or(u32::MAX);
    let sum = Sum16BitWords::new();
    let sum = match (source, destination) {
        _ if protocol == IpNumber::ICMP => sum,
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            sum.add_slice(&source.octets()).add_slice(&destination.octets())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            sum.add_slice(&source.octets()).add_slice(&destination.octets())
        }
        _ => return u16::MAX,
    };
    let pseudo = if protocol == IpNumber::ICMP { 0 } else { length + u32::from(protocol.0) };
    sum.add_slice(&pseudo.to_be_bytes()).add_slice(upper).ones_complement()
}
