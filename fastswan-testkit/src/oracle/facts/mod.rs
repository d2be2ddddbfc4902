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

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::Context as _;
use rand::{
    RngExt as _, SeedableRng as _,
    rngs::StdRng,
    seq::{IndexedRandom as _, SliceRandom as _},
};

use self::{
    draw::Draw,
    kinds::{KINDS, KNOWN_WRONG, Kind, OF_GUESTS},
    stories::{KNOWN_GAPS, STORIES, Story},
    trial::Trial,
    tunnels::{everything, sites},
    world::World,
};
pub use self::{
    mutant::HostMutant,
    report::{FactsReport, KindReport, StoryReport},
};

/// Worlds that are there at a time.
const WORLDS: usize = 4;
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
const PART: u64 = 1500;
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
    /// All kinds, with at least this many packets.
    #[must_use]
    pub fn new(seed: u64, decisions: u64) -> Self {
        Self { seed, decisions, mutant: None, kinds: KINDS.iter().collect() }
    }

    /// The names of all kinds.
    pub fn kinds() -> impl Iterator<Item = &'static str> {
        KINDS.iter().map(|kind| kind.name)
    }

    /// Only kinds of these names, one at a time.
    #[must_use]
    pub fn only(self, names: &[String]) -> Self {
        let is_named = |kind: &&Kind| names.iter().any(|name| name == kind.name);
        Self { kinds: KINDS.iter().filter(is_named).collect(), ..self }
    }

    /// Has kinds that need more of a kernel than most hosts have a larger part: for guests.
    #[must_use]
    pub fn in_guest(mut self) -> Self {
        const MORE: usize = 3;
        let of_guests: Vec<_> = KINDS.iter().filter(|kind| OF_GUESTS.contains(&kind.name)).collect();
        self.kinds.extend(of_guests.iter().cycle().take(of_guests.len() * MORE));
        self
    }

    /// The host source lies.
    #[must_use]
    pub fn mutant(self, mutant: HostMutant) -> Self {
        Self { mutant: Some(mutant), ..self }
    }

    /// Judges at random, in several worlds at a time. Needs root.
    ///
    /// # Errors
    ///
    /// If a world cannot be made, or the kernel or the mirror does not do what it is told.
    pub fn run(&self) -> anyhow::Result<FactsReport> {
        let row = |name, is_hook| KindReport::new(name, is_hook, KNOWN_WRONG.contains(&name));
        let mut report = FactsReport::empty(self.seed);
        for kind in &self.kinds {
            if report.kinds.iter().all(|known| known.name != kind.name) {
                report.kinds.push(row(kind.name, kind.is_hook));
            }
        }
        report.kinds.push(row("mixed", false));
        let shared = Mutex::new((Plans::new(self), report));
        let work = || -> anyhow::Result<()> {
            loop {
                let plan = {
                    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    if shared.1.decisions() >= self.decisions {
                        return Ok(());
                    }
                    shared.0.next_plan()
                };
                let rows = self.judge(&plan).with_context(|| format!("seed {}", self.seed))?;
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                for found in rows {
                    let row = shared.1.kinds.iter_mut().find(|row| row.name == found.name);
                    row.context("a row of the kind")?.merge(found);
                }
            }
        };
        at_a_time(work)?;
        Ok(shared.into_inner().unwrap_or_else(PoisonError::into_inner).1)
    }

    /// Judges a host source that lies, by the kinds that it lies about, until a packet is wrong. Returns whether one was.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn convict(&self, mutant: HostMutant) -> anyhow::Result<bool> {
        let names: Vec<String> = mutant.kinds().iter().map(|name| (*name).to_owned()).collect();
        let oracle = self.clone().mutant(mutant).only(&names);
        let mut decisions = 0;
        let mut seed = self.seed;
        while decisions < self.decisions {
            let part = Self { seed, decisions: PART, ..oracle.clone() }.run()?;
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
        let next = AtomicUsize::new(0);
        let reports = Mutex::new(Vec::new());
        at_a_time(|| {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(story) = STORIES.get(at) else { return Ok(()) };
                let told = self.tell(story).with_context(|| format!("{} {}", story.case, story.name))?;
                reports.lock().unwrap_or_else(PoisonError::into_inner).push((at, told));
            }
        })?;
        let mut reports = reports.into_inner().unwrap_or_else(PoisonError::into_inner);
        reports.sort_by_key(|(at, _)| *at);
        Ok(reports.into_iter().map(|(_, report)| report).collect())
    }

    fn tell(&self, story: &Story) -> anyhow::Result<StoryReport> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (world, tunnels) = (World::new()?, sites());
        let mut packets = KindReport::new(story.name, false, false);
        world.gateway.enter(|| {
            let mut trial = Trial::new(&world, &tunnels, self.mutant)?;
            trial.change(&(story.change)(), story.is_silent, PACKETS_OF_STORY, &mut rng, &mut packets)
        })?;
        Ok(StoryReport {
            case: story.case,
            holds: story.holds(&packets),
            is_known_gap: KNOWN_GAPS.contains(&story.name),
            packets,
        })
    }

    /// Changes one world in some ways, one after the other or all at once.
    fn judge(&self, plan: &Plan) -> anyhow::Result<Vec<KindReport>> {
        let mut rng = StdRng::seed_from_u64(plan.seed);
        let world = World::new()?;
        let tunnels = if rng.random_range(0..4) == 0 { everything() } else { sites() };
        world.gateway.enter(|| {
            let mut rows = Vec::new();
            let mut trial = Trial::new(&world, &tunnels, self.mutant)?;
            for kind in &plan.kinds {
                let change = (kind.change)(&mut Draw { rng: &mut rng, tunnels: &tunnels });
                let name = if plan.is_mixed { "mixed" } else { kind.name };
                let mut row = KindReport::new(name, kind.is_hook, false);
                let mut step = || {
                    trial.change(&change, kind.is_silent, PACKETS, &mut rng, &mut row)?;
                    if !plan.is_mixed && !kind.is_final {
                        trial.undo(&change, kind.is_silent, PACKETS_AFTER, &mut rng, &mut row)?;
                    }
                    anyhow::Ok(())
                };
                step().with_context(|| kind.name.to_owned())?;
                rows.push(row);
            }
            Ok(rows)
        })
    }
}

