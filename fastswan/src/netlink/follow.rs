//! What is known about the host, kept up by what the kernel tells. No socket and no clock is used here: whoever has them
//! hands over messages, the time and what was read, reads what is wanted, and gets the changes.
//!
//! Some things the kernel does without a word. Then what is told is on the safe side at once ([`RouteKind::Unclear`]), and the
//! routes of that family are read again beside the loop and compared; only differences are told.
//!
//! - IPv4 routes go with their device when it is switched off, with their preferred source address, with the last address of
//!   their device, and with a next hop object.
//! - Routes with a lifetime stop working when it ends, and it may be prolonged or cut short.
//! - IPv6 routes get another MTU with their device.
//!
//! And a dump of IPv6 leaves out routes that have the metric of one with several next hops.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use hashbrown::{HashMap, HashSet};
use tokio::time::Instant;

use super::{
    addresses::{Addresses, DeviceAddress},
    due::{Due, PopIfDue as _},
    link_state::{ConfTold, Everywhere, LinkState, LinkTold},
    path_mtu::{PathMtus, PathMtusRead},
    route::{NeighbourTold, Read, RoutesRead, RuleState, Sysctls, Told, read_all},
    route_message::{RouteInfo, RouteKey, RouteMessage},
    route_store::{Effect, RouteAction, RouteList, RouteStore, RouteTold, take_up},
};
use crate::{
    host::{BrokenHostRule, HostChange, HostError, HostFacts, Link, Neighbour, Route, RouteKind},
    policy::{Family, MacAddr},
};

/// Prefixes that are told of at once.
const MOST_ROUTES: usize = 4096;

/// What goes with a link or an address mostly goes within this time, and the kernel tells of some of it.
const SETTLE: Duration = Duration::from_millis(50);

/// Routes are read again after this time if they may have been read incompletely, or could not be read.
const PAUSE: Duration = Duration::from_secs(1);
/// From the end of one reading of a family's routes to the beginning of the next: so many times as long as it took.
const PAUSE_SHARE: u32 = 4;
/// And at least this.
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);

/// A route with a lifetime no longer counts so long before it ends: messages and timers take their time.
const AHEAD: Duration = Duration::from_millis(100);
/// How often lifetimes are looked at if there are any, for each so many prefixes that have to be read for it.
const LIFETIMES: Duration = Duration::from_millis(200);
const LIFETIME_PREFIXES: usize = 2000;

/// How often prefixes are read again that keep changing while they are.
const TRIES: u8 = 3;

/// More notifications than that while routes are being read make the reading useless.
const LONGEST_LOG: usize = 1 << 18;

/// What is to be read beside the loop. One after the other.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    Routes(Family, Arc<RouteStore>),
    Rules(Family),
    Neighbours,
    PathMtus(Family),
}

/// What has been read.
#[derive(Debug)]
pub(crate) enum Found {
    Routes(Family, RoutesRead),
    Rules(Family, Vec<RuleState>),
    Neighbours(Vec<NeighbourTold>),
    PathMtus(Family, PathMtusRead),
}

/// Follows the host.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    links: BTreeMap<u32, Followed>,
    everywhere: Everywhere,
    /// Counts what is told about links and the host.
    stamp: u64,
    /// When the host was told of last.
    touched: u64,
    /// Links whose frames a device of another network namespace takes, or once took: the kernel does not tell when it no
    /// longer does, so that is so until the link is gone.
    taken_elsewhere: BTreeSet<u32>,
    addresses: Addresses,
    v4: Routes,
    v6: Routes,
    rules_v4: Rules,
    rules_v6: Rules,
    neighbours: Neighbours,
    path_mtus: PathMtus,
    devices: Vec<HostChange>,
    changed_links: BTreeSet<u32>,
    /// Sysctls may have changed without a word.
    is_conf_doubtful: bool,
    broken: Option<BrokenHostRule>,
}

#[derive(Debug)]
struct Followed {
    state: LinkState,
    told: Option<Link>,
    /// It was gone since it was told: another one may have its index now, and even its name.
    has_gone: bool,
    /// When it was told of last.
    touched: u64,
}

/// Something whose loss takes routes along in silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Suspect {
    Device(u32),
    Preferred(IpAddr),
    NextHop(u32),
}

/// The routes of a family.
#[derive(Debug, Default)]
struct Routes {
    store: Arc<RouteStore>,
    /// While routes are being read, which compares them with the store: what is different from it by now.
    over: Option<HashMap<RouteKey, RouteList>>,
    /// What was told meanwhile.
    log: Vec<Logged>,
    /// In how many datagrams the routes came at first.
    parts: usize,
    changed: VecDeque<RouteKey>,
    is_changed: HashSet<RouteKey>,
    /// Prefixes of which something was told that did not fit, and when: counted by readings.
    doubtful: HashMap<RouteKey, u64>,
    suspects: HashMap<Suspect, u64>,
    /// Prefixes that may be wrong since a route replaced another one while they were read; and how often they have been read
    /// since.
    unsure: HashMap<RouteKey, u8>,
    /// The number of the reading that will clear what is doubtful from now on.
    reading: u64,
    began: Option<Instant>,
    wanted: Option<Instant>,
    /// Even if nothing is doubtful.
    is_overdue: bool,
    not_before: Option<Instant>,
    /// Routes with a lifetime.
    ends: HashMap<RouteKey, Vec<(RouteInfo, Instant)>>,
    timers: Due<RouteKey>,
}

