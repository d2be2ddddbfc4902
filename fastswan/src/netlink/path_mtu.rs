//! Which path MTUs the kernel has learnt. No socket and no clock is used here: [`Follower`](super::Follower) hands over messages,
//! the time and what was read, and asks what is wanted.
//!
//! The kernel keeps what it learns from routers as exceptions of routes, and notifies of none. But it learns only from ICMP
//! messages that are delivered to the host, and a raw socket gets a copy of each. Such a message says *that* there may be
//! something new, and for which address; *what* it is, the kernel is asked (`ip route get`). The copy may come before the
//! kernel has taken up the message, so it is asked at once and twice more.
//!
//! An answer is about one route to the address, and others may have exceptions too. So an answer only adds; what is known goes
//! when all exceptions have been read and it is not among them. They are read every few seconds: that ends what has expired
//! or was flushed.
//!
//! Whoever can send packets to the host can send such messages without end. What is kept is limited, and beyond the limits the
//! path MTUs of the family are *unclear*: nothing is heard any longer, and after a pause that grows all exceptions are read.
//!
//! The kernel (6.18) lists an exception of IPv4 only once a packet, or a question, has used it. So a reading misses what was
//! learnt and not used while nothing was heard: before the source began, and while path MTUs were unclear.

use std::{cmp::Reverse, net::IpAddr, time::Duration};

use hashbrown::{HashMap, HashSet};
use tokio::time::Instant;

use super::{
    back_off::BackOff,
    due::{Due, PopIfDue as _},
    wire::{CutOff, address, attribute, attributes, i32_at, octets, of_family, u32_at},
};
use crate::{
    host::{HostChange, PathMtu},
    policy::Family,
};

/// The kernel is asked so long after a message came.
const ASKED_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(150)];
/// Questions at one time, each about another address, source or type of service.
const MOST_QUESTIONS: usize = 1024;
/// Questions in one turn of the loop; each takes a few microseconds.
const MOST_AT_ONCE: usize = 64;
/// Addresses of a family.
const MOST_KNOWN: usize = 16_384;

/// From the end of one reading to the beginning of the next: so long, or so many times as long as it took.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_SHARE: u32 = 50;
/// Where no messages are heard, the same for each so many routes.
const POLLED: Duration = Duration::from_millis(200);
const POLLED_ROUTES: usize = 2000;
/// Messages that were thrown away before a reading must have been taken up by the kernel.
const SETTLE: Duration = Duration::from_millis(20);

const ROUTE_LENGTH: usize = 12;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_METRICS: u16 = 8;
const RTA_CACHEINFO: u16 = 12;
const RTAX_MTU: u16 = 2;
/// An exception; in a request, asks for these only.
pub(super) const RTM_F_CLONED: u32 = 0x200;

/// Which route the kernel looked up when it took up an ICMP message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Question {
    pub(crate) destination: IpAddr,
    pub(crate) source: IpAddr,
    /// Without the bits of ECN; 0 for IPv6.
    pub(crate) tos: u8,
}

impl Question {
    /// The body of a request for the route (`RTM_GETROUTE`).
    pub(super) fn request(&self) -> Vec<u8> {
        let (destination, source) = (octets(self.destination), octets(self.source));
        let length = |octets: &[u8]| u8::try_from(8 * octets.len()).unwrap_or(0);
        let mut body = of_family(self.destination.into(), ROUTE_LENGTH);
        (body[1], body[2], body[3]) = (length(&destination), length(&source), self.tos);
        body.extend(attribute(RTA_DST, &destination));
        body.extend(attribute(RTA_SRC, &source));
        body
    }
}

