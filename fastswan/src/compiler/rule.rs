//! The rule: when the kernel's choice among the policies that match a packet is certain.
//!
//! The kernel puts packet-offloaded policies at the head of their chain, the newest first, whatever their
//! priority, and stops its scan at the first worse priority (`xfrm_policy_insert_list`,
//! `__xfrm_policy_eval_candidates`). So the best priority alone does not decide. It does if
//!
//! - it is the only one that matches, or
//! - no other matching policy is offloaded, and all have priority numbers above the highest that an offloaded policy of
//!   the family has had since this one was added or changed: then none can stand before it in its chain,
//!
//! and if no forward policy and no sub policy matches, which the kernel asks besides.

use fastswan_ebpf::PassReason;

use super::broken::{self, BrokenRule};
use crate::{
    database::PolicyKey,
    policy::{Action, Direction, Family, IPPROTO_ESP, Mode, Policy, PolicyType, Template},
};

/// What the rule needs to know about a policy.
///
/// Marks, interface ids, interfaces, security contexts and users are not looked at: a policy that asks for
/// one counts as a match. That is safe, because more matches never make a region fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) policy: PolicyKey,
    pub(super) priority: u32,
    pub(super) role: Role,
    /// It matches only packets of one protocol or port, but the table has no room to tell them apart.
    pub(super) widened: bool,
}

/// What a policy can do to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// An outbound policy that is packet-offloaded.
    Offloaded,
    /// An outbound policy of the kernel's.
    Software,
    /// A forward or sub policy, or one that sources disagree about: it makes packets pass whatever else matches.
    Check,
}

impl Candidate {
    /// A policy that is not inbound.
    pub(super) fn of(key: PolicyKey, policy: &Policy, broken: Option<BrokenRule>) -> Self {
        let role = if is_check(policy) {
            Role::Check
        } else if policy.is_packet_offloaded() {
            Role::Offloaded
        } else {
            Role::Software
        };
        Self { policy: key, priority: broken::priority(broken, policy), role, widened: false }
    }
}

/// Whether a policy makes packets pass whatever else matches: a forward or sub policy, or one that sources disagree
/// about.
pub(super) fn is_check(policy: &Policy) -> bool {
    (policy.id.direction, policy.id.policy_type) != (Direction::Out, PolicyType::Main) || policy.disputed
}

/// What the rule needs to know about all policies that match a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Matches {
    /// Of those that are not checks.
    best: Option<Candidate>,
    /// Best priority number among the others.
    second: Option<u32>,
    offloaded: Offloaded,
    check: bool,
    widened: bool,
}

/// How many policies are packet-offloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Offloaded {
    #[default]
    None,
    One,
    Several,
}

impl Matches {
    pub(super) fn of(candidate: Candidate) -> Self {
        let widened = candidate.widened;
        match candidate.role {
            Role::Check => Self { check: true, widened, ..Self::default() },
            Role::Software => Self { best: Some(candidate), widened, ..Self::default() },
            Role::Offloaded => {
                Self { best: Some(candidate), offloaded: Offloaded::One, widened, ..Self::default() }
            }
        }
    }

    /// These and others, of which none is the same.
    #[must_use]
    pub(super) fn and(self, other: Self) -> Self {
        let (best, worse) = match (self.best, other.best) {
            (Some(one), Some(two)) if two.priority < one.priority => (Some(two), Some(one)),
            (Some(one), two) => (Some(one), two),
            (None, two) => (two, None),
        };
        let losers = [self.second, other.second, worse.map(|candidate| candidate.priority)];
        Self {
            best,
            second: losers.into_iter().flatten().min(),
            offloaded: match (self.offloaded, other.offloaded) {
                (Offloaded::None, count) | (count, Offloaded::None) => count,
                _ => Offloaded::Several,
            },
            check: self.check || other.check,
            widened: self.widened || other.widened,
        }
    }

    /// Whether no outbound main policy loses to another.
    pub(super) fn is_alone(&self) -> bool {
        self.second.is_none()
    }

    /// The packet-offloaded policy that the kernel is certain to choose, if it is alone or the order of its chain
    /// is known.
    ///
    /// `highest_offloaded` is the highest priority number that a packet-offloaded policy of the family has had.
    pub(super) fn chosen(
        self,
        highest_offloaded: u32,
        broken: Option<BrokenRule>,
    ) -> Result<PolicyKey, PassReason> {
        let Some(best) = self.best.filter(|_| !self.check) else {
            return Err(self.blame(PassReason::ForwardOrSubPolicy));
        };
        if self.offloaded == Offloaded::None {
            return Err(self.blame(PassReason::NotOffloaded));
        }
        let is_beaten = |loser: u32| match broken {
            Some(BrokenRule::Ties) => loser >= best.priority.max(highest_offloaded),
            Some(BrokenRule::HighestPriority) => loser > best.priority,
            _ => loser > best.priority.max(highest_offloaded),
        };
        let is_only_one = best.role == Role::Offloaded && self.offloaded == Offloaded::One;
        if is_only_one && self.second.is_none_or(is_beaten) {
            Ok(best.policy)
        } else {
            Err(self.blame(PassReason::Shadowed))
        }
    }

    fn blame(self, reason: PassReason) -> PassReason {
        if self.widened { PassReason::Capacity } else { reason }
    }
}

/// The template of a policy whose packets could be fast, if an association is there and the path is known.
pub(super) fn eligible(policy: &Policy) -> Result<&Template, PassReason> {
    if !policy.is_packet_offloaded() || policy.action == Action::Block || policy.templates.is_empty() {
        return Err(PassReason::NotOffloaded);
    }
    if policy.withheld {
        return Err(PassReason::Held);
    }
    let [template] = &policy.templates[..] else { return Err(PassReason::Ineligible) };
    let plain = policy.id.mark.mask == 0
        && policy.id.if_id == 0
        && policy.id.security_context.is_empty()
        && policy.id.selector.ifindex == 0
        && !policy.use_limited
        && !policy.asks_per_cpu
        && template.mode == Mode::Tunnel
        && template.protocol == IPPROTO_ESP
        && !template.optional
        // For an offloaded tunnel the kernel looks for a route to its far end in the family of the packet
        // (`xfrm_bundle_create`): it forwards nothing into one of the other family.
        && Family::from(template.destination) == policy.id.selector.family();
    if plain { Ok(template) } else { Err(PassReason::Ineligible) }
}
