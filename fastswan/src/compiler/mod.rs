//! Which region of packet space is fast.
//!
//! The [`Compiler`] reads a [`Database`] and [`HostFacts`] and says what an
//! [`OffloadTable`](crate::OffloadTable) must hold. It is pure: no I/O, no clock, and the same input gives the
//! same output. All decisions about precedence and safety are made here:
//!
//! - `rule`: when the kernel's choice among policies is certain;
//! - `cells`: into which cells the policies split the plane of addresses;
//! - `path`: how a policy's packets leave;
//! - `facts`: which single addresses inside a cell are not to be fast;
//! - `fit`: what to leave out when a table is too small.
//!
//! Policies that ask for a protocol or for ports are not cells but [exceptions](Exception): packets that they
//! match pass, and what they do not match is not their business. Inbound policies do not take part, since the
//! kernel does not ask them about packets that it forwards.

#[cfg(any(test, fuzzing))]
mod brute_force;
mod cells;
mod facts;
mod fit;
#[cfg(any(test, fuzzing))]
mod model;
mod path;
#[cfg(test)]
mod properties;
mod rule;
mod slots;
#[cfg(test)]
mod stories;

#[cfg(fuzzing)]
#[doc(hidden)]
pub use self::brute_force::fuzz;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use self::{
    cells::{Plane, Region},
    facts::{AddressFacts, Probes},
    fit::fit,
    path::Paths,
    rule::{Matches, eligible},
    slots::Slots,
};
use crate::{
    database::Database,
    host::HostFacts,
    policy::{Action, Direction, Family, Policy, PolicyId},
    table::{Capacity, Cell, Exception, Fact, Forwarding, Side, Slot, TableUpdate, Verdict},
};

/// Compiles a database to a table.
///
/// Each call of [`compile`](Self::compile) looks at everything and returns what has changed since the call
/// before, so every update must reach the table. When a table is replaced by an empty one, start with a new
/// compiler.
#[derive(Debug)]
pub struct Compiler {
    capacity: Capacity,
    slots: Slots,
    compiled: Compiled,
    /// How each slot's packets leave. A policy that is not fast at the moment keeps its entry.
    forwardings: BTreeMap<Slot, Forwarding>,
}

/// What a table holds, and why.
#[derive(Debug, Default)]
struct Compiled {
    cells: BTreeMap<Cell, Verdict>,
    facts: BTreeMap<(Side, IpNet), Fact>,
    exceptions: Vec<Exception>,
    policies: Vec<PolicyReport>,
    highest_offloaded: HashMap<Family, u32>,
}

/// What became of a packet-offloaded outbound policy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PolicyReport {
    /// The policy.
    pub id: PolicyId,
    /// Its slot in the table, if it is or was fast.
    pub slot: Option<Slot>,
    /// Whether it is fast.
    pub state: PolicyState,
}

/// Whether packets of a policy are fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyState {
    /// They are; those of a part of its region may be another policy's or pass.
    Fast,
    /// They pass.
    Pass(PassReason),
}

/// A cell's outcome, before slots are known.
type Outcome = Result<Fast, PassReason>;

#[derive(Clone, Copy, Debug)]
struct Fast {
    /// Index of the policy.
    policy: usize,
    probes: Probes,
}

