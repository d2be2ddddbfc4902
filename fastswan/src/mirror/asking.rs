//! What the kernel's own routes say of packets that the table makes fast: the program asks about one in many.
//!
//! A difference is the mirror's fault, unless the table was just behind: then a change of it follows, or has just been written.
//! Whether the host source tells something at that time does not matter: on a host whose routes change all the time it always
//! does, and mostly of what concerns no policy.

use std::time::{Duration, Instant};

/// What a host is stale for when the kernel has contradicted it.
pub(super) const ASKED_BACK: &str = "asked_back";

/// A packet may have been looked up so long before the kernel tells why its answer differs, or be in the program for so long
/// after a write. By far: it takes microseconds, unless a processor is taken away meanwhile.
const SETTLING: Duration = Duration::from_millis(10);

/// From one request to read the host again to the next.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(1);

/// Follows the differences that a table has counted.
#[derive(Debug, Default)]
pub(super) struct Asking {
    counted: u64,
    doubt: Option<Doubt>,
    /// When the table was changed last.
    changed: Option<Instant>,
    requested: Option<Instant>,
}

/// A difference that nothing has explained so far.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    /// When it was first seen.
    since: Instant,
    /// The source was asked long enough after that, and had nothing more to tell.
    is_settled: bool,
}

impl Asking {
    /// Takes up how many differences were counted.
    pub(super) fn look(&mut self, differs: u64, now: Instant) {
        if differs == std::mem::replace(&mut self.counted, differs) {
            return;
        }
        if self.changed.is_none_or(|changed| now.saturating_duration_since(changed) >= SETTLING) {
            self.doubt.get_or_insert(Doubt { since: now, is_settled: false });
        }
    }

    /// Notes that a change was written to the table: it was behind.
    pub(super) fn change(&mut self, now: Instant) {
        self.changed = Some(now);
        self.doubt = None;
    }

    /// Notes that at this moment the source had nothing more to tell.
    pub(super) fn catch_up(&mut self, asked: Instant) {
        if let Some(doubt) = &mut self.doubt {
            doubt.is_settled |= asked >= doubt.since + SETTLING;
        }
    }

    /// When the source is to be asked whether it has caught up, at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        self.doubt.filter(|doubt| !doubt.is_settled).map(|doubt| doubt.since + SETTLING)
    }

    /// Whether the host is to be read again now, when all that was told is in the table.
    pub(super) fn convict(&mut self, now: Instant) -> bool {
        let is_due = self.doubt.is_some_and(|doubt| doubt.is_settled)
            && self.requested.is_none_or(|at| now.saturating_duration_since(at) >= BETWEEN_REQUESTS);
        if is_due {
            self.doubt = None;
            self.requested = Some(now);
        }
        is_due
    }

    /// Forgets the differences of what is not known any longer.
    pub(super) fn forget(&mut self) {
        self.doubt = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn after(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_difference_convicts_once_the_source_was_asked_and_the_table_has_not_changed() {
        let (mut asking, start) = (Asking::default(), Instant::now());
        asking.look(0, start);
        asking.catch_up(start + after(100));
        assert!(!asking.convict(start + after(100)) && asking.due().is_none(), "nothing differs");
        asking.look(1, start + after(200));
        assert_eq!(asking.due(), Some(start + after(210)));
        asking.catch_up(start + after(209));
        assert!(!asking.convict(start + after(209)), "the kernel may be about to tell");
        asking.catch_up(start + after(210));
        assert!(asking.due().is_none() && asking.convict(start + after(210)));
        assert!(!asking.convict(start + after(2000)), "once");
    }

    #[test]
    fn a_difference_when_the_table_changes_counts_for_nothing_however_often() {
        let (mut asking, start) = (Asking::default(), Instant::now());
        for round in 0..100 {
            let now = start + after(20 * round);
            // Packets that were looked up before it, and one that was in the program meanwhile.
            asking.look(3 * round + 1, now);
            asking.look(3 * round + 2, now + after(4));
            asking.change(now + after(5));
            asking.look(3 * round + 3, now + after(6));
            asking.catch_up(now + after(19));
            assert!(!asking.convict(now + after(19)), "round {round}");
        }
        let now = start + after(2000);
        asking.look(1000, now);
        asking.catch_up(now + after(10));
        assert!(asking.convict(now + after(10)), "nothing has changed");
    }

    #[test]
    fn a_host_is_convicted_at_most_once_a_second() {
        let (mut asking, start) = (Asking::default(), Instant::now());
        let convictions = (0..3000).filter(|&millisecond| {
            let now = start + after(millisecond);
            asking.look(millisecond + 1, now);
            asking.catch_up(now);
            asking.convict(now)
        });
        assert_eq!(convictions.collect::<Vec<_>>(), [10, 1010, 2010]);
    }
}
