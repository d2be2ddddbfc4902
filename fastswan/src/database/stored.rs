//! Policies or associations, each stored once: found by identity, and by a number that is short.

use std::{
    hash::{BuildHasher as _, Hash},
    mem,
};

use hashbrown::{DefaultHashBuilder, HashTable, hash_table};

/// The number of something stored, as long as it is there. Afterwards something else may get it.
pub(super) trait Key: Copy + Eq {
    fn new(number: u32) -> Self;
    fn number(self) -> u32;

    fn index(self) -> usize {
        self.number() as usize
    }
}

/// What has an identity.
pub(super) trait Identified: PartialEq {
    type Id: Clone + Hash + Eq;
    fn id(&self) -> &Self::Id;
}

/// Things by key and by identity.
#[derive(Clone, Debug)]
pub(super) struct Stored<K, T> {
    places: Vec<Place<T>>,
    free: Vec<K>,
    by_id: HashTable<K>,
    hasher: DefaultHashBuilder,
}

#[derive(Clone, Debug)]
struct Place<T> {
    stored: Option<T>,
    /// How many others had this key before.
    generation: u32,
}

impl<K, T> Default for Stored<K, T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new(), by_id: HashTable::new(), hasher: <_>::default() }
    }
}

impl<K: Key, T: Identified> Stored<K, T> {
    /// Keys have numbers below this.
    pub(super) fn end(&self) -> usize {
        self.places.len()
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn get(&self, key: K) -> Option<&T> {
        self.places.get(key.index())?.stored.as_ref()
    }

    /// Tells those apart that have had this key one after the other.
    pub(super) fn generation(&self, key: K) -> u32 {
        self.places.get(key.index()).map_or(0, |place| place.generation)
    }

    pub(super) fn key(&self, id: &T::Id) -> Option<K> {
        self.by_id.find(self.hasher.hash_one(id), |key| has(&self.places, *key, id)).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, &T)> {
        let keys = (0..).map(K::new);
        keys.zip(&self.places).filter_map(|(key, place)| Some((key, place.stored.as_ref()?)))
    }

    /// Stores something, and returns its key and what it replaces, which had the same identity; `Err` if that is the
    /// same in everything.
    pub(super) fn insert(&mut self, new: T) -> Result<(K, Option<T>), K> {
        let hash = self.hasher.hash_one(new.id());
        let (places, hasher) = (&self.places, &self.hasher);
        let is_it = |key: &K| has(places, *key, new.id());
        let vacant = match self.by_id.entry(hash, is_it, |key| hash_of(places, hasher, *key)) {
            hash_table::Entry::Vacant(vacant) => vacant,
            hash_table::Entry::Occupied(entry) => {
                let key = *entry.get();
                let known = &mut self.places[key.index()].stored;
                if known.as_ref() == Some(&new) {
                    return Err(key);
                }
                return Ok((key, known.replace(new)));
            }
        };
        if let Some(key) = self.free.pop() {
            vacant.insert(key);
            self.places[key.index()].stored = Some(new);
            return Ok((key, None));
        }
        // The kernel numbers policies with 32 bits too, so there are never more.
        let key = K::new(u32::try_from(self.places.len()).unwrap_or(u32::MAX));
        vacant.insert(key);
        self.places.push(Place { stored: Some(new), generation: 0 });
        Ok((key, None))
    }

    pub(super) fn remove(&mut self, id: &T::Id) -> Option<(K, T)> {
        let hash = self.hasher.hash_one(id);
        let places = &self.places;
        let is_it = |key: &K| has(places, *key, id);
        let (key, _) = self.by_id.find_entry(hash, is_it).ok()?.remove();
        let place = &mut self.places[key.index()];
        place.generation = place.generation.wrapping_add(1);
        let removed = mem::take(&mut place.stored)?;
        self.free.push(key);
        Some((key, removed))
    }

    /// Stores these and nothing else. What stays keeps its key.
    pub(super) fn replace(&mut self, all: Vec<T>) {
        self.places.reserve_exact(all.len().saturating_sub(self.places.len()));
        let (places, hasher) = (&self.places, &self.hasher);
        self.by_id.reserve(all.len().saturating_sub(self.by_id.len()), |key| hash_of(places, hasher, *key));
        let mut stays = vec![false; self.end()];
        for new in all {
            let (Ok((key, _)) | Err(key)) = self.insert(new);
            // New ones have places that were not there, or that nobody had.
            if let Some(stays) = stays.get_mut(key.index()) {
                *stays = true;
            }
        }
        let leaves = |key: K| stays.get(key.index()).is_some_and(|stays| !stays);
        let leaving = self.iter().filter(|(key, _)| leaves(*key));
        let leaving: Vec<T::Id> = leaving.map(|(_, stored)| stored.id().clone()).collect();
        for id in &leaving {
            self.remove(id);
        }
    }

    /// Everything, in no particular order.
    pub(super) fn into_all(self) -> Vec<T> {
        self.places.into_iter().filter_map(|place| place.stored).collect()
    }

    /// Those that are not stored as they were found, or that were not found.
    pub(super) fn differing<'a>(&'a self, found: &'a [T]) -> Vec<&'a T::Id> {
        let mut is_found = vec![false; self.end()];
        let mut differing = Vec::new();
        for found in found {
            let key = self.key(found.id());
            if let Some(key) = key {
                is_found[key.index()] = true;
            }
            if key.and_then(|key| self.get(key)) != Some(found) {
                differing.push(found.id());
            }
        }
        differing
            .extend(self.iter().filter(|(key, _)| !is_found[key.index()]).map(|(_, stored)| stored.id()));
        differing
    }
}

fn has<K: Key, T: Identified>(places: &[Place<T>], key: K, id: &T::Id) -> bool {
    places[key.index()].stored.as_ref().is_some_and(|stored| stored.id() == id)
}

fn hash_of<K: Key, T: Identified>(places: &[Place<T>], hasher: &DefaultHashBuilder, key: K) -> u64 {
    places[key.index()].stored.as_ref().map_or(0, |stored| hasher.hash_one(stored.id()))
}
