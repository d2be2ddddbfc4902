//! Numbered frames from the client to the networks of policies, and how each has arrived.

use std::{
    io::Write as _,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use fastswan::policy::MacAddr;

use super::kernel::destination;
use crate::{
    capture::Capture,
    frames::Frame,
    lab::wire,
    site::{CLIENT, LAN, Site},
};

/// What the XDP program writes as source address, and the kernel does not.
pub(super) const FAST: MacAddr = MacAddr([2, 0, 0, 0, 0xfa, 0x57]);

/// So many frames are sent, then nothing for so long.
const BURST: u32 = 8;
const PERIOD: Duration = Duration::from_millis(1);
/// Once nothing more is sent, a frame that has not arrived for so long is lost.
const SILENCE: Duration = Duration::from_secs(1);
/// Numbers of one policy's frames lie far from each other, and all policies have about as many.
const SPREAD: u32 = 0x9e37_79b1;
/// What a frame begins with that the client has sent: its type, after the addresses, and where its ports are.
const IPV4: [u8; 2] = [8, 0];
const PORTS: Range<usize> = 34..38;

/// Frames that are sent all the time.
pub(super) struct Traffic {
    policies: u32,
    stop: Stop,
    sent: Arc<AtomicU32>,
    arrivals: Arc<Mutex<Arrivals>>,
    sender: JoinHandle<anyhow::Result<()>>,
    witness: JoinHandle<anyhow::Result<()>>,
}

/// Stops the traffic when it is dropped.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How many frames have arrived, by who forwarded them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrived {
    pub(super) fast: u64,
    pub(super) kernel: u64,
}

#[derive(Debug, Default)]
struct Arrivals {
    /// By number of the frame.
    frames: Vec<Option<Arrival>>,
    arrived: Arrived,
    /// Frames that had arrived before.
    again: u64,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: Instant,
    is_fast: bool,
}

/// What became of all frames.
pub(super) struct Tally {
    policies: u32,
    /// Frames that were sent.
    pub(super) sent: u32,
    arrivals: Arrivals,
}

impl Traffic {
    /// Begins to send to networks of so many policies.
    pub(super) fn start(site: &Site, policies: u32) -> anyhow::Result<Self> {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let arrivals = Arc::new(Mutex::new(Arrivals::default()));
        let capture = Capture::at(&site.peer, "eth0")?;
        let witness = {
            let (stop, arrivals) = (Arc::clone(&stop), Arc::clone(&arrivals));
            thread::spawn(move || look(capture, &stop, &arrivals))
        };
        let wire = site.client.enter(|| wire("eth0"))?;
        let sender = {
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            thread::spawn(move || send(wire, policies, &stop, &sent))
        };
        Ok(Self { policies, stop: Stop(stop), sent, arrivals, sender, witness })
    }

    /// How many frames were sent.
    pub(super) fn sent(&self) -> u32 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(super) fn arrived(&self) -> Arrived {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).arrived
    }

    /// Always true, unless nothing is sent or looked at any longer: then it is an error.
    pub(super) fn check(&self) -> anyhow::Result<bool> {
        if self.sender.is_finished() || self.witness.is_finished() {
            bail!("the traffic has ended");
        }
        Ok(true)
    }

    /// Sends no more, and waits until everything has arrived.
    pub(super) fn stop(self) -> anyhow::Result<Tally> {
        drop(self.stop);
        for thread in [self.sender, self.witness] {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.sent.load(Ordering::Relaxed);
        ensure!(arrivals.frames.len() <= sent as usize, "frames have arrived that were not sent");
        Ok(Tally { policies: self.policies, sent, arrivals: std::mem::take(&mut arrivals) })
    }
}

impl Tally {
    pub(super) fn arrived(&self) -> Arrived {
        self.arrivals.arrived
    }

    /// Frames that have not arrived.
    pub(super) fn lost(&self) -> u64 {
        let arrived = self.arrivals.frames.iter().flatten().count();
        u64::from(self.sent) - arrived as u64
    }

    /// Frames that came once more after they had arrived.
    pub(super) fn again(&self) -> u64 {
        self.arrivals.again
    }

    /// Frames with these numbers that the kernel has forwarded, of policies that are asked for by number.
    pub(super) fn passed(&self, numbers: Range<u32>, of: impl Fn(u32) -> bool) -> u64 {
        let passed = self.arrivals(numbers).filter(|(policy, arrival)| !arrival.is_fast && of(*policy));
        passed.count() as u64
    }

