//! What host sources say.

use super::HostFacts;

/// What a [`HostSource`](crate::HostSource) says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostEvent {
    /// Everything that the source knows now. It replaces all that it said before.
    Snapshot(HostFacts),
    /// What the source said may no longer be true, and a [`HostEvent::Snapshot`] will follow. Until then nothing may be
    /// fast.
    Stale(HostStaleCause),
}

/// Why a host source lost track.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HostStaleCause {
    /// Something has changed, and is being read.
    Changed,
    /// The kernel had more notifications than the socket's receive buffer holds (`ENOBUFS`).
    Overrun,
    /// The facts could not be read. The source tries again; a tracing event says what failed.
    Unreadable,
    /// The source asked for a resynchronisation itself.
    Requested,
}

impl HostStaleCause {
    /// Its name in metrics and events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Overrun => "overrun",
            Self::Unreadable => "unreadable",
            Self::Requested => "requested",
        }
    }
}
