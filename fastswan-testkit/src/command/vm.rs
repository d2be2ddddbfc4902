//! `cargo testkit vm`: scenarios in guests with the software NIC.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Command as Process,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Subcommand;
use fastswan_testkit::{
    guest::{Outcome, Scenario},
    lab::clean_up_on_signals,
    vm::{Guest, Image, Kernel, Run, Store, VmError},
};
use serde_json::{Value, json};

use super::{cargo, count::Count, workspace};

/// How often a kernel is booted for the scenarios, if the emulator lets it die.
const MOST_BOOTS: u32 = 5;

/// What is done with guests.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Names the scenarios.
    List,
    /// Builds the images, and runs nothing.
    Build(Kernels),
    /// Runs scenarios.
    Run(Arguments),
}

/// Which kernels.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Kernels {
    /// Only this kernel: 6.12 or 7.
    #[arg(long, value_parser = kernel)]
    pub(crate) kernel: Option<Kernel>,
}

impl Kernels {
    /// Those that were named, or all.
    pub(crate) fn all(&self) -> Vec<Kernel> {
        self.kernel.map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel])
    }
}

/// What `cargo testkit vm run` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Names of scenarios, or `all`.
    #[arg(required = true)]
    names: Vec<String>,
    #[command(flatten)]
    kernels: Kernels,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

fn kernel(name: &str) -> Result<Kernel, String> {
    let names = || Kernel::ALL.map(Kernel::name).join(" or ");
    Kernel::ALL.into_iter().find(|kernel| kernel.name() == name).ok_or_else(names)
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::List => {
            for Scenario { name, about, expected_failure, .. } in Scenario::all() {
                println!("{name:<18} {about}");
                if let Some(reason) = expected_failure {
                    println!("{:<18} expected to fail: {reason}", "");
                }
            }
            Ok(())
        }
        Command::Build(kernels) => {
            let store = store()?;
            for kernel in kernels.all() {
                println!("Linux {}: ready", store.image(kernel)?.version);
            }
            Ok(())
        }
        Command::Run(arguments) => run_scenarios(arguments),
    }
}

fn run_scenarios(arguments: &Arguments) -> anyhow::Result<()> {
    let scenarios = if arguments.names == ["all"] {
        Scenario::all()
    } else {
        let named = |name: &String| {
            Scenario::named(name)
                .with_context(|| format!("no scenario is called {name}: see `cargo testkit vm list`"))
        };
        arguments.names.iter().map(named).collect::<Result<_, _>>()?
    };
    let told = tell(&scenarios, &arguments.kernels.all())?;
    if arguments.json {
        println!("{}", json_of(&told));
    }
    let failed: Vec<String> = told.iter().flat_map(Told::failures).collect();
    ensure!(failed.is_empty(), "not all went well:\n{}", failed.join("\n"));
    Ok(())
}

/// For `cargo testkit ci`: all scenarios, on all kernels.
pub(crate) fn check() -> anyhow::Result<Count> {
    let told = tell(&Scenario::all(), &Kernel::ALL)?;
    let mut count = Count::default();
    for told in &told {
        count.passed += told.outcomes.iter().filter(|outcome| outcome.ok).count() as u64;
        told.failures().iter().for_each(|failure| count.fail(failure));
    }
    Ok(count)
}

/// What became of scenarios on one kernel.
struct Told {
    version: String,
    outcomes: Vec<Outcome>,
    missing: Vec<&'static str>,
    run: anyhow::Result<Run>,
}

impl Told {
    /// Everything that is not as it should be.
    fn failures(&self) -> Vec<String> {
        let version = &self.version;
        let mut failures = Vec::new();
        for outcome in self.outcomes.iter().filter(|outcome| !outcome.ok) {
            let why = outcome.failures.join("; ");
            failures.push(format!("Linux {version}: {} {}: {why}", outcome.name, outcome.verdict));
        }
        for name in &self.missing {
            failures.push(format!("Linux {version}: {name} did not run"));
        }
        match &self.run {
            Ok(run) => {
                if run.status != 0 {
                    failures.push(format!("Linux {version}: the guest failed: {}", run.output));
                }
                let complaints = run.complaints.iter();
                failures.extend(complaints.map(|line| format!("Linux {version}: the kernel said: {line}")));
            }
            Err(error) => failures.push(format!("{error:#}")),
        }
        failures
    }
}

/// Runs scenarios on several kernels, side by side.
fn tell(scenarios: &[Scenario], kernels: &[Kernel]) -> anyhow::Result<Vec<Told>> {
    clean_up_on_signals()?;
    let store = store()?;
    let start = Instant::now();
    let images = kernels.iter().map(|kernel| store.image(*kernel)).collect::<Result<Vec<_>, _>>()?;
    let programs = programs()?;
    println!("images and programs: {:.0} s", start.elapsed().as_secs_f64());
    println!("{:<20} {:<18} {:<19} {:>7}  figures", "kernel", "scenario", "verdict", "seconds");
    let told = side_by_side(&images, |image| tell_on(&store, image, scenarios, &programs));
    for told in &told {
        if let Ok(run) = &told.run {
            println!("{:<20} {:<18} {:<19} {:>7.1}", told.version, "", "", run.took.as_secs_f64());
        }
    }
    Ok(told)
}

