//! Where the host sends packets, kept up change by change.
//!
//! The kernel asks each rule's table in turn for the longest prefix, and goes on with the next rule if there is none, or if
//! it is a `throw` route (`fib_rules_lookup`). A table is a [`Trie`] here, and rules are asked when somebody wants to know:
//! so a change of a route costs what its prefix costs, whatever the other tables say.
//!
//! What a rule or a route asks of a packet is true, false, or not known for the packets of a prefix. Where it is not known,
//! both ways must lead to the same answer; else it is [unclear](RouteKind::Unclear), and packets pass.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};

pub(crate) use super::trie::Kinds;
use super::{
    HostFacts, Route, RouteKind, Rule, RuleAction,
    trie::{Key, Trie, Value},
};
use crate::policy::Family;

const LOCAL: u32 = 255;
const MAIN: u32 = 254;

/// With more rules that go on with another one than these, answers are not sought: each may double the work.
const MOST_GOTOS: usize = 6;

/// What a table's routes do, as far as whoever asks for a whole prefix wants to know.
pub(crate) mod kind {
    /// Forwards, at any length that the device takes.
    pub(crate) const FORWARDS: u8 = 1;
    /// Forwards packets up to a length of its own.
    pub(crate) const LIMITED: u8 = 1 << 1;
    /// The host's own: local, broadcast, anycast, multicast.
    pub(crate) const OWN: u8 = 1 << 2;
    /// Drops.
    pub(crate) const DENIES: u8 = 1 << 3;
    /// Goes on with the next rule.
    pub(crate) const THROWS: u8 = 1 << 4;
    /// Not known.
    pub(crate) const UNCLEAR: u8 = 1 << 5;
    /// Is for some packets only.
    pub(crate) const PARTIAL: u8 = 1 << 6;
}

/// For which packet the routes are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// One that came in, and goes on to the address.
    Forward,
    /// One that came in from the address: where would an answer go (`fib_validate_source`)?
    Return,
    /// One of the host itself, from this address.
    Output(IpAddr),
}

/// What a change may change in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// No answer.
    Nothing,
    /// Those for addresses of its prefix.
    Prefix,
    /// Any.
    Everything,
}

/// What is known about the routes of a family.
#[derive(Debug)]
pub(crate) struct Routes {
    family: Family,
    /// The embedder answers for it.
    is_vouched: bool,
    tables: BTreeMap<u32, Trie>,
    /// What prefixes have.
    entries: Entries,
    rules: Vec<Rule>,
    steps: Vec<Step>,
    /// What the kernel may do instead, since it does not tell whether a rule was ever added: see [`Self::set_rules`].
    instead: Option<Vec<Step>>,
    /// The kernel may have the tables local and main in one: see [`Self::set_rules`].
    may_be_merged: bool,
    /// The priority of a rule that cannot be followed.
    obscure: Option<u32>,
    /// Path MTUs that the kernel has learnt, by destination.
    path_mtus: BTreeMap<IpAddr, u32>,
    /// The host's own addresses of IPv4, whatever routes say.
    own: BTreeSet<Ipv4Addr>,
    /// Those for which the table local has no route: few, as a rule.
    bare: BTreeSet<Ipv4Addr>,
}

/// What a table has for a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Entry {
    kind: RouteKind,
    /// It is for some packets only; others are for what a shorter prefix has.
    is_partial: bool,
}

/// A rule, as far as it can be decided.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    priority: u32,
    is_inverted: bool,
    source: Option<IpNet>,
    destination: Option<IpNet>,
    iif: Option<Interface>,
    has_oif: bool,
    /// What is the same for all packets.
    always: Truth,
    action: RuleAction,
}

/// The interface that a rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    Loopback,
    There,
    /// There is none of this name, and the rule matches nothing.
    Missing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl From<bool> for Truth {
    fn from(is_true: bool) -> Self {
        if is_true { Self::Yes } else { Self::No }
    }
}

