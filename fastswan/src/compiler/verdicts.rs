//! The verdicts of all cells, and whose slot each fast one has.

use std::collections::BTreeMap;

use fastswan_ebpf::PassReason;

use super::{
    facts::AddressFacts,
    family::{Compiled, FamilyCompiler},
    path::Paths,
    prefix::Halves,
    rule::eligible,
    slots::Slots,
};
use crate::{
    database::{Change, Database, PolicyKey},
    policy::{Family, Policy},
    table::{Capacity, Slot, TableUpdate},
};

#[derive(Debug)]
pub(super) struct Verdicts {
    /// How many slots there may be.
    limit: usize,
    pub(super) slots: Slots,
    pub(super) v4: FamilyCompiler<u32>,
    pub(super) v6: FamilyCompiler<Halves>,
    /// Whose slots are in use.
    database: Option<u64>,
}

/// What changes leave to be looked at again.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Policies whose packets may leave in another way.
    pub(super) standings: Vec<PolicyKey>,
    /// Policies that may have another slot or index.
    pub(super) owners: Vec<PolicyKey>,
    pub(super) freed: Vec<Slot>,
}

impl Verdicts {
    pub(super) fn new(capacity: &Capacity) -> Self {
        Self {
            limit: capacity.slots,
            slots: Slots::default(),
            v4: FamilyCompiler::new(Family::V4, capacity),
            v6: FamilyCompiler::new(Family::V6, capacity),
            database: None,
        }
    }

    pub(super) fn family(&self, family: Family) -> &dyn Compiled {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// Says that everything that is known about addresses may have changed.
    pub(super) fn facts_changed(&mut self) {
        self.v4.facts_changed();
        self.v6.facts_changed();
    }

    /// How many cells are to be looked at.
    pub(super) fn touched(&self) -> usize {
        self.v4.touched() + self.v6.touched()
    }

    /// Empties the table; the next thing to do is to start over.
    pub(super) fn clear(&mut self, update: &mut TableUpdate) {
        self.v4.clear(update);
        self.v6.clear(update);
    }

    /// Whether starting over might make more packets fast.
    pub(super) fn are_worth_rebuilding(&self) -> bool {
        self.v4.is_worth_rebuilding() || self.v6.is_worth_rebuilding()
    }

    /// Takes up changes one by one.
    pub(super) fn follow<'a>(
        &mut self,
        changes: impl Iterator<Item = &'a Change>,
        database: &Database,
        pending: &mut Pending,
    ) {
        // What was known about each policy: the first that is told. What it is now, the database tells.
        let mut before: BTreeMap<PolicyKey, Option<&Policy>> = BTreeMap::new();
        for change in changes {
            match change {
                Change::Policy { key, before: policy } => {
                    before.entry(*key).or_insert(policy.as_deref());
                }
                Change::Sa(request) => pending.standings.extend(database.policies_asking_for(*request)),
                Change::DefaultPolicy => pending.standings.extend(self.slots.owners()),
            }
        }
        for (key, before) in before {
            let now = database.policy_with_key(key);
            pending.freed.extend(self.slots.release(key, now.map(|_| database.generation(key))));
            pending.standings.push(key);
            pending.owners.push(key);
            self.v4.replace(key, before, now);
            self.v6.replace(key, before, now);
        }
    }

    /// Takes up everything.
    pub(super) fn rebuild(&mut self, database: &Database, pending: &mut Pending) {
        let is_same =
            self.database.replace(database.revision().database) == Some(database.revision().database);
        let owners: Vec<_> = self.slots.owners().collect();
        for key in owners {
            let exists = is_same && database.policy_with_key(key).is_some();
            pending.freed.extend(self.slots.release(key, exists.then(|| database.generation(key))));
        }
        pending.standings.extend(self.slots.owners());
        pending.owners.extend(self.slots.owners());
        let is_v4 = |(_, policy): &(PolicyKey, &Policy)| policy.id.selector.family() == Family::V4;
        let (v4, v6): (Vec<_>, Vec<_>) = database.keyed_policies().partition(is_v4);
        self.v4.rebuild(v4);
        self.v6.rebuild(v6);
    }

    /// Brings the verdicts up to date.
    pub(super) fn settle(&mut self, database: &Database, paths: &Paths, pending: &mut Pending) {
        loop {
            self.settle_cells(database, paths, pending);
            // A slot that was freed may be one that another policy waits for.
            let waiting = self.slots.next_waiting();
            if waiting.is_empty() {
                return;
            }
            for policy in waiting.into_iter().filter_map(|key| database.policy_with_key(key)) {
                self.v4.touch(policy);
                self.v6.touch(policy);
            }
        }
    }

    fn settle_cells(&mut self, database: &Database, paths: &Paths, pending: &mut Pending) {
        let (slots, limit) = (&mut self.slots, self.limit);
        let mut slot = |key, policy: &Policy| {
            eligible(policy)?;
            let device = policy.offload.ok_or(PassReason::NotOffloaded)?.ifindex;
            if let Some(slot) = slots.get(key) {
                return Ok((slot, device));
            }
            pending.standings.push(key);
            pending.owners.push(key);
            let slot = slots.allocate(key, database.generation(key), limit).ok_or(PassReason::Capacity)?;
            Ok((slot, device))
        };
        self.v4.settle(database, AddressFacts::new(paths, Family::V4), &mut slot);
        self.v6.settle(database, AddressFacts::new(paths, Family::V6), &mut slot);
    }

    /// Adds what has changed to an update.
    pub(super) fn finish(&mut self, paths: &Paths, update: &mut TableUpdate) {
        self.v4.finish(AddressFacts::new(paths, Family::V4), update);
        self.v6.finish(AddressFacts::new(paths, Family::V6), update);
    }
}
