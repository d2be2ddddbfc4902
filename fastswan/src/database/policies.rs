//! The policies, each stored once: found by identity, and by a number that is short.

use std::{
    hash::{BuildHasher, RandomState},
    mem,
};

use hashbrown::{HashTable, hash_table};

use crate::policy::{Policy, PolicyId};

/// The number of a policy, as long as it is in the database. Afterwards another one may get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PolicyKey(pub(crate) u32);

/// Policies by key and by identity.
#[derive(Clone, Debug, Default)]
pub(super) struct Policies {
    places: Vec<Place>,
    free: Vec<PolicyKey>,
    by_id: HashTable<PolicyKey>,
    hasher: RandomState,
}

#[derive(Clone, Debug, Default)]
struct Place {
    policy: Option<Policy>,
    /// How many policies had this key before.
    generation: u32,
    /// See [`Database::is_order_known`](super::Database).
    is_order_known: bool,
}

impl Policies {
    /// Makes room for this many in all.
    pub(super) fn reserve(&mut self, all: usize) {
        self.places.reserve_exact(all.saturating_sub(self.places.len()));
        let (places, hasher) = (&self.places, &self.hasher);
        self.by_id.reserve(all.saturating_sub(self.by_id.len()), |key| hash_of(places, hasher, *key));
    }

    /// Keys are below this.
    pub(super) fn end(&self) -> usize {
        self.places.len()
    }

    pub(super) fn get(&self, key: PolicyKey) -> Option<&Policy> {
        self.places.get(key.0 as usize)?.policy.as_ref()
    }

    /// Tells the policies apart that have had this key one after the other.
    pub(super) fn generation(&self, key: PolicyKey) -> u32 {
        self.places.get(key.0 as usize).map_or(0, |place| place.generation)
    }

    /// Whether the policy was told of since [`Self::forget_order`].
    pub(super) fn is_order_known(&self, key: PolicyKey) -> bool {
        self.places.get(key.0 as usize).is_some_and(|place| place.is_order_known)
    }

    /// True if it was not.
    pub(super) fn set_order_known(&mut self, key: PolicyKey) -> bool {
        let place = self.places.get_mut(key.0 as usize);
        place.is_some_and(|place| !mem::replace(&mut place.is_order_known, true))
    }

    pub(super) fn forget_order(&mut self) {
        self.places.iter_mut().for_each(|place| place.is_order_known = false);
    }

    pub(super) fn key(&self, id: &PolicyId) -> Option<PolicyKey> {
        self.by_id.find(self.hasher.hash_one(id), |key| has(&self.places, *key, id)).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PolicyKey, &Policy)> {
        (0..).map(PolicyKey).zip(&self.places).filter_map(|(key, place)| Some((key, place.policy.as_ref()?)))
    }

    /// Stores a policy, and returns its key and the one with the same identity that it replaces; `Err` if that
    /// is the same in everything.
    pub(super) fn insert(&mut self, policy: Policy) -> Result<(PolicyKey, Option<Policy>), PolicyKey> {
        let hash = self.hasher.hash_one(&policy.id);
        let (places, hasher) = (&self.places, &self.hasher);
        let is_it = |key: &PolicyKey| has(places, *key, &policy.id);
        let vacant = match self.by_id.entry(hash, is_it, |key| hash_of(places, hasher, *key)) {
            hash_table::Entry::Vacant(vacant) => vacant,
            hash_table::Entry::Occupied(entry) => {
                let key = *entry.get();
                let known = &mut self.places[key.0 as usize].policy;
                if known.as_ref() == Some(&policy) {
                    return Err(key);
                }
                return Ok((key, known.replace(policy)));
            }
        };
        // The kernel numbers policies with 32 bits too, so there are never more.
        let fresh = PolicyKey(u32::try_from(self.places.len()).unwrap_or(u32::MAX));
        let key = self.free.pop().unwrap_or(fresh);
        vacant.insert(key);
        if key == fresh {
            self.places.push(Place::default());
        }
        self.places[key.0 as usize].policy = Some(policy);
        Ok((key, None))
    }

    pub(super) fn remove(&mut self, id: &PolicyId) -> Option<(PolicyKey, Policy)> {
        let hash = self.hasher.hash_one(id);
        let places = &self.places;
        let is_it = |key: &PolicyKey| has(places, *key, id);
        let hash_table::Entry::Occupied(entry) =
            self.by_id.entry(hash, is_it, |key| hash_of(places, &self.hasher, *key))
        else {
            return None;
        };
        let (key, _) = entry.remove();
        let place = &mut self.places[key.0 as usize];
        place.generation = place.generation.wrapping_add(1);
        place.is_order_known = false;
        let policy = mem::take(&mut place.policy)?;
        self.free.push(key);
        Some((key, policy))
    }
}

fn has(places: &[Place], key: PolicyKey, id: &PolicyId) -> bool {
    places[key.0 as usize].policy.as_ref().is_some_and(|policy| policy.id == *id)
}

fn hash_of(places: &[Place], hasher: &RandomState, key: PolicyKey) -> u64 {
    places[key.0 as usize].policy.as_ref().map_or(0, |policy| hasher.hash_one(&policy.id))
}
