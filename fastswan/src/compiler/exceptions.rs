//! Policies that ask for a protocol or ports, and which of them the table has room to tell apart.

use std::collections::{BTreeMap, BTreeSet};

use super::{counts::Counts, rule::Candidate};
use crate::{
    policy::Policy,
    table::{Capacity, Cell, Exception},
};

/// The exceptions of one family.
#[derive(Debug)]
pub(super) struct Exceptions {
    limit: usize,
    tuple_limit: usize,
    /// The policies behind each.
    policies: BTreeMap<Exception, Vec<Candidate>>,
    /// Those in the table, the widest first: they would keep most from being fast.
    listed: BTreeSet<Ranked>,
    /// Those that the table has no room for: their whole regions pass.
    widened: BTreeSet<Ranked>,
    tuples: Counts<Tuple>,
    touched: BTreeMap<Exception, bool>,
}

/// An exception after the sum of its prefix lengths.
type Ranked = (u16, Exception);
/// What the table tells apart by masks: prefix lengths, whether a protocol is asked for, and port masks.
type Tuple = (u8, u8, bool, u16, u16);

/// How the region of a policy is to be treated from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// As if the policy had no protocol and no ports.
    Widen(Cell, Candidate),
    /// Not at all.
    Narrow(Cell, Candidate),
}

impl Exceptions {
    pub(super) fn new(capacity: &Capacity) -> Self {
        Self {
            limit: capacity.exceptions,
            tuple_limit: capacity.exception_tuples,
            policies: BTreeMap::new(),
            listed: BTreeSet::new(),
            widened: BTreeSet::new(),
            tuples: Counts::default(),
            touched: BTreeMap::new(),
        }
    }

    /// Forgets the policies, but not what the table says.
    pub(super) fn restart(&mut self) {
        self.policies.clear();
        self.widened.clear();
        self.tuples = Counts::default();
        for (_, exception) in std::mem::take(&mut self.listed) {
            self.touched.entry(exception).or_insert(true);
        }
    }

    pub(super) fn insert(&mut self, exception: Exception, policy: Candidate) -> Vec<Treatment> {
        let policies = self.policies.entry(exception).or_default();
        policies.push(policy);
        let is_first = policies.len() == 1;
        let ranked = rank(exception);
        if !is_first {
            return if self.widened.contains(&ranked) { vec![widen(&exception, policy)] } else { Vec::new() };
        }
        if self.listed.len() == self.limit
            && let Some(narrowest) = self.listed.last().copied()
            && ranked < narrowest
            && self.has_tuple(&exception)
        {
            self.unlist(narrowest);
            self.list(ranked);
            return self.widen(narrowest);
        }
        if self.listed.len() < self.limit && self.has_tuple(&exception) {
            self.list(ranked);
            return Vec::new();
        }
        self.widen(ranked)
    }

    pub(super) fn remove(&mut self, exception: Exception, policy: Candidate) -> Vec<Treatment> {
        let Some(policies) = self.policies.get_mut(&exception) else { return Vec::new() };
        policies.retain(|other| other.policy != policy.policy);
        let is_last = policies.is_empty();
        if is_last {
            self.policies.remove(&exception);
        }
        let ranked = rank(exception);
        if self.widened.contains(&ranked) {
            if is_last {
                self.widened.remove(&ranked);
            }
            return vec![Treatment::Narrow(exception.cell, policy)];
        }
        if !is_last {
            return Vec::new();
        }
        self.unlist(ranked);
        let mut treatments = Vec::new();
        while self.listed.len() < self.limit
            && let Some(next) = self.widened.iter().find(|(_, exception)| self.has_tuple(exception)).copied()
        {
            self.widened.remove(&next);
            self.list(next);
            let policies = self.policies.get(&next.1).into_iter().flatten();
            treatments.extend(policies.map(|policy| Treatment::Narrow(next.1.cell, *policy)));
        }
        treatments
    }

    /// What to write: which exceptions are new, and which are to be removed.
    pub(super) fn changes(&mut self) -> Vec<(Exception, bool)> {
        let mut changes = Vec::new();
        for (exception, was_listed) in std::mem::take(&mut self.touched) {
            let is_listed = self.listed.contains(&rank(exception));
            if is_listed != was_listed {
                changes.push((exception, is_listed));
            }
        }
        // What is removed may be what makes room.
        changes.sort_by_key(|(_, is_listed)| *is_listed);
        changes
    }

    /// How many the table has.
    pub(super) fn len(&self) -> usize {
        self.listed.len()
    }

    /// Whether the table tells it apart.
    pub(super) fn is_listed(&self, exception: &Exception) -> bool {
        self.listed.contains(&rank(*exception))
    }

    fn has_tuple(&self, exception: &Exception) -> bool {
        self.tuples.contains(tuple(exception)) || self.tuples.len() < self.tuple_limit
    }

    fn list(&mut self, ranked: Ranked) {
        self.listed.insert(ranked);
        self.tuples.add(tuple(&ranked.1));
        self.touched.entry(ranked.1).or_insert(false);
    }

    fn unlist(&mut self, ranked: Ranked) {
        self.listed.remove(&ranked);
        self.tuples.remove(tuple(&ranked.1));
        self.touched.entry(ranked.1).or_insert(true);
    }

    fn widen(&mut self, ranked: Ranked) -> Vec<Treatment> {
        self.widened.insert(ranked);
        let policies = self.policies.get(&ranked.1).into_iter().flatten();
        policies.map(|policy| widen(&ranked.1, *policy)).collect()
    }
}

/// What a policy is as an exception; `None` if it asks for neither protocol nor ports.
pub(super) fn exception(policy: &Policy) -> Option<Exception> {
    let selector = &policy.id.selector;
    // Bits that are masked out do not count.
    let masked = |mut port: crate::policy::PortMatch| {
        port.port &= port.mask;
        port
    };
    selector.looks_at_upper_layer().then(|| Exception {
        cell: cell(policy),
        protocol: selector.protocol,
        source_port: masked(selector.source_port),
        destination_port: masked(selector.destination_port),
    })
}

/// The addresses that a policy is about.
fn cell(policy: &Policy) -> Cell {
    let selector = &policy.id.selector;
    Cell { destination: selector.destination.trunc(), source: selector.source.trunc() }
}

fn widen(exception: &Exception, policy: Candidate) -> Treatment {
    Treatment::Widen(exception.cell, Candidate { widened: true, ..policy })
}

fn rank(exception: Exception) -> Ranked {
    let Cell { destination, source } = exception.cell;
    (u16::from(destination.prefix_len()) + u16::from(source.prefix_len()), exception)
}

fn tuple(exception: &Exception) -> Tuple {
    let Cell { destination, source } = exception.cell;
    let (source_mask, destination_mask) = (exception.source_port.mask, exception.destination_port.mask);
    (destination.prefix_len(), source.prefix_len(), exception.protocol != 0, source_mask, destination_mask)
}