#[derive(Clone, Debug)]
enum Logged {
    Told(Box<RouteTold>),
    DeviceGone(u32),
}

#[derive(Debug, Default)]
struct Rules {
    list: Vec<RuleState>,
    is_lost: bool,
    is_changed: bool,
    /// It is being read, and nothing was told since.
    is_undisturbed: bool,
}

#[derive(Debug, Default)]
struct Neighbours {
    known: HashMap<(u32, IpAddr), MacAddr>,
    changes: Vec<HostChange>,
    is_lost: bool,
    /// Told of while they are being read.
    touched: Option<HashSet<(u32, IpAddr)>>,
}

/// Reads the facts from the kernel, in the network namespace of this thread.
///
/// The kernel answers at once, so this waits for nothing but what is being done to links; it takes about a microsecond for
/// each route and neighbour. A change while it reads may be seen in part: read again after a change.
pub(crate) fn read_host() -> Result<HostFacts, HostError> {
    Ok(Follower::new(read_all()?, &BTreeSet::new(), Instant::now()).1)
}

impl Follower {
    /// Begins with what was read, and with the links that were taken by devices of other network namespaces before.
    pub(crate) fn new(read: Read, taken: &BTreeSet<u32>, now: Instant) -> (Self, HostFacts) {
        let Read {
            links,
            elsewhere,
            everywhere,
            addresses,
            rules: [rules_v4, rules_v6],
            routes: [v4, v6],
            neighbours,
            path_mtus,
        } = read;
        let mut follower = Self {
            everywhere,
            v4: Routes::new(v4, now),
            v6: Routes::new(v6, now),
            rules_v4: Rules { list: rules_v4, ..Rules::default() },
            rules_v6: Rules { list: rules_v6, ..Rules::default() },
            path_mtus: PathMtus::new(path_mtus, now),
            addresses: Addresses::new(addresses),
            ..Self::default()
        };
        let is_taken = |state: &LinkState| {
            taken.contains(&state.ifindex()) || elsewhere.iter().any(|other| other.takes_frames_of(state))
        };
        for state in links {
            let mut link = state.link(&everywhere, follower.addresses.has(state.ifindex()));
            link.taken_elsewhere = is_taken(&state);
            if link.taken_elsewhere {
                follower.taken_elsewhere.insert(link.ifindex);
            }
            let told = Some(link);
            follower.links.insert(state.ifindex(), Followed { state, told, has_gone: false, touched: 0 });
        }
        for (ifindex, destination, address) in neighbours {
            follower.neighbours.known.extend(address.map(|address| ((ifindex, destination), address)));
        }
        let facts = follower.facts(now);
        (follower, facts)
    }

    /// Breaks a rule on purpose.
    #[cfg(feature = "broken-rules")]
    pub(crate) fn set_broken(&mut self, broken: Option<BrokenHostRule>) {
        self.broken = broken;
    }

    /// Everything.
    fn facts(&self, now: Instant) -> HostFacts {
        let (path_mtus, unclear_path_mtus) = self.path_mtus.facts();
        let mut facts = HostFacts {
            links: self.links.values().filter_map(|link| link.told.clone()).collect(),
            path_mtus,
            unclear_path_mtus,
            addresses: self.addresses.own().collect(),
            ..HostFacts::default()
        };
        for rules in [&self.rules_v4, &self.rules_v6] {
            facts.rules.extend(rules.list.iter().map(|state| state.rule.clone()));
        }
        for routes in [&self.v4, &self.v6] {
            facts.routes.reserve(routes.store.len());
            let all = routes.store.iter();
            facts.routes.extend(all.map(|(key, info)| routes.route(*key, info, &self.links, now)));
        }
        let neighbours = self.neighbours.known.iter();
        facts.neighbours.extend(neighbours.map(|((ifindex, destination), address)| Neighbour {
            ifindex: *ifindex,
            destination: *destination,
            address: *address,
        }));
        facts
    }

    /// How many links are followed.
    pub(crate) fn links(&self) -> usize {
        self.links.len()
    }

    /// Takes up a notification. One that is repeated may be older than what was read.
    pub(crate) fn take(&mut self, told: Told, is_repeated: bool, now: Instant) {
        match told {
            Told::Link(LinkTold::Is(state)) => self.take_link(state, now),
            Told::Link(LinkTold::Gone(state)) => self.lose_link(&state, now),
            Told::Link(LinkTold::Moved(state)) => self.lose_moved_link(&state, now),
            Told::Link(LinkTold::Conf6(ifindex, conf)) => {
                self.change_link(ifindex, now, |state| state.set_conf6(conf));
            }
            Told::Link(LinkTold::Nothing) | Told::Nothing => {}
            Told::Conf(conf) => self.take_conf(conf, now),
            Told::Route((action, message)) => self.take_route(action, message, is_repeated, now),
            Told::Rule { family, is_new, rule } => {
                self.rules(family).take(is_new, rule, is_repeated);
            }
            Told::Address { ifindex, address, is_new } => self.take_address(ifindex, address, is_new, now),
            Told::NextHop(id) => {
                for routes in [&mut self.v4, &mut self.v6] {
                    routes.suspect(Suspect::NextHop(id), now);
                }
            }
            Told::Neighbour(told) => self.neighbours.take(told),
        }
    }

