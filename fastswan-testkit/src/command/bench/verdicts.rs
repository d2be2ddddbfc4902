//! `cargo testkit bench verdicts`: whether every verdict is right while policies change as fast as they can.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use fastswan_testkit::{
    cpu,
    datapath::verdicts::{Kind, KindTally, Tally, VerdictBench, VerdictConfig, VerdictLab},
    lab::{clean_up_on_signals, remove_leftovers},
};
use serde_json::{Value, json};

use super::machine::Machine;

/// Packets of a run, and flows of each kind of policies.
const PACKETS: u32 = 1 << 17;
/// So many lookups are as good as the time that was asked for.
const ENOUGH_LOOKUPS: u64 = 1_000_000_000;

/// What `cargo testkit bench verdicts` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// For how long policies change. The table's lease is an hour.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3000))]
    seconds: u64,
    /// The number of outbound policies.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(96..=500_000))]
    policies: u32,
    /// Changes the same policies in the same order as the run that printed this number.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads XDP programs: run it as root"
    );
    let cpus = cpu::allowed().context("looking for CPUs")?;
    let [first, second, ..] = cpus[..] else {
        anyhow::bail!("policies change on one CPU while packets are looked up on another: two are needed")
    };
    remove_leftovers();
    clean_up_on_signals()?;
    let Arguments { seconds, policies, json, .. } = *arguments;
    let seed = arguments.seed.unwrap_or_else(rand::random);
    println!(
        "{policies} policies, {seconds} s, seed {seed}; packets are looked up on CPU {first}, policies change on CPU {second}"
    );
    let machine = Machine::look()?;
    let tally = VerdictLab::new()?.enter(|devices| {
        let config = VerdictConfig { policies, packets: PACKETS, seed, devices, cpus: [first, second] };
        let bench = VerdictBench::new(config).context("loading the programs and the policies")?;
        bench.run(Duration::from_secs(seconds), |_| false).context("judging verdicts")
    })??;
    print(&tally);
    if json {
        println!("{}", as_json(&tally, policies, seed, &machine.json()?));
    }
    let KindTally { wrong, unexplained, .. } = tally.total();
    let evidence = tally.evidence.as_deref().unwrap_or("there is no evidence");
    ensure!(wrong == 0, "{wrong} verdicts are wrong, seed {seed}; the last one: {evidence}");
    ensure!(
        tally.is_right(),
        "{unexplained} packets passed for a reason that was not there, seed {seed}; the first: {evidence}"
    );
    Ok(())
}

fn print(tally: &Tally) {
    println!(
        "{:<17} {:>14} {:>14} {:>14} {:>12} {:>6} {:>12}",
        "policies", "lookups", "forwarded", "told to pass", "updating", "wrong", "unexplained"
    );
    let rows = Kind::ALL.iter().zip(&tally.kinds).map(|(kind, row)| (kind.name(), *row));
    for (name, row) in rows.chain([("all", tally.total())]) {
        let KindTally { forwarded, told_to_pass, updating, wrong, unexplained } = row;
        println!(
            "{name:<17} {:>14} {forwarded:>14} {told_to_pass:>14} {updating:>12} {wrong:>6} {unexplained:>12}",
            row.lookups()
        );
    }
    println!(
        "{} changes in {:.1} s: {:.0} a second; {:.2} million lookups a second; {:.1} % passed as updating",
        tally.changes,
        tally.time.as_secs_f64(),
        tally.changes_a_second(),
        tally.lookups_a_second() / 1e6,
        updating_share(tally) * 100.0,
    );
    println!(
        "a packet of steady policies takes {:.0} ns, and {:.0} ns while policies change: {:.2} times as long",
        tally.calm,
        tally.churning,
        tally.slow_down()
    );
    if tally.total().lookups() < ENOUGH_LOOKUPS {
        println!("these are fewer than {ENOUGH_LOOKUPS} lookups: a longer run says more");
    }
}

// Far below the numbers that a float does not hold.
#[allow(clippy::cast_precision_loss)]
fn updating_share(tally: &Tally) -> f64 {
    let total = tally.total();
    total.updating as f64 / total.lookups() as f64
}

fn as_json(tally: &Tally, policies: u32, seed: u64, machine: &Value) -> Value {
    let row = |row: KindTally| {
        let KindTally { forwarded, told_to_pass, updating, wrong, unexplained } = row;
        json!({
            "lookups": row.lookups(),
            "forwarded": forwarded,
            "told_to_pass": told_to_pass,
            "updating": updating,
            "wrong": wrong,
            "unexplained": unexplained,
        })
    };
    let kinds = Kind::ALL.iter().zip(&tally.kinds).map(|(kind, tally)| (kind.name().to_owned(), row(*tally)));
    json!({
        "machine": machine,
        "policies": policies,
        "seed": seed,
        "seconds": tally.time.as_secs_f64(),
        "changes": tally.changes,
        "changes_a_second": tally.changes_a_second(),
        "lookups_a_second": tally.lookups_a_second(),
        "total": row(tally.total()),
        "kinds": kinds.collect::<serde_json::Map<_, _>>(),
        "calm_ns": tally.calm,
        "churning_ns": tally.churning,
        "slow_down": tally.slow_down(),
    })
}
