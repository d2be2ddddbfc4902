//! The routes of one table: a binary trie that knows of each subtree what is in it.
//!
//! Only nodes where routes are or where two paths part exist, so one route takes two nodes at most, and a change of one
//! costs as many steps as there are nodes above it.

use std::net::IpAddr;

use ipnet::IpNet;
use smallvec::SmallVec;

/// A prefix without host bits, the address from the first bit on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    bits: u128,
    length: u8,
}

impl From<IpNet> for Key {
    fn from(prefix: IpNet) -> Self {
        let bits = match prefix.network() {
            IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
            IpAddr::V6(address) => address.into(),
        };
        Self { bits, length: prefix.prefix_len() }
    }
}

impl Key {
    fn contains(self, other: Self) -> bool {
        let host_bits = u128::MAX.checked_shr(self.length.into()).unwrap_or(0);
        self.length <= other.length && (self.bits ^ other.bits) & !host_bits == 0
    }

    /// The bit after a prefix of this length, as an index.
    fn bit(self, length: u8) -> usize {
        usize::from(self.bits << u32::from(length) >> 127 == 1)
    }

    /// What two prefixes have in common.
    fn common(self, other: Self) -> Self {
        let same = u8::try_from((self.bits ^ other.bits).leading_zeros()).unwrap_or(u8::MAX);
        let length = same.min(self.length).min(other.length);
        let host_bits = u128::MAX.checked_shr(length.into()).unwrap_or(0);
        Self { bits: self.bits & !host_bits, length }
    }

    /// The length of the shortest prefix that contains this one, but not another one strictly; `None` if this one does.
    pub(super) fn even_beside(self, other: Self) -> Option<u8> {
        if other.contains(self) {
            return Some(other.length);
        }
        let common = self.common(other).length;
        (common < self.length).then_some(common + 1)
    }

    /// The prefix, given the family.
    pub(super) fn net(self, is_v4: bool) -> IpNet {
        let address = if is_v4 {
            IpAddr::V4(u32::try_from(self.bits >> 96).unwrap_or(0).into())
        } else {
            IpAddr::V6(self.bits.into())
        };
        // The length comes from a prefix of this family.
        IpNet::new_assert(address, self.length)
    }
}

/// Sums up what routes do, so that a subtree that says one thing need not be walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds {
    /// What occurs.
    bits: u8,
    /// The device of all that forward to one; [`Self::SEVERAL`] if they differ.
    device: u32,
}

impl Kinds {
    /// No interface has this index.
    const SEVERAL: u32 = u32::MAX;

    pub(super) fn new(bits: u8, device: u32) -> Self {
        Self { bits, device }
    }

    /// Both.
    fn and(self, other: Self) -> Self {
        let device = match (self.device, other.device) {
            (0, device) | (device, 0) => device,
            (one, other) if one == other => one,
            _ => Self::SEVERAL,
        };
        Self { bits: self.bits | other.bits, device }
    }

    /// Whether nothing else occurs.
    pub(crate) fn are_within(self, bits: u8) -> bool {
        self.bits & !bits == 0
    }

    /// The one device of those that forward; `None` if there are several or none.
    pub(crate) fn device(self) -> Option<u32> {
        (self.device != 0 && self.device != Self::SEVERAL).then_some(self.device)
    }
}

/// The number of something that a prefix has; not 0.
pub(super) type Value = u32;

/// No value, or no node.
const NONE: u32 = 0;

#[derive(Clone, Copy, Debug)]
struct Node {
    key: Key,
    value: Value,
    own: Kinds,
    /// Of this node and all below.
    all: Kinds,
    children: [u32; 2],
}

/// A map from prefixes of one family.
#[derive(Clone, Debug)]
pub(super) struct Trie {
    /// The first is none.
    nodes: Vec<Node>,
    free: Vec<u32>,
    root: u32,
    len: usize,
}

impl Default for Trie {
    fn default() -> Self {
        let key = Key { bits: 0, length: 0 };
        let none =
            Node { key, value: NONE, own: Kinds::default(), all: Kinds::default(), children: [NONE; 2] };
        Self { nodes: vec![none], free: Vec::new(), root: NONE, len: 0 }
    }
}

impl Trie {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of the longest prefix that contains a prefix, and its length.
    pub(super) fn covering(&self, key: Key) -> Option<(u8, Value)> {
        let mut best = None;
        let mut at = self.root;
        while at != NONE {
            let node = &self.nodes[at as usize];
            if !node.key.contains(key) {
                break;
            }
            if node.value != NONE {
                best = Some((node.key.length, node.value));
            }
            if node.key.length == key.length {
                break;
            }
            at = node.children[key.bit(node.key.length)];
        }
        best
    }

