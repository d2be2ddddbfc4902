//! `cargo testkit bench veth`: how many frames a gateway forwards in a second, on veth pairs from end to end.

mod plot;
mod row;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, ensure};
use fastswan_testkit::{
    cpu,
    datapath::{ASK_BACK, veth::VethBench},
    lab::{clean_up_on_signals, remove_leftovers},
};
use serde_json::json;

use self::row::Row;
use super::machine::Machine;

/// What `cargo testkit bench veth` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Numbers of outbound policies.
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [1_000, 10_000, 100_000],
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    policies: Vec<u32>,
    /// The largest number of CPUs that generate, forward and receive at the same time: it is measured with one, and with as
    /// many.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// Frames that each CPU sends in a turn, and flows: a power of two.
    #[arg(long, default_value_t = 1 << 18, value_parser = frames)]
    frames: u32,
    /// How often each contestant has its turn.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
    /// Writes a drawing of it into this folder: veth.svg.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

fn frames(argument: &str) -> Result<u32, String> {
    let frames = argument.parse().ok().filter(|frames: &u32| frames.is_power_of_two());
    frames
        .filter(|frames| (1 << 11..=1 << 20).contains(frames))
        .ok_or_else(|| format!("a power of two from {} to {}", 1 << 11, 1 << 20))
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads XDP programs: run it as root"
    );
    let Arguments { policies, frames, rounds, .. } = arguments;
    let mut cpus = cpu::allowed().context("looking for CPUs")?;
    ensure!(cpus.len() >= arguments.cpus as usize, "only {} CPUs are there: choose with --cpus", cpus.len());
    cpus.truncate(arguments.cpus as usize);
    if let Some(folder) = &arguments.plot {
        fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
    }
    remove_leftovers();
    clean_up_on_signals()?;
    println!(
        "Mpps from end to end: median (least to most) of {rounds} rounds of {frames} frames on each CPU; IPv4, site-to-site, each \
         frame of another random policy; fastswan asks the kernel's routes about one packet in {ASK_BACK}; CPUs {cpus:?}"
    );
    println!("{}", row::HEAD);
    let machine = Machine::look()?;
    let mut rows = Vec::new();
    for &policies in policies {
        let place = || format!("{policies} policies");
        let mut bench = VethBench::new(policies, *frames, &cpus).with_context(place)?;
        bench.verify().with_context(place)?;
        for figures in bench.measure(*rounds).with_context(place)? {
            let row = Row { policies, figures };
            print!("{row}");
            rows.push(row);
        }
    }
    if let Some(folder) = &arguments.plot {
        let file = folder.join("veth.svg");
        plot::draw(&rows, &file).with_context(|| format!("drawing {}", file.display()))?;
        println!("drawn: {}", file.display());
    }
    if arguments.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        let machine = machine.json()?;
        println!(
            "{}",
            json!({ "machine": machine, "frames": frames, "rounds": rounds, "ask_back": ASK_BACK, "rows": rows })
        );
    }
    Ok(())
}
