//! Looks at all policies, a few at a time, so that the loop goes on meanwhile.

use std::collections::BTreeMap;

use fastswan_ebpf::PassReason;
use tokio::sync::oneshot;

use super::{
    GatewayTable, PolicyStatus, Status,
    status::{as_met, name},
};
use crate::{
    compiler::{Cause, Explanation, Flow, Part},
    database::PolicyKey,
    mirror::{InterfaceState, Mirror},
    table::Forwarding,
};

/// Policies that are looked at in one turn of the loop; they take a few hundred microseconds.
const FEW: usize = 512;

/// A status that is being collected, and those who ask for it.
#[derive(Debug, Default)]
pub(super) struct Collection {
    under_way: Option<UnderWay>,
    /// Those who asked before it began.
    askers: Vec<oneshot::Sender<Status>>,
    /// Those who have asked since: the next one is theirs.
    waiting: Vec<oneshot::Sender<Status>>,
}

#[derive(Debug)]
struct UnderWay {
    next: PolicyKey,
    looked_at: LookedAt,
}

/// Policies that were looked at.
#[derive(Debug, Default)]
pub(super) struct LookedAt {
    pub(super) policies: Vec<PolicyStatus>,
    /// Outbound policies that are not packet-offloaded.
    pub(super) software: u64,
}

impl Collection {
    pub(super) fn ask(&mut self, asker: oneshot::Sender<Status>) {
        self.waiting.push(asker);
        self.begin();
    }

    /// Begins, unless one is under way.
    pub(super) fn begin(&mut self) {
        if self.under_way.is_none() {
            self.askers = std::mem::take(&mut self.waiting);
            self.under_way = Some(UnderWay { next: PolicyKey(0), looked_at: LookedAt::default() });
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Looks at a few policies more; all of them, if those were the last.
    pub(super) fn go_on(&mut self, mirror: &Mirror, table: &impl GatewayTable) -> Option<LookedAt> {
        let UnderWay { next, mut looked_at } = self.under_way.take()?;
        match looked_at.go_on(mirror, table, next, FEW) {
            Some(next) => {
                self.under_way = Some(UnderWay { next, looked_at });
                None
            }
            None => Some(looked_at),
        }
    }

    pub(super) fn is_asked_for(&self) -> bool {
        !self.askers.is_empty()
    }

    /// Answers those who asked; the next one begins if others have asked since.
    pub(super) fn answer(&mut self, status: Status) {
        let mut askers = std::mem::take(&mut self.askers);
        let last = askers.pop();
        for asker in askers {
            let _ = asker.send(status.clone());
        }
        // Whoever asked may have gone.
        if let Some(asker) = last {
            let _ = asker.send(status);
        }
        if !self.waiting.is_empty() {
            self.begin();
        }
    }
}

impl LookedAt {
    /// All policies at once.
    pub(super) fn all(mirror: &Mirror, table: &impl GatewayTable) -> Self {
        let mut all = Self::default();
        all.go_on(mirror, table, PolicyKey(0), usize::MAX);
        all
    }

    /// Looks at some policies more, and returns where to go on.
    fn go_on(
        &mut self,
        mirror: &Mirror,
        table: &impl GatewayTable,
        first: PolicyKey,
        limit: usize,
    ) -> Option<PolicyKey> {
        let (is_on, has_ports) = (mirror.is_enabled(), has_ports(mirror));
        let Part { reports, software, next } =
            mirror.compiler().some_policies(mirror.database(), first, limit);
        self.policies.extend(reports.into_iter().map(|(report, device)| {
            let is_reachable = device.is_none_or(|device| is_reachable(mirror, table, device.ifindex));
            PolicyStatus {
                id: report.id,
                state: as_met(report.state, is_on, has_ports, is_reachable),
                traffic: report.slot.map(|slot| table.traffic(slot)).unwrap_or_default(),
            }
        }));
        self.software += software;
        next
    }
}

impl Status {
    /// IPv4 first, ordered by identity.
    pub(super) fn sort(&mut self) {
        self.policies.sort_by(|one, other| {
            let family = |policy: &PolicyStatus| policy.id.selector.family();
            family(one).cmp(&family(other)).then_with(|| one.id.cmp(&other.id))
        });
    }

    pub(super) fn of(looked_at: LookedAt) -> Self {
        let LookedAt { policies, software } = looked_at;
        let mut totals = BTreeMap::new();
        for policy in &policies {
            *totals.entry(name(policy.state)).or_default() += 1;
        }
        Self { policies, software_policies: software, totals, ..Self::default() }
    }
}

/// Whether a packet is fast, as it meets the interfaces: see [`as_met`].
pub(super) fn explain(mirror: &Mirror, table: &impl GatewayTable, flow: &Flow) -> Explanation {
    let explanation = mirror.explain(flow);
    let Explanation::Fast { forwarding: Forwarding { ifindex, .. }, .. } = explanation else {
        return explanation;
    };
    let leaves = match flow.ingress {
        Some((ingress, _)) => ingress == ifindex || table.takes_redirects(ifindex),
        None => is_reachable(mirror, table, ifindex),
    };
    if !has_ports(mirror) {
        Explanation::Pass { reason: PassReason::UnknownPort, cause: Cause::Port }
    } else if !leaves {
        Explanation::Pass { reason: PassReason::EgressUnavailable, cause: Cause::Egress(ifindex) }
    } else {
        explanation
    }
}

/// Whether packets can leave by a device, wherever they come in. What comes in where it leaves is not redirected.
fn is_reachable(mirror: &Mirror, table: &impl GatewayTable, ifindex: u32) -> bool {
    table.takes_redirects(ifindex) || mirror.has_only_ports_on(ifindex)
}

/// Whether packets can come in, as far as interfaces are followed. A mirror without interfaces leaves ports to the embedder.
pub(super) fn has_ports(mirror: &Mirror) -> bool {
    let mut interfaces = mirror.interfaces().peekable();
    interfaces.peek().is_none()
        || interfaces
            .any(|(.., state)| matches!(state, InterfaceState::Attached { vlans } if !vlans.is_empty()))
}
