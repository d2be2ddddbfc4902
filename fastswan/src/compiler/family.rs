//! The compiler's part for one address family.

use std::{cmp::Reverse, collections::BTreeMap, net::IpAddr};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::{
    broken::{self, BrokenRule},
    exceptions::{Exceptions, Treatment, exception},
    facts::AddressFacts,
    fit::fit,
    last::Last,
    plane::{Changed, Plane, State},
    prefix::{Address, Region},
    probed::Probed,
    rule::{Candidate, Choice, Terms, is_told, judge},
};
use crate::{
    database::{Database, PolicyKey},
    policy::{Direction, Family, Policy},
    table::{Capacity, Cell, Fact, Probes, Side, Slot, TableUpdate, Verdict},
};

/// What the policies of one family compile to.
#[derive(Debug)]
pub(super) struct FamilyCompiler<A> {
    family: Family,
    capacity: Capacity,
    plane: Plane<A>,
    exceptions: Exceptions,
    /// The database's highest priority number of packet-offloaded policies when verdicts were last asked for.
    highest: u32,
    broken: Option<BrokenRule>,
    probed: [Probed<Fact>; 2],
    guards: Probed<()>,
    /// What the program looks up has to be gone through from the start.
    restart: bool,
    /// The cells that the table has, if it cannot hold all.
    cramped: Option<BTreeMap<Cell, Verdict>>,
}

const SIDES: [Side; 2] = [Side::Destination, Side::Source];

impl<A: Address> FamilyCompiler<A> {
    pub(super) fn new(family: Family, capacity: &Capacity) -> Self {
        Self {
            family,
            capacity: *capacity,
            plane: Plane::new(capacity.cells(family)),
            exceptions: Exceptions::new(capacity),
            highest: 0,
            broken: None,
            probed: Default::default(),
            guards: Probed::default(),
            restart: false,
            cramped: None,
        }
    }

    /// Breaks a rule on purpose.
    #[cfg(feature = "broken-rules")]
    pub(super) fn set_broken(&mut self, rule: BrokenRule) {
        self.broken = Some(rule);
        if rule == BrokenRule::Descendants {
            self.plane.set_forgetful();
        }
    }

    /// Says that everything that is known about addresses may have changed.
    pub(super) fn facts_changed(&mut self) {
        self.restart = true;
        self.plane.touch_all();
    }

    /// Takes up that what is known about the addresses of a prefix is about to change.
    pub(super) fn forget_addresses(&mut self, prefix: IpNet, facts: AddressFacts<'_>) {
        if !self.restart {
            for (side, probed) in SIDES.into_iter().zip(&mut self.probed) {
                probed.forget(prefix, || facts.part(side, prefix), |inside| facts.about(side, inside));
            }
        }
    }

    /// Takes up that it has changed. `is_other` if that may make a difference for packets; `matters` says whether for those to
    /// or from a prefix inside.
    pub(super) fn learn_addresses(
        &mut self,
        prefix: IpNet,
        facts: AddressFacts<'_>,
        is_other: bool,
        matters: impl Fn(IpNet) -> bool,
    ) {
        if !self.restart {
            for (side, probed) in SIDES.into_iter().zip(&mut self.probed) {
                probed.learn(prefix, || facts.part(side, prefix), |inside| facts.about(side, inside));
            }
        }
        if is_other && let Some(prefix) = A::prefix(&prefix) {
            self.plane.touch_addresses(prefix, |inside| matters(inside.net()));
        }
    }

    /// How many cells are to be looked at.
    pub(super) fn touched(&self) -> usize {
        self.plane.touched()
    }

    /// Takes up a change of a policy, of whatever family.
    pub(super) fn replace(&mut self, key: PolicyKey, before: Option<&Policy>, now: Option<&Policy>) {
        let before = before.and_then(|policy| Placed::of(key, policy, self.broken));
        let now = now.and_then(|policy| Placed::of(key, policy, self.broken));
        if before == now {
            // What else may have changed decides about the verdicts of its cells.
            if let Some(placed) = now {
                self.plane.touch(placed.region);
            }
            return;
        }
        if let Some(placed) = before {
            self.remove(placed);
        }
        if let Some(placed) = now {
            self.insert(placed);
        }
    }

