//! Which policies and associations belong together: those of one outer destination and reqid, from one source.

use std::{hash::BuildHasher as _, iter, net::IpAddr};

use hashbrown::{DefaultHashBuilder, HashTable, hash_table::Entry};

use super::key::Key;
use crate::policy::{Origin, Policy, SecurityAssociation, Template};

/// What a template asks for, and an association answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Request {
    destination: IpAddr,
    reqid: u32,
    origin: Origin,
}

impl Request {
    /// What a step of a policy asks for.
    pub(super) fn of(policy: &Policy, template: &Template) -> Self {
        Self { destination: template.destination, reqid: template.reqid, origin: policy.origin }
    }
}

impl From<&SecurityAssociation> for Request {
    fn from(sa: &SecurityAssociation) -> Self {
        Self { destination: sa.id.destination, reqid: sa.reqid, origin: sa.id.origin }
    }
}

/// Keys by request. Those of one request are a chain.
///
/// The requests themselves are not here: who knows them must say so each time.
#[derive(Clone, Debug)]
pub(super) struct ByRequest<K> {
    /// The first key of each chain.
    heads: HashTable<K>,
    /// By key.
    links: Vec<Links>,
    hasher: DefaultHashBuilder,
}

/// Numbers, and [`NONE`] at the ends: an `Option` would take as much again.
#[derive(Clone, Copy, Debug)]
struct Links {
    next: u32,
    previous: u32,
}

/// No key has this number.
const NONE: u32 = u32::MAX;

impl Links {
    const ALONE: Self = Self { next: NONE, previous: NONE };
}

impl<K> Default for ByRequest<K> {
    fn default() -> Self {
        Self { heads: HashTable::new(), links: Vec::new(), hasher: <_>::default() }
    }
}

impl<K: Key> ByRequest<K> {
    /// Makes room for so many more, when there are none.
    pub(super) fn reserve(&mut self, more: usize) {
        self.heads.reserve(more, |_| 0);
        self.links.reserve_exact(more);
    }

    /// Adds a key that is not there.
    pub(super) fn insert(&mut self, key: K, request: Request, request_of: impl Fn(K) -> Option<Request>) {
        let hash = |request| self.hasher.hash_one(request);
        let is_it = |head: &K| request_of(*head) == Some(request);
        let next = match self.heads.entry(hash(request), is_it, |head| request_of(*head).map_or(0, hash)) {
            Entry::Vacant(vacant) => {
                vacant.insert(key);
                NONE
            }
            Entry::Occupied(mut head) => std::mem::replace(head.get_mut(), key).number(),
        };
        if self.links.len() <= key.index() {
            self.links.resize(key.index() + 1, Links::ALONE);
        }
        self.links[key.index()] = Links { next, ..Links::ALONE };
        if let Some(next) = self.links_of(next) {
            next.previous = key.number();
        }
    }

    /// Removes a key that is there.
    pub(super) fn remove(&mut self, key: K, request: Request) {
        let Links { next, previous } = self.links[key.index()];
        if let Some(next) = self.links_of(next) {
            next.previous = previous;
        }
        if let Some(previous) = self.links_of(previous) {
            previous.next = next;
        } else if let Ok(mut head) = self.heads.find_entry(self.hasher.hash_one(request), |head| *head == key)
        {
            match next {
                NONE => drop(head.remove()),
                next => *head.get_mut() = K::new(next),
            }
        }
    }

    /// The keys of a request, the newest first.
    pub(super) fn get(
        &self,
        request: Request,
        request_of: impl Fn(K) -> Option<Request>,
    ) -> impl Iterator<Item = K> + Clone {
        let head = self.heads.find(self.hasher.hash_one(request), |head| request_of(*head) == Some(request));
        iter::successors(head.copied(), |key| {
            let Links { next, .. } = self.links[key.index()];
            (next != NONE).then(|| K::new(next))
        })
    }

    /// Those of a key by its number; `None` of [`NONE`].
    fn links_of(&mut self, number: u32) -> Option<&mut Links> {
        (number != NONE).then(|| &mut self.links[K::new(number).index()])
    }
}