impl Truth {
    fn inverted(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

impl Routes {
    pub(crate) fn new(host: &HostFacts, family: Family) -> Self {
        let mut new = Self {
            family,
            is_vouched: host.vouched,
            tables: BTreeMap::new(),
            entries: Entries::default(),
            rules: Vec::new(),
            steps: Vec::new(),
            instead: None,
            may_be_merged: false,
            obscure: None,
            path_mtus: BTreeMap::new(),
            own: BTreeSet::new(),
            bare: BTreeSet::new(),
        };
        if host.vouched {
            return new;
        }
        let learnt = host.path_mtus.iter().filter(|learnt| Family::from(learnt.destination) == family);
        new.path_mtus = learnt.map(|learnt| (learnt.destination, learnt.mtu)).collect();
        if family == Family::V4 {
            new.own = host.addresses.iter().copied().collect();
            new.bare.clone_from(&new.own);
        }
        let rules = host.rules.iter().filter(|rule| rule.family == family).cloned().collect();
        new.set_rules(rules, |name| host.ifindex(name).is_some());
        let mut routes: Vec<&Route> =
            host.routes.iter().filter(|route| Family::of(&route.destination) == family).collect();
        // Those of one prefix stay in the kernel's order.
        routes.sort_by_key(|route| (route.table, Key::from(route.destination)));
        for same in
            routes.chunk_by(|one, other| (one.table, one.destination) == (other.table, other.destination))
        {
            let entry = Entry::of(same.iter().copied());
            new.set(same[0].table, same[0].destination, entry);
        }
        new
    }

    /// The embedder answers for them.
    pub(crate) fn is_vouched(&self) -> bool {
        self.is_vouched
    }

    /// Nothing is known.
    pub(crate) fn is_unknown(&self) -> bool {
        !self.is_vouched && (self.steps.is_empty() || self.obscure.is_some())
    }

    /// They are, and not only that the embedder answers for them.
    pub(crate) fn are_known(&self) -> bool {
        !self.is_vouched && !self.is_unknown()
    }

    /// The priority of a rule for which nothing is known.
    pub(crate) fn obscure_rule(&self) -> Option<u32> {
        self.obscure
    }

    pub(crate) fn family(&self) -> Family {
        self.family
    }

    /// Whether some route, or a path MTU, is for packets up to a length of its own, by a device.
    pub(crate) fn limits_on(&self, ifindex: u32) -> bool {
        let limits = |kind| match kind {
            RouteKind::Unicast { ifindex: device, mtu: Some(_), .. } => device == ifindex,
            _ => false,
        };
        let mut learnt =
            self.path_mtus.keys().map(|address| self.answer((*address).into(), Purpose::Forward));
        learnt.any(limits) || self.entries.known.iter().any(|(entry, _)| limits(entry.kind))
    }

    /// Takes up all rules. Returns whether that may change an answer.
    ///
    /// As long as no rule of IPv4 was ever added or deleted, the kernel keeps the tables local and main in one, and the
    /// longest prefix of both counts. For IPv6 it asks local and main, whatever rule was deleted, until one is added. Neither
    /// is told, so both ways must lead to the same answer as long as either may be.
    pub(crate) fn set_rules(&mut self, rules: Vec<Rule>, has_link: impl Fn(&str) -> bool) -> bool {
        let old = (std::mem::take(&mut self.steps), self.instead.take(), self.may_be_merged, self.obscure);
        let ordinary = Rule::ordinary(self.family);
        self.may_be_merged = self.family == Family::V4 && rules == ordinary;
        if self.family == Family::V6 && rules.iter().all(|rule| ordinary.contains(rule)) {
            self.instead = Some(ordinary[..2].iter().map(|rule| Step::of(rule, &has_link)).collect());
        }
        self.steps = rules.iter().map(|rule| Step::of(rule, &has_link)).collect();
        self.steps.sort_by_key(|step| step.priority);
        self.rules = rules;
        if self.instead.as_ref() == Some(&self.steps) {
            self.instead = None;
        }
        let mut possible = self.steps.iter().filter(|step| step.always != Truth::No || step.is_inverted);
        let obscure = possible.clone().find(|step| step.action == RuleAction::Unclear);
        let gotos = possible.by_ref().filter(|step| matches!(step.action, RuleAction::Goto(_)));
        let obscure = obscure.or_else(|| gotos.skip(MOST_GOTOS).last());
        self.obscure = obscure.map(|step| step.priority);
        let (steps, instead, may_be_merged, obscure) = old;
        (&steps, &instead, may_be_merged, obscure)
            != (&self.steps, &self.instead, self.may_be_merged, self.obscure)
    }

    /// Takes up that links have come or gone, which rules may name. Returns whether that may change an answer.
    pub(crate) fn links_changed(&mut self, has_link: impl Fn(&str) -> bool) -> bool {
        if self.rules.iter().all(|rule| rule.selector.iif.is_none()) {
            return false;
        }
        let rules = std::mem::take(&mut self.rules);
        self.set_rules(rules, has_link)
    }

    /// Takes up all routes that a table has for a prefix. Returns which answers that may change.
    pub(crate) fn set_routes(&mut self, table: u32, destination: IpNet, routes: &[Route]) -> Effect {
        let was_empty = !self.tables.contains_key(&table);
        let entry = Entry::of(routes.iter());
        let is_new = self.set(table, destination, entry);
        let is_empty = !self.tables.contains_key(&table);
        let is_special = |step: &Step| step.source.is_some() && step.asks(table);
        if was_empty != is_empty && self.steps.iter().any(is_special) {
            Effect::Everything
        } else if is_new && self.asked().any(|asked| asked == table) {
            Effect::Prefix
        } else {
            Effect::Nothing
        }
    }

    fn set(&mut self, table: u32, destination: IpNet, entry: Option<Entry>) -> bool {
        let trie = self.tables.entry(table).or_default();
        let value = entry.map(|entry| (self.entries.add(entry), entry.kinds()));
        let old = trie.set(destination.into(), value);
        if trie.is_empty() {
            self.tables.remove(&table);
        }
        if table == LOCAL
            && let Some(own) = address_v4(destination).filter(|own| self.own.contains(own))
        {
            self.look_for_route(own);
        }
        let is_new = old != value.map(|(value, _)| value);
        if let Some(old) = old {
            self.entries.remove(old);
        }
        is_new
    }

    /// The rules that are for some sources only and lead elsewhere: their sources. Nothing else takes them into account for
    /// packets that are forwarded.
    pub(crate) fn special_sources(&self) -> impl Iterator<Item = IpNet> {
        self.special_steps().map(|(_, source)| source)
    }

    /// The priority of the first of those rules that is for an address.
    pub(crate) fn special_rule(&self, source: IpAddr) -> Option<u32> {
        self.special_steps().find(|(_, prefix)| prefix.contains(&source)).map(|(step, _)| step.priority)
    }

    fn special_steps(&self) -> impl Iterator<Item = (&Step, IpNet)> {
        let leads_on = |step: &&Step| match step.action {
            RuleAction::Nop => false,
            RuleAction::Lookup { table, .. } => self.tables.contains_key(&table),
            _ => true,
        };
        let steps = self.steps.iter().filter(|step| !step.is_inverted && step.always != Truth::No);
        steps.filter(leads_on).filter_map(|step| Some((step, step.source?)))
    }

    /// The priority of the first rule that is, or may be, for packets to a prefix and leads somewhere: it decides, or leaves
    /// open, what becomes of them. `None` if every host has that rule.
    pub(crate) fn rule(&self, prefix: IpNet, purpose: Purpose) -> Option<u32> {
        let leads_on = |step: &&Step| match step.action {
            RuleAction::Nop => false,
            RuleAction::Lookup { table, .. } => {
                self.look_up(table, prefix).is_some_and(|(_, entry)| entry.kind != RouteKind::Throw)
            }
            _ => true,
        };
        let mut steps = self.steps.iter().filter(|step| step.matches(prefix, purpose) != Truth::No);
        let step = steps.find(leads_on)?;
        let is_ordinary = Rule::ordinary(self.family).iter().any(|rule| Step::of(rule, |_| false) == *step);
        (!is_ordinary).then_some(step.priority)
    }

    /// Whether an address is the host's own, whatever the rules say (`__ip_dev_find`).
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        self.look_up(LOCAL, address.into()).is_some_and(|(_, entry)| entry.kind == RouteKind::Local)
    }

    /// The path MTU that the kernel has learnt for a prefix that is one address.
    pub(crate) fn path_mtu(&self, prefix: IpNet) -> Option<u32> {
        let is_address = prefix.prefix_len() == prefix.max_prefix_len();
        is_address.then(|| self.path_mtus.get(&prefix.addr()).copied())?
    }

    /// The addresses strictly inside a prefix for which the kernel has learnt a path MTU.
    pub(crate) fn path_mtus_inside(&self, prefix: IpNet) -> impl Iterator<Item = IpNet> {
        let inside = self.path_mtus.range(prefix.network()..=prefix.broadcast());
        inside.map(|(address, _)| IpNet::from(*address)).filter(move |address| *address != prefix)
    }

    /// Takes up that the kernel has learnt a path MTU, or knows none any longer. Returns whether that is new.
    pub(crate) fn set_path_mtu(&mut self, destination: IpAddr, mtu: Option<u32>) -> bool {
        let old = match mtu {
            Some(mtu) => self.path_mtus.insert(destination, mtu),
            None => self.path_mtus.remove(&destination),
        };
        old != mtu
    }

    /// Whether a prefix is an address of the host, whatever routes say (`inet_lookup_ifaddr_rcu`).
    pub(crate) fn has_own(&self, prefix: IpNet) -> bool {
        address_v4(prefix).is_some_and(|address| self.own.contains(&address))
    }

    /// The addresses of the host strictly inside a prefix that have no route of their own which says that they are.
    pub(crate) fn own_inside(&self, prefix: IpNet) -> impl Iterator<Item = IpNet> {
        let prefix = match prefix {
            IpNet::V4(prefix) if prefix.prefix_len() < 32 => Some(prefix),
            _ => None,
        };
        let asks_local = self.asked().any(|table| table == LOCAL);
        let known = if asks_local { &self.bare } else { &self.own };
        let inside = prefix.map(|prefix| known.range(prefix.network()..=prefix.broadcast()));
        inside.into_iter().flatten().map(|own| Ipv4Net::from(*own).into())
    }

    /// Takes up that an address is the host's, or no longer. Returns whether that is new.
    pub(crate) fn set_own(&mut self, own: Ipv4Addr, is_own: bool) -> bool {
        if is_own {
            let is_new = self.own.insert(own);
            self.look_for_route(own);
            is_new
        } else {
            self.bare.remove(&own);
            self.own.remove(&own)
        }
    }

    /// Notes whether the table local has a route for an address of the host.
    fn look_for_route(&mut self, own: Ipv4Addr) {
        let found = self.look_up(LOCAL, Ipv4Net::from(own).into());
        let has_route = found.is_some_and(|(length, entry)| {
            length == 32 && entry.kind == RouteKind::Local && !entry.is_partial
        });
        if has_route {
            self.bare.remove(&own);
        } else {
            self.bare.insert(own);
        }
    }

    /// What happens to packets to a prefix for which no longer prefix counts. If there is no route they are unreachable. The
    /// MTU is the lesser one of the route and of what was learnt for the address, if the prefix is one.
    pub(crate) fn answer(&self, prefix: IpNet, purpose: Purpose) -> RouteKind {
        let answer = self.route(prefix, purpose);
        match (answer, self.path_mtu(prefix).filter(|_| purpose != Purpose::Return)) {
            (RouteKind::Unicast { ifindex, gateway, mtu }, Some(learnt)) => {
                let mtu = mtu.map_or(learnt, |mtu| mtu.min(learnt));
                RouteKind::Unicast { ifindex, gateway, mtu: Some(mtu) }
            }
            (answer, _) => answer,
        }
    }

    /// The same without what was learnt.
    fn route(&self, prefix: IpNet, purpose: Purpose) -> RouteKind {
        let mut answer = self.follow(&self.steps, prefix, purpose);
        if let Some(steps) = &self.instead {
            answer = agree(answer, self.follow(steps, prefix, purpose));
        }
        if self.may_be_merged
            && let Some((length, local)) = self.look_up(LOCAL, prefix)
        {
            if local.kind == RouteKind::Throw {
                answer = agree(answer, RouteKind::Unreachable);
            }
            if let Some((longer, main)) = self.look_up(MAIN, prefix)
                && longer > length
            {
                answer = agree(answer, met_by(purpose, main.kind));
            }
        }
        answer
    }

    fn follow(&self, steps: &[Step], prefix: IpNet, purpose: Purpose) -> RouteKind {
        let mut rest = steps;
        while let Some((step, later)) = rest.split_first() {
            rest = later;
            let truth = step.matches(prefix, purpose);
            if truth == Truth::No {
                continue;
            }
            let (found, is_certain) = match step.action {
                RuleAction::Nop => continue,
                RuleAction::Goto(priority) => {
                    let target = later.partition_point(|step| step.priority < priority);
                    // The kernel goes on with the next rule if there is none of that very priority.
                    let is_there = later.get(target).is_some_and(|step| step.priority == priority);
                    let target = if is_there { &later[target..] } else { later };
                    if truth == Truth::Yes {
                        rest = target;
                        continue;
                    }
                    (self.follow(target, prefix, purpose), false)
                }
                RuleAction::Deny => (RouteKind::Prohibit, true),
                RuleAction::Unclear => return RouteKind::Unclear,
                RuleAction::Lookup { table, suppress_prefix_length, suppress_group } => {
                    let Some((length, entry)) = self.look_up(table, prefix) else { continue };
                    // What drops is not suppressed.
                    let leads_on =
                        entry.kinds().are_within(kind::FORWARDS | kind::LIMITED | kind::OWN | kind::UNCLEAR);
                    match (entry.kind, suppress_prefix_length) {
                        (RouteKind::Throw, _) => continue,
                        (_, Some(_)) if entry.is_partial => return RouteKind::Unclear,
                        (_, Some(suppressed)) if leads_on && length <= suppressed => continue,
                        (kind, _) => (met_by(purpose, kind), !(suppress_group && leads_on)),
                    }
                }
            };
            if is_certain && truth == Truth::Yes {
                return found;
            }
            return agree(found, self.follow(later, prefix, purpose));
        }
        RouteKind::Unreachable
    }

    /// What a table has for a prefix, and the length of the prefix that it has it for.
    fn look_up(&self, table: u32, prefix: IpNet) -> Option<(u8, Entry)> {
        let trie = self.tables.get(&table)?;
        let (length, value) = trie.covering(prefix.into())?;
        let entry = self.entries.get(value);
        if !entry.is_partial {
            return Some((length, entry));
        }
        let others = length.checked_sub(1).and_then(|length| {
            let shorter = IpNet::new(prefix.addr(), length).ok()?;
            self.look_up(table, shorter.trunc())
        });
        let kind = match others {
            Some((_, others)) => agree(entry.kind, others.kind),
            None => RouteKind::Unclear,
        };
        Some((length, Entry { kind, is_partial: true }))
    }

    /// The longest prefix that contains one, or is it, which has a route or a rule of its own. Packets to either have the same
    /// answer, but for prefixes that are longer.
    pub(crate) fn covering(&self, prefix: IpNet) -> Option<IpNet> {
        let tables =
            self.asked().filter_map(|table| Some(self.tables.get(&table)?.covering(prefix.into())?.0));
        let rules = self.destinations().filter(|destination| destination.contains(&prefix));
        let length = tables.chain(rules.map(|destination| destination.prefix_len())).max()?;
        IpNet::new(prefix.addr(), length).ok().map(|prefix| prefix.trunc())
    }

    /// The shortest prefix that contains one and inside which all have the same answer, for any purpose; `None` if inside that one
    /// some may have another.
    pub(crate) fn even(&self, prefix: IpNet) -> Option<IpNet> {
        let tables = self.asked().filter_map(|table| self.tables.get(&table));
        let tables = tables.map(|trie| trie.even(prefix.into()));
        let before = self.path_mtus.range(..prefix.network()).next_back();
        let learnt = before.into_iter().chain(self.path_mtus.range(prefix.network()..).next());
        let learnt = learnt.map(|(address, _)| IpNet::from(*address));
        even(prefix, tables.chain(beside(prefix, self.destinations().chain(learnt))))
    }

    /// The same for packets from there, for which addresses of the host and sources of rules make a difference, too.
    pub(crate) fn even_source(&self, prefix: IpNet) -> Option<IpNet> {
        let own = match prefix {
            IpNet::V4(prefix) => {
                let before = self.own.range(..prefix.network()).next_back();
                before.into_iter().chain(self.own.range(prefix.network()..).next()).copied().collect()
            }
            IpNet::V6(_) => Vec::new(),
        };
        let own = own.into_iter().map(|own| IpNet::from(Ipv4Net::from(own)));
        let others = beside(prefix, self.special_sources().chain(own));
        even(prefix, others.chain([self.even(prefix).map(|even| even.prefix_len())]))
    }

    /// The prefixes strictly inside one that have a route or a rule of their own, in order. Without those of subtrees where
    /// all routes are like the one that covers them, as `same` says of that one and of what occurs there.
    pub(crate) fn inside(
        &self,
        prefix: IpNet,
        same: impl Fn(Option<RouteKind>, Kinds) -> bool,
    ) -> BTreeSet<IpNet> {
        let key = Key::from(prefix);
        let inside = self.destinations().filter(|other| *other != prefix && prefix.contains(other));
        let mut found: BTreeSet<IpNet> = inside.collect();
        let is_v4 = self.family == Family::V4;
        for table in self.asked() {
            let Some(trie) = self.tables.get(&table) else { continue };
            let is_plain = self.is_plain(table);
            let skip = |covering: Option<Value>, kinds: Kinds| {
                let covering =
                    covering.map(|value| self.entries.get(value)).filter(|entry| !entry.is_partial);
                is_plain && same(covering.map(|entry| entry.kind), kinds)
            };
            trie.each_inside(key, skip, |key, _| {
                found.insert(key.net(is_v4));
            });
        }
        found
    }

    /// Whether a route of a table may decide about prefixes inside its own of which another table, or a rule, knows more: what
    /// another table throws, for one.
    pub(crate) fn reaches_inside(&self, table: u32, prefix: IpNet) -> bool {
        let others = self.asked().filter(|other| *other != table).filter_map(|other| self.tables.get(&other));
        let mut rules = self.destinations();
        others.into_iter().any(|trie| trie.has_inside(prefix.into()))
            || rules.any(|other| other != prefix && prefix.contains(&other))
    }

    /// Whether a table's routes for one prefix may decide about packets to another one inside it: not if it has some for a
    /// longer one, which are for all packets.
    pub(crate) fn may_decide(&self, table: u32, prefix: IpNet, inside: IpNet) -> bool {
        let longest = self.tables.get(&table).and_then(|trie| trie.covering(inside.into()));
        longest
            .is_none_or(|(length, value)| length <= prefix.prefix_len() || self.entries.get(value).is_partial)
    }

    /// Whether routes of a table that say the same give the same answer, whatever their prefixes.
    fn is_plain(&self, table: u32) -> bool {
        let suppresses = |step: &Step| {
            let suppresses =
                matches!(step.action, RuleAction::Lookup { suppress_prefix_length: Some(_), .. });
            suppresses && step.asks(table)
        };
        let local = || self.tables.get(&LOCAL).map(Trie::all).unwrap_or_default();
        !self.steps.iter().any(suppresses) && (!self.may_be_merged || local().are_within(kind::OWN))
    }

    /// The tables that some rule asks, in the order of the rules; some of them twice.
    fn asked(&self) -> impl Iterator<Item = u32> {
        let steps = self.steps.iter().chain(self.instead.iter().flatten());
        steps.filter_map(|step| match step.action {
            RuleAction::Lookup { table, .. } => Some(table),
            _ => None,
        })
    }

    /// The destinations that rules are for.
    fn destinations(&self) -> impl Iterator<Item = IpNet> {
        self.steps.iter().filter_map(|step| step.destination)
    }
}

/// For each other prefix the length of the shortest one that contains a prefix, and not the other one strictly.
fn beside(prefix: IpNet, others: impl Iterator<Item = IpNet>) -> impl Iterator<Item = Option<u8>> {
    let key = Key::from(prefix);
    others.map(move |other| key.even_beside(other.into()))
}

/// The prefix that contains one and has the longest of these lengths, if all are known.
fn even(prefix: IpNet, lengths: impl Iterator<Item = Option<u8>>) -> Option<IpNet> {
    let mut lengths = lengths;
    let length = lengths.try_fold(0, |longest, length| Some(longest.max(length?)))?;
    IpNet::new(prefix.addr(), length).ok().map(|even| even.trunc())
}

/// What is certain when packets may get either of two answers. If one is that the address is the host's own, it may be.
fn agree(one: RouteKind, other: RouteKind) -> RouteKind {
    match (is_own(one), is_own(other)) {
        _ if one == other => one,
        (true, _) => one,
        (_, true) => other,
        (false, false) => RouteKind::Unclear,
    }
}

/// What a route is to packets of a purpose. Those that IPsec takes are sent by the outer route, whatever gateway the inner one has,
/// and whether there is a way back does not depend on how wide it is. Routes that differ in nothing else say the same, here as in
/// what [`Kinds`] sum up.
fn met_by(purpose: Purpose, kind: RouteKind) -> RouteKind {
    match (kind, purpose) {
        (RouteKind::Unicast { ifindex, mtu, .. }, Purpose::Forward) => {
            RouteKind::Unicast { ifindex, gateway: None, mtu }
        }
        (RouteKind::Unicast { ifindex, .. }, Purpose::Return) => {
            RouteKind::Unicast { ifindex, gateway: None, mtu: None }
        }
        (kind, _) => kind,
    }
}

/// The address that a prefix of IPv4 is, if it is one.
fn address_v4(prefix: IpNet) -> Option<Ipv4Addr> {
    match prefix {
        IpNet::V4(prefix) if prefix.prefix_len() == 32 => Some(prefix.addr()),
        _ => None,
    }
}

fn is_own(kind: RouteKind) -> bool {
    matches!(kind, RouteKind::Local | RouteKind::Broadcast | RouteKind::Anycast | RouteKind::Multicast)
}

impl Step {
    fn asks(&self, table: u32) -> bool {
        matches!(self.action, RuleAction::Lookup { table: asked, .. } if asked == table)
    }

