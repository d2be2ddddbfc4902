//! What the fast path depends on, and how fresh each of it is.

use std::time::Instant;

/// Something that must be known for packets to be fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Input {
    /// Policies and security associations, as a [`PolicySource`](crate::PolicySource) tells them.
    Policies,
    /// Links, routes and the rest of the host, as a [`HostSource`](crate::HostSource) tells them.
    Host,
    /// The wall clock, by which the kernel counts the age of policies and associations.
    Clock,
}

impl Input {
    /// All of them.
    pub const ALL: &'static [Self] = &[Self::Policies, Self::Host, Self::Clock];

    /// Its name in metrics and events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Policies => "policies",
            Self::Host => "host",
            Self::Clock => "clock",
        }
    }
}

/// How fresh an input is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum InputState {
    /// It has told nothing so far.
    #[default]
    Unknown,
    /// It has told everything, but not yet that there is nothing more.
    CatchingUp,
    /// Asked then, it had nothing more to tell.
    Current {
        /// The latest such moment.
        asked: Instant,
    },
    /// What it has told may no longer be true.
    Stale {
        /// Why.
        cause: &'static str,
    },
}

/// Follows one input.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Track {
    told: Told,
    /// The latest moment at which it had nothing more to tell.
    asked: Option<Instant>,
}

/// Counts what has been told.
pub(super) type Revision = u64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Told {
    #[default]
    Nothing,
    Everything,
    Stale(&'static str),
}

impl Track {
    pub(super) fn tell_everything(&mut self) {
        self.told = Told::Everything;
    }

    pub(super) fn lose_track(&mut self, cause: &'static str) {
        *self = Self { told: Told::Stale(cause), asked: None };
    }

    /// Notes that nothing was left to tell at a moment.
    pub(super) fn catch_up(&mut self, asked: Instant) {
        if self.is_known() {
            self.asked = self.asked.max(Some(asked));
        }
    }

    /// Whether it has told everything and not lost track since.
    pub(super) fn is_known(&self) -> bool {
        self.told == Told::Everything
    }

    /// Whether it has ever told everything.
    pub(super) fn has_told(&self) -> bool {
        self.told != Told::Nothing
    }

    /// The latest moment at which it had nothing more to tell, if it has not lost track since.
    pub(super) fn asked(&self) -> Option<Instant> {
        self.asked
    }

    pub(super) fn state(&self) -> InputState {
        match (self.told, self.asked) {
            (Told::Nothing, _) => InputState::Unknown,
            (Told::Stale(cause), _) => InputState::Stale { cause },
            (Told::Everything, None) => InputState::CatchingUp,
            (Told::Everything, Some(asked)) => InputState::Current { asked },
        }
    }
}
