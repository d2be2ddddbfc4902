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

/// So many may be sought at a time, or have been lately, that have not answered. Of each the kernel keeps an entry for a while, and
/// to make room for more it throws out those of living ones, too (`gc_thresh2`, 512 unless set; `gc_thresh1` is 128).
const MOST_UNANSWERED: usize = 64;

/// Neighbours in a batch that are to be heard from again. Of most the kernel asks nothing then, and only themselves of others.
const MOST_KEPT: usize = 128;

/// After a neighbour was sought, it is not sought again for so long, which is doubled from one time to the next: the kernel
/// takes 3 s to give up.
const SHORTEST: Duration = Duration::from_secs(4);
const LONGEST: Duration = Duration::from_secs(64);

/// A neighbour in use is asked for that often. The kernel makes sure of one by itself if it was used in the 5 s before its
/// address has got old (`delay_first_probe_time`).
const KEPT_EVERY: Duration = Duration::from_secs(2);

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
    last_kept: Option<(u32, IpAddr)>,
    /// Of each slot by number, what was found when it was looked at last.
    seen: Vec<Option<Seen>>,
    next_look: Option<Instant>,
    last_slot: Option<Slot>,
}

/// What was counted for a slot.
#[derive(Clone, Copy, Debug)]
struct Seen {
    neighbour: (u32, IpAddr),
    packets: u64,
}

/// What is remembered of a neighbour.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// When a packet to it was seen.
    used: Option<Instant>,
    /// When it was sought or kept last.
    at: Option<Instant>,
    /// It is not sought again for so long after that.
    pause: Duration,
    /// It was sought then.
    is_sought: bool,
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
            if self.seen.len() <= index {
                self.seen.resize(index + 1, None);
            }
            let packets = packets(slot);
            let before = self.seen[index].replace(Seen { neighbour, packets });
            // What was there at first may be an earlier process's, and fewer than before are another policy's.
            if before.is_some_and(|before| before.neighbour == neighbour && packets > before.packets) {
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
        let unanswered =
            self.asked.iter().filter(|(neighbour, asked)| asked.is_unanswered(now) && !is_known(neighbour));
        let mut room = MOST_UNANSWERED.saturating_sub(unanswered.count());
        let may_be_sought = |neighbour: &(u32, IpAddr)| {
            let asked = asked(neighbour);
            !is_known(neighbour) && asked.may_be_sought(now) && {
                let is_another = !asked.is_unanswered(now);
                let has_room = !is_another || room > 0;
                room -= usize::from(is_another && has_room);
                has_room
            }
        };
        let sought: Vec<_> =
            neighbours.round(self.last_sought).filter(may_be_sought).take(MOST_SOUGHT).collect();
        let kept = neighbours
            .round(self.last_kept)
            .filter(|neighbour| is_known(neighbour) && asked(neighbour).is_to_be_kept(now));
        let kept: Vec<_> = kept.take(MOST_KEPT).collect();
        self.last_sought = sought.last().copied().or(self.last_sought);
        self.last_kept = kept.last().copied().or(self.last_kept);
        for neighbour in &sought {
            let asked = self.asked.entry(*neighbour).or_default();
            asked.at = Some(now);
            asked.pause = (asked.pause * 2).clamp(SHORTEST, LONGEST);
            asked.is_sought = true;
        }
        for neighbour in &kept {
            let asked = self.asked.entry(*neighbour).or_default();
            asked.at = Some(now);
            asked.pause = SHORTEST;
            asked.is_sought = false;
        }
        [sought, kept].concat()
    }
}

impl Asked {
    fn may_be_sought(self, now: Instant) -> bool {
        self.at.is_none_or(|at| now >= at + self.pause)
    }

    /// Whether it was sought so lately that the kernel may still have an entry because of that.
    fn is_unanswered(self, now: Instant) -> bool {
        self.is_sought && self.at.is_some_and(|at| now < at + LONGEST)
    }

