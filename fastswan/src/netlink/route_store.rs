//! All routes of a family as the kernel has them, and what its notifications make of them.
//!
//! The kernel tells of one route at a time and expects its listeners to know which other one it replaces, beside which it
//! stands and which goes. [`take_up`] knows the rules of both families. What does not fit them is said to be doubtful, and is
//! for the caller to ask for.
//!
//! Large tables have many prefixes and few different next hops, so what is known about a route is kept once
//! ([`RouteInfo`]) and a prefix only holds its number.

use std::hash::BuildHasher as _;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use smallvec::SmallVec;

use super::route_message::{RouteInfo, RouteKey, RouteMessage};
use crate::policy::Family;

/// A number of prefixes up to which it is known which ones have an info.
const FEW: usize = 16;

/// What a notification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RouteAction {
    /// There is such a route now.
    Added {
        /// It took the place of another one (`NLM_F_REPLACE`).
        replaces: bool,
        /// It stands behind those of the same metric (`NLM_F_APPEND`).
        is_last: bool,
    },
    /// There is no such route any longer.
    Removed,
}

/// What came of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// All was known.
    Nothing,
    Changed,
    /// It does not fit to what was known about the prefix.
    Doubtful,
}

/// The routes of a table for one prefix, in the kernel's order.
pub(crate) type RouteList = SmallVec<[RouteInfo; 1]>;

/// Takes up a notification about the routes of a table for one prefix.
///
/// What is told may be known already, because the routes were read later than it was sent: `is_repeated`. Repeated from any
/// point on, notifications lead to the same routes in the end, though not always in the same order for IPv6, unless a route
/// replaced another one: then it cannot be said which.
pub(crate) fn take_up(
    list: &mut RouteList,
    family: Family,
    action: RouteAction,
    info: &RouteInfo,
    is_repeated: bool,
) -> Effect {
    let effect = match (family, action) {
        (Family::V4, RouteAction::Added { replaces, is_last }) => {
            if is_repeated && !replaces && info.next_hop == 0 {
                // What is told later may have changed the order already, and does it again.
                list.retain(|route| !route.is_same(info));
            }
            add_v4(list, info, replaces, is_last)
        }
        (Family::V6, RouteAction::Added { replaces, .. }) => {
            // One of several next hops, which were read together.
            let is_among = |route: &RouteInfo| route.hops.len() > 1 && is_part(route, info);
            if is_repeated && !replaces && list.iter().any(is_among) {
                return Effect::Nothing;
            }
            add_v6(list, info, replaces)
        }
        (_, RouteAction::Removed) => remove(list, family, info),
    };
    if effect == Effect::Doubtful && is_repeated { Effect::Changed } else { effect }
}

/// `fib_table_insert`: by type of service, then by metric. Among equal ones the new one comes first unless it is appended;
/// it replaces the first one.
fn add_v4(list: &mut RouteList, info: &RouteInfo, replaces: bool, is_last: bool) -> Effect {
    let (first, end) = places(list, |route| (std::cmp::Reverse(route.tos), route.metric), info);
    let known = (first..end).find(|at| list[*at].is_same(info));
    match known {
        // A next hop object that is replaced is told as this of each route that uses it.
        Some(at) if replaces && at != first && info.next_hop == 0 => {
            list[at] = info.clone();
            list.remove(first);
            Effect::Changed
        }
        Some(at) => update(&mut list[at], info),
        None if replaces && first < end => update(&mut list[first], info),
        None => {
            list.insert(if is_last { end } else { first }, info.clone());
            if replaces { Effect::Doubtful } else { Effect::Changed }
        }
    }
}

