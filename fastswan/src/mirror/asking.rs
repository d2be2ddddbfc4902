//! What the kernel's own routes say of packets that the table makes fast: the program asks about one in many.
//!
//! A difference is the mirror's fault, unless the host has just changed: then the packet was looked up before what the source
//! tells of it was written. So a difference at a time when the source has told nothing lately convicts at once, and otherwise
//! one more of them does, that comes when all that was told has long been written.

use std::time::{Duration, Instant};

/// What a host is stale for when the kernel has contradicted it.
pub(super) const ASKED_BACK: &str = "asked_back";

/// What is told is written within this time, or the next difference counts.
const SETTLING: Duration = Duration::from_millis(50);

/// A second difference counts for this long after the first.
const MEMORY: Duration = Duration::from_secs(1);

/// From one request to read the host again to the next.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(1);

/// Follows the differences that a table has counted.
#[derive(Debug, Default)]
pub(super) struct Asking {
    counted: u64,
    doubt: Doubt,
    /// When the source last told something, or that was last written.
    told: Option<Instant>,
    requested: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Doubt {
    #[default]
    None,
    /// First seen at this moment, when the source had told nothing lately.
    Unexplained(Instant),
    /// First seen at this moment, when the host was changing.
    Explained(Instant),
    /// The mirror is not what the kernel is.
    Convicted,
}

impl Asking {
    /// Takes up how many differences were counted.
    pub(super) fn look(&mut self, differs: u64, is_written: bool, now: Instant) {
        if differs == std::mem::replace(&mut self.counted, differs) {
            return;
        }
        let is_recent = |moment: Instant, limit| now.saturating_duration_since(moment) < limit;
        self.doubt = match self.doubt {
            Doubt::Explained(since) if is_recent(since, SETTLING) => Doubt::Explained(since),
            Doubt::Explained(since) if is_recent(since, MEMORY) => Doubt::Convicted,
            Doubt::None | Doubt::Explained(_) => {
                if !is_written || self.told.is_some_and(|told| is_recent(told, SETTLING)) {
                    Doubt::Explained(now)
                } else {
                    Doubt::Unexplained(now)
                }
            }
            doubt => doubt,
        };
    }

    /// Notes that the source has told something, or that what was told was written.
    pub(super) fn change(&mut self, now: Instant) {
        self.told = Some(now);
        if let Doubt::Unexplained(since) = self.doubt {
            self.doubt = Doubt::Explained(since);
        }
    }

    /// Notes that at this moment the source had nothing more to tell.
    pub(super) fn catch_up(&mut self, asked: Instant) {
        if let Doubt::Unexplained(since) = self.doubt
            && asked >= since
        {
            self.doubt = Doubt::Convicted;
        }
    }

    /// Whether the host is to be read again now.
    pub(super) fn convict(&mut self, now: Instant) -> bool {
        let is_due = matches!(self.doubt, Doubt::Convicted)
            && self.requested.is_none_or(|at| now.saturating_duration_since(at) >= BETWEEN_REQUESTS);
        if is_due {
            self.doubt = Doubt::None;
            self.requested = Some(now);
        }
        is_due
    }

    /// Forgets the differences of what is not known any longer.
    pub(super) fn forget(&mut self) {
        self.doubt = Doubt::None;
    }
}
