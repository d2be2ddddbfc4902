//! Which cells there are.
//!
//! Prefixes nest or are disjoint, so the policies split the plane of (destination, source) into regions. A
//! destination holds the sources of its own policies, and of the policies of the destinations that cover it
//! those sources that lie inside one of its own. The first cell that contains a packet, in the order longest
//! destination, then longest source, is then one whose policies are exactly the packet's:
//!
//! - A policy whose destination is longer than the cell's would itself have given an earlier cell.
//! - A policy whose source is longer than the cell's is either of the same destination, or of one that covers
//!   it and then inside an own source; either way its source would have given an earlier cell.
//!
//! Forward and sub policies only ever make packets pass. On a gateway whose local network covers its peers'
//! networks there is one from each peer to the local network; taken over into the cells of every other peer,
//! a thousand peers would give a million cells. So their sources are not taken over: a cell that they lie
//! inside is [guarded](Region::guarded), and the source of its packets is looked up.

use ipnet::IpNet;

use super::rule::Matches;
use crate::{prefix_map::PrefixMap, table::Cell};

/// The policies of one family, by the regions they are for.
pub(super) struct Plane {
    destinations: PrefixMap<Sources>,
    regions: usize,
}

/// The policies of one destination, by source.
struct Sources {
    all: PrefixMap<Matches>,
    /// The sources that the destinations inside this one take over.
    inherited: PrefixMap<()>,
    /// The sources of nothing but forward and sub policies.
    guards: PrefixMap<()>,
}

/// A cell.
pub(super) struct Region {
    pub(super) cell: Cell,
    /// The policies that match all of it. `None` if the table has no room to tell its packets apart.
    pub(super) matches: Option<Matches>,
    /// Packets from one of [`Plane::guards`] inside it must pass.
    pub(super) guarded: bool,
}

impl Plane {
    pub(super) fn new(mut regions: Vec<(Cell, Matches)>) -> Self {
        regions.sort_by_key(|(cell, _)| *cell);
        regions.dedup_by(|(cell, matches), (kept, all)| {
            let same = cell == kept;
            if same {
                *all = all.and(*matches);
            }
            same
        });
        let destinations = regions
            .chunk_by(|(one, _), (other, _)| one.destination == other.destination)
            .map(|chunk| (chunk[0].0.destination, Sources::new(chunk)))
            .collect();
        Self { destinations: PrefixMap::new(destinations), regions: regions.len() }
    }

    /// The sources of forward and sub policies, for which cells are guarded.
    pub(super) fn guards(&self) -> impl Iterator<Item = IpNet> {
        self.destinations.iter().flat_map(|(_, sources)| sources.guards.iter()).map(|(source, ())| source)
    }

    /// The cells in order.
    ///
    /// There are never more than `limit`, or than policies if those are more. Where the sources of covering
    /// destinations would be too many, one cell stands for all of them.
    pub(super) fn cells(&self, limit: usize) -> Vec<Region> {
        let mut room = limit.saturating_sub(self.regions);
        let mut cells = Vec::with_capacity(self.regions);
        for (destination, own) in self.destinations.iter() {
            let covering: Vec<_> =
                self.destinations.covering(destination).skip(1).map(|(_, sources)| sources).collect();
            for outermost in own.all.outermost() {
                let inherited = || covering.iter().map(|sources| sources.inherited.inside(outermost));
                let needed: usize = inherited().map(|sources| sources.len()).sum();
                if needed > room {
                    let cell = Cell { destination, source: outermost };
                    cells.push(Region { cell, matches: None, guarded: false });
                    continue;
                }
                room -= needed;
                let own = own.all.inside(outermost).map(|(source, _)| source);
                let mut sources: Vec<IpNet> =
                    inherited().flatten().map(|(source, ())| source).chain(own).collect();
                sources.sort_unstable();
                sources.dedup();
                cells.extend(sources.into_iter().map(|source| {
                    let cell = Cell { destination, source };
                    let guarded = covering.iter().any(|sources| sources.guards.inside(source).len() > 0);
                    Region { cell, matches: Some(self.matches(cell)), guarded }
                }));
            }
        }
        cells
    }

    /// The policies that match every packet of a region.
    fn matches(&self, cell: Cell) -> Matches {
        self.destinations
            .covering(cell.destination)
            .flat_map(|(_, sources)| sources.all.covering(cell.source))
            .fold(Matches::default(), |all, (_, matches)| all.and(*matches))
    }
}

impl Sources {
    /// Of regions that have one destination.
    fn new(regions: &[(Cell, Matches)]) -> Self {
        let sources = |wanted: fn(&Matches) -> bool| {
            let wanted = regions.iter().filter(|(_, matches)| wanted(matches));
            PrefixMap::new(wanted.map(|(cell, _)| (cell.source, ())).collect())
        };
        Self {
            all: PrefixMap::new(regions.iter().map(|(cell, matches)| (cell.source, *matches)).collect()),
            inherited: sources(|matches| !matches.only_pass()),
            guards: sources(Matches::only_pass),
        }
    }
}