/// What a message about a route says was learnt. MTUs of routes themselves do not expire, and are told with the routes.
pub(super) fn learnt(payload: &[u8]) -> Result<Option<PathMtu>, CutOff> {
    let flags = u32_at(payload, 8).ok_or(CutOff { object: "an exception of a route" })?;
    let (mut destination, mut mtu, mut expires) = (None, None, 0);
    for (kind, value) in attributes(payload, ROUTE_LENGTH) {
        match kind {
            RTA_DST => destination = address(value),
            RTA_METRICS => {
                let found = attributes(value, 0).find(|(kind, _)| *kind == RTAX_MTU);
                mtu = found.and_then(|(_, value)| u32_at(value, 0));
            }
            // clntref, lastuse, expires
            RTA_CACHEINFO => expires = i32_at(value, 8).unwrap_or_default(),
            _ => {}
        }
    }
    let is_learnt = flags & RTM_F_CLONED != 0 && expires > 0;
    Ok(destination.zip(mtu.filter(|_| is_learnt)).map(|(destination, mtu)| PathMtu { destination, mtu }))
}

/// Path MTUs by destination, the least of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PathMtusRead {
    least: HashMap<IpAddr, u32>,
    /// There are more than these.
    is_cut: bool,
}

impl PathMtusRead {
    /// Takes up one, unless there are too many.
    pub(super) fn take(&mut self, learnt: PathMtu) {
        let PathMtu { destination, mtu } = learnt;
        if self.least.len() < MOST_KNOWN || self.least.contains_key(&destination) {
            let least = self.least.entry(destination).or_insert(mtu);
            *least = mtu.min(*least);
        } else {
            self.is_cut = true;
        }
    }
}

/// Follows what the kernel learns.
#[derive(Debug, Default)]
pub(crate) struct PathMtus {
    v4: Learnt,
    v6: Learnt,
    /// As it was told last.
    unclear: Vec<Family>,
}

/// What the kernel has learnt of a family.
#[derive(Debug, Default)]
struct Learnt {
    known: HashMap<IpAddr, u32>,
    changes: Vec<HostChange>,
    questions: HashMap<Question, Asked>,
    due: Due<Question>,
    track: Track,
    back_off: BackOff,
    /// Messages are not heard, so all is read again and again.
    is_polled: bool,
    /// When all is read again.
    wanted: Option<Instant>,
    /// It is being read, since then.
    began: Option<Instant>,
    /// Addresses of which something was learnt meanwhile.
    touched: HashSet<IpAddr>,
}

/// Whether all is known that the kernel has learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Track {
    /// It is, or will be when questions have been answered.
    #[default]
    Kept,
    /// It is not; something is done about it then.
    Pausing(Instant),
    /// Messages have been thrown away; all is read then.
    Settling(Instant),
    /// All is being read.
    Reading { is_lost_again: bool },
}

/// A question that is asked several times.
#[derive(Clone, Copy, Debug)]
struct Asked {
    heard: Instant,
    times: usize,
    /// Another message came after it was asked first: when.
    again: Option<Instant>,
}

impl PathMtus {
    /// Begins with what was read.
    pub(crate) fn new([v4, v6]: [PathMtusRead; 2], now: Instant) -> Self {
        let mut new = Self { v4: Learnt::new(v4, now), v6: Learnt::new(v6, now), unclear: Vec::new() };
        new.unclear = new.unclear_now();
        new
    }

    /// Messages of a family are not heard, so all is to be read often.
    pub(crate) fn poll(&mut self, family: Family, now: Instant) {
        let learnt = self.of(family);
        learnt.is_polled = true;
        learnt.wanted = Some(now);
    }

    /// All that is known.
    pub(crate) fn facts(&self) -> (Vec<PathMtu>, Vec<Family>) {
        let known = self.v4.known.iter().chain(&self.v6.known);
        let all = known.map(|(destination, mtu)| PathMtu { destination: *destination, mtu: *mtu });
        (all.collect(), self.unclear.clone())
    }

    /// Whether messages of a family are to be heard now.
    pub(crate) fn listens(&self, family: Family) -> bool {
        let learnt = if family == Family::V4 { &self.v4 } else { &self.v6 };
        learnt.track == Track::Kept
    }

