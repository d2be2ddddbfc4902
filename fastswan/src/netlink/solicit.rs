//! Has the kernel find neighbours, and hear from them again, as if it had a packet for each (`NTF_USE`).
//!
//! What it does then (`neigh_add`, `__neigh_update` and `__neigh_event_send` in 6.18, for IPv4 and IPv6 alike):
//!
//! - one that it does not know, or has failed to find (`FAILED`), it looks for: at most three requests to all, a second apart;
//! - one that it has not heard from for long (`STALE`) it asks itself, five seconds later, and forgets it if there is no answer;
//! - one that it knows it remembers as used;
//! - one that somebody has entered (`PERMANENT`, `extern_learn`, `managed`) becomes one of these, and what was entered is lost.
//!   So it is read first, and left alone.
//!
//! Nothing of it outlives this process: these are the entries that packets make, and they age like these. `NTF_MANAGED` would
//! have the kernel do all that by itself, and go on when this process is gone.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use futures::FutureExt as _;
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::{task::unconstrained, time::Instant};

use super::{
    anchor::{Anchor, Job},
    request::{RequestError, Requests},
    route::{NDA_DST, NEIGHBOUR_LENGTH, RTM_GETNEIGH, RTM_NEWNEIGH, system},
    wire::{attribute, attributes, octets, of_family, u16_at},
};
use crate::host::HostError;

const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

const NDA_FLAGS_EXT: u16 = 15;
const NTF_USE: u8 = 1;
const NTF_EXT_LEARNED: u8 = 0x10;
/// States that last until somebody ends them.
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;

/// From one warning to the next.
const BETWEEN_WARNINGS: Duration = Duration::from_secs(60);

/// Sends requests beside the loop, since they wait for RTNL, in the network namespace of an anchor.
#[derive(Debug, Default)]
pub(crate) struct Solicitor {
    /// The batch that is sent next: those that came before it, while one was being sent, will be asked for again.
    waiting: BTreeSet<(u32, IpAddr)>,
    /// The latest batch: what of it has failed.
    job: Option<Job<Vec<HostError>>>,
    failed: u64,
    warned: Option<Instant>,
}

impl Solicitor {
    /// Has these neighbours solicited soon.
    pub(crate) fn solicit(&mut self, neighbours: &[(u32, IpAddr)], anchor: &Anchor) {
        self.waiting = neighbours.iter().copied().collect();
        self.poll(anchor);
    }

    /// Takes up what became of the latest batch, and sends the next one.
    pub(crate) fn poll(&mut self, anchor: &Anchor) {
        if let Some(job) = &mut self.job {
            let Some(failures) = unconstrained(job).now_or_never() else { return };
            self.job = None;
            let failures = failures.unwrap_or_else(|error| vec![system("starting a thread", error)]);
            self.count(&failures);
        }
        if !self.waiting.is_empty() {
            let batch = std::mem::take(&mut self.waiting);
            self.job = Some(anchor.run("fastswan-host", move || solicit(batch)));
        }
    }

    /// How many requests have failed.
    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    fn count(&mut self, failures: &[HostError]) {
        self.failed += failures.len() as u64;
        let now = Instant::now();
        if let Some(error) = failures.first()
            && self.warned.is_none_or(|warned| now >= warned + BETWEEN_WARNINGS)
        {
            self.warned = Some(now);
            tracing::warn!(%error, failed = self.failed, "neighbours are left to the packets that pass");
        }
    }
}

/// Solicits neighbours one after the other, in the network namespace of this thread, and returns what has failed.
fn solicit(neighbours: BTreeSet<(u32, IpAddr)>) -> Vec<HostError> {
    let mut kernel = match Requests::open(NETLINK_ROUTE) {
        Ok(kernel) => kernel,
        Err(error) => return vec![system("opening a NETLINK_ROUTE socket", error)],
    };
    let failed = |(ifindex, address), error: RequestError| {
        system(&format!("soliciting the neighbour {address} of device {ifindex}"), error.into())
    };
    let results = neighbours
        .into_iter()
        .map(|neighbour| solicit_one(&mut kernel, neighbour).map_err(|error| failed(neighbour, error)));
    results.filter_map(Result::err).collect()
}

fn solicit_one(kernel: &mut Requests, (ifindex, address): (u32, IpAddr)) -> Result<(), RequestError> {
    let mut request = of_family(address.into(), NEIGHBOUR_LENGTH);
    request[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    request.extend(attribute(NDA_DST, &octets(address)));
    let mut is_automatic = true;
    let read = kernel.ask((RTM_GETNEIGH, 0, &request), |_, neighbour| {
        is_automatic = is_by_itself(neighbour);
        Ok(())
    });
    let flags = match read {
        Ok(()) if !is_automatic => return Ok(()),
        Ok(()) => 0,
        // One that somebody enters now stays as it is.
        Err(RequestError::Refused(libc::ENOENT)) => NLM_F_CREATE | NLM_F_EXCL,
        Err(error) => return Err(error),
    };
    request[10] = NTF_USE;
    match kernel.ask((RTM_NEWNEIGH, NLM_F_ACK | flags, &request), |_, _| Ok(())) {
        // It came or went just now, or its device did.
        Err(RequestError::Refused(libc::EEXIST | libc::ENOENT | libc::ENODEV)) => Ok(()),
        result => result,
    }
}

/// Whether the kernel has learnt of a neighbour and forgets it by itself.
fn is_by_itself(neighbour: &[u8]) -> bool {
    let is_lasting = u16_at(neighbour, 8).is_none_or(|state| state & (NUD_NOARP | NUD_PERMANENT) != 0);
    let is_foreign = neighbour.get(10).is_none_or(|flags| flags & NTF_EXT_LEARNED != 0)
        || attributes(neighbour, NEIGHBOUR_LENGTH).any(|(kind, _)| kind == NDA_FLAGS_EXT);
    !is_lasting && !is_foreign
}
