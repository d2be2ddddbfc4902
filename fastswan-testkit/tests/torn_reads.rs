//! A packet that meets a change of the table is decided as before it, as after it, or passes.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use fastswan::{
    OffloadTable as _, PassReason, XdpForwarder,
    forwarder::RunAction,
    policy::{Family, MacAddr, PortMatch},
    table::{
        Cell, Change, Contents, Exception, Fact, Forwarding, Forwards, Port, Ports as _, Probes, ReversePath,
        Side, Slot, TableConfig, TableCounters as _, TableUpdate, Verdict,
    },
};
use fastswan_testkit::{
    frames::Frame,
    lab::{self, Namespace},
    model::Model,
    prog_run,
};
use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};

/// The loopback device: frames claim to come in there, and leave there.
const INGRESS: u32 = 1;
const SENDER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
const PORT: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const SLOTS: u32 = 6;
const TABLES: usize = 1000;
/// After so many changes a slot is freed, and after as many more it is used again. That takes a grace period,
/// of milliseconds.
const REUSE: usize = 400;
const READERS: u64 = 2;
const CHANGES: usize = 20_000;
/// Cells, facts and guards of a family.
const MOST: usize = 50;
/// What the table is made for: 13 buckets, so that there is room for all of them, and not with every seed.
const MADE_FOR: u32 = 39;
const DECISIONS: usize = 60_000;

/// One test has the processors for itself, so that readers and writer run at the same time.
static PROCESSORS: Mutex<()> = Mutex::new(());

/// Where a forwarded frame goes, which tells whose it is.
type Answer = Result<[u8; 6], PassReason>;

fn address(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 0, 0, number).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into(),
    }
}

fn prefix(rng: &mut SmallRng, family: Family) -> IpNet {
    let shorter = *[0, 0, 1, 2, 3].choose(rng).expect("lengths");
    let longest = family.everything().max_prefix_len();
    IpNet::new(address(family, rng.random_range(0..8)), longest - shorter).expect("a length").trunc()
}

fn frames() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (source, destination) in (0..8).flat_map(|source| (0..8).map(move |to| (source, to))) {
            let (source, destination) = (address(family, source), address(family, destination));
            let frame = match family {
                Family::V4 => Frame::v4(&source.to_string(), &destination.to_string()),
                Family::V6 => Frame::v6(&source.to_string(), &destination.to_string()),
            };
            frames.push(frame.macs(SENDER, PORT).udp(1, 2).payload(8).build());
        }
    }
    frames
}

