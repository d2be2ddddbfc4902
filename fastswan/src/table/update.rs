//! Batches of changes.

use ipnet::IpNet;

use super::{Cell, Exception, Fact, Side, Slot, Standing, Verdict};

/// One change of a table.
///
/// What is there already may be set again, and what is not there may be removed. A table that does not know a kind of
/// change would be wrong without a word; so this is exhaustive, and another kind is a new major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a cell, or removes it.
    Cell(Cell, Option<Verdict>),
    /// Sets what the host does with the addresses of a prefix, or removes it. The prefix is without host bits.
    Fact(Side, IpNet, Option<Fact>),
    /// Adds (`true`) or removes a guard: a source that a forward or sub policy, or another one that is not part of the
    /// cells, is about. The prefix is without host bits.
    Guard(IpNet, bool),
    /// Adds (`true`) or removes an exception.
    Exception(Exception, bool),
    /// Fills a slot, or frees it. A slot that was freed and is filled again starts with counters at zero.
    Slot(Slot, Option<Standing>),
    /// Says which policy a filled slot belongs to, by the kernel's index, or 0. A process that takes over finds the
    /// policy's counters by it; those of slots without one end with the process.
    Owner(Slot, u32),
}

/// A batch of changes. Keys that are not named stay as they are.
///
/// Each key is named once, but a slot may be freed and then filled. The changes may come in any order;
/// [`Self::changes`] tells them in one in which they can be applied: what is removed first, since what it frees may be
/// needed, then slots and their owners, then all else.
///
/// ```
/// use fastswan::table::{Change, Contents, Forwarding, Packet, Probes, Slot, TableUpdate, Verdict};
///
/// let tunnel = fastswan::table::Cell { source: "10.1.0.0/16".parse()?, destination: "10.2.0.0/16".parse()? };
/// let update: TableUpdate = [
///     Change::Cell(tunnel, Some(Verdict::Fast { slot: Slot(0), probes: Probes::default() })),
///     Change::Slot(Slot(0), Some(Ok(Forwarding { ifindex: 7, max_length: 1400, rewrite: None }))),
/// ]
/// .into_iter()
/// .collect();
/// let mut table = Contents::default();
/// table.apply(&update);
/// let packet = Packet::new("10.1.0.5".parse()?, "10.2.0.9".parse()?);
/// assert_eq!(table.decide(&packet, None).map(|(slot, _)| slot), Ok(Slot(0)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
// Each kind has a list of its own: so each takes as little memory as it can, and whoever looks for one kind does not
// meet the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableUpdate {
    pub(crate) cells: Vec<(Cell, Option<Verdict>)>,
    pub(crate) facts: Vec<((Side, IpNet), Option<Fact>)>,
    pub(crate) guards: Vec<(IpNet, bool)>,
    pub(crate) exceptions: Vec<(Exception, bool)>,
    pub(crate) slots: Vec<(Slot, Option<Standing>)>,
    pub(crate) owners: Vec<(Slot, u32)>,
}

impl TableUpdate {
    /// How many changes it names.
    #[must_use]
    pub fn len(&self) -> usize {
        let Self { cells, facts, guards, exceptions, slots, owners } = self;
        cells.len() + facts.len() + guards.len() + exceptions.len() + slots.len() + owners.len()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a change.
    pub fn push(&mut self, change: Change) {
        match change {
            Change::Cell(cell, verdict) => self.cells.push((cell, verdict)),
            Change::Fact(side, prefix, fact) => self.facts.push(((side, prefix), fact)),
            Change::Guard(prefix, there) => self.guards.push((prefix, there)),
            Change::Exception(exception, there) => self.exceptions.push((exception, there)),
            Change::Slot(slot, standing) => self.slots.push((slot, standing)),
            Change::Owner(slot, policy) => self.owners.push((slot, policy)),
        }
    }

    /// All changes, in an order in which they can be applied: removals, slots, owners, and what is set or added.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        let slots = self.slots.iter().map(|(slot, standing)| Change::Slot(*slot, *standing));
        let owners = self.owners.iter().map(|(slot, policy)| Change::Owner(*slot, *policy));
        self.contents(false).chain(slots).chain(owners).chain(self.contents(true))
    }

    /// What is removed of what is looked up, or what is set.
    fn contents(&self, set: bool) -> impl Iterator<Item = Change> {
        let cells = self.cells.iter().filter(move |(_, verdict)| verdict.is_some() == set);
        let facts = self.facts.iter().filter(move |(_, fact)| fact.is_some() == set);
        let guards = self.guards.iter().filter(move |(_, there)| *there == set);
        let exceptions = self.exceptions.iter().filter(move |(_, there)| *there == set);
        cells
            .map(|(cell, verdict)| Change::Cell(*cell, *verdict))
            .chain(facts.map(|((side, prefix), fact)| Change::Fact(*side, *prefix, *fact)))
            .chain(guards.map(|(prefix, there)| Change::Guard(*prefix, *there)))
            .chain(exceptions.map(|(exception, there)| Change::Exception(*exception, *there)))
    }
}

impl Extend<Change> for TableUpdate {
    fn extend<I: IntoIterator<Item = Change>>(&mut self, changes: I) {
        changes.into_iter().for_each(|change| self.push(change));
    }
}

impl FromIterator<Change> for TableUpdate {
    fn from_iter<I: IntoIterator<Item = Change>>(changes: I) -> Self {
        let mut update = Self::default();
        update.extend(changes);
        update
    }
}

impl From<Change> for TableUpdate {
    fn from(change: Change) -> Self {
        Self::from_iter([change])
    }
}

#[cfg(test)]
mod tests {
    use fastswan_ebpf::PassReason;

    use super::*;

    #[test]
    fn changes_are_told_in_an_order_in_which_they_can_be_applied_whatever_the_order_they_came_in() {
        let everything: IpNet = "0.0.0.0/0".parse().unwrap();
        let cell = Cell { destination: everything, source: everything };
        let set = Change::Cell(cell, Some(Verdict::Pass(PassReason::Shadowed)));
        let (guard, no_guard) = (Change::Guard(everything, true), Change::Guard(everything, false));
        let (freed, filled) =
            (Change::Slot(Slot(1), None), Change::Slot(Slot(1), Some(Err(PassReason::NoSa))));
        let owner = Change::Owner(Slot(1), 9);
        let fact_gone = Change::Fact(Side::Source, everything, None);
        let update = TableUpdate::from_iter([guard, owner, set, freed, no_guard, filled, fact_gone]);
        let changes: Vec<Change> = update.changes().collect();
        assert_eq!(changes, [fact_gone, no_guard, freed, filled, owner, set, guard]);
        assert_eq!(update.len(), changes.len());
    }
}
