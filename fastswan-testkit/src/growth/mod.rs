//! Growth: a gateway whose table is too small for its policies is replaced by one with a larger table, under traffic.
//!
//! On a [`Site`] the gateway's kernel is given many outbound policies, and the client sends numbered frames to all of
//! them, all the time. Each arrives, either forwarded by the program or by the kernel, and the peer can tell which.
//!
//! 1. A [`Gateway`](fastswan::Gateway) with the real sources and the real table has room for some of the policies. The others pass,
//!    and its status says for want of room.
//! 2. Another one, with room for all, takes over from it. It is in the same process, on a thread of its own: that way both tables
//!    are in memory at the same time, and nothing ends but the first gateway.
//! 3. Half of the policies are deleted one by one, then the others all at once.
//!
//! What must not be on any machine: that a frame is lost or comes twice, that a policy is not fast in the end, or that the second
//! gateway has not counted what the first one has. Times and memory are a matter of the machine.

mod gateway;
mod kernel;
mod memory;
mod report;
mod traffic;
mod waiting;

use std::{
    path::{Path, PathBuf},
    thread::{self, Scope},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use self::{
    gateway::{Ended, Running},
    kernel::Kernel,
    traffic::{Arrived, Traffic},
    waiting::wait,
};
pub use self::{
    memory::Memory,
    report::{Deletion, Report},
};
use crate::{
    lab::{BpfFileSystem, LabError},
    site::Site,
};

/// Between two looks at the memory that is in use.
const LOOK_AT_MEMORY: Duration = Duration::from_millis(50);
/// Frames of each policy, on average, that are waited for where all policies are to have some, but no more than so many in all.
const FRAMES_PER_POLICY: u32 = 4;
const MOST_FRAMES: u32 = 50_000;

/// A run to be.
#[derive(Clone, Debug)]
pub struct Growth {
    policies: u32,
    room: u32,
    lease: Duration,
}

/// Where it takes place.
struct Lab {
    site: Site,
    pins: PathBuf,
    _file_system: BpfFileSystem,
}

impl Growth {
    /// The most policies: each has a network of its own.
    pub const MOST_POLICIES: u32 = 1 << 20;

    /// So many policies, and at first a table with room for some of them.
    ///
    /// # Panics
    ///
    /// Without room, with room for all, or with more than [`Self::MOST_POLICIES`].
    #[must_use]
    pub fn new(policies: u32, room: u32) -> Self {
        assert!(room > 0 && room < policies && policies <= Self::MOST_POLICIES);
        Self { policies, room, lease: fastswan::gateway::DEFAULT_LEASE }
    }

    /// Sets the lease of both gateways. With one that outlasts whatever keeps a machine busy, a frame that passes although its
    /// policy is fast passes for another reason.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Makes a site, and does all of it. Needs root.
    ///
    /// # Errors
    ///
    /// If the site cannot be made, the kernel refuses a change, or a gateway fails or does not begin at all.
    pub fn run(&self) -> anyhow::Result<Report> {
        let lab = Lab::new()?;
        let mut kernel = lab.site.gateway.enter(Kernel::open)?;
        let began = Instant::now();
        kernel.add(0..self.policies)?;
        let mut report = Report::new(self.policies, self.room, began.elapsed());
        report.memory_before = Memory::now()?;
        thread::scope(|scope| {
            let second = self.grow(scope, &lab, &mut report)?;
            self.delete(&lab, &mut kernel, second, &mut report)
        })?;
        Ok(report)
    }

    /// Has a gateway with a small table, and then one with a larger one that takes over from it.
    fn grow<'scope, 'env>(
        &self,
        scope: &'scope Scope<'scope, 'env>,
        lab: &'env Lab,
        report: &mut Report,
    ) -> anyhow::Result<Running<'scope>> {
        let traffic = Traffic::start(&lab.site, self.policies)?;
        let first = Running::start(scope, lab.place(), (self.room, self.lease))?;
        let first = first.until(|_| Ok(traffic.arrived().fast > 0)).context("the first gateway")?;
        // Frames that are fast now, for the second gateway to inherit.
        self.wait_for_frames(&traffic)?;
        report.memory_small = Memory::now()?;
        let small = first.look()?;
        report.small(&small);

        let (since, began) = (traffic.sent(), Instant::now());
        let second = Running::start(scope, lab.place(), (self.policies, self.lease))?;
        let (mut most, mut looked) = (Memory::now()?, Instant::now());
        let second = second.until(|_| {
            if looked.elapsed() > LOOK_AT_MEMORY {
                (most, looked) = (most.max(Memory::now()?), Instant::now());
            }
            Ok(first.has_ended())
        });
        let second = second.context("the second gateway")?;
        report.took_over = began.elapsed();
        report.memory_most = most;
        ensure!(matches!(first.end()?, Ended::Superseded), "the first gateway has ended by itself");
        report.memory_large = Memory::now()?;
        let large = second.look()?;
        let until = traffic.sent();
        report.large(&small, &large);
        self.wait_for_frames(&traffic)?;

        let tally = traffic.stop()?;
        report.traffic(&tally);
        report.forwarded = tally.arrived().fast;
        let was_fast = |policy: u32| small.fast.get(policy as usize) == Some(&true);
        report.slow_meanwhile = tally.passed(since..until, was_fast);
        report.slow_afterwards = tally.passed(until..tally.sent, |_| true);
        report.counted = second.look()?.traffic;
        Ok(second)
    }

    /// Deletes all policies, and ends the gateway.
    fn delete(
        &self,
        lab: &Lab,
        kernel: &mut Kernel,
        gateway: Running<'_>,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let traffic = Traffic::start(&lab.site, self.policies)?;
        self.wait_for_frames(&traffic)?;
        let half = self.policies / 2;
        let left = (self.policies - half) as usize;
        let one_by_one = Followed::of(&gateway, left, || kernel.delete(0..half)).context("deletions")?;
        let at_once = Followed::of(&gateway, 0, || kernel.flush()).context("a flush")?;
        // All of them have frames once more.
        self.wait_for_frames(&traffic)?;
        let tally = traffic.stop()?;
        report.one_by_one = one_by_one.deletion(tally.last_fast(|policy| policy < half));
        report.at_once = at_once.deletion(tally.last_fast(|policy| policy >= half));
        report.traffic(&tally);
        report.memory_after = Memory::now()?;
        let Ended::Stopped(look) = gateway.end()? else { bail!("another gateway has taken over") };
        report.ended(&look);
        Ok(())
    }

    /// Waits until each policy has had some more frames, if there are few policies.
    fn wait_for_frames(&self, traffic: &Traffic) -> anyhow::Result<()> {
        let enough = traffic.sent() + self.policies.saturating_mul(FRAMES_PER_POLICY).min(MOST_FRAMES);
        wait(|| {
            let Arrived { fast, kernel } = traffic.arrived();
            Ok(traffic.check()? && fast + kernel >= u64::from(enough))
        })
        .with_context(|| format!("{enough} frames of {} policies", self.policies))
    }
}

