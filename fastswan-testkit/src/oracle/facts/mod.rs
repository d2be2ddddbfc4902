//! The kernel judges how the mirror follows the host: routes, rules, addresses, neighbours, links and sysctls.
//!
//! A gateway with two ports and two outer devices is changed at random, in many [kinds](KindReport) of ways, while a mirror
//! of fixed policies follows. Then packets near the borders of what was changed are given to both:
//!
//! - the program says whether it forwards a packet, and how;
//! - the kernel, which knows no policy, forwards it in clear, answers, drops or delivers it.
//!
//! A packet that is fast must be one that the kernel sends to the policy's device, byte for byte as the program does, and
//! the kernel must be ready to send the tunnel's outer packet by that device: its route is asked for as IPsec asks for it,
//! from the tunnel's source. Otherwise the packet is **wrong**, if it still is when all that is polled must be known, and
//! else **late**. How many packets are fast of those that the kernel sends that way is the
//! [fast share](FactsReport::fast_share).
//!
//! [Stories](StoryReport) are cases from the field; those that are not right so far are known gaps.
//! [Host sources that lie](HostMutant) show that the judge notices.

mod aims;
mod command;
mod draw;
mod icmp;
mod kernel;
mod kinds;
mod mirror;
mod mutant;
mod packet;
mod report;
mod stories;
mod trial;
mod tunnels;
mod world;

use anyhow::Context as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

use self::{
    draw::Draw,
    kinds::{KINDS, Kind},
    stories::STORIES,
    trial::Trial,
    tunnels::{everything, sites},
    world::World,
};
pub use self::{
    mutant::HostMutant,
    report::{FactsReport, KindReport, StoryReport},
    stories::KNOWN_GAPS,
};

/// Packets that are judged after each step of a change.
const PACKETS: usize = 140;
/// The same when the change was taken back.
const PACKETS_AFTER: usize = 40;
/// Packets after each step of a story.
const PACKETS_OF_STORY: usize = 150;
/// Changes of one world.
const CHANGES: usize = 10;
/// Changes that are there at once in a world of several.
const AT_ONCE: usize = 4;
/// Packets that a source that lies is judged by at a time.
const PART: u64 = 5000;
/// One world in so many is of several changes at once.
const MIXED: u32 = 5;

/// A run to be.
#[derive(Clone, Debug)]
pub struct FactsOracle {
    seed: u64,
    decisions: u64,
    mutant: Option<HostMutant>,
    kinds: Vec<&'static Kind>,
}

impl FactsOracle {
    /// All kinds but those with hooks, with at least this many packets.
    #[must_use]
    pub fn new(seed: u64, decisions: u64) -> Self {
        let kinds = KINDS.iter().filter(|kind| !kind.is_hook).collect();
        Self { seed, decisions, mutant: None, kinds }
    }

    /// The names of all kinds.
    pub fn kinds() -> impl Iterator<Item = &'static str> {
        KINDS.iter().map(|kind| kind.name)
    }

    /// Also kinds that are about hooks: netfilter and tc.
    #[must_use]
    pub fn hooks(self) -> Self {
        Self { kinds: KINDS.iter().collect(), ..self }
    }

    /// Only kinds of these names, one at a time.
    #[must_use]
    pub fn only(self, names: &[String]) -> Self {
        let is_named = |kind: &&Kind| names.iter().any(|name| name == kind.name);
        Self { kinds: KINDS.iter().filter(is_named).collect(), ..self }
    }

    /// The host source lies.
    #[must_use]
    pub fn mutant(self, mutant: HostMutant) -> Self {
        Self { mutant: Some(mutant), ..self }
    }

    /// Judges at random. `progress` hears of the number of decisions. Needs root.
    ///
    /// # Errors
    ///
    /// If a world cannot be made, or the kernel or the mirror does not do what it is told.
    pub fn run(&self, mut progress: impl FnMut(u64)) -> anyhow::Result<FactsReport> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut report = FactsReport::empty(self.seed);
        report.kinds.extend(self.kinds.iter().map(|kind| KindReport::new(kind.name, kind.is_hook)));
        report.kinds.push(KindReport::new("mixed", false));
        let mut waiting: Vec<&'static Kind> = Vec::new();
        let alone = self.kinds.len() < AT_ONCE;
        while report.decisions() < self.decisions {
            let is_mixed = !alone && rng.random_range(0..MIXED) == 0;
            let mut chosen = Vec::new();
            while chosen.len() < if is_mixed { AT_ONCE } else { CHANGES } {
                if waiting.is_empty() {
                    waiting.clone_from(&self.kinds);
                    waiting.shuffle(&mut rng);
                }
                let Some(kind) = waiting.pop() else { break };
                if is_mixed && kind.is_hook {
                    continue;
                }
                chosen.push(kind);
                // There is nothing to be had of this world any longer.
                if kind.is_final {
                    break;
                }
            }
            let seed = rng.random();
            self.judge(&chosen, is_mixed, seed, &mut report)
                .with_context(|| format!("seed {}", self.seed))?;
            progress(report.decisions());
        }
        Ok(report)
    }

    /// Judges until a packet is wrong. Returns whether one was.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn convict(&self) -> anyhow::Result<bool> {
        let mut decisions = 0;
        let mut seed = self.seed;
        while decisions < self.decisions {
            let part = Self { seed, decisions: PART, ..self.clone() }.run(|_| {})?;
            if part.wrong() > 0 {
                return Ok(true);
            }
            decisions += part.decisions();
            seed = seed.wrapping_add(1);
        }
        Ok(false)
    }

    /// Tells the cases from the field. Needs root.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn tell_stories(&self) -> anyhow::Result<Vec<StoryReport>> {
        let mut reports = Vec::new();
        for story in STORIES {
            let mut rng = StdRng::seed_from_u64(self.seed);
            let (world, tunnels) = (World::new()?, sites());
            let mut packets = KindReport::new(story.name, false);
            world
                .gateway
                .enter(|| {
                    let mut trial = Trial::new(&world, &tunnels, self.mutant)?;
                    trial.change(&(story.change)(), story.is_silent, PACKETS_OF_STORY, &mut rng, &mut packets)
                })
                .with_context(|| format!("{} {}", story.case, story.name))?;
            reports.push(StoryReport {
                case: story.case,
                holds: story.holds(&packets),
                is_known_gap: KNOWN_GAPS.contains(&story.name),
                packets,
            });
        }
        Ok(reports)
    }

    /// Changes one world in some ways, one after the other or all at once.
    fn judge(
        &self,
        kinds: &[&'static Kind],
        is_mixed: bool,
        seed: u64,
        report: &mut FactsReport,
    ) -> anyhow::Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let world = World::new()?;
        let tunnels = if rng.random_range(0..4) == 0 { everything() } else { sites() };
        world.gateway.enter(|| {
            let mut trial = Trial::new(&world, &tunnels, self.mutant)?;
            for kind in kinds {
                let change = (kind.change)(&mut Draw { rng: &mut rng, tunnels: &tunnels });
                let name = if is_mixed { "mixed" } else { kind.name };
                let row =
                    report.kinds.iter_mut().find(|row| row.name == name).context("a row of the kind")?;
                trial
                    .change(&change, kind.is_silent, PACKETS, &mut rng, row)
                    .with_context(|| kind.name.to_owned())?;
                if !is_mixed && !kind.is_final {
                    trial
                        .undo(&change, kind.is_silent, PACKETS_AFTER, &mut rng, row)
                        .with_context(|| kind.name.to_owned())?;
                }
            }
            Ok(())
        })
    }
}
