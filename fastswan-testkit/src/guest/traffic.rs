//! Numbered packets between the hosts, in both directions, all the time.

use std::{
    collections::HashSet,
    net::{IpAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::Duration,
};

use anyhow::Context as _;

use super::gateways::Gateways;
use crate::lab::Namespace;

const PORT: u16 = 7000;
/// Between two packets of a direction. An emulated gateway with software ESP at one end carries more.
const PAUSE: Duration = Duration::from_millis(4);
/// How long packets may be under way.
const LAST: Duration = Duration::from_secs(2);
/// Lengths of packets' contents, in bytes.
const LENGTHS: [usize; 5] = [64, 1200, 8, 600, 1340];

/// Threads that send and receive.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    directions: [Direction; 2],
    phases: Vec<Phase>,
}

#[derive(Debug)]
struct Direction {
    /// Packets that were sent; the number of the next one.
    sent: Arc<AtomicU64>,
    arrived: Arc<AtomicU64>,
    sender: JoinHandle<anyhow::Result<()>>,
    receiver: JoinHandle<anyhow::Result<Arrived>>,
}

#[derive(Debug, Default)]
struct Arrived {
    numbers: HashSet<u64>,
    twice: u64,
}

/// Packets from a point in time on.
#[derive(Debug)]
struct Phase {
    first: [u64; 2],
    may_lose: bool,
}

/// What became of all packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Sent from a to b, and from b to a.
    pub sent: [u64; 2],
    /// Arrived of these.
    pub arrived: [u64; 2],
    /// Sent when none was to be lost, and did not arrive.
    pub lost: [u64; 2],
    /// Arrived more than once.
    pub twice: u64,
}

impl Traffic {
    /// Sends between the hosts' IPv4 addresses.
    ///
    /// # Errors
    ///
    /// If sockets are not to be had.
    pub fn start(gateways: &Gateways) -> anyhow::Result<Self> {
        Self::between([(&gateways.host_a, "10.1.0.5"), (&gateways.host_b, "10.2.0.9")])
    }

    /// Sends between two addresses.
    ///
    /// # Errors
    ///
    /// If sockets are not to be had.
    pub fn between(hosts: [(&Namespace, &str); 2]) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let [a, b] = hosts.map(|(_, address)| address.parse::<IpAddr>());
        let (a, b) = (a?, b?);
        let socket = |host: &Namespace, address| host.enter(|| UdpSocket::bind((address, PORT)));
        let at_a = socket(hosts[0].0, a).context("a socket of host a")?;
        let at_b = socket(hosts[1].0, b).context("a socket of host b")?;
        let directions = [direction(&at_a, &at_b, b, &stop)?, direction(&at_b, &at_a, a, &stop)?];
        Ok(Self { stop, directions, phases: Vec::new() })
    }

    /// From now on packets may be lost, as they would be without a mirror, or not any longer. If that is said first, it is
    /// about all from the beginning.
    pub fn may_lose(&mut self, may_lose: bool) {
        let first = if self.phases.is_empty() && may_lose { [0; 2] } else { self.sent() };
        self.phases.push(Phase { first, may_lose });
    }

    /// Packets that were sent so far, from a and from b.
    #[must_use]
    pub fn sent(&self) -> [u64; 2] {
        self.directions.each_ref().map(|direction| direction.sent.load(Ordering::Relaxed))
    }

    /// Packets that have arrived so far, at b and at a.
    #[must_use]
    pub fn arrived(&self) -> [u64; 2] {
        self.directions.each_ref().map(|direction| direction.arrived.load(Ordering::Relaxed))
    }

    /// Waits until so many more packets have been sent in both directions, whatever becomes of them.
    ///
    /// # Errors
    ///
    /// If they do not for a long time.
    pub fn wait_for_departures(&self, packets: u64) -> anyhow::Result<()> {
        let before = self.sent();
        super::wait_for("packets to be sent in both directions", || {
            self.sent().iter().zip(before).all(|(now, before)| *now >= before + packets)
        })
    }

    /// Waits until so many more packets have arrived in both directions.
    ///
    /// # Errors
    ///
    /// If they do not.
    pub fn wait_for_arrivals(&self, packets: u64) -> anyhow::Result<()> {
        let before = self.arrived();
        super::wait_for("packets to arrive in both directions", || {
            self.arrived().iter().zip(before).all(|(now, before)| *now >= before + packets)
        })
    }

    /// Stops sending, waits for what is under way, and counts.
    ///
    /// # Errors
    ///
    /// If sending or receiving failed.
    pub fn stop(self) -> anyhow::Result<Totals> {
        let sent = self.sent();
        self.stop.store(true, Ordering::Relaxed);
        let mut totals = Totals { sent, ..Totals::default() };
        for (number, direction) in self.directions.into_iter().enumerate() {
            direction.sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            let arrived =
                direction.receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            totals.sent[number] = direction.sent.load(Ordering::Relaxed);
            totals.arrived[number] = arrived.numbers.len() as u64;
            totals.twice += arrived.twice;
            let may_be_lost = |packet: u64| {
                let phase = self.phases.iter().rev().find(|phase| phase.first[number] <= packet);
                phase.is_some_and(|phase| phase.may_lose)
            };
            let lost = (0..totals.sent[number]).filter(|packet| !arrived.numbers.contains(packet));
            totals.lost[number] = lost.filter(|packet| !may_be_lost(*packet)).count() as u64;
        }
        Ok(totals)
    }
}

fn direction(
    from: &UdpSocket,
    to: &UdpSocket,
    address: IpAddr,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<Direction> {
    let (sent, arrived) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (sending, count, stop_sending) = (from.try_clone()?, Arc::clone(&sent), Arc::clone(stop));
    let sender = thread::spawn(move || {
        while !stop_sending.load(Ordering::Relaxed) {
            let number = count.load(Ordering::Relaxed);
            let length = LENGTHS[usize::try_from(number)? % LENGTHS.len()];
            let mut content = vec![0; length];
            content[..8].copy_from_slice(&number.to_be_bytes());
            // It counts as sent if it could not be: nobody has received it.
            let _ = sending.send_to(&content, (address, PORT));
            count.store(number + 1, Ordering::Relaxed);
            sleep(PAUSE);
        }
        Ok(())
    });
    let (receiving, count, stop) = (to.try_clone()?, Arc::clone(&arrived), Arc::clone(stop));
    receiving.set_read_timeout(Some(LAST))?;
    let receiver = thread::spawn(move || {
        let mut arrived = Arrived::default();
        let mut buffer = [0; 2048];
        loop {
            match receiving.recv(&mut buffer) {
                Ok(length) => {
                    let number = buffer[..length].first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
                    let is_new = number.is_some_and(|number| arrived.numbers.insert(number));
                    arrived.twice += u64::from(!is_new);
                    count.fetch_add(u64::from(is_new), Ordering::Relaxed);
                }
                // Nothing came for some time, or an ICMP error.
                Err(_) if stop.load(Ordering::Relaxed) => return Ok(arrived),
                Err(_) => {}
            }
        }
    });
    Ok(Direction { sent, arrived, sender, receiver })
}
