//! Policies whose packets pass because the embedder wants it so for a time.

use std::{collections::BTreeMap, fmt};

use super::input::Revision;
use crate::policy::{Policy, PolicyId, Selector};

/// What a [hold](super::Mirror::hold) keeps from being fast.
///
/// ```
/// use fastswan::{PolicyId, Selector, mirror::HoldTarget, policy::Direction};
///
/// let tunnels = HoldTarget::Selector(Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?);
/// let inside = Selector::between("10.1.7.0/24".parse()?, "10.2.0.0/24".parse()?)?;
/// assert!(tunnels.holds(&PolicyId::new(Direction::Out, inside)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum HoldTarget {
    /// The policy with this identity, which need not exist yet.
    Policy(#[cfg_attr(feature = "serde", serde(serialize_with = "crate::text::text"))] PolicyId),
    /// All policies whose addresses overlap these, now and later. Protocol and ports are not looked at.
    Selector(#[cfg_attr(feature = "serde", serde(serialize_with = "crate::text::text"))] Selector),
}

impl HoldTarget {
    /// Whether this holds a policy.
    #[must_use]
    pub fn holds(&self, policy: &PolicyId) -> bool {
        match self {
            Self::Policy(held) => held == policy,
            Self::Selector(held) => {
                let selector = &policy.selector;
                overlap(&held.source, &selector.source) && overlap(&held.destination, &selector.destination)
            }
        }
    }
}

impl fmt::Display for HoldTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => write!(f, "{policy}"),
            Self::Selector(selector) => write!(f, "all policies that overlap {selector}"),
        }
    }
}

/// Prefixes nest or are disjoint.
fn overlap(one: &ipnet::IpNet, other: &ipnet::IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// The number of a hold; a number is used once in the life of a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct HoldId(pub(super) u64);

/// The holds there are.
#[derive(Debug, Default)]
pub(super) struct Holds {
    held: BTreeMap<HoldId, Hold>,
    last: u64,
}

#[derive(Debug)]
struct Hold {
    target: HoldTarget,
    /// What must be written for it to take effect; `None` once that was told.
    awaits: Option<Revision>,
}

impl Holds {
    pub(super) fn add(&mut self, target: HoldTarget, revision: Revision) -> HoldId {
        self.last += 1;
        let id = HoldId(self.last);
        self.held.insert(id, Hold { target, awaits: Some(revision) });
        id
    }

    pub(super) fn remove(&mut self, id: HoldId) -> Option<HoldTarget> {
        self.held.remove(&id).map(|hold| hold.target)
    }

    pub(super) fn holds(&self, policy: &PolicyId) -> bool {
        self.held.values().any(|hold| hold.target.holds(policy))
    }

    /// Marks policies that were just told.
    pub(super) fn mark<'p>(&self, policies: impl IntoIterator<Item = &'p mut Policy>) {
        if !self.held.is_empty() {
            for policy in policies {
                policy.held = self.holds(&policy.id);
            }
        }
    }

    /// A hold that has taken effect, once each: all of it is written, or nothing is fast anyway.
    pub(super) fn next_effective(&mut self, written: Revision, is_off: bool) -> Option<HoldId> {
        let is_effective = |hold: &Hold| hold.awaits.is_some_and(|revision| is_off || revision <= written);
        let (id, hold) = self.held.iter_mut().find(|(_, hold)| is_effective(hold))?;
        hold.awaits = None;
        Some(*id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (HoldId, &HoldTarget)> {
        self.held.iter().map(|(id, hold)| (*id, &hold.target))
    }
}
