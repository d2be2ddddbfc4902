//! Churn: a host with a full table of routes that change all the time, and how a gateway follows.
//!
//! On a [`Site`] the gateway's kernel is given many routes that concern no policy. A [`Gateway`](fastswan::Gateway) with the
//! real host source and the real table, on a thread of its own, has policies whose networks and far ends are reached by the
//! default route, and the program is run on their packets. What is measured:
//!
//! 1. how long the first reading takes, and what memory it needs;
//! 2. how many packets are fast while routes and neighbours change that concern no policy;
//! 3. meanwhile: how long it takes until a route that leads an address of a policy elsewhere is followed, and until the
//!    address is fast again when that route is gone;
//! 4. how long it takes until all policies have followed when the default route goes and comes back.
//!
//! Times are from the kernel's acknowledgement to what the program does. A packet that is still fast when the lease should
//! have ended is wrong; all else is a matter of the machine.

mod kernel;
mod mirror;
mod probe;
mod report;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use fastswan::{XdpForwarder, table::TableConfig};
use ipnet::{IpNet, Ipv4Net};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::sync::oneshot;

pub use self::report::Report;
use self::{
    kernel::{Churner, Devices, Kernel, Route},
    mirror::destination,
    probe::Probe,
    report::Spread,
};
use crate::{lab::LabError, site::Site};

/// Changes in a second that concern no policy.
const ROUTE_CHANGES: u32 = 1000;
const NEIGHBOUR_CHANGES: u32 = 200;
/// They are made a few at a time.
const PERIOD: Duration = Duration::from_millis(10);
/// From one change that concerns a policy to the next, and from one packet to the next, while there is churn.
const CONCERNING: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_millis(1);
/// The first policies are those whose addresses are led elsewhere; packets of the others are looked at meanwhile.
const LED_ELSEWHERE: u32 = 64;
/// Policies that are looked at, at random, when the default route goes and comes back, and how often it does.
const SAMPLE: usize = 64;
const FLAPS: usize = 10;
/// The default route is there again for so long before it goes again.
const BETWEEN_FLAPS: Duration = Duration::from_millis(300);

/// A run to be.
#[derive(Clone, Debug)]
pub struct Churn {
    seed: u64,
    routes: u32,
    policies: u32,
    time: Duration,
}

impl Churn {
    /// The fewest policies: some are led elsewhere, others are not.
    pub const FEWEST_POLICIES: u32 = 2 * LED_ELSEWHERE;

    /// So many routes, and churn for so long under so many policies.
    ///
    /// # Panics
    ///
    /// With fewer policies than [`Self::FEWEST_POLICIES`], or without routes.
    #[must_use]
    pub fn new(seed: u64, routes: u32, policies: u32, time: Duration) -> Self {
        assert!(routes > 0 && policies >= Self::FEWEST_POLICIES);
        Self { seed, routes, policies, time }
    }

    /// Makes a site, and measures. Needs root.
    ///
    /// # Errors
    ///
    /// If the site cannot be made, the kernel refuses a change, or the gateway fails or does not follow at all.
    pub fn run(&self) -> anyhow::Result<Report> {
        let site = site()?;
        site.gateway.enter(|| self.run_on(&site)).with_context(|| format!("seed {}", self.seed))
    }

    /// Takes a thread that is on the gateway.
    fn run_on(&self, site: &Site) -> anyhow::Result<Report> {
        let devices = Devices { lan: site.gateway.ifindex("lan0")?, out: site.gateway.ifindex("out0")? };
        let mut kernel = Kernel::open(devices)?;
        kernel.add_routes(self.routes)?;
        let config = TableConfig {
            cells_v4: self.policies.max(1024) * 2,
            slots: self.policies,
            ..TableConfig::default()
        };
        let (forwarder, table) = XdpForwarder::load(&config)?;
        let (beginning, begun) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        thread::scope(|scope| {
            let mirror = scope.spawn(move || {
                site.gateway.join_this_thread()?;
                mirror::run(table, (self.policies, devices.out), "lan0", &beginning, stopped)
            });
            let probe = Probe { forwarder: &forwarder, port: devices.lan };
            let measured = begun.recv().context("the gateway did not begin").and_then(|begun| {
                let mut report = Report::new(self.seed, self.routes, self.policies, begun);
                probe.wait(&self.sample(&mut self.rng(0)), true, Instant::now())?;
                self.churn(site, &mut kernel, probe, &mut report)?;
                self.flap(&mut kernel, probe, &mut report)?;
                Ok(report)
            });
            let _ = stop.send(());
            // Whatever has failed first is the reason.
            let status = joined(mirror)?;
            let mut report = measured?;
            report.finish(status);
            Ok(report)
        })
    }

