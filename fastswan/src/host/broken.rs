//! **For tests only:** rules that break the promise on purpose, so that the tests are known to notice. Without the feature
//! `broken-rules` nothing can choose one.
#![cfg_attr(not(feature = "broken-rules"), allow(dead_code, unreachable_pub))]

/// A rule of following the host that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BrokenHostRule {
    /// A route that replaces another one is added to it.
    IgnoresReplacement,
    /// Routes stay when their link goes down or away.
    IgnoresLinksThatGoDown,
}
