//! Changes and lookups at the same time.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use fastswan::{PassReason, forwarder::LoadConfig};
use fastswan_ebpf::Check;
use fastswan_testkit_ebpf::verdict::Judgement;
use rand::{SeedableRng as _, rngs::SmallRng};

use super::{
    super::{ablation::without, timing::median},
    churn::{Churn, VersionsOfGroups},
    error::VerdictError,
    judge::{Judge, Judged},
    kind::Kind,
    policies::Policies,
    tally::{KindTally, Tally},
};
use crate::{cpu::run_on, prog_run::PassCounters};

/// Rounds over all kinds while nothing changes, before and after.
const CALM_ROUNDS: u32 = 5;

/// What is judged.
#[derive(Clone, Copy, Debug)]
pub struct VerdictConfig {
    /// Policies that the table begins with, 96 or more.
    pub policies: u32,
    /// Packets of a run, and flows of each kind: a power of two from 2,048 to 1,048,576.
    pub packets: u32,
    /// Says which policies change when, and which packets there are.
    pub seed: u64,
    /// Interface indices of this thread's network namespace: packets come in on the first and leave by both.
    pub devices: [u32; 2],
    /// Packets are looked up on the first, and policies are changed on the second.
    pub cpus: [usize; 2],
}

/// Policies that change, and the judge.
pub struct VerdictBench {
    config: VerdictConfig,
    churn: Churn,
    versions: VersionsOfGroups,
    judge: Judge,
    passes: PassCounters,
}

/// What was seen, and how long packets of steady policies took in each run.
#[derive(Default)]
struct Lookups {
    tally: Tally,
    steady: Vec<f64>,
}

impl VerdictBench {
    /// Loads the programs and writes all policies.
    ///
    /// # Errors
    ///
    /// [`VerdictError`], for instance without root.
    pub fn new(config: VerdictConfig) -> Result<Self, VerdictError> {
        Self::load(config, |load| load)
    }

    /// **For tests of the judge only:** the same with a program that does not look whether the table is being changed.
    ///
    /// # Errors
    ///
    /// Likewise.
    pub fn without_sequence(config: VerdictConfig) -> Result<Self, VerdictError> {
        Self::load(config, |load| without(load, Check::Sequence))
    }

    /// **For tests of the judge only:** the same with a program that looks whether the table has changed only for packets that it is
    /// about to forward, and counts those that pass with whatever reason it came upon.
    ///
    /// # Errors
    ///
    /// Likewise.
    pub fn without_reasons(config: VerdictConfig) -> Result<Self, VerdictError> {
        Self::load(config, |load| without(load, Check::Reasons))
    }

    fn load(
        config: VerdictConfig,
        configure: impl FnOnce(LoadConfig) -> LoadConfig,
    ) -> Result<Self, VerdictError> {
        let VerdictConfig { policies, packets, seed, devices, .. } = config;
        let fewest = Policies::FEWEST;
        if policies < fewest {
            return Err(VerdictError::TooFew { policies, fewest });
        }
        let policies = Policies::new(policies, devices);
        let [ingress, _] = devices;
        let churn = Churn::new(policies, ingress, seed, configure)?;
        let passes = churn.ours.pass_counters().map_err(VerdictError::passes)?;
        let flows = packets * Kind::COUNT;
        let (mut judge, versions) = Judge::load(policies, flows, ingress, churn.ours.program_id())?;
        let mut rng = SmallRng::seed_from_u64(seed);
        for (first, kind) in (0..flows).step_by(packets as usize).zip(Kind::ALL) {
            judge.set_flows(first, &policies.flows(kind, packets, &mut rng))?;
        }
        judge.put_under_test(true)?;
        Ok(Self { config, churn, versions, judge, passes })
    }

