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

/// Keeps at most `limit` cells of at most `tuples` pairs of prefix lengths, those with the most cells first, and of a pair
/// those first that are fast. Calls `pass` for the cells that must let their packets pass because others were left out.
pub(super) fn fit<V>(
    cells: &mut Vec<(Cell, V)>,
    limit: usize,
    tuples: usize,
    is_fast: impl Fn(&V) -> bool,
    mut pass: impl FnMut(&mut V),
) {
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

    // Without one that passes, its packets pass as well, unless another one finds them.
    let mut has_room = vec![false; cells.len()];
    for fast in [true, false] {
        for ((cell, _), has_room) in
            cells.iter().zip(&mut has_room).filter(|((_, value), _)| is_fast(value) == fast)
        {
            if let Some(room) = room.get_mut(&tuple(cell)).filter(|room| **room > 0) {
                *room -= 1;
                *has_room = true;
            }
        }
    }
    let mut dropped = Vec::new();
    let mut kept = Vec::with_capacity(limit.min(cells.len()));
    for ((cell, value), has_room) in cells.drain(..).zip(has_room) {
        if has_room {
            kept.push((cell, value));
        } else {
            dropped.push(cell);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix() -> impl Strategy<Value = IpNet> {
        (0..8u8, 29..=32u8)
            .prop_map(|(host, length)| format!("10.0.0.{host}/{length}").parse::<IpNet>().unwrap().trunc())
    }

    fn cells() -> impl Strategy<Value = Vec<(Cell, bool)>> {
        let cell = (prefix(), prefix()).prop_map(|(destination, source)| Cell { destination, source });
        proptest::collection::btree_set(cell, 0..20)
            .prop_map(|cells| cells.into_iter().map(|cell| (cell, true)).collect())
    }

    fn first(cells: &[(Cell, bool)], source: u8, destination: u8) -> Option<(Cell, bool)> {
        let address = |last: u8| std::net::IpAddr::from([10, 0, 0, last]);
        cells
            .iter()
            .filter(|(cell, _)| cell.source.contains(&address(source)))
            .filter(|(cell, _)| cell.destination.contains(&address(destination)))
            .max_by_key(|(cell, _)| (cell.destination.prefix_len(), cell.source.prefix_len()))
            .copied()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]

        /// A packet is fast through a cell only if that is the cell it was fast through before, and if nothing
        /// was left out, nothing passes.
        #[test]
        fn packets_of_a_cell_that_was_left_out_are_not_fast_through_another(
            all in cells(),
            limit in 0..24usize,
            tuples in 0..12usize,
        ) {
            let mut kept = all.clone();
            fit(&mut kept, limit, tuples, |fast| *fast, |fast| *fast = false);
            prop_assert!(kept.len() <= limit);
            let lengths: HashSet<_> =
                kept.iter().map(|(cell, _)| (cell.destination.prefix_len(), cell.source.prefix_len())).collect();
            prop_assert!(lengths.len() <= tuples);
            for (source, destination) in (0..8).flat_map(|source| (0..8).map(move |to| (source, to))) {
                if let Some((cell, true)) = first(&kept, source, destination) {
                    prop_assert_eq!(Some((cell, true)), first(&all, source, destination));
                }
            }
            if kept.len() == all.len() {
                prop_assert_eq!(kept, all);
            }
        }

        /// A cell is made to pass only if it would catch packets of a cell that was left out.
        #[test]
        fn cells_that_have_no_part_in_what_was_left_out_stay_fast(
            all in cells(),
            limit in 0..24usize,
            tuples in 0..12usize,
        ) {
            let mut kept = all.clone();
            fit(&mut kept, limit, tuples, |fast| *fast, |fast| *fast = false);
            for (cell, _) in kept.iter().filter(|(_, fast)| !fast) {
                let is_left_out = |other: &Cell| kept.iter().all(|(kept, _)| kept != other);
                let meets = |other: &Cell| {
                    cell.destination.contains(&other.destination)
                        && (cell.source.contains(&other.source) || other.source.contains(&cell.source))
                };
                prop_assert!(all.iter().any(|(other, _)| is_left_out(other) && meets(other)), "{}", cell);
            }
        }
    }

    /// Policies that found no slot take no place of one that has.
    #[test]
    fn of_cells_with_the_same_prefix_lengths_those_are_kept_that_are_fast() {
        let cell = |last: u8, fast| {
            let destination = format!("10.0.0.{last}/32").parse().unwrap();
            (Cell { destination, source: "10.1.0.0/16".parse().unwrap() }, fast)
        };
        let mut cells: Vec<_> = (0..8).map(|last| cell(last, last >= 5)).collect();
        fit(&mut cells, 4, 12, |fast| *fast, |fast| *fast = false);
        assert_eq!(cells, [cell(0, false), cell(5, true), cell(6, true), cell(7, true)]);
    }
}
