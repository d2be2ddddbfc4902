//! A map from prefixes to values that knows which prefixes lie inside which.
//!
//! Prefixes nest or are disjoint. Sorted by address, then length, each prefix comes right before all that lie
//! inside it; so what is inside is a slice, and what covers is a chain of parents. Built once, then read: by
//! the [`Compiler`](crate::Compiler) for policies, by the [host facts](crate::host) for routes.

use ipnet::IpNet;

/// A map from prefixes without host bits, of either family.
#[derive(Clone, Debug)]
pub(crate) struct PrefixMap<V> {
    entries: Vec<Entry<V>>,
}

#[derive(Clone, Debug)]
struct Entry<V> {
    prefix: IpNet,
    value: V,
    /// Index of the longest prefix that covers this one.
    parent: Option<usize>,
}

impl<V> PrefixMap<V> {
    /// The map of these values. Of several values for one prefix, the first counts.
    pub(crate) fn new(mut values: Vec<(IpNet, V)>) -> Self {
        values.sort_by_key(|(prefix, _)| *prefix);
        values.dedup_by_key(|(prefix, _)| *prefix);
        let mut entries: Vec<Entry<V>> = Vec::with_capacity(values.len());
        for (prefix, value) in values {
            let mut parent = entries.len().checked_sub(1);
            while let Some(index) = parent
                && !entries[index].prefix.contains(&prefix)
            {
                parent = entries[index].parent;
            }
            entries.push(Entry { prefix, value, parent });
        }
        Self { entries }
    }

    /// All of them, each before those inside it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpNet, &V)> {
        self.entries.iter().map(|entry| (entry.prefix, &entry.value))
    }

    /// The prefix itself, if it is there, and those that cover it, longest first.
    pub(crate) fn covering(&self, prefix: IpNet) -> impl Iterator<Item = (IpNet, &V)> {
        // Whatever covers the prefix also covers, or is, the last entry before it.
        let last = self.entries.partition_point(|entry| entry.prefix <= prefix).checked_sub(1);
        std::iter::successors(last, |index| self.entries[*index].parent)
            .map(|index| &self.entries[index])
            .filter(move |entry| entry.prefix.contains(&prefix))
            .map(|entry| (entry.prefix, &entry.value))
    }

    /// The prefix itself, if it is there, and those inside it.
    pub(crate) fn inside(&self, prefix: IpNet) -> impl ExactSizeIterator<Item = (IpNet, &V)> {
        let start = self.entries.partition_point(|entry| entry.prefix < prefix);
        let length = self.entries[start..].partition_point(|entry| prefix.contains(&entry.prefix));
        self.entries[start..start + length].iter().map(|entry| (entry.prefix, &entry.value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::Family;

    fn prefix() -> impl Strategy<Value = IpNet> {
        (any::<bool>(), 0..16u8, 0..=5u8).prop_map(|(v6, host, length)| {
            let text = if v6 {
                format!("fe00::{host}/{}", if length == 5 { 0 } else { 124 + length })
            } else {
                format!("10.0.0.{host}/{}", if length == 5 { 0 } else { 28 + length })
            };
            text.parse::<IpNet>().unwrap().trunc()
        })
    }

    proptest! {
        /// What covers a prefix and what is inside it is what comparing it with every entry says.
        #[test]
        fn covering_and_inside_agree_with_a_scan(
            prefixes in proptest::collection::btree_set(prefix(), 0..24),
            asked in prefix(),
        ) {
            let map = PrefixMap::new(prefixes.iter().map(|prefix| (*prefix, ())).collect());
            let mut covering: Vec<_> = prefixes.iter().copied().filter(|p| p.contains(&asked)).collect();
            covering.sort_by_key(|prefix| std::cmp::Reverse(prefix.prefix_len()));
            let inside: Vec<_> = prefixes.iter().copied().filter(|p| asked.contains(p)).collect();
            prop_assert_eq!(map.covering(asked).map(|(p, ())| p).collect::<Vec<_>>(), covering);
            prop_assert_eq!(map.inside(asked).map(|(p, ())| p).collect::<Vec<_>>(), inside);
        }
    }

    #[test]
    fn families_do_not_cover_each_other() {
        let map = PrefixMap::new(vec![(Family::V4.everything(), 4), (Family::V6.everything(), 6)]);
        let covering = |text: &str| map.covering(text.parse().unwrap()).map(|(_, v)| *v).collect::<Vec<_>>();
        assert_eq!(covering("10.0.0.0/8"), [4]);
        assert_eq!(covering("fe00::/8"), [6]);
    }
}
