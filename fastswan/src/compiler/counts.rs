//! How often things occur.

use std::collections::{BTreeMap, btree_map};

/// A multiset: things with how often they occur, in order.
#[derive(Clone, Debug)]
pub(super) struct Counts<K>(BTreeMap<K, u32>);

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Copy + Ord> Counts<K> {
    /// Adds one; true if it is the first.
    pub(super) fn add(&mut self, key: K) -> bool {
        let count = self.0.entry(key).or_default();
        *count += 1;
        *count == 1
    }

    /// Adds all: in one go those that are the same and follow one another.
    pub(super) fn add_all(&mut self, keys: impl IntoIterator<Item = K>) {
        let mut run = None;
        for key in keys {
            match &mut run {
                Some((same, count)) if *same == key => *count += 1,
                _ => self.add_run(run.replace((key, 1))),
            }
        }
        self.add_run(run);
    }

    fn add_run(&mut self, run: Option<(K, u32)>) {
        if let Some((key, count)) = run {
            *self.0.entry(key).or_default() += count;
        }
    }

    /// Removes one that is there; true if it was the last.
    pub(super) fn remove(&mut self, key: K) -> bool {
        let btree_map::Entry::Occupied(mut entry) = self.0.entry(key) else { return false };
        if *entry.get() > 1 {
            *entry.get_mut() -= 1;
            return false;
        }
        entry.remove();
        true
    }

    /// How many different ones there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The different ones, in order.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = K> {
        self.0.keys().copied()
    }

    pub(super) fn contains(&self, key: K) -> bool {
        self.0.contains_key(&key)
    }

    /// Those from `first` to `last`.
    pub(super) fn range(&self, range: std::ops::RangeInclusive<K>) -> impl Iterator<Item = K> {
        self.0.range(range).map(|(key, _)| *key)
    }
}