    /// Starts over with these policies of the family.
    pub(super) fn rebuild(&mut self, policies: Vec<(PolicyKey, &Policy)>) {
        let broken = self.broken;
        self.exceptions.restart();
        let mut regions = Vec::with_capacity(policies.len());
        for placed in policies.into_iter().filter_map(|(key, policy)| Placed::of(key, policy, broken)) {
            match placed.exception {
                None => regions.push((placed.region, placed.candidate)),
                Some(exception) => {
                    for treatment in self.exceptions.insert(exception, placed.candidate) {
                        // What was widened once stays so until policies are removed.
                        if let Treatment::Widen(cell, policy) = treatment {
                            regions.extend(Region::of(&cell).map(|region| (region, policy)));
                        }
                    }
                }
            }
        }
        self.plane.rebuild(regions);
    }

    /// Whether starting over might make more packets fast.
    pub(super) fn is_worth_rebuilding(&self) -> bool {
        self.plane.is_worth_rebuilding()
    }

    /// Says that the verdicts of a policy's cells may have changed.
    pub(super) fn touch(&mut self, policy: &Policy) {
        if let Some(region) = Region::of_policy(policy) {
            self.plane.touch(region);
        }
    }

    /// Brings the verdicts up to date. `slot` gives a policy its slot, or a reason to pass.
    pub(super) fn settle(
        &mut self,
        database: &Database,
        facts: AddressFacts<'_>,
        mut slot: impl FnMut(PolicyKey, &Policy) -> Result<(Slot, u32), PassReason>,
    ) {
        let highest = database.highest_offloaded_priority(self.family).unwrap_or(0);
        let terms = Terms { highest, order: database.order(), broken: self.broken };
        let old = Terms { highest: std::mem::replace(&mut self.highest, highest), ..terms };
        if highest != old.highest {
            // With a new order comes a new snapshot, after which every cell is looked at.
            self.plane.rule_changed(|state| {
                let choice = |terms| Some(state.matches()?.choice(terms));
                let new = choice(terms);
                new != choice(old) || new == Some(Ok(Choice::Among)) && state.depends_on_highest()
            });
        }
        let (mut destinations, mut sources) = <(Last<_, _>, Last<_, _>)>::default();
        let mut admit = |&Cell { destination, source }: &Cell, device| {
            let even = |side, prefix| move || facts.even(side, prefix);
            let destination = destinations.get_or_find(
                device,
                destination,
                even(Side::Destination, destination),
                || facts.admit_destination(destination, device),
            )?;
            let source =
                sources.get_or_find((), source, even(Side::Source, source), || facts.admit_source(source))?;
            Ok(Probes { destination, source, guards: false })
        };
        let choose = |state: &State| match state.matches().ok_or(PassReason::Capacity)?.choice(terms)? {
            Choice::IfTold(policy) if !is_told(policy, database, terms) => Err(PassReason::Shadowed),
            choice => Ok(choice),
        };
        let judge = |all: &[Candidate]| judge(all, database, terms);
        self.plane.settle(choose, judge, |region, chosen, is_guarded| {
            match chosen.and_then(|policy| verdict(region, policy, database, &mut slot, &mut admit)) {
                Ok((slot, probes)) => Verdict::Fast { slot, probes: Probes { guards: is_guarded, ..probes } },
                Err(reason) => Verdict::Pass(reason),
            }
        });
    }

    /// Adds what has changed to an update.
    pub(super) fn finish(&mut self, facts: AddressFacts<'_>, update: &mut TableUpdate) {
        let changes = self.plane.changes();
        self.follow_probes(&changes, facts);
        if self.cramped.is_none() && self.fits() {
            let start = update.cells.len();
            update.cells.extend(changes.into_iter().map(|change| (change.region.cell(), change.new)));
            put_in_order(&mut update.cells[start..]);
        } else {
            self.squeeze(&changes, facts, update);
        }
        self.finish_probes(update);
    }

