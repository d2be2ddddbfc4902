//! What a run has measured.

use std::{collections::BTreeMap, fmt, time::Duration};

use fastswan::gateway::Status;
use serde_json::{Value, json};

use super::mirror::Begun;

/// What is wanted.
const FAST_SHARE: f64 = 0.99;
const FIRST_READ: f64 = 3.0;
const BYTES_PER_ROUTE: f64 = 250.0;
const FOLLOWED_MS: f64 = 10.0;
const FLAP_MS: f64 = 50.0;

/// How often something was measured, and its median, 99th percentile and maximum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread {
    /// How often.
    pub count: usize,
    /// The median.
    pub p50: Duration,
    /// No more than this, in 99 of a hundred.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

/// What a run has measured.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What its changes can be repeated with, but not their timing.
    pub seed: u64,
    /// Routes that concern no policy.
    pub routes: u32,
    /// Policies.
    pub policies: u32,
    /// From the opening of the host source to its first snapshot.
    pub first_read: Duration,
    /// From the same moment until everything was in the table.
    pub synchronised: Duration,
    /// Bytes that the process grew by meanwhile, without the table's maps, for each route.
    pub bytes_per_route: f64,
    /// For how long there was churn.
    pub churned: Duration,
    /// Changes of routes that concern no policy.
    pub route_changes: u64,
    /// The same of neighbours.
    pub neighbour_changes: u64,
    /// Packets that were looked at meanwhile, and that should be fast.
    pub looks: u64,
    /// Those of them that were.
    pub fast: u64,
    /// Until an address was not fast any longer that a new route leads elsewhere.
    pub followed: Spread,
    /// Until it was fast again after that route was gone.
    pub fast_again: Spread,
    /// Until no policy was fast any longer without the default route.
    pub flap_away: Spread,
    /// Until all were fast again with it.
    pub flap_back: Spread,
    /// Packets that were still fast when the lease should have ended.
    pub late: u64,
    /// Renewals of the lease that came too late.
    pub lease_expiries: u64,
    /// Times that the host was read, by cause.
    pub host_resyncs: BTreeMap<&'static str, u64>,
    /// Packets that passed, by reason.
    pub passes: BTreeMap<&'static str, u64>,
}

impl Spread {
    pub(super) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |permille: usize| times.get((times.len() * permille / 1000).min(times.len() - 1));
        match times.last() {
            None => Self::default(),
            Some(&max) => Self {
                count: times.len(),
                p50: at(500).copied().unwrap_or(max),
                p99: at(990).copied().unwrap_or(max),
                max,
            },
        }
    }

    fn milliseconds(&self) -> [f64; 3] {
        [self.p50, self.p99, self.max].map(|time| time.as_secs_f64() * 1e3)
    }
}

impl Report {
    // Far below the numbers that a float does not hold.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn new(seed: u64, routes: u32, policies: u32, begun: Begun) -> Self {
        Self {
            seed,
            routes,
            policies,
            first_read: begun.first_read,
            synchronised: begun.synchronised,
            bytes_per_route: begun.grown as f64 / f64::from(routes),
            ..Self::default()
        }
    }

    pub(super) fn finish(&mut self, status: Status) {
        self.lease_expiries = status.statistics.lease_expiries;
        self.host_resyncs = status.statistics.host_resyncs;
        self.passes = status.passes;
        self.passes.retain(|_, packets| *packets > 0);
    }

    /// The share of packets that were fast while there was churn.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn fast_share(&self) -> f64 {
        self.fast as f64 / self.looks.max(1) as f64
    }

    /// What must not be on any machine.
    #[must_use]
    pub fn wrongs(&self) -> Vec<String> {
        let mut wrongs = Vec::new();
        if self.late > 0 {
            wrongs.push(format!("{} changes were followed later than the lease", self.late));
        }
        if self.lease_expiries > 0 {
            wrongs.push(format!("the lease ran out {} times", self.lease_expiries));
        }
        wrongs
    }

    /// Figures that are not as they should be.
    #[must_use]
    pub fn missed(&self) -> Vec<&'static str> {
        let [_, followed_p99, _] = self.followed.milliseconds();
        let flap = [self.flap_away, self.flap_back].map(|flap| flap.milliseconds()[2]);
        let goals = [
            ("first_read_seconds", self.first_read.as_secs_f64() <= FIRST_READ),
            ("bytes_per_route", self.bytes_per_route <= BYTES_PER_ROUTE),
            ("fast_share", self.fast_share() >= FAST_SHARE),
            ("followed_ms", followed_p99 <= FOLLOWED_MS),
            ("flap_away_ms", flap[0] <= FLAP_MS),
            ("flap_back_ms", flap[1] <= FLAP_MS),
            ("later_than_lease", self.late == 0),
            ("lease_expiries", self.lease_expiries == 0),
        ];
        goals.into_iter().filter(|(_, is_met)| !is_met).map(|(name, _)| name).collect()
    }

    /// All of it. Times of several changes are the median, the 99th percentile and the maximum.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "seed": self.seed,
            "routes": self.routes,
            "policies": self.policies,
            "first_read_seconds": self.first_read.as_secs_f64(),
            "synchronised_seconds": self.synchronised.as_secs_f64(),
            "bytes_per_route": self.bytes_per_route,
            "churn_seconds": self.churned.as_secs_f64(),
            "route_changes": self.route_changes,
            "neighbour_changes": self.neighbour_changes,
            "looks": self.looks,
            "fast_share": self.fast_share(),
            "followed": self.followed.count,
            "followed_ms": self.followed.milliseconds(),
            "fast_again_ms": self.fast_again.milliseconds(),
            "flaps": self.flap_away.count,
            "flap_away_ms": self.flap_away.milliseconds(),
            "flap_back_ms": self.flap_back.milliseconds(),
            "later_than_lease": self.late,
            "lease_expiries": self.lease_expiries,
            "host_resyncs": self.host_resyncs,
            "passes": self.passes,
            "missed": self.missed(),
            "ok": self.missed().is_empty(),
        })
    }
}

/// For people.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, figure: String, goal: &str| writeln!(f, "{what:<46} {figure:>26}  {goal}");
        let spread = |spread: &Spread| {
            let [p50, p99, max] = spread.milliseconds();
            format!("{p50:.2}, {p99:.2}, {max:.2}")
        };
        row("first read, s", format!("{:.2}", self.first_read.as_secs_f64()), "≤ 3")?;
        row("until all is in the table, s", format!("{:.2}", self.synchronised.as_secs_f64()), "")?;
        row("bytes per route", format!("{:.0}", self.bytes_per_route), "≤ 250")?;
        row("changes of routes", self.route_changes.to_string(), "")?;
        row("changes of neighbours", self.neighbour_changes.to_string(), "")?;
        row("fast share meanwhile", format!("{:.4}", self.fast_share()), "≥ 0.99")?;
        row("followed, ms: p50, p99, max", spread(&self.followed), "p99 ≤ 10")?;
        row("fast again, ms: p50, p99, max", spread(&self.fast_again), "")?;
        row("default route goes, ms: p50, p99, max", spread(&self.flap_away), "max ≤ 50")?;
        row("default route comes back, ms: p50, p99, max", spread(&self.flap_back), "max ≤ 50")?;
        row("followed later than the lease", self.late.to_string(), "0")?;
        row("lease expiries", self.lease_expiries.to_string(), "0")
    }
}
