//! Chaos: everything changes at once, as fast as the kernel takes it, and the mirror must not forward a packet wrong.
//!
//! On a host in namespaces of its own, policies and associations come, change and go in every way that the kernel
//! knows: by selector, by index, in batches, by flushes, by expiry, and with the device that they are offloaded to.
//! Bursts overrun the mirror's receive buffer, which is small. The mirror is the real one, on a thread of its own:
//! [`NetlinkSource`](fastswan::NetlinkSource), [`Gateway`](fastswan::Gateway) and
//! [`BpfTable`](fastswan::BpfTable). It has **diverged** if
//!
//! - the packets of a policy are still fast longer after the kernel has acknowledged its end than the shortest lease
//!   lasts (50 ms, and a tick of the clock that ends it);
//! - at a quiet point, when nothing changes for a moment, its database or what it knows of the host is not what the
//!   kernel has, or the program forwards a packet that a model says it must pass, or for another policy, or never
//!   forwards one that must be fast;
//! - with [`Chaos::change_host`]: a packet is still fast longer after something has come in its way (a blackhole, a rule, a
//!   filter, a device that is down) than the lease lasts, or 250 ms more where the kernel does not tell.
//!
//! No device here takes policies, and no association can be completed. So policies and larval associations whose reqid
//! is odd are said to be offloaded behind the source. Those on the device that is lost from time to time are
//! told to the source in the kernel's stead, and the kernel has none of them: as after a real loss.
//!
//! A seed repeats the changes, not their timing.

mod changes;
mod hindrance;
mod host;
mod judge;
mod kernel;
mod lag;
mod mirror;
mod offload;
mod report;
mod witness;

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fastswan::{XdpForwarder, forwarder::LoadConfig, table::TableConfig};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::mpsc::unbounded_channel;

pub use self::report::Report;
use self::{
    changes::World,
    host::{ADDRESS, ADDRESS_V6, Host, LOOSE_ADDRESS, LOOSE_PEER, PEER, PEER_V6},
    kernel::Kernel,
    witness::Listener,
};

/// Divergences of each kind that are described.
const EXAMPLES: usize = 3;
const TABLE: TableConfig = TableConfig { cells_v4: 16_384, cells_v6: 16_384, exceptions: 1024, slots: 2048 };

/// A run to be.
#[derive(Clone, Debug)]
pub struct Chaos {
    seed: u64,
    time: Duration,
    changes_host: bool,
    drops: Drops,
    ends_at_divergence: bool,
}

/// What the mirror is made to miss: one of so many.
#[derive(Clone, Copy, Debug, Default)]
struct Drops {
    removals: Option<u64>,
    host_changes: Option<u64>,
}

impl Chaos {
    /// Changes that depend on a seed, for so long.
    #[must_use]
    pub fn new(seed: u64, time: Duration) -> Self {
        Self { seed, time, changes_host: false, drops: Drops::default(), ends_at_divergence: false }
    }

    /// Changes the host as well: routes, rules, addresses, sysctls, filters, neighbours, devices.
    #[must_use]
    pub fn change_host(self) -> Self {
        Self { changes_host: true, ..self }
    }

    /// Makes the mirror miss one of so many removals of policies, which must be noticed.
    #[must_use]
    pub fn drop_removals(mut self, every: u64) -> Self {
        self.drops.removals = Some(every.max(1));
        self
    }

    /// Makes the mirror miss one of so many changes of the host, which must be noticed.
    #[must_use]
    pub fn drop_host_changes(mut self, every: u64) -> Self {
        self.drops.host_changes = Some(every.max(1));
        self
    }

    /// Ends as soon as a divergence has been seen: for a mirror that is broken on purpose.
    #[must_use]
    pub fn until_diverged(self) -> Self {
        Self { ends_at_divergence: true, ..self }
    }

    /// Makes chaos. Needs root.
    ///
    /// # Errors
    ///
    /// If the host cannot be made, the kernel refuses a change, or the mirror fails.
    pub fn run(&self) -> anyhow::Result<Report> {
        let host = Host::new()?;
        thread::scope(|scope| {
            let run = scope.spawn(|| {
                host.join_this_thread()?;
                self.run_on(&host)
            });
            joined(run)
        })
        .with_context(|| format!("seed {}", self.seed))
    }

    /// Takes a thread that is on the host.
    fn run_on(&self, host: &Host) -> anyhow::Result<Report> {
        // The kernel's routes would tell of what the mirror has missed.
        let (forwarder, table) = XdpForwarder::load(LoadConfig::new(TABLE).ask_back(0))?;
        let listener = Listener::open()?;
        let (asking, questions) = unbounded_channel();
        let (noting, notes) = mpsc::channel();
        let (ending, ended) = mpsc::channel();
        let begin = Instant::now();
        let mut report = Report::new(self.seed);
        let is_late = AtomicBool::new(false);
        thread::scope(|scope| {
            let (forwarder, is_late) = (&forwarder, &is_late);
            let mirror = scope.spawn(move || {
                host.join_this_thread()?;
                mirror::run(table, host, questions, &noting, self.drops)
            });
            let witness = scope.spawn(move || {
                host.join_this_thread()?;
                witness::run(listener, forwarder, host.ingress, &ended, is_late)
            });
            let kernel = Kernel::new(host, forwarder, asking, ending, notes);
            let made = kernel.and_then(|mut kernel| {
                let (mut world, mut rng) =
                    (World::new(host.loose).change_host(self.changes_host), StdRng::seed_from_u64(self.seed));
                let is_over = |report: &Report| {
                    let diverged = report.divergences > 0 || is_late.load(Ordering::Relaxed);
                    begin.elapsed() >= self.time || self.ends_at_divergence && diverged
                };
                loop {
                    for happening in world.settle(&mut rng) {
                        kernel.make(happening, &mut report)?;
                    }
                    kernel.be_quiet(&mut report)?;
                    if is_over(&report) {
                        break;
                    }
                    for happening in world.round(&mut rng) {
                        kernel.make(happening, &mut report)?;
                        if is_over(&report) {
                            // The world is at the end of the round: what it would have go is not what is in the way here.
                            kernel.relent(&[], &mut report)?;
                            break;
                        }
                    }
                }
                Ok(kernel.into_lags())
            });
            // Whatever has failed first is the reason.
            let life = joined(mirror);
            let testimony = joined(witness);
            let (life, mut lags, testimony) = (life?, made?, testimony?);
            report.finish(begin.elapsed(), &life, &mut lags, testimony);
            Ok(report)
        })
    }
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