    fn of(rule: &Rule, has_link: impl Fn(&str) -> bool) -> Self {
        let selector = &rule.selector;
        let iif = selector.iif.as_deref().map(|name| match name {
            "lo" => Interface::Loopback,
            name if has_link(name) => Interface::There,
            _ => Interface::Missing,
        });
        // The mark of a packet that was received, and of one that IPsec sends, is 0.
        let has_mark = selector.mark.is_none_or(|(value, mask)| value & mask == 0);
        // No port, and no device that packets leave by, is a VRF's.
        let is_possible = has_mark && !selector.l3mdev && iif != Some(Interface::Missing);
        let always = match (is_possible, selector.other) {
            (false, _) => Truth::No,
            (true, true) => Truth::Maybe,
            (true, false) => Truth::Yes,
        };
        Self {
            priority: rule.priority,
            is_inverted: selector.inverted,
            source: selector.source,
            destination: selector.destination,
            iif,
            has_oif: selector.oif.is_some(),
            always,
            action: rule.action,
        }
    }

    /// Whether the rule is for packets to a prefix, but for those to longer prefixes that rules are for.
    fn matches(&self, prefix: IpNet, purpose: Purpose) -> Truth {
        let destination = self.destination.is_none_or(|destination| destination.contains(&prefix));
        let source = match (self.source, purpose) {
            (None, _) => Truth::Yes,
            // The sources of such rules are special: packets from elsewhere are not theirs.
            (Some(_), Purpose::Forward) if !self.is_inverted => Truth::No,
            (Some(source), Purpose::Output(address)) => source.contains(&address).into(),
            (Some(_), Purpose::Forward | Purpose::Return) => Truth::Maybe,
        };
        let iif = match (self.iif, purpose) {
            (None, _) | (Some(Interface::Loopback), Purpose::Output(_)) => Truth::Yes,
            (Some(Interface::Loopback), Purpose::Forward)
            | (Some(Interface::There), Purpose::Output(_))
            | (Some(Interface::Missing), _) => Truth::No,
            (Some(_), Purpose::Forward | Purpose::Return) => Truth::Maybe,
        };
        let oif = match (self.has_oif, purpose) {
            (false, _) => Truth::Yes,
            (true, Purpose::Output(_)) => Truth::Maybe,
            (true, Purpose::Forward | Purpose::Return) => Truth::No,
        };
        let all = self.always.min(destination.into()).min(source).min(iif).min(oif);
        if self.is_inverted { all.inverted() } else { all }
    }
}

impl Entry {
    /// The kernel's choice among routes for one prefix: of those for all packets, the lowest metric. `None` without any.
    ///
    /// IPv6 takes a worse one if a next hop does not answer, but not on a host that forwards (`rt6_select`).
    fn of<'r>(routes: impl Iterator<Item = &'r Route> + Clone) -> Option<Self> {
        let is_for_all = |route: &&Route| (route.tos, route.source) == (0, None);
        let best = routes.clone().filter(is_for_all).map(|route| route.metric).min();
        let rest = routes.clone().filter(|route| is_for_all(route) && Some(route.metric) == best);
        // Which of two with one metric the kernel takes, is not told.
        let rest = rest.map(|route| route.kind).reduce(agree);
        // Those that are for some packets win whatever their metrics; which of them, the packet decides.
        let some = routes.filter(|route| !is_for_all(route)).map(|route| route.kind).reduce(agree);
        match (rest, some) {
            (None, None) => None,
            (Some(kind), None) => Some(Self { kind, is_partial: false }),
            (Some(kind), Some(some)) => Some(Self { kind: agree(kind, some), is_partial: false }),
            (None, Some(kind)) => Some(Self { kind, is_partial: true }),
        }
    }