    /// What a device can do may have changed.
    pub(crate) fn take_device(&mut self, change: HostChange) {
        self.devices.push(change);
    }

    /// Notifications about neighbours were lost.
    pub(crate) fn lose_neighbours(&mut self) {
        self.neighbours.lose();
    }

    /// Which path MTUs the kernel has learnt.
    pub(crate) fn path_mtus(&mut self) -> &mut PathMtus {
        &mut self.path_mtus
    }

    fn rules(&mut self, family: Family) -> &mut Rules {
        match family {
            Family::V4 => &mut self.rules_v4,
            Family::V6 => &mut self.rules_v6,
        }
    }

    fn routes(&mut self, family: Family) -> &mut Routes {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    fn take_route(&mut self, action: RouteAction, message: RouteMessage, is_repeated: bool, now: Instant) {
        let action = match action {
            RouteAction::Added { is_last, .. } if self.broken == Some(BrokenHostRule::IgnoresReplacement) => {
                RouteAction::Added { replaces: false, is_last }
            }
            action => action,
        };
        self.routes(message.key.family()).take(action, message, is_repeated, now);
    }

    fn take_link(&mut self, state: LinkState, now: Instant) {
        self.stamp += 1;
        let ifindex = state.ifindex();
        let was = self.links.get(&ifindex).map(|link| &link.state);
        let was_usable = was.is_some_and(LinkState::is_usable);
        let goes_down = was.is_some_and(LinkState::is_up) && !state.is_up();
        let has_other_mtu = was.is_some_and(|was| was.mtus() != state.mtus());
        // That of IPv6 may follow in silence.
        self.is_conf_doubtful |= has_other_mtu;
        let is_usable = state.is_usable();
        let before = self.links.remove(&ifindex);
        let has_gone = before.as_ref().is_some_and(|link| link.has_gone);
        let told = before.and_then(|link| link.told);
        self.links.insert(ifindex, Followed { state, told, has_gone, touched: self.stamp });
        self.changed_links.insert(ifindex);
        if self.broken == Some(BrokenHostRule::IgnoresLinksThatGoDown) {
            return;
        }
        for routes in [&mut self.v4, &mut self.v6] {
            if was_usable != is_usable {
                routes.tell_all(|info| info.uses(ifindex));
            }
            if goes_down {
                routes.suspect(Suspect::Device(ifindex), now);
            }
        }
        if has_other_mtu && self.v6.any(|info| info.uses(ifindex) && info.mtu.is_some()) {
            self.v6.suspect(Suspect::Device(ifindex), now);
        }
    }

    fn change_link(&mut self, ifindex: u32, now: Instant, change: impl FnOnce(&mut LinkState)) {
        if let Some(link) = self.links.get(&ifindex).filter(|link| link.state.ifindex() == ifindex) {
            let mut state = link.state.clone();
            change(&mut state);
            self.take_link(state, now);
        }
    }

    /// Links whose frames a device of another network namespace may take.
    pub(crate) fn taken_elsewhere(&self) -> &BTreeSet<u32> {
        &self.taken_elsewhere
    }

    /// One that is in another network namespace now goes on taking frames of the link below it, and is on that one when
    /// both meet again.
    fn lose_moved_link(&mut self, state: &LinkState, now: Instant) {
        let is_below = |link: &&Followed| state.takes_frames_of(&link.state);
        if let Some(below) = self.links.values().find(is_below).map(|link| link.state.ifindex()) {
            self.take_elsewhere(below);
        }
        let is_taken = self.taken_elsewhere.contains(&state.ifindex());
        self.lose_link(state, now);
        if is_taken {
            self.taken_elsewhere.insert(state.ifindex());
        }
    }

    fn take_elsewhere(&mut self, ifindex: u32) {
        if self.taken_elsewhere.insert(ifindex) {
            self.changed_links.insert(ifindex);
        }
    }

    fn lose_link(&mut self, state: &LinkState, now: Instant) {
        let ifindex = state.ifindex();
        self.taken_elsewhere.remove(&ifindex);
        self.stamp += 1;
        if let Some(link) = self.links.remove(&ifindex) {
            // Kept until it has been told.
            let state = LinkState::default();
            self.links
                .insert(ifindex, Followed { state, told: link.told, has_gone: true, touched: self.stamp });
            self.changed_links.insert(ifindex);
        }
        self.addresses.lose(ifindex);
        if self.broken == Some(BrokenHostRule::IgnoresLinksThatGoDown) {
            return;
        }
        for routes in [&mut self.v4, &mut self.v6] {
            routes.lose_device(ifindex, now);
        }
    }

    fn take_conf(&mut self, conf: ConfTold, now: Instant) {
        if let Some(ifindex) = conf.ifindex {
            self.change_link(ifindex, now, |state| conf.change_link(state));
        } else {
            self.stamp += 1;
            self.touched = self.stamp;
            conf.change_host(&mut self.everywhere);
            self.changed_links.extend(self.links.keys());
        }
    }

    /// Whether sysctls should be looked at without delay. Says so once.
    pub(crate) fn doubts_sysctls(&mut self) -> bool {
        std::mem::take(&mut self.is_conf_doubtful)
    }

    /// Sysctls are about to be read: for [`Self::take_sysctls`].
    pub(crate) fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Takes up sysctls, and what else of links the kernel does not tell of, unless something was told since they began to be read.
    pub(crate) fn take_sysctls(&mut self, stamp: u64, read: Sysctls, now: Instant) {
        for other in read.elsewhere {
            let is_below = |link: &&Followed| other.takes_frames_of(&link.state);
            let below = self.links.values().find(is_below).filter(|link| link.touched <= stamp);
            if let Some(below) = below.map(|link| link.state.ifindex()) {
                self.take_elsewhere(below);
            }
        }
        for state in read.links {
            let Some(link) = self.links.get(&state.ifindex()) else { continue };
            if link.touched <= stamp && link.state != state {
                // Its peer, for one, is not told either.
                self.take_link(state, now);
            }
        }
        if self.touched <= stamp && self.everywhere != read.everywhere {
            self.everywhere = read.everywhere;
            self.changed_links.extend(self.links.keys());
        }
    }

    fn take_address(&mut self, ifindex: u32, address: DeviceAddress, is_new: bool, now: Instant) {
        self.changed_links.insert(ifindex);
        if is_new {
            self.addresses.add(ifindex, address);
            return;
        }
        self.addresses.remove(ifindex, address);
        self.v4.suspect(Suspect::Preferred(address.own.into()), now);
        if !self.addresses.has(ifindex) {
            self.v4.suspect(Suspect::Device(ifindex), now);
        }
    }

    /// When the time is to be handed over next, at the latest; `is_busy` while something is being read.
    pub(crate) fn due(&self, is_busy: bool) -> Option<Instant> {
        let wanted = [&self.v4, &self.v6].map(|routes| routes.wanted.filter(|_| !is_busy));
        let ends = [&self.v4, &self.v6].map(|routes| routes.timers.peek().map(|Reverse((at, _))| *at));
        let path_mtus = self.path_mtus.due(is_busy);
        wanted.into_iter().chain(ends).chain([path_mtus]).flatten().min()
    }

    /// Takes up the time: lifetimes end.
    pub(crate) fn handle_time(&mut self, now: Instant) {
        for routes in [&mut self.v4, &mut self.v6] {
            while let Some(Reverse((_, key))) = routes.timers.pop_if_due(now) {
                routes.tell(key);
            }
        }
    }

    /// Something to be read now. All that was told until now has been handed over.
    pub(crate) fn start_reading(&mut self, now: Instant) -> Option<Wanted> {
        for family in [Family::V4, Family::V6] {
            let rules = self.rules(family);
            if rules.is_lost && !rules.is_undisturbed {
                rules.is_undisturbed = true;
                return Some(Wanted::Rules(family));
            }
        }
        if self.neighbours.is_lost && self.neighbours.touched.is_none() {
            self.neighbours.touched = Some(HashSet::new());
            return Some(Wanted::Neighbours);
        }
        let routes = [Family::V4, Family::V6].into_iter().find_map(|family| {
            self.routes(family).start_reading(now).map(|store| Wanted::Routes(family, store))
        });
        routes.or_else(|| self.path_mtus.start_reading(now).map(Wanted::PathMtus))
    }

    /// It could not be read.
    pub(crate) fn give_up(&mut self, wanted: &Wanted, now: Instant) {
        match wanted {
            Wanted::Routes(family, _) => self.routes(*family).give_up(now),
            Wanted::Rules(family) => self.rules(*family).is_undisturbed = false,
            Wanted::Neighbours => self.neighbours.touched = None,
            Wanted::PathMtus(family) => self.path_mtus.give_up(*family, now),
        }
    }

    /// Takes up what was read. All that was told before the reading ended has been handed over. Returns what is no longer of
    /// use, and may be large.
    pub(crate) fn finish_reading(&mut self, found: Found, now: Instant) -> Option<Arc<RouteStore>> {
        match found {
            Found::Routes(family, read) => Some(self.routes(family).finish_reading(family, read, now)),
            Found::Rules(family, list) => {
                let rules = self.rules(family);
                if std::mem::take(&mut rules.is_undisturbed) {
                    *rules = Rules { list, is_changed: true, ..Rules::default() };
                }
                None
            }
            Found::Neighbours(all) => {
                self.neighbours.finish_reading(all);
                None
            }
            Found::PathMtus(family, read) => {
                let routes = self.routes(family).store.len();
                self.path_mtus.finish_reading(family, read, routes, now);
                None
            }
        }
    }

    /// What has changed since, or the beginning of it.
    pub(crate) fn changes(&mut self, now: Instant) -> Vec<HostChange> {
        let mut changes = std::mem::take(&mut self.devices);
        for ifindex in std::mem::take(&mut self.changed_links) {
            let has_address_v4 = self.addresses.has(ifindex);
            let Some(link) = self.links.get_mut(&ifindex) else { continue };
            if std::mem::take(&mut link.has_gone) && link.told.take().is_some() {
                changes.push(HostChange::LinkGone(ifindex));
            }
            if link.state.ifindex() != ifindex {
                self.links.remove(&ifindex);
                continue;
            }
            let mut is = link.state.link(&self.everywhere, has_address_v4);
            is.taken_elsewhere = self.taken_elsewhere.contains(&ifindex);
            if link.told.as_ref() != Some(&is) {
                link.told = Some(is.clone());
                changes.push(HostChange::Link(is));
            }
        }
        for (family, rules) in [(Family::V4, &mut self.rules_v4), (Family::V6, &mut self.rules_v6)] {
            if std::mem::take(&mut rules.is_changed) {
                let all = rules.list.iter().map(|state| state.rule.clone());
                changes.push(HostChange::Rules(family, all.collect()));
            }
        }
        changes.append(&mut self.neighbours.changes);
        changes.append(&mut self.path_mtus.changes());
        changes.append(&mut self.addresses.changes());
        for routes in [&mut self.v4, &mut self.v6] {
            for _ in 0..MOST_ROUTES {
                let Some(key) = routes.changed.pop_front() else { break };
                routes.is_changed.remove(&key);
                let told = routes.told(key, &self.links, now);
                let RouteKey { table, prefix: destination } = key;
                changes.push(HostChange::Routes { table, destination, routes: told });
            }
        }
        changes
    }
}

impl Suspect {
    /// Whether a route may have gone with it.
    fn concerns(&self, info: &RouteInfo) -> bool {
        match self {
            Self::Device(ifindex) => info.goes_with(*ifindex),
            Self::Preferred(address) => info.preferred == Some(*address),
            Self::NextHop(id) => info.next_hop == *id,
        }
    }
}

impl Routes {
    fn new(read: RoutesRead, now: Instant) -> Self {
        let mut routes = Self { store: Arc::new(read.store), parts: read.parts, ..Self::default() };
        routes.set_ends(read.ends, now);
        routes
    }

