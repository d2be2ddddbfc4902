//! `cargo testkit bench datapath`: what a packet costs in the XDP program, beside two longest-prefix matches and beside
//! what every program must do that forwards.

mod plot;
mod row;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, ensure};
use fastswan::policy::Family;
use fastswan_testkit::{
    datapath::{ASK_BACK, Bench, DatapathLab, Figures, Mix, Round, Temperature},
    lab::{clean_up_on_signals, remove_leftovers},
};
use serde_json::json;

use self::row::Row;
use super::machine::{Machine, stay_on_this_cpu};

/// Packets of a run of one program, and flows that are not warm.
pub(super) const PACKETS: u32 = 1 << 20;

/// What `cargo testkit bench datapath` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Numbers of outbound policies.
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [1, 100, 1_000, 10_000, 100_000, 1_000_000],
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    policies: Vec<u32>,
    /// A kind of gateway; may be given several times. All, if none is given.
    #[arg(long, value_parser = mix)]
    mix: Vec<Mix>,
    /// How much lies in the processor's caches: cold, warm or zipf; may be given several times. All, if none is given.
    #[arg(long, value_parser = temperature)]
    temperature: Vec<Temperature>,
    /// How often all is loaded, and each program has all packets.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
    /// Writes a drawing of it into this folder: datapath.svg.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

fn mix(name: &str) -> Result<Mix, String> {
    let named = Mix::ALL.into_iter().find(|mix| mix.name() == name);
    named.ok_or_else(|| format!("one of {}", Mix::ALL.map(Mix::name).join(", ")))
}

fn temperature(name: &str) -> Result<Temperature, String> {
    let named = Temperature::ALL.into_iter().find(|temperature| temperature.name() == name);
    named.ok_or_else(|| format!("one of {}", Temperature::ALL.map(Temperature::name).join(", ")))
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads XDP programs: run it as root"
    );
    if let Some(folder) = &arguments.plot {
        fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
    }
    remove_leftovers();
    clean_up_on_signals()?;
    println!(
        "ns per packet beyond the empty program: median (least to most) of {} rounds; fastswan asks the kernel's routes \
         about one packet in {ASK_BACK}",
        arguments.rounds
    );
    println!("{}", row::HEAD);
    let machine = Machine::look()?;
    let rows = DatapathLab::new()?.enter(|device| measure(arguments, device))??;
    if let Some(folder) = &arguments.plot {
        let file = folder.join("datapath.svg");
        plot::draw(&rows, &file).with_context(|| format!("drawing {}", file.display()))?;
        println!("drawn: {}", file.display());
    }
    if arguments.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        println!(
            "{}",
            json!({ "machine": machine.json()?, "packets": PACKETS, "rounds": arguments.rounds, "ask_back": ASK_BACK, "rows": rows })
        );
    }
    Ok(())
}

/// Measures everything, in the namespace of a device.
fn measure(arguments: &Arguments, device: u32) -> anyhow::Result<Vec<Row>> {
    // What the program asks the kernel about it counts for each CPU.
    stay_on_this_cpu()?;
    let mixes = if arguments.mix.is_empty() { &Mix::ALL[..] } else { &arguments.mix };
    let temperatures =
        if arguments.temperature.is_empty() { &Temperature::ALL[..] } else { &arguments.temperature };
    let mut rows = Vec::new();
    for &mix in mixes {
        for &family in mix.families() {
            for &policies in &arguments.policies {
                let gateway = Gateway { mix, family, policies, device };
                let measured = gateway.measure(temperatures, arguments.rounds)?;
                for (&temperature, rounds) in temperatures.iter().zip(&measured) {
                    let row = Row { mix, family, temperature, policies, figures: Figures::of(rounds) };
                    println!("{row}");
                    rows.push(row);
                }
            }
        }
    }
    Ok(rows)
}

/// Policies of a mix, and where their packets come in.
struct Gateway {
    mix: Mix,
    family: Family,
    policies: u32,
    device: u32,
}

impl Gateway {
    /// Measures with packets of each of these temperatures in each round, for which all is loaded anew.
    fn measure(&self, temperatures: &[Temperature], rounds: u32) -> anyhow::Result<Vec<Vec<Round>>> {
        let Self { mix, family, policies, device } = *self;
        let mut measured = vec![Vec::new(); temperatures.len()];
        for _ in 0..rounds {
            let place = || format!("{} of {policies} policies, {}", mix.name(), row::name(family));
            let mut bench = Bench::new(mix, family, policies, PACKETS, device).with_context(place)?;
            for (&temperature, rounds) in temperatures.iter().zip(&mut measured) {
                let place = || format!("{}, {}", place(), temperature.name());
                bench.set_temperature(temperature).with_context(place)?;
                bench.verify().with_context(place)?;
                rounds.push(bench.measure().with_context(place)?);
            }
        }
        Ok(measured)
    }
}