impl Compiler {
    /// A compiler for a table of this capacity that holds nothing yet.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            slots: Slots::default(),
            compiled: Compiled::default(),
            forwardings: BTreeMap::new(),
        }
    }

    /// Looks at everything and returns what has changed since the last call.
    ///
    /// Nothing of a database that is not [current](Database::is_current) is fast. What does not fit into the
    /// table passes; an update always fits. In it, removals come first, then the rest, longest prefixes first.
    pub fn compile(&mut self, database: &Database, host: &HostFacts) -> TableUpdate {
        let freed = self.slots.retain(|id| database.policy(id).is_some());
        let mut forwardings = self.forwardings.clone();
        for slot in &freed {
            forwardings.remove(slot);
        }
        let kept = forwardings.clone();

        let mut compiled = Compiled::default();
        let paths = Paths::new(host);
        for family in [Family::V4, Family::V6] {
            self.compile_family(family, database, host, &paths, &mut compiled, &mut forwardings);
        }

        let update = TableUpdate {
            cells: difference(&self.compiled.cells, &compiled.cells, |cell| {
                (cell.destination.prefix_len(), cell.source.prefix_len())
            }),
            facts: difference(&self.compiled.facts, &compiled.facts, |(_, prefix)| (prefix.prefix_len(), 0)),
            forwardings: freed
                .into_iter()
                .map(|slot| (slot, None))
                .chain(difference(&kept, &forwardings, |_| (0, 0)))
                .collect(),
            exceptions: (self.compiled.exceptions != compiled.exceptions)
                .then(|| compiled.exceptions.clone()),
        };
        self.compiled = compiled;
        self.forwardings = forwardings;
        update
    }

    /// The slot of a policy that is or was fast.
    #[must_use]
    pub fn slot(&self, policy: &PolicyId) -> Option<Slot> {
        self.slots.get(policy)
    }

    /// The packet-offloaded outbound policies at the last call, IPv4 first, ordered by identity.
    #[must_use]
    pub fn policies(&self) -> &[PolicyReport] {
        &self.compiled.policies
    }

    /// How many policies were fast at the last call.
    #[must_use]
    pub fn fast_policies(&self) -> usize {
        self.compiled.policies.iter().filter(|report| report.state == PolicyState::Fast).count()
    }

    /// The highest priority number of the packet-offloaded outbound policies of a family at the last call: a
    /// policy that matches besides an offloaded one keeps its packets from being fast unless it has this
    /// number or a higher one.
    #[must_use]
    pub fn highest_offloaded_priority(&self, family: Family) -> Option<u32> {
        self.compiled.highest_offloaded.get(&family).copied()
    }

    fn compile_family(
        &mut self,
        family: Family,
        database: &Database,
        host: &HostFacts,
        paths: &Paths<'_>,
        compiled: &mut Compiled,
        forwardings: &mut BTreeMap<Slot, Forwarding>,
    ) {
        let policies: Vec<&Policy> = database
            .policies()
            .filter(|policy| policy.id.direction != Direction::In && policy.id.selector.family() == family)
            .collect();
        let is_candidate =
            |policy: &Policy| policy.id.direction == Direction::Out && policy.is_packet_offloaded();
        let highest =
            policies.iter().filter(|policy| is_candidate(policy)).map(|policy| policy.priority).max();
        if let Some(highest) = highest {
            compiled.highest_offloaded.insert(family, highest);
        }
        if !database.is_current() {
            compiled.policies.extend(policies.iter().filter(|policy| is_candidate(policy)).map(|policy| {
                PolicyReport {
                    id: policy.id.clone(),
                    slot: self.slots.get(&policy.id),
                    state: PolicyState::Pass(PassReason::Disabled),
                }
            }));
            return;
        }

        let exceptions = self.exceptions(&policies);
        let is_widened =
            |policy: &Policy| exception(policy).is_some_and(|exception| !exceptions.contains(&exception));
        let is_region = |policy: &Policy| !policy.id.selector.looks_at_upper_layer() || is_widened(policy);
        let regions = policies
            .iter()
            .enumerate()
            .filter(|(_, policy)| is_region(policy))
            .map(|(index, policy)| (cell(policy), Matches::one(index, policy, is_widened(policy))));
        let plane = Plane::new(regions.collect());

        let standings: Vec<Result<Forwarding, PassReason>> = policies
            .iter()
            .map(|policy| {
                if is_widened(policy) { Err(PassReason::Capacity) } else { standing(policy, database, paths) }
            })
            .collect();
        let facts = AddressFacts::new(host, paths, family, plane.guards());
        let outcome = |region: &Region| {
            let policy = region.matches.ok_or(PassReason::Capacity)?.chosen(highest.unwrap_or(0))?;
            let probes = facts.admit(region, standings[policy]?.ifindex)?;
            Ok(Fast { policy, probes })
        };
        let mut cells: Vec<(Cell, Outcome)> =
            plane.cells(self.capacity.cells).iter().map(|region| (region.cell, outcome(region))).collect();

        let sides = self.fit_table(&mut cells, &facts);
        let mut fast_policies = BTreeSet::new();
        let mut fast_cells = Vec::new();
        for (cell, outcome) in cells {
            let fast = outcome.and_then(|Fast { policy, probes }| {
                let slot = self.slots.allocate(&policies[policy].id, self.capacity.slots);
                let slot = slot.ok_or(PassReason::Capacity)?;
                forwardings.insert(slot, standings[policy]?);
                fast_policies.insert(policy);
                fast_cells.push((cell, probes));
                Ok(Verdict::Fast { slot, probe_destination: probes.destination, probe_source: probes.source })
            });
            compiled.cells.insert(cell, fast.unwrap_or_else(Verdict::Pass));
        }
        for side in sides {
            let facts = facts.needed(side, fast_cells.iter().copied());
            compiled.facts.extend(facts.into_iter().map(|(prefix, fact)| ((side, prefix), fact)));
        }
        for (index, policy) in policies.iter().enumerate().filter(|(_, policy)| is_candidate(policy)) {
            let state = match compiled.cells.get(&cell(policy)) {
                _ if fast_policies.contains(&index) => PolicyState::Fast,
                _ if !is_region(policy) => PolicyState::Pass(PassReason::Exception),
                Some(Verdict::Pass(reason)) => PolicyState::Pass(*reason),
                Some(Verdict::Fast { .. }) => PolicyState::Pass(PassReason::Shadowed),
                None => PolicyState::Pass(PassReason::Capacity),
            };
            let slot = self.slots.get(&policy.id);
            compiled.policies.push(PolicyReport { id: policy.id.clone(), slot, state });
        }
        compiled.exceptions.extend(exceptions);
    }

    /// The exceptions that the table has room for: those with the widest regions, which would otherwise keep
    /// most from being fast.
    fn exceptions(&self, policies: &[&Policy]) -> BTreeSet<Exception> {
        let all: BTreeSet<Exception> = policies.iter().filter_map(|policy| exception(policy)).collect();
        let mut widest: Vec<Exception> = all.into_iter().collect();
        let length = |exception: &Exception| {
            u32::from(exception.cell.destination.prefix_len()) + u32::from(exception.cell.source.prefix_len())
        };
        widest.sort_by_key(length);
        widest.truncate(self.capacity.exceptions);
        widest.into_iter().collect()
    }

    /// Makes cells pass, or leaves them out, until they and the facts they need fit, and returns the sides that
    /// facts are kept for.
    fn fit_table(&self, cells: &mut Vec<(Cell, Outcome)>, facts: &AddressFacts) -> Vec<Side> {
        let room = self.capacity.cells.saturating_sub(cells.len()).max(self.capacity.cells / 2);
        let mut used = 0;
        let mut sides = Vec::new();
        for side in [Side::Destination, Side::Source] {
            let fast_cells = cells.iter().filter_map(|(cell, outcome)| Some((*cell, outcome.ok()?.probes)));
            let needed = facts.needed(side, fast_cells);
            let lengths: BTreeSet<u8> = needed.keys().map(IpNet::prefix_len).collect();
            if used + needed.len() <= room && lengths.len() <= self.capacity.fact_lengths {
                used += needed.len();
                sides.push(side);
            } else {
                for (_, outcome) in cells.iter_mut() {
                    if outcome.is_ok_and(|fast| fast.probes.on(side)) {
                        *outcome = Err(PassReason::Capacity);
                    }
                }
            }
        }
        fit(cells, self.capacity.cells - used, self.capacity.tuples, |outcome| {
            if outcome.is_ok() {
                *outcome = Err(PassReason::Capacity);
            }
        });
        sides
    }
}

