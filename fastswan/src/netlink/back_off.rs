//! How long to wait before another dump. Time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// After the first pause, which is none: doubled from one to the next.
const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(5);

/// Whoever kept track for so many times the next pause begins again without one.
const QUIET: u32 = 10;
/// Whoever loses track sooner waits for this part of the time that he kept it, at most, or as long as the dump took.
const PART: u32 = 4;

/// Makes those wait who lose track again and again: of a device that flaps, or of more notifications than can be read.
#[derive(Debug, Default)]
pub(crate) struct BackOff {
    pause: Duration,
    /// When the next dump was to begin.
    begun: Option<Instant>,
    /// When the last dump succeeded, unless its truth was lost since.
    settled: Option<Instant>,
}

impl BackOff {
    /// A dump has succeeded.
    pub(crate) fn settled(&mut self, now: Instant) {
        self.settled = Some(now);
    }

    /// A dump has failed, or what it told is no longer true: how long to wait before the next.
    pub(crate) fn next(&mut self, now: Instant) -> Duration {
        if let Some(settled) = self.settled.take() {
            let kept = now.saturating_duration_since(settled);
            let took = self.begun.map_or(Duration::ZERO, |begun| settled.saturating_duration_since(begun));
            self.pause = if kept >= self.pause * QUIET {
                Duration::ZERO
            } else {
                self.pause.min(SHORTEST.max(kept / PART).max(took))
            };
        }
        let pause = self.pause;
        self.pause = (pause * 2).clamp(SHORTEST, LONGEST);
        self.begun = Some(now + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pauses of so many losses, if a dump takes so long and track is kept for so long after it.
    fn pauses(losses: usize, [takes, keeps]: [u64; 2]) -> Vec<u128> {
        let (mut back_off, mut now) = (BackOff::default(), Instant::now());
        let mut lose = || {
            let pause = back_off.next(now);
            now += pause + Duration::from_millis(takes);
            back_off.settled(now);
            now += Duration::from_millis(keeps);
            pause.as_millis()
        };
        (0..losses).map(|_| lose()).collect()
    }

    #[test]
    fn losses_one_after_the_other_wait_as_long_as_a_dump_takes() {
        assert_eq!(pauses(9, [400, 1]), [0, 10, 20, 40, 80, 160, 320, 400, 400]);
        assert_eq!(pauses(5, [1, 1]), [0, 10, 10, 10, 10]);
        assert_eq!(pauses(12, [10_000, 1])[9..], [2560, 5000, 5000]);
    }

    #[test]
    fn losses_now_and_then_wait_for_a_part_of_the_time_between_them() {
        assert_eq!(pauses(6, [1, 96]), [0, 10, 20, 24, 24, 24]);
        assert_eq!(pauses(6, [1, 100]), [0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_quiet_spell_forgives_all_losses() {
        let (mut back_off, mut now) = (BackOff::default(), Instant::now());
        for _ in 0..12 {
            let pause = back_off.next(now);
            now += pause + LONGEST;
            back_off.settled(now);
        }
        assert_eq!(back_off.next(now), LONGEST);
        back_off.settled(now);
        assert_eq!(back_off.next(now + LONGEST * QUIET), Duration::ZERO);
    }

    #[test]
    fn dumps_that_fail_wait_longer_however_long_they_take() {
        let (mut back_off, now) = (BackOff::default(), Instant::now());
        let pauses = (0..4).map(|failure| back_off.next(now + failure * 100 * LONGEST).as_millis());
        assert_eq!(pauses.collect::<Vec<_>>(), [0, 10, 20, 40]);
    }
}