/// What is to be done to a world.
#[derive(Debug)]
struct Plan {
    kinds: Vec<&'static Kind>,
    /// All of it is there at once.
    is_mixed: bool,
    seed: u64,
}

/// Plans without end, in which all kinds have the same part.
struct Plans {
    kinds: Vec<&'static Kind>,
    /// Those of this round that have had no part so far.
    waiting: Vec<&'static Kind>,
    rng: StdRng,
}

impl Plans {
    fn new(oracle: &FactsOracle) -> Self {
        let rng = StdRng::seed_from_u64(oracle.seed);
        Self { kinds: oracle.kinds.clone(), waiting: Vec::new(), rng }
    }

    fn next_plan(&mut self) -> Plan {
        let is_mixed = self.kinds.len() >= AT_ONCE && self.rng.random_range(0..MIXED) == 0;
        let mut kinds: Vec<&'static Kind> = Vec::new();
        while kinds.len() < if is_mixed { AT_ONCE } else { CHANGES } {
            let kind = if is_mixed { self.kinds.choose(&mut self.rng).copied() } else { self.next_kind() };
            let Some(kind) = kind else { break };
            if is_mixed && (kind.is_hook || kinds.iter().any(|other| other.name == kind.name)) {
                continue;
            }
            kinds.push(kind);
            // There is nothing to be had of this world any longer.
            if kind.is_final {
                break;
            }
        }
        Plan { kinds, is_mixed, seed: self.rng.random() }
    }

    fn next_kind(&mut self) -> Option<&'static Kind> {
        if self.waiting.is_empty() {
            self.waiting.clone_from(&self.kinds);
            self.waiting.shuffle(&mut self.rng);
        }
        self.waiting.pop()
    }
}

/// Does something on several threads, most of whose time is waiting.
fn at_a_time(work: impl Fn() -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WORLDS).map(|_| scope.spawn(&work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