/// When policies were deleted, and when the gateway knew.
struct Followed {
    began: Instant,
    acknowledged: Instant,
    known: Instant,
}

impl Followed {
    /// Deletes policies, and waits until the gateway has no more than so many.
    fn of(
        gateway: &Running<'_>,
        left: usize,
        delete: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let began = Instant::now();
        delete()?;
        let acknowledged = Instant::now();
        wait(|| Ok(gateway.look()?.policies <= left))?;
        Ok(Self { began, acknowledged, known: Instant::now() })
    }

    /// The same as times, with that of their last fast frame.
    fn deletion(&self, last_fast: Option<Instant>) -> Deletion {
        let since = |moment: Instant| moment.saturating_duration_since(self.acknowledged);
        Deletion {
            took: self.acknowledged - self.began,
            fast_for: last_fast.map_or(Duration::ZERO, since),
            followed: since(self.known),
        }
    }
}

impl Lab {
    /// A site whose gateway reaches all networks of policies.
    fn new() -> Result<Self, LabError> {
        let (site, file_system) = (Site::new()?, BpfFileSystem::mount()?);
        site.gateway.forward()?;
        site.gateway.ip(&format!("route add {} via 192.0.2.2", kernel::NETWORKS))?;
        // Otherwise the kernel looks at all prefixes each time that it deletes a policy.
        site.gateway.ip("xfrm policy set hthresh4 16 24")?;
        Ok(Self { site, pins: file_system.path().join("growth"), _file_system: file_system })
    }

    /// Where gateways run, and where they pin.
    fn place(&self) -> (&Site, &Path) {
        (&self.site, &self.pins)
    }
}
