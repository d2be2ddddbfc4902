//! The oracle: the kernel judges what the mirror makes of its policies, packet by packet.
//!
//! Policies of different [kinds](Set) are added to a real kernel, changed and deleted. The mirror hears of it from
//! the kernel's own notifications, is told that some of the policies are offloaded, and fills the table of the XDP
//! program. Then packets near the borders of the policies are given to both, the program and the kernel:
//!
//! - the program says which policy it forwards a packet for: each has a next hop of its own;
//! - the kernel says which policy it chooses: it asks for an association for it.
//!
//! A packet that the program forwards for another policy than the kernel's choice, or for any if the kernel has
//! none, drops the packet or delivers it, is **wrong**. One that the program passes is never wrong; how many of those
//! that could be fast are is the [fast share](SetReport::fast_share).
//!
//! Nothing here can offload a policy, and the kernel orders those that are in another way. A model of that order
//! judges one more kind of policies.
//!
//! `cargo testkit oracle --seed N` repeats a run exactly; `--mutant N` shows that the judge notices a
//! [broken rule](BrokenRule).

mod chains;
mod judge;
mod mirror;
mod packets;
mod sets;

use std::collections::BTreeMap;

use anyhow::Context as _;
pub use fastswan::compiler::BrokenRule;
use fastswan::{
    NetlinkSource, PassReason, Policy,
    policy::{Action, Direction, Mark, Mode, PolicyType},
};
use rand::{SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

pub use self::sets::Set;
use self::{
    chains::Chains,
    judge::{Judge, Kernel, Lab},
    mirror::{Fate, Mirror},
    packets::Packet,
    sets::{World, is_promoted},
};

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
}

impl Oracle {
    /// All sets, with this many packets together.
    #[must_use]
    pub fn new(seed: u64, decisions: u64) -> Self {
        Self { seed, decisions, sets: Set::ALL.to_vec(), broken: None }
    }

    /// Only these sets.
    #[must_use]
    pub fn sets(self, sets: &[Set]) -> Self {
        Self { sets: sets.to_vec(), ..self }
    }

    /// Breaks a rule of the compiler that is judged, on the sets whose policies overlap most.
    #[must_use]
    pub fn broken_rule(self, rule: BrokenRule) -> Self {
        Self { broken: Some(rule), ..self }.sets(&[Set::Nested, Set::OffloadedModel])
    }

    /// Judges. `progress` gets the report of each set when it is done. Needs root.
    ///
    /// # Errors
    ///
    /// If the lab cannot be made, or the kernel or the mirror does not do what it is told.
    pub fn run(&self, mut progress: impl FnMut(&SetReport)) -> anyhow::Result<Report> {
        let mut report = Report { seed: self.seed, sets: Vec::new() };
        let count = u64::try_from(self.sets.len()).unwrap_or(u64::MAX).max(1);
        for (number, set) in (0..).zip(&self.sets) {
            // The first ones take what is left over.
            let decisions = self.decisions / count + u64::from(number < self.decisions % count);
            let judged = self.judge(*set, decisions);
            let judged = judged.with_context(|| format!("{}, seed {}", set.name(), self.seed))?;
            progress(&judged);
            report.sets.push(judged);
        }
        Ok(report)
    }

    fn judge(&self, set: Set, decisions: u64) -> anyhow::Result<SetReport> {
        let lab = Lab::new()?;
        lab.enter(|| {
            let rng = StdRng::seed_from_u64(self.seed.wrapping_mul(16).wrapping_add(set as u64));
            let world = World::new(set, lab.egress, lab.ingress);
            if set == Set::OffloadedModel {
                let (chains, source) = Chains::new();
                let mirror = || Mirror::new(&lab, || Ok(source), self.broken);
                Trial { judge: chains, world, rng, report: SetReport::new(set) }.hear(mirror, decisions)
            } else {
                let kernel = Kernel::new(&lab)?;
                let mirror = || Mirror::new(&lab, || Ok(NetlinkSource::open()?), self.broken);
                Trial { judge: kernel, world, rng, report: SetReport::new(set) }.hear(mirror, decisions)
            }
        })
    }
}