    fn set_ends(&mut self, ends: Vec<(RouteKey, RouteInfo, Instant)>, now: Instant) {
        for (key, info, at) in ends {
            self.ends.entry(key).or_default().push((info, at));
        }
        self.timers.clear();
        for (key, ends) in &self.ends {
            self.timers.extend(ends.iter().map(|(_, at)| Reverse((*at - AHEAD, *key))));
        }
        self.watch_lifetimes(now);
    }

    fn watch_lifetimes(&mut self, now: Instant) {
        if !self.ends.is_empty() {
            let share = u32::try_from(self.store.len() / LIFETIME_PREFIXES).unwrap_or(u32::MAX);
            self.is_overdue = true;
            self.want(now + LIFETIMES.saturating_mul(share.saturating_add(1)));
        }
    }

    fn list(&self, key: &RouteKey) -> RouteList {
        match self.over.as_ref().and_then(|over| over.get(key)) {
            Some(list) => list.clone(),
            None => self.store.get(key).cloned().collect(),
        }
    }

    fn set(&mut self, key: RouteKey, list: RouteList) {
        match &mut self.over {
            Some(over) => drop(over.insert(key, list)),
            // Nobody else has it unless it is being compared.
            None => Arc::make_mut(&mut self.store).set(key, &list),
        }
        self.tell(key);
    }

