//! Removals that a guard has seen begin, and the mirror has to catch up with.

use std::time::Instant;

/// From a removal that begins to its acknowledgement.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The latest that has begun, as the guard counts.
    begun: u64,
    /// The latest that the table was told to hold the consequences of.
    acknowledged: u64,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// The source is waited for.
    Settling(u64),
    /// All that the kernel had begun was to be read then.
    Settled(u64, Instant),
}

impl Pending {
    /// Takes up what the guard and the table say.
    pub(super) fn look(&mut self, begun: u64, acknowledged: u64) {
        self.begun = begun;
        self.acknowledged = acknowledged;
    }

    /// The removals to settle now.
    pub(super) fn start_settling(&mut self) -> Option<u64> {
        let is_due = matches!(self.stage, Stage::Idle) && self.begun != self.acknowledged;
        is_due.then(|| {
            self.stage = Stage::Settling(self.begun);
            self.begun
        })
    }

    pub(super) fn settled(&mut self, removals: u64, at: Instant) {
        if matches!(self.stage, Stage::Settling(settling) if settling == removals) {
            self.stage = Stage::Settled(removals, at);
        }
    }

    /// Whether the source must say again that it has caught up.
    pub(super) fn awaits_source(&self) -> bool {
        matches!(self.stage, Stage::Settled(..))
    }

    /// The removals to acknowledge, if the source, asked afterwards, had nothing more to tell, and all of it is written.
    pub(super) fn acknowledge(&mut self, asked: Option<Instant>) -> Option<u64> {
        let Stage::Settled(removals, at) = self.stage else { return None };
        // At the same moment it may have been asked before.
        asked.filter(|asked| *asked > at).map(|_| {
            self.stage = Stage::Idle;
            self.acknowledged = removals;
            removals
        })
    }
}
