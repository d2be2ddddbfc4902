//! What a gateway does at one moment.

use std::{collections::BTreeMap, fmt, time::Duration};

use fastswan_ebpf::PassReason;

use super::lag::Lag;
use crate::{
    compiler::PolicyState,
    mirror::{HoldId, HoldTarget, InterfaceState, NeighbourCounts, Statistics},
    policy::PolicyId,
    table::{Asked, Room, Traffic},
};

/// What a gateway does, and why: [`GatewayHandle::status`](super::GatewayHandle::status).
///
/// Policies are looked at a few at a time while the gateway goes on, so each row is true of a moment of its own.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Status {
    /// Whether the fast path is on, and how fresh its inputs are.
    pub state: GatewayState,
    /// The packet-offloaded outbound policies, IPv4 first, ordered by identity.
    pub policies: Vec<PolicyStatus>,
    /// How many outbound policies are not packet-offloaded: their packets are the kernel's, and those of others that they match.
    pub software_policies: u64,
    /// Policies that were removed since the last status, once more.
    pub removed: Vec<RemovedPolicy>,
    /// What the policies forwarded that were removed and that there was no room to name.
    pub removed_unnamed: Traffic,
    /// How many policies are fast, or are not, by the name of the reason.
    pub totals: BTreeMap<&'static str, u64>,
    /// Packets that are counted as forwarded and did not leave all the same; `None` if that is not counted.
    pub lost: Option<u64>,
    /// What the kernel's own routes were asked, and how often they disagreed.
    pub asked: Asked,
    /// The neighbours whose Ethernet addresses policies depend on.
    pub neighbours: NeighbourCounts,
    /// Requests to find or to keep one that the host source could not make.
    pub failed_solicitations: u64,
    /// Packets that were passed to the kernel, by the name of the reason.
    pub passes: BTreeMap<&'static str, u64>,
    /// The interfaces that are followed, by name.
    pub interfaces: Vec<InterfaceStatus>,
    /// What is held.
    pub holds: Vec<(HoldId, HoldTarget)>,
    /// How full the table is: `slots`, and of each family `cells` and `exceptions`, as [`TableConfig`](crate::table::TableConfig)
    /// has them. What finds no room passes, and its policies' state says `capacity`.
    pub room: BTreeMap<&'static str, Room>,
    /// How long changes took.
    pub lag: Lag,
    /// What was met so far.
    pub statistics: Statistics,
}

/// A policy, and what it has forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PolicyStatus {
    /// The policy.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::text::text"))]
    pub id: PolicyId,
    /// Whether its packets are fast at the moment, or why not.
    pub state: PolicyState,
    /// What it has forwarded at XDP since it was added.
    pub traffic: Traffic,
}

/// A policy that was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RemovedPolicy {
    /// The policy.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::text::text"))]
    pub id: PolicyId,
    /// All that it has forwarded at XDP.
    pub traffic: Traffic,
}

/// An interface that is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// Its index, if it is there.
    pub ifindex: Option<u32>,
    /// Whether its packets may be fast.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub state: InterfaceState,
}

/// Whether anything can be fast: what [`StateWatch`](super::StateWatch) tells of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct GatewayState {
    /// The fast path is on.
    pub is_on: bool,
    /// The kill switch is on.
    pub is_killed: bool,
    /// The gateway has failed or was dropped: nothing is fast any longer.
    pub has_ended: bool,
    /// How fresh each input is, by name.
    pub inputs: BTreeMap<&'static str, Freshness>,
    /// What keeps all policies, or all of one family, from being fast.
    pub obstacles: Vec<String>,
    /// Hooks that fast packets skip, as the embedder allows.
    pub skipped_hooks: Vec<String>,
}

/// How fresh an input is, as others are told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Freshness {
    /// It has told nothing so far.
    Unknown,
    /// It has told everything, but not yet that there is nothing more.
    CatchingUp,
    /// It is followed.
    Current,
    /// What it has told may no longer be true, for this reason.
    Stale(&'static str),
}

impl Status {
    /// How many policies are fast.
    #[must_use]
    pub fn fast_policies(&self) -> u64 {
        self.totals.get("fast").copied().unwrap_or(0)
    }