    /// Empties the table; the next thing to do is to start over.
    pub(super) fn clear(&mut self, update: &mut TableUpdate) {
        self.plane.rebuild(Vec::new());
        let changes = self.plane.changes();
        let removed: Vec<_> = match self.cramped.take() {
            Some(cells) => cells.into_keys().map(|cell| (cell, None)).collect(),
            None => changes.into_iter().map(|change| (change.region.cell(), None)).collect(),
        };
        update.cells.extend(removed);
        self.plane.guard_changes();
        self.probed.iter_mut().for_each(Probed::restart);
        self.guards.restart();
        self.exceptions.restart();
        self.finish_probes(update);
    }

    fn insert(&mut self, placed: Placed<A>) {
        match placed.exception {
            None => self.plane.insert(placed.region, placed.candidate),
            Some(exception) => {
                let treatments = self.exceptions.insert(exception, placed.candidate);
                self.treat(treatments);
            }
        }
    }

    fn remove(&mut self, placed: Placed<A>) {
        match placed.exception {
            None => self.plane.remove(placed.region, placed.candidate.policy),
            Some(exception) => {
                let treatments = self.exceptions.remove(exception, placed.candidate);
                self.treat(treatments);
            }
        }
    }

    fn treat(&mut self, treatments: Vec<Treatment>) {
        for treatment in treatments {
            match treatment {
                Treatment::Widen(cell, policy) => {
                    if let Some(region) = Region::of(&cell) {
                        self.plane.insert(region, policy);
                    }
                }
                Treatment::Narrow(cell, policy) => {
                    if let Some(region) = Region::of(&cell) {
                        self.plane.remove(region, policy.policy);
                    }
                }
            }
        }
    }

    /// Keeps account of what the program looks up for fast cells.
    fn follow_probes(&mut self, changes: &[Changed<A>], facts: AddressFacts<'_>) {
        // With the guards that are there now; what is looked up from now on needs no others.
        for (source, is_there) in self.plane.guard_changes() {
            if is_there {
                self.guards.appear(source.net(), ());
            } else {
                self.guards.disappear(source.net());
            }
        }
        if self.restart {
            self.restart = false;
            self.probed.iter_mut().for_each(Probed::restart);
            self.guards.restart();
            let fast: Vec<_> =
                self.plane.cells().filter_map(|(region, state)| Some((region, state.verdict()?))).collect();
            for (region, verdict) in fast {
                self.begin(region, verdict, facts);
            }
            return;
        }
        for change in changes {
            if let Some(verdict) = change.new {
                self.begin(change.region, verdict, facts);
            }
            if let Some(verdict) = change.old {
                self.end(change.region, verdict, facts);
            }
        }
    }

    fn begin(&mut self, region: Region<A>, verdict: Verdict, facts: AddressFacts<'_>) {
        let Verdict::Fast { probes, .. } = verdict else { return };
        let cell = region.cell();
        for (side, probed) in SIDES.into_iter().zip(&mut self.probed) {
            if facts.probes(side, probes) {
                let prefix = on(side, &cell);
                probed.begin(prefix, || facts.about(side, prefix));
            }
        }
        if probes.guards {
            let plane = &self.plane;
            self.guards.begin(cell.source, || guards_inside(plane, region));
        }
    }

    fn end(&mut self, region: Region<A>, verdict: Verdict, facts: AddressFacts<'_>) {
        let Verdict::Fast { probes, .. } = verdict else { return };
        let cell = region.cell();
        for (side, probed) in SIDES.into_iter().zip(&mut self.probed) {
            if facts.probes(side, probes) {
                let prefix = on(side, &cell);
                probed.end(prefix, || facts.about(side, prefix));
            }
        }
        if probes.guards {
            let plane = &self.plane;
            self.guards.end(cell.source, || guards_inside(plane, region));
        }
    }

    /// What the table needs to hold all: cells, host facts and guards. Less if it cannot.
    pub(super) fn cells_in_use(&self) -> usize {
        let cells = self.cramped.as_ref().map_or(self.plane.len(), BTreeMap::len);
        cells + self.looked_up()
    }

    /// Host facts and guards.
    fn looked_up(&self) -> usize {
        self.probed.iter().map(Probed::len).sum::<usize>() + self.guards.len()
    }