    /// Changes what concerns no policy, and now and then what does.
    fn churn(
        &self,
        site: &Site,
        kernel: &mut Kernel,
        probe: Probe<'_>,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let is_over = AtomicBool::new(false);
        let devices = kernel.devices();
        thread::scope(|scope| {
            let changing = scope.spawn(|| {
                site.gateway.join_this_thread()?;
                change_others(Churner::new(Kernel::open(devices)?, self.routes, self.rng(1)), &is_over)
            });
            let looking = scope.spawn(|| {
                site.gateway.join_this_thread()?;
                self.look(probe, &is_over)
            });
            let led = self.lead_elsewhere(kernel, probe, report);
            is_over.store(true, Ordering::Relaxed);
            let (changed, looked) = (joined(changing), joined(looking));
            led?;
            (report.route_changes, report.neighbour_changes, report.churned) = changed?;
            (report.looks, report.fast) = looked?;
            Ok(())
        })
    }

    /// Looks at packets of policies that nothing concerns: how many, and how many of them are fast.
    fn look(&self, probe: Probe<'_>, is_over: &AtomicBool) -> anyhow::Result<(u64, u64)> {
        let mut rng = self.rng(2);
        let (mut looks, mut fast) = (0, 0);
        while !is_over.load(Ordering::Relaxed) {
            looks += 1;
            fast += u64::from(probe.is_fast(rng.random_range(LED_ELSEWHERE..self.policies))?);
            thread::sleep(LOOK);
        }
        Ok((looks, fast))
    }

    /// Leads addresses of policies elsewhere, and back, as long as there is churn.
    fn lead_elsewhere(
        &self,
        kernel: &mut Kernel,
        probe: Probe<'_>,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut rng = self.rng(3);
        let (mut away, mut back) = (Vec::new(), Vec::new());
        while begin.elapsed() < self.time {
            let policy = rng.random_range(0..LED_ELSEWHERE);
            let address = destination(policy);
            let route = Route {
                destination: IpNet::V4(Ipv4Net::new_assert(address, 32)),
                device: kernel.devices().lan,
                gateway: IpAddr::V4(Ipv4Addr::new(10, 1, 0, 5)),
            };
            let followed = probe.wait(&[policy], false, kernel.add(&route)?)?;
            report.late += u64::from(followed.is_late()?);
            away.push(followed.took);
            thread::sleep(CONCERNING / 2);
            back.push(probe.wait(&[policy], true, kernel.delete(&route)?)?.took);
            thread::sleep(CONCERNING / 2);
        }
        (report.followed, report.fast_again) = (Spread::of(away), Spread::of(back));
        Ok(())
    }

    /// Takes the default route away and puts it back, some times.
    fn flap(&self, kernel: &mut Kernel, probe: Probe<'_>, report: &mut Report) -> anyhow::Result<()> {
        let route = Route {
            destination: IpNet::V4(Ipv4Net::default()),
            device: kernel.devices().out,
            gateway: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
        };
        let mut rng = self.rng(4);
        let (mut away, mut back) = (Vec::new(), Vec::new());
        for _ in 0..FLAPS {
            let sample = self.sample(&mut rng);
            ensure!(probe.is_fast(sample[0])?, "packets are not fast before the default route goes");
            let followed = probe.wait(&sample, false, kernel.delete(&route)?)?;
            report.late += u64::from(followed.is_late()?);
            away.push(followed.took);
            thread::sleep(BETWEEN_FLAPS);
            back.push(probe.wait(&sample, true, kernel.add(&route)?)?.took);
            thread::sleep(BETWEEN_FLAPS);
        }
        (report.flap_away, report.flap_back) = (Spread::of(away), Spread::of(back));
        Ok(())
    }

    /// Policies at random.
    fn sample(&self, rng: &mut StdRng) -> Vec<u32> {
        (0..SAMPLE).map(|_| rng.random_range(0..self.policies)).collect()
    }

    /// For one purpose of several.
    fn rng(&self, purpose: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed.wrapping_add(purpose))
    }
}

/// Changes routes and neighbours that concern no policy: how many, and for how long.
fn change_others(mut churner: Churner, is_over: &AtomicBool) -> anyhow::Result<(u64, u64, Duration)> {
    let begin = Instant::now();
    let due = |rate: u32| u64::from(rate) * u64::try_from(begin.elapsed().as_millis()).unwrap_or(0) / 1000;
    let (mut routes, mut neighbours) = (0, 0);
    while !is_over.load(Ordering::Relaxed) {
        while routes < due(ROUTE_CHANGES) {
            churner.change_route()?;
            routes += 1;
        }
        while neighbours < due(NEIGHBOUR_CHANGES) {
            churner.change_neighbour()?;
            neighbours += 1;
        }
        thread::sleep(PERIOD);
    }
    Ok((routes, neighbours, begin.elapsed()))
}

/// The site, whose gateway reaches all networks of policies and all far ends by the default route.
fn site() -> Result<Site, LabError> {
    let site = Site::new()?;
    site.gateway.forward()?;
    site.gateway.ip("route add default via 192.0.2.2 proto static")?;
    Ok(site)
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