    /// What all policies have forwarded, those that were removed since the last status included.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let removed = self.removed.iter().map(|policy| policy.traffic);
        let all = self.policies.iter().map(|policy| policy.traffic).chain(removed);
        all.fold(self.removed_unnamed, |sum, one| sum + one)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.state)?;
        for InterfaceStatus { name, state, .. } in &self.interfaces {
            writeln!(f, "interface {name}: {state}")?;
        }
        for PolicyStatus { id, state, traffic } in &self.policies {
            match state {
                PolicyState::Fast => write!(f, "fast")?,
                PolicyState::Pass(reason) => write!(f, "kernel ({})", reason.name())?,
            }
            writeln!(f, ": {id}: {traffic}")?;
        }
        if self.software_policies > 0 {
            writeln!(f, "outbound policies that are not packet-offloaded: {}", self.software_policies)?;
        }
        for RemovedPolicy { id, traffic } in &self.removed {
            writeln!(f, "removed: {id}: {traffic}")?;
        }
        for (reason, packets) in &self.passes {
            writeln!(f, "passed, {reason}: {packets} packets")?;
        }
        if let Some(lost) = self.lost.filter(|lost| *lost > 0) {
            writeln!(f, "lost on the way to their device: {lost} packets")?;
        }
        let Asked { asked, differs } = self.asked;
        if asked > 0 {
            writeln!(f, "the kernel's routes were asked about {asked} packets: {differs} differ")?;
        }
        let NeighbourCounts { resolved, unresolved } = self.neighbours;
        if resolved + unresolved > 0 {
            let asked = self.statistics.solicitations;
            write!(f, "neighbours: {resolved} resolved, {unresolved} not, asked for {asked} times")?;
            match self.failed_solicitations {
                0 => writeln!(f)?,
                failed => writeln!(f, ", {failed} requests failed")?,
            }
        }
        for (_, target) in &self.holds {
            writeln!(f, "held: {target}")?;
        }
        for (what, Room { used, limit }) in self.room.iter().filter(|(_, room)| room.used > 0) {
            writeln!(f, "{what}: {used} of {limit}")?;
        }
        let Statistics { resyncs, host_resyncs, lease_expiries, audit_repairs, times_shut, .. } =
            &self.statistics;
        for (what, causes) in [("policies", resyncs), ("host", host_resyncs)] {
            for (cause, snapshots) in causes {
                writeln!(f, "{what} read, {cause}: {snapshots}")?;
            }
        }
        for (what, times) in [
            ("lease expired", lease_expiries),
            ("repaired by audits", audit_repairs),
            ("shut by the guard", times_shut),
        ] {
            if *times > 0 {
                writeln!(f, "{what}: {times}")?;
            }
        }
        let Lag { writes, median, p99, max } = &self.lag;
        let [median, p99, max] = [median, p99, max].map(Duration::as_secs_f64).map(|seconds| seconds * 1e3);
        writeln!(f, "changes: {writes} writes, lag median {median:.1} ms, p99 {p99:.1} ms, max {max:.1} ms")
    }
}

impl fmt::Display for GatewayState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_on {
            f.write_str("the fast path is on")?;
        } else {
            f.write_str("the fast path is off")?;
            if self.has_ended {
                f.write_str(": the gateway has ended")?;
            } else if self.is_killed {
                f.write_str(": the kill switch is on")?;
            }
        }
        for (input, freshness) in &self.inputs {
            match freshness {
                Freshness::Current => {}
                Freshness::Unknown => write!(f, "; {input}: nothing was told so far")?,
                Freshness::CatchingUp => write!(f, "; {input}: catching up")?,
                Freshness::Stale(cause) => write!(f, "; {input}: read again ({cause})")?,
            }
        }
        for obstacle in &self.obstacles {
            write!(f, "; {obstacle}")?;
        }
        for hook in &self.skipped_hooks {
            write!(f, "; skipped, as allowed: {hook}")?;
        }
        Ok(())
    }
}

/// The state of a policy as its packets meet it: what is compiled as fast is so only if the fast path is on, a port leads
/// to it, and its device takes the packets.
pub(super) fn as_met(compiled: PolicyState, is_on: bool, has_ports: bool, is_reachable: bool) -> PolicyState {
    match compiled {
        PolicyState::Fast if !is_on => PolicyState::Pass(PassReason::Disabled),
        PolicyState::Fast if !has_ports => PolicyState::Pass(PassReason::UnknownPort),
        PolicyState::Fast if !is_reachable => PolicyState::Pass(PassReason::EgressUnavailable),
        other => other,
    }
}

/// The name that a state has in totals.
pub(super) fn name(state: PolicyState) -> &'static str {
    match state {
        PolicyState::Fast => "fast",
        PolicyState::Pass(reason) => reason.name(),
    }
}
