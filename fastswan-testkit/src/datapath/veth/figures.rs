//! From turns to what is reported.

use super::{super::timing::Spread, contestant::Contestant, ends::Turn};

/// What all contestants do on some CPUs, over all rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// CPUs that generate, forward and receive at the same time.
    pub cpus: usize,
    /// In the order of [`Contestant::ALL`].
    pub contestants: [Measured; Contestant::ALL.len()],
}

/// What one contestant does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// What forwards.
    pub contestant: Contestant,
    /// Millions of frames that arrive in a second.
    pub mpps: Spread,
    /// How many times as many fastswan forwards, round by round.
    pub ours: Spread,
    /// How many times as many as on one CPU, round by round. 1 on one.
    pub scaling: Spread,
    /// The share of frames that do not arrive.
    pub lost: Spread,
    /// Rounds in which frames were lost.
    pub rounds_with_losses: usize,
}

/// The turns of each contestant, one a round, in the order of [`Contestant::ALL`].
pub(super) type Turns = [Vec<Turn>; Contestant::ALL.len()];

impl Figures {
    /// Of the turns on some CPUs and those on one, which are as many, and at least one of each contestant.
    pub(super) fn of(cpus: usize, turns: &Turns, on_one: &Turns) -> Self {
        let ours = Contestant::ALL.iter().position(|it| *it == Contestant::Ours).unwrap_or(0);
        let ratios = |of: &[Turn], to: &[Turn]| {
            Spread::of(of.iter().zip(to).map(|(of, to)| of.mpps / to.mpps).collect())
        };
        let contestants = std::array::from_fn(|index| Measured {
            contestant: Contestant::ALL[index],
            mpps: Spread::of(turns[index].iter().map(|turn| turn.mpps).collect()),
            ours: ratios(&turns[ours], &turns[index]),
            scaling: ratios(&turns[index], &on_one[index]),
            lost: Spread::of(turns[index].iter().map(Turn::lost).collect()),
            rounds_with_losses: turns[index].iter().filter(|turn| turn.arrived.packets < turn.frames).count(),
        });
        Self { cpus, contestants }
    }
}