    fn fits(&self) -> bool {
        self.plane.len() + self.looked_up() <= self.capacity.cells(self.family)
            && self.plane.tuples() <= self.capacity.tuples
            && self.probed.iter().all(|probed| probed.lengths() <= self.capacity.fact_lengths)
            && self.guards.lengths() <= self.capacity.guard_lengths
    }

    /// Leaves out what the table has no room for, and looks at everything for it.
    fn squeeze(&mut self, changes: &[Changed<A>], facts: AddressFacts<'_>, update: &mut TableUpdate) {
        let everything =
            self.plane.cells().filter_map(|(region, state)| Some((region.cell(), state.verdict()?)));
        let mut cells: Vec<(Cell, Verdict)> = everything.collect();
        let before = self.cramped.take().unwrap_or_else(|| {
            let mut before: BTreeMap<Cell, Verdict> = cells.iter().copied().collect();
            for Changed { region, old, .. } in changes {
                match old {
                    Some(old) => before.insert(region.cell(), *old),
                    None => before.remove(&region.cell()),
                };
            }
            before
        });
        let fits = self.fits();
        if !fits {
            self.leave_out(&mut cells, facts);
        }
        let after: BTreeMap<Cell, Verdict> = cells.into_iter().collect();
        let removed = before.keys().filter(|cell| !after.contains_key(cell)).map(|cell| (*cell, None));
        let set = after.iter().filter(|(cell, verdict)| before.get(cell) != Some(verdict));
        let set = set.map(|(cell, verdict)| (*cell, Some(*verdict)));
        let start = update.cells.len();
        update.cells.extend(removed.chain(set));
        put_in_order(&mut update.cells[start..]);
        if !fits {
            self.cramped = Some(after);
            // What is looked up for these cells is not what the changes of all cells add up to.
            self.restart = true;
        }
    }

    /// Makes cells pass, or leaves them out, until they and what they look up fit.
    fn leave_out(&mut self, cells: &mut Vec<(Cell, Verdict)>, facts: AddressFacts<'_>) {
        let pass = |verdict: &mut Verdict| {
            if matches!(verdict, Verdict::Fast { .. }) {
                *verdict = Verdict::Pass(PassReason::Capacity);
            }
        };
        let limit = self.capacity.cells(self.family);
        let room = limit.saturating_sub(cells.len()).max(limit / 2);
        let mut used = 0;
        for list in 0..3 {
            self.count_probes(cells, facts);
            let (needed, lengths, limit) = match list {
                2 => (self.guards.len(), self.guards.lengths(), self.capacity.guard_lengths),
                side => (self.probed[side].len(), self.probed[side].lengths(), self.capacity.fact_lengths),
            };
            if used + needed <= room && lengths <= limit {
                used += needed;
                continue;
            }
            for (_, verdict) in cells.iter_mut() {
                if let Verdict::Fast { probes, .. } = verdict
                    && match list {
                        2 => probes.guards,
                        side => facts.probes(SIDES[side], *probes),
                    }
                {
                    pass(verdict);
                }
            }
        }
        let is_fast = |verdict: &Verdict| matches!(verdict, Verdict::Fast { .. });
        fit(cells, limit - used, self.capacity.tuples, is_fast, pass);
        self.count_probes(cells, facts);
    }

    fn count_probes(&mut self, cells: &[(Cell, Verdict)], facts: AddressFacts<'_>) {
        self.probed.iter_mut().for_each(Probed::restart);
        self.guards.restart();
        for (cell, verdict) in cells {
            if let Some(region) = Region::of(cell) {
                self.begin(region, *verdict, facts);
            }
        }
    }

    fn finish_probes(&mut self, update: &mut TableUpdate) {
        for (side, probed) in SIDES.into_iter().zip(&mut self.probed) {
            let mut changes = probed.changes();
            changes.sort_by_key(|(prefix, fact)| (fact.is_some(), Reverse(prefix.prefix_len())));
            update.facts.extend(changes.into_iter().map(|(prefix, fact)| ((side, prefix), fact)));
        }
        let guards = self.guards.changes().into_iter();
        update.guards.extend(guards.map(|(source, guard)| (source, guard.is_some())));
        update.exceptions.extend(self.exceptions.changes());
    }
}

