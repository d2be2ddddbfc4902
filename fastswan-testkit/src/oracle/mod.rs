//! The oracle: the kernel judges what the mirror makes of its policies, packet by packet.
//!
//! Policies of different [kinds](Set) are added to a real kernel, changed and deleted. The mirror hears of it from
//! the kernel's own notifications, is told that some of the policies are offloaded, and fills the table of the XDP
//! program. Then packets near the borders of the policies are given to both, the program and the kernel:
//!
//! - the program says which tunnel it forwards a packet into: each has a next hop of its own, and nearly all policies have
//!   a tunnel of their own;
//! - the kernel says which policy it chooses: it asks for an association for it.
//!
//! A packet that the program forwards into another tunnel than that of the kernel's choice, or for any if the kernel has
//! none, drops the packet or delivers it, is **wrong**. One that the program passes is never wrong; how many of those
//! that could be fast are is the [fast share](SetReport::fast_share).
//!
//! On most machines nothing can offload a policy, and the kernel orders those that are in another way. There a model of
//! that order judges one more kind of policies. In a guest with the [software NIC](crate::guest::nic) policies are
//! really offloaded ([`Oracle::with_nic`]), and the kernel judges them, and [the model](ModelReport) too.
//!
//! `cargo testkit oracle --seed N` repeats a run exactly; `--mutant N` shows that the judge notices a
//! [broken rule](BrokenRule).

mod addresses;
mod chains;
pub mod facts;
mod judge;
mod mirror;
mod nest;
mod packets;
mod sets;

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
pub use fastswan::compiler::BrokenRule;
use fastswan::{
    NetlinkSource, PassReason, Policy,
    policy::{Action, Direction, Mark, Mode, PolicyType},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

pub use self::sets::Set;
use self::{
    chains::{Chains, Story},
    judge::{Judge, Kernel, Lab},
    mirror::{Fate, Mirror, is_of},
    nest::Nest,
    packets::Packet,
    sets::{World, is_promoted},
};
use crate::requests::Change;

/// Packets between two changes of the policies.
const PACKETS: u64 = 100;
/// How often the policies change until there are others.
const ROUNDS: u64 = 8;
/// Wrong decisions that are described.
const EXAMPLES: usize = 5;

/// A run to be.
#[derive(Clone, Debug)]
pub struct Oracle {
    seed: u64,
    decisions: u64,
    sets: Vec<Set>,
    broken: Option<BrokenRule>,
    nic: bool,
    adapters: Adapters,
}

/// What is around the sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Adapters {
    None,
    /// Random nests.
    Nests,
    /// One that strips policies of their offload, which is wrong.
    Filter,
}

/// Nests of adapters that each set is judged through.
const NESTS: u64 = 8;
/// Adapters around one another.
const DEPTH: u32 = 3;

impl Oracle {
    /// All sets where nothing offloads, with this many packets together.
    #[must_use]
    pub fn new(seed: u64, decisions: u64) -> Self {
        Self { seed, decisions, sets: Set::judged(false), broken: None, nic: false, adapters: Adapters::None }
    }

    /// All sets where the software NIC does, with this many packets together.
    #[must_use]
    pub fn with_nic(seed: u64, decisions: u64) -> Self {
        Self { sets: Set::judged(true), nic: true, ..Self::new(seed, decisions) }
    }

    /// Only these sets.
    #[must_use]
    pub fn sets(self, sets: &[Set]) -> Self {
        Self { sets: sets.to_vec(), ..self }
    }

    /// Breaks a rule of the compiler that is judged, on the sets whose policies overlap most.
    #[must_use]
    pub fn broken_rule(self, rule: BrokenRule) -> Self {
        let offloaded = if self.nic { Set::Offloaded } else { Set::OffloadedModel };
        Self { broken: Some(rule), ..self }.sets(&[Set::Nested, offloaded])
    }

    /// Judges through adapters, nested at random: several nests for each set.
    #[must_use]
    pub fn adapters(self) -> Self {
        Self { adapters: Adapters::Nests, ..self }
    }

    /// Judges through an adapter that takes the offload from some policies, which makes others fast.
    #[must_use]
    pub fn wrong_adapter(self) -> Self {
        Self { adapters: Adapters::Filter, ..self }.sets(&[Set::OffloadedModel])
    }