    /// Has the routes for a prefix told again.
    fn tell(&mut self, key: RouteKey) {
        if self.is_changed.insert(key) {
            self.changed.push_back(key);
        }
    }

    fn tell_all(&mut self, is_meant: impl Fn(&RouteInfo) -> bool) {
        for key in self.keys(is_meant) {
            self.tell(key);
        }
    }

    fn keys(&self, is_meant: impl Fn(&RouteInfo) -> bool) -> Vec<RouteKey> {
        let mut keys = self.store.keys(&is_meant);
        let over = self.over.iter().flatten();
        keys.extend(over.filter(|(_, list)| list.iter().any(&is_meant)).map(|(key, _)| *key));
        keys
    }

    /// Whether there is such a route; true if there was one when the routes began to be read.
    fn any(&self, is_meant: impl Fn(&RouteInfo) -> bool) -> bool {
        self.store.any(&is_meant) || self.over.iter().flatten().any(|(_, list)| list.iter().any(&is_meant))
    }

    fn want(&mut self, at: Instant) {
        let at = self.not_before.map_or(at, |not_before| at.max(not_before));
        self.wanted = Some(self.wanted.map_or(at, |wanted| wanted.min(at)));
    }

    fn suspect(&mut self, suspect: Suspect, now: Instant) {
        if self.any(|info| suspect.concerns(info)) {
            self.suspects.insert(suspect, self.reading);
            self.tell_all(|info| suspect.concerns(info));
            self.want(now + SETTLE);
        }
    }

