//! The neighbours that the policies that have slots send to, as the compiler notes them and the mirror goes round them.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    ops::Bound::{Excluded, Unbounded},
};

use crate::table::Slot;

/// Which slots send to which neighbour: those whose packets leave that way, or would if only its address were known.
#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    of: BTreeMap<Slot, (u32, IpAddr)>,
    /// With how many slots each has.
    slots: BTreeMap<(u32, IpAddr), usize>,
}

impl Neighbours {
    /// Notes where a slot's packets are sent to: to no neighbour that must be known, or to one, by device and address.
    pub(crate) fn set(&mut self, slot: Slot, neighbour: Option<(u32, IpAddr)>) {
        let old = match neighbour {
            Some(neighbour) => self.of.insert(slot, neighbour),
            None => self.of.remove(&slot),
        };
        if old == neighbour {
            return;
        }
        if let Some(neighbour) = neighbour {
            *self.slots.entry(neighbour).or_default() += 1;
        }
        if let Some(old) = old
            && let Some(slots) = self.slots.get_mut(&old)
        {
            *slots -= 1;
            if *slots == 0 {
                self.slots.remove(&old);
            }
        }
    }

    pub(crate) fn contains(&self, neighbour: &(u32, IpAddr)) -> bool {
        self.slots.contains_key(neighbour)
    }

    /// How many slots there are that send to a neighbour.
    pub(crate) fn slots(&self) -> usize {
        self.of.len()
    }

    /// Each neighbour once, beginning after one of them.
    pub(crate) fn round(&self, last: Option<(u32, IpAddr)>) -> impl Iterator<Item = (u32, IpAddr)> {
        round(&self.slots, last).map(|(neighbour, _)| *neighbour)
    }

    /// Each slot once and the neighbour that it sends to, beginning after one of them.
    pub(crate) fn slots_round(&self, last: Option<Slot>) -> impl Iterator<Item = (Slot, (u32, IpAddr))> {
        round(&self.of, last).map(|(slot, neighbour)| (*slot, *neighbour))
    }
}

fn round<K: Copy + Ord, V>(map: &BTreeMap<K, V>, last: Option<K>) -> impl Iterator<Item = (&K, &V)> {
    let after = map.range((last.map_or(Unbounded, Excluded), Unbounded));
    after.chain(last.into_iter().flat_map(|last| map.range(..=last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_is_there_as_long_as_a_slot_sends_to_it() {
        let one = (7, "192.0.2.2".parse().unwrap());
        let other = (7, "192.0.2.3".parse().unwrap());
        let mut neighbours = Neighbours::default();
        for slot in [0, 1, 1] {
            neighbours.set(Slot(slot), Some(one));
        }
        neighbours.set(Slot(0), None);
        assert!(neighbours.contains(&one));
        neighbours.set(Slot(1), Some(other));
        assert_eq!(neighbours.round(None).collect::<Vec<_>>(), [other]);
        neighbours.set(Slot(1), None);
        neighbours.set(Slot(1), None);
        assert_eq!((neighbours.slots(), neighbours.round(Some(one)).next()), (0, None));
    }

    #[test]
    fn a_round_begins_behind_the_last_one_whether_it_is_still_there_or_not() {
        let mut neighbours = Neighbours::default();
        for slot in [1, 3, 5] {
            neighbours.set(Slot(slot), Some((slot, [192, 0, 2, 1].into())));
        }
        let slots = |last| neighbours.slots_round(last).map(|(slot, _)| slot.0).collect::<Vec<_>>();
        for (last, expected) in [(1, [3, 5, 1]), (2, [3, 5, 1]), (5, [1, 3, 5]), (9, [1, 3, 5])] {
            assert_eq!(slots(Some(Slot(last))), expected, "after {last}");
        }
        assert_eq!(slots(None), [1, 3, 5]);
    }
}
