//! **For the oracle of the testkit only:** rules that break the promise on purpose, so that the oracle is known to
//! notice. Without the feature `broken-rules` nothing can choose one.
#![cfg_attr(not(feature = "broken-rules"), allow(dead_code, unreachable_pub))]

use crate::policy::{Direction, Policy};

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BrokenRule {
    /// A policy may be fast although another has the same priority.
    Ties,
    /// Policies that are not offloaded count for nothing.
    Shadowing,
    /// The numbers of other matches may be below the highest of all offloaded policies.
    HighestPriority,
    /// The policy with the longest prefixes is the best one.
    LongestPrefix,
    /// What lies inside the region of a deleted policy stays as it was.
    Descendants,
    /// Tunnels to the same peer lead to the same associations, whatever their reqids.
    Reqids,
    /// Of offloaded policies, the best priority is chosen, though it may not be the newest.
    Age,
    /// Offloaded policies between longer prefixes are not found first.
    ExactFirst,
}

impl BrokenRule {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Ties,
        Self::Shadowing,
        Self::HighestPriority,
        Self::LongestPrefix,
        Self::Descendants,
        Self::Reqids,
        Self::Age,
        Self::ExactFirst,
    ];
}

/// Whether a policy is left out of account.
pub(super) fn overlooks(broken: Option<BrokenRule>, policy: &Policy) -> bool {
    broken == Some(BrokenRule::Shadowing)
        && policy.id.direction == Direction::Out
        && !policy.is_packet_offloaded()
}

/// What is taken for a policy's priority number.
pub(super) fn priority(broken: Option<BrokenRule>, policy: &Policy) -> u32 {
    let selector = &policy.id.selector;
    match broken {
        Some(BrokenRule::LongestPrefix) => {
            512 - u32::from(selector.destination.prefix_len()) - u32::from(selector.source.prefix_len())
        }
        _ => policy.priority,
    }
}