    fn doubt(&mut self, key: RouteKey, now: Instant) {
        self.doubtful.insert(key, self.reading);
        self.tell(key);
        self.want(now);
    }

    fn take(&mut self, action: RouteAction, message: RouteMessage, is_repeated: bool, now: Instant) {
        let RouteMessage { key, ref info, ends } = message;
        let mut list = self.list(&key);
        let could_hide = may_hide_others(&list);
        let mut effect = take_up(&mut list, key.family(), action, info, is_repeated);
        if could_hide && !may_hide_others(&list) && !list.is_empty() {
            effect = Effect::Doubtful;
        }
        if effect != Effect::Nothing {
            self.set(key, list);
        }
        if effect == Effect::Doubtful {
            self.doubt(key, now);
        }
        self.note_end(key, action, info, ends, now);
        if is_repeated {
            if matches!(action, RouteAction::Added { replaces: true, .. }) {
                self.unsure.insert(key, 0);
                self.want(now + PAUSE);
            }
            if key.family() == Family::V6 && self.parts > 1 {
                // A dump that goes on after a change may leave out routes.
                self.is_overdue = true;
                self.want(now + PAUSE);
            }
        }
        self.note(Logged::Told(Box::new((action, message))));
    }

    /// For when the routes have been read.
    fn note(&mut self, logged: Logged) {
        if self.over.is_some() && self.log.len() <= LONGEST_LOG {
            self.log.push(logged);
        }
    }

    fn note_end(
        &mut self,
        key: RouteKey,
        action: RouteAction,
        info: &RouteInfo,
        ends: Option<Duration>,
        now: Instant,
    ) {
        if ends.is_none() && !self.ends.contains_key(&key) {
            return;
        }
        let all = self.ends.entry(key).or_default();
        all.retain(|(other, _)| !other.is_like(info));
        if let Some(ends) = ends.filter(|_| action != RouteAction::Removed) {
            all.push((info.clone(), now + ends));
            self.timers.push(Reverse((now + ends - AHEAD, key)));
            self.watch_lifetimes(now);
        } else if all.is_empty() {
            self.ends.remove(&key);
        }
        self.tell(key);
    }

    fn lose_device(&mut self, ifindex: u32, now: Instant) {
        for key in self.keys(|info| info.uses(ifindex)) {
            let mut list = self.list(&key);
            let before = list.len();
            list.retain(|info| !info.uses_only(ifindex));
            if list.len() != before {
                self.set(key, list);
            }
        }
        self.note(Logged::DeviceGone(ifindex));
        self.suspect(Suspect::Device(ifindex), now);
    }

    fn start_reading(&mut self, now: Instant) -> Option<Arc<RouteStore>> {
        if self.over.is_some() || self.wanted.is_none_or(|wanted| wanted > now) {
            return None;
        }
        self.wanted = None;
        let suspects = std::mem::take(&mut self.suspects);
        let is_there = |suspect: &Suspect| self.any(|info| suspect.concerns(info));
        self.suspects = suspects.into_iter().filter(|(suspect, _)| is_there(suspect)).collect();
        let is_clear = self.suspects.is_empty() && self.doubtful.is_empty() && self.unsure.is_empty();
        if is_clear && !self.is_overdue {
            return None;
        }
        self.is_overdue = false;
        self.over = Some(HashMap::new());
        self.log.clear();
        self.reading += 1;
        self.began = Some(now);
        Some(Arc::clone(&self.store))
    }

    fn pause(&mut self, now: Instant) {
        let took = self.began.take().map_or(Duration::ZERO, |began| now - began);
        self.not_before = Some(now + (took * PAUSE_SHARE).max(SHORTEST_PAUSE));
    }

    fn give_up(&mut self, now: Instant) {
        self.pause(now);
        for (key, list) in self.over.take().into_iter().flatten() {
            Arc::make_mut(&mut self.store).set(key, &list);
        }
        self.log = Vec::new();
        self.is_overdue = true;
        self.want(now + PAUSE);
    }