/// What is compiled, to look things up in.
pub(super) trait Compiled {
    /// The verdict of a policy's own cell, and of all cells inside it.
    fn verdicts(&self, policy: &Policy) -> Vec<Verdict>;
    /// The verdict for packets between two addresses.
    fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict>;
    /// Whether the table has a guard that is about an address.
    fn is_guarded(&self, source: IpAddr) -> bool;
    /// A check that is about every packet, if there is one.
    fn check_of_everything(&self) -> Option<PolicyKey>;
    fn exceptions(&self) -> &Exceptions;
}

impl<A: Address> Compiled for FamilyCompiler<A> {
    fn verdicts(&self, policy: &Policy) -> Vec<Verdict> {
        let Some(region) = Region::of_policy(policy) else { return Vec::new() };
        let in_table = |region: Region<A>| match &self.cramped {
            Some(cells) => cells.get(&region.cell()).copied(),
            None => self.plane.cell(region)?.verdict(),
        };
        let inside = self.plane.affected(region).into_iter().filter(|inside| *inside != region);
        std::iter::once(region).chain(inside).filter_map(in_table).collect()
    }

    fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict> {
        let packet = Cell { destination: destination.into(), source: source.into() };
        let Some(cells) = &self.cramped else { return self.plane.first(Region::of(&packet)?)?.verdict() };
        let holds = |cell: &&Cell| cell.destination.contains(&destination) && cell.source.contains(&source);
        let first = cells.keys().filter(holds).max_by_key(|cell| lengths(cell))?;
        cells.get(first).copied()
    }

    fn is_guarded(&self, source: IpAddr) -> bool {
        self.guards.is_about(source)
    }

    fn check_of_everything(&self) -> Option<PolicyKey> {
        let everything = self.family.everything();
        let everything = Region::of(&Cell { destination: everything, source: everything })?;
        self.plane.check_of(everything)
    }

    fn exceptions(&self) -> &Exceptions {
        &self.exceptions
    }
}

/// Where a policy takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Placed<A> {
    region: Region<A>,
    candidate: Candidate,
    exception: Option<crate::table::Exception>,
}

impl<A: Address> Placed<A> {
    /// `None` if a policy takes no part, or none in this family.
    fn of(key: PolicyKey, policy: &Policy, broken: Option<BrokenRule>) -> Option<Self> {
        if policy.id.direction == Direction::In || broken::overlooks(broken, policy) {
            return None;
        }
        Some(Self {
            region: Region::of_policy(policy)?,
            candidate: Candidate::of(key, policy, broken),
            exception: exception(policy),
        })
    }
}

/// The slot of a cell and what to look up for its packets, or why they pass.
fn verdict<A: Address>(
    region: Region<A>,
    key: PolicyKey,
    database: &Database,
    mut slot: impl FnMut(PolicyKey, &Policy) -> Result<(Slot, u32), PassReason>,
    mut admit: impl FnMut(&Cell, u32) -> Result<Probes, PassReason>,
) -> Result<(Slot, Probes), PassReason> {
    let policy = database.policy_with_key(key).ok_or(PassReason::NoPolicy)?;
    if exception(policy).is_some() {
        // A widened one, or it would not have a cell.
        return Err(PassReason::Capacity);
    }
    let (slot, device) = slot(key, policy)?;
    Ok((slot, admit(&region.cell(), device)?))
}

fn on(side: Side, cell: &Cell) -> IpNet {
    match side {
        Side::Destination => cell.destination,
        Side::Source => cell.source,
    }
}

fn guards_inside<A: Address>(plane: &Plane<A>, region: Region<A>) -> Vec<(IpNet, ())> {
    plane.guards_inside(region.source).map(|source| (source.net(), ())).collect()
}

/// Removals, then the rest, longest prefixes first.
fn put_in_order(cells: &mut [(Cell, Option<Verdict>)]) {
    cells.sort_by_key(|(cell, verdict)| (verdict.is_some(), Reverse(lengths(cell))));
}

fn lengths(cell: &Cell) -> (u8, u8) {
    (cell.destination.prefix_len(), cell.source.prefix_len())
}