    /// Judges. `progress` gets the report of each set when it is done. Needs root.
    ///
    /// # Errors
    ///
    /// If the lab cannot be made, or the kernel or the mirror does not do what it is told.
    pub fn run(&self, mut progress: impl FnMut(&SetReport)) -> anyhow::Result<Report> {
        let lab = if self.nic { Lab::with_nic()? } else { Lab::new()? };
        let mut report = Report { seed: self.seed, sets: Vec::new() };
        let count = u64::try_from(self.sets.len()).unwrap_or(u64::MAX).max(1);
        for (number, set) in (0..).zip(&self.sets) {
            // The first ones take what is left over.
            let decisions = self.decisions / count + u64::from(number < self.decisions % count);
            let judged = self.judge(&lab, *set, decisions);
            let judged = judged.with_context(|| format!("{}, seed {}", set.name(), self.seed))?;
            progress(&judged);
            report.sets.push(judged);
        }
        Ok(report)
    }

    fn judge(&self, lab: &Lab, set: Set, decisions: u64) -> anyhow::Result<SetReport> {
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_mul(16).wrapping_add(set as u64));
        if self.adapters == Adapters::None {
            return self.judge_through(lab, &Nest::Plain, SetReport::new(set), rng, decisions);
        }
        let mut report = SetReport::new(set);
        for number in 1..=NESTS {
            let nest = match self.adapters {
                Adapters::Filter => Nest::Filter(rng.random()),
                _ => Nest::random(&mut rng, DEPTH),
            };
            let rng = StdRng::seed_from_u64(rng.random());
            report = self.judge_through(lab, &nest, report, rng, decisions * number / NESTS)?;
        }
        Ok(report)
    }

    /// Goes on until there are so many decisions.
    fn judge_through(
        &self,
        lab: &Lab,
        nest: &Nest,
        report: SetReport,
        rng: StdRng,
        decisions: u64,
    ) -> anyhow::Result<SetReport> {
        let set = report.set;
        let report = lab.enter(|| {
            let world = World::new(set, lab);
            let stories = match set {
                Set::OffloadedModel => chains::stories(None),
                Set::Offloaded => chains::stories(Some(lab.device())),
                _ => Vec::new(),
            };
            if set == Set::OffloadedModel {
                let (chains, mut sources) = Chains::new(nest.leaves());
                let open = move || sources.pop().context("each source of the model is opened once");
                let mirror = || Mirror::new(lab, open, nest, self.broken);
                Trial { judge: chains, world, rng, report }.hear(mirror, decisions, &stories)
            } else {
                let kernel = Kernel::new(lab)?;
                let mirror = || Mirror::new(lab, || Ok(NetlinkSource::open()?), nest, self.broken);
                Trial { judge: kernel, world, rng, report }.hear(mirror, decisions, &stories)
            }
        })?;
        let states = lab.states()?;
        ensure!(were_asked_for(&states), "the kernel keeps states: {states}");
        Ok(report)
    }
}

/// Whether all that the kernel keeps is what it may. For the flow of a state that waits for an association it would not ask
/// again; once in some hundred thousand decisions it keeps such a one although a listener refused it, for reasons unknown.
fn were_asked_for(states: &str) -> bool {
    let (all, waiting) = (states.matches("proto esp spi").count(), states.matches("spi 0x00000000 ").count());
    all == waiting && waiting <= 1
}

/// A set before its judge.
struct Trial<J> {
    judge: J,
    world: World,
    rng: StdRng,
    report: SetReport,
}

