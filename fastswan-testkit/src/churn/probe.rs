//! Looks whether packets of policies are fast.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use fastswan::{XdpForwarder, forwarder::RunAction, gateway::DEFAULT_LEASE};

use super::mirror::destination;
use crate::{
    frames::Frame,
    prog_run::lease_tick,
    site::{CLIENT, LAN},
};

/// From one look to the next.
const LOOK: Duration = Duration::from_micros(100);
/// Nothing takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the program on packets that come in by a port.
#[derive(Clone, Copy)]
pub(super) struct Probe<'a> {
    pub(super) forwarder: &'a XdpForwarder,
    pub(super) port: u32,
}

/// How long it took until packets were what they should be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Followed {
    pub(super) took: Duration,
    /// When the last look began that found a packet which was not.
    pub(super) last_otherwise: Option<Duration>,
}

impl Probe<'_> {
    /// Whether a packet of the policy with this number is fast.
    pub(super) fn is_fast(&self, policy: u32) -> anyhow::Result<bool> {
        let frame = Frame::v4("10.1.0.5", &destination(policy).to_string());
        let frame = frame.udp(1000, 443).macs(CLIENT, LAN).ttl(64).payload(64).build();
        Ok(self.forwarder.run(&frame, self.port)?.action == RunAction::Redirect)
    }

    /// Waits until packets of all these policies are fast, or are not any longer.
    pub(super) fn wait(&self, policies: &[u32], fast: bool, since: Instant) -> anyhow::Result<Followed> {
        let mut last_otherwise = None;
        for policy in policies {
            loop {
                let asked = since.elapsed();
                if self.is_fast(*policy)? == fast {
                    break;
                }
                ensure!(
                    asked < PATIENCE,
                    "packets of policy {policy} are {} after {asked:?}",
                    if fast { "not fast" } else { "still fast" }
                );
                last_otherwise = Some(asked);
                thread::sleep(LOOK);
            }
        }
        Ok(Followed { took: since.elapsed(), last_otherwise })
    }
}

impl Followed {
    /// Whether it certainly took longer than the lease, by the clock that the program reads: it ticks that often.
    pub(super) fn is_late(&self) -> io::Result<bool> {
        let allowed = DEFAULT_LEASE + lease_tick()?;
        Ok(self.last_otherwise.is_some_and(|asked| asked > allowed))
    }
}