    /// When the last fast frame has arrived of policies that are asked for by number.
    pub(super) fn last_fast(&self, of: impl Fn(u32) -> bool) -> Option<Instant> {
        let fast = self.arrivals(0..self.sent).filter(|(policy, arrival)| arrival.is_fast && of(*policy));
        fast.map(|(_, arrival)| arrival.at).max()
    }

    /// Those of frames with these numbers, each with the number of its policy.
    fn arrivals(&self, numbers: Range<u32>) -> impl Iterator<Item = (u32, Arrival)> {
        numbers.filter_map(|number| {
            let arrival = *self.arrivals.frames.get(number as usize)?;
            Some((policy(number, self.policies), arrival?))
        })
    }
}

/// The policy that a frame is for.
fn policy(number: u32, policies: u32) -> u32 {
    number.wrapping_mul(SPREAD) % policies
}

/// Sends until it is told to stop.
fn send(mut wire: std::fs::File, policies: u32, stop: &AtomicBool, sent: &AtomicU32) -> anyhow::Result<()> {
    let mut number = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let frame = frame(number, policies);
            // A device that has no room has not taken it.
            while let Err(error) = wire.write_all(&frame) {
                ensure!(error.raw_os_error() == Some(libc::ENOBUFS), "sending a frame: {error}");
                thread::sleep(PERIOD);
            }
            number += 1;
            sent.store(number, Ordering::Relaxed);
        }
        thread::sleep(PERIOD);
    }
    Ok(())
}

/// The frame with a number, which is in its ports.
fn frame(number: u32, policies: u32) -> Vec<u8> {
    let [first, second, third, fourth] = number.to_be_bytes();
    let to = destination(policy(number, policies)).to_string();
    let frame = Frame::v4("10.1.0.5", &to).macs(CLIENT, LAN).payload(64);
    frame.udp(u16::from_be_bytes([first, second]), u16::from_be_bytes([third, fourth])).build()
}

/// Looks at what arrives, until nothing does any longer.
fn look(mut capture: Capture, stop: &AtomicBool, arrivals: &Mutex<Arrivals>) -> anyhow::Result<()> {
    loop {
        let Some(captured) = capture.next(SILENCE)? else {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            continue;
        };
        let at = Instant::now();
        let (frame, is_received) = (captured.frame, captured.received);
        let ports = frame.get(PORTS).and_then(|ports| ports.first_chunk().copied());
        let Some(number) = ports.map(u32::from_be_bytes) else { continue };
        if !is_received || frame.get(12..14) != Some(&IPV4) {
            continue;
        }
        let is_fast = frame[6..12] == FAST.0;
        let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.note(number as usize, Arrival { at, is_fast });
    }
}

impl Arrivals {
    fn note(&mut self, number: usize, arrival: Arrival) {
        if self.frames.len() <= number {
            self.frames.resize(number + 1, None);
        }
        if self.frames[number].replace(arrival).is_some() {
            self.again += 1;
        } else if arrival.is_fast {
            self.arrived.fast += 1;
        } else {
            self.arrived.kernel += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn frames_tell_their_number_and_all_policies_have_some() {
        let policies = 400;
        let mut of_policies: HashMap<u32, u32> = HashMap::new();
        for number in 0..policies * 4 {
            let frame = frame(number, policies);
            assert_eq!(frame[PORTS], number.to_be_bytes());
            assert_eq!(frame[12..14], IPV4);
            let policy = policy(number, policies);
            assert_eq!(frame[30..34], destination(policy).octets());
            *of_policies.entry(policy).or_default() += 1;
        }
        assert_eq!(of_policies.len(), policies as usize);
        assert!(of_policies.values().all(|frames| (1..16).contains(frames)));
    }

    #[test]
    fn what_has_not_arrived_is_lost_and_what_comes_twice_is_told() {
        let mut arrivals = Arrivals::default();
        let at = Instant::now();
        for (number, is_fast) in [(0, true), (3, false), (0, true), (2, true)] {
            arrivals.note(number, Arrival { at, is_fast });
        }
        let tally = Tally { policies: 2, sent: 6, arrivals };
        assert_eq!((tally.lost(), tally.again()), (3, 1));
        assert_eq!((tally.arrived().fast, tally.arrived().kernel), (2, 1));
        assert_eq!((tally.passed(0..6, |_| true), tally.passed(0..3, |_| true)), (1, 0));
        let of_the_third = policy(3, 2);
        assert_eq!(tally.passed(0..6, |policy| policy != of_the_third), 0);
        assert_eq!(tally.last_fast(|_| true), Some(at));
        assert_eq!(tally.last_fast(|_| false), None);
    }
}