    fn is_to_be_kept(self, now: Instant) -> bool {
        self.used.is_some_and(|used| now < used + LATELY) && self.at.is_none_or(|at| now >= at + KEPT_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    /// The driver turns that often at least.
    const LATEST: Duration = Duration::from_millis(300);
    const HOSTS: u8 = 40;
    const SLOTS: u32 = 60;

    fn host(number: u16) -> (u32, IpAddr) {
        let [high, low] = number.to_be_bytes();
        (7, [10, 0, high, low].into())
    }

    /// What there is, and what was asked for.
    struct World {
        now: Instant,
        solicitation: Solicitation,
        neighbours: Neighbours,
        known: BTreeSet<(u32, IpAddr)>,
        packets: BTreeMap<Slot, u64>,
        asked: Vec<(Instant, (u32, IpAddr), bool)>,
    }

    impl World {
        fn new() -> Self {
            Self {
                now: Instant::now(),
                solicitation: Solicitation::default(),
                neighbours: Neighbours::default(),
                known: BTreeSet::new(),
                packets: BTreeMap::new(),
                asked: Vec::new(),
            }
        }

        /// One turn of a driver.
        fn turn(&mut self) -> Vec<(u32, IpAddr)> {
            let packets = |slot| self.packets.get(&slot).copied().unwrap_or(0);
            self.solicitation.look(&self.neighbours, packets, self.now);
            let is_known = |neighbour: &_| self.known.contains(neighbour);
            let batch = self.solicitation.batch(&self.neighbours, is_known, self.now);
            self.asked.extend(batch.iter().map(|neighbour| (self.now, *neighbour, is_known(neighbour))));
            batch
        }

        /// Turns for so long, and returns what was asked for.
        fn go_on(&mut self, time: Duration) -> Vec<(u32, IpAddr)> {
            let (end, mut asked) = (self.now + time, Vec::new());
            while self.now < end {
                asked.extend(self.turn());
                self.now += TURN;
            }
            asked
        }

        /// Whether there are more than when it was looked at last, for the neighbour that it sends to.
        fn has_unseen_packets(&self, slot: Slot, to: (u32, IpAddr)) -> bool {
            let seen = self.solicitation.seen.get(slot.0 as usize).copied().flatten();
            seen.filter(|seen| seen.neighbour == to)
                .is_some_and(|seen| self.packets.get(&slot).is_some_and(|packets| *packets > seen.packets))
        }

        /// Whether no second has more than it may.
        fn assert_bounded(&self) {
            for (kind, most) in [(false, 64), (true, 512)] {
                let times: Vec<_> =
                    self.asked.iter().filter(|(.., known)| *known == kind).map(|(at, ..)| *at).collect();
                let too_many = times.windows(most + 1).find(|times| times[most] - times[0] < SECOND);
                assert_eq!(too_many.map(<[_]>::len), None, "more than {most} in a second");
            }
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send(u32, Option<u8>),
        Learn(u8),
        Lose(u8),
        Packet(u32),
        /// In milliseconds; the driver turns meanwhile, and as late as that.
        Wait(u32, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..SLOTS, prop::option::weighted(0.8, 0..HOSTS)).prop_map(|(slot, host)| Step::Send(slot, host)),
            2 => (0..HOSTS).prop_map(Step::Learn),
            1 => (0..HOSTS).prop_map(Step::Lose),
            3 => (0..SLOTS).prop_map(Step::Packet),
            4 => (1_u32..40, 1_u64..300).prop_map(|(turns, each)| Step::Wait(turns, each)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// - One that nobody depends on is never asked for.
        /// - One that is known is asked for only if a packet to it was seen in the last minute.
        /// - The same one is asked for every 2 s at most, and sought every 4 s at most.
        /// - One that policies wait for is sought again within 64 s, and one that is used within 2 s.
        /// - Never are more than 64 sought, or 512 kept, in a second.
        #[test]
        fn what_is_asked_for_is_needed_and_neither_too_often_nor_too_rarely(
            steps in prop::collection::vec(step(), 1..250)
        ) {
            let mut world = World::new();
            let mut sends: BTreeMap<Slot, (u32, IpAddr)> = BTreeMap::new();
            let mut used: BTreeMap<(u32, IpAddr), Instant> = BTreeMap::new();
            // Of these it need not be remembered.
            let mut is_forgotten: BTreeSet<(u32, IpAddr)> = BTreeSet::new();
            let mut unseen_since: BTreeMap<Slot, Instant> = BTreeMap::new();
            let mut last: BTreeMap<(u32, IpAddr), Instant> = BTreeMap::new();
            // Since when each is as it is.
            let mut since: BTreeMap<(u32, IpAddr), Instant> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Send(slot, to) => {
                        let (slot, to) = (Slot(slot), to.map(|to| host(to.into())));
                        let old = match to {
                            Some(to) => sends.insert(slot, to),
                            None => sends.remove(&slot),
                        };
                        world.neighbours.set(slot, to);
                        unseen_since.remove(&slot);
                        for changed in [old, to].into_iter().flatten() {
                            let policies = sends.values().filter(|to| **to == changed).count();
                            if policies <= 1 {
                                since.insert(changed, world.now);
                            }
                            if policies == 0 {
                                is_forgotten.insert(changed);
                            }
                        }
                    }
                    Step::Learn(number) => {
                        if world.known.insert(host(number.into())) {
                            since.insert(host(number.into()), world.now);
                        }
                    }
                    Step::Lose(number) => {
                        if world.known.remove(&host(number.into())) {
                            since.insert(host(number.into()), world.now);
                        }
                    }
                    Step::Packet(slot) => {
                        *world.packets.entry(Slot(slot)).or_default() += 1;
                    }
                    Step::Wait(turns, each) => for _ in 0..turns {
                        let now = world.now;
                        let unseen: Vec<_> =
                            sends.iter().filter(|(slot, to)| world.has_unseen_packets(**slot, **to)).map(|(slot, _)| *slot).collect();
                        let asked = world.turn();
                        for slot in unseen {
                            let first = *unseen_since.entry(slot).or_insert(now);
                            if !world.has_unseen_packets(slot, sends[&slot]) {
                                unseen_since.remove(&slot);
                                let before = used.insert(sends[&slot], now);
                                let before = before.filter(|_| !is_forgotten.remove(&sends[&slot]));
                                if before.is_none_or(|used| now >= used + LATELY) {
                                    since.insert(sends[&slot], now);
                                }
                            }
                            prop_assert!(now - first <= 2 * LATEST, "{slot:?} is not looked at");
                        }
                        for neighbour in asked {
                            prop_assert!(sends.values().any(|to| *to == neighbour), "nobody depends on it");
                            let is_known = world.known.contains(&neighbour);
                            if is_known {
                                let used = used.get(&neighbour).map(|used| now - *used);
                                prop_assert!(used.is_some_and(|ago| ago < LATELY), "{used:?}");
                            }
                            let gap = last.insert(neighbour, now).map(|last| now - last);
                            let least = if is_known { 2 } else { 4 };
                            prop_assert!(gap.is_none_or(|gap| gap >= least * SECOND), "{gap:?}");
                        }
                        for neighbour in sends.values() {
                            let idle = now - last.get(neighbour).max(since.get(neighbour)).copied().unwrap();
                            let patience = if !world.known.contains(neighbour) {
                                64 * SECOND
                            } else if !is_forgotten.contains(neighbour)
                                && used.get(neighbour).is_some_and(|used| now < *used + LATELY)
                            {
                                2 * SECOND
                            } else {
                                continue;
                            };
                            prop_assert!(idle <= patience + 4 * LATEST, "{neighbour:?}: {idle:?}");
                        }
                        world.now += Duration::from_millis(each);
                    }
                }
            }
            world.assert_bounded();
        }
    }

    #[test]
    fn five_thousand_that_answer_are_found_one_after_the_other() {
        let mut world = World::new();
        for number in 0..5_000 {
            world.neighbours.set(Slot(number.into()), Some(host(number)));
        }
        for _ in 0..79 * 4 {
            let answering = world.turn();
            world.known.extend(answering);
            world.now += TURN;
        }
        assert_eq!(world.known.len(), 5_000);
        world.assert_bounded();
    }

    #[test]
    fn of_those_that_do_not_answer_few_are_sought_at_a_time_and_all_in_the_end() {
        let mut world = World::new();
        for number in 0..700 {
            world.neighbours.set(Slot(number.into()), Some(host(number)));
        }
        world.go_on(1800 * SECOND);
        let mut found: Vec<_> = world.asked.iter().map(|(_, neighbour, _)| *neighbour).collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), 700);
        for (number, (at, ..)) in world.asked.iter().enumerate() {
            let lately = world.asked[..=number].iter().rev().take_while(|(then, ..)| *at - *then < LONGEST);
            let lately: BTreeSet<_> = lately.map(|(_, neighbour, _)| *neighbour).collect();
            assert!(lately.len() <= MOST_UNANSWERED, "{} at a time", lately.len());
        }
    }