/// `fib6_add_rt2node`: by metric, a new one behind the others of its metric. Those that differ in their gateway only are one
/// route with several next hops, which is told as a whole when one is added. One that replaces takes the place of the first that
/// is of its kind in this respect, else of the first.
fn add_v6(list: &mut RouteList, info: &RouteInfo, replaces: bool) -> Effect {
    let (first, end) = places(list, |route| (route.source.is_none(), route.source, route.metric), info);
    let mut same = first..end;
    let is_part = |at: &usize| {
        let hops = &list[*at].hops;
        list[*at].next_hop == 0 && !hops.is_empty() && hops.iter().any(|hop| info.hops.contains(hop))
    };
    let known = same.clone().find(|at| list[*at].is_same(info));
    let place = match known {
        Some(at) if !replaces || info.next_hop != 0 => Some(at),
        _ if replaces => {
            // Only a command replaces a route, and what it makes is not from a router advertisement.
            let can_have_siblings = info.can_have_siblings().unwrap_or(true);
            let is_clear = same.len() == 1 || same.clone().all(|at| list[at].can_have_siblings().is_some());
            let kin = same.find(|at| list[*at].can_have_siblings().unwrap_or(true) == can_have_siblings);
            let place = kin.or((first < end).then_some(first));
            if let Some(at) = place.filter(|_| !is_clear) {
                list[at] = info.clone();
                return Effect::Doubtful;
            }
            place
        }
        _ if info.hops.len() > 1 => {
            let parts: Vec<_> = same.filter(is_part).collect();
            if let [at, rest @ ..] = &parts[..]
                && !rest.is_empty()
            {
                // They have become one, unless one of them was from a router advertisement.
                list[*at] = info.clone();
                rest.iter().rev().for_each(|at| drop(list.remove(*at)));
                return Effect::Doubtful;
            }
            parts.first().copied()
        }
        _ => None,
    };
    if let Some(at) = place {
        return update(&mut list[at], info);
    }
    list.insert(end, info.clone());
    if replaces { Effect::Doubtful } else { Effect::Changed }
}

/// Where the routes begin and end that are ranked like this one.
fn places<T: Ord>(list: &RouteList, rank: impl Fn(&RouteInfo) -> T, info: &RouteInfo) -> (usize, usize) {
    let rank_of_info = rank(info);
    let first = list.iter().position(|route| rank(route) >= rank_of_info).unwrap_or(list.len());
    let end = list.iter().position(|route| rank(route) > rank_of_info).unwrap_or(list.len());
    (first, end)
}

fn update(route: &mut RouteInfo, info: &RouteInfo) -> Effect {
    if route == info {
        return Effect::Nothing;
    }
    *route = info.clone();
    Effect::Changed
}

fn remove(list: &mut RouteList, family: Family, info: &RouteInfo) -> Effect {
    let is_only = |is_it: &dyn Fn(&RouteInfo) -> bool| {
        let mut all = list.iter().enumerate().filter(|(_, route)| is_it(route)).map(|(at, _)| at);
        all.next().filter(|_| all.next().is_none())
    };
    let exact = list.iter().position(|route| route.is_same(info));
    if let Some(at) = exact.or_else(|| is_only(&|route| route.is_like(info))) {
        list.remove(at);
        return Effect::Changed;
    }
    // One of several next hops.
    let among = is_only(&|route| family == Family::V6 && route.hops.len() > 1 && is_part(route, info));
    let Some(at) = among else { return Effect::Doubtful };
    list[at].hops.retain(|hop| !info.hops.contains(hop));
    if list[at].hops.is_empty() {
        list.remove(at);
    }
    Effect::Changed
}

/// Whether all next hops of a route are among those of another one of its metric.
fn is_part(route: &RouteInfo, info: &RouteInfo) -> bool {
    (route.metric, route.source, route.next_hop) == (info.metric, info.source, info.next_hop)
        && !info.hops.is_empty()
        && info.hops.iter().all(|hop| route.hops.contains(hop))
}

/// The routes of all tables of one family.
#[derive(Clone, Debug, Default)]
pub(crate) struct RouteStore {
    routes: HashMap<RouteKey, Held>,
    infos: Infos,
}

/// Numbers of infos.
#[derive(Clone, Debug)]
enum Held {
    One(u32),
    Many(Box<[u32]>),
}

impl Held {
    fn numbers(&self) -> &[u32] {
        match self {
            Self::One(number) => std::slice::from_ref(number),
            Self::Many(numbers) => numbers,
        }
    }
}

impl RouteStore {
    /// The routes for a prefix, in order.
    pub(crate) fn get(&self, key: &RouteKey) -> impl Iterator<Item = &RouteInfo> {
        let numbers = self.routes.get(key).map_or(&[][..], Held::numbers);
        numbers.iter().map(|number| &self.infos.slots[*number as usize].info)
    }

    /// Replaces the routes for a prefix.
    pub(crate) fn set(&mut self, key: RouteKey, list: &[RouteInfo]) {
        let held = match list {
            [] => self.routes.remove(&key),
            [info] => self.routes.insert(key, Held::One(self.infos.hold(key, info))),
            list => {
                let numbers = list.iter().map(|info| self.infos.hold(key, info)).collect();
                self.routes.insert(key, Held::Many(numbers))
            }
        };
        for number in held.iter().flat_map(Held::numbers) {
            self.infos.release(key, *number);
        }
    }