    /// Gives a prefix a value, or none, and returns the one that it had.
    pub(super) fn set(&mut self, key: Key, value: Option<(Value, Kinds)>) -> Option<Value> {
        let mut path: SmallVec<[u32; 32]> = SmallVec::new();
        let mut at = self.root;
        while at != NONE {
            let node = &self.nodes[at as usize];
            if !node.key.contains(key) || node.key.length == key.length {
                break;
            }
            path.push(at);
            at = node.children[key.bit(node.key.length)];
        }
        let is_there = at != NONE && self.nodes[at as usize].key == key;
        let old = if is_there { self.nodes[at as usize].value } else { NONE };
        match (value, is_there) {
            (None, false) => return None,
            (None, true) => {
                self.len -= usize::from(old != NONE);
                let node = &mut self.nodes[at as usize];
                (node.value, node.own) = (NONE, Kinds::default());
                path.push(at);
                self.shrink(&mut path);
            }
            (Some((value, own)), true) => {
                self.len += usize::from(old == NONE);
                let node = &mut self.nodes[at as usize];
                (node.value, node.own) = (value, own);
                path.push(at);
            }
            (Some((value, own)), false) => {
                self.len += 1;
                let leaf = self.add(Node { key, value, own, all: own, children: [NONE; 2] });
                let new = if at == NONE {
                    leaf
                } else {
                    let below = self.nodes[at as usize].key;
                    let common = below.common(key);
                    if common == key {
                        self.nodes[leaf as usize].children[below.bit(key.length)] = at;
                        leaf
                    } else {
                        let mut children = [leaf; 2];
                        children[below.bit(common.length)] = at;
                        let (own, all) = <_>::default();
                        self.add(Node { key: common, value: NONE, own, all, children })
                    }
                };
                self.link(path.last().copied(), key, new);
                path.push(new);
            }
        }
        for at in path.into_iter().rev() {
            let Node { own, children: [left, right], .. } = self.nodes[at as usize];
            let all = own.and(self.nodes[left as usize].all).and(self.nodes[right as usize].all);
            self.nodes[at as usize].all = all;
        }
        (old != NONE).then_some(old)
    }

    /// Removes the last node of a path, and the one above, where they no longer serve.
    fn shrink(&mut self, path: &mut SmallVec<[u32; 32]>) {
        while let Some(at) = path.pop() {
            let Node { key, value, children, .. } = self.nodes[at as usize];
            let below = match children {
                _ if value != NONE => None,
                [NONE, below] | [below, NONE] => Some(below),
                _ => None,
            };
            let Some(below) = below else { return path.push(at) };
            self.free.push(at);
            self.link(path.last().copied(), key, below);
        }
    }

    /// Has a node, or the root, lead to another one for a prefix.
    fn link(&mut self, from: Option<u32>, key: Key, to: u32) {
        match from {
            None => self.root = to,
            Some(from) => {
                let node = &mut self.nodes[from as usize];
                node.children[key.bit(node.key.length)] = to;
            }
        }
    }

    fn add(&mut self, node: Node) -> u32 {
        if let Some(at) = self.free.pop() {
            self.nodes[at as usize] = node;
            return at;
        }
        // A table of that many routes does not fit into memory.
        let at = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        self.nodes.push(node);
        at
    }

    /// What occurs anywhere.
    pub(super) fn all(&self) -> Kinds {
        self.nodes[self.root as usize].all
    }

    /// The prefixes with a value strictly inside one, in order, without subtrees that `skip` says nothing of interest is in:
    /// it is told the value that covers them, and what occurs there.
    pub(super) fn each_inside(
        &self,
        key: Key,
        mut skip: impl FnMut(Option<Value>, Kinds) -> bool,
        mut each: impl FnMut(Key, Value),
    ) {
        let covering = self.covering(key).map(|(_, value)| value);
        let mut todo = vec![(self.top(key), covering)];
        while let Some((at, mut covering)) = todo.pop() {
            let node = &self.nodes[at as usize];
            if at == NONE || node.key != key && skip(covering, node.all) {
                continue;
            }
            if node.value != NONE {
                if node.key != key {
                    each(node.key, node.value);
                }
                covering = Some(node.value);
            }
            let [left, right] = node.children;
            todo.extend([(right, covering), (left, covering)]);
        }
    }

