//! `cargo testkit chaos`: everything changes at once, and the mirror is watched.

use std::time::Duration;

use anyhow::ensure;
use fastswan_testkit::{
    chaos::{Chaos, Report},
    lab::{clean_up_on_signals, remove_leftovers},
};

use super::count::Count;

/// How long `cargo testkit ci` has the mirror watched, and how long until a broken one must have been noticed: how soon
/// it is depends on what the machine has time for.
const CI_SECONDS: u64 = 20;
const CI_HOST_SECONDS: u64 = 60;
const CI_MUTANT_SECONDS: u64 = 120;
/// A removal that a broken mirror misses in so many, and a change of the host.
const CI_MUTANT: u64 = 100;
const CI_HOST_MUTANT: u64 = 5;

/// What `cargo testkit chaos` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Repeats the changes of the run that printed this number, not their timing.
    #[arg(long)]
    seed: Option<u64>,
    /// Makes the mirror miss one of so many removals of policies, or of changes of the host with `--host`, which must be
    /// noticed.
    #[arg(long)]
    mutant: Option<u64>,
    /// Changes the host as well: routes, rules, sysctls, filters, neighbours, devices.
    #[arg(long)]
    host: bool,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "chaos makes network namespaces and loads an XDP program: run it as root"
    );
    remove_leftovers();
    clean_up_on_signals()?;
    let seed = arguments.seed.unwrap_or_else(rand::random);
    println!("seed {seed}");
    let chaos = Chaos::new(seed, Duration::from_secs(arguments.seconds));
    let report = watch(&match (arguments.host, arguments.mutant) {
        (false, None) => chaos,
        (false, Some(every)) => chaos.drop_removals(every),
        (true, None) => chaos.change_host(),
        (true, Some(every)) => chaos.change_host().drop_host_changes(every),
    })?;
    if arguments.json {
        let mut object = report.json();
        object["mutant"] = arguments.mutant.into();
        println!("{object}");
    }
    acquit(&report)
}

/// For `cargo testkit ci`: a fresh seed, without changes of the host and with them, and two broken mirrors.
pub(crate) fn check() -> anyhow::Result<Count> {
    let seed = rand::random();
    println!("seed {seed}");
    let chaos = |seconds| Chaos::new(seed, Duration::from_secs(seconds));
    let mut count = Count::default();
    acquit(&watch(&chaos(CI_SECONDS))?)?;
    count.pass();
    println!("\nthe host changes too");
    acquit(&watch(&chaos(CI_HOST_SECONDS).change_host())?)?;
    count.pass();
    println!("\na mirror that misses removals: must be noticed");
    let report = watch(&chaos(CI_MUTANT_SECONDS).until_diverged().drop_removals(CI_MUTANT))?;
    count.expect(report.divergences > 0, "removals that were missed were not noticed");
    println!("\na mirror that misses changes of the host: must be noticed");
    let chaos = chaos(CI_MUTANT_SECONDS).until_diverged();
    let report = watch(&chaos.change_host().drop_host_changes(CI_HOST_MUTANT))?;
    count.expect(report.divergences > 0, "changes of the host that were missed were not noticed");
    Ok(count)
}

/// Runs, and prints what was found.
fn watch(chaos: &Chaos) -> anyhow::Result<Report> {
    let report = chaos.run()?;
    println!(
        "{} events, {} overruns, {} device losses, {} quiet points; everything passed for {:.3} of the time",
        report.events, report.overruns, report.lost_devices, report.quiet_points, report.kill_switch_share
    );
    let resyncs = report.resyncs.iter().map(|(cause, count)| format!("{cause} {count}"));
    println!("resynchronisations: {}", resyncs.collect::<Vec<_>>().join(", "));
    println!("{} audits, {} repairs", report.audits, report.audit_repairs);
    let [p50, p99, max] = report.lag;
    println!("from acknowledgement to table: p50 {p50} µs, p99 {p99} µs, max {max} µs");
    println!(
        "{} packets judged, {} of them fast, {} looks at packets of policies that were gone, {} at packets that something \
         was in the way of, {} divergences, seed {}",
        report.packets, report.fast_packets, report.looks, report.host_looks, report.divergences, report.seed
    );
    for example in &report.examples {
        println!("    DIVERGED {example}");
    }
    Ok(report)
}

/// Fails if a bound was broken.
fn acquit(report: &Report) -> anyhow::Result<()> {
    let broken = report.broken_bounds();
    ensure!(broken.is_empty(), "{}, seed {}", broken.join("; "), report.seed);
    Ok(())
}