    fn kinds(self) -> Kinds {
        use RouteKind::{
            Anycast, Blackhole, Broadcast, Local, Multicast, Prohibit, Throw, Unclear, Unicast, Unreachable,
        };

        let (kind, device) = match self.kind {
            Unicast { ifindex, mtu: None, .. } => (kind::FORWARDS, ifindex),
            Unicast { ifindex, mtu: Some(_), .. } => (kind::LIMITED, ifindex),
            Local | Broadcast | Anycast | Multicast => (kind::OWN, 0),
            Blackhole | Unreachable | Prohibit => (kind::DENIES, 0),
            Throw => (kind::THROWS, 0),
            Unclear => (kind::UNCLEAR, 0),
        };
        Kinds::new(kind | if self.is_partial { kind::PARTIAL } else { 0 }, device)
    }
}

/// Entries by number, each once.
#[derive(Debug, Default)]
struct Entries {
    numbers: HashMap<Entry, Value>,
    /// By number, less one: the entry, and how many prefixes have it.
    known: Vec<(Entry, u32)>,
    free: Vec<Value>,
}

impl Entries {
    fn add(&mut self, entry: Entry) -> Value {
        let number = *self.numbers.entry(entry).or_insert_with(|| {
            self.free.pop().unwrap_or_else(|| {
                self.known.push((entry, 0));
                // There are no more than prefixes.
                Value::try_from(self.known.len()).unwrap_or(Value::MAX)
            })
        });
        let known = &mut self.known[number as usize - 1];
        *known = (entry, known.1 + 1);
        number
    }

