//! `cargo testkit bench churn`: a full table of routes that changes all the time, and how a gateway follows.

use std::time::Duration;

use anyhow::ensure;
use fastswan_testkit::{
    churn::Churn,
    lab::{clean_up_on_signals, remove_leftovers},
};

/// What `cargo testkit bench churn` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Routes that concern no policy.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    routes: u32,
    /// Outbound policies, all of which are reached by the default route.
    #[arg(
        long,
        default_value_t = 100_000,
        value_parser = clap::value_parser!(u32).range(i64::from(Churn::FEWEST_POLICIES)..=1_000_000)
    )]
    policies: u32,
    /// For how long routes and neighbours change.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Repeats the changes of the run that printed this number, not their timing.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads an XDP program: run it as root"
    );
    remove_leftovers();
    clean_up_on_signals()?;
    let Arguments { routes, policies, seconds, json, .. } = *arguments;
    let seed = arguments.seed.unwrap_or_else(rand::random);
    println!("{routes} routes, {policies} policies, {seconds} s, seed {seed}");
    let report = Churn::new(seed, routes, policies, Duration::from_secs(seconds)).run()?;
    print!("{report}");
    for figure in report.missed() {
        println!("misses its goal: {figure}");
    }
    if json {
        println!("{}", report.json());
    }
    let wrongs = report.wrongs();
    ensure!(wrongs.is_empty(), "{}, seed {seed}", wrongs.join("; "));
    Ok(())
}