impl<J: Judge> Trial<J> {
    /// Judges random packets among random policies, and at last what the stories are about, so far as there are
    /// decisions left.
    fn hear(
        mut self,
        mirror: impl FnOnce() -> anyhow::Result<Mirror>,
        decisions: u64,
        stories: &[Story],
    ) -> anyhow::Result<SetReport> {
        let at_random = decisions.saturating_sub(stories.len().try_into().unwrap_or(decisions));
        // The first policies are there before the mirror is, the others come while it looks.
        let changes = self.world.renew(&mut self.rng);
        self.judge.make(&changes)?;
        let mut mirror = mirror()?;
        mirror.follow(if self.report.set == Set::OffloadedModel { changes.len() } else { 0 })?;
        let mut round = 0;
        'random: loop {
            for _ in 0..PACKETS {
                if self.report.decisions == at_random {
                    break 'random;
                }
                let packet = Packet::near(self.world.policies(), &mut self.rng);
                self.decide(&mirror, &packet)?;
            }
            round += 1;
            let changes = if round % ROUNDS == 0 {
                self.world.renew(&mut self.rng)
            } else {
                let database = mirror.database();
                self.world.change(&mut self.rng, |id| Some(database.policy(id)?.index))
            };
            self.judge.make(&changes)?;
            // The model tells by itself where it starts over.
            if self.report.set != Set::OffloadedModel && changes.contains(&Change::Resynchronise) {
                mirror.start_over()?;
            } else {
                mirror.follow(changes.len())?;
            }
            self.check_offload(&mirror)?;
        }
        let mut changes = self.world.clear();
        for story in stories {
            if self.report.decisions == decisions {
                break;
            }
            changes.extend_from_slice(&story.changes);
            self.judge.make(&changes)?;
            mirror.follow(changes.len())?;
            self.decide(&mirror, &story.packet)?;
            changes = emptied(&mirror);
        }
        Ok(self.report)
    }

    /// The mirror has heard what is really offloaded.
    fn check_offload(&self, mirror: &Mirror) -> anyhow::Result<()> {
        for policy in self.world.policies().iter().filter(|policy| policy.offload.is_some()) {
            let told = mirror.database().policy(&policy.id);
            let offload = told.and_then(|told| told.offload);
            ensure!(
                offload == policy.offload,
                "{}: offloaded as {:?}, told {told:?}",
                policy.id,
                policy.offload
            );
        }
        Ok(())
    }

    fn decide(&mut self, mirror: &Mirror, packet: &Packet) -> anyhow::Result<()> {
        let chosen = self.judge.choose(packet)?;
        let fate = mirror.run(packet)?;
        let report = &mut self.report;
        report.decisions += 1;
        report.executed += 1;
        let policy = chosen.and_then(|index| mirror.policy(index));
        let eligible = packet.plain && policy.is_some_and(is_eligible);
        report.eligible += u64::from(eligible);
        let right = match fate {
            Fate::Passed(reason) => {
                *report.passes.entry(reason).or_default() += 1;
                if eligible {
                    *report.eligible_passes.entry(reason).or_default() += 1;
                }
                return Ok(());
            }
            Fate::Fast(reqid) => policy.is_some_and(|policy| is_of(policy, reqid)),
            Fate::Strange => false,
        };
        report.fast += 1;
        if right {
            report.eligible_fast += u64::from(eligible);
            return Ok(());
        }
        report.wrong += 1;
        if report.examples.len() < EXAMPLES {
            let named = match fate {
                Fate::Fast(reqid) => describe(mirror.policy_of(reqid)),
                _ => "nothing known".to_owned(),
            };
            let Packet { source, destination, protocol, ports, .. } = packet;
            report.examples.push(format!(
                "{source} → {destination} protocol {protocol} ports {ports:?}: forwarded for {named}, \
                 the kernel chooses {}",
                describe(policy)
            ));
        }
        Ok(())
    }
}

/// Whether packets of a policy could be fast.
fn is_eligible(policy: &Policy) -> bool {
    let id = &policy.id;
    is_promoted(policy)
        && policy.action == Action::Allow
        && (id.direction, id.policy_type) == (Direction::Out, PolicyType::Main)
        && (id.mark, id.if_id, id.selector.ifindex) == (Mark::default(), 0, 0)
        && !id.selector.looks_at_upper_layer()
        && !policy.use_limited
        && !policy.withheld
        && !policy.disputed
        && policy.templates.iter().all(|template| template.mode == Mode::Tunnel && !template.optional)
}

/// What a run found.
#[derive(Clone, Debug)]
pub struct Report {
    /// What it can be repeated with.
    pub seed: u64,
    /// Each set's part.
    pub sets: Vec<SetReport>,
}

impl Report {
    /// Packets that were judged.
    #[must_use]
    pub fn decisions(&self) -> u64 {
        self.sets.iter().map(|set| set.decisions).sum()
    }

    /// Packets among them that the program ran on.
    #[must_use]
    pub fn executed(&self) -> u64 {
        self.sets.iter().map(|set| set.executed).sum()
    }

    /// Packets that it forwarded against the kernel's choice.
    #[must_use]
    pub fn wrong(&self) -> u64 {
        self.sets.iter().map(|set| set.wrong).sum()
    }

    /// The share of eligible packets that were fast.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn fast_share(&self) -> f64 {
        let sum = |count: fn(&SetReport) -> u64| self.sets.iter().map(count).sum::<u64>();
        sum(|set| set.eligible_fast) as f64 / sum(|set| set.eligible).max(1) as f64
    }

    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let sets: BTreeMap<&str, Value> =
            self.sets.iter().map(|report| (report.set.name(), report.json())).collect();
        json!({
            "decisions": self.decisions(),
            "executed": self.executed(),
            "wrong": self.wrong(),
            "fast_share": self.fast_share(),
            "seed": self.seed,
            "sets": sets,
        })
    }
}

