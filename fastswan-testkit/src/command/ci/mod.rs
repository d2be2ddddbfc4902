//! `cargo testkit ci`: installs what the tests need, and runs all of them.
//!
//! Nothing is skipped: a step that cannot run has failed. Steps know nothing of each other, nor of this list.

mod features;
mod fuzz;
mod install;
mod msrv;
mod musl;
mod source;
mod suite;

use std::time::Instant;

use anyhow::ensure;

use super::{api, chaos, count::Count, ebpf, oracle, vm};

/// What `cargo testkit ci` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Names of steps, if not all are to run.
    #[arg(value_parser = name)]
    only: Vec<&'static str>,
    /// How long each fuzz target runs.
    #[arg(long, default_value_t = 60)]
    fuzz_seconds: u64,
}

type Step = fn(&Arguments) -> anyhow::Result<Count>;

/// All steps, in the order in which they run: what fails soonest comes first.
const STEPS: [(&str, Step); 17] = [
    ("install", |_| install::install()),
    ("format", |_| source::format()),
    ("lint", |_| source::lint()),
    ("docs", |_| source::docs()),
    ("deny", |_| source::deny()),
    ("public-api", |_| api::check().map(|()| Count::PASSED)),
    ("msrv", |_| msrv::check()),
    ("features", |_| features::check()),
    ("musl", |_| musl::check()),
    ("bytecode", |_| ebpf::run(ebpf::Command::Check).map(|()| Count::PASSED)),
    ("tests", |_| suite::run()),
    ("oracle", |_| oracle::check()),
    ("facts", |_| oracle::facts::check()),
    ("chaos", |_| chaos::check()),
    ("guests", |_| vm::check()),
    ("guest-oracle", |_| oracle::guest::check()),
    ("fuzz", |arguments| fuzz::run(arguments.fuzz_seconds)),
];

fn name(name: &str) -> Result<&'static str, String> {
    let names = STEPS.map(|(name, _)| name);
    names.into_iter().find(|known| *known == name).ok_or_else(|| format!("one of {}", names.join(", ")))
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let chosen = |name: &&str| arguments.only.is_empty() || arguments.only.contains(name);
    let mut rows = Vec::new();
    for (name, step) in STEPS.iter().filter(|(name, _)| chosen(name)) {
        println!("\n== {name}");
        let start = Instant::now();
        let count = step(arguments).unwrap_or_else(|error| {
            let mut count = Count::default();
            count.fail(format_args!("{error:#}"));
            count
        });
        rows.push((name, count, start.elapsed()));
    }

    println!("\n{:<12} {:>8} {:>8} {:>8}", "step", "passed", "failed", "seconds");
    for (name, Count { passed, failures }, took) in &rows {
        println!("{name:<12} {passed:>8} {:>8} {:>8}", failures.len(), took.as_secs());
    }
    println!();
    for (name, Count { failures, .. }, _) in &rows {
        for failure in failures {
            println!("{name}: {failure}");
        }
    }
    let passed: u64 = rows.iter().map(|(_, count, _)| count.passed).sum();
    let failed: usize = rows.iter().map(|(_, count, _)| count.failures.len()).sum();
    println!("{passed} passed, {failed} failed");
    ensure!(failed == 0, "not everything ran and passed");
    Ok(())
}
