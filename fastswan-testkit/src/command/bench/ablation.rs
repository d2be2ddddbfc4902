//! `cargo testkit bench ablation`: what each check of the XDP program costs.

use anyhow::ensure;
use fastswan::policy::Family;
use fastswan_testkit::{
    datapath::{Ablation, Costs, DatapathLab, Mix, Spread},
    lab::{clean_up_on_signals, remove_leftovers},
};
use serde_json::{Value, json};

use super::{
    datapath::PACKETS,
    machine::{Machine, stay_on_this_cpu},
};

/// What `cargo testkit bench ablation` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The number of outbound policies, site-to-site.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    policies: u32,
    /// How often each program has all packets.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads XDP programs: run it as root"
    );
    remove_leftovers();
    clean_up_on_signals()?;
    println!(
        "ns per packet that the program takes less without a check: median (least to most) of {} rounds; {} policies, \
         site-to-site, each packet of another random one",
        arguments.rounds, arguments.policies
    );
    let machine = Machine::look()?;
    let mut families = Vec::new();
    for (name, family) in [("IPv4", Family::V4), ("IPv6", Family::V6)] {
        let costs = DatapathLab::new()?.enter(|device| measure(arguments, family, device))??;
        println!("\n{name:<12} {}", shown(costs.whole));
        for (check, cost) in &costs.checks {
            println!("{:<12} {}", format!("{check:?}").to_lowercase(), shown(*cost));
        }
        families.push(json(name, &costs));
    }
    if arguments.json {
        let (policies, rounds) = (arguments.policies, arguments.rounds);
        println!(
            "{}",
            json!({ "machine": machine.json()?, "packets": PACKETS, "policies": policies, "rounds": rounds, "families": families })
        );
    }
    Ok(())
}

fn measure(arguments: &Arguments, family: Family, device: u32) -> anyhow::Result<Costs> {
    stay_on_this_cpu()?;
    let Arguments { policies, rounds, .. } = *arguments;
    let ablation = Ablation { mix: Mix::SiteToSite, family, policies, packets: PACKETS, device };
    Ok(ablation.measure(rounds)?)
}

fn shown(Spread { median, min, max }: Spread) -> String {
    format!("{median:>6.1} ({min:.1} to {max:.1})")
}

fn json(family: &str, costs: &Costs) -> Value {
    let spread = |Spread { median, min, max }: Spread| json!([min, median, max]);
    let checks =
        costs.checks.iter().map(|(check, cost)| (format!("{check:?}").to_lowercase(), spread(*cost)));
    json!({
        "family": family,
        "whole_ns": spread(costs.whole),
        "saved_ns": checks.collect::<serde_json::Map<_, _>>(),
    })
}