    /// Counters go on when a process takes over what was pinned, and the new one has seen no packet.
    #[test]
    fn what_an_earlier_process_counted_is_no_packet_of_the_last_minute() {
        let mut world = World::new();
        world.neighbours.set(Slot(0), Some(host(1)));
        world.known.insert(host(1));
        world.packets.insert(Slot(0), 1_000_000);
        assert_eq!(world.go_on(10 * SECOND), []);
    }

    /// The packets went to another neighbour, while the slot was another policy's or the route another one.
    #[test]
    fn a_neighbour_is_not_used_because_packets_went_to_the_one_before() {
        let mut world = World::new();
        world.neighbours.set(Slot(0), Some(host(1)));
        world.known.extend([host(1), host(2)]);
        world.go_on(SECOND);
        world.packets.insert(Slot(0), 1);
        world.neighbours.set(Slot(0), Some(host(2)));
        assert_eq!(world.go_on(10 * SECOND), []);
    }

    #[test]
    fn one_that_does_not_answer_is_sought_at_once_and_then_less_and_less_often() {
        let mut world = World::new();
        world.neighbours.set(Slot(0), Some(host(1)));
        let begin = world.now;
        world.go_on(250 * SECOND);
        let times: Vec<_> = world.asked.iter().map(|(at, ..)| (*at - begin).as_secs()).collect();
        assert_eq!(times, [0, 4, 12, 28, 60, 124, 188]);
    }

    #[test]
    fn one_that_policies_leave_and_come_back_to_is_not_sought_more_often() {
        let mut world = World::new();
        for _ in 0..100 {
            world.neighbours.set(Slot(0), Some(host(1)));
            world.go_on(SECOND);
            world.neighbours.set(Slot(0), None);
            world.go_on(SECOND);
        }
        assert!(world.asked.len() < 9, "{}", world.asked.len());
    }

    #[test]
    fn one_that_packets_go_to_is_kept_until_a_minute_after_the_last() {
        let mut world = World::new();
        for slot in 0..3000 {
            world.neighbours.set(Slot(slot), Some(host(u16::from(slot == 2999))));
        }
        world.known.extend([host(0), host(1)]);
        assert_eq!(world.go_on(10 * SECOND), []);
        world.packets.insert(Slot(2999), 1);
        assert_eq!(world.go_on(10 * SECOND), [host(1); 5]);
        world.go_on(51 * SECOND);
        assert_eq!(world.go_on(1000 * SECOND), []);
        // Another policy has the slot now.
        world.packets.insert(Slot(2999), 0);
        assert_eq!(world.go_on(SECOND), []);
    }
}
