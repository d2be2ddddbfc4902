//! From moments to nanoseconds a packet.

/// Of all rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

/// What the programs cost in one round, in nanoseconds a packet, beyond those of the empty program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Two longest-prefix matches.
    pub lpm: f64,
    /// What every program must do.
    pub floor: f64,
    /// fastswan's program.
    pub ours: f64,
}

/// What the programs cost in all rounds, in nanoseconds a packet, beyond those of the empty program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// Two longest-prefix matches.
    pub lpm: Spread,
    /// What every program must do.
    pub floor: Spread,
    /// fastswan's program.
    pub ours: Spread,
    /// How many times of ours the classical way costs, round by round: a machine that changes its speed does so for both.
    pub ratio: Spread,
}

impl Figures {
    /// Of at least one round.
    #[must_use]
    pub fn of(rounds: &[Round]) -> Self {
        let all = |figure: fn(&Round) -> f64| Spread::of(rounds.iter().map(figure).collect());
        Self {
            lpm: all(|round| round.lpm),
            floor: all(|round| round.floor),
            ours: all(|round| round.ours),
            ratio: all(|round| round.lpm / round.ours),
        }
    }
}

impl Spread {
    /// Of at least one round.
    pub(super) fn of(mut rounds: Vec<f64>) -> Self {
        Self { median: median(&mut rounds), min: rounds[0], max: rounds[rounds.len() - 1] }
    }
}

/// How long a packet took between moments in nanoseconds, for each interval of this many packets.
pub(super) fn intervals(moments: &[u64], packets: u32) -> impl Iterator<Item = f64> {
    // Far below the numbers that a float does not hold.
    #[allow(clippy::cast_precision_loss)]
    moments.windows(2).map(move |pair| pair[1].saturating_sub(pair[0]) as f64 / f64::from(packets))
}

/// Sorts, and returns the middle one of at least one.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interruption_does_not_change_what_a_packet_costs() {
        let moments = [0, 10, 20, 5020, 5030].map(|moment| moment * 1024);
        let mut intervals: Vec<f64> = intervals(&moments, 1024).collect();
        assert!((median(&mut intervals) - 10.0).abs() < 1e-9);
    }

    #[test]
    fn a_spread_is_of_all_rounds() {
        let spread = Spread::of(vec![3.0, 9.0, 1.0]);
        assert_eq!(spread, Spread { median: 3.0, min: 1.0, max: 9.0 });
    }
}
