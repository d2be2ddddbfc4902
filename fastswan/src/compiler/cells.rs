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

use ipnet::IpNet;

use super::rule::Matches;
use crate::{prefix_map::PrefixMap, table::Cell};

/// The policies of one family, by the regions they are for.
pub(super) struct Plane {
    destinations: PrefixMap<PrefixMap<Matches>>,
    regions: usize,
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
            .map(|chunk| {
                let sources = chunk.iter().map(|(cell, matches)| (cell.source, *matches)).collect();
                (chunk[0].0.destination, PrefixMap::new(sources))
            })
            .collect();
        Self { destinations: PrefixMap::new(destinations), regions: regions.len() }
    }

    /// The policies that match every packet of a region.
    pub(super) fn matches(&self, cell: Cell) -> Matches {
        self.destinations
            .covering(cell.destination)
            .flat_map(|(_, sources)| sources.covering(cell.source))
            .fold(Matches::default(), |all, (_, matches)| all.and(*matches))
    }

    /// The cells, each with the policies that match it, in order.
    ///
    /// There are never many more than `limit`, or than policies if those are more. Where the sources of
    /// covering destinations would be too many, one cell without policies stands for all of them: it is for
    /// packets that the table has no room to tell apart.
    pub(super) fn cells(&self, limit: usize) -> Vec<(Cell, Option<Matches>)> {
        let mut room = limit.saturating_sub(self.regions);
        let mut cells = Vec::with_capacity(self.regions);
        for (destination, own) in self.destinations.iter() {
            let covering: Vec<_> =
                self.destinations.covering(destination).skip(1).map(|(_, sources)| sources).collect();
            for outermost in own.outermost() {
                let inherited = || covering.iter().map(|sources| sources.inside(outermost));
                let needed: usize = inherited().map(|sources| sources.len()).sum();
                if needed > room {
                    cells.push((Cell { destination, source: outermost }, None));
                    continue;
                }
                room -= needed;
                let mut sources: Vec<IpNet> =
                    inherited().flatten().chain(own.inside(outermost)).map(|(source, _)| source).collect();
                sources.sort_unstable();
                sources.dedup();
                cells.extend(sources.into_iter().map(|source| {
                    let cell = Cell { destination, source };
                    (cell, Some(self.matches(cell)))
                }));
            }
        }
        cells
    }
}
