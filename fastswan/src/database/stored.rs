//! Policies or associations, each stored once: found by identity, by what it asks for or answers to, and by a number
//! that is short.

use std::hash::{BuildHasher as _, Hash};

use hashbrown::{DefaultHashBuilder, HashTable, hash_table};

use super::{
    key::Key,
    request::{ByRequest, Request},
};

/// A policy or an association.
pub(super) trait Item: PartialEq + Send {
    type Id: Clone + Hash + Eq;
    fn id(&self) -> &Self::Id;
    /// What it asks for or answers to, if that matters.
    fn request(&self) -> Option<Request>;
}

/// Items by key, by identity and by request.
#[derive(Clone, Debug)]
pub(super) struct Stored<K, T> {
    /// By key.
    places: Vec<Option<T>>,
    /// By key, how many others had it before; none where nothing was removed yet.
    generations: Vec<u32>,
    free: Vec<K>,
    by_id: HashTable<K>,
    by_request: ByRequest<K>,
    hasher: DefaultHashBuilder,
}

impl<K, T> Default for Stored<K, T> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            by_id: HashTable::new(),
            by_request: ByRequest::default(),
            hasher: <_>::default(),
        }
    }
}

impl<K: Key, T: Item> Stored<K, T> {
    pub(super) fn get(&self, key: K) -> Option<&T> {
        get(&self.places, key)
    }

    /// Tells those apart that have had this key one after the other.
    pub(super) fn generation(&self, key: K) -> u32 {
        self.generations.get(key.index()).copied().unwrap_or(0)
    }

    pub(super) fn key(&self, id: &T::Id) -> Option<K> {
        self.by_id.find(self.hasher.hash_one(id), |key| has(&self.places, *key, id)).copied()
    }

    /// All, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (K, &T)> {
        let keys = (0..).map(K::new);
        keys.zip(&self.places).filter_map(|(key, place)| Some((key, place.as_ref()?)))
    }

    /// Those with this key or a higher one, in order of keys.
    pub(super) fn from(&self, first: K) -> impl Iterator<Item = (K, &T)> {
        let keys = (first.number()..).map(K::new);
        let places = self.places.get(first.index()..).unwrap_or_default();
        keys.zip(places).filter_map(|(key, place)| Some((key, place.as_ref()?)))
    }

    /// Those of a request, the newest first.
    pub(super) fn of_request(&self, request: Request) -> impl Iterator<Item = (K, &T)> + Clone {
        let keys = self.by_request.get(request, |key| get(&self.places, key)?.request());
        keys.filter_map(|key| Some((key, self.get(key)?)))
    }

    /// Stores an item, and returns its key and the one that it replaces, which had the same identity; `Err` if that is
    /// the same in everything.
    pub(super) fn insert(&mut self, new: T) -> Result<(K, Option<T>), K> {
        let (hash, now) = (self.hasher.hash_one(new.id()), new.request());
        let (places, hasher) = (&self.places, &self.hasher);
        let is_it = |key: &K| has(places, *key, new.id());
        let (key, before) = match self.by_id.entry(hash, is_it, |key| hash_of(places, hasher, *key)) {
            hash_table::Entry::Occupied(entry) => {
                let key = *entry.get();
                let known = &mut self.places[key.index()];
                if known.as_ref() == Some(&new) {
                    return Err(key);
                }
                (key, known.replace(new))
            }
            hash_table::Entry::Vacant(vacant) => {
                let key = self.free.pop().unwrap_or_else(|| new_key(self.places.len()));
                vacant.insert(key);
                if key.index() == self.places.len() {
                    self.places.push(None);
                }
                self.places[key.index()] = Some(new);
                (key, None)
            }
        };
        let was = before.as_ref().and_then(T::request);
        if was != now {
            if let Some(was) = was {
                self.by_request.remove(key, was);
            }
            if let Some(now) = now {
                self.by_request.insert(key, now, |key| get(&self.places, key)?.request());
            }
        }
        Ok((key, before))
    }

    pub(super) fn remove(&mut self, id: &T::Id) -> Option<(K, T)> {
        let hash = self.hasher.hash_one(id);
        let is_it = |key: &K| has(&self.places, *key, id);
        let (key, _) = self.by_id.find_entry(hash, is_it).ok()?.remove();
        let removed = self.places[key.index()].take()?;
        if let Some(request) = removed.request() {
            self.by_request.remove(key, request);
        }
        if self.generations.len() <= key.index() {
            self.generations.resize(key.index() + 1, 0);
        }
        let generation = &mut self.generations[key.index()];
        *generation = generation.wrapping_add(1);
        self.free.push(key);
        Some((key, removed))
    }

    /// Stores these and nothing else, and returns those that are there no longer. What stays keeps its key. Of several with
    /// one identity, the last counts.
    pub(super) fn replace(&mut self, all: Vec<T>) -> Vec<(K, T)> {
        if self.places.is_empty() {
            self.fill(all);
            return Vec::new();
        }
        let mut stays = vec![false; self.places.len()];
        for new in all {
            let (Ok((key, _)) | Err(key)) = self.insert(new);
            // New ones have places that were not there, or that nobody had.
            if let Some(stays) = stays.get_mut(key.index()) {
                *stays = true;
            }
        }
        let leaves = |key: K| stays.get(key.index()).is_some_and(|stays| !stays);
        let leaving = self.iter().filter(|(key, _)| leaves(*key));
        let leaving: Vec<T::Id> = leaving.map(|(_, item)| item.id().clone()).collect();
        leaving.iter().filter_map(|id| self.remove(id)).collect()
    }

    /// The same when nothing is stored yet: it takes them over where they are.
    fn fill(&mut self, all: Vec<T>) {
        self.by_id.reserve(all.len(), |_| 0);
        self.by_request.reserve(all.len());
        self.places = all.into_iter().map(Some).collect();
        for key in (0..self.places.len()).map(new_key::<K>) {
            let (places, hasher) = (&self.places, &self.hasher);
            let Some(new) = get(places, key) else { continue };
            let is_it = |key: &K| has(places, *key, new.id());
            let request = new.request();
            match self.by_id.entry(hasher.hash_one(new.id()), is_it, |key| hash_of(places, hasher, *key)) {
                hash_table::Entry::Vacant(vacant) => drop(vacant.insert(key)),
                hash_table::Entry::Occupied(mut entry) => {
                    let earlier = std::mem::replace(entry.get_mut(), key);
                    if let Some(request) = get(places, earlier).and_then(T::request) {
                        self.by_request.remove(earlier, request);
                    }
                    self.places[earlier.index()] = None;
                    self.free.push(earlier);
                }
            }
            if let Some(request) = request {
                self.by_request.insert(key, request, |key| get(&self.places, key)?.request());
            }
        }
    }

    /// Everything, in no particular order.
    pub(super) fn into_all(self) -> Vec<T> {
        self.places.into_iter().flatten().collect()
    }

    /// Those that are not stored as they were found, or that were not found.
    pub(super) fn differing<'a>(&'a self, found: &'a [T]) -> Vec<&'a T::Id> {
        let mut is_found = vec![false; self.places.len()];
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
        differing.extend(self.iter().filter(|(key, _)| !is_found[key.index()]).map(|(_, item)| item.id()));
        differing
    }
}

