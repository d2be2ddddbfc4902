//! The rule: when the kernel's choice among the policies that match a packet is certain.
//!
//! The kernel puts packet-offloaded policies at the head of their chain, the newest first, whatever their
//! priority, and stops its scan at the first worse priority (`xfrm_policy_insert_list`,
//! `__xfrm_policy_eval_candidates`). So the best priority alone does not decide. It does if
//!
//! - it is strictly the best, and no other matching policy is offloaded, and
//! - every other match has a priority number at or above the highest of all offloaded policies of the family:
//!   none of them can stand before an offloaded one in its chain,
//!
//! and if no forward policy and no sub policy matches, which the kernel asks besides.

use fastswan_ebpf::PassReason;

use crate::policy::{Action, Direction, IPPROTO_ESP, Mode, Policy, PolicyType, Template};

/// What the rule needs to know about the policies that match a region.
///
/// Marks, interface ids, interfaces, security contexts and users are not looked at: a policy that asks for
/// one counts as a match. That is safe, because more matches never make a region fast.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Matches {
    best: Option<Candidate>,
    /// Best priority number among the others.
    second: Option<u32>,
    /// How many are packet-offloaded.
    offloaded: usize,
    forward_or_sub: bool,
    /// Some match only packets of one protocol or port, but the table has no room to tell them apart.
    widened: bool,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    priority: u32,
    /// Index of the policy.
    policy: usize,
    offloaded: bool,
}

impl Matches {
    /// One policy, by its index. `widened` tells that its protocol and ports are left out of account.
    pub(super) fn one(index: usize, policy: &Policy, widened: bool) -> Self {
        let candidate =
            Candidate { priority: policy.priority, policy: index, offloaded: policy.is_packet_offloaded() };
        if policy.id.direction == Direction::Out && policy.id.policy_type == PolicyType::Main {
            let offloaded = usize::from(candidate.offloaded);
            Self { best: Some(candidate), offloaded, widened, ..Self::default() }
        } else {
            Self { forward_or_sub: true, widened, ..Self::default() }
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
            offloaded: self.offloaded + other.offloaded,
            forward_or_sub: self.forward_or_sub || other.forward_or_sub,
            widened: self.widened || other.widened,
        }
    }

    /// Whether they are forward and sub policies only, which make packets pass whatever else matches.
    pub(super) fn only_pass(&self) -> bool {
        self.best.is_none()
    }

    /// The index of the packet-offloaded policy that the kernel is certain to choose.
    ///
    /// `highest_offloaded` is the highest priority number of all packet-offloaded policies of the family.
    pub(super) fn chosen(self, highest_offloaded: u32) -> Result<usize, PassReason> {
        let Some(best) = self.best.filter(|_| !self.forward_or_sub) else {
            return Err(self.blame(PassReason::ForwardOrSubPolicy));
        };
        if self.offloaded == 0 {
            return Err(self.blame(PassReason::NotOffloaded));
        }
        let safe = |loser| loser > best.priority && loser >= highest_offloaded;
        if best.offloaded && self.offloaded == 1 && self.second.is_none_or(safe) {
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
    let [template] = policy.templates.as_slice() else { return Err(PassReason::Ineligible) };
    let plain = policy.id.mark.mask == 0
        && policy.id.if_id == 0
        && policy.id.security_context.is_empty()
        && policy.id.selector.ifindex == 0
        && !policy.use_limited
        && template.mode == Mode::Tunnel
        && template.protocol == IPPROTO_ESP
        && !template.optional;
    if plain { Ok(template) } else { Err(PassReason::Ineligible) }
}
