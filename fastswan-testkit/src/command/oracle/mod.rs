//! `cargo testkit oracle`: the kernel judges the mirror.

pub(crate) mod facts;
pub(crate) mod guest;
mod print;

use std::time::Instant;

use anyhow::{Context as _, ensure};
use fastswan_testkit::{
    lab::{clean_up_on_signals, remove_leftovers},
    oracle::{BrokenRule, Oracle, Report, Set},
};

use self::{
    guest::Trial,
    print::{print, print_head, set},
};
use super::{count::Count, vm::Kernels};

/// Packets that `cargo testkit ci` has judged.
const CI_DECISIONS: u64 = 200_000;

/// The share of eligible packets that must be fast through adapters.
const LEAST_ADAPTED: f64 = 0.3;

/// What `cargo testkit oracle` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many packets are judged.
    #[arg(long, default_value_t = 1_000_000)]
    decisions: u64,
    /// Repeats the run that printed this number.
    #[arg(long)]
    seed: Option<u64>,
    /// Breaks a rule, which must be noticed: 1 ties, 2 shadowing software policies, 3 the highest priority,
    /// 4 longest prefix instead of priority, 5 descendants of a deleted policy, 6 other reqids, 7 the age of offloaded
    /// policies, 8 exact prefixes first. 9 is an adapter that strips policies of their offload.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    mutant: Option<u8>,
    /// Judges through adapters (`withhold`, `with_egress`, `merge`), nested at random.
    #[arg(long, conflicts_with = "guest")]
    adapters: bool,
    /// Judges in guests with the software NIC, where policies are really offloaded. Unless a rule is broken by
    /// choice, the third is broken afterwards, and must be noticed.
    #[arg(long)]
    guest: bool,
    #[command(flatten)]
    kernels: Kernels,
    /// Judges only this kind of policies; may be given more than once.
    #[arg(long = "set", value_parser = set)]
    sets: Vec<Set>,
    /// Judges how routes, rules, addresses, neighbours, links and sysctls are followed, and no policies.
    #[arg(long, conflicts_with_all = ["adapters", "mutant", "sets"])]
    facts: bool,
    #[command(flatten)]
    of_facts: facts::Options,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the oracle makes network namespaces and loads an XDP program: run it as root"
    );
    remove_leftovers();
    clean_up_on_signals()?;
    let seed = arguments.seed.unwrap_or_else(rand::random);
    if arguments.facts && arguments.guest {
        let kernels = arguments.kernels.all();
        return facts::run_in_guests(
            arguments.of_facts.kinds(),
            &kernels,
            seed,
            arguments.decisions,
            arguments.json,
        );
    }
    if arguments.facts {
        return facts::run(&arguments.of_facts, seed, arguments.decisions, arguments.json);
    }
    let broken = arguments.mutant.and_then(|number| BrokenRule::ALL.get(usize::from(number) - 1)).copied();
    let has_wrong_adapter = arguments.mutant.is_some() && broken.is_none();
    if arguments.guest {
        ensure!(!has_wrong_adapter, "the wrong adapter is judged without guests: leave --guest out");
        let broken = arguments.mutant.map_or_else(|| vec![0, guest::CI_MUTANT], |number| vec![number]);
        let kernels = arguments.kernels.all();
        let trial = Trial { decisions: arguments.decisions, seed, sets: arguments.sets.clone(), broken };
        return guest::run(&trial, &kernels, arguments.json);
    }
    ensure!(arguments.kernels.kernel.is_none(), "only guests have other kernels than this one: add --guest");
    let start = Instant::now();
    let mut oracle = Oracle::new(seed, arguments.decisions);
    if let Some(rule) = broken {
        oracle = oracle.broken_rule(rule);
    }
    if arguments.adapters {
        oracle = oracle.adapters();
    }
    if has_wrong_adapter {
        oracle = oracle.wrong_adapter();
    }
    if !arguments.sets.is_empty() {
        oracle = oracle.sets(&arguments.sets);
    }
    let report = judge(&oracle, seed)?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} decisions in {seconds:.1} s, {} executed, {} wrong, seed {seed}",
        report.decisions(),
        report.executed(),
        report.wrong()
    );
    if arguments.json {
        let mut object = report.json();
        object["seconds"] = seconds.into();
        object["mutant"] = arguments.mutant.into();
        println!("{object}");
    }
    if arguments.adapters {
        // Policies that the sources disagree about keep others from being fast.
        ensure!(report.wrong() == 0, "{} decisions were wrong, seed {seed}", report.wrong());
        return Ok(());
    }
    acquit(&report)
}

/// For `cargo testkit ci`: a fresh seed, and every broken rule.
pub(crate) fn check() -> anyhow::Result<Count> {
    let seed = rand::random();
    acquit(&judge(&Oracle::new(seed, CI_DECISIONS), seed)?)?;
    println!("\nthrough adapters");
    let report = judge(&Oracle::new(seed, CI_DECISIONS / 4).adapters(), seed)?;
    ensure!(report.wrong() == 0, "{} decisions were wrong through adapters, seed {seed}", report.wrong());
    let share = report.fast_share();
    ensure!(
        share > LEAST_ADAPTED,
        "through adapters, {share:.4} of the eligible packets were fast, seed {seed}"
    );
    let mut count = Count { passed: 2, ..Count::default() };
    println!("\nan adapter that strips policies of their offload: must be noticed");
    let report = judge(&Oracle::new(seed, CI_DECISIONS / 5).wrong_adapter(), seed)?;
    count.expect(report.wrong() > 0, "the wrong adapter was not noticed");
    for rule in BrokenRule::ALL {
        println!("\nbroken rule {rule:?}: must be noticed");
        let report = judge(&Oracle::new(seed, CI_DECISIONS / 5).broken_rule(rule), seed)?;
        count.expect(report.wrong() > 0, format_args!("{rule:?}: was not noticed"));
    }
    Ok(count)
}

/// Judges, and prints each set.
fn judge(oracle: &Oracle, seed: u64) -> anyhow::Result<Report> {
    println!("seed {seed}");
    print_head();
    oracle.run(|report| print(report.set.name(), &report.json())).with_context(|| format!("seed {seed}"))
}

/// Fails if a decision was wrong, or too few were fast.
fn acquit(report: &Report) -> anyhow::Result<()> {
    ensure!(report.wrong() == 0, "{} decisions were wrong, seed {}", report.wrong(), report.seed);
    let slow: Vec<String> = report
        .sets
        .iter()
        .filter(|set| set.is_too_slow())
        .map(|set| format!("{} {:.4}", set.set.name(), set.fast_share()))
        .collect();
    ensure!(slow.is_empty(), "too few eligible packets were fast: {}", slow.join(", "));
    Ok(())
}
