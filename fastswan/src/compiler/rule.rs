//! The rule: when the kernel's choice among the policies that match a packet is certain.
//!
//! Each clause has an id, which tests and `ARCHITECTURE.md` use.
//!
//! What the kernel does, as far as it matters: it puts packet-offloaded policies at the head of their chain, the newest
//! first, whatever their priority, and others behind the last whose number is not higher (`xfrm_policy_insert_list`). All
//! policies of a packet with prefixes of the same kinds are in one chain, so a merge of chains never turns two
//! offloaded ones round (`xfrm_policy_inexact_list_reinsert`). A lookup takes the first match of each chain, and stops in a
//! chain at the first number that is worse than the best so far (`__xfrm_policy_eval_candidates`). So the best
//! priority alone does not decide.
//!
//! **R1, candidates.** All outbound main policies whose addresses have the packet's may be the kernel's choice, whatever else
//! they ask for: a match too many never makes a packet fast.
//!
//! **R2, checks.** If a forward or a sub policy matches, the packet passes: the kernel asks that one besides.
//!
//! **R3, alone.** If one candidate matches, it is the choice.
//!
//! **R4, software loses.** Candidates that are not offloaded are not the choice if their numbers are above the highest
//! that an offloaded policy of the family has had since the offloaded one was told of, and that was since the
//! last snapshot: then none can stand before it, and none can stop the search for it.
//!
//! **R5, equivalence.** If all candidates that may be the choice are offloaded and lead the same [way](same_way), it does not
//! matter which one is: the packet is fast for the one with the best priority.
//!
//! **R6, order.** Offloaded candidates that lead another way are not the choice if one of the best priority's way, the
//! *pivot*,
//! - (a) has a lower number than they, and so have all of its way that are not older: of a chain the first that matches is
//!   taken, and one with a worse number in front of it would lose to them in the end,
//! - (b) was added or changed after them: so it comes first in a chain that it shares with one of them,
//! - (c) has prefixes at least as long: so they are in the hash of exact prefixes, whose offloaded matches hide all others,
//!   only if it is there too, whatever the thresholds; and none of them is in a chain that is asked before its own (both
//!   prefixes, source, destination, none; short prefixes have no chains of their own), so none can stop the search for it.
//!
//! **R7, priority alone.** Of a source that says [so](PolicyOrder::ByPriority), the best priority is the choice, if it is
//! one, or several that lead the same way.
//!
//! **R8, eligible.** The choice is packet-offloaded, allows, and asks for nothing but one required ESP tunnel of the
//! packet's family: see [`eligible`].

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::broken::{self, BrokenRule};
use crate::{
    database::{Database, PolicyKey},
    event::PolicyOrder,
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
    fn is_alone(&self) -> bool {
        self.second.is_none()
    }

    /// What these say about the kernel's choice.
    pub(super) fn choice(self, terms: Terms) -> Result<Choice, PassReason> {
        let Some(best) = self.best.filter(|_| !self.check) else {
            return Err(self.blame(PassReason::ForwardOrSubPolicy));
        };
        if self.offloaded == Offloaded::None {
            return Err(self.blame(PassReason::NotOffloaded));
        }
        let is_offloaded = best.role == Role::Offloaded;
        if terms.order == PolicyOrder::ByPriority {
            return match self.second {
                Some(second) if second == best.priority => Ok(Choice::Among),
                _ if is_offloaded => Ok(Choice::Certain(best.policy)),
                _ => Err(self.blame(PassReason::Shadowed)),
            };
        }
        if self.offloaded == Offloaded::Several {
            return Ok(Choice::Among);
        }
        if is_offloaded && self.second.is_none_or(|loser| terms.loses(loser, best.priority)) {
            Ok(if self.is_alone() { Choice::Certain(best.policy) } else { Choice::IfTold(best.policy) })
        } else {
            Err(self.blame(PassReason::Shadowed))
        }
    }

    fn blame(self, reason: PassReason) -> PassReason {
        if self.widened { PassReason::Capacity } else { reason }
    }
}

/// What the rule goes by besides the policies of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// The highest priority number that a packet-offloaded policy of the family has had.
    pub(super) highest: u32,
    pub(super) order: PolicyOrder,
    pub(super) broken: Option<BrokenRule>,
}

impl Terms {
    /// Whether a policy that is not offloaded loses to an offloaded one by its number (R4).
    fn loses(self, loser: u32, winner: u32) -> bool {
        match self.broken {
            Some(BrokenRule::Ties) => loser >= winner.max(self.highest),
            Some(BrokenRule::HighestPriority) => loser > winner,
            _ => loser > winner.max(self.highest),
        }
    }
}

/// What the policies of a cell say about the kernel's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// It is this packet-offloaded policy.
    Certain(PolicyKey),
    /// It is this one if it was told of since the last snapshot.
    IfTold(PolicyKey),
    /// It takes a [look](judge) at each of them.
    Among,
}

/// What a look at each policy of a cell says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    /// The policy that the packets are fast for.
    pub(super) choice: Result<PolicyKey, PassReason>,
    /// Another highest priority number may change that.
    pub(super) depends_on_highest: bool,
}

/// Looks at each of the policies that match a cell, none of which is a check (R5 to R7).
pub(super) fn judge(all: &[Candidate], database: &Database, terms: Terms) -> Judgement {
    let is_widened = all.iter().any(|candidate| candidate.widened);
    let reason = if is_widened { PassReason::Capacity } else { PassReason::Shadowed };
    let Some((best, depends_on_highest)) = first_way(all, database, terms) else {
        // It is rare, so it may be looked at once too often.
        return Judgement { choice: Err(reason), depends_on_highest: true };
    };
    Judgement { choice: Ok(best), depends_on_highest }
}

