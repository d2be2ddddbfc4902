//! The order of things, in random orders of events, stalls and failures, under a clock that is a number.
//!
//! A [`World`] is the kernel and the host as they are; what it tells comes late, or not at all. The driver is as slow, and
//! polls as late, as it likes, and the table may fail. Whatever happens:
//!
//! - a packet is fast only if its policy was there at some moment of the lease that ends now, and its device up at some;
//! - after a removal that a guard has seen begin, no packet of the policy is fast, not even once;
//! - a policy is not fast from the second on in which the kernel deletes it for its age;
//! - after a hold has been told to be in effect, no packet of the policy is fast until it is released;
//! - the fast path is turned on only while all that was handed over is written, and no input has lost track;
//! - and when everything has calmed down, exactly the policies are fast that may be.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use super::{Action, HoldId, HoldTarget, Input, Mirror, mutation::Mutation};
use crate::{
    MemoryTable, OffloadTable as _, Policy, PolicyEvent, PolicyId, SecurityAssociation, Selector, Snapshot,
    compiler::Flow,
    event::StaleCause,
    host::{HostEvent, HostFacts, HostStaleCause, Link},
    policy::{Direction, Egress, Family, NextHop, OffloadDev, OffloadKind, Overhead, Template},
    table::{ReadBack as _, Removals, Slot, TableConfig, Verdict},
};

const LEASE: Duration = Duration::from_secs(1);
const POLICIES: u8 = 3;
pub(super) const NIC: u32 = 7;
/// The wall clock at the beginning, in seconds.
const START: u64 = 1_000_000;
/// Seconds that a policy with a hard lifetime has.
const LIFETIME: u64 = 4;

#[derive(Clone, Copy, Debug)]
enum Step {
    Add(u8),
    AddForATime(u8),
    Remove(u8),
    /// While a guard watches.
    RemoveSeen(u8),
    /// What was removed while a guard watched is told.
    Tell,
    Link(bool),
    LoseTrack,
    Resynchronise,
    ResynchroniseHost,
    Read(u8),
    ReadHost,
    Ask(Input),
    /// The driver has no processor between asking and passing the answer on.
    AskAndStall(Input, u16),
    Look,
    LookForRemovals,
    Act(u8),
    /// The table takes its time.
    ActSlowly(u16),
    Fail,
    Wait(u16),
    Kill(bool),
    Hold(u8),
    Release,
    /// What a driver does when it works.
    Turn,
}

/// When a policy ends for its age, if it does.
type Life = Option<u64>;

struct World {
    now: Instant,
    began: Instant,
    mirror: Mirror,
    table: MemoryTable,
    enabled: bool,
    until: Option<Instant>,
    removals: Removals,
    fails: bool,
    has_failed: bool,
    /// What there is: for each policy, when it ends for its age, if it is there.
    present: [Option<Life>; POLICIES as usize],
    /// When each was there last.
    was_present: [Option<Instant>; POLICIES as usize],
    /// When the device was up last.
    was_up: Instant,
    /// Removed while a guard watched, and not added since.
    seen_removed: BTreeSet<u8>,
    link: bool,
    untold: Vec<PolicyEvent>,
    policies: VecDeque<PolicyEvent>,
    host: VecDeque<HostEvent>,
    has_lost_track: bool,
    has_lost_host: bool,
    /// Whether that was handed over.
    stale: [bool; 2],
    is_killed: bool,
    holds: Vec<(HoldId, u8, bool)>,
    settling: Option<u64>,
    /// Times that a packet was fast when looked at.
    fast: usize,
}

