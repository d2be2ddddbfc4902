//! Which region of packet space is fast.
//!
//! The [`Compiler`] reads a [`Database`] and [`HostFacts`] and says what an
//! [`OffloadTable`](crate::OffloadTable) must hold. It is pure: no I/O, no clock, and the same input gives the
//! same output. All decisions about precedence and safety are made here:
//!
//! - `rule`: when the kernel's choice among policies is certain;
//! - `plane`: into which cells the policies split the plane of addresses;
//! - `path`, `standings`: how a policy's packets leave;
//! - `reliance`, `neighbours`: what of the host that depends on;
//! - `hooks`: what packets must not skip on their way;
//! - `facts`, `probed`: which single addresses inside a cell are not to be fast, and which of them to look up;
//! - `exceptions`: policies that ask for a protocol or ports;
//! - `fit`: what to leave out when a table is too small;
//! - `last`: the last answer, where many questions follow one another;
//! - `obstacles`: what keeps everything from being fast;
//! - `family`: the verdicts of one address family;
//! - `verdicts`: those of both, and whose slots are in use.
//!
//! Policies that ask for a protocol or for ports are not cells but [exceptions](crate::table::Exception):
//! packets that they match pass, and what they do not match is not their business. Inbound policies do not
//! take part, since the kernel does not ask them about packets that it forwards.
//!
//! # What a change costs
//!
//! A change of a policy costs a few searches for each pair of prefix lengths that policies have, and as much
//! for each cell inside the policy's region; a change of an association, as much for each policy that asks for
//! its peer and reqid, and no cell is written; a change of a route, for each cell with addresses of its prefix for
//! which its table has no longer one (the others are passed over, after one search in that table), and of a path MTU, for each
//! cell with its address. Four things look at every cell: another highest priority of packet-offloaded policies, everything that
//! is known of the host told anew, other rules of policy routing, and every change while the table cannot hold all cells.

mod broken;
#[cfg(any(test, fuzzing))]
mod brute_force;
mod counts;
mod exceptions;
mod explain;
mod facts;
mod family;
mod fit;
#[cfg(test)]
mod following;
mod hooks;
mod last;
#[cfg(any(test, fuzzing))]
mod model;
mod neighbours;
mod obstacles;
mod path;
mod plane;
mod prefix;
mod probed;
#[cfg(test)]
mod properties;
mod reliance;
mod rule;
mod slots;
mod standings;
#[cfg(test)]
mod stories;
mod verdicts;

#[cfg(feature = "broken-rules")]
pub use self::broken::BrokenRule;
#[cfg(fuzzing)]
#[doc(hidden)]
pub use self::brute_force::fuzz;

use std::{collections::BTreeMap, net::IpAddr, panic::resume_unwind, thread};

use fastswan_ebpf::PassReason;
use ipnet::{IpNet, Ipv4Net};

pub(crate) use self::neighbours::Neighbours;
pub use self::{
    explain::{Cause, Explanation, Flow, ParseFlowError, Shadow},
    obstacles::Obstacle,
};
use self::{
    facts::AddressFacts,
    family::Compiled as _,
    path::{Concerns, Paths},
    reliance::Reliance,
    rule::same_way,
    standings::{Standings, Way},
    verdicts::{Pending, Verdicts},
};
use crate::{
    database::{Database, PolicyKey, Revision},
    host::{HostChange, HostFacts, PathMtu},
    policy::{Direction, Family, OffloadDev, Policy, PolicyId},
    table::{Capacity, Room, Slot, TableUpdate, Verdict},
};

/// Of so many policies a second thread works out faster how packets leave than it takes to start it. Tests always have one.
const MANY: usize = if cfg!(test) { 2 } else { 10_000 };

/// Compiles a database to a table.
///
/// Each call of [`compile`](Self::compile) returns what has changed since the call before, so every update must
/// reach the table. When a table is replaced by an empty one, start with a new compiler.
///
/// ```
/// use fastswan::policy::{Egress, NextHop};
/// use fastswan::{Compiler, Database, HostFacts, MemoryTable, OffloadTable as _, PolicySource as _};
/// use fastswan::{Selector, StaticSource, source::fixed::StaticPolicy, table::TableConfig};
///
/// # futures::executor::block_on(async {
/// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let tunnel = StaticPolicy::new(selector, 7, "192.0.2.1".parse()?, "192.0.2.2".parse()?)
///     .egress(Egress { next_hop: NextHop::Device, max_length: Some(1400) });
/// let mut source = StaticSource::new(&[tunnel]);
///
/// let mut table = MemoryTable::new(&TableConfig::default());
/// let (mut database, mut compiler) = (Database::default(), Compiler::new(table.capacity()));
/// compiler.set_host(&HostFacts::vouched());
/// while let Some(event) = source.next_event().await? {
///     database.apply(event);
///     table.apply(&compiler.compile(&database))?;
/// }
/// assert_eq!(compiler.fast_policies(&database), 1);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Compiler {
    capacity: Capacity,
    paths: Paths,
    verdicts: Verdicts,
    /// When the database was last looked at; `None` if nothing of it is compiled.
    revision: Option<Revision>,
    /// What of the host slots depend on, and what of that has changed.
    reliance: Reliance,
}