    /// A message came by which the kernel may learn something.
    pub(crate) fn hear(&mut self, question: Question, now: Instant) {
        self.of(question.destination.into()).hear(question, now);
    }

    /// Messages of a family, or answers, were lost.
    pub(crate) fn lose(&mut self, family: Family, now: Instant) {
        self.of(family).lose(now);
    }

    /// What to ask the kernel now: each question to be followed by [`Self::answered`].
    pub(crate) fn questions(&mut self, now: Instant) -> Vec<Question> {
        let mut questions = Vec::new();
        for learnt in [&mut self.v4, &mut self.v6] {
            learnt.next_questions(now, &mut questions);
        }
        questions
    }

    /// What the kernel has learnt of an address.
    pub(crate) fn answered(&mut self, question: &Question, mtu: Option<u32>, now: Instant) {
        if let Some(mtu) = mtu {
            self.of(question.destination.into()).learn(question.destination, mtu, now);
        }
    }

    /// When the time is to be handed over next, at the latest; `is_busy` while something is being read.
    pub(crate) fn due(&self, is_busy: bool) -> Option<Instant> {
        [&self.v4, &self.v6].into_iter().filter_map(|learnt| learnt.next_due(is_busy)).min()
    }

    /// A family whose messages are to be thrown away now, since all will be read.
    pub(crate) fn start_settling(&mut self, now: Instant) -> Option<Family> {
        [Family::V4, Family::V6].into_iter().find(|family| self.of(*family).start_settling(now))
    }

    /// A family of which all is to be read now.
    pub(crate) fn start_reading(&mut self, now: Instant) -> Option<Family> {
        [Family::V4, Family::V6].into_iter().find(|family| self.of(*family).start_reading(now))
    }

    /// It could not be read.
    pub(crate) fn give_up(&mut self, family: Family, now: Instant) {
        self.of(family).give_up(now);
    }

    /// Takes up what was read. `routes` is how many routes there are.
    pub(crate) fn finish_reading(&mut self, family: Family, read: PathMtusRead, routes: usize, now: Instant) {
        self.of(family).finish_reading(read, routes, now);
    }

    /// What has changed since.
    pub(crate) fn changes(&mut self) -> Vec<HostChange> {
        let mut changes = std::mem::take(&mut self.v4.changes);
        changes.append(&mut self.v6.changes);
        let unclear = self.unclear_now();
        if unclear != self.unclear {
            self.unclear.clone_from(&unclear);
            changes.push(HostChange::UnclearPathMtus(unclear));
        }
        changes
    }

    fn unclear_now(&self) -> Vec<Family> {
        [Family::V4, Family::V6].into_iter().filter(|family| !self.listens(*family)).collect()
    }