/// A set before its judge.
struct Trial<J> {
    judge: J,
    world: World,
    rng: StdRng,
    report: SetReport,
}

impl<J: Judge> Trial<J> {
    fn hear(
        mut self,
        mirror: impl FnOnce() -> anyhow::Result<Mirror>,
        decisions: u64,
    ) -> anyhow::Result<SetReport> {
        // The first policies are there before the mirror is, the others come while it looks.
        let changes = self.world.renew(&mut self.rng);
        self.judge.make(&changes)?;
        let mut mirror = mirror()?;
        mirror.follow(if self.report.set == Set::OffloadedModel { changes.len() } else { 0 })?;
        let mut round = 0;
        loop {
            for _ in 0..PACKETS {
                if self.report.decisions == decisions {
                    return Ok(self.report);
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
            mirror.follow(changes.len())?;
        }
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
            Fate::Fast(named) => chosen == Some(named),
            Fate::Strange => false,
        };
        report.fast += 1;
        if right {
            report.eligible_fast += u64::from(eligible);
            return Ok(());
        }
        report.wrong += 1;
        if report.examples.len() < EXAMPLES {
            let describe = |policy: Option<&Policy>| {
                policy.map_or("no policy".to_owned(), |policy| {
                    let offload = if is_promoted(policy) { ", offloaded" } else { "" };
                    format!("{} priority {}{offload}", policy.id, policy.priority)
                })
            };
            let named = match fate {
                Fate::Fast(index) => describe(mirror.policy(index)),
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

    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let sets: BTreeMap<&str, Value> =
            self.sets.iter().map(|report| (report.set.name(), report.json())).collect();
        json!({
            "decisions": self.decisions(),
            "executed": self.executed(),
            "wrong": self.wrong(),
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

#[cfg(test)]
mod tests {
    use fastswan::{PolicySource as _, policy::PolicyId};
    use futures::FutureExt as _;

    use super::{sets::Change, *};
    use crate::lab::require_root;

    /// As if it were not offloaded, on either side.
    fn in_software(change: &mut Change) {
        if let Change::Add(policy) | Change::Update(policy) = change {
            policy.templates.iter_mut().for_each(|template| template.reqid &= !1);
        }
    }

    /// Where the kernel can be asked, among policies that are not offloaded, the model chooses as it does.
    #[test]
    fn the_model_of_the_chains_agrees_with_the_kernel() {
        if !require_root("the model against the kernel") {
            return;
        }
        let seed: u64 = rand::random();
        eprintln!("seed {seed}");
        let lab = Lab::new().unwrap();
        let compared = lab.enter(|| {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut world = World::new(Set::Nested, lab.egress, lab.ingress);
            let mut kernel = Kernel::new(&lab).unwrap();
            let (mut chains, mut source) = Chains::new();
            let mut mirror = Mirror::new(&lab, || Ok(NetlinkSource::open()?), None).unwrap();
            mirror.follow(0).unwrap();
            let mut compared = 0;
            for round in 0..100 {
                let mut changes = if round % 6 == 0 {
                    world.renew(&mut rng)
                } else {
                    let database = mirror.database();
                    world.change(&mut rng, |id: &PolicyId| Some(database.policy(id)?.index))
                };
                changes.iter_mut().for_each(in_software);
                kernel.make(&changes).unwrap();
                chains.make(&changes).unwrap();
                while source.next_event().now_or_never().is_some() {}
                mirror.follow(changes.len()).unwrap();
                for _ in 0..100 {
                    let packet = Packet::near(world.policies(), &mut rng);
                    if let Some(index) = kernel.choose(&packet).unwrap() {
                        let theirs = mirror.policy(index).unwrap();
                        let ours = chains.choose(&packet).unwrap();
                        let ours = ours.and_then(|index| chains.policy(index));
                        // After updates, the order of equals depends on the shape of the kernel's tree.
                        let priority = ours.map(|policy| policy.priority);
                        assert_eq!(priority, Some(theirs.priority), "{packet:?}: {ours:?} {theirs:?}");
                        compared += 1;
                    }
                }
            }
            compared
        });
        assert!(compared > 1000, "{compared}");
    }
}
