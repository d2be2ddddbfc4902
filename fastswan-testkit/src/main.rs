//! `cargo testkit`: shows fastswan, builds its bytecode and runs its tests.

mod command;

use std::process::ExitCode;

use clap::Parser;

use crate::command::{api, bench, chaos, ci, demo, doctor, ebpf, guest, oracle, vm};

/// Shows fastswan, builds its bytecode and runs its tests.
#[derive(Debug, Parser)]
#[command(name = "testkit")]
enum Command {
    /// Forwards packets between network namespaces and tells what took which path.
    Demo(demo::Arguments),
    /// Builds the committed bytecode, or checks it.
    #[command(subcommand)]
    Ebpf(ebpf::Command),
    /// Writes the public API down, or checks that it is what was written down.
    #[command(subcommand)]
    Api(api::Command),
    /// Lets the kernel judge which packets are forwarded, and for which policy.
    Oracle(oracle::Arguments),
    /// Changes everything at once, as fast as the kernel takes it, and watches the mirror.
    Chaos(chaos::Arguments),
    /// Measures how long a mirror takes to begin, how it follows a host that changes all the time, and what a packet costs.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Runs scenarios in guests with other kernels, a software NIC and strongSwan.
    #[command(subcommand)]
    Vm(vm::Command),
    /// What a guest is told to do.
    #[command(subcommand, hide = true)]
    Guest(guest::Command),
    /// Installs what the tests need and runs all of them.
    Ci(ci::Arguments),
    /// Tells what this machine can run, and why not.
    Doctor,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without the backtrace that `RUST_BACKTRACE` would add: it tells nothing to whoever runs this.
            eprintln!("testkit: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match Command::parse_from(arguments(std::env::args())) {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Ebpf(command) => ebpf::run(command),
        Command::Api(command) => api::run(command),
        Command::Oracle(arguments) => oracle::run(&arguments),
        Command::Chaos(arguments) => chaos::run(&arguments),
        Command::Bench(command) => bench::run(&command),
        Command::Vm(command) => vm::run(&command),
        Command::Guest(command) => guest::run(command),
        Command::Ci(arguments) => ci::run(&arguments),
        Command::Doctor => {
            doctor::run();
            Ok(())
        }
    }
}

/// Cargo's alias ends in the subcommand, so `cargo demo -- --json` says `demo -- --json`. Nothing here takes
/// positional arguments, which is what the dashes would announce.
fn arguments(all: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    let mut seen = false;
    all.filter(move |argument| {
        seen || argument != "--" || {
            seen = true;
            false
        }
    })
}