impl World {
    fn new(mutation: Option<Mutation>) -> Self {
        let config = TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 8 };
        let table = MemoryTable::new(&config);
        let mut mirror = Mirror::new(table.capacity(), LEASE);
        mirror.mutation = mutation;
        let now = Instant::now();
        let mut world = Self {
            now,
            began: now,
            mirror,
            table,
            enabled: false,
            until: None,
            removals: Removals::default(),
            fails: false,
            has_failed: false,
            present: [None; POLICIES as usize],
            was_present: [None; POLICIES as usize],
            was_up: now,
            seen_removed: BTreeSet::new(),
            link: true,
            untold: Vec::new(),
            policies: VecDeque::new(),
            host: VecDeque::new(),
            has_lost_track: true,
            has_lost_host: true,
            stale: [true; 2],
            is_killed: false,
            holds: Vec::new(),
            settling: None,
            fast: 0,
        };
        world.add(0, None);
        world.resynchronise();
        world.resynchronise_host();
        world
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(START) + (self.now - self.began)
    }

    fn seconds(&self) -> u64 {
        START + (self.now - self.began).as_secs()
    }

    fn step(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Add(which) => self.add(which, None),
            Step::AddForATime(which) => self.add(which, Some(self.seconds() + LIFETIME)),
            Step::Remove(which) => {
                self.present[usize::from(which)] = None;
                self.tell(PolicyEvent::PolicyRemoved(id(which)));
            }
            Step::RemoveSeen(which) => {
                self.removals.begun += 1;
                self.present[usize::from(which)] = None;
                self.seen_removed.insert(which);
                self.untold.push(PolicyEvent::PolicyRemoved(id(which)));
            }
            Step::Tell => self.tell_all(),
            Step::Link(up) => {
                self.link = up;
                if !std::mem::replace(&mut self.has_lost_host, true) {
                    self.host.push_back(HostEvent::Stale(HostStaleCause::Changed));
                }
            }
            Step::LoseTrack => {
                if !std::mem::replace(&mut self.has_lost_track, true) {
                    self.policies.clear();
                    self.policies.push_back(PolicyEvent::Stale(StaleCause::Overrun));
                }
            }
            Step::Resynchronise => self.resynchronise(),
            Step::ResynchroniseHost => self.resynchronise_host(),
            Step::Read(events) => self.read(usize::from(events)),
            Step::ReadHost => self.read_host(),
            Step::Ask(input) => {
                if self.has_nothing_to_tell(input) {
                    self.mirror.handle_caught_up(input, self.now);
                }
            }
            Step::AskAndStall(input, milliseconds) => {
                let (asked, nothing) = (self.now, self.has_nothing_to_tell(input));
                self.wait(milliseconds)?;
                if nothing {
                    self.mirror.handle_caught_up(input, asked);
                }
            }
            Step::Look => self.mirror.handle_time(self.now, self.wall()),
            Step::LookForRemovals => self.mirror.handle_removals(self.removals, self.now),
            Step::Act(actions) => self.act(usize::from(actions), 0)?,
            Step::ActSlowly(milliseconds) => self.act(4, milliseconds)?,
            Step::Fail => self.fails = true,
            Step::Wait(milliseconds) => self.wait(milliseconds)?,
            Step::Kill(on) => {
                self.is_killed = on;
                self.mirror.set_kill_switch(on);
                self.act(1, 0)?;
            }
            Step::Hold(which) => {
                let hold = self.mirror.hold(HoldTarget::Policy(id(which)));
                self.holds.push((hold, which, false));
            }
            Step::Release => {
                if let Some((hold, ..)) = self.holds.pop() {
                    assert!(self.mirror.release(hold));
                }
            }
            Step::Turn => self.turn()?,
        }
        self.check()
    }

    fn add(&mut self, which: u8, expires: Option<u64>) {
        // What was removed is told of before it is added again: both are under one lock.
        self.tell_all();
        self.present[usize::from(which)] = Some(expires);
        self.seen_removed.remove(&which);
        self.tell(PolicyEvent::Policy(Policy { expires, ..policy(which) }));
    }

    fn tell(&mut self, event: PolicyEvent) {
        if !self.has_lost_track {
            self.policies.push_back(event);
        }
    }

    fn tell_all(&mut self) {
        for event in std::mem::take(&mut self.untold) {
            self.tell(event);
        }
    }

    fn resynchronise(&mut self) {
        if std::mem::take(&mut self.has_lost_track) {
            self.tell_all();
            let present = (0..POLICIES).filter_map(|which| Some((which, self.present[usize::from(which)]?)));
            let policies = present.map(|(which, expires)| Policy { expires, ..policy(which) });
            let sas = (0..POLICIES).map(sa).collect();
            let snapshot = Snapshot { policies: policies.collect(), sas, ..Snapshot::default() };
            self.policies.push_back(PolicyEvent::Snapshot(snapshot));
        }
    }

    fn resynchronise_host(&mut self) {
        if std::mem::take(&mut self.has_lost_host) {
            self.host.push_back(HostEvent::Snapshot(facts(self.link)));
        }
    }

    fn has_nothing_to_tell(&self, input: Input) -> bool {
        match input {
            Input::Policies => self.policies.is_empty() && !self.has_lost_track,
            Input::Host => self.host.is_empty() && !self.has_lost_host,
            Input::Clock => false,
        }
    }

    fn read(&mut self, events: usize) {
        for event in self.policies.drain(..events.min(self.policies.len())) {
            match &event {
                PolicyEvent::Stale(_) => self.stale[0] = true,
                PolicyEvent::Snapshot(_) => self.stale[0] = false,
                _ => {}
            }
            self.mirror.handle_policy_event(event, self.now);
        }
    }

    fn read_host(&mut self) {
        for event in self.host.drain(..) {
            self.stale[1] = matches!(event, HostEvent::Stale(_));
            self.mirror.handle_host_event(event, self.now);
        }
    }

    /// Does what is to be done, but no more than so many things.
    fn act(&mut self, most: usize, milliseconds: u16) -> Result<(), String> {
        for _ in 0..most {
            let Some(action) = self.mirror.poll_action() else { break };
            match action {
                Action::Disable => self.enabled = false,
                Action::Write(update) => {
                    let fails = std::mem::take(&mut self.fails);
                    self.has_failed |= fails;
                    if fails {
                        self.enabled = false;
                    } else {
                        self.table.apply(&update).map_err(|error| error.to_string())?;
                    }
                    self.wait(milliseconds)?;
                    self.mirror.handle_written(!fails);
                }
                Action::Renew { until } => self.until = Some(until),
                Action::Enable => {
                    let is_told = self.policies_are_written();
                    if self.stale.contains(&true) || self.is_killed || self.has_failed || !is_told {
                        return Err(format!("turned on: stale {:?}, told and written {is_told}", self.stale));
                    }
                    self.enabled = true;
                }
                Action::Settle { removals } => self.settling = Some(removals),
                Action::Acknowledge { removals } => self.removals.acknowledged = removals,
                Action::Held(held) => {
                    self.holds
                        .iter_mut()
                        .filter(|(hold, ..)| *hold == held)
                        .for_each(|(.., told)| *told = true);
                }
                other => return Err(format!("{other:?} without any interface")),
            }
            self.check()?;
        }
        if let Some(removals) = self.settling.take() {
            self.tell_all();
            self.mirror.handle_settled(removals, self.now);
        }
        Ok(())
    }

    /// Whether the table says of each policy what the mirror's database does.
    fn policies_are_written(&self) -> bool {
        (0..POLICIES).all(|which| {
            let known = self.mirror.database().policy(&id(which));
            self.table_is_fast(which) <= known.is_some_and(|policy| !policy.held)
        })
    }

    fn turn(&mut self) -> Result<(), String> {
        self.mirror.handle_time(self.now, self.wall());
        self.mirror.handle_removals(self.removals, self.now);
        for _ in 0..2 {
            self.read(usize::MAX);
            self.read_host();
            for input in [Input::Policies, Input::Host] {
                if self.has_nothing_to_tell(input) {
                    self.mirror.handle_caught_up(input, self.now);
                }
            }
            self.act(usize::MAX, 0)?;
        }
        Ok(())
    }

    /// Lets time pass in small steps: the kernel deletes what has come of age, and tells of it.
    fn wait(&mut self, milliseconds: u16) -> Result<(), String> {
        let mut left = Duration::from_millis(milliseconds.into());
        while left > Duration::ZERO {
            let step = left.min(Duration::from_millis(100));
            left -= step;
            self.now += step;
            for which in 0..POLICIES {
                let aged = |expires: &Option<u64>| expires.is_some_and(|expires| expires <= self.seconds());
                if self.present[usize::from(which)].as_ref().is_some_and(aged) {
                    self.present[usize::from(which)] = None;
                    self.tell(PolicyEvent::PolicyRemoved(id(which)));
                }
            }
            self.check()?;
        }
        Ok(())
    }

    fn table_is_fast(&self, which: u8) -> bool {
        let [source, destination] = [1, 2].map(|side| [10, side, which, 9].into());
        match self.table.verdict(source, destination) {
            Some(Verdict::Fast { slot, .. }) => matches!(self.table.standing(slot), Some(Ok(_))),
            _ => false,
        }
    }

    fn is_fast(&self, which: u8) -> bool {
        self.enabled
            && self.until.is_some_and(|until| self.now < until)
            && self.removals.begun == self.removals.acknowledged
            && self.table_is_fast(which)
    }

    fn check(&mut self) -> Result<(), String> {
        if self.link {
            self.was_up = self.now;
        }
        for which in 0..POLICIES {
            let at = usize::from(which);
            if self.present[at].is_some() {
                self.was_present[at] = Some(self.now);
            }
            if !self.is_fast(which) {
                continue;
            }
            self.fast += 1;
            if self.has_failed {
                return Err(format!("{which} is fast in a table that could not be written"));
            }
            if self.was_present[at].is_none_or(|present| self.now > present + LEASE) {
                return Err(format!("{which} is fast, and has been gone for more than a lease"));
            }
            if self.now > self.was_up + LEASE {
                return Err(format!("{which} is fast, and its device has been down for more than a lease"));
            }
            if self.seen_removed.contains(&which) {
                return Err(format!("{which} is fast after a guard has seen its removal begin"));
            }
            if self.holds.iter().any(|(_, held, told)| *told && *held == which) {
                return Err(format!("{which} is fast although its hold is in effect"));
            }
            let known = self.mirror.database().policy(&id(which)).and_then(|policy| policy.expires);
            if self.present[at].is_none() && known.is_some_and(|expires| expires <= self.seconds()) {
                return Err(format!("{which} is fast after the end of its life"));
            }
        }
        Ok(())
    }

    /// Lets everything calm down.
    fn end(&mut self) -> Result<(), String> {
        self.step(Step::Kill(false))?;
        while !self.holds.is_empty() {
            self.step(Step::Release)?;
        }
        for step in [Step::Resynchronise, Step::Tell, Step::Turn, Step::ResynchroniseHost] {
            self.step(step)?;
        }
        // Removals that begin while others settle are settled next.
        for step in [Step::Wait(1), Step::Turn].repeat(4) {
            self.step(step)?;
        }
        let ends_soon = |expires: Option<u64>| expires.is_some_and(|expires| expires <= self.seconds() + 2);
        for which in 0..POLICIES {
            let expected = self.link
                && !self.has_failed
                && self.present[usize::from(which)].is_some_and(|expires| !ends_soon(expires));
            if self.is_fast(which) != expected {
                let [source, destination] = [1, 2].map(|side| [10, side, which, 9].into());
                let explanation = self.mirror.explain(&Flow::between(source, destination));
                return Err(format!("in the end {which} is to be fast: {expected}; {explanation}"));
            }
        }
        Ok(())
    }
}

