//! What the judge has seen.

use std::{iter::Sum, ops::AddAssign, time::Duration};

use fastswan::PassReason;
use fastswan_testkit_ebpf::verdict::Judgement;

use super::kind::Kind;

/// Verdicts on the packets of one kind of policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindTally {
    /// Packets that were forwarded by a way that was right at some moment of their lookup.
    pub forwarded: u64,
    /// Packets that passed, and were to pass at some moment of it.
    pub told_to_pass: u64,
    /// Packets that passed since the table was being written.
    pub updating: u64,
    /// Packets that were forwarded by a way that was not right at any moment, or whose frame is half of one and half of another.
    pub wrong: u64,
    /// Packets that passed, which is never wrong, but were counted with a reason that was not there.
    pub unexplained: u64,
}

impl KindTally {
    /// Of one run on packets of a kind, by the judge's counts and the program's.
    pub(super) fn of(
        kind: Kind,
        judged: [u64; Judgement::COUNT as usize],
        passed: &[u64; PassReason::COUNT],
    ) -> Self {
        let [forwarded, told_to_pass, updating, wrong] = judged;
        let count = |reason: PassReason| passed[reason as usize];
        let all: u64 = passed.iter().sum();
        let for_updates = count(PassReason::Updating);
        let for_its_kind = kind.reason().map_or(0, count);
        // No more packets pass for the reason of the kind than were to pass, every other one was a change being written, and each
        // packet that came through untouched was passed for some reason.
        let unexplained = (all - for_updates - for_its_kind)
            + for_its_kind.saturating_sub(told_to_pass)
            + all.abs_diff(told_to_pass + updating);
        Self { forwarded, told_to_pass: all - for_updates, updating: for_updates, wrong, unexplained }
    }

    /// All packets.
    #[must_use]
    pub fn lookups(&self) -> u64 {
        self.forwarded + self.told_to_pass + self.updating + self.wrong
    }
}

impl AddAssign for KindTally {
    fn add_assign(&mut self, other: Self) {
        self.forwarded += other.forwarded;
        self.told_to_pass += other.told_to_pass;
        self.updating += other.updating;
        self.wrong += other.wrong;
        self.unexplained += other.unexplained;
    }
}

impl Sum for KindTally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |mut sum, tally| {
            sum += tally;
            sum
        })
    }
}

/// Verdicts while policies changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    /// By the kind of the packets' policies, in the order of [`Kind::ALL`].
    pub kinds: [KindTally; Kind::ALL.len()],
    /// The last verdict that was wrong; if none was, the first run with a reason that was not there.
    pub evidence: Option<String>,
    /// Changes of policies and associations, each of which was compiled and written by itself, or with the one that it belongs to.
    pub changes: u64,
    /// For how long policies changed.
    pub time: Duration,
    /// Nanoseconds that a packet of steady policies takes while nothing changes, beyond a program that returns at once.
    pub calm: f64,
    /// The same while policies change.
    pub churning: f64,
}

impl Tally {
    /// All packets.
    #[must_use]
    pub fn total(&self) -> KindTally {
        self.kinds.iter().copied().sum()
    }

    /// Changes in a second.
    #[must_use]
    pub fn changes_a_second(&self) -> f64 {
        rate(self.changes, self.time)
    }

    /// Lookups in a second.
    #[must_use]
    pub fn lookups_a_second(&self) -> f64 {
        rate(self.total().lookups(), self.time)
    }

    /// How many times as long a packet takes while policies change.
    #[must_use]
    pub fn slow_down(&self) -> f64 {
        self.churning / self.calm
    }

    /// Whether no packet was forwarded that should not have been, or by a wrong way, and none passed for a reason that was not there.
    #[must_use]
    pub fn is_right(&self) -> bool {
        let KindTally { wrong, unexplained, .. } = self.total();
        wrong == 0 && unexplained == 0
    }
}

// Far below the numbers that a float does not hold.
#[allow(clippy::cast_precision_loss)]
fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(reasons: &[(PassReason, u64)]) -> [u64; PassReason::COUNT] {
        let mut passed = [0; PassReason::COUNT];
        for (reason, packets) in reasons {
            passed[*reason as usize] = *packets;
        }
        passed
    }

    #[test]
    fn packets_pass_for_the_reason_of_their_kind_or_for_a_change() {
        let reasons = passed(&[(PassReason::NoPolicy, 5), (PassReason::Updating, 3)]);
        // Two of those that were to pass met a change.
        let tally = KindTally::of(Kind::ComesAndGoes, [10, 7, 1, 0], &reasons);
        assert_eq!(tally, KindTally { forwarded: 10, told_to_pass: 5, updating: 3, ..KindTally::default() });
        assert_eq!(tally.lookups(), 18);
    }

    #[test]
    fn one_wrong_verdict_is_too_many_and_so_is_one_that_nothing_explains() {
        let tally = |wrong, unexplained| {
            let mut tally = Tally::default();
            tally.kinds[1] = KindTally { forwarded: 100_000, wrong, unexplained, ..KindTally::default() };
            tally
        };
        assert!(tally(0, 0).is_right());
        assert!(!tally(1, 0).is_right() && !tally(0, 1).is_right());
    }

    #[test]
    fn other_reasons_and_reasons_at_another_time_are_unexplained() {
        let unexplained =
            |kind, judged, reasons: &[_]| KindTally::of(kind, judged, &passed(reasons)).unexplained;
        assert_eq!(unexplained(Kind::ComesAndGoes, [0, 5, 0, 0], &[(PassReason::Shadowed, 5)]), 5);
        assert_eq!(unexplained(Kind::Steady, [0, 0, 2, 0], &[(PassReason::NoPolicy, 2)]), 2);
        assert_eq!(unexplained(Kind::ComesAndGoes, [0, 1, 2, 0], &[(PassReason::NoPolicy, 3)]), 2);
        assert_eq!(unexplained(Kind::Steady, [0, 0, 2, 0], &[(PassReason::Updating, 1)]), 1);
    }
}
