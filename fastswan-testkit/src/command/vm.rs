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
    vm::{Guest, Image, Kernel, Store, VmError},
};
use serde_json::{Value, json};

use self::telling::{Telling, Told};
use super::{cargo, count::Count, workspace};

mod telling;

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
    let kernels = tell(&scenarios, &arguments.kernels.all())?;
    if arguments.json {
        println!("{}", json_of(&kernels));
    }
    let failed: Vec<String> = kernels.iter().flat_map(OnKernel::failures).collect();
    ensure!(failed.is_empty(), "not all went well:\n{}", failed.join("\n"));
    Ok(())
}

/// For `cargo testkit ci`: all scenarios, on all kernels.
pub(crate) fn check() -> anyhow::Result<Count> {
    let mut count = Count::default();
    for kernel in tell(&Scenario::all(), &Kernel::ALL)? {
        count.passed += kernel.told.outcomes.iter().filter(|outcome| outcome.ok).count() as u64;
        kernel.failures().iter().for_each(|failure| count.fail(failure));
    }
    Ok(count)
}

/// What became of scenarios on one kernel.
struct OnKernel {
    version: String,
    told: Told,
}

impl OnKernel {
    /// Everything that is not as it should be.
    fn failures(&self) -> Vec<String> {
        let Told { outcomes, missing, trouble, .. } = &self.told;
        let failed = outcomes.iter().filter(|outcome| !outcome.ok);
        let failed = failed.map(|Outcome { name, verdict, failures, .. }| {
            format!("{name} {verdict}: {}", failures.join("; "))
        });
        let missing = missing.iter().map(|name| format!("{name} did not run"));
        let all = failed.chain(missing).chain(trouble.iter().cloned());
        all.map(|failure| format!("Linux {}: {failure}", self.version)).collect()
    }
}

/// Runs scenarios on several kernels, side by side.
fn tell(scenarios: &[Scenario], kernels: &[Kernel]) -> anyhow::Result<Vec<OnKernel>> {
    clean_up_on_signals()?;
    let store = store()?;
    let start = Instant::now();
    let images = kernels.iter().map(|kernel| store.image(*kernel)).collect::<Result<Vec<_>, _>>()?;
    let programs = programs()?;
    println!("images and programs: {:.0} s", start.elapsed().as_secs_f64());
    println!("{:<20} {:<18} {:<19} {:>7}  figures", "kernel", "scenario", "verdict", "seconds");
    let told = side_by_side(&images, |image| tell_on(&store, image, scenarios, &programs));
    let kernels = told.into_iter().collect::<Result<Vec<_>, _>>()?;
    for OnKernel { version, told } in &kernels {
        println!("{version:<20} {:<18} {:<19} {:>7.1}", "", "", told.took.as_secs_f64());
    }
    Ok(kernels)
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

fn tell_on(
    store: &Store,
    image: &Image,
    scenarios: &[Scenario],
    programs: &[PathBuf],
) -> Result<OnKernel, VmError> {
    let version = &image.version;
    let mut telling = Telling::new(scenarios);
    let mut guest = guest(store, image, "scenarios", programs)?;
    while let Some(left) = telling.boot() {
        let names: Vec<_> = left.iter().map(|scenario| scenario.name).collect();
        let limit: Duration = left.iter().map(|scenario| scenario.limit + Duration::from_secs(5)).sum();
        let command =
            format!("./fastswan-testkit guest run {} --results results --logs logs", names.join(" "));
        let ended = guest.run(&command, limit, |line| {
            let progress = serde_json::from_str(line).ok();
            if let Some(outcome) = progress.and_then(|progress| telling.hear(progress, Instant::now())) {
                print(version, outcome);
            }
        });
        if let Some(outcome) = telling.end(ended, Instant::now()) {
            print(version, outcome);
        }
    }
    Ok(OnKernel { version: version.clone(), told: telling.told() })
}

/// A guest with a fresh folder of this name, in which the programs are.
pub(crate) fn guest<'a>(
    store: &Store,
    image: &'a Image,
    name: &str,
    programs: &[PathBuf],
) -> Result<Guest<'a>, VmError> {
    let folder = store.run_folder(image.kernel, name)?;
    let programs: Vec<_> = programs.iter().map(PathBuf::as_path).collect();
    Guest::new(image, folder, &programs)
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
fn json_of(kernels: &[OnKernel]) -> Value {
    let object = |kernel: &OnKernel, outcome: &Outcome| {
        let mut object = json!({
            "name": outcome.name,
            "kernel": kernel.version,
            "ok": outcome.ok && kernel.failures().is_empty(),
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
    let runs =
        kernels.iter().flat_map(|kernel| kernel.told.outcomes.iter().map(|outcome| object(kernel, outcome)));
    let mut runs: Vec<Value> = runs.collect();
    if runs.len() == 1 && kernels.len() == 1 {
        return runs.remove(0);
    }
    let failures: BTreeMap<&str, Vec<String>> =
        kernels.iter().map(|kernel| (kernel.version.as_str(), kernel.failures())).collect();
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