fn id(which: u8) -> PolicyId {
    let net = |side: u8| format!("10.{side}.{which}.0/24").parse().unwrap();
    PolicyId::new(Direction::Out, Selector::between(net(1), net(2)).unwrap())
}

/// A host whose NIC is there, or is down.
fn facts(up: bool) -> HostFacts {
    let link = Link { ifindex: NIC, mtu: 1500, up, carrier: true, ..Link::default() };
    HostFacts { links: vec![link], ..HostFacts::vouched() }
}

fn template(which: u8) -> Template {
    Template::esp_tunnel([192, 0, 2, 1].into(), [192, 0, 2, 2].into(), u32::from(which) + 1)
}

pub(super) fn policy(which: u8) -> Policy {
    let offload = OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false };
    Policy {
        templates: [template(which)].into(),
        offload: Some(offload),
        egress: Egress { next_hop: NextHop::Device, max_length: Some(1400) },
        ..Policy::new(id(which))
    }
}

pub(super) fn sa(which: u8) -> SecurityAssociation {
    let overhead = Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16));
    let sa = SecurityAssociation::for_template(&template(which), u32::from(which) + 256);
    SecurityAssociation { offload: policy(which).offload, overhead, ..sa }
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..POLICIES;
    let input = || prop_oneof![Just(Input::Policies), Just(Input::Host)];
    prop_oneof![
        4 => which.clone().prop_map(Step::Add),
        1 => which.clone().prop_map(Step::AddForATime),
        4 => which.clone().prop_map(Step::Remove),
        3 => which.clone().prop_map(Step::RemoveSeen),
        1 => Just(Step::Tell),
        2 => any::<bool>().prop_map(Step::Link),
        2 => Just(Step::LoseTrack),
        3 => Just(Step::Resynchronise),
        3 => Just(Step::ResynchroniseHost),
        4 => (0..4u8).prop_map(Step::Read),
        2 => Just(Step::ReadHost),
        4 => input().prop_map(Step::Ask),
        3 => (input(), 0..1500u16).prop_map(|(input, milliseconds)| Step::AskAndStall(input, milliseconds)),
        3 => Just(Step::Look),
        3 => Just(Step::LookForRemovals),
        6 => (1..5u8).prop_map(Step::Act),
        2 => (0..1500u16).prop_map(Step::ActSlowly),
        6 => (0..1500u16).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Kill),
        2 => which.prop_map(Step::Hold),
        2 => Just(Step::Release),
        10 => Just(Step::Turn),
    ]
}

