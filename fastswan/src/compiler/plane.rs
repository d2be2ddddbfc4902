//! Which cells there are, and which policies match each.
//!
//! Prefixes nest or are disjoint, so the policies of a family split the plane of (destination, source) into
//! regions. A destination holds the sources of its own policies, and of the policies of the destinations that
//! cover it those sources that lie inside one of its own. The first cell that contains a packet, in the order
//! longest destination, then longest source, is then one whose policies are exactly the packet's:
//!
//! - A policy whose destination is longer than the cell's would itself have given an earlier cell.
//! - A policy whose source is longer than the cell's is either of the same destination, or of one that covers
//!   it and then inside an own source; either way its source would have given an earlier cell.
//!
//! Forward and sub policies only ever make packets pass. On a gateway whose local network covers its peers'
//! networks there is one from each peer to the local network; spread over the cells of every other peer,
//! a thousand peers would give a million cells. So they are not spread: they *guard* the cells of the
//! destinations inside theirs, and the source of a guarded cell's packets is looked up. The same is done with
//! a policy that would be spread over more cells than there is room for.
//!
//! A change costs what it touches: the cells inside the region of the policy, found by walking the cells in
//! both orders at once until the shorter walk ends, and for each a lookup per pair of prefix lengths that
//! policies have. A policy whose region nothing is inside of and that is inside of nothing touches one cell.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    iter,
};

use fastswan_ebpf::PassReason;

use super::{
    counts::Counts,
    prefix::{Address, Prefix, Region},
    rule::{Candidate, Choice, Judgement, Matches, Role},
};
use crate::{database::PolicyKey, table::Verdict};

/// Up to this many cells are searched for one by one; for more, it is faster to go through all of a range.
const FEW: usize = 256;

/// The cells of one family.
#[derive(Debug)]
pub(super) struct Plane<A> {
    cells: BTreeMap<Region<A>, State>,
    /// The same, by source, then destination.
    by_source: BTreeSet<(Prefix<A>, Prefix<A>)>,
    /// The policies of a region beyond its first.
    more: BTreeMap<Region<A>, Vec<Candidate>>,
    /// Regions whose sources are taken over by destinations inside theirs.
    spreading: BTreeSet<Region<A>>,
    /// Regions that guard.
    guards: BTreeSet<Region<A>>,
    /// Their sources.
    guard_sources: Counts<Prefix<A>>,
    /// Those that came or went since somebody asked.
    guard_changes: BTreeSet<Prefix<A>>,
    guard_destination_lengths: Counts<u8>,
    /// Pairs of prefix lengths of regions that have policies.
    own_tuples: Counts<(u8, u8)>,
    own_regions: usize,
    /// Pairs of prefix lengths of all cells.
    tuples: Counts<(u8, u8)>,
    source_lengths: Counts<u8>,
    /// How many cells there may be, unless regions that have policies are more.
    limit: usize,
    /// How many regions had policies when something was not spread for want of room.
    refused: Option<usize>,
    /// A removal leaves what lies inside the region as it was; see [`BrokenRule::Descendants`].
    ///
    /// [`BrokenRule::Descendants`]: super::broken::BrokenRule::Descendants
    forgetful: bool,
    /// Cells that may need another verdict.
    dirty: Vec<Region<A>>,
    /// The cells that got another verdict, in the order in which they did.
    settled: Vec<Changed<A>>,
    /// Cells that the table has and that were removed here.
    gone: BTreeMap<Region<A>, Verdict>,
}

/// What is known about a cell.
#[derive(Debug)]
pub(super) struct State {
    /// The first policy for exactly this region.
    own: Option<Candidate>,
    spread: Spread,
    /// There was no room for the sources inside it that other destinations' policies have: its packets pass.
    closed: bool,
    /// When each of its policies was looked at, the answer depended on the highest priority number.
    depends_on_highest: bool,
    /// The policies that match all of it.
    matches: Matches,
    /// What the table says, or will say after the next change of it.
    verdict: Option<Verdict>,
}

/// What a region's policies do to the cells of the destinations inside theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spread {
    /// There are no policies.
    No,
    /// There are cells for their source where it lies inside an own one.
    Cells,
    /// They guard.
    Guard,
}

/// A cell whose verdict has changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changed<A> {
    pub(super) region: Region<A>,
    pub(super) old: Option<Verdict>,
    pub(super) new: Option<Verdict>,
}