/// What became of the packets of one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetReport {
    /// The set.
    pub set: Set,
    /// Packets that were judged.
    pub decisions: u64,
    /// Packets among them that the program ran on.
    pub executed: u64,
    /// Packets that it forwarded.
    pub fast: u64,
    /// Packets that it forwarded against the kernel's choice.
    pub wrong: u64,
    /// Packets that nothing kept from being fast but the table: the kernel chose an offloaded tunnel that asks for
    /// nothing but addresses.
    pub eligible: u64,
    /// How many of them were fast.
    pub eligible_fast: u64,
    /// Why packets were passed.
    pub passes: BTreeMap<PassReason, u64>,
    /// Why eligible packets were.
    pub eligible_passes: BTreeMap<PassReason, u64>,
    /// Some that were wrong.
    pub examples: Vec<String>,
}

impl SetReport {
    fn new(set: Set) -> Self {
        Self {
            set,
            decisions: 0,
            executed: 0,
            fast: 0,
            wrong: 0,
            eligible: 0,
            eligible_fast: 0,
            passes: BTreeMap::new(),
            eligible_passes: BTreeMap::new(),
            examples: Vec::new(),
        }
    }

    /// The share of eligible packets that were fast.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn fast_share(&self) -> f64 {
        self.eligible_fast as f64 / self.eligible.max(1) as f64
    }

    /// Whether fewer were fast than must be, of enough packets to tell.
    #[must_use]
    pub fn is_too_slow(&self) -> bool {
        self.eligible >= 1000 && self.set.least_fast_share().is_some_and(|least| self.fast_share() < least)
    }

    /// All of it; reasons are ranked.
    #[must_use]
    pub fn json(&self) -> Value {
        let reasons = |reasons| {
            let ranked = ranked(reasons).into_iter();
            ranked.map(|(reason, packets)| json!([reason.name(), packets])).collect::<Vec<_>>()
        };
        json!({
            "decisions": self.decisions,
            "executed": self.executed,
            "fast": self.fast,
            "wrong": self.wrong,
            "eligible": self.eligible,
            "fast_share": self.fast_share(),
            "too_slow": self.is_too_slow(),
            "pass_reasons": reasons(&self.passes),
            "eligible_pass_reasons": reasons(&self.eligible_passes),
            "examples": self.examples,
        })
    }
}

/// Reasons with their packets, the most frequent first.
#[must_use]
pub fn ranked(reasons: &BTreeMap<PassReason, u64>) -> Vec<(PassReason, u64)> {
    let mut ranked: Vec<_> = reasons.iter().map(|(reason, packets)| (*reason, *packets)).collect();
    ranked.sort_by_key(|(_, packets)| std::cmp::Reverse(*packets));
    ranked
}

/// How a model of the kernel's order for offloaded policies compares with the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelReport {
    /// Known sequences of changes that were told to the kernel.
    pub stories: u64,
    /// How many of them ended in another way.
    pub other_endings: u64,
    /// Packets that the kernel has chosen a policy for, among policies that changed at random.
    pub compared: u64,
    /// How many of them the model chooses a policy with another number for.
    pub disagreements: u64,
    /// Some of all these.
    pub examples: Vec<String>,
}

impl ModelReport {
    /// Compares. Where there is no software NIC, only policies that are not offloaded can be; the stories are about
    /// others. Needs root.
    ///
    /// # Errors
    ///
    /// If the lab cannot be made, or the kernel or the mirror does not do what it is told.
    pub fn compare(seed: u64, rounds: u64, nic: bool) -> anyhow::Result<Self> {
        let lab = if nic { Lab::with_nic()? } else { Lab::new()? };
        lab.enter(|| {
            let mut report = Self::default();
            let mut kernel = Kernel::new(&lab)?;
            let mut mirror = Mirror::new(&lab, || Ok(NetlinkSource::open()?), &Nest::Plain, None)?;
            mirror.follow(0)?;
            if nic {
                report.tell_stories(&lab, &mut kernel, &mut mirror)?;
            }
            let set = if nic { Set::Offloaded } else { Set::Nested };
            report.compare_at_random(set, seed, rounds, &lab, &mut kernel, &mut mirror)?;
            Ok(report)
        })
    }