/// How a policy's packets leave, or why they must not.
fn standing(policy: &Policy, database: &Database, paths: &Paths<'_>) -> Result<Forwarding, PassReason> {
    let template = eligible(policy)?;
    let Some(device) = policy.offload else { return Err(PassReason::NotOffloaded) };
    let default_policy = database.default_policy();
    if (default_policy.forward, default_policy.outbound) != (Action::Allow, Action::Allow) {
        return Err(PassReason::DefaultBlock);
    }
    let mut associations =
        database.live_sas(template, policy.id.selector.family(), policy.id.if_id, device.ifindex).peekable();
    if associations.peek().is_none() {
        return Err(PassReason::NoSa);
    }
    paths.forwarding(policy, device, template, associations).ok_or(PassReason::NoPath)
}

fn cell(policy: &Policy) -> Cell {
    let selector = &policy.id.selector;
    Cell { destination: selector.destination.trunc(), source: selector.source.trunc() }
}

fn exception(policy: &Policy) -> Option<Exception> {
    let selector = &policy.id.selector;
    selector.looks_at_upper_layer().then(|| Exception {
        cell: cell(policy),
        protocol: selector.protocol,
        source_port: selector.source_port,
        destination_port: selector.destination_port,
    })
}

/// What to write so that a table with the old values holds the new ones: removals, then the rest, longest
/// prefixes first.
fn difference<K: Copy + Ord, V: Copy + PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    lengths: impl Fn(&K) -> (u8, u8),
) -> Vec<(K, Option<V>)> {
    let removed = old.keys().filter(|key| !new.contains_key(key)).map(|key| (*key, None));
    let mut set: Vec<_> = new
        .iter()
        .filter(|(key, value)| old.get(key) != Some(value))
        .map(|(key, value)| (*key, Some(*value)))
        .collect();
    set.sort_by_key(|(key, _)| std::cmp::Reverse(lengths(key)));
    removed.chain(set).collect()
}