    fn finish_reading(&mut self, family: Family, read: RoutesRead, now: Instant) -> Arc<RouteStore> {
        let RoutesRead { store: mut new, ends, parts, differences } = read;
        if self.log.len() > LONGEST_LOG {
            self.give_up(now);
            return Arc::new(new);
        }
        self.pause(now);
        let over = self.over.take().unwrap_or_default();
        let log = std::mem::take(&mut self.log);
        // IPv6: a dump that goes on after a change may leave out routes.
        let is_complete = family == Family::V4 || parts <= 1 || log.is_empty();
        let touched = self.replay(&new, &over, &log);
        for (key, list) in &touched {
            new.set(*key, list);
        }
        self.unsure.retain(|key, tries| {
            *tries += 1;
            touched.contains_key(key) && *tries <= TRIES
        });
        if !self.unsure.is_empty() {
            self.want(now + PAUSE);
        }
        if !is_complete {
            for key in differences.iter().filter(|key| !touched.contains_key(*key)) {
                if new.get(key).next().is_none() {
                    let list: RouteList = self.store.get(key).cloned().collect();
                    new.set(*key, &list);
                }
            }
            self.is_overdue = true;
            self.want(now + PAUSE);
        }
        for key in differences.iter().filter(|key| !touched.contains_key(*key)) {
            let (read, was): (RouteList, RouteList) =
                (new.get(key).cloned().collect(), self.store.get(key).cloned().collect());
            let are_hidden = || read.iter().all(|info| was.contains(info));
            if may_hide_others(&read) && are_hidden() {
                new.set(*key, &was);
            }
        }
        let old = std::mem::replace(&mut self.store, Arc::new(new));
        for key in differences {
            if !over.contains_key(&key) {
                self.tell(key);
            }
        }
        for (key, list) in over {
            if !self.store.get(&key).eq(list.iter()) {
                self.tell(key);
            }
        }
        if is_complete {
            self.clear_doubts(ends, &touched, now);
        }
        old
    }

    /// The prefixes that something was told of since routes began to be read, and their routes. Those that were known, and
    /// kept up, are right; of others, what was told is taken up again.
    fn replay(
        &self,
        read: &RouteStore,
        over: &HashMap<RouteKey, RouteList>,
        log: &[Logged],
    ) -> HashMap<RouteKey, RouteList> {
        let was_known = |key: &RouteKey| {
            let is_doubtful = self.doubtful.get(key).is_some_and(|since| *since < self.reading);
            let is_suspect = || self.store.get(key).any(|info| self.is_suspect(info));
            !is_doubtful && !self.unsure.contains_key(key) && !is_suspect()
        };
        let live = |key: &RouteKey| -> RouteList {
            over.get(key).cloned().unwrap_or_else(|| self.store.get(key).cloned().collect())
        };
        let mut known: HashMap<RouteKey, RouteList> = HashMap::new();
        let mut again: HashMap<RouteKey, RouteList> = HashMap::new();
        for logged in log {
            match logged {
                Logged::Told(told) => {
                    let (action, RouteMessage { key, info, .. }) = &**told;
                    if known.contains_key(key) {
                        continue;
                    }
                    if !again.contains_key(key) && was_known(key) {
                        known.insert(*key, live(key));
                        continue;
                    }
                    let list = again.entry(*key).or_insert_with(|| read.get(key).cloned().collect());
                    take_up(list, key.family(), *action, info, true);
                }
                Logged::DeviceGone(ifindex) => {
                    for key in read.keys(|info| info.uses(*ifindex)) {
                        if was_known(&key) && !again.contains_key(&key) {
                            known.entry(key).or_insert_with(|| live(&key));
                        } else {
                            again.entry(key).or_insert_with(|| read.get(&key).cloned().collect());
                        }
                    }
                    for list in again.values_mut() {
                        list.retain(|info| !info.uses_only(*ifindex));
                    }
                }
            }
        }
        again.extend(known);
        again
    }

    /// What was doubtful when the reading began is no longer.
    fn clear_doubts(
        &mut self,
        ends: Vec<(RouteKey, RouteInfo, Instant)>,
        touched: &HashMap<RouteKey, RouteList>,
        now: Instant,
    ) {
        let reading = self.reading;
        let doubtful: Vec<_> = self.doubtful.extract_if(|_, since| *since < reading).collect();
        for (key, _) in doubtful {
            self.tell(key);
        }
        let suspects: Vec<_> = self.suspects.extract_if(|_, since| *since < reading).collect();
        for (suspect, _) in suspects {
            self.tell_all(|info| suspect.concerns(info));
        }
        let former: Vec<_> =
            self.ends.iter().flat_map(|(key, ends)| ends.iter().map(move |(_, at)| (*key, *at))).collect();
        self.ends.retain(|key, _| touched.contains_key(key));
        self.set_ends(ends.into_iter().filter(|(key, ..)| !touched.contains_key(key)).collect(), now);
        for (key, _) in former.into_iter().filter(|(_, at)| has_ended(*at, now)) {
            self.tell(key);
        }
        let ended: Vec<_> = self
            .ends
            .iter()
            .filter(|(_, ends)| ends.iter().any(|(_, at)| has_ended(*at, now)))
            .map(|(key, _)| *key)
            .collect();
        for key in ended {
            self.tell(key);
        }
    }

    /// What is told of a prefix.
    fn told(&self, key: RouteKey, links: &BTreeMap<u32, Followed>, now: Instant) -> Vec<Route> {
        if self.doubtful.contains_key(&key) {
            return vec![Route::new(key.table, key.prefix, RouteKind::Unclear)];
        }
        self.list(&key).iter().map(|info| self.route(key, info, links, now)).collect()
    }