    /// Puts one behind the others.
    pub(crate) fn push(&mut self, key: RouteKey, info: &RouteInfo) {
        let number = self.infos.hold(key, info);
        self.routes
            .entry(key)
            .and_modify(|held| *held = Held::Many([held.numbers(), &[number]].concat().into()))
            .or_insert(Held::One(number));
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&RouteKey, &RouteInfo)> {
        let info = |number: &u32| &self.infos.slots[*number as usize].info;
        self.routes.iter().flat_map(move |(key, held)| held.numbers().iter().map(move |one| (key, info(one))))
    }

    /// How many prefixes there are.
    pub(crate) fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether there is such a route. Looks at each kind of route once, not at each route.
    pub(crate) fn any(&self, is_meant: impl Fn(&RouteInfo) -> bool) -> bool {
        self.infos.slots.iter().any(|slot| slot.references > 0 && is_meant(&slot.info))
    }

    /// Prefixes with such a route. Looks at all prefixes only if there are many.
    pub(crate) fn keys(&self, is_meant: impl Fn(&RouteInfo) -> bool) -> Vec<RouteKey> {
        let mut keys = Vec::new();
        let mut common = hashbrown::HashSet::new();
        for (slot, number) in self.infos.slots.iter().zip(0..) {
            if slot.references == 0 || !is_meant(&slot.info) {
                continue;
            }
            if slot.is_common {
                common.insert(number);
            } else {
                keys.extend(&slot.keys);
            }
        }
        if !common.is_empty() {
            let meant =
                self.routes.iter().filter(|(_, held)| held.numbers().iter().any(|one| common.contains(one)));
            keys.extend(meant.map(|(key, _)| *key));
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Prefixes that the other one has other routes for.
    pub(crate) fn differences(&self, other: &Self) -> Vec<RouteKey> {
        let differs = |key: &&RouteKey| !self.get(key).eq(other.get(key));
        let mut keys: Vec<_> = self.routes.keys().filter(differs).copied().collect();
        keys.extend(other.routes.keys().filter(|key| !self.routes.contains_key(*key)));
        keys
    }

    /// Gives back room that is not needed.
    pub(crate) fn shrink(&mut self) {
        self.infos.slots.shrink_to_fit();
    }
}

/// Infos, each held once however many routes have it.
#[derive(Clone, Debug, Default)]
struct Infos {
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

#[derive(Clone, Debug)]
struct Slot {
    info: RouteInfo,
    references: u32,
    /// The prefixes that have it, unless it is common.
    keys: SmallVec<[RouteKey; 1]>,
    is_common: bool,
}

impl Infos {
    fn hold(&mut self, key: RouteKey, info: &RouteInfo) -> u32 {
        let hash = self.hasher.hash_one(info);
        let slots = &mut self.slots;
        let known = self.index.find(hash, |number| slots[*number as usize].info == *info).copied();
        let number = known.unwrap_or_else(|| {
            let slot = Slot { info: info.clone(), references: 0, keys: SmallVec::new(), is_common: false };
            let number = self.free.pop().unwrap_or_else(|| {
                slots.push(slot.clone());
                u32::try_from(slots.len() - 1).unwrap_or(u32::MAX)
            });
            slots[number as usize] = slot;
            let hasher = &self.hasher;
            self.index.insert_unique(hash, number, |number| hasher.hash_one(&slots[*number as usize].info));
            number
        });
        let slot = &mut self.slots[number as usize];
        slot.references += 1;
        if slot.keys.len() == FEW {
            slot.is_common = true;
            slot.keys = SmallVec::new();
        }
        if !slot.is_common {
            slot.keys.push(key);
        }
        number
    }

    fn release(&mut self, key: RouteKey, number: u32) {
        let slot = &mut self.slots[number as usize];
        slot.references -= 1;
        if let Some(at) = slot.keys.iter().position(|other| *other == key) {
            slot.keys.swap_remove(at);
        }
        if slot.references == 0 {
            let hash = self.hasher.hash_one(&slot.info);
            if let Ok(entry) = self.index.find_entry(hash, |other| *other == number) {
                entry.remove();
            }
            slot.keys = SmallVec::new();
            self.free.push(number);
        }
    }
}

/// What is to be taken up again once the routes have been read.
pub(crate) type RouteTold = (RouteAction, RouteMessage);

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::netlink::route_message::testing::info;

    /// What the kernel does with a command, written down from what it is seen to do: which notification follows, if it is not
    /// refused.
    #[derive(Clone, Copy, Debug)]
    enum Command {
        Add(u8),
        Append(u8),
        Prepend(u8),
        Replace(u8),
        Delete(Index),
    }

    fn command() -> impl Strategy<Value = Command> {
        prop_oneof![
            (0..8u8).prop_map(Command::Add),
            (0..8u8).prop_map(Command::Append),
            (0..8u8).prop_map(Command::Prepend),
            (0..8u8).prop_map(Command::Replace),
            any::<Index>().prop_map(Command::Delete),
        ]
    }

    /// Two metrics, two types of service, and two gateways.
    fn route(number: u8) -> RouteInfo {
        info(u32::from(number & 1), (number & 2) << 3, (number >> 2) + 1)
    }

    fn run_v4(list: &mut Vec<RouteInfo>, command: Command) -> Option<(RouteAction, RouteInfo)> {
        let of_rank = |list: &[RouteInfo], new: &RouteInfo| -> Vec<usize> {
            let same = |at: &usize| (list[*at].metric, list[*at].tos) == (new.metric, new.tos);
            (0..list.len()).filter(same).collect()
        };
        let place = |list: &[RouteInfo], new: &RouteInfo| {
            let before = |other: &&RouteInfo| {
                other.tos > new.tos || (other.tos == new.tos && other.metric < new.metric)
            };
            list.iter().filter(before).count()
        };
        let added = |replaces, is_last| RouteAction::Added { replaces, is_last };
        match command {
            Command::Delete(index) => {
                if list.is_empty() {
                    return None;
                }
                let gone = list.remove(index.index(list.len()));
                Some((RouteAction::Removed, gone))
            }
            Command::Add(number)
            | Command::Append(number)
            | Command::Prepend(number)
            | Command::Replace(number) => {
                let new = route(number);
                let same = of_rank(list, &new);
                match (command, &same[..]) {
                    (Command::Add(_), [_, ..]) => None,
                    (_, []) => {
                        list.insert(place(list, &new), new.clone());
                        Some((added(false, false), new))
                    }
                    _ if list.contains(&new) => None,
                    (Command::Replace(_), [first, ..]) => {
                        list[*first] = new.clone();
                        Some((added(true, false), new))
                    }
                    (Command::Append(_), [.., end]) => {
                        list.insert(end + 1, new.clone());
                        Some((added(false, true), new))
                    }
                    (_, [first, ..]) => {
                        list.insert(*first, new.clone());
                        Some((added(false, false), new))
                    }
                }
            }
        }
    }

    /// Each number of a group is a next hop; routes by a device cannot have siblings.
    fn run_v6(list: &mut Vec<RouteInfo>, command: Command) -> Option<(RouteAction, RouteInfo)> {
        let added = |replaces, is_last| RouteAction::Added { replaces, is_last };
        let new = match command {
            Command::Delete(index) => {
                if list.is_empty() {
                    return None;
                }
                let at = index.index(list.len());
                // One next hop of several.
                let mut gone = list[at].clone();
                gone.hops.truncate(1);
                list[at].hops.remove(0);
                if list[at].hops.is_empty() {
                    list.remove(at);
                }
                return Some((RouteAction::Removed, gone));
            }
            Command::Add(number)
            | Command::Append(number)
            | Command::Prepend(number)
            | Command::Replace(number) => info(u32::from(number & 1), 0, number >> 1),
        };
        let same: Vec<usize> = (0..list.len()).filter(|at| list[*at].metric == new.metric).collect();
        let kin = same.iter().copied().find(|at| list[*at].can_have_siblings() == new.can_have_siblings());
        let end = list.iter().filter(|other| other.metric <= new.metric).count();
        match (command, &same[..], kin) {
            (Command::Add(_), [_, ..], _) => None,
            (Command::Replace(_), [first, ..], _) => {
                list[kin.unwrap_or(*first)] = new.clone();
                Some((added(true, false), new))
            }
            (_, _, Some(at)) if new.can_have_siblings() == Some(true) => {
                if list[at].hops.contains(&new.hops[0]) {
                    return None;
                }
                list[at].hops.push(new.hops[0]);
                Some((added(false, matches!(command, Command::Append(_))), list[at].clone()))
            }
            _ if list.contains(&new) => None,
            _ => {
                list.insert(end, new.clone());
                Some((added(false, false), new))
            }
        }
    }

    fn check(family: Family, commands: &[Command], read_at: Index) -> Result<(), TestCaseError> {
        let mut kernel = Vec::new();
        let (mut states, mut told) = (vec![Vec::new()], Vec::new());
        for command in commands {
            let notification = match family {
                Family::V4 => run_v4(&mut kernel, *command),
                Family::V6 => run_v6(&mut kernel, *command),
            };
            told.extend(notification);
            states.resize(told.len() + 1, kernel.clone());
        }
        let is_equal = |list: &RouteList, state: &[RouteInfo]| {
            list.len() == state.len() && list.iter().zip(state).all(|(one, other)| one.is_same(other))
        };
        let mut list = RouteList::new();
        for ((action, info), state) in told.iter().zip(&states[1..]) {
            let effect = take_up(&mut list, family, *action, info, false);
            prop_assert_ne!(effect, Effect::Doubtful);
            prop_assert!(is_equal(&list, state), "{:?} is {:?}", list, state);
        }
        // What was read at any time, and all that was told repeated on it.
        let replaces = |(action, _): &(RouteAction, RouteInfo)| {
            matches!(action, RouteAction::Added { replaces: true, .. })
        };
        if told.iter().any(replaces) {
            return Ok(());
        }
        let mut list: RouteList = states[read_at.index(states.len())].iter().cloned().collect();
        for (action, info) in &told {
            take_up(&mut list, family, *action, info, true);
        }
        if family == Family::V6 {
            let rank = |route: &RouteInfo| (route.metric, route.can_have_siblings(), route.hops[0].gateway);
            list.sort_by_key(rank);
            kernel.sort_by_key(rank);
        }
        prop_assert!(is_equal(&list, &kernel), "{:?} is {:?}", list, kernel);
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn notifications_lead_to_the_kernels_ipv4_routes(
            commands in vec(command(), 0..16),
            read_at in any::<Index>(),
        ) {
            check(Family::V4, &commands, read_at)?;
        }

        #[test]
        fn notifications_lead_to_the_kernels_ipv6_routes(
            commands in vec(command(), 0..16),
            read_at in any::<Index>(),
        ) {
            check(Family::V6, &commands, read_at)?;
        }

        /// The store holds what a plain map does.
        #[test]
        fn a_store_is_a_map(changes in vec((0..40u8, vec(0..8u8, 0..4)), 0..60)) {
            let mut store = RouteStore::default();
            let mut map = std::collections::BTreeMap::new();
            for (prefix, routes) in changes {
                let prefix = format!("10.0.0.{prefix}/32").parse().unwrap();
                let key = RouteKey { table: 254, prefix };
                let mut list: Vec<_> = routes.into_iter().map(route).collect();
                list.dedup();
                store.set(key, &list);
                if list.is_empty() { map.remove(&key) } else { map.insert(key, list) };
            }
            prop_assert_eq!(store.len(), map.len());
            for (key, list) in &map {
                prop_assert!(store.get(key).eq(list.iter()));
            }
            let held: usize = map.values().map(Vec::len).sum();
            prop_assert_eq!(store.iter().count(), held);
            for number in 0..8 {
                let meant = route(number);
                let keys: Vec<_> =
                    map.iter().filter(|(_, list)| list.contains(&meant)).map(|(key, _)| *key).collect();
                prop_assert_eq!(store.keys(|info| *info == meant), keys.clone());
                prop_assert_eq!(store.any(|info| *info == meant), !keys.is_empty());
            }
            let mut copy = RouteStore::default();
            for (key, list) in &map {
                for info in list {
                    copy.push(*key, info);
                }
            }
            prop_assert_eq!(store.differences(&copy), []);
            prop_assert_eq!(copy.differences(&RouteStore::default()).len(), map.len());
            for key in map.keys() {
                store.set(*key, &[]);
            }
            prop_assert_eq!((store.len(), store.iter().count(), store.infos.index.len()), (0, 0, 0));
        }
    }

    #[test]
    fn what_does_not_fit_is_doubtful() {
        let added = RouteAction::Added { replaces: true, is_last: false };
        for family in [Family::V4, Family::V6] {
            let mut list = RouteList::new();
            assert_eq!(take_up(&mut list, family, RouteAction::Removed, &route(1), false), Effect::Doubtful);
            assert_eq!(take_up(&mut list, family, added, &route(1), false), Effect::Doubtful);
            assert_eq!(take_up(&mut list, family, added, &route(1), false), Effect::Nothing);
        }
    }
}
