//! Hears what the kernel tells, and looks whether packets of policies that are gone are still fast.
//!
//! A look counts only if it certainly began after the time that is allowed: the clock is read before the program runs.
//! What the program forwards, it forwards with the kill switch off and a valid lease. Each policy has an index of
//! its own, which the program's next hop names, so a policy that was added in its place is not taken for it.

use std::{
    collections::VecDeque,
    io,
    os::fd::AsRawFd as _,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fastswan::{
    PolicyEvent, Selector, XdpForwarder,
    forwarder::RunAction,
    netlink::{Content, decode},
};
use netlink_sys::{Socket, protocols::NETLINK_XFRM};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, NetlinkAddr, recvmsg, setsockopt, sockopt::RcvBufForce},
};

use super::{EXAMPLES, judge::frame, mirror::LEASE};
use crate::{prog_run::lease_tick, promote::named, xfrm::Group};

/// More than ever comes while this thread does not run.
const RECEIVE_BUFFER: usize = 256 << 20;
const POLEXPIRE: u16 = 0x1b;
/// Where a message about an expired policy has the policy's index.
const EXPIRED_INDEX: usize = 16 + 56 + 64 + 32 + 4;

/// A policy that is gone, or not offloaded any longer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) index: u32,
    pub(super) selector: Selector,
    /// When that was known, at the latest.
    pub(super) at: Instant,
}

/// What was heard and seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Testimony {
    /// The kernel's notifications.
    pub(super) events: u64,
    pub(super) looks: u64,
    /// Packets that were still fast.
    pub(super) late: u64,
    pub(super) examples: Vec<String>,
}

/// Hears the kernel, in the network namespace of the thread that makes it.
pub(super) struct Listener {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Listener {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_XFRM)?;
        setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
        socket.bind_auto()?;
        for group in [Group::Expire, Group::Sa, Group::Policy] {
            socket.add_membership(group as u32)?;
        }
        Ok(Self { socket, buffer: vec![0; 1 << 16] })
    }

    /// The next datagram, if there is one and the kernel sent it; empty if somebody else did.
    fn receive(&mut self) -> io::Result<Option<&[u8]>> {
        match recvmsg::<NetlinkAddr>(
            self.socket.as_raw_fd(),
            &mut [io::IoSliceMut::new(&mut self.buffer)],
            None,
            MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(message) => {
                let (length, sender) = (message.bytes, message.address.map_or(0, |address| address.pid()));
                Ok(Some(if sender == 0 { &self.buffer[..length] } else { &[] }))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Listens and looks until nobody tells of policies that are gone any longer, and says at once when a packet was still
/// fast. Takes a thread that is on the host.
pub(super) fn run(
    mut listener: Listener,
    forwarder: &XdpForwarder,
    ingress: u32,
    ended: &Receiver<Ended>,
    is_late: &AtomicBool,
) -> anyhow::Result<Testimony> {
    let mut testimony = Testimony::default();
    let allowed = LEASE + lease_tick()?;
    let mut queues = [VecDeque::new(), VecDeque::new()];
    let mut over = false;
    while !over || queues.iter().any(|queue| !queue.is_empty()) {
        while let Some(message) = listener.receive()? {
            if !message.is_empty() {
                testimony.events += 1;
                queues[0].extend(expired(message));
            }
        }
        loop {
            match ended.try_recv() {
                Ok(ended) => queues[1].push_back(ended),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    over = true;
                    break;
                }
            }
        }
        for queue in &mut queues {
            while let Some(ended) = queue.front().filter(|ended| ended.at.elapsed() > allowed) {
                testimony.look(forwarder, ingress, ended)?;
                queue.pop_front();
            }
        }
        is_late.store(testimony.late > 0, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(1));
    }
    Ok(testimony)
}

impl Testimony {
    fn look(&mut self, forwarder: &XdpForwarder, ingress: u32, ended: &Ended) -> anyhow::Result<()> {
        let frame = frame(&ended.selector, 0);
        let after = ended.at.elapsed();
        let run = forwarder.run(&frame, ingress)?;
        self.looks += 1;
        if run.action != RunAction::Pass && named(&run.frame) == Some(ended.index) {
            self.late += 1;
            if self.examples.len() < EXAMPLES {
                self.examples.push(format!(
                    "{} (index {}) is still fast {after:?} after its end",
                    ended.selector, ended.index
                ));
            }
        }
        Ok(())
    }
}

/// The policy that a notification says has expired.
fn expired(message: &[u8]) -> Option<Ended> {
    let at = Instant::now();
    let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    if kind != POLEXPIRE {
        return None;
    }
    let index = u32::from_ne_bytes(*message.get(EXPIRED_INDEX..)?.first_chunk()?);
    let messages = decode(&Bytes::copy_from_slice(message)).ok()?;
    messages.into_iter().find_map(|message| match message.content {
        Content::Event(PolicyEvent::PolicyRemoved(id)) => Some(Ended { index, selector: id.selector, at }),
        _ => None,
    })
}