/// The kernel numbers policies with 32 bits too, so there are never more.
fn new_key<K: Key>(number: usize) -> K {
    K::new(u32::try_from(number).unwrap_or(u32::MAX))
}

fn get<K: Key, T>(places: &[Option<T>], key: K) -> Option<&T> {
    places.get(key.index())?.as_ref()
}

fn has<K: Key, T: Item>(places: &[Option<T>], key: K, id: &T::Id) -> bool {
    get(places, key).is_some_and(|item| item.id() == id)
}

fn hash_of<K: Key, T: Item>(places: &[Option<T>], hasher: &DefaultHashBuilder, key: K) -> u64 {
    get(places, key).map_or(0, |item| hasher.hash_one(item.id()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        database::SaKey,
        policy::{SaId, SecurityAssociation, Template},
    };

    #[derive(Clone, Debug)]
    enum Step {
        Insert(SecurityAssociation),
        Remove(SaId),
        Replace(Vec<SecurityAssociation>),
    }

    fn sa() -> impl Strategy<Value = SecurityAssociation> {
        (0..2_u8, 1..6_u32, 0..3_u32, 0..2_u32).prop_map(|(peer, spi, reqid, if_id)| {
            let template = Template::esp_tunnel([192, 0, 2, 9].into(), [192, 0, 2, peer].into(), reqid);
            SecurityAssociation { if_id, ..SecurityAssociation::for_template(&template, spi) }
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => sa().prop_map(Step::Insert),
            3 => sa().prop_map(|sa| Step::Remove(sa.id)),
            1 => vec(sa(), 0..8).prop_map(Step::Replace),
        ]
    }

    proptest! {
        /// What is found, by identity and by request, is what a map that is searched from end to end has.
        #[test]
        fn every_way_to_find_an_item_finds_it(steps in vec(step(), 0..24)) {
            let mut stored: Stored<SaKey, SecurityAssociation> = Stored::default();
            let mut all: BTreeMap<SaId, SecurityAssociation> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(sa) => {
                        let before = all.insert(sa.id, sa.clone());
                        let is_new = before.as_ref() != Some(&sa);
                        let replaced = stored.insert(sa).map(|(_, replaced)| replaced);
                        prop_assert_eq!(replaced.ok(), is_new.then_some(before));
                    }
                    Step::Remove(id) => {
                        prop_assert_eq!(stored.remove(&id).map(|(_, sa)| sa), all.remove(&id));
                    }
                    Step::Replace(sas) => {
                        let keys: Vec<_> = stored.iter().map(|(key, sa)| (sa.id, key)).collect();
                        all = sas.iter().map(|sa| (sa.id, sa.clone())).collect();
                        stored.replace(sas);
                        for (id, key) in keys.into_iter().filter(|(id, _)| all.contains_key(id)) {
                            prop_assert_eq!(stored.key(&id), Some(key), "what stays keeps its key");
                        }
                    }
                }
                prop_assert_eq!(stored.iter().count(), all.len());
                for (id, sa) in &all {
                    let key = stored.key(id);
                    prop_assert_eq!(key.and_then(|key| stored.get(key)), Some(sa));
                    let mut found: Vec<_> = stored.of_request(sa.into()).map(|(_, sa)| sa.id).collect();
                    found.sort_unstable();
                    let same = all.values().filter(|other| Request::from(*other) == sa.into());
                    prop_assert_eq!(found, same.map(|sa| sa.id).collect::<Vec<_>>());
                }
            }
        }
    }
}
