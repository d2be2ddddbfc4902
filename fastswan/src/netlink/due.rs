//! What is to be done at some moment, the earliest first.

use std::{cmp::Reverse, collections::BinaryHeap};

use tokio::time::Instant;

/// Things to be done, and when.
pub(super) type Due<T> = BinaryHeap<Reverse<(Instant, T)>>;

pub(super) trait PopIfDue<T> {
    /// Takes the earliest, if its moment has come.
    fn pop_if_due(&mut self, now: Instant) -> Option<Reverse<(Instant, T)>>;
}

impl<T: Ord> PopIfDue<T> for Due<T> {
    fn pop_if_due(&mut self, now: Instant) -> Option<Reverse<(Instant, T)>> {
        if self.peek().is_some_and(|Reverse((at, _))| *at <= now) { self.pop() } else { None }
    }
}