    fn of(&mut self, family: Family) -> &mut Learnt {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

impl Learnt {
    fn new(read: PathMtusRead, now: Instant) -> Self {
        let mut new = Self { known: read.least, wanted: Some(now + PAUSE), ..Self::default() };
        if read.is_cut {
            new.lose(now);
        }
        new
    }

    fn hear(&mut self, question: Question, now: Instant) {
        if self.track != Track::Kept {
            return;
        }
        if let Some(asked) = self.questions.get_mut(&question) {
            if asked.times > 0 {
                asked.again = Some(now);
            }
            return;
        }
        if self.questions.len() >= MOST_QUESTIONS {
            return self.lose(now);
        }
        self.questions.insert(question, Asked { heard: now, times: 0, again: None });
        self.due.push(Reverse((now, question)));
    }

    fn next_questions(&mut self, now: Instant, questions: &mut Vec<Question>) {
        for _ in 0..MOST_AT_ONCE {
            let Some(Reverse((_, question))) = self.due.pop_if_due(now) else { return };
            let Some(asked) = self.questions.get_mut(&question) else { continue };
            questions.push(question);
            asked.times += 1;
            if asked.times == ASKED_AFTER.len() {
                // Of messages that came meanwhile, the last one counts.
                let Some(heard) = asked.again else {
                    self.questions.remove(&question);
                    continue;
                };
                *asked = Asked { heard, times: 1, again: None };
            }
            self.due.push(Reverse((asked.heard + ASKED_AFTER[asked.times], question)));
        }
    }

    fn learn(&mut self, destination: IpAddr, mtu: u32, now: Instant) {
        if self.began.is_some() {
            self.touched.insert(destination);
        }
        let known = self.known.get(&destination).copied();
        if known.is_none() && self.known.len() >= MOST_KNOWN {
            return self.lose(now);
        }
        // That of another route may be the greater one.
        self.set(destination, known.map_or(mtu, |known| known.min(mtu)));
    }

    fn set(&mut self, destination: IpAddr, mtu: u32) {
        if self.known.insert(destination, mtu) != Some(mtu) {
            self.changes.push(HostChange::PathMtu(PathMtu { destination, mtu }));
        }
    }

    fn lose(&mut self, now: Instant) {
        match &mut self.track {
            Track::Kept | Track::Settling(_) => self.lose_again(now),
            Track::Reading { is_lost_again } => *is_lost_again = true,
            // Messages are thrown away before all is read.
            Track::Pausing(_) => {}
        }
    }

    fn lose_again(&mut self, now: Instant) {
        if self.track == Track::Kept {
            tracing::debug!("what path MTUs the kernel has learnt is not clear");
        }
        self.questions = HashMap::new();
        self.due.clear();
        self.track = Track::Pausing(now + self.back_off.next(now));
    }

    fn next_due(&self, is_busy: bool) -> Option<Instant> {
        let question = self.due.peek().map(|Reverse((at, _))| *at);
        let other = match self.track {
            Track::Kept => self.wanted.filter(|_| !is_busy && self.began.is_none()),
            Track::Pausing(until) => Some(until).filter(|_| self.began.is_none()),
            Track::Settling(until) => Some(until).filter(|_| !is_busy),
            Track::Reading { .. } => None,
        };
        question.into_iter().chain(other).min()
    }

    fn start_settling(&mut self, now: Instant) -> bool {
        // A reading that began before is of no use.
        match self.track {
            Track::Pausing(until) if until <= now && self.began.is_none() => {
                self.track = Track::Settling(now + SETTLE);
                true
            }
            _ => false,
        }
    }

    fn start_reading(&mut self, now: Instant) -> bool {
        match self.track {
            _ if self.began.is_some() => return false,
            Track::Kept if self.wanted.is_some_and(|wanted| wanted <= now) => {}
            Track::Settling(until) if until <= now => self.track = Track::Reading { is_lost_again: false },
            _ => return false,
        }
        self.wanted = None;
        self.began = Some(now);
        true
    }

    fn give_up(&mut self, now: Instant) {
        self.began = None;
        self.touched = HashSet::new();
        if self.track == Track::Kept && !self.is_polled {
            // All that is new is heard.
            self.wanted = Some(now + PAUSE);
        } else {
            self.lose_again(now);
        }
    }

    fn finish_reading(&mut self, read: PathMtusRead, routes: usize, now: Instant) {
        let took = self.began.take().map_or(Duration::ZERO, |began| now - began);
        let touched = std::mem::take(&mut self.touched);
        let pause = if self.is_polled {
            POLLED.saturating_mul(u32::try_from(routes / POLLED_ROUTES).unwrap_or(u32::MAX).saturating_add(1))
        } else {
            PAUSE.max(took * PAUSE_SHARE)
        };
        self.wanted = Some(now + pause);
        if read.is_cut {
            return self.lose_again(now);
        }
        let is_gone =
            |destination: &IpAddr| !read.least.contains_key(destination) && !touched.contains(destination);
        let gone: Vec<IpAddr> =
            self.known.keys().filter(|destination| is_gone(destination)).copied().collect();
        for destination in gone {
            self.known.remove(&destination);
            self.changes.push(HostChange::PathMtuGone(destination));
        }
        for (destination, mtu) in read.least {
            match self.known.get(&destination) {
                Some(known) if touched.contains(&destination) && *known <= mtu => {}
                _ => self.set(destination, mtu),
            }
        }
        match self.track {
            Track::Reading { is_lost_again: true } => self.lose_again(now),
            Track::Reading { is_lost_again: false } => {
                self.track = Track::Kept;
                self.back_off.settled(now);
            }
            Track::Kept | Track::Pausing(_) | Track::Settling(_) => {}
        }
        if self.known.len() > MOST_KNOWN {
            self.lose(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn address(number: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    fn question(number: u32) -> Question {
        Question { destination: address(number), source: address(0), tos: 0 }
    }

    fn read(all: &[(u32, u32)]) -> PathMtusRead {
        let mut read = PathMtusRead::default();
        for (number, mtu) in all {
            read.take(PathMtu { destination: address(*number), mtu: *mtu });
        }
        read
    }

    fn is(number: u32, mtu: u32) -> HostChange {
        HostChange::PathMtu(PathMtu { destination: address(number), mtu })
    }

    fn begin(known: &[(u32, u32)], now: Instant) -> PathMtus {
        PathMtus::new([read(known), PathMtusRead::default()], now)
    }

    /// After so many milliseconds.
    fn at(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_message_is_asked_about_at_once_and_twice_more() {
        let start = Instant::now();
        let mut mtus = begin(&[], start);
        mtus.hear(question(1), start);
        assert_eq!(mtus.due(false), Some(start));
        assert_eq!(mtus.questions(start), [question(1)]);
        mtus.answered(&question(1), None, start);
        assert_eq!(mtus.changes(), [], "the kernel may not have taken it up");
        assert_eq!(mtus.questions(at(start, 19)), []);
        assert_eq!(mtus.questions(at(start, 20)), [question(1)]);
        mtus.answered(&question(1), Some(1300), start);
        assert_eq!(mtus.changes(), [is(1, 1300)]);
        assert_eq!(mtus.questions(at(start, 150)), [question(1)]);
        mtus.answered(&question(1), Some(1300), start);
        assert_eq!((mtus.changes(), mtus.questions(at(start, 900))), (vec![], vec![]));
        assert_eq!(mtus.facts(), (vec![PathMtu { destination: address(1), mtu: 1300 }], vec![]));
    }

    #[test]
    fn however_many_messages_quote_a_packet_it_is_asked_about_at_intervals_and_after_the_last() {
        let start = Instant::now();
        let mut mtus = begin(&[], start);
        let mut times = Vec::new();
        for now in 0..1000 {
            if now <= 500 {
                mtus.hear(question(1), at(start, now));
            }
            times.extend(mtus.questions(at(start, now)).iter().map(|_| now));
        }
        assert!(times.len() < 20, "{times:?}");
        assert!(times.last().is_some_and(|last| (650..=700).contains(last)), "{times:?}");
    }

    #[test]
    fn an_answer_only_lessens_what_is_known_and_a_reading_of_all_says_what_is_gone() {
        let start = Instant::now();
        let mut mtus = begin(&[(1, 1300), (2, 1400), (3, 1350)], start);
        mtus.answered(&question(1), Some(1400), start);
        mtus.answered(&question(2), None, start);
        assert_eq!(mtus.changes(), [], "another route may have what is known");
        assert_eq!(mtus.start_reading(at(start, 4999)), None);
        let now = start + PAUSE;
        assert_eq!((mtus.due(false), mtus.start_reading(now)), (Some(now), Some(Family::V4)));
        // Learnt while it is read.
        mtus.answered(&question(4), Some(1200), now);
        mtus.answered(&question(3), Some(1250), now);
        mtus.changes();
        mtus.finish_reading(Family::V4, read(&[(1, 1400), (3, 1350)]), 0, now + SECOND);
        assert_eq!(mtus.changes(), [HostChange::PathMtuGone(address(2)), is(1, 1400)]);
        assert_eq!(mtus.start_reading(now + SECOND), Some(Family::V6));
        mtus.finish_reading(Family::V6, read(&[]), 0, now + SECOND);
        assert_eq!(mtus.due(false), Some(now + SECOND + PAUSE), "a short one is repeated after the pause");
    }

    #[test]
    fn a_reading_that_takes_long_is_repeated_seldom_and_one_that_fails_is_tried_again() {
        let start = Instant::now();
        let mut mtus = begin(&[(1, 1300)], start);
        let mut now = start + PAUSE;
        assert_eq!(mtus.start_reading(now), Some(Family::V4));
        now += SECOND;
        mtus.finish_reading(Family::V4, read(&[(1, 1300)]), 0, now);
        assert_eq!(mtus.start_reading(now), Some(Family::V6));
        mtus.give_up(Family::V6, now);
        assert_eq!(mtus.changes(), [], "what is new is heard all the same");
        assert_eq!(mtus.start_reading(now + PAUSE), Some(Family::V6));
        assert_eq!(mtus.start_reading(now + PAUSE * 9), None);
        assert_eq!(mtus.start_reading(now + PAUSE_SHARE * SECOND), Some(Family::V4));
    }

    /// Loses and reads until path MTUs are clear; returns how long that took.
    fn clear_up(mtus: &mut PathMtus, start: Instant) -> Duration {
        let mut now = start;
        for _ in 0..1000 {
            now = mtus.due(false).unwrap();
            assert_eq!(mtus.questions(now), []);
            mtus.start_settling(now);
            if let Some(family) = mtus.start_reading(now) {
                assert!(family == Family::V6 || !mtus.listens(family), "only what is unclear");
                mtus.finish_reading(family, read(&[(1, 1300)]), 0, now);
            }
            if mtus.listens(Family::V4) {
                break;
            }
        }
        now - start
    }

    #[test]
    fn too_many_questions_make_the_family_unclear_until_all_has_been_read() {
        let start = Instant::now();
        let mut mtus = begin(&[(1, 1300)], start);
        let most = u32::try_from(MOST_QUESTIONS).unwrap();
        (0..most).for_each(|number| mtus.hear(question(number), start));
        assert_eq!((mtus.changes(), mtus.listens(Family::V4)), (vec![], true));
        assert_eq!(mtus.questions(start).len(), MOST_AT_ONCE, "the rest in the next turns");
        mtus.hear(question(most), start);
        assert_eq!(mtus.changes(), [HostChange::UnclearPathMtus(vec![Family::V4])]);
        assert!(!mtus.listens(Family::V4) && mtus.listens(Family::V6));
        mtus.hear(question(1), start);
        assert_eq!(mtus.questions(start), [], "it will be read");
        assert_eq!(mtus.facts().1, [Family::V4]);

        assert_eq!(clear_up(&mut mtus, start), SETTLE, "the first time there is no pause");
        assert_eq!(mtus.changes(), [HostChange::UnclearPathMtus(vec![])]);
        mtus.hear(question(2), start + SECOND);
        assert_eq!(mtus.questions(start + SECOND), [question(2)]);
    }

    #[test]
    fn who_loses_messages_again_and_again_is_read_after_pauses_that_grow() {
        let start = Instant::now();
        let mut mtus = begin(&[], start);
        mtus.lose(Family::V4, start);
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert_eq!(mtus.start_settling(now), Some(Family::V4));
            now += SETTLE;
            assert_eq!(mtus.start_reading(now), Some(Family::V4));
            mtus.lose(Family::V4, now);
            mtus.finish_reading(Family::V4, read(&[]), 0, now);
            assert!(!mtus.listens(Family::V4));
            let due = mtus.of(Family::V4).next_due(false).unwrap();
            pauses.push((due - now).as_millis());
            now = due;
        }
        assert_eq!(pauses[..4], [10, 20, 40, 80]);
        assert_eq!(pauses[9..], [5000; 3]);
    }

    #[test]
    fn more_addresses_than_are_kept_are_unclear() {
        let start = Instant::now();
        let most = u32::try_from(MOST_KNOWN).unwrap();
        let all: Vec<_> = (0..most).map(|number| (number, 1300)).collect();
        let mut mtus = begin(&all, start);
        assert_eq!(mtus.facts().1, []);
        mtus.answered(&question(0), Some(1200), start);
        mtus.answered(&question(most), Some(1300), start);
        assert_eq!(mtus.changes(), [is(0, 1200), HostChange::UnclearPathMtus(vec![Family::V4])]);

        let more: Vec<_> = (0..=most).map(|number| (number, 1300)).collect();
        let mut mtus = begin(&more, start);
        assert_eq!(mtus.facts().1, [Family::V4]);
        assert_eq!(mtus.facts().0.len(), MOST_KNOWN);
        mtus.start_settling(start);
        assert_eq!(mtus.start_reading(start + SETTLE), Some(Family::V4));
        mtus.finish_reading(Family::V4, read(&more), 0, start + SETTLE);
        assert!(!mtus.listens(Family::V4), "still too many");
    }

    #[test]
    fn where_nothing_is_heard_all_is_read_five_times_a_second_or_in_proportion_to_the_routes() {
        let start = Instant::now();
        let mut mtus = begin(&[], start);
        mtus.poll(Family::V4, start);
        assert_eq!(mtus.start_reading(start), Some(Family::V4));
        assert_eq!(mtus.due(false).map(|due| due - start), Some(PAUSE), "of the other family");
        mtus.finish_reading(Family::V4, read(&[(1, 1300)]), 1999, start);
        assert_eq!((mtus.changes(), mtus.due(false)), (vec![is(1, 1300)], Some(at(start, 200))));
        assert_eq!(mtus.due(true), None, "something is being read");
        assert_eq!(mtus.start_reading(at(start, 200)), Some(Family::V4));
        mtus.finish_reading(Family::V4, read(&[(1, 1300)]), 10_000, at(start, 200));
        assert_eq!(mtus.due(false), Some(at(start, 1400)));
    }

    /// `struct rtmsg` with a destination, metrics and `struct rta_cacheinfo`.
    fn message(flags: u32, mtu: Option<u32>, expires: i32) -> Vec<u8> {
        let mut message = vec![2, 32, 0, 0, 254, 0, 0, 1];
        message.extend(flags.to_ne_bytes());
        let mut attribute = |kind: u16, value: &[u8]| {
            message.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value);
        };
        attribute(RTA_DST, &[10, 0, 0, 1]);
        if let Some(mtu) = mtu {
            let metric = [8_u16.to_ne_bytes(), RTAX_MTU.to_ne_bytes()].concat();
            attribute(RTA_METRICS, &[metric, mtu.to_ne_bytes().to_vec()].concat());
        }
        let numbers = [0, 0, expires, 0, 0, 0, 0, 0].map(i32::to_ne_bytes);
        attribute(RTA_CACHEINFO, &numbers.concat());
        message
    }

    #[test]
    fn what_expires_and_is_no_route_is_learnt() {
        let found = |flags, mtu, expires| learnt(&message(flags, mtu, expires)).unwrap();
        assert_eq!(
            found(RTM_F_CLONED, Some(1300), 59_000),
            Some(PathMtu { destination: address(1), mtu: 1300 })
        );
        assert_eq!(found(RTM_F_CLONED, Some(1300), 0), None, "the route's own");
        assert_eq!(found(RTM_F_CLONED, Some(1300), -1), None, "it has expired");
        assert_eq!(found(RTM_F_CLONED, None, 59_000), None, "another gateway");
        assert_eq!(found(0, Some(1300), 59_000), None, "a route with a lifetime");
        let whole = message(RTM_F_CLONED, Some(1300), 59_000);
        for length in 0..whole.len() {
            assert!(learnt(&whole[..length]).is_ok_and(|found| found.is_none()) || length < 12);
        }
        learnt(&whole[..11]).unwrap_err();
    }
}