    fn tell_stories(&mut self, lab: &Lab, kernel: &mut Kernel, mirror: &mut Mirror) -> anyhow::Result<()> {
        for Story { name, changes, packet, winner } in chains::stories(Some(lab.device())) {
            let changes = [emptied(mirror), changes].concat();
            kernel.make(&changes)?;
            mirror.follow(changes.len())?;
            let chosen = kernel.choose(&packet)?.and_then(|index| mirror.policy(index));
            let chosen = chosen.map(|policy| policy.id.clone());
            self.stories += 1;
            if chosen != winner {
                self.other_endings += 1;
                self.example(format!("{name}: the kernel chooses {chosen:?} instead of {winner:?}"));
            }
        }
        Ok(())
    }

    fn compare_at_random(
        &mut self,
        set: Set,
        seed: u64,
        rounds: u64,
        lab: &Lab,
        kernel: &mut Kernel,
        mirror: &mut Mirror,
    ) -> anyhow::Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut world = World::new(set, lab);
        let (mut chains, _sources) = Chains::new(0);
        for round in 0..rounds {
            let mut changes = if round == 0 {
                [emptied(mirror), world.renew(&mut rng)].concat()
            } else if round % 6 == 0 {
                world.renew(&mut rng)
            } else {
                let database = mirror.database();
                world.change(&mut rng, |id| Some(database.policy(id)?.index))
            };
            changes.retain(|change| *change != Change::Resynchronise);
            if !lab.offloads() {
                changes.iter_mut().for_each(in_software);
            }
            kernel.make(&changes)?;
            for change in &changes {
                chains.change(change);
            }
            mirror.follow(changes.len())?;
            for _ in 0..PACKETS {
                let packet = Packet::near(world.policies(), &mut rng);
                let Some(theirs) = kernel.choose(&packet)?.and_then(|index| mirror.policy(index)) else {
                    continue;
                };
                let ours = chains.choose(&packet)?.and_then(|index| chains.policy(index));
                self.compared += 1;
                // After updates, the order of equals depends on the shape of the kernel's tree.
                if ours.map(|policy| policy.priority) != Some(theirs.priority) {
                    self.disagreements += 1;
                    let Packet { source, destination, .. } = packet;
                    let ours = describe(ours);
                    let theirs = describe(Some(theirs));
                    self.example(format!(
                        "round {round}: {source} → {destination}: the model chooses {ours}, the kernel {theirs}"
                    ));
                }
            }
        }
        Ok(())
    }

    fn example(&mut self, example: String) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(example);
        }
    }

    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "stories": self.stories,
            "other_endings": self.other_endings,
            "compared": self.compared,
            "disagreements": self.disagreements,
            "examples": self.examples,
        })
    }
}

/// What leaves the kernel without policies. It does not tell that it has deleted none.
fn emptied(mirror: &Mirror) -> Vec<Change> {
    let mut policies = mirror.database().policies();
    policies.next().map(|_| Change::Flush(PolicyType::Main)).into_iter().collect()
}

/// As if it were not offloaded, on either side.
fn in_software(change: &mut Change) {
    if let Change::Add(policy) | Change::Update(policy) = change {
        policy.templates.iter_mut().for_each(|template| template.reqid &= !1);
    }
}

/// A policy in words.
fn describe(policy: Option<&Policy>) -> String {
    policy.map_or("no policy".to_owned(), |policy| {
        let offload = if is_promoted(policy) { ", offloaded" } else { "" };
        format!("{} priority {}{offload}", policy.id, policy.priority)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_state_that_waits_may_be_left_and_no_other() {
        let state = |spi: &str| {
            format!(
                "src 192.0.2.1 dst 192.0.2.2\n\tproto esp spi {spi} reqid 66 mode tunnel\n\treplay-window 0\n"
            )
        };
        let waiting = state("0x00000000");
        assert!(were_asked_for("") && were_asked_for(&waiting));
        assert!(!were_asked_for(&waiting.repeat(2)) && !were_asked_for(&state("0x00000001")));
    }
    use crate::lab::require_root;

    /// Where the kernel can be asked, among policies that are not offloaded, the model chooses as it does.
    #[test]
    fn the_model_of_the_chains_agrees_with_the_kernel() {
        if !require_root("the model against the kernel") {
            return;
        }
        let seed: u64 = rand::random();
        let report = ModelReport::compare(seed, 100, false).unwrap();
        assert_eq!(report.disagreements, 0, "seed {seed}: {:?}", report.examples);
        assert!(report.compared > 1000, "{report:?}");
    }
}