/// What became of a packet-offloaded outbound policy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PolicyReport {
    /// The policy.
    pub id: PolicyId,
    /// Its slot in the table, if it is or was fast. Packets that match several policies which lead the same way are counted
    /// there for the one with the best priority, so others that are fast may have no slot, or count less.
    pub slot: Option<Slot>,
    /// Whether it is fast.
    pub state: PolicyState,
}

/// Whether packets of a policy are fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyState {
    /// They are, or those of a part of its region; the others may be another policy's or pass.
    Fast,
    /// They pass.
    Pass(PassReason),
}

#[cfg(feature = "serde")]
impl serde::Serialize for PolicyState {
    /// As the name of the reason, or `fast`.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Fast => "fast",
            Self::Pass(reason) => reason.name(),
        })
    }
}

/// Some policies as they were looked at.
#[derive(Debug)]
pub(crate) struct Part {
    /// Of the packet-offloaded outbound ones, with their devices.
    pub(crate) reports: Vec<(PolicyReport, Option<OffloadDev>)>,
    /// How many outbound ones are not packet-offloaded.
    pub(crate) software: u64,
    /// Where to go on.
    pub(crate) next: Option<PolicyKey>,
}

impl Compiler {
    /// A compiler for a table of this capacity that holds nothing yet. Nothing is known about the host, so
    /// nothing is fast before [`set_host`](Self::set_host).
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            paths: Paths::new(&HostFacts::default()),
            verdicts: Verdicts::new(&capacity),
            revision: None,
            reliance: Reliance::default(),
        }
    }

    /// Breaks a rule on purpose: packets will be sent the wrong way. For the oracle of the testkit only.
    #[cfg(feature = "broken-rules")]
    #[must_use]
    pub fn with_broken_rule(mut self, rule: BrokenRule) -> Self {
        self.verdicts.v4.set_broken(rule);
        self.verdicts.v6.set_broken(rule);
        self.verdicts.slots.set_hoarding(rule == BrokenRule::Descendants);
        self
    }

    /// Takes up what the host does with addresses. It takes effect at the next [`compile`](Self::compile).
    pub fn set_host(&mut self, host: &HostFacts) {
        self.paths = Paths::new(host);
        self.everything_changed();
    }

    /// Takes up a change of that. It costs what it concerns: for a route, the cells whose addresses its prefix has, and
    /// for a path MTU or an address of the host, those that have its address.
    pub fn change_host(&mut self, change: &HostChange) {
        let (prefix, table) = match change {
            HostChange::Routes { table, destination, .. } => (*destination, Some(*table)),
            HostChange::PathMtu(PathMtu { destination, .. }) | HostChange::PathMtuGone(destination) => {
                (IpNet::from(*destination), None)
            }
            HostChange::Address(own) | HostChange::AddressGone(own) => (Ipv4Net::from(*own).into(), None),
            _ => {
                let concerns = self.paths.change(change);
                return self.take_up(concerns);
            }
        };
        let family = Family::of(&prefix);
        let facts = AddressFacts::new(&self.paths, family);
        let before = facts.both(prefix);
        match family {
            Family::V4 => self.verdicts.v4.forget_addresses(prefix, facts),
            Family::V6 => self.verdicts.v6.forget_addresses(prefix, facts),
        }
        let concerns = self.paths.change(change);
        let facts = AddressFacts::new(&self.paths, family);
        let is_other =
            facts.both(prefix) != before || table.is_some_and(|table| facts.reaches_inside(table, prefix));
        let routes = self.paths.routes(family);
        let matters = |inside| table.is_none_or(|table| routes.may_decide(table, prefix, inside));
        match family {
            Family::V4 => self.verdicts.v4.learn_addresses(prefix, facts, is_other, matters),
            Family::V6 => self.verdicts.v6.learn_addresses(prefix, facts, is_other, matters),
        }
        self.take_up(concerns);
    }

    /// How many cells the next [`compile`](Self::compile) looks at, at most: because of what the host does, or for all policies
    /// that have slots, if more has changed than the database remembers.
    pub(crate) fn awaited(&self, database: &Database) -> usize {
        let is_followed = self.revision.is_none_or(|revision| database.changes_since(revision).is_some());
        let of_policies = if is_followed { 0 } else { self.verdicts.slots.len() };
        self.verdicts.touched() + of_policies
    }

    fn take_up(&mut self, concerns: Concerns) {
        match concerns {
            Concerns::Everything => self.everything_changed(),
            concerns => self.reliance.changed(concerns),
        }
    }

    fn everything_changed(&mut self) {
        self.verdicts.facts_changed();
        self.reliance.changed(Concerns::Everything);
    }

    /// Returns what has changed since the last call.
    ///
    /// Nothing of a database that is not [current](Database::is_current) is fast. What does not fit into the
    /// table passes; an update always fits. In it, removals come first, then the rest, longest prefixes first.
    /// The database may be another one than last time.
    pub fn compile(&mut self, database: &Database) -> TableUpdate {
        let mut update = TableUpdate::default();
        let Self { paths, verdicts, revision, reliance, .. } = self;
        if !database.is_current() {
            if revision.take().is_some() {
                verdicts.clear(&mut update);
            }
            return update;
        }
        let mut pending = Pending::default();
        let before = revision.replace(database.revision());
        let changes = before.and_then(|revision| database.changes_since(revision));
        let is_followed = changes.is_some();
        if let Some(changes) = changes {
            verdicts.follow(changes, database, &mut pending);
        }
        let is_rebuilt = !is_followed || verdicts.are_worth_rebuilding();
        reliance.limit(verdicts.slots.len());
        // All policies are looked at only if something has changed that they may rely on.
        if !is_rebuilt && reliance.has_changed() {
            let owners = verdicts.slots.owners();
            pending.standings.extend(owners.filter(|key| {
                database.policy_with_key(*key).is_some_and(|policy| reliance.concerns(policy, paths))
            }));
        }
        reliance.take_up();

        // Many standings are worked out while the verdicts are: neither depends on the other.
        in_order(&mut pending.standings);
        let ahead = if is_rebuilt {
            candidates(database).map(|(key, _)| key).collect()
        } else if pending.standings.len() >= MANY {
            pending.standings.clone()
        } else {
            Vec::new()
        };
        let standings = || Standings::new(database, paths);
        let mut settle = || {
            if is_rebuilt {
                verdicts.rebuild(database, &mut pending);
            }
            verdicts.settle(database, paths, &mut pending);
            verdicts.finish(paths, &mut update);
        };
        let (known, noted) = if ahead.len() < MANY {
            settle();
            <_>::default()
        } else {
            thread::scope(|scope| {
                // Where there can be no other thread, they are worked out below.
                let ahead = thread::Builder::new().spawn_scoped(scope, || standings().of_all(ahead));
                settle();
                let ahead = ahead.map(|ahead| ahead.join().unwrap_or_else(|panic| resume_unwind(panic)));
                ahead.unwrap_or_default()
            })
        };
        reliance.note(noted);

        for slot in pending.freed {
            reliance.forget(slot);
            update.slots.push((slot, None));
        }
        in_order(&mut pending.standings);
        update.slots.reserve(pending.standings.len());
        let (mut known, mut standings) = (known.into_iter().peekable(), standings());
        for key in pending.standings {
            if let (Some(policy), Some(slot)) = (database.policy_with_key(key), verdicts.slots.get(key)) {
                while known.next_if(|(other, _)| *other < key).is_some() {}
                let known = known.next_if(|(other, _)| *other == key);
                let Way { standing, neighbour } = known.map_or_else(|| standings.of(policy), |(_, way)| way);
                reliance.sends_to(slot, neighbour);
                update.slots.push((slot, Some(standing)));
            }
        }
        reliance.note(standings.noted());
        in_order(&mut pending.owners);
        update.owners.reserve(pending.owners.len());
        let owners = pending
            .owners
            .into_iter()
            .filter_map(|key| Some((verdicts.slots.get(key)?, database.policy_with_key(key)?.index)));
        update.owners.extend(owners);
        update
    }

    /// The slot of a policy that is or was fast.
    #[must_use]
    pub fn slot(&self, database: &Database, policy: &PolicyId) -> Option<Slot> {
        self.verdicts.slots.get(database.key_of(policy)?)
    }

    /// The packet-offloaded outbound policies of the database that was compiled last, IPv4 first, ordered by
    /// identity. Looks at all of them.
    #[must_use]
    pub fn policies(&self, database: &Database) -> Vec<PolicyReport> {
        let reports = candidates(database).map(|(key, policy)| PolicyReport {
            id: policy.id.clone(),
            slot: self.verdicts.slots.get(key),
            state: self.state(database, key, policy),
        });
        let mut reports: Vec<_> = reports.collect();
        reports.sort_by(|one, other| {
            let order = |report: &PolicyReport| report.id.selector.family();
            order(one).cmp(&order(other)).then_with(|| one.id.cmp(&other.id))
        });
        reports
    }

    /// Looks at some policies: of those from `first` on, at the first `limit`, in no particular order.
    pub(crate) fn some_policies(&self, database: &Database, first: PolicyKey, limit: usize) -> Part {
        let mut policies = database.keyed_policies_from(first);
        let mut part = Part { reports: Vec::new(), software: 0, next: None };
        for (key, policy) in policies.by_ref().take(limit) {
            part.next = Some(PolicyKey(key.0 + 1));
            if is_candidate(policy) {
                let state = self.state(database, key, policy);
                let report =
                    PolicyReport { id: policy.id.clone(), slot: self.verdicts.slots.get(key), state };
                part.reports.push((report, policy.offload));
            } else {
                part.software += u64::from(policy.id.direction == Direction::Out);
            }
        }
        if policies.next().is_none() {
            part.next = None;
        }
        part
    }

    /// How much of a table of this compiler's capacity is in use, by what it is used for.
    #[must_use]
    pub fn room(&self) -> BTreeMap<&'static str, Room> {
        let Capacity { cells_v4, cells_v6, exceptions, slots, .. } = self.capacity;
        let room = |used, limit| Room { used, limit };
        BTreeMap::from([
            ("slots", room(self.verdicts.slots.len(), slots)),
            ("cells_v4", room(self.verdicts.v4.cells_in_use(), cells_v4)),
            ("cells_v6", room(self.verdicts.v6.cells_in_use(), cells_v6)),
            ("exceptions_v4", room(self.verdicts.v4.exceptions().len(), exceptions)),
            ("exceptions_v6", room(self.verdicts.v6.exceptions().len(), exceptions)),
        ])
    }

    /// The neighbours that policies with slots send to, or would if their addresses were known.
    pub(crate) fn neighbours(&self) -> &Neighbours {
        self.reliance.neighbours()
    }

    /// Whether the Ethernet address of a neighbour is known.
    pub(crate) fn knows(&self, neighbour: &(u32, IpAddr)) -> bool {
        self.paths.knows(neighbour)
    }

    /// The policy that has a slot. Looks through all slots.
    pub(crate) fn policy_of<'d>(&self, database: &'d Database, slot: Slot) -> Option<&'d PolicyId> {
        let key = self.verdicts.slots.owners().find(|key| self.verdicts.slots.get(*key) == Some(slot))?;
        database.policy_with_key(key).map(|policy| &policy.id)
    }

    /// The slot of a policy that was just removed, and is not compiled yet.
    pub(crate) fn slot_of_key(&self, key: PolicyKey) -> Option<Slot> {
        self.verdicts.slots.get(key)
    }

    /// Slots and states of the same policies, in no particular order.
    pub(crate) fn states(&self, database: &Database) -> impl Iterator<Item = (Option<Slot>, PolicyState)> {
        candidates(database)
            .map(|(key, policy)| (self.verdicts.slots.get(key), self.state(database, key, policy)))
    }

    /// How many policies are fast. Looks at all of them.
    #[must_use]
    pub fn fast_policies(&self, database: &Database) -> usize {
        self.states(database).filter(|(_, state)| *state == PolicyState::Fast).count()
    }

    fn state(&self, database: &Database, key: PolicyKey, policy: &Policy) -> PolicyState {
        if !database.is_current() {
            return PolicyState::Pass(PassReason::Disabled);
        }
        if exceptions::exception(policy).is_some() {
            return PolicyState::Pass(PassReason::Exception);
        }
        let verdicts = self.verdicts.family(policy.id.selector.family()).verdicts(policy);
        // Packets that match several policies which lead the same way are fast for the best of these.
        let leads_there = |holder: PolicyKey| {
            holder == key
                || database.policy_with_key(holder).is_some_and(|holder| same_way(holder, policy, None))
        };
        let is_own = |verdict: &Verdict| match verdict {
            Verdict::Fast { slot, .. } => self.verdicts.slots.holder(*slot).is_some_and(leads_there),
            Verdict::Pass(_) => false,
        };
        if verdicts.iter().any(is_own) {
            return match Standings::new(database, &self.paths).of(policy).standing {
                Ok(_) => PolicyState::Fast,
                Err(reason) => PolicyState::Pass(reason),
            };
        }
        PolicyState::Pass(match verdicts.first() {
            Some(Verdict::Pass(reason)) => *reason,
            Some(Verdict::Fast { .. }) => PassReason::Shadowed,
            None => PassReason::Capacity,
        })
    }
}

/// The packet-offloaded outbound policies.
fn candidates(database: &Database) -> impl Iterator<Item = (PolicyKey, &Policy)> {
    database.keyed_policies().filter(|(_, policy)| is_candidate(policy))
}

fn is_candidate(policy: &Policy) -> bool {
    policy.id.direction == Direction::Out && policy.is_packet_offloaded()
}

/// Each once, in order.
fn in_order(keys: &mut Vec<PolicyKey>) {
    keys.sort_unstable();
    keys.dedup();
}
