//! How long to wait before another dump. Time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// After the first pause, which is none: doubled from one to the next.
const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(5);

/// Whoever kept track for so long begins again without a pause.
const QUIET: Duration = LONGEST;

/// Makes those wait who lose track again and again: of a device that flaps, or of more notifications than can be read.
#[derive(Debug, Default)]
pub(super) struct BackOff {
    pause: Duration,
    /// When the last dump succeeded, unless its truth was lost since.
    settled: Option<Instant>,
}

impl BackOff {
    /// A dump has succeeded.
    pub(super) fn settled(&mut self, now: Instant) {
        self.settled = Some(now);
    }

    /// A dump has failed, or what it told is no longer true: how long to wait before the next.
    pub(super) fn next(&mut self, now: Instant) -> Duration {
        if self.settled.take().is_some_and(|since| now - since >= QUIET) {
            self.pause = Duration::ZERO;
        }
        let pause = self.pause;
        self.pause = (pause * 2).clamp(SHORTEST, LONGEST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pauses of this many losses, each so long after the dump before it.
    fn pauses(back_off: &mut BackOff, now: &mut Instant, losses: usize, after: Duration) -> Vec<u128> {
        let mut lose = || {
            let pause = back_off.next(*now);
            *now += pause;
            back_off.settled(*now);
            *now += after;
            pause.as_millis()
        };
        (0..losses).map(|_| lose()).collect()
    }

    #[test]
    fn losses_one_after_the_other_wait_longer_and_a_quiet_spell_forgives_them() {
        let (mut back_off, mut now) = (BackOff::default(), Instant::now());
        let soon = Duration::from_millis(1);
        let doubled = [0, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000];
        assert_eq!(pauses(&mut back_off, &mut now, 12, soon), doubled);
        now += QUIET;
        assert_eq!(pauses(&mut back_off, &mut now, 3, soon), [0, 10, 20]);
        now += QUIET;
        assert_eq!(pauses(&mut back_off, &mut now, 3, QUIET), [0, 0, 0]);
    }

    #[test]
    fn dumps_that_fail_wait_longer_however_long_they_take() {
        let (mut back_off, now) = (BackOff::default(), Instant::now());
        let pauses = (0..4).map(|failure| back_off.next(now + failure * 2 * QUIET).as_millis());
        assert_eq!(pauses.collect::<Vec<_>>(), [0, 10, 20, 40]);
    }
}
