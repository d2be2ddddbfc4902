//! What the program needs in order to look up addresses: of all facts, those that fast cells ask about.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::counts::Counts;

/// The entries of one list that are needed because a prefix is looked up in it.
#[derive(Debug)]
pub(super) struct Probed<V> {
    /// Prefixes whose addresses are looked up, one for each cell.
    prefixes: Counts<IpNet>,
    prefix_lengths: Counts<u8>,
    /// Lengths of needed entries.
    lengths: Counts<u8>,
    entries: BTreeMap<IpNet, Entry<V>>,
    touched: BTreeSet<IpNet>,
    needed: usize,
}

#[derive(Debug)]
struct Entry<V> {
    /// How many of the prefixes need it.
    needed_by: usize,
    value: V,
    /// What the table says.
    written: Option<V>,
}

impl<V> Default for Probed<V> {
    fn default() -> Self {
        Self {
            prefixes: Counts::default(),
            prefix_lengths: Counts::default(),
            lengths: Counts::default(),
            entries: BTreeMap::new(),
            touched: BTreeSet::new(),
            needed: 0,
        }
    }
}

impl<V: Copy + PartialEq> Probed<V> {
    /// A cell looks addresses of a prefix up, which takes the entries that `needs` returns.
    pub(super) fn begin(&mut self, prefix: IpNet, needs: impl FnOnce() -> Vec<(IpNet, V)>) {
        if self.prefixes.add(prefix) {
            self.prefix_lengths.add(prefix.prefix_len());
            for (entry, value) in needs() {
                self.need(entry, value, 1);
            }
        }
    }

    /// A cell no longer does.
    pub(super) fn end(&mut self, prefix: IpNet, needed: impl FnOnce() -> Vec<(IpNet, V)>) {
        if self.prefixes.remove(prefix) {
            self.prefix_lengths.remove(prefix.prefix_len());
            for (entry, _) in needed() {
                self.need_no_longer(entry, 1);
            }
        }
    }

    /// There is another entry, needed by the prefixes that cover it.
    pub(super) fn appear(&mut self, entry: IpNet, value: V) {
        let covering = self.covering(entry);
        self.need(entry, value, covering);
    }

    /// An entry is there no more.
    pub(super) fn disappear(&mut self, entry: IpNet) {
        let covering = self.covering(entry);
        self.need_no_longer(entry, covering);
    }

    /// Takes away what is needed of a prefix, which is about to change: `part` of it for prefixes that contain it, and what is
    /// `about` those inside.
    pub(super) fn forget(
        &mut self,
        prefix: IpNet,
        part: impl FnOnce() -> Vec<(IpNet, V)>,
        about: impl Fn(IpNet) -> Vec<(IpNet, V)>,
    ) {
        self.each_needed(prefix, part, about, |probed, entry, _, by| probed.need_no_longer(entry, by));
    }

    /// The other way round.
    pub(super) fn learn(
        &mut self,
        prefix: IpNet,
        part: impl FnOnce() -> Vec<(IpNet, V)>,
        about: impl Fn(IpNet) -> Vec<(IpNet, V)>,
    ) {
        self.each_needed(prefix, part, about, Self::need);
    }

    fn each_needed(
        &mut self,
        prefix: IpNet,
        part: impl FnOnce() -> Vec<(IpNet, V)>,
        about: impl Fn(IpNet) -> Vec<(IpNet, V)>,
        mut each: impl FnMut(&mut Self, IpNet, V, usize),
    ) {
        let inside: Vec<IpNet> = self.inside(prefix).collect();
        let containing = self.covering(prefix) - usize::from(self.prefixes.contains(prefix));
        let part = if containing > 0 { part() } else { Vec::new() };
        let about = inside.into_iter().flat_map(about).map(|needed| (needed, 1));
        let needed: Vec<_> = part.into_iter().map(|needed| (needed, containing)).chain(about).collect();
        for ((entry, value), by) in needed {
            each(self, entry, value, by);
        }
    }

    /// The prefixes inside one, or it, whose addresses are looked up.
    fn inside(&self, prefix: IpNet) -> impl Iterator<Item = IpNet> {
        let last = IpNet::from(prefix.broadcast());
        self.prefixes.range(prefix..=last).filter(move |inside| prefix.contains(inside))
    }

    /// Forgets what is looked up, but not what the table says.
    pub(super) fn restart(&mut self) {
        self.prefixes = Counts::default();
        self.prefix_lengths = Counts::default();
        self.lengths = Counts::default();
        self.needed = 0;
        for (entry, state) in &mut self.entries {
            state.needed_by = 0;
            self.touched.insert(*entry);
        }
    }

    /// What to write so that the table holds what is needed.
    pub(super) fn changes(&mut self) -> Vec<(IpNet, Option<V>)> {
        let mut changes = Vec::new();
        for prefix in std::mem::take(&mut self.touched) {
            let Some(entry) = self.entries.get_mut(&prefix) else { continue };
            let wanted = (entry.needed_by > 0).then_some(entry.value);
            if wanted != entry.written {
                changes.push((prefix, wanted));
                entry.written = wanted;
            }
            if wanted.is_none() {
                self.entries.remove(&prefix);
            }
        }
        changes
    }

    /// Whether a needed entry contains an address.
    pub(super) fn is_about(&self, address: IpAddr) -> bool {
        let covering = self.lengths.iter().filter_map(|length| IpNet::new(address, length).ok());
        covering
            .map(|prefix| prefix.trunc())
            .any(|prefix| self.entries.get(&prefix).is_some_and(|entry| entry.needed_by > 0))
    }

    /// How many entries are needed.
    pub(super) fn len(&self) -> usize {
        self.needed
    }

    /// How many different prefix lengths they have.
    pub(super) fn lengths(&self) -> usize {
        self.lengths.len()
    }

    fn need(&mut self, prefix: IpNet, value: V, by: usize) {
        if by == 0 {
            return;
        }
        let entry = self.entries.entry(prefix).or_insert(Entry { needed_by: 0, value, written: None });
        if entry.needed_by == 0 {
            self.needed += 1;
            self.lengths.add(prefix.prefix_len());
        }
        entry.needed_by += by;
        entry.value = value;
        self.touched.insert(prefix);
    }

    fn need_no_longer(&mut self, prefix: IpNet, by: usize) {
        let Some(entry) = self.entries.get_mut(&prefix).filter(|entry| by > 0 && entry.needed_by > 0) else {
            return;
        };
        entry.needed_by = entry.needed_by.saturating_sub(by);
        if entry.needed_by == 0 {
            self.needed -= 1;
            self.lengths.remove(prefix.prefix_len());
        }
        self.touched.insert(prefix);
    }

    /// How many of the prefixes cover an entry.
    fn covering(&self, entry: IpNet) -> usize {
        let lengths = self.prefix_lengths.range(0..=entry.prefix_len());
        let covering = lengths.filter_map(|length| IpNet::new(entry.addr(), length).ok());
        covering.filter(|prefix| self.prefixes.contains(prefix.trunc())).count()
    }
}