impl State {
    /// What the rule says about the policies that match all of the cell; `None` if its packets cannot be told
    /// apart.
    pub(super) fn matches(&self) -> Option<Matches> {
        (!self.closed).then_some(self.matches)
    }

    /// Whether another highest priority number may change what a look at each of its policies says.
    pub(super) fn depends_on_highest(&self) -> bool {
        self.depends_on_highest
    }

    pub(super) fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }
}

impl<A: Address> Plane<A> {
    /// A plane without policies. It never has more than `limit` cells, or than regions that have policies.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            cells: BTreeMap::new(),
            by_source: BTreeSet::new(),
            more: BTreeMap::new(),
            spreading: BTreeSet::new(),
            guards: BTreeSet::new(),
            guard_sources: Counts::default(),
            guard_changes: BTreeSet::new(),
            guard_destination_lengths: Counts::default(),
            own_tuples: Counts::default(),
            own_regions: 0,
            tuples: Counts::default(),
            source_lengths: Counts::default(),
            limit,
            refused: None,
            forgetful: false,
            dirty: Vec::new(),
            settled: Vec::new(),
            gone: BTreeMap::new(),
        }
    }

    /// Makes it the plane of these policies, at once. What the table says is remembered, and all verdicts are asked for.
    pub(super) fn rebuild(&mut self, mut policies: Vec<(Region<A>, Candidate)>) {
        let mut new = Self { forgetful: self.forgetful, ..Self::new(self.limit) };
        new.gone = std::mem::take(&mut self.gone);
        new.gone.extend(
            std::mem::take(&mut self.cells)
                .into_iter()
                .filter_map(|(region, state)| Some((region, state.verdict?))),
        );
        new.guard_changes = std::mem::take(&mut self.guard_changes);
        self.guard_sources.iter().for_each(|source| new.guard_came_or_went(source));

        policies.sort_by_key(|(region, _)| *region);
        let mut regions: Vec<(Region<A>, State)> = Vec::with_capacity(policies.len());
        for (region, policy) in policies {
            if regions.last().is_some_and(|(last, _)| *last == region) {
                new.more.entry(region).or_default().push(policy);
            } else {
                let verdict = new.gone.remove(&region);
                regions.push((region, State::new(Some(policy), verdict)));
            }
        }
        new.own_regions = regions.len();
        let tuples = || regions.iter().map(|(region, _)| region.tuple());
        new.own_tuples.add_all(tuples());
        new.tuples = new.own_tuples.clone();
        new.source_lengths.add_all(tuples().map(|(_, source)| source));
        new.dirty = regions.iter().map(|(region, _)| *region).collect();
        new.by_source = regions.iter().map(|(region, _)| (region.source, region.destination)).collect();
        let shortest = new.source_lengths.iter().next();
        let (mut alone, mut guards, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for (region, state) in &mut regions {
            match new.wanted_spread(*region, state) {
                Spread::Guard => {
                    state.spread = Spread::Guard;
                    guards.push(*region);
                }
                // Nothing has a source that this one's lies inside of.
                Spread::Cells if Some(region.source.length()) == shortest => {
                    state.spread = Spread::Cells;
                    alone.push(*region);
                }
                _ => others.push(*region),
            }
        }
        new.spreading = alone.into_iter().collect();
        new.guard_all(guards);
        // Both collections are made of all their entries at once, which fills their nodes.
        new.cells = regions.into_iter().collect();
        let matches = new.cells.iter().map(|(region, state)| new.matches(*region, state));
        let matches: Vec<Matches> = matches.collect();
        for (state, matches) in new.cells.values_mut().zip(matches) {
            state.matches = matches;
        }
        for region in others {
            new.respread(region);
        }
        *self = new;
    }

    #[cfg(feature = "broken-rules")]
    pub(super) fn set_forgetful(&mut self) {
        self.forgetful = true;
    }

    /// Adds a policy.
    pub(super) fn insert(&mut self, region: Region<A>, policy: Candidate) {
        let (is_there, is_own) =
            self.cells.get(&region).map_or((false, false), |state| (true, state.own.is_some()));
        let affected = self.affected(region);
        if affected.len() > FEW {
            for (_, state) in self.cells.range_mut(whole(region)).filter(|(cell, _)| region.contains(**cell))
            {
                state.matches = state.matches.and(Matches::of(policy));
            }
        } else {
            for affected in &affected {
                if let Some(state) = self.cells.get_mut(affected) {
                    state.matches = state.matches.and(Matches::of(policy));
                }
            }
        }
        self.dirty.extend(affected);
        if is_own {
            self.more.entry(region).or_default().push(policy);
        } else {
            self.own_tuples.add(region.tuple());
            self.own_regions += 1;
            if let Some(state) = self.cells.get_mut(&region) {
                state.own = Some(policy);
            }
            if !is_there {
                self.create(region, Some(policy));
            }
            self.adopt(region);
        }
        self.respread(region);
    }

    /// Removes a policy.
    pub(super) fn remove(&mut self, region: Region<A>, policy: PolicyKey) {
        let Some(state) = self.cells.get_mut(&region).filter(|state| state.own.is_some()) else { return };
        let more = self.more.entry(region).or_default();
        if state.own.is_some_and(|own| own.policy == policy) {
            state.own = more.pop();
        } else {
            more.retain(|other| other.policy != policy);
        }
        let is_own = state.own.is_some();
        if more.is_empty() {
            self.more.remove(&region);
        }
        if !is_own {
            state.closed = false;
            self.own_regions -= 1;
            self.own_tuples.remove(region.tuple());
        }
        for affected in if self.forgetful { vec![region] } else { self.affected(region) } {
            self.match_anew(affected);
            self.dirty.push(affected);
        }
        self.respread(region);
        if !is_own && !self.forgetful {
            let adopted = self.cells.range(sources_inside(region)).map(|(adopted, _)| *adopted);
            let adopted: Vec<_> = adopted.collect();
            self.drop_unjustified(adopted);
        }
    }

    /// Says that the rule tells differently of some policies that match a cell. Looks at every cell.
    pub(super) fn rule_changed(&mut self, differs: impl Fn(&State) -> bool) {
        let changed = self.cells.iter().filter(|(_, state)| differs(state));
        self.dirty.extend(changed.map(|(region, _)| *region));
    }

    /// Says that cells inside a region may need another verdict.
    pub(super) fn touch(&mut self, region: Region<A>) {
        let affected = self.affected(region);
        self.dirty.extend(affected);
    }

    /// Says that cells whose destination or source has addresses of a prefix may need another verdict; those of a prefix inside
    /// it only if that one `matters`.
    pub(super) fn touch_addresses(&mut self, prefix: Prefix<A>, matters: impl Fn(Prefix<A>) -> bool) {
        if prefix.length() == 0 {
            // In order, and each cell once.
            let mut last = None;
            let mut matters_at_source = |source| match last {
                Some((same, matters)) if same == source => matters,
                _ => {
                    let found = matters(source);
                    last = Some((source, found));
                    found
                }
            };
            let cells = self
                .cells
                .keys()
                .filter(|Region { destination, source }| matters(*destination) || matters_at_source(*source));
            self.dirty.extend(cells);
            return;
        }
        let is_meant = |own: Prefix<A>| !prefix.contains(own) || matters(own);
        let everything = prefix.shortened(0);
        let all = |destination: Prefix<A>, last| {
            Region { destination, source: everything }..=Region {
                destination: last,
                source: everything.last(),
            }
        };
        let (shortest, longest) = ((0, 0), (prefix.length().saturating_sub(1), u8::MAX));
        let mut lengths: Vec<u8> = self.tuples.range(shortest..=longest).map(|(length, _)| length).collect();
        lengths.dedup();
        lengths.retain(|length| *length < prefix.length());
        let covering =
            lengths.into_iter().map(|length| prefix.shortened(length)).map(|other| all(other, other));
        let by_destination = covering.chain([all(prefix, prefix.last())]);
        for range in by_destination {
            let cells = self.cells.range(range).map(|(region, _)| *region);
            self.dirty.extend(cells.filter(|region| is_meant(region.destination)));
        }
        let all = |source: Prefix<A>, last| (source, everything)..=(last, everything.last());
        let lengths =
            self.source_lengths.range(0..=prefix.length()).filter(|length| *length < prefix.length());
        let covering = lengths.map(|length| prefix.shortened(length)).map(|other| all(other, other));
        for range in covering.chain([all(prefix, prefix.last())]) {
            let cells = self.by_source.range(range).filter(|(source, _)| is_meant(*source));
            self.dirty.extend(
                cells.map(|(source, destination)| Region { destination: *destination, source: *source }),
            );
        }
    }

    /// How many cells may need another verdict; some of them may be counted twice.
    pub(super) fn touched(&self) -> usize {
        self.dirty.len()
    }

    /// Says that every cell may need another verdict.
    pub(super) fn touch_all(&mut self) {
        self.dirty.extend(self.cells.keys());
    }

    /// Asks for the verdicts of cells that may need another: `choose` says which policy the kernel chooses, as far as the
    /// sum of them tells, `judge` looks at each where it does not, and `verdict` says what follows.
    pub(super) fn settle(
        &mut self,
        choose: impl Fn(&State) -> Result<Choice, PassReason>,
        judge: impl Fn(&[Candidate]) -> Judgement,
        mut verdict: impl FnMut(Region<A>, Result<PolicyKey, PassReason>, bool) -> Verdict,
    ) {
        let mut dirty = std::mem::take(&mut self.dirty);
        let mut cells = std::mem::take(&mut self.cells);
        let mut settled = std::mem::take(&mut self.settled);
        settled.reserve(dirty.len().min(cells.len()));
        let mut judged = Vec::new();
        let mut ask = |region, state: &mut State| {
            let chosen = match choose(state) {
                Ok(Choice::Certain(policy) | Choice::IfTold(policy)) => Ok(policy),
                Ok(Choice::Among) => return judged.push(region),
                Err(reason) => Err(reason),
            };
            let new = verdict(region, chosen, self.is_guarded(region));
            settled.extend(state.set_verdict(region, new));
        };
        if dirty.len() >= cells.len() {
            // Most of them, if not all. Asking for one too many does no harm, and saves a search for each.
            for (region, state) in &mut cells {
                ask(*region, state);
            }
        } else {
            dirty.sort_unstable();
            dirty.dedup();
            for region in dirty {
                if let Some(state) = cells.get_mut(&region) {
                    ask(region, state);
                }
            }
        }
        self.cells = cells;
        let mut candidates = Vec::new();
        for region in judged {
            let Some(state) = self.cells.get(&region) else { continue };
            candidates.clear();
            self.each_match(region, state, |candidate| candidates.push(candidate));
            let Judgement { choice, depends_on_highest } = judge(&candidates);
            let new = verdict(region, choice, self.is_guarded(region));
            if let Some(state) = self.cells.get_mut(&region) {
                state.depends_on_highest = depends_on_highest;
                settled.extend(state.set_verdict(region, new));
            }
        }
        self.settled = settled;
    }

    /// The cells whose verdicts have changed since the last call.
    pub(super) fn changes(&mut self) -> Vec<Changed<A>> {
        let mut changes = std::mem::take(&mut self.settled);
        // The sort keeps those of one cell in order.
        changes.sort_by_key(|change| change.region);
        changes.dedup_by(|later, first| {
            let is_same = later.region == first.region;
            if is_same {
                first.new = later.new;
            }
            is_same
        });
        changes.retain(|change| change.old != change.new);
        let gone = std::mem::take(&mut self.gone).into_iter();
        changes.extend(gone.map(|(region, old)| Changed { region, old: Some(old), new: None }));
        changes
    }

    /// Sources of guards that came or went since the last call, each with whether it is there.
    pub(super) fn guard_changes(&mut self) -> Vec<(Prefix<A>, bool)> {
        std::mem::take(&mut self.guard_changes)
            .into_iter()
            .map(|source| (source, self.guard_sources.contains(source)))
            .collect()
    }

    /// The sources of guards inside a prefix.
    pub(super) fn guards_inside(&self, source: Prefix<A>) -> impl Iterator<Item = Prefix<A>> {
        self.guard_sources.range(source.inside())
    }

    /// All cells in order.
    pub(super) fn cells(&self) -> impl Iterator<Item = (Region<A>, &State)> {
        self.cells.iter().map(|(region, state)| (*region, state))
    }

    pub(super) fn cell(&self, region: Region<A>) -> Option<&State> {
        self.cells.get(&region)
    }

    /// A check that is about exactly a region, and all of its packets.
    pub(super) fn check_of(&self, region: Region<A>) -> Option<PolicyKey> {
        let more = self.more.get(&region).into_iter().flatten();
        let mut own = self.cells.get(&region)?.own.iter().chain(more);
        own.find(|policy| policy.role == Role::Check && !policy.widened).map(|policy| policy.policy)
    }

    /// The first cell that contains a region.
    pub(super) fn first(&self, region: Region<A>) -> Option<&State> {
        self.tuples.iter().rev().find_map(|(destination, source)| {
            let (whole_destination, whole_source) = region.tuple();
            (destination <= whole_destination && source <= whole_source).then(|| {
                self.cells.get(&Region {
                    destination: region.destination.shortened(destination),
                    source: region.source.shortened(source),
                })
            })?
        })
    }

    /// How many cells there are.
    pub(super) fn len(&self) -> usize {
        self.cells.len()
    }

    /// How many pairs of prefix lengths they have.
    pub(super) fn tuples(&self) -> usize {
        self.tuples.len()
    }

    /// Whether a plane made anew might spread what this one had no room for.
    pub(super) fn is_worth_rebuilding(&self) -> bool {
        self.refused.is_some_and(|regions| self.own_regions < regions / 2)
    }

    /// The cells inside a region.
    pub(super) fn affected(&self, region: Region<A>) -> Vec<Region<A>> {
        let everything = region.source.shortened(0);
        let mut by_destination = self.cells.range(whole(region));
        let first = (region.source, region.destination.shortened(0));
        let mut by_source = self.by_source.range(first..=(region.source.last(), everything.last()));
        let (mut found, mut also_found) = (Vec::new(), Vec::new());
        loop {
            match by_destination.next() {
                None => return found,
                Some((cell, _)) if region.contains(*cell) => found.push(*cell),
                Some(_) => {}
            }
            match by_source.next() {
                None => return also_found,
                Some(&(source, destination)) => {
                    let cell = Region { destination, source };
                    if region.contains(cell) {
                        also_found.push(cell);
                    }
                }
            }
        }
    }

    fn match_anew(&mut self, region: Region<A>) {
        let matches = self.cells.get(&region).map(|state| self.matches(region, state));
        if let (Some(state), Some(matches)) = (self.cells.get_mut(&region), matches) {
            state.matches = matches;
        }
    }

    /// The policies that match every packet of a cell, in sum.
    fn matches(&self, region: Region<A>, state: &State) -> Matches {
        let mut matches = Matches::default();
        self.each_match(region, state, |candidate| matches = matches.and(Matches::of(candidate)));
        matches
    }

    /// The policies that match every packet of a cell.
    fn each_match(&self, region: Region<A>, state: &State, mut each: impl FnMut(Candidate)) {
        for (covering, state) in self.own_covering(region).chain(iter::once((region, state))) {
            state.own.into_iter().for_each(&mut each);
            if !self.more.is_empty()
                && let Some(more) = self.more.get(&covering)
            {
                more.iter().copied().for_each(&mut each);
            }
        }
    }

    /// The other regions that have policies and contain a region.
    fn own_covering(&self, region: Region<A>) -> impl Iterator<Item = (Region<A>, &State)> {
        let (destination, source) = region.tuple();
        self.own_tuples
            .range((0, 0)..=(destination, source))
            .filter(move |tuple| tuple.1 <= source && *tuple != (destination, source))
            .filter_map(move |(destination, source)| {
                let covering = Region {
                    destination: region.destination.shortened(destination),
                    source: region.source.shortened(source),
                };
                let state = self.cells.get(&covering)?;
                state.own.is_some().then_some((covering, state))
            })
    }

    /// Whether packets of a cell must have their source looked up among the guards.
    fn is_guarded(&self, region: Region<A>) -> bool {
        let mut lengths = self.guard_destination_lengths.range(0..=region.destination.length());
        lengths.any(|length| {
            length < region.destination.length()
                && self.is_guarded_by(region.destination.shortened(length), region.source)
        })
    }

    /// Whether a guard of this destination has a source inside this one.
    fn is_guarded_by(&self, destination: Prefix<A>, source: Prefix<A>) -> bool {
        self.guards.range(sources_inside(Region { destination, source })).next().is_some()
    }

    /// Adds what the policies for a region do to destinations inside, as they are now, and undoes what they did.
    fn respread(&mut self, region: Region<A>) {
        let Some(state) = self.cells.get(&region) else { return };
        let was = state.spread;
        let wanted = self.wanted_spread(region, state);
        if was == wanted {
            return;
        }
        let heirs = match wanted {
            Spread::Cells => self.within_limit(self.heirs(region)),
            Spread::No | Spread::Guard => Some(BTreeSet::new()),
        };
        let now = if heirs.is_some() { wanted } else { Spread::Guard };
        if heirs.is_none() {
            self.refused = Some(self.own_regions);
        }
        if let Some(state) = self.cells.get_mut(&region) {
            state.spread = now;
        }
        if was == now {
            return;
        }
        for cell in heirs.into_iter().flatten() {
            self.create(cell, None);
        }
        match now {
            Spread::Cells => drop(self.spreading.insert(region)),
            Spread::Guard => self.guard(region),
            Spread::No => {}
        }
        if was == Spread::Cells {
            self.spreading.remove(&region);
        }
        match was {
            Spread::Guard => self.unguard(region),
            Spread::Cells if !self.forgetful => {
                let inside = self.by_source.range(destinations_inside(region));
                let inside = inside.map(|&(source, destination)| Region { destination, source }).collect();
                self.drop_unjustified(inside);
            }
            Spread::No | Spread::Cells => {}
        }
    }

    /// What a region's policies are to do to destinations inside, if there is room.
    fn wanted_spread(&self, region: Region<A>, state: &State) -> Spread {
        let more = self.more.get(&region).map_or(&[][..], Vec::as_slice);
        let is_check = |policy: &Candidate| policy.role == Role::Check;
        match state.own {
            None => Spread::No,
            Some(own) if is_check(&own) && more.iter().all(is_check) => Spread::Guard,
            Some(_) => Spread::Cells,
        }
    }

    /// The cells that a region's source needs in the destinations inside its own.
    fn heirs(&self, region: Region<A>) -> impl Iterator<Item = Region<A>> {
        let shorter = self.source_lengths.iter().filter(move |length| *length < region.source.length());
        let covering =
            shorter.map(move |length| Region { source: region.source.shortened(length), ..region });
        let inside = covering.flat_map(|covering| self.by_source.range(destinations_inside(covering)));
        inside.filter_map(move |&(source, destination)| {
            let cell = Region { destination, source: region.source };
            let own = self.cells.get(&Region { destination, source })?;
            let is_heir = destination != region.destination && own.own.is_some() && !own.closed;
            (is_heir && !self.cells.contains_key(&cell)).then_some(cell)
        })
    }

    /// Gives a region that has just got policies the sources inside its own that covering destinations have.
    fn adopt(&mut self, region: Region<A>) {
        let lengths = self.own_destination_lengths(region.destination.length());
        let covering =
            lengths.map(|length| Region { destination: region.destination.shortened(length), ..region });
        let spreading = covering.flat_map(|covering| self.spreading.range(sources_inside(covering)));
        let adopted = spreading.map(|other| Region { destination: region.destination, source: other.source });
        if let Some(cells) = self.within_limit(adopted.filter(|cell| !self.cells.contains_key(cell))) {
            for cell in cells {
                self.create(cell, None);
            }
            return;
        }
        self.refused = Some(self.own_regions);
        if let Some(state) = self.cells.get_mut(&region) {
            state.closed = true;
        }
    }

    /// Lengths of destinations of policies that are shorter than this.
    fn own_destination_lengths(&self, shorter_than: u8) -> impl Iterator<Item = u8> {
        let mut last = None;
        let lengths = self.own_tuples.iter().map(|(destination, _)| destination);
        lengths
            .take_while(move |length| *length < shorter_than)
            .filter(move |length| last.replace(*length) != Some(*length))
    }

    /// These cells, if there is room for them.
    fn within_limit(&self, cells: impl Iterator<Item = Region<A>>) -> Option<BTreeSet<Region<A>>> {
        let room = self.limit.saturating_sub(self.cells.len());
        let mut within = BTreeSet::new();
        for cell in cells {
            within.insert(cell);
            if within.len() > room {
                return None;
            }
        }
        Some(within)
    }

    fn create(&mut self, region: Region<A>, own: Option<Candidate>) {
        let btree_map::Entry::Vacant(entry) = self.cells.entry(region) else { return };
        entry.insert(State::new(own, self.gone.remove(&region)));
        self.match_anew(region);
        self.by_source.insert((region.source, region.destination));
        self.count(region);
        self.dirty.push(region);
    }

    fn count(&mut self, region: Region<A>) {
        self.tuples.add(region.tuple());
        self.source_lengths.add(region.source.length());
    }

    /// Removes those cells that are there for no policy.
    fn drop_unjustified(&mut self, cells: Vec<Region<A>>) {
        for region in cells {
            if self.is_justified(region) {
                continue;
            }
            let Some(state) = self.cells.remove(&region) else { continue };
            if let Some(verdict) = state.verdict {
                self.gone.insert(region, verdict);
            }
            self.by_source.remove(&(region.source, region.destination));
            self.tuples.remove(region.tuple());
            self.source_lengths.remove(region.source.length());
        }
    }

    fn is_justified(&self, region: Region<A>) -> bool {
        if self.cells.get(&region).is_some_and(|state| state.own.is_some()) {
            return true;
        }
        let (mut has_spread, mut has_own_source) = (false, false);
        for (covering, state) in self.own_covering(region) {
            has_spread |= covering.source == region.source && state.spread == Spread::Cells;
            has_own_source |= covering.destination == region.destination && !state.closed;
        }
        has_spread && has_own_source
    }

    /// Has all of these guard, where none does so far and all cells are touched anyway.
    fn guard_all(&mut self, guards: Vec<Region<A>>) {
        self.guard_destination_lengths.add_all(guards.iter().map(|region| region.destination.length()));
        let mut sources: Vec<_> = guards.iter().map(|region| region.source).collect();
        sources.sort_unstable();
        self.guard_sources.add_all(sources);
        let came = self.guard_sources.iter().collect();
        // Those that went before and came now are no change.
        self.guard_changes = &self.guard_changes ^ &came;
        self.guards = guards.into_iter().collect();
    }

    fn guard(&mut self, region: Region<A>) {
        self.touch_guarded(region);
        self.guards.insert(region);
        self.guard_destination_lengths.add(region.destination.length());
        if self.guard_sources.add(region.source) {
            self.guard_came_or_went(region.source);
        }
    }

    fn unguard(&mut self, region: Region<A>) {
        self.guards.remove(&region);
        self.guard_destination_lengths.remove(region.destination.length());
        if self.guard_sources.remove(region.source) {
            self.guard_came_or_went(region.source);
        }
        self.touch_guarded(region);
    }

    fn guard_came_or_went(&mut self, source: Prefix<A>) {
        // Both, one after the other, is no change.
        if !self.guard_changes.remove(&source) {
            self.guard_changes.insert(source);
        }
    }

    /// Touches the cells that a guard, which is not there, would be the only one of its destination to guard.
    fn touch_guarded(&mut self, region: Region<A>) {
        let lengths = self.source_lengths.iter().filter(|length| *length <= region.source.length());
        let covering = lengths.map(|length| Region { source: region.source.shortened(length), ..region });
        let alone = covering.filter(|covering| !self.is_guarded_by(covering.destination, covering.source));
        let touched = alone.flat_map(|covering| self.by_source.range(destinations_inside(covering)));
        let touched = touched.filter(|(_, destination)| *destination != region.destination);
        let touched: Vec<_> = touched.map(|&(source, destination)| Region { destination, source }).collect();
        self.dirty.extend(touched);
    }
}