/// A few packets' time, so that some are done between two changes.
fn pause() {
    let until = Instant::now() + Duration::from_micros(5);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

fn port() -> Port {
    Port {
        ifindex: INGRESS,
        vlan: 0,
        receiver: INGRESS,
        address: PORT,
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    }
}

/// Contents of a table that change all the time.
trait Changing: Sized {
    /// Enough that the hash is nearly full.
    fn first(rng: &mut SmallRng) -> Self;
    /// The same after some changes.
    fn next(&self, rng: &mut SmallRng, number: usize) -> Self;
    /// Gives every cell another slot and every slot another way to leave: who reads only one of them as it is
    /// now gives an answer that no table gives.
    fn rotate_slots(&mut self, rng: &mut SmallRng, number: usize);
    fn add_cell(&mut self, rng: &mut SmallRng, family: Family);
    /// What the hash of a family holds.
    fn entries(&self, family: Family) -> usize;
    /// Gives a slot a way to leave that no other slot has, nor itself at another time.
    fn fill_slot(&mut self, rng: &mut SmallRng, slot: Slot, number: usize);
}

impl Changing for Contents {
    fn first(rng: &mut SmallRng) -> Self {
        let mut contents = Self::default();
        for family in [Family::V4, Family::V6] {
            contents.facts.insert((Side::Destination, family.everything()), Fact::Via(INGRESS));
            while contents.entries(family) < MOST - 4 {
                contents.add_cell(rng, family);
            }
        }
        for slot in 0..SLOTS {
            contents.fill_slot(rng, Slot(slot), 0);
        }
        contents
    }

    fn next(&self, rng: &mut SmallRng, number: usize) -> Self {
        let mut next = self.clone();
        if rng.random_ratio(1, 3) {
            next.rotate_slots(rng, number);
        }
        for _ in 0..rng.random_range(1..6) {
            let family = *[Family::V4, Family::V6].choose(rng).expect("families");
            let cell = Cell { source: prefix(rng, family), destination: prefix(rng, family) };
            match rng.random_range(0..20) {
                0..8 => next.add_cell(rng, family),
                8..14 => {
                    let of_family = next.cells.keys().filter(|cell| Family::of(&cell.source) == family);
                    let of_family: Vec<Cell> = of_family.copied().collect();
                    if of_family.len() > MOST - 16 {
                        next.cells.remove(of_family.choose(rng).expect("cells"));
                    }
                }
                14..16 => {
                    let slot = Slot(rng.random_range(0..SLOTS));
                    next.fill_slot(rng, slot, number);
                }
                16 => {
                    let key = (*[Side::Source, Side::Destination].choose(rng).expect("sides"), cell.source);
                    if next.facts.remove(&key).is_none() && next.entries(family) < MOST {
                        next.facts.insert(key, Fact::Denied);
                    }
                }
                17 => {
                    if !next.guards.remove(&cell.source) && next.entries(family) < MOST {
                        next.guards.insert(cell.source);
                    }
                }
                _ => {
                    let (source_port, destination_port) = (PortMatch::exactly(1), PortMatch::default());
                    let exception = Exception { cell, protocol: 17, source_port, destination_port };
                    if next.exceptions.len() == 3 {
                        next.exceptions.pop_first();
                    } else {
                        next.exceptions.insert(exception);
                    }
                }
            }
        }
        if number.is_multiple_of(REUSE) && next.slots.remove(&Slot(0)).is_none() {
            next.fill_slot(rng, Slot(0), number);
        }
        next
    }

    fn entries(&self, family: Family) -> usize {
        let cells = self.cells.keys().map(|cell| &cell.source);
        let prefixes = cells.chain(self.facts.keys().map(|(_, prefix)| prefix)).chain(&self.guards);
        prefixes.filter(|prefix| Family::of(prefix) == family).count()
    }

    fn rotate_slots(&mut self, rng: &mut SmallRng, number: usize) {
        for verdict in self.cells.values_mut() {
            if let Verdict::Fast { slot, .. } = verdict {
                *slot = Slot((slot.0 + 1) % SLOTS);
            }
        }
        let slots: Vec<Slot> = self.slots.keys().copied().collect();
        for slot in slots {
            self.fill_slot(rng, slot, number);
        }
    }

    fn add_cell(&mut self, rng: &mut SmallRng, family: Family) {
        let cell = Cell { source: prefix(rng, family), destination: prefix(rng, family) };
        if self.entries(family) == MOST && !self.cells.contains_key(&cell) {
            return;
        }
        let probes = Probes {
            destination: rng.random_bool(0.3),
            source: rng.random_bool(0.3),
            guards: rng.random_bool(0.3),
        };
        let slot = Slot(rng.random_range(0..SLOTS));
        let shadowed = rng.random_bool(0.1);
        let verdict =
            if shadowed { Verdict::Pass(PassReason::Shadowed) } else { Verdict::Fast { slot, probes } };
        self.cells.insert(cell, verdict);
    }

    fn fill_slot(&mut self, rng: &mut SmallRng, slot: Slot, number: usize) {
        let [.., high, low] = number.to_be_bytes();
        let mac = MacAddr([2, 1, 0, slot.0.to_be_bytes()[3], high, low]);
        let forwarding = Forwarding { ifindex: INGRESS, max_length: 1500, rewrite: Some((PORT, mac)) };
        let standing = if rng.random_bool(0.2) { Err(PassReason::NoSa) } else { Ok(forwarding) };
        self.slots.insert(slot, standing);
    }
}

/// What one thread has seen.
#[derive(Debug, Default)]
struct Tally {
    decisions: usize,
    forwarded: usize,
    /// Passed although neither table says so: a change was being written.
    updating: usize,
    /// During a change, or with one since the decision began.
    during_a_change: usize,
    /// So much has changed meanwhile that the answer says little.
    blurred: usize,
}

#[test]
fn no_packet_sees_half_of_a_change_while_all_of_the_table_changes() {
    if !lab::require_root("torn reads") {
        return;
    }
    let _alone = PROCESSORS.lock();
    let namespace = Namespace::new("torn").unwrap();
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);

    let frames = frames();
    let port = port();
    let mut contents = vec![Contents::first(&mut rng)];
    for number in 1..TABLES {
        contents.push(contents[number - 1].next(&mut rng, number));
    }
    // And all the way back, so that the first comes after the last.
    contents.extend(contents[1..TABLES - 1].iter().rev().cloned().collect::<Vec<_>>());
    let tables = contents.len();
    let first = contents[0].replacing(&Contents::default());
    let updates: Vec<TableUpdate> =
        (0..tables).map(|number| contents[(number + 1) % tables].replacing(&contents[number])).collect();
    let mut answers: Vec<Vec<Answer>> = contents[..TABLES]
        .iter()
        .map(|contents| {
            let mut model = Model::default();
            model.set_port(port);
            model.apply(&contents.replacing(&Contents::default()));
            let answer =
                |frame| Ok(model.forward(frame, INGRESS)?.frame[..6].try_into().expect("an address"));
            frames.iter().map(|frame| answer(frame)).collect()
        })
        .collect();
    answers.extend(answers[1..TABLES - 1].iter().rev().cloned().collect::<Vec<_>>());

    namespace.enter(|| {
        // So small that the hash is seeded anew now and then.
        let [cells_v4, cells_v6] = [MADE_FOR; 2];
        let (forwarder, mut table) =
            XdpForwarder::load(&TableConfig { cells_v4, cells_v6, exceptions: 4, slots: SLOTS }).unwrap();
        table.set_port(&port).unwrap();
        table.apply(&first).unwrap();
        table.set_enabled(true);
        table.renew_lease(Instant::now() + Duration::from_secs(3600));

        // Twice the number of changes that are done, and 1 more while one is being written.
        let progress = AtomicUsize::new(0);
        let (forwarder, frames, answers) = (&forwarder, &frames, &answers);
        let progress = &progress;
        let reader = |seed: u64| {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut tally = Tally::default();
            while tally.decisions < DECISIONS || progress.load(SeqCst) < 2 * CHANGES {
                tally.decisions += 1;
                let packet = rng.random_range(0..frames.len());
                let before = progress.load(SeqCst);
                let run = forwarder.run(&frames[packet], INGRESS).expect("the kernel runs the program");
                let after = progress.load(SeqCst);
                // The tables that were there at some moment in between.
                let there = before / 2..=after.div_ceil(2);
                tally.during_a_change += usize::from(there.clone().count() > 1);
                tally.blurred += usize::from(there.clone().count() > 3);
                let mut possible = there.map(|table| answers[table % tables][packet]);
                match run.action {
                    RunAction::Pass => tally.updating += usize::from(possible.all(|answer| answer.is_ok())),
                    RunAction::Transmit => {
                        tally.forwarded += 1;
                        let taken: Answer = Ok(run.frame[..6].try_into().expect("an address"));
                        assert!(
                            possible.any(|answer| answer == taken),
                            "packet {packet}, {taken:02x?}, progress {before} to {after}"
                        );
                    }
                    other => panic!("{other:?}"),
                }
            }
            tally
        };
        let (tallies, seeds, changes) = thread::scope(|scope| {
            let readers: Vec<_> =
                (0..READERS).map(|number| scope.spawn(move || reader(seed.wrapping_add(number)))).collect();
            let mut seeds = BTreeSet::new();
            let mut changes = 0;
            while readers.iter().any(|reader| !reader.is_finished()) {
                progress.store(2 * changes + 1, SeqCst);
                table.apply(&updates[changes % tables]).unwrap();
                changes += 1;
                progress.store(2 * changes, SeqCst);
                pause();
                if changes % 32 == 0 {
                    seeds.insert(prog_run::hash_start(forwarder).unwrap());
                }
            }
            let tallies: Vec<Tally> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
            (tallies, seeds, changes)
        });
        eprintln!("{changes} changes, {} seeds, {tallies:?}, {:?}", seeds.len(), table.passes());
        let sum = |part: fn(&Tally) -> usize| tallies.iter().map(part).sum::<usize>();
        let counted = |wanted| {
            table.passes().iter().find(|(reason, _)| *reason == wanted).map_or(0, |(_, packets)| *packets)
        };
        // What passes without being told to by either table met a change, and nothing else.
        assert!(sum(|tally| tally.updating) as u64 <= counted(PassReason::Updating));
        // Agreeing means something: packets were forwarded, met changes and a hash that was written anew, and
        // seldom so many changes at once that nearly any answer is right.
        let decisions = sum(|tally| tally.decisions);
        assert!(sum(|tally| tally.forwarded) > decisions / 50, "{tallies:?}");
        assert!(sum(|tally| tally.updating) > 0 && seeds.len() > 1, "{tallies:?}, {seeds:?}");
        assert!(sum(|tally| tally.blurred) < decisions / 10, "{tallies:?}");
    });
}

