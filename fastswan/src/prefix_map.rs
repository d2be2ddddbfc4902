//! A map from prefixes to values that knows which prefixes lie inside which.
//!
//! Prefixes nest or are disjoint. Sorted by address, then length, each prefix comes right before all that lie
//! inside it; so what is inside is a slice, and what covers is a chain of parents. Built once, then read, by the
//! [`Compiler`](crate::Compiler) when a table is too small.

use std::net::IpAddr;

use ipnet::IpNet;

/// A map from prefixes without host bits, of either family.
#[derive(Clone, Debug)]
pub(crate) struct PrefixMap<V> {
    entries: Vec<Entry<V>>,
}

#[derive(Clone, Debug)]
struct Entry<V> {
    key: Key,
    prefix: IpNet,
    value: V,
    /// Index of the longest prefix that covers this one.
    parent: Option<usize>,
}

/// A prefix in a form that is fast to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    is_v6: bool,
    /// The address, from the first bit on.
    bits: u128,
    length: u8,
}

impl From<&IpNet> for Key {
    fn from(prefix: &IpNet) -> Self {
        let (is_v6, bits) = match prefix.addr() {
            IpAddr::V4(address) => (false, u128::from(u32::from(address)) << 96),
            IpAddr::V6(address) => (true, address.into()),
        };
        Self { is_v6, bits, length: prefix.prefix_len() }
    }
}

impl Key {
    fn contains(&self, other: &Self) -> bool {
        let host_bits = u128::MAX.checked_shr(self.length.into()).unwrap_or(0);
        self.is_v6 == other.is_v6 && self.length <= other.length && (self.bits ^ other.bits) & !host_bits == 0
    }
}

impl<V> PrefixMap<V> {
    /// The map of these values. Of several values for one prefix, the first counts.
    pub(crate) fn new(mut values: Vec<(IpNet, V)>) -> Self {
        values.sort_by_key(|(prefix, _)| Key::from(prefix));
        values.dedup_by_key(|(prefix, _)| *prefix);
        let mut entries: Vec<Entry<V>> = Vec::with_capacity(values.len());
        for (prefix, value) in values {
            let key = Key::from(&prefix);
            let mut parent = entries.len().checked_sub(1);
            while let Some(index) = parent
                && !entries[index].key.contains(&key)
            {
                parent = entries[index].parent;
            }
            entries.push(Entry { key, prefix, value, parent });
        }
        Self { entries }
    }

    /// The prefix itself, if it is there, and those that cover it, longest first.
    pub(crate) fn covering(&self, prefix: IpNet) -> impl Iterator<Item = (IpNet, &V)> {
        let key = Key::from(&prefix);
        // Whatever covers the prefix also covers, or is, the last entry before it.
        let last = self.entries.partition_point(|entry| entry.key <= key).checked_sub(1);
        std::iter::successors(last, |index| self.entries[*index].parent)
            .map(|index| &self.entries[index])
            .filter(move |entry| entry.key.contains(&key))
            .map(|entry| (entry.prefix, &entry.value))
    }

    /// The prefix itself, if it is there, and those inside it.
    pub(crate) fn inside(&self, prefix: IpNet) -> impl ExactSizeIterator<Item = (IpNet, &V)> {
        let key = Key::from(&prefix);
        let start = self.entries.partition_point(|entry| entry.key < key);
        let length = self.entries[start..].partition_point(|entry| key.contains(&entry.key));
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
