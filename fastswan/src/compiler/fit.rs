//! Which cells to leave out when a table does not hold all of them.
//!
//! Without a cell, its packets are found by cells that come later in the order. Those then pass: a packet is
//! fast through a cell only if that is the cell it belongs to.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
};

use ipnet::IpNet;

use crate::{prefix_map::PrefixMap, table::Cell};

/// Keeps at most `limit` cells of at most `tuples` pairs of prefix lengths, those with the most cells first,
/// and calls `pass` for the cells that must let their packets pass because others were left out.
pub(super) fn fit<V>(cells: &mut Vec<(Cell, V)>, limit: usize, tuples: usize, mut pass: impl FnMut(&mut V)) {
    let tuple = |cell: &Cell| (cell.destination.prefix_len(), cell.source.prefix_len());
    let mut sizes: BTreeMap<(u8, u8), usize> = BTreeMap::new();
    for (cell, _) in cells.iter() {
        *sizes.entry(tuple(cell)).or_default() += 1;
    }
    if cells.len() <= limit && sizes.len() <= tuples {
        return;
    }
    let mut largest: Vec<_> = sizes.into_iter().collect();
    largest.sort_by_key(|(tuple, size)| (Reverse(*size), Reverse(*tuple)));
    let mut left = limit;
    let mut room: BTreeMap<(u8, u8), usize> = BTreeMap::new();
    for (tuple, size) in largest.into_iter().take(tuples) {
        room.insert(tuple, size.min(left));
        left -= size.min(left);
    }

    let mut dropped = Vec::new();
    let mut kept = Vec::with_capacity(limit.min(cells.len()));
    for (cell, value) in cells.drain(..) {
        match room.get_mut(&tuple(&cell)) {
            Some(room) if *room > 0 => {
                *room -= 1;
                kept.push((cell, value));
            }
            _ => dropped.push(cell),
        }
    }
    for index in later(&kept, &dropped) {
        pass(&mut kept[index].1);
    }
    *cells = kept;
}

/// Indices of the cells that find packets which belong to one of the dropped cells.
fn later<V>(kept: &[(Cell, V)], dropped: &[Cell]) -> HashSet<usize> {
    let mut by_destination: BTreeMap<IpNet, Vec<(IpNet, usize)>> = BTreeMap::new();
    for (index, (cell, _)) in kept.iter().enumerate() {
        by_destination.entry(cell.destination).or_default().push((cell.source, index));
    }
    let destinations =
        by_destination.into_iter().map(|(destination, sources)| (destination, PrefixMap::new(sources)));
    let destinations = PrefixMap::new(destinations.collect());

    let mut found = HashSet::new();
    let mut searched = HashSet::new();
    for cell in dropped {
        for (destination, sources) in destinations.covering(cell.destination) {
            // What comes after was found when this was searched for another cell.
            if !searched.insert((destination, cell.source)) {
                break;
            }
            found.extend(sources.inside(cell.source).map(|(_, index)| *index));
            if let Some((_, index)) = sources.covering(cell.source).next() {
                found.insert(*index);
                // It finds all that is left of the region.
                break;
            }
        }
    }
    found
}