impl State {
    fn new(own: Option<Candidate>, verdict: Option<Verdict>) -> Self {
        Self {
            own,
            spread: Spread::No,
            closed: false,
            depends_on_highest: false,
            matches: Matches::default(),
            verdict,
        }
    }

    /// Says what the table is to say, and returns that if it differs.
    fn set_verdict<A>(&mut self, region: Region<A>, new: Verdict) -> Option<Changed<A>> {
        let (old, new) = (self.verdict.replace(new), Some(new));
        (old != new).then_some(Changed { region, old, new })
    }
}

/// The regions whose destination lies inside a region's, whatever their source.
fn whole<A: Address>(region: Region<A>) -> std::ops::RangeInclusive<Region<A>> {
    let everything = region.source.shortened(0);
    Region { source: everything, ..region }..=Region {
        destination: region.destination.last(),
        source: everything.last(),
    }
}

/// The regions of one destination whose source lies inside a region's.
fn sources_inside<A: Address>(region: Region<A>) -> std::ops::RangeInclusive<Region<A>> {
    region..=Region { source: region.source.last(), ..region }
}

/// The regions of one source whose destination lies inside a region's, source first.
fn destinations_inside<A: Address>(region: Region<A>) -> std::ops::RangeInclusive<(Prefix<A>, Prefix<A>)> {
    (region.source, region.destination)..=(region.source, region.destination.last())
}
