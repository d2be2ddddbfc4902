//! `cargo testkit bench growth`: a table that is too small is replaced by a larger one, under traffic.

use anyhow::ensure;
use fastswan_testkit::{
    growth::Growth,
    lab::{clean_up_on_signals, remove_leftovers},
};

use super::machine::Machine;

/// What `cargo testkit bench growth` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Outbound policies that the kernel has.
    #[arg(
        long,
        default_value_t = 1_000_000,
        value_parser = clap::value_parser!(u32).range(2..=i64::from(Growth::MOST_POLICIES))
    )]
    policies: u32,
    /// Policies that the first table has room for.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..))]
    from: u32,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let Arguments { policies, from, json } = *arguments;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads XDP programs: run it as root"
    );
    ensure!(
        from < policies,
        "a table for {from} policies has room for all {policies}: choose fewer with --from"
    );
    remove_leftovers();
    clean_up_on_signals()?;
    println!("{policies} policies; a table for {from}, then one for all");
    let machine = Machine::look()?;
    let report = Growth::new(policies, from).run()?;
    print!("{report}");
    if json {
        let mut all = report.json();
        all["machine"] = machine.json()?;
        println!("{all}");
    }
    let wrongs = report.wrongs();
    ensure!(wrongs.is_empty(), "{}", wrongs.join("; "));
    Ok(())
}