    /// Looks packets up for this long while policies change, or until what was seen is enough. Before and afterwards, it takes the
    /// time of packets while nothing changes.
    ///
    /// # Errors
    ///
    /// [`VerdictError`]; wrong verdicts are none.
    pub fn run(
        self,
        time: Duration,
        is_enough: impl Fn(&Tally) -> bool + Sync,
    ) -> Result<Tally, VerdictError> {
        let [here, there] = self.config.cpus;
        let pin = |cpu| run_on(&[cpu]).map_err(VerdictError::system(format!("staying on CPU {cpu}")));
        let Self { config, mut churn, versions, mut judge, passes } = self;
        let (churn, versions, judge, passes) = (&mut churn, &versions, &mut judge, &passes);
        let packets = config.packets;
        thread::scope(|scope| {
            let lookups = scope.spawn(|| {
                pin(here)?;
                let mut calm = Lookups::default();
                for _ in 0..CALM_ROUNDS {
                    calm.look_up(judge, passes, packets)?;
                }
                calm.check_first()?;
                judge.put_under_test(false)?;
                let Judged { time: empty, .. } = judge.run(0, packets, packets)?;
                judge.put_under_test(true)?;

                let mut lookups = Lookups::default();
                let stop = AtomicBool::new(false);
                let before = churn.changes;
                let start = Instant::now();
                let changed = thread::scope(|scope| {
                    let writer = scope.spawn(|| pin(there).and_then(|()| churn.run(versions, &stop)));
                    let is_over =
                        |tally: &Tally| start.elapsed() >= time || is_enough(tally) || writer.is_finished();
                    let mut looked = Ok(());
                    while looked.is_ok() && !is_over(&lookups.tally) {
                        looked = lookups.look_up(judge, passes, packets);
                    }
                    stop.store(true, Ordering::Relaxed);
                    let changed = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    changed.and(looked)
                });
                let time = start.elapsed();
                changed?;

                for _ in 0..CALM_ROUNDS {
                    calm.look_up(judge, passes, packets)?;
                }
                calm.check_settled()?;
                Ok(Tally {
                    changes: churn.changes - before,
                    time,
                    calm: median(&mut calm.steady) - empty,
                    churning: median(&mut lookups.steady) - empty,
                    ..lookups.tally
                })
            });
            lookups.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Lookups {
    /// Looks packets of all kinds up, one kind after the other.
    fn look_up(
        &mut self,
        judge: &mut Judge,
        passes: &PassCounters,
        packets: u32,
    ) -> Result<(), VerdictError> {
        let firsts = (0_u32..).step_by(packets as usize);
        for ((kind, tally), first) in Kind::ALL.into_iter().zip(&mut self.tally.kinds).zip(firsts) {
            let before = passes.read().map_err(VerdictError::passes)?;
            let Judged { counts, time } = judge.run(first, packets, packets)?;
            let after = passes.read().map_err(VerdictError::passes)?;
            let mut reasons = [0; PassReason::COUNT];
            for (packets, (before, after)) in reasons.iter_mut().zip(before.iter().zip(&after)) {
                *packets = after - before;
            }
            let seen = KindTally::of(kind, counts, &reasons);
            if seen.wrong > 0 {
                self.tally.evidence = Some(judge.evidence()?);
            } else if seen.unexplained > 0 && self.tally.evidence.is_none() {
                self.tally.evidence = Some(evidence_of_reasons(kind, counts, &reasons));
            }
            *tally += seen;
            if kind == Kind::Steady {
                self.steady.push(time);
            }
        }
        Ok(())
    }

    /// Makes sure that, as long as nothing has changed yet, packets are forwarded that can be, and no others.
    fn check_first(&self) -> Result<(), VerdictError> {
        for (kind, tally) in Kind::ALL.into_iter().zip(self.tally.kinds) {
            let lookups = tally.lookups();
            let (forwarded, told_to_pass) =
                if kind == Kind::AlwaysShadowed { (0, lookups) } else { (lookups, 0) };
            if tally != (KindTally { forwarded, told_to_pass, ..KindTally::default() }) {
                return Err(VerdictError::Calm { kind, tally: Box::new(tally) });
            }
        }
        Ok(())
    }

    /// Makes sure that, as long as nothing changes, no verdict is wrong and no packet passes for a change.
    fn check_settled(&self) -> Result<(), VerdictError> {
        for (kind, tally) in Kind::ALL.into_iter().zip(self.tally.kinds) {
            let KindTally { updating, wrong, unexplained, .. } = tally;
            if updating + wrong + unexplained > 0 {
                return Err(VerdictError::Calm { kind, tally: Box::new(tally) });
            }
        }
        Ok(())
    }
}

/// Why packets of a run passed, beside how many were to, in words.
fn evidence_of_reasons(
    kind: Kind,
    [_, told_to_pass, updating, _]: [u64; Judgement::COUNT as usize],
    reasons: &[u64; PassReason::COUNT],
) -> String {
    let counted = PassReason::ALL.iter().zip(reasons).filter(|(_, packets)| **packets > 0);
    let counted: Vec<String> =
        counted.map(|(reason, packets)| format!("{packets} as {}", reason.name())).collect();
    format!(
        "of packets of policies that are {}, {told_to_pass} were to pass and {updating} can only have met a change; they were counted: \
         {}",
        kind.name(),
        counted.join(", ")
    )
}