/// Steps, at one of which the table may fail.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let failure = prop_oneof![3 => Just(None), 1 => (0..40usize).prop_map(Some)];
    (proptest::collection::vec(step(), 0..60), failure).prop_map(|(mut steps, failure)| {
        if let Some(at) = failure {
            steps.insert(at.min(steps.len()), Step::Fail);
        }
        steps
    })
}

/// How often a packet was fast, or what went wrong.
fn run(steps: &[Step], mutation: Option<Mutation>) -> Result<usize, String> {
    let mut world = World::new(mutation);
    for step in steps {
        world.step(*step)?;
    }
    world.end()?;
    Ok(world.fast)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Whatever happens in whatever order, no packet is fast that must not be, and in the end all are that may be.
    #[test]
    fn nothing_is_fast_by_what_is_stale_unwritten_or_removed(steps in steps()) {
        if let Err(wrong) = run(&steps, None) {
            prop_assert!(false, "{wrong}");
        }
    }
}

/// It may have been asked before, at the same moment.
#[test]
fn a_source_that_was_asked_at_the_moment_of_settling_is_asked_again() {
    let steps = [Step::Add(2), Step::Turn, Step::RemoveSeen(2), Step::LookForRemovals, Step::Look];
    let then = [Step::Ask(Input::Policies), Step::Act(4), Step::Act(4), Step::Wait(10)];
    run(&[&steps[..], &then[..]].concat(), None).unwrap();
}

