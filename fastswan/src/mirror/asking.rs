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

#[cfg(test)]
mod tests {
    use super::*;

    const fn after(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_difference_while_the_source_is_silent_convicts_once_it_was_asked() {
        let (mut asking, start) = (Asking::default(), Instant::now());
        asking.look(0, true, start);
        asking.catch_up(start);
        assert!(!asking.convict(start), "nothing differs");
        asking.look(1, true, start + after(10));
        asking.catch_up(start + after(9));
        assert!(!asking.convict(start + after(10)), "the source was asked before");
        asking.catch_up(start + after(10));
        assert!(asking.convict(start + after(10)));
        assert!(!asking.convict(start + after(2000)), "once");
    }

    #[test]
    fn a_difference_during_a_change_convicts_only_if_another_one_comes_when_that_is_written() {
        for (second, is_convicted) in [(20, false), (49, false), (50, true), (999, true), (1000, false)] {
            for told_before in [true, false] {
                let (mut asking, start) = (Asking::default(), Instant::now());
                if told_before {
                    asking.change(start);
                }
                asking.look(1, true, start + after(1));
                if !told_before {
                    asking.change(start + after(2));
                }
                asking.catch_up(start + after(2));
                assert!(!asking.convict(start + after(2)));
                // The source goes on telling.
                asking.change(start + after(second));
                asking.look(2, true, start + after(1 + second));
                asking.catch_up(start + after(1 + second));
                assert_eq!(asking.convict(start + after(1 + second)), is_convicted, "{second}");
            }
        }
        // What was told is not written yet.
        let (mut asking, start) = (Asking::default(), Instant::now());
        asking.look(1, false, start);
        asking.catch_up(start);
        assert!(!asking.convict(start));
    }

    #[test]
    fn a_host_is_convicted_at_most_once_a_second() {
        let (mut asking, start) = (Asking::default(), Instant::now());
        let convictions = (0..3000).filter(|&millisecond| {
            let now = start + after(millisecond);
            asking.look(millisecond + 1, true, now);
            asking.catch_up(now);
            asking.convict(now)
        });
        assert_eq!(convictions.collect::<Vec<_>>(), [0, 1000, 2000]);
    }
}
