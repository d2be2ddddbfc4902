//! What has changed lately, for readers that know the rest.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{PolicyKey, Request};
use crate::policy::Policy;

/// Older changes are forgotten. A reader that was away for longer has to read everything.
pub(super) const LENGTH: usize = 8192;

/// Names databases.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A change of a database.
#[derive(Debug)]
pub(crate) enum Change {
    /// A policy was added, changed or removed. Before, the key belonged to `before`.
    Policy { key: PolicyKey, before: Option<Box<Policy>> },
    /// An association that answers to this was added, changed or removed.
    Sa(Request),
    /// The default policy was changed.
    DefaultPolicy,
}

/// A moment in the life of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Revision {
    /// Which database.
    pub(crate) database: u64,
    number: u64,
}

/// The latest changes.
#[derive(Debug)]
pub(super) struct Journal {
    database: u64,
    changes: VecDeque<Change>,
    /// Changes that were forgotten.
    forgotten: u64,
}

impl Default for Journal {
    fn default() -> Self {
        Self { database: NEXT.fetch_add(1, Ordering::Relaxed), changes: VecDeque::new(), forgotten: 0 }
    }
}

impl Clone for Journal {
    /// A copy of a database goes its own way.
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Journal {
    pub(super) fn record(&mut self, change: Change) {
        if self.changes.len() == LENGTH {
            self.changes.pop_front();
            self.forgotten += 1;
        }
        self.changes.push_back(change);
    }

    /// Forgets everything: no reader knows the rest any longer.
    pub(super) fn forget(&mut self) {
        // One more, so that not even the present moment is known.
        self.forgotten += self.changes.len() as u64 + 1;
        self.changes.clear();
    }

    pub(super) fn revision(&self) -> Revision {
        Revision { database: self.database, number: self.forgotten + self.changes.len() as u64 }
    }

    /// The changes after a moment; `None` if some are forgotten, or if it was in another database's life.
    pub(super) fn since(&self, revision: Revision) -> Option<impl Iterator<Item = &Change>> {
        let first = revision.number.checked_sub(self.forgotten)?;
        let first = usize::try_from(first).ok()?;
        (revision.database == self.database && first <= self.changes.len())
            .then(|| self.changes.range(first..))
    }
}
