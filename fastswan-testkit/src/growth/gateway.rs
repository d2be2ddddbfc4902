//! A gateway with the real sources and the real table, on a thread of its own.

use std::{
    path::Path,
    sync::mpsc::{self, Sender},
    thread::{Scope, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, bail};
use fastswan::{
    Gateway, NetlinkHost, NetlinkSource, XdpForwarder,
    compiler::PolicyState,
    forwarder::{AttachConfig, ForwarderError},
    gateway::{GatewayError, GatewayHandle, Status},
    policy::NextHop,
    table::{TableConfig, Traffic},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
};

use super::{kernel::number, traffic::FAST, waiting::wait};
use crate::{
    promote::Promote,
    site::{PEER, Site},
};

/// A gateway that runs.
pub(super) struct Running<'scope> {
    handle: GatewayHandle,
    /// Stops it when it is dropped.
    stop: oneshot::Sender<()>,
    thread: ScopedJoinHandle<'scope, anyhow::Result<Ended>>,
    runtime: Runtime,
}

/// How a gateway has ended.
pub(super) enum Ended {
    /// Another one has taken over.
    Superseded,
    /// It was told to stop. What it did at the moment.
    Stopped(Look),
}

/// What a gateway does at one moment, in less memory than a status takes.
pub(super) struct Look {
    /// By number of the policy, up to the last that there is.
    pub(super) fast: Vec<bool>,
    pub(super) packets: Vec<u64>,
    /// How many policies there are, are fast, and pass for want of room.
    pub(super) policies: usize,
    pub(super) fast_policies: u64,
    pub(super) without_room: u64,
    pub(super) traffic: Traffic,
    pub(super) lease_expiries: u64,
    /// Why it has read all policies, and how often.
    pub(super) resyncs: Vec<(&'static str, u64)>,
}

impl<'scope> Running<'scope> {
    /// Begins to follow the kernel, with room for so many policies. It takes over from the one that runs already.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        (site, pins): (&'env Site, &'env Path),
        (room, lease): (u32, Duration),
    ) -> anyhow::Result<Self> {
        let (beginning, begun) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = scope.spawn(move || {
            site.gateway.join_this_thread()?;
            let device = site.gateway.ifindex("out0")?;
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(run(device, pins, (room, lease), &beginning, stopped))
        });
        let Ok(handle) = begun.recv() else {
            joined(thread)?;
            bail!("a gateway has ended before it began")
        };
        Ok(Self { handle, stop, thread, runtime: Builder::new_current_thread().build()? })
    }

    /// Waits until something is so. It is an error if the gateway ends before.
    pub(super) fn until(
        self,
        mut reached: impl FnMut(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Self> {
        let mut has_ended = false;
        wait(|| {
            has_ended = self.has_ended();
            Ok(has_ended || reached(&self)?)
        })?;
        if has_ended {
            self.end()?;
            bail!("a gateway has ended too early");
        }
        Ok(self)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// What it does now.
    pub(super) fn look(&self) -> anyhow::Result<Look> {
        Ok(Look::of(&self.runtime.block_on(self.handle.status())?))
    }

    /// Stops it, unless it has ended.
    pub(super) fn end(self) -> anyhow::Result<Ended> {
        drop(self.stop);
        joined(self.thread)
    }
}

/// Takes a thread that is on the gateway.
async fn run(
    device: u32,
    pins: &Path,
    (room, lease): (u32, Duration),
    beginning: &Sender<GatewayHandle>,
    stopped: oneshot::Receiver<()>,
) -> anyhow::Result<Ended> {
    let config = TableConfig { cells_v4: room.max(1024) * 2, cells_v6: 16, exceptions: 64, slots: room };
    let (forwarder, table) = XdpForwarder::load(&config)?;
    let next_hop = NextHop::Fixed { source: FAST, destination: PEER };
    let source = Promote::new(NetlinkSource::open()?, device, next_hop, |_| true);
    let mut gateway = Gateway::new(source, NetlinkHost::open()?, table)
        .with_lease(lease)
        .with_forwarder(forwarder, [AttachConfig::new("lan0").complete_frames(true)])?
        .pinned_in(pins);
    beginning.send(gateway.handle()).context("nobody waits for the gateway")?;
    match gateway.run_until(async { drop(stopped.await) }).await {
        Ok(()) => Ok(Ended::Stopped(Look::of(&gateway.status()))),
        Err(GatewayError::Forwarder(ForwarderError::Superseded { .. })) => Ok(Ended::Superseded),
        Err(error) => Err(error.into()),
    }
}

impl Look {
    fn of(status: &Status) -> Self {
        let last = status.policies.iter().filter_map(|policy| number(&policy.id)).max();
        let count = last.map_or(0, |last| last as usize + 1);
        let (mut fast, mut packets) = (vec![false; count], vec![0; count]);
        for policy in &status.policies {
            if let Some(number) = number(&policy.id) {
                fast[number as usize] = policy.state == PolicyState::Fast;
                packets[number as usize] = policy.traffic.packets;
            }
        }
        Self {
            fast,
            packets,
            policies: status.policies.len(),
            fast_policies: status.fast_policies(),
            without_room: status.totals.get("capacity").copied().unwrap_or(0),
            traffic: status.traffic(),
            lease_expiries: status.statistics.lease_expiries,
            resyncs: status.statistics.resyncs.iter().map(|(cause, times)| (*cause, *times)).collect(),
        }
    }
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
