//! `testkit guest`: what a guest is told to do. Nobody else calls it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command as Process,
};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use fastswan_testkit::guest::{Progress, Scenario, append_line, nic};

use super::oracle::{facts, guest as guest_oracle};

/// What a guest can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tells scenarios, each in a process of its own.
    Run {
        /// Their names.
        names: Vec<String>,
        /// Where a JSON object is appended when one begins and when it has come to its end.
        #[arg(long)]
        results: PathBuf,
        /// Where their logs go.
        #[arg(long)]
        logs: PathBuf,
    },
    /// Tells one scenario.
    Tell {
        /// Its name.
        name: String,
        /// Where its logs go.
        #[arg(long)]
        logs: PathBuf,
    },
    /// Lets the kernel judge, with policies that are really offloaded.
    Oracle(guest_oracle::Arguments),
    /// Lets the kernel judge how the host is followed.
    Facts(facts::InGuest),
}

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    ensure!(nic::is_there(), "this is for guests that have the software NIC: use `cargo testkit vm`");
    match command {
        Command::Run { names, results, logs } => run_all(&names, &results, &logs),
        Command::Tell { name, logs } => named(&name)?.tell(&logs),
        Command::Oracle(arguments) => guest_oracle::judge(&arguments),
        Command::Facts(arguments) => facts::judge_in_guest(&arguments),
    }
}

fn run_all(names: &[String], results: &Path, logs: &Path) -> anyhow::Result<()> {
    let say =
        |progress| -> anyhow::Result<()> { Ok(append_line(results, &serde_json::to_string(&progress)?)?) };
    for name in names {
        let scenario = named(name)?;
        say(Progress::Begun(name.clone()))?;
        let logs = logs.join(name);
        // An earlier guest may have died in it.
        let _ = fs::remove_dir_all(&logs);
        let mut teller = Process::new(std::env::current_exe()?);
        teller.args(["guest", "tell", name, "--logs"]).arg(&logs);
        let outcome = scenario.run(&mut teller, &logs);
        say(Progress::Ended(outcome))?;
    }
    Ok(())
}

fn named(name: &str) -> anyhow::Result<Scenario> {
    Scenario::named(name)
        .with_context(|| format!("no scenario is called {name}: see `cargo testkit vm list`"))
}