/// The policy with the best priority, if the kernel is certain to choose it or one that leads the same way; and whether
/// that depends on the highest priority number.
fn first_way(all: &[Candidate], database: &Database, terms: Terms) -> Option<(PolicyKey, bool)> {
    let with_role = |role| {
        let those = all.iter().filter(move |candidate| candidate.role == role);
        those.filter_map(|candidate| Some((candidate, database.policy_with_key(candidate.policy)?)))
    };
    let offloaded = || with_role(Role::Offloaded);
    let (best, best_policy) =
        offloaded().min_by_key(|(candidate, _)| (candidate.priority, candidate.policy))?;
    if offloaded().any(|(candidate, _)| candidate.widened) {
        return None;
    }
    let leads_there = |policy: &Policy| same_way(best_policy, policy, terms.broken);
    let software = with_role(Role::Software).map(|(candidate, _)| candidate.priority).min();
    if terms.order == PolicyOrder::ByPriority {
        let mut tied = offloaded().filter(|(candidate, _)| candidate.priority == best.priority);
        let is_first = software.is_none_or(|software| software > best.priority);
        return (is_first && tied.all(|(_, policy)| leads_there(policy))).then_some((best.policy, false));
    }
    if software.is_some_and(|software| !terms.loses(software, best.priority)) {
        return None;
    }
    let mut others: Option<Others> = None;
    for (candidate, policy) in offloaded().filter(|(_, policy)| !leads_there(policy)) {
        let other = Others::of(candidate, policy, database);
        others = Some(others.map_or(other, |others| others.and(other)));
    }
    // The age of the newest of its way that does not have a better number than the others.
    let worse = others.and_then(|others| {
        let worse = offloaded()
            .filter(|(candidate, policy)| candidate.priority >= others.first && leads_there(policy));
        worse.map(|(candidate, _)| database.age(candidate.policy)).max()
    });
    let is_pivot = |(candidate, policy): (&Candidate, &Policy)| {
        leads_there(policy)
            && (software.is_none() || is_told(candidate.policy, database, terms))
            && others.is_none_or(|others| others.lose_to(candidate, policy, database, terms))
            && worse.is_none_or(|worse| worse < database.age(candidate.policy))
    };
    let depends_on_highest = software.is_some();
    offloaded().any(is_pivot).then_some((best.policy, depends_on_highest))
}

/// Whether a policy was told of since the last snapshot, and therefore put at the head of its chain since (R4).
pub(super) fn is_told(policy: PolicyKey, database: &Database, terms: Terms) -> bool {
    database.is_told(policy) || terms.broken == Some(BrokenRule::HighestPriority)
}

/// Offloaded policies that lead another way than the best one.
#[derive(Clone, Copy, Debug)]
struct Others {
    /// The best priority number.
    first: u32,
    /// The age of the newest.
    newest: u32,
    /// The longest prefixes.
    destination_length: u8,
    source_length: u8,
}

impl Others {
    fn of(candidate: &Candidate, policy: &Policy, database: &Database) -> Self {
        let selector = &policy.id.selector;
        Self {
            first: candidate.priority,
            newest: database.age(candidate.policy),
            destination_length: selector.destination.prefix_len(),
            source_length: selector.source.prefix_len(),
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            first: self.first.min(other.first),
            newest: self.newest.max(other.newest),
            destination_length: self.destination_length.max(other.destination_length),
            source_length: self.source_length.max(other.source_length),
        }
    }

    /// Whether a policy with a better priority is found, and none of these instead (R6).
    fn lose_to(self, pivot: &Candidate, policy: &Policy, database: &Database, terms: Terms) -> bool {
        let selector = &policy.id.selector;
        let is_broken = |rule| terms.broken == Some(rule);
        let is_newer = database.age(pivot.policy) > self.newest || is_broken(BrokenRule::Age);
        let is_longer = selector.destination.prefix_len() >= self.destination_length
            && selector.source.prefix_len() >= self.source_length
            || is_broken(BrokenRule::ExactFirst);
        // The kernel takes prefixes of the unspecified address for short ones, however long they are.
        let is_odd = |prefix: IpNet| prefix.addr().is_unspecified() && prefix.prefix_len() > 0;
        pivot.priority < self.first
            && is_newer
            && is_longer
            && !is_odd(selector.source)
            && !is_odd(selector.destination)
    }
}

/// Whether two policies lead a packet that both match to the same associations, and out in the same way (R5). The
/// first is [eligible]. Their ends have to be the same, too: nothing is fast for one that is about to expire.
pub(super) fn same_way(one: &Policy, other: &Policy, broken: Option<BrokenRule>) -> bool {
    // Nothing new is overlooked here.
    let Policy {
        id: _,
        index: _,
        priority: _,
        action: _,
        templates,
        offload,
        use_limited: _,
        held: _,
        asks_per_cpu: _,
        expires,
        egress,
        assumed,
        withheld: _,
        disputed: _,
        origin,
    } = one;
    let is_eligible = eligible(one).is_ok() && eligible(other).is_ok();
    if broken == Some(BrokenRule::Reqids) {
        let far_end = |policy: &Policy| policy.templates.first().map(|template| template.destination);
        return is_eligible && far_end(one) == far_end(other);
    }
    one.id == other.id
        || is_eligible
            && (templates, offload, expires, egress)
                == (&other.templates, &other.offload, &other.expires, &other.egress)
            && (assumed, origin) == (&other.assumed, &other.origin)
}

/// The template of a policy whose packets could be fast, if an association is there and the path is known.
pub(super) fn eligible(policy: &Policy) -> Result<&Template, PassReason> {
    if !policy.is_packet_offloaded() || policy.action == Action::Block || policy.templates.is_empty() {
        return Err(PassReason::NotOffloaded);
    }
    if policy.held || policy.withheld {
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
