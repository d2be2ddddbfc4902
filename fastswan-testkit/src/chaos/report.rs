//! What a run found.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use super::{EXAMPLES, lag::Lags, mirror::Life, witness::Testimony};

/// The kernel's notifications that there must be in a second.
const EVENTS_PER_SECOND: f64 = 50_000.0 / 60.0;
/// Everything passes for less than this share of the time. That is much: each migration, each lost device and each overrun
/// takes a new snapshot, and there are some ten of them in a second; on a busy machine each takes longer.
const MOST_PASSED: f64 = 0.9;

/// What a run found.
#[derive(Clone, Debug)]
pub struct Report {
    /// What its changes can be repeated with.
    pub seed: u64,
    /// How long it took.
    pub time: Duration,
    /// What was asked of the kernel.
    pub changes: u64,
    /// What the kernel told.
    pub events: u64,
    /// Times that the mirror lost track since its receive buffer overran.
    pub overruns: u64,
    /// Times that the mirror read everything, by what made that necessary.
    pub resyncs: BTreeMap<&'static str, u64>,
    /// Times that the mirror read everything to compare.
    pub audits: u64,
    /// Policies and associations that were not as an audit found them.
    pub audit_repairs: u64,
    /// Times that the device was lost.
    pub lost_devices: u64,
    /// Policies that were moved to another far end.
    pub migrations: u64,
    /// Times that a device or the order of policies changed.
    pub host_changes: u64,
    /// Times that nothing changed and the mirror was judged.
    pub quiet_points: u64,
    /// Packets that were judged then.
    pub packets: u64,
    /// Those of them that were fast.
    pub fast_packets: u64,
    /// Times that packets of a policy that was gone were looked at.
    pub looks: u64,
    /// Times that packets were looked at while something on the host was in their way.
    pub host_looks: u64,
    /// Times that the mirror was wrong.
    pub divergences: u64,
    /// Some of them.
    pub examples: Vec<String>,
    /// The share of time for which everything passed: the kill switch was on, the lease was out, or something was being
    /// written.
    pub kill_switch_share: f64,
    /// Microseconds from the kernel's acknowledgement of a change to the write of the table, of which the 500th and the
    /// 990th of a thousand and the last. 0 if the table was written first.
    pub lag: [u64; 3],
}

impl Report {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            time: Duration::ZERO,
            changes: 0,
            events: 0,
            overruns: 0,
            resyncs: BTreeMap::new(),
            audits: 0,
            audit_repairs: 0,
            lost_devices: 0,
            migrations: 0,
            host_changes: 0,
            quiet_points: 0,
            packets: 0,
            fast_packets: 0,
            looks: 0,
            host_looks: 0,
            divergences: 0,
            examples: Vec::new(),
            kill_switch_share: 0.0,
            lag: [0; 3],
        }
    }

    pub(super) fn diverged(&mut self, example: String) {
        self.divergences += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(example);
        }
    }

    pub(super) fn finish(&mut self, time: Duration, life: &Life, lags: &mut Lags, testimony: Testimony) {
        self.time = time;
        self.kill_switch_share = life.passed.as_secs_f64() / time.as_secs_f64();
        self.lag = [500, 990, 1000].map(|permille| lags.permille(permille));
        self.overruns = lags.overruns;
        (self.audits, self.audit_repairs) = (lags.audits, life.audit_repairs);
        self.resyncs = std::mem::take(&mut lags.resyncs);
        self.events = testimony.events;
        self.looks = testimony.looks;
        self.divergences += testimony.late;
        self.examples.extend(testimony.examples);
    }

    /// The bounds that the run has broken.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn broken_bounds(&self) -> Vec<String> {
        let mut broken = Vec::new();
        if self.divergences > 0 {
            broken.push(format!("the mirror diverged {} times", self.divergences));
        }
        let least = self.time.as_secs_f64() * EVENTS_PER_SECOND;
        if (self.events as f64) < least {
            broken.push(format!("the kernel told {} events, fewer than {least:.0}", self.events));
        }
        if self.audit_repairs > 0 {
            broken.push(format!("audits repaired {} policies or associations", self.audit_repairs));
        }
        if self.audits == 0 {
            broken.push("no audit came to its end".to_owned());
        }
        if self.overruns == 0 {
            broken.push("the receive buffer never overran".to_owned());
        }
        if self.kill_switch_share >= MOST_PASSED {
            broken.push(format!("everything passed for {:.2} of the time", self.kill_switch_share));
        }
        // Else nothing was there to be wrong about.
        if self.fast_packets == 0 || self.looks == 0 {
            broken.push("no packet was fast, or none was looked at".to_owned());
        }
        broken
    }

    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let [p50, p99, max] = self.lag;
        json!({
            "seed": self.seed,
            "seconds": self.time.as_secs_f64(),
            "changes": self.changes,
            "events": self.events,
            "overruns": self.overruns,
            "resyncs": self.resyncs,
            "audits": self.audits,
            "audit_repairs": self.audit_repairs,
            "lost_devices": self.lost_devices,
            "migrations": self.migrations,
            "host_changes": self.host_changes,
            "quiet_points": self.quiet_points,
            "packets": self.packets,
            "fast_packets": self.fast_packets,
            "looks": self.looks,
            "host_looks": self.host_looks,
            "divergences": self.divergences,
            "examples": self.examples,
            "kill_switch_share": self.kill_switch_share,
            "lag": { "p50": p50, "p99": p99, "max": max },
        })
    }
}