/// Does the same with each image at the same time.
pub(crate) fn side_by_side<T: Send>(images: &[Image], run: impl Fn(&Image) -> T + Sync) -> Vec<T> {
    let run = &run;
    thread::scope(|scope| {
        let runs: Vec<_> = images.iter().map(|image| scope.spawn(move || run(image))).collect();
        let results =
            runs.into_iter().map(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        results.collect()
    })
}

fn tell_on(store: &Store, image: &Image, scenarios: &[Scenario], programs: &[PathBuf]) -> Told {
    let mut outcomes = Vec::new();
    let mut boots = 1;
    let run = loop {
        let left = left(scenarios, &outcomes);
        let names: Vec<_> = left.iter().map(|scenario| scenario.name).collect();
        let limit: Duration = left.iter().map(|scenario| scenario.limit + Duration::from_secs(5)).sum();
        let command =
            format!("./fastswan-testkit guest run {} --results results --logs logs", names.join(" "));
        let run = boot(store, image, programs, &command, limit, |line| {
            if let Ok(outcome) = serde_json::from_str::<Outcome>(line) {
                print(&image.version, &outcome);
                outcomes.push(outcome);
            }
        });
        match &run {
            Err(error) if is_of_the_emulator(error) && boots < MOST_BOOTS => {
                eprintln!(
                    "{error:#}\nThat is the emulator's fault: once more, with the scenarios that are left"
                );
                boots += 1;
            }
            _ => break run,
        }
    };
    let missing = left(scenarios, &outcomes).into_iter().map(|scenario| scenario.name).collect();
    Told { version: image.version.clone(), outcomes, missing, run }
}

/// The scenarios that have not come to an end.
fn left<'a>(scenarios: &'a [Scenario], outcomes: &[Outcome]) -> Vec<&'a Scenario> {
    let has_run = |scenario: &&Scenario| outcomes.iter().any(|outcome| outcome.name == scenario.name);
    scenarios.iter().filter(|scenario| !has_run(scenario)).collect()
}

/// Whether a guest died of what its emulated processors did wrong.
fn is_of_the_emulator(error: &anyhow::Error) -> bool {
    error.downcast_ref::<VmError>().is_some_and(VmError::is_of_the_emulator)
}

/// Boots a kernel, and runs a command in a fresh folder with the programs.
pub(crate) fn boot(
    store: &Store,
    image: &Image,
    programs: &[PathBuf],
    command: &str,
    limit: Duration,
    progress: impl FnMut(&str),
) -> anyhow::Result<Run> {
    let folder = store.run_folder(image.kernel)?;
    let programs: Vec<_> = programs.iter().map(PathBuf::as_path).collect();
    let guest = Guest::new(image, folder, &programs)?;
    Ok(guest.run(command, limit, progress)?)
}

fn print(version: &str, outcome: &Outcome) {
    let figures: Vec<String> =
        outcome.figures.iter().map(|(name, value)| format!("{name} {value}")).collect();
    let Outcome { name, verdict, seconds, .. } = outcome;
    println!("{version:<20} {name:<18} {verdict:<19} {seconds:>7.1}  {}", figures.join(", "));
    if let Some(reason) = &outcome.reason {
        println!("{:>20} expected to fail: {reason}", "");
    }
    for failure in &outcome.failures {
        println!("{:>20} {failure}", "");
    }
}

/// One run's fields at the top, or a list of several.
fn json_of(told: &[Told]) -> Value {
    let object = |told: &Told, outcome: &Outcome| {
        let mut object = json!({
            "name": outcome.name,
            "kernel": told.version,
            "ok": outcome.ok && told.failures().is_empty(),
            "verdict": outcome.verdict,
            "seconds": outcome.seconds,
            "reason": outcome.reason,
            "failures": outcome.failures,
        });
        for (name, value) in &outcome.figures {
            object[name] = (*value).into();
        }
        object
    };
    let mut runs: Vec<Value> =
        told.iter().flat_map(|told| told.outcomes.iter().map(|outcome| object(told, outcome))).collect();
    if runs.len() == 1 && told.len() == 1 {
        return runs.remove(0);
    }
    let failures: BTreeMap<&str, Vec<String>> =
        told.iter().map(|told| (told.version.as_str(), told.failures())).collect();
    json!({ "ok": failures.values().all(Vec::is_empty), "failures": failures, "runs": runs })
}

/// Where images are kept, beside what cargo builds.
pub(crate) fn store() -> anyhow::Result<Store> {
    Ok(Store::open(workspace().join("target/vm"))?)
}

/// The programs that run in a guest: this one, and the mirror as whoever runs it gets it.
pub(crate) fn programs() -> anyhow::Result<Vec<PathBuf>> {
    let build =
        ["build", "--quiet", "--release", "--locked", "--package", "fastswan-examples", "--bin", "mirror"];
    let status =
        Process::new(cargo()).current_dir(workspace()).args(build).status().context("running cargo")?;
    if !status.success() {
        bail!("building the mirror failed");
    }
    Ok(vec![std::env::current_exe()?, workspace().join("target/release/mirror")])
}
