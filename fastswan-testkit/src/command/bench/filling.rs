//! `cargo testkit bench filling`: how fast tables are filled, with cells and from the bytes that the kernel tells.

use std::time::Duration;

use anyhow::ensure;
use fastswan_testkit::{
    datapath::DatapathLab,
    filling::{Filling, Stages},
    lab::{clean_up_on_signals, remove_leftovers},
};
use serde_json::json;

use super::{machine::Machine, spread};

/// What `cargo testkit bench filling` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The number of outbound policies, each with an association and a cell of its own.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    policies: u32,
    /// How often it is measured, each time with a new table.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

/// What a round has measured.
struct Round {
    /// Cells in a second, in ordinary memory and in the maps of the program.
    cells: [f64; 2],
    /// From bytes into a table, with one thread that decodes and with two.
    stages: [Stages; 2],
}

/// A line of what is printed: its name there and in JSON, and how it comes from a round of so many policies.
type Figure = (&'static str, &'static str, fn(&Round, f64) -> f64);

const FIGURES: [Figure; 9] = [
    ("cells into a MemoryTable, millions/s", "memory_cells", |round, _| round.cells[0] / 1e6),
    ("cells into a BpfTable, millions/s", "bpf_cells", |round, _| round.cells[1] / 1e6),
    ("bytes to table, policies/s", "policies", |round, all| all / round.stages[0].all.as_secs_f64()),
    ("the same, decoding in two threads", "policies_two_threads", |round, all| {
        all / round.stages[1].all.as_secs_f64()
    }),
    ("  decoding, ms", "decode_ms", |round, _| milliseconds(round.stages[0].decode)),
    ("  decoding in two threads, ms", "decode_two_threads_ms", |round, _| {
        milliseconds(round.stages[1].decode)
    }),
    ("  database, ms", "database_ms", |round, _| milliseconds(round.stages[0].database)),
    ("  compiling, ms", "compile_ms", |round, _| milliseconds(round.stages[0].compile)),
    ("  writing, ms", "write_ms", |round, _| milliseconds(round.stages[0].write)),
];

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the bench loads an XDP program: run it as root");
    remove_leftovers();
    clean_up_on_signals()?;
    let Arguments { policies, rounds, json } = *arguments;
    let machine = Machine::look()?;
    let (bytes, rounds) = DatapathLab::new()?.enter(|device| measure(policies, rounds, device))??;
    println!("{policies} policies and as many associations, {bytes} bytes as the kernel dumps them");
    println!("{:<38} {:>12} {:>12} {:>12}", "", "min", "median", "max");
    let mut figures = json!({});
    for (name, key, figure) in FIGURES {
        let [min, median, max] = spread(&rounds, |round| figure(round, f64::from(policies)));
        println!("{name:<38} {min:>12.1} {median:>12.1} {max:>12.1}");
        figures[key] = json!([min, median, max]);
    }
    if json {
        let (machine, rounds) = (machine.json()?, rounds.len());
        println!(
            "{}",
            json!({ "machine": machine, "policies": policies, "rounds": rounds, "figures": figures })
        );
    }
    Ok(())
}

fn measure(policies: u32, rounds: u32, device: u32) -> anyhow::Result<(usize, Vec<Round>)> {
    let filling = Filling::new(policies, device);
    let round = |_| -> anyhow::Result<Round> {
        let cells = filling.write_cells()?;
        Ok(Round { cells, stages: [filling.fill_from_bytes(false)?, filling.fill_from_bytes(true)?] })
    };
    Ok((filling.bytes(), (0..rounds).map(round).collect::<anyhow::Result<_>>()?))
}
