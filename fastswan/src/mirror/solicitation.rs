//! Which neighbours the kernel is asked to find, or to hear from again, and when.
//!
//! The kernel looks for the Ethernet address of a neighbour when it has a packet for it, and makes sure of it when it has one and
//! has not heard from the neighbour for a while. Packets that are fast it does not see. So it is asked for what these would
//! have brought about: to find a neighbour whose address policies wait for, whether there are packets or not, since otherwise
//! the first of them is not fast; and to hear again from one that packets go to.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::{compiler::Neighbours, table::Slot};

/// From one batch to the next, and from one look at slots to the next.
const TURN: Duration = Duration::from_millis(250);

/// Neighbours in a batch that are to be found. If one does not answer, the kernel asks all hosts of the link three times.
const MOST_SOUGHT: usize = 16;

/// Neighbours in a batch that are to be heard from again. Of most the kernel asks nothing then, and only themselves of others.
const MOST_CONFIRMED: usize = 128;

/// After a neighbour was sought, it is not sought again for so long, which is doubled from one time to the next: the kernel
/// takes 3 s to give up.
const SHORTEST: Duration = Duration::from_secs(4);
const LONGEST: Duration = Duration::from_secs(64);

/// From one confirmation of a neighbour to the next. The kernel makes sure of one by itself if it was used in the 5 s before its
/// address has got old (`delay_first_probe_time`).
const CONFIRMED_EVERY: Duration = Duration::from_secs(2);

/// A neighbour counts as used for so long after a packet to it was seen.
const LATELY: Duration = Duration::from_secs(60);

/// So many slots are looked at in one turn, or more, so that all are in so many turns: in half of [`LATELY`].
const FEWEST_SLOTS: usize = 1024;
const TURNS: usize = 120;

/// Follows what was asked for.
#[derive(Debug, Default)]
pub(super) struct Solicitation {
    asked: HashMap<(u32, IpAddr), Asked>,
    next: Option<Instant>,
    last_sought: Option<(u32, IpAddr)>,
    last_confirmed: Option<(u32, IpAddr)>,
    /// Packets of each slot by number, when it was looked at last.
    packets: Vec<u64>,
    next_look: Option<Instant>,
    last_slot: Option<Slot>,
}

/// What is remembered of a neighbour.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// When a packet to it was seen.
    used: Option<Instant>,
    /// When it was sought or confirmed last.
    at: Option<Instant>,
    /// It is not sought again for so long after that.
    pause: Duration,
}

impl Solicitation {
    /// Looks at how many packets some of the slots have forwarded that send to a neighbour, if it is time.
    pub(super) fn look(
        &mut self,
        neighbours: &Neighbours,
        mut packets: impl FnMut(Slot) -> u64,
        now: Instant,
    ) {
        if self.next_look.is_some_and(|next| now < next) {
            return;
        }
        self.next_look = Some(now + TURN);
        let slots = neighbours.slots().div_ceil(TURNS).max(FEWEST_SLOTS);
        for (slot, neighbour) in neighbours.slots_round(self.last_slot).take(slots) {
            self.last_slot = Some(slot);
            let index = slot.0 as usize;
            if self.packets.len() <= index {
                self.packets.resize(index + 1, 0);
            }
            let packets = packets(slot);
            // Fewer are another policy's.
            if packets > std::mem::replace(&mut self.packets[index], packets) {
                self.asked.entry(neighbour).or_default().used = Some(now);
            }
        }
    }

    /// The neighbours that the kernel is to be asked for now: none, if it is not time.
    pub(super) fn batch(
        &mut self,
        neighbours: &Neighbours,
        is_known: impl Fn(&(u32, IpAddr)) -> bool,
        now: Instant,
    ) -> Vec<(u32, IpAddr)> {
        if self.next.is_some_and(|next| now < next) {
            return Vec::new();
        }
        self.next = Some(now + TURN);
        // What one that comes and goes was asked for counts.
        self.asked.retain(|neighbour, asked| neighbours.contains(neighbour) || !asked.may_be_sought(now));
        let asked = |neighbour: &(u32, IpAddr)| self.asked.get(neighbour).copied().unwrap_or_default();
        let sought = neighbours
            .round(self.last_sought)
            .filter(|neighbour| !is_known(neighbour) && asked(neighbour).may_be_sought(now));
        let sought: Vec<_> = sought.take(MOST_SOUGHT).collect();
        let confirmed = neighbours
            .round(self.last_confirmed)
            .filter(|neighbour| is_known(neighbour) && asked(neighbour).is_to_be_confirmed(now));
        let confirmed: Vec<_> = confirmed.take(MOST_CONFIRMED).collect();
        self.last_sought = sought.last().copied().or(self.last_sought);
        self.last_confirmed = confirmed.last().copied().or(self.last_confirmed);
        for neighbour in &sought {
            let asked = self.asked.entry(*neighbour).or_default();
            asked.at = Some(now);
            asked.pause = (asked.pause * 2).clamp(SHORTEST, LONGEST);
        }
        for neighbour in &confirmed {
            let asked = self.asked.entry(*neighbour).or_default();
            asked.at = Some(now);
            asked.pause = SHORTEST;
        }
        [sought, confirmed].concat()
    }
}

impl Asked {
    fn may_be_sought(self, now: Instant) -> bool {
        self.at.is_none_or(|at| now >= at + self.pause)
    }

    fn is_to_be_confirmed(self, now: Instant) -> bool {
        self.used.is_some_and(|used| now < used + LATELY)
            && self.at.is_none_or(|at| now >= at + CONFIRMED_EVERY)
    }
}