    /// Whether a prefix strictly inside one has a value.
    pub(super) fn has_inside(&self, key: Key) -> bool {
        let at = self.top(key);
        let node = &self.nodes[at as usize];
        // Every node that is no prefix's has two below it.
        at != NONE && (node.key != key || node.children != [NONE; 2])
    }

    /// The length of the shortest prefix that contains one and has none with a value strictly inside; `None` if that one has.
    pub(super) fn even(&self, key: Key) -> Option<u8> {
        let mut even = 0;
        let mut at = self.root;
        while at != NONE {
            let node = &self.nodes[at as usize];
            if !node.key.contains(key) || node.children == [NONE; 2] {
                return key.even_beside(node.key);
            }
            if node.key.length == key.length {
                return None;
            }
            even = node.key.length + 1;
            at = node.children[key.bit(node.key.length)];
        }
        Some(even)
    }

    /// The topmost node inside a prefix.
    fn top(&self, key: Key) -> u32 {
        let mut at = self.root;
        while at != NONE {
            let node = &self.nodes[at as usize];
            if key.contains(node.key) {
                return at;
            }
            if !node.key.contains(key) {
                return NONE;
            }
            at = node.children[key.bit(node.key.length)];
        }
        NONE
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn prefix() -> impl Strategy<Value = IpNet> {
        (0..16u8, prop_oneof![4 => 28..=32u8, 1 => Just(0u8), 1 => Just(8u8)])
            .prop_map(|(host, length)| IpNet::new([10, 0, 0, host].into(), length).unwrap().trunc())
    }

    /// A bit and a device for each value.
    fn kinds(value: Value) -> Kinds {
        Kinds::new(1 << (value % 3), value % 4)
    }

    proptest! {
        /// After any sets and removals it answers as a list of all prefixes does, and holds no node more than it needs.
        #[test]
        fn it_answers_as_a_list_does(
            sets in proptest::collection::vec((prefix(), prop::option::weighted(0.7, 1..8u32)), 0..40),
            asked in prefix(),
        ) {
            let (mut trie, mut list) = (Trie::default(), BTreeMap::new());
            for (prefix, value) in sets {
                let old = trie.set(prefix.into(), value.map(|value| (value, kinds(value))));
                let before = match value {
                    Some(value) => list.insert(prefix, value),
                    None => list.remove(&prefix),
                };
                prop_assert_eq!(old, before);
            }
            prop_assert_eq!(trie.len, list.len());
            prop_assert!(trie.nodes.len() - trie.free.len() <= (2 * list.len()).max(1));
            let covering = list.iter().filter(|(prefix, _)| prefix.contains(&asked));
            let covering = covering.max_by_key(|(prefix, _)| prefix.prefix_len());
            let covering = covering.map(|(prefix, value)| (prefix.prefix_len(), *value));
            prop_assert_eq!(trie.covering(asked.into()), covering);
            let inside: Vec<_> = list.iter().filter(|(prefix, _)| asked.contains(*prefix) && **prefix != asked).collect();
            prop_assert_eq!(trie.has_inside(asked.into()), !inside.is_empty());
            let is_even = |length: &u8| {
                let outer = IpNet::new(asked.addr(), *length).unwrap().trunc();
                list.keys().all(|prefix| *prefix == outer || !outer.contains(prefix))
            };
            prop_assert_eq!(trie.even(asked.into()), (0..=asked.prefix_len()).find(is_even));
            let mut found = Vec::new();
            trie.each_inside(asked.into(), |_, _| false, |key, value| found.push((key.net(true), value)));
            prop_assert_eq!(found, inside.iter().map(|(prefix, value)| (**prefix, **value)).collect::<Vec<_>>());
            let sum = list.values().fold(Kinds::default(), |sum, value| sum.and(kinds(*value)));
            prop_assert_eq!(trie.all(), sum);
        }
    }

    #[test]
    fn a_subtree_of_no_interest_is_not_walked() {
        let mut trie = Trie::default();
        for (prefix, value) in [("0.0.0.0/0", 1), ("10.0.0.0/8", 1), ("10.1.0.0/16", 1), ("11.0.0.0/8", 2)] {
            let prefix: IpNet = prefix.parse().unwrap();
            trie.set(prefix.into(), Some((value, Kinds::new(1, value))));
        }
        let mut found = Vec::new();
        let everything: IpNet = "0.0.0.0/0".parse().unwrap();
        trie.each_inside(
            everything.into(),
            |covering, kinds| covering == kinds.device(),
            |key, value| found.push((key.net(true).to_string(), value)),
        );
        assert_eq!(found, [("11.0.0.0/8".to_owned(), 2)]);
    }
}