#[test]
fn every_broken_order_is_convicted_and_the_right_one_is_often_fast() {
    let mut runner = TestRunner::deterministic();
    let stories: Vec<Vec<Step>> =
        (0..1000).map(|_| steps().new_tree(&mut runner).unwrap().current()).collect();
    let fast: usize = stories.iter().map(|steps| run(steps, None).unwrap()).sum();
    assert!(fast > 5_000, "fast only {fast} times");
    for mutation in Mutation::ALL {
        let is_convicted = stories.iter().any(|steps| run(steps, Some(mutation)).is_err());
        assert!(is_convicted, "{mutation:?} was not noticed");
    }
}

/// What is written for so many packets takes long.
#[test]
fn what_concerns_many_cells_is_written_while_nothing_is_fast() {
    let host = |mirror: &mut Mirror, now| {
        mirror.handle_host_event(HostEvent::Snapshot(facts(false)), now);
    };
    let flush = |mirror: &mut Mirror, now| {
        mirror.handle_policy_event(PolicyEvent::Snapshot(Snapshot::default()), now);
    };
    let changes: [fn(&mut Mirror, Instant); 2] = [host, flush];
    for (change, (many, is_off_meanwhile)) in
        changes.into_iter().flat_map(|change| [(change, (1, true)), (change, (3, false))])
    {
        let mut world = World::new(None);
        let known = [Step::Resynchronise, Step::ResynchroniseHost, Step::Turn, Step::Turn];
        for step in [Step::Add(0), Step::Add(1), Step::Add(2)].into_iter().chain(known) {
            world.step(step).unwrap();
        }
        assert!(world.mirror.is_enabled());

        world.mirror.many = many;
        change(&mut world.mirror, world.now);
        let actions: Vec<Action> = std::iter::from_fn(|| {
            let action = world.mirror.poll_action()?;
            if matches!(action, Action::Write(_)) {
                world.mirror.handle_written(true);
            }
            Some(action)
        })
        .collect();
        let at = |is_it: fn(&Action) -> bool| actions.iter().position(is_it);
        let written =
            at(|action| matches!(action, Action::Write(_))).expect("a policy is not fast any longer");
        let disabled = at(|action| matches!(action, Action::Disable));
        assert_eq!(disabled.is_some_and(|disabled| disabled < written), is_off_meanwhile, "{actions:?}");
    }
}

/// A slot that no policy of this file has.
#[test]
fn the_table_of_the_model_says_nothing_of_what_is_not_there() {
    let world = World::new(None);
    assert!(!world.table_is_fast(0) && world.table.standing(Slot(0)).is_none());
}