/// One change takes a guard away and adds an exception instead. A packet that looked for exceptions before it
/// and for guards after it would find neither.
#[test]
fn what_passes_before_and_after_a_change_passes_during_it() {
    if !lab::require_root("torn reads") {
        return;
    }
    let _alone = PROCESSORS.lock();
    let namespace = Namespace::new("gate").unwrap();
    let everything = Family::V4.everything();
    let all = Cell { source: everything, destination: everything };
    let probes = Probes { guards: true, ..Probes::default() };
    let forwarding = Forwarding { ifindex: INGRESS, max_length: 1500, rewrite: None };
    // Cells that are searched first and do not match keep the packet between the two for longer.
    let elsewhere = IpNet::from(address(Family::V4, 99));
    let idle = (0..=32_u8).flat_map(|length| {
        let short = IpNet::new(elsewhere.addr(), length).unwrap().trunc();
        let half = IpNet::new(elsewhere.addr(), 31).unwrap().trunc();
        [elsewhere, half].map(|destination| Cell { source: short, destination })
    });
    let cells = idle.take(60).map(|cell| (cell, Some(Verdict::Pass(PassReason::Shadowed))));
    let exception = Exception {
        cell: all,
        protocol: 17,
        source_port: PortMatch::default(),
        destination_port: PortMatch::default(),
    };
    let change = |guard, is_exception| {
        TableUpdate::from_iter([Change::Guard(everything, guard), Change::Exception(exception, is_exception)])
    };
    let changes = [change(false, true), change(true, false)];
    let frame = &frames()[0];

    namespace.enter(|| {
        let config = TableConfig { cells_v4: 128, cells_v6: 128, exceptions: 8, slots: SLOTS };
        let (forwarder, mut table) = XdpForwarder::load(&config).unwrap();
        table.set_port(&port()).unwrap();
        let fast = Verdict::Fast { slot: Slot(0), probes };
        let mut first = change(true, false);
        first.extend(cells.chain([(all, Some(fast))]).map(|(cell, verdict)| Change::Cell(cell, verdict)));
        first.push(Change::Slot(Slot(0), Some(Ok(forwarding))));
        table.apply(&first).unwrap();
        table.set_enabled(true);
        table.renew_lease(Instant::now() + Duration::from_secs(3600));

        let forwarder = &forwarder;
        let done = &AtomicUsize::new(0);
        let passes = || {
            let mut decisions = 0;
            while decisions < DECISIONS || done.load(SeqCst) < CHANGES {
                decisions += 1;
                let run = forwarder.run(frame, INGRESS).expect("the kernel runs the program");
                assert_eq!(run.action, RunAction::Pass);
            }
        };
        thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(passes)).collect();
            while readers.iter().any(|reader| !reader.is_finished()) {
                table.apply(&changes[done.load(SeqCst) % 2]).unwrap();
                done.fetch_add(1, SeqCst);
                pause();
            }
        });
        let reasons: Vec<PassReason> = table.passes().into_iter().map(|(reason, _)| reason).collect();
        assert_eq!(reasons, [PassReason::Updating, PassReason::Exception, PassReason::Guarded]);
        // Without either it would be forwarded.
        table.apply(&change(false, false)).unwrap();
        assert_eq!(forwarder.run(frame, INGRESS).unwrap().action, RunAction::Transmit);
    });
}