    fn route(&self, key: RouteKey, info: &RouteInfo, links: &BTreeMap<u32, Followed>, now: Instant) -> Route {
        let has_ended = || {
            let mut ends = self.ends.get(&key).into_iter().flatten();
            ends.any(|(other, at)| has_ended(*at, now) && other.is_like(info))
        };
        let is_usable = |ifindex| links.get(&ifindex).is_some_and(|link| link.state.is_usable());
        let kind =
            if self.is_suspect(info) || has_ended() { RouteKind::Unclear } else { info.kind(is_usable) };
        Route {
            metric: info.metric,
            tos: info.tos,
            source: info.source,
            ..Route::new(key.table, key.prefix, kind)
        }
    }

    fn is_suspect(&self, info: &RouteInfo) -> bool {
        if self.suspects.is_empty() {
            return false;
        }
        let devices = info.hops.iter().map(|hop| Suspect::Device(hop.device));
        let preferred = info.preferred.map(Suspect::Preferred);
        let mut all = devices.chain(preferred).chain([Suspect::NextHop(info.next_hop)]);
        all.any(|suspect| self.suspects.contains_key(&suspect) && suspect.concerns(info))
    }
}

/// IPv6: a dump jumps from the first of several next hops to the last one, and over what stands between them
/// (`fib6_dump_node`).
fn may_hide_others(list: &RouteList) -> bool {
    list.iter().any(|info| {
        info.hops.len() > 1 && info.hops.iter().any(|hop| hop.gateway.is_some_and(|ip| ip.is_ipv6()))
    })
}

fn has_ended(at: Instant, now: Instant) -> bool {
    at <= now + AHEAD
}

impl Rules {
    /// `fib_nl_newrule`: behind those of its priority.
    fn take(&mut self, is_new: bool, rule: RuleState, is_repeated: bool) {
        self.is_undisturbed = false;
        if self.is_lost {
            return;
        }
        let known = self.list.iter().position(|other| other.words == rule.words);
        match (is_new, known) {
            (true, None) if !is_repeated => {
                let priority = rule.rule.priority;
                let at = self.list.iter().position(|other| other.rule.priority > priority);
                self.list.insert(at.unwrap_or(self.list.len()), rule);
            }
            (false, Some(at)) if !is_repeated => drop(self.list.remove(at)),
            _ => {
                self.list.clear();
                self.is_lost = true;
            }
        }
        self.is_changed = true;
    }
}

impl Neighbours {
    fn take(&mut self, (ifindex, destination, address): NeighbourTold) {
        let key = (ifindex, destination);
        if let Some(touched) = &mut self.touched {
            touched.insert(key);
        } else if self.is_lost {
            // What was lost may be newer.
            return;
        }
        self.set(key, address);
    }

    fn set(&mut self, key: (u32, IpAddr), address: Option<MacAddr>) {
        let (ifindex, destination) = key;
        match address {
            Some(address) if self.known.insert(key, address) != Some(address) => {
                self.changes.push(HostChange::Neighbour(Neighbour { ifindex, destination, address }));
            }
            None if self.known.remove(&key).is_some() => {
                self.changes.push(HostChange::NeighbourGone { ifindex, destination });
            }
            _ => {}
        }
    }

    fn lose(&mut self) {
        self.is_lost = true;
        // If they are being read, what is read may be older than what was lost.
        self.touched = None;
        let all: Vec<_> = self.known.keys().copied().collect();
        for key in all {
            self.set(key, None);
        }
    }

    fn finish_reading(&mut self, all: Vec<NeighbourTold>) {
        let Some(touched) = self.touched.take() else { return };
        self.is_lost = false;
        let all: HashMap<_, _> = all
            .into_iter()
            .map(|(ifindex, destination, address)| ((ifindex, destination), address))
            .collect();
        let gone: Vec<_> = self.known.keys().filter(|key| !all.contains_key(*key)).copied().collect();
        for key in gone.into_iter().filter(|key| !touched.contains(key)) {
            self.set(key, None);
        }
        for (key, address) in all.into_iter().filter(|(key, _)| !touched.contains(key)) {
            self.set(key, address);
        }
    }
}

impl Wanted {
    /// What it is about, without the routes that were known.
    pub(crate) fn without_routes(&self) -> Self {
        match self {
            Self::Routes(family, _) => Self::Routes(*family, Arc::default()),
            other => other.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;
    use crate::host::Rule;

    #[test]
    fn the_kernel_tells_about_loopback_without_any_privilege() {
        let host = read_host().unwrap();
        let lo = host.ifindex("lo").and_then(|ifindex| host.link(ifindex)).unwrap();
        assert_eq!(lo.address, None);
        assert!(lo.mtu > 1280, "{lo:?}");
        assert_eq!(host.port(lo.ifindex, 0), None);
        if lo.up {
            let own: IpNet = "127.0.0.1/32".parse().unwrap();
            let is_own = |route: &Route| route.destination == own && route.kind == RouteKind::Local;
            assert!(host.routes.iter().any(is_own), "{:?}", host.routes);
            let local = Rule::lookup(Family::V4, 0, 255);
            assert!(host.rules.contains(&local), "{:?}", host.rules);
        }
    }
}
