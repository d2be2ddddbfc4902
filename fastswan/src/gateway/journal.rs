//! Log lines of policies that become fast, or are no longer.

use std::time::{Duration, Instant};

use crate::{
    mirror::Mirror,
    table::{Slot, TableUpdate},
};

/// Policies that are named in a period; the others are counted.
const MOST_NAMED: usize = 8;
const PERIOD: Duration = Duration::from_secs(1);

/// What was logged lately.
#[derive(Debug, Default)]
pub(super) struct Journal {
    /// By slot, whether its policy is fast.
    is_fast: Vec<bool>,
    began: Option<Instant>,
    named: usize,
    /// Those that became fast, and those that did not stay so, since the last line that names none.
    unnamed: [usize; 2],
}

impl Journal {
    /// Logs what an update changes.
    pub(super) fn note(&mut self, update: &TableUpdate, mirror: &Mirror) {
        if self.began.is_none_or(|began| began.elapsed() >= PERIOD) {
            self.tell_unnamed();
            (self.began, self.named) = (Some(Instant::now()), 0);
        }
        for (slot, standing) in &update.slots {
            let reason = match standing {
                Some(Ok(_)) => None,
                Some(Err(reason)) => Some(reason.name()),
                None => Some("removed"),
            };
            if self.replace(*slot, reason.is_none()) == reason.is_none() {
                continue;
            }
            if self.named == MOST_NAMED {
                self.unnamed[usize::from(reason.is_some())] += 1;
                continue;
            }
            self.named += 1;
            let policy = mirror.compiler().policy_of(mirror.database(), *slot).map(ToString::to_string);
            match reason {
                None => tracing::info!(policy, "a policy has all that the fast path needs"),
                Some(reason) => tracing::info!(policy, reason, "a policy passes to the kernel"),
            }
        }
        if self.named < MOST_NAMED {
            self.tell_unnamed();
        }
    }

    fn tell_unnamed(&mut self) {
        let [fast, passing] = std::mem::take(&mut self.unnamed);
        if fast + passing > 0 {
            tracing::info!(fast, passing, "and other policies");
        }
    }

    fn replace(&mut self, slot: Slot, is_fast: bool) -> bool {
        let index = slot.0 as usize;
        if self.is_fast.len() <= index {
            self.is_fast.resize(index + 1, false);
        }
        std::mem::replace(&mut self.is_fast[index], is_fast)
    }
}