    fn remove(&mut self, number: Value) {
        let (entry, count) = &mut self.known[number as usize - 1];
        *count -= 1;
        if *count == 0 {
            self.numbers.remove(entry);
            self.free.push(number);
        }
    }

    fn get(&self, number: Value) -> Entry {
        self.known[number as usize - 1].0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::{Link, RuleSelector};

    fn via(ifindex: u32) -> RouteKind {
        RouteKind::Unicast { ifindex, gateway: None, mtu: None }
    }

    fn route(table: u32, destination: &str, kind: RouteKind) -> Route {
        Route::new(table, destination.parse().unwrap(), kind)
    }

    fn host(rules: Vec<Rule>, routes: Vec<Route>) -> HostFacts {
        let lan = Link { ifindex: 2, name: "lan0".to_owned(), ..Link::default() };
        HostFacts { rules, routes, links: vec![lan], ..HostFacts::default() }
    }

    fn ordinary(routes: Vec<Route>) -> HostFacts {
        host([Rule::ordinary(Family::V4), Rule::ordinary(Family::V6)].concat(), routes)
    }

    /// With a rule that was added, so that the kernel has each table for itself.
    fn with_rule(rule: Rule, routes: Vec<Route>) -> HostFacts {
        let mut rules = Rule::ordinary(rule.family).to_vec();
        rules.push(rule);
        host(rules, routes)
    }

    fn answer(host: &HostFacts, destination: &str, purpose: Purpose) -> RouteKind {
        let destination: IpAddr = destination.parse().unwrap();
        Routes::new(host, destination.into()).answer(destination.into(), purpose)
    }

    fn forward(host: &HostFacts, destination: &str) -> RouteKind {
        answer(host, destination, Purpose::Forward)
    }

    #[test]
    fn a_throw_route_goes_on_with_the_next_table_and_ends_nowhere_without_one() {
        let host = with_rule(
            Rule::lookup(Family::V4, 100, 100),
            vec![
                route(100, "10.0.0.0/8", RouteKind::Throw),
                route(100, "0.0.0.0/0", via(2)),
                route(MAIN, "10.1.0.0/16", via(1)),
            ],
        );
        assert_eq!(forward(&host, "10.1.0.1"), via(1));
        assert_eq!(forward(&host, "10.2.0.1"), RouteKind::Unreachable);
        assert_eq!(forward(&host, "192.0.2.1"), via(2));
    }

    #[test]
    fn local_and_main_may_be_one_table_for_ipv4_until_a_rule_is_added_so_both_must_agree() {
        let routes = vec![
            route(LOCAL, "10.2.0.0/16", via(1)),
            route(MAIN, "10.2.5.0/24", RouteKind::Blackhole),
            route(MAIN, "10.2.6.0/24", via(1)),
            route(LOCAL, "10.3.5.0/24", RouteKind::Throw),
            route(MAIN, "10.3.0.0/16", via(1)),
            route(LOCAL, "127.0.0.0/8", RouteKind::Local),
            route(MAIN, "127.1.0.0/16", via(1)),
        ];
        let may_be_one = ordinary(routes.clone());
        assert_eq!(forward(&may_be_one, "10.2.0.1"), via(1));
        assert_eq!(forward(&may_be_one, "10.2.5.1"), RouteKind::Unclear);
        assert_eq!(forward(&may_be_one, "10.2.6.1"), via(1));
        assert_eq!(forward(&may_be_one, "10.3.5.1"), RouteKind::Unclear);
        assert_eq!(forward(&may_be_one, "127.1.0.1"), RouteKind::Local, "it may be, so it counts as own");
        let are_two = with_rule(Rule::lookup(Family::V4, 100, 100), routes);
        assert_eq!(forward(&are_two, "10.2.5.1"), via(1));
        assert_eq!(forward(&are_two, "10.3.5.1"), via(1));
    }

    #[test]
    fn ipv6_asks_local_and_main_whatever_rule_is_deleted_until_one_is_added() {
        let routes =
            vec![route(LOCAL, "2001:db8:2::9/128", RouteKind::Local), route(MAIN, "2001:db8:2::/48", via(1))];
        let [_, main, _] = Rule::ordinary(Family::V6);
        let without_local = host(vec![main], routes.clone());
        assert_eq!(forward(&without_local, "2001:db8:2::9"), RouteKind::Local);
        assert_eq!(forward(&without_local, "2001:db8:2::8"), via(1));
        let [local, ..] = Rule::ordinary(Family::V6);
        let without_main = host(vec![local], routes);
        assert_eq!(forward(&without_main, "2001:db8:2::8"), RouteKind::Unclear);
    }

    #[test]
    fn the_lowest_metric_wins_and_routes_of_one_metric_that_disagree_are_unclear() {
        let metric = |metric, route| Route { metric, ..route };
        let host = ordinary(vec![
            metric(5, route(MAIN, "10.0.0.0/8", via(2))),
            metric(1, route(MAIN, "10.0.0.0/8", via(1))),
            metric(1, route(MAIN, "10.1.0.0/16", via(1))),
            metric(1, route(MAIN, "10.1.0.0/16", via(2))),
            metric(1024, route(MAIN, "::/0", via(1))),
            metric(4_278_198_272, route(MAIN, "::/0", RouteKind::Unreachable)),
        ]);
        assert_eq!(forward(&host, "10.0.0.1"), via(1));
        assert_eq!(forward(&host, "10.1.0.1"), RouteKind::Unclear);
        assert_eq!(forward(&host, "2001:db8::1"), via(1));
    }

    #[test]
    fn a_route_for_some_packets_only_is_unclear_unless_the_others_go_the_same_way() {
        let tos = |route| Route { tos: 0x10, ..route };
        let from = |source: &str, route| Route { source: Some(source.parse().unwrap()), ..route };
        let host = ordinary(vec![
            route(MAIN, "0.0.0.0/0", via(1)),
            tos(route(MAIN, "10.1.0.0/16", RouteKind::Unreachable)),
            tos(route(MAIN, "10.2.0.0/16", via(1))),
            route(MAIN, "10.3.0.0/16", via(1)),
            Route { metric: 500, ..tos(route(MAIN, "10.3.0.0/16", RouteKind::Blackhole)) },
            route(MAIN, "::/0", via(1)),
            from("2001:db8:1::/48", route(MAIN, "2001:db8:2::/48", via(2))),
        ]);
        assert_eq!(forward(&host, "10.1.0.1"), RouteKind::Unclear);
        assert_eq!(forward(&host, "10.2.0.1"), via(1));
        assert_eq!(forward(&host, "10.3.0.1"), RouteKind::Unclear);
        assert_eq!(forward(&host, "2001:db8:2::1"), RouteKind::Unclear);
        assert_eq!(forward(&host, "2001:db8:3::1"), via(1));
    }

    fn lookup(table: u32) -> RuleAction {
        RuleAction::Lookup { table, suppress_prefix_length: None, suppress_group: false }
    }

    /// A rule of IPv4 before the table main.
    fn rule(priority: u32, selector: RuleSelector, action: RuleAction) -> Rule {
        Rule::new(Family::V4, priority, selector, action)
    }

    /// A default route, and one of another table.
    fn routes() -> Vec<Route> {
        vec![route(MAIN, "0.0.0.0/0", via(1)), route(50, "10.2.0.0/16", via(2))]
    }

    /// The rules of libreswan, strongSwan, wg-quick and tailscale, and what a VRF leaves behind.
    #[test]
    fn rules_as_vpn_tools_add_them_are_decided() {
        let everything = RuleSelector::default;
        let marked = |value, mask| RuleSelector { mark: Some((value, mask)), ..RuleSelector::default() };
        let unmarked = |value| RuleSelector { inverted: true, ..marked(value, u32::MAX) };
        let libreswan =
            RuleSelector { destination: Some("192.0.2.23/32".parse().unwrap()), ..marked(1, u32::MAX) };
        for (what, selector, action, expected) in [
            ("libreswan", libreswan, lookup(50), via(1)),
            ("strongSwan", everything(), lookup(50), via(2)),
            ("strongSwan with a mark", unmarked(0x42), lookup(50), via(2)),
            ("tailscale", marked(0x80000, 0xff_0000), RuleAction::Deny, via(1)),
            ("a VRF", RuleSelector { l3mdev: true, ..everything() }, RuleAction::Deny, via(1)),
            ("an empty table", RuleSelector { other: true, ..everything() }, lookup(91), via(1)),
            ("some packets", RuleSelector { other: true, ..everything() }, lookup(50), RouteKind::Unclear),
            (
                "a port",
                RuleSelector { iif: Some("lan0".to_owned()), ..everything() },
                lookup(50),
                RouteKind::Unclear,
            ),
            ("no port", RuleSelector { iif: Some("lan9".to_owned()), ..everything() }, lookup(50), via(1)),
            ("the host", RuleSelector { iif: Some("lo".to_owned()), ..everything() }, lookup(50), via(1)),
            ("a device", RuleSelector { oif: Some("lan0".to_owned()), ..everything() }, lookup(50), via(1)),
        ] {
            let host = with_rule(rule(220, selector, action), routes());
            assert_eq!(forward(&host, "10.2.0.1"), expected, "{what}");
            assert_eq!(
                forward(&host, "10.3.0.1"),
                if what == "nothing" { expected } else { via(1) },
                "{what}"
            );
        }
        let mut wireguard = with_rule(rule(32_765, unmarked(0xca6c), lookup(51_820)), routes());
        wireguard.rules.push(rule(
            32_764,
            everything(),
            RuleAction::Lookup { table: MAIN, suppress_prefix_length: Some(0), suppress_group: false },
        ));
        wireguard.routes.extend([route(51_820, "0.0.0.0/0", via(9)), route(MAIN, "10.4.0.0/16", via(1))]);
        assert_eq!(forward(&wireguard, "10.3.0.1"), via(9));
        assert_eq!(forward(&wireguard, "10.4.0.1"), via(1));
    }

    #[test]
    fn a_rule_for_a_destination_counts_there_and_one_for_a_source_makes_its_sources_special() {
        let prefix = |text: &str| Some(text.parse::<IpNet>().unwrap());
        let to = RuleSelector { destination: prefix("10.2.4.0/24"), ..RuleSelector::default() };
        let host = with_rule(rule(93, to, lookup(50)), routes());
        assert_eq!(forward(&host, "10.2.4.1"), via(2));
        assert_eq!(forward(&host, "10.2.5.1"), via(1));
        let known = Routes::new(&host, Family::V4);
        assert_eq!(known.covering("10.2.4.1/32".parse().unwrap()), prefix("10.2.4.0/24"));
        assert_eq!(known.special_sources().count(), 0);

        let from = RuleSelector { source: prefix("10.1.9.0/24"), ..RuleSelector::default() };
        let mut host = with_rule(rule(92, from, lookup(50)), routes());
        assert_eq!(forward(&host, "10.2.4.1"), via(1));
        assert_eq!(answer(&host, "10.2.4.1", Purpose::Return), RouteKind::Unclear);
        let outer = |source: &str| answer(&host, "10.2.4.1", Purpose::Output(source.parse().unwrap()));
        assert_eq!((outer("10.1.9.1"), outer("10.1.8.1")), (via(2), via(1)));
        assert_eq!(Routes::new(&host, Family::V4).special_sources().next(), prefix("10.1.9.0/24"));
        host.routes.retain(|route| route.table != 50);
        let mut known = Routes::new(&host, Family::V4);
        assert_eq!(known.special_sources().next(), None, "the table has no route");
        let added = [route(50, "10.9.0.0/16", via(2))];
        assert_eq!(known.set_routes(50, added[0].destination, &added), Effect::Everything);
    }

    #[test]
    fn a_rule_goes_to_one_of_the_very_priority_or_on_and_one_that_is_not_understood_hides_everything() {
        for (target, expected) in [(300, via(1)), (250, via(2)), (400, via(2))] {
            let mut host = with_rule(rule(100, RuleSelector::default(), RuleAction::Goto(target)), routes());
            host.rules.push(rule(250, RuleSelector::default(), lookup(50)));
            host.rules.push(rule(300, RuleSelector::default(), RuleAction::Nop));
            assert_eq!(forward(&host, "10.2.0.1"), expected, "{target}");
        }
        let odd = with_rule(rule(100, RuleSelector::default(), RuleAction::Unclear), routes());
        let odd = Routes::new(&odd, Family::V4);
        assert!(odd.is_unknown());
        assert_eq!(odd.obscure_rule(), Some(100));
        assert!(Routes::new(&HostFacts::default(), Family::V4).is_unknown());
        assert!(!Routes::new(&HostFacts::vouched(), Family::V4).is_unknown());
    }

    #[test]
    fn an_address_is_own_whatever_the_rules_say() {
        let host = with_rule(
            rule(0, RuleSelector::default(), RuleAction::Deny),
            vec![route(LOCAL, "192.0.2.1/32", RouteKind::Local)],
        );
        let routes = Routes::new(&host, Family::V4);
        assert!(routes.is_own([192, 0, 2, 1].into()) && !routes.is_own([192, 0, 2, 2].into()));
    }

    /// What a packet of a known source, on a known port, meets.
    fn of_packet(host: &HostFacts, source: IpAddr, destination: IpAddr, is_other: bool) -> RouteKind {
        let mut rules: Vec<&Rule> = host.rules.iter().collect();
        rules.sort_by_key(|rule| rule.priority);
        let mut at = 0;
        while let Some(rule) = rules.get(at) {
            at += 1;
            let RuleSelector { inverted, source: from, destination: to, iif, other, .. } = &rule.selector;
            let is_in =
                |prefix: &Option<IpNet>, address| prefix.is_none_or(|prefix| prefix.contains(&address));
            let meets = is_in(from, source)
                && is_in(to, destination)
                && iif.as_ref().is_none_or(|name| name == "lan0")
                && (!other || is_other);
            if meets == *inverted {
                continue;
            }
            match rule.action {
                RuleAction::Goto(priority) => {
                    if let Some(target) =
                        rules.iter().position(|rule| rule.priority == priority).filter(|t| *t >= at)
                    {
                        at = target;
                    }
                }
                RuleAction::Deny => return RouteKind::Prohibit,
                RuleAction::Nop | RuleAction::Unclear => {}
                RuleAction::Lookup { table, suppress_prefix_length, .. } => {
                    let routes = host.routes.iter().filter(|route| route.table == table);
                    let routes = routes.filter(|route| route.destination.contains(&destination));
                    let longest = routes.max_by_key(|route| route.destination.prefix_len());
                    match longest {
                        None | Some(Route { kind: RouteKind::Throw, .. }) => {}
                        Some(route)
                            if suppress_prefix_length
                                .is_some_and(|length| route.destination.prefix_len() <= length)
                                && route.kind != RouteKind::Blackhole => {}
                        Some(route) => return route.kind,
                    }
                }
            }
        }
        RouteKind::Unreachable
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (0..16u8, prop_oneof![28..=32u8, Just(0u8)])
            .prop_map(|(host, length)| IpNet::new([10, 0, 0, host].into(), length).unwrap().trunc())
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let selector = (
            prop::bool::weighted(0.2),
            prop::option::weighted(0.2, prefix()),
            prop::option::weighted(0.3, prefix()),
            prop::option::weighted(0.2, prop_oneof![Just("lan0".to_owned()), Just("lan9".to_owned())]),
            prop::bool::weighted(0.2),
        );
        let suppress = prop::option::weighted(0.3, prop_oneof![Just(0u8), Just(29)]);
        let action = prop_oneof![
            8 => (1..4u32, suppress).prop_map(|(table, suppress_prefix_length)| RuleAction::Lookup {
                table,
                suppress_prefix_length,
                suppress_group: false,
            }),
            2 => (1..8u32).prop_map(RuleAction::Goto),
            1 => Just(RuleAction::Deny),
        ];
        (1..8u32, selector, action).prop_map(
            |(priority, (inverted, source, destination, iif, other), action)| {
                let selector =
                    RuleSelector { inverted, source, destination, iif, other, ..RuleSelector::default() };
                rule(priority, selector, action)
            },
        )
    }

    fn any_routes() -> impl Strategy<Value = Vec<Route>> {
        let kind = prop_oneof![
            4 => (1..3u32).prop_map(via),
            1 => Just(RouteKind::Throw),
            1 => Just(RouteKind::Local),
            1 => Just(RouteKind::Blackhole),
        ];
        let one = (1..4u32, prefix(), kind)
            .prop_map(|(table, destination, kind)| Route::new(table, destination, kind));
        proptest::collection::vec(one, 0..12).prop_map(|mut routes| {
            routes.sort_by_key(|route| (route.table, route.destination));
            routes.dedup_by_key(|route| (route.table, route.destination));
            routes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Where a prefix is even, every address has its answers, and all of the host's addresses and special sources lie elsewhere.
        #[test]
        fn where_it_is_even_the_same_holds_everywhere(
            rules in proptest::collection::vec(any_rule(), 0..6),
            routes in any_routes(),
            learnt in proptest::collection::vec(0..16u8, 0..3),
            own in proptest::collection::vec(0..16u8, 0..3),
            asked in prefix(),
        ) {
            let rules = if rules.is_empty() { Rule::ordinary(Family::V4).into() } else { rules };
            let mut known = Routes::new(&host(rules, routes), Family::V4);
            for own in own {
                known.set_own([10, 0, 0, own].into(), true);
            }
            for learnt in learnt {
                known.set_path_mtu([10, 0, 0, learnt].into(), Some(1300));
            }
            let special: Vec<IpNet> = known.special_sources().collect();
            let addresses = |even: Option<IpNet>| {
                let all = (0..16u8).map(|host| IpAddr::from([10, 0, 0, host]));
                all.filter(move |address| even.is_some_and(|even| even.contains(address)))
            };
            let answers = |of: IpNet| {
                [Purpose::Forward, Purpose::Return, Purpose::Output([10, 0, 0, 1].into())].map(|p| known.answer(of, p))
            };
            for address in addresses(known.even(asked)) {
                prop_assert_eq!(answers(address.into()), answers(asked), "{}", address);
            }
            for address in addresses(known.even_source(asked)) {
                let is_special = special.iter().any(|special| special.contains(&asked));
                prop_assert_eq!(known.special_rule(address).is_some(), is_special, "{}", address);
                prop_assert_eq!(known.has_own(address.into()), known.has_own(asked), "{}", address);
                prop_assert_eq!(answers(address.into()), answers(asked), "{}", address);
            }
        }

        /// Where an answer is certain, every packet gets it, whatever else it is; and of a prefix inside which nothing is
        /// found that may differ, all addresses have one.
        #[test]
        fn a_certain_answer_is_that_of_every_packet(
            rules in proptest::collection::vec(any_rule(), 1..6),
            routes in any_routes(),
            changes in proptest::collection::vec((any_routes(), 1..4u32, prefix()), 0..4),
            asked in prefix(),
        ) {
            let mut host = host(rules, routes);
            let mut known = Routes::new(&host, Family::V4);
            for (routes, table, destination) in changes {
                let routes: Vec<_> = routes.into_iter().take(1).map(|r| Route { table, destination, ..r }).collect();
                known.set_routes(table, destination, &routes);
                host.apply(crate::host::HostChange::Routes { table, destination, routes });
            }
            let special: Vec<IpNet> = known.special_sources().collect();
            let inside = known.inside(asked, |_, _| false);
            for host_bits in 0..16u8 {
                let destination: IpAddr = [10, 0, 0, host_bits].into();
                let certain = known.answer(destination.into(), Purpose::Forward);
                if asked.contains(&destination) {
                    let at = inside.iter().filter(|prefix| prefix.contains(&destination));
                    let at = at.max_by_key(|prefix| prefix.prefix_len()).copied().unwrap_or(asked);
                    prop_assert_eq!(known.answer(at, Purpose::Forward), certain, "{} in {}", destination, at);
                }
                for (source, is_other) in [(1u8, false), (1, true), (9, false), (14, true), (200, false)] {
                    let source: IpAddr = [10, 0, 0, source].into();
                    if special.iter().any(|prefix| prefix.contains(&source)) {
                        continue;
                    }
                    let actual = of_packet(&host, source, destination, is_other);
                    let is_bad = matches!(actual, RouteKind::Blackhole | RouteKind::Prohibit | RouteKind::Unreachable);
                    match certain {
                        // Local says that it may be the host's own.
                        RouteKind::Unclear | RouteKind::Local => {}
                        RouteKind::Blackhole | RouteKind::Prohibit | RouteKind::Unreachable => prop_assert!(is_bad),
                        certain => prop_assert_eq!(certain, actual, "{} to {}", source, destination),
                    }
                }
            }
        }
    }
}
