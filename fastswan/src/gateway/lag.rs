//! How long changes take.

use std::time::Duration;

/// Each doubling is split into so many steps, so a quantile is at most a quarter too high.
const STEPS: usize = 4;
/// From 1 µs to more than an hour.
const DOUBLINGS: usize = 32;

/// Durations, counted in steps of at most a quarter.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    counts: [u64; STEPS * DOUBLINGS],
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; STEPS * DOUBLINGS], max: Duration::ZERO }
    }
}

/// How long changes took from the source to the table, since the gateway began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Lag {
    /// Writes that were timed, each from the first event that it follows from.
    pub writes: u64,
    /// Half of them took no longer, to a quarter.
    #[cfg_attr(feature = "serde", serde(rename = "median_seconds", serialize_with = "crate::text::seconds"))]
    pub median: Duration,
    /// 99 of 100 took no longer, to a quarter.
    #[cfg_attr(feature = "serde", serde(rename = "p99_seconds", serialize_with = "crate::text::seconds"))]
    pub p99: Duration,
    /// The longest.
    #[cfg_attr(feature = "serde", serde(rename = "max_seconds", serialize_with = "crate::text::seconds"))]
    pub max: Duration,
}

impl Histogram {
    pub(super) fn record(&mut self, took: Duration) {
        self.max = self.max.max(took);
        self.counts[step(took)] += 1;
    }

    pub(super) fn lag(&self) -> Lag {
        Lag {
            writes: self.counts.iter().sum(),
            median: self.quantile(50).min(self.max),
            p99: self.quantile(99).min(self.max),
            max: self.max,
        }
    }

    fn quantile(&self, percent: u64) -> Duration {
        let rank = (self.counts.iter().sum::<u64>() * percent).div_ceil(100);
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank && seen > 0
        });
        found.map_or(Duration::ZERO, end_of)
    }
}

/// The step that a duration is counted in.
fn step(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let doubling = micros.ilog2();
    // The two bits below the highest.
    let quarter = (u128::from(micros) << 2 >> doubling) & 3;
    (doubling as usize * STEPS + usize::try_from(quarter).unwrap_or(0)).min(STEPS * DOUBLINGS - 1)
}

/// The end of a step.
fn end_of(step: usize) -> Duration {
    let (doubling, quarter) = (step / STEPS, (step % STEPS) as u64);
    Duration::from_micros(((5 + quarter) << doubling) / 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every duration lies in its step, which ends at most a quarter later, or a microsecond.
        #[test]
        fn a_step_ends_soon_after_each_duration_in_it(micros in 1..(1_u64 << 31)) {
            let end = u64::try_from(end_of(step(Duration::from_micros(micros))).as_micros()).unwrap();
            prop_assert!(micros <= end + 1 && end <= micros + micros / 4 + 1, "{} in a step to {}", micros, end);
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.lag(), Lag::default());
        (0..98).for_each(|_| histogram.record(Duration::from_micros(100)));
        (0..2).for_each(|_| histogram.record(Duration::from_millis(7)));
        let Lag { writes, median, p99, max, .. } = histogram.lag();
        assert_eq!((writes, max), (100, Duration::from_millis(7)));
        assert!(median >= Duration::from_micros(100) && median <= Duration::from_micros(125), "{median:?}");
        assert_eq!(p99, Duration::from_millis(7));
    }
}
