//! `cargo testkit oracle --guest`: the kernels of guests judge the mirror, with policies that are really offloaded.
//!
//! What the guest finds comes to the host line by line, as JSON: each set's report with its name and the number of
//! the rule that was broken, and how the model of the kernel's order compares with the kernel.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::ensure;
use fastswan_testkit::{
    guest::append_line,
    oracle::{BrokenRule, ModelReport, Oracle, Set},
    vm::{Image, Kernel, Run, Store},
};
use serde_json::{Value, json};

use super::print::{print, print_head, set};
use crate::command::{
    count::Count,
    vm::{guest, side_by_side, store},
};

/// Packets that `cargo testkit ci` has judged on each kernel.
const CI_DECISIONS: u64 = 20_000;
/// The rule that only kernels can judge that really offload: the highest priority number.
pub(crate) const CI_MUTANT: u8 = 3;
/// How often policies change while the model is compared with the kernel.
const MODEL_ROUNDS: u64 = 60;

/// Of so many packets the model may err on one. After some sequences it takes an offloaded policy to be hidden that the
/// kernel finds, several packets at a time; perhaps because it merges lists into another one than the kernel's tree.
const MODEL_DISAGREES_BELOW: u64 = 50;

/// What `testkit guest oracle` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many packets are judged for each rule.
    #[arg(long)]
    decisions: u64,
    /// Where chance begins.
    #[arg(long)]
    seed: u64,
    /// Breaks these rules, one after the other; 0 is none.
    #[arg(long = "mutant", value_parser = clap::value_parser!(u8).range(0..=8))]
    broken: Vec<u8>,
    /// Judges only this kind of policies.
    #[arg(long = "set", value_parser = set)]
    sets: Vec<Set>,
    /// Where JSON objects are appended.
    #[arg(long)]
    results: PathBuf,
}

/// Judges inside a guest.
pub(crate) fn judge(arguments: &Arguments) -> anyhow::Result<()> {
    let Arguments { decisions, seed, results, .. } = arguments;
    for &number in &arguments.broken {
        let mut oracle = Oracle::with_nic(*seed, *decisions);
        if let Some(rule) = usize::from(number).checked_sub(1) {
            oracle = oracle.broken_rule(BrokenRule::ALL[rule]);
        }
        if !arguments.sets.is_empty() {
            oracle = oracle.sets(&arguments.sets);
        }
        let mut lost = Ok(());
        let mut start = Instant::now();
        oracle.run(|report| {
            let mut object = report.json();
            (object["set"], object["mutant"]) = (report.set.name().into(), number.into());
            object["seconds"] = start.elapsed().as_secs_f64().into();
            start = Instant::now();
            lost = append_line(results, &object.to_string());
        })?;
        lost?;
        if number == 0 {
            let report = ModelReport::compare(*seed, MODEL_ROUNDS, true)?;
            append_line(results, &json!({ "model": report.json() }).to_string())?;
        }
    }
    Ok(())
}

/// What is judged on each kernel.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    pub(crate) decisions: u64,
    pub(crate) seed: u64,
    /// All, if there are none.
    pub(crate) sets: Vec<Set>,
    /// Numbers of broken rules; 0 is none.
    pub(crate) broken: Vec<u8>,
}

/// What a kernel found.
struct Judged {
    version: String,
    /// By the rule that was broken, and the set.
    reports: BTreeMap<u64, BTreeMap<String, Value>>,
    model: Option<Value>,
    run: anyhow::Result<Run>,
}

/// Judges in guests, and prints what they find.
pub(crate) fn run(trial: &Trial, kernels: &[Kernel], json: bool) -> anyhow::Result<()> {
    let judged = in_guests(trial, kernels)?;
    let failures: Vec<String> = judged.iter().flat_map(|judged| judged.failures(trial)).collect();
    if json {
        let mut runs: Vec<Value> = judged.iter().map(|judged| judged.json(trial)).collect();
        let wrong: u64 = runs.iter().filter_map(|run| run["wrong"].as_u64()).sum();
        let all = json!({ "ok": failures.is_empty(), "wrong": wrong, "failures": failures, "runs": runs });
        println!("{}", if runs.len() == 1 { runs.remove(0) } else { all });
    }
    ensure!(failures.is_empty(), "not all is right:\n{}", failures.join("\n"));
    Ok(())
}

/// For `cargo testkit ci`: on all kernels, with a fresh seed, the rules as they are and the one that matters there.
pub(crate) fn check() -> anyhow::Result<Count> {
    let seed = rand::random();
    let trial = Trial { decisions: CI_DECISIONS, seed, sets: Vec::new(), broken: vec![0, CI_MUTANT] };
    let mut count = Count::default();
    for judged in in_guests(&trial, &Kernel::ALL)? {
        let failures = judged.failures(&trial);
        count.expect(failures.is_empty(), failures.join("\n"));
    }
    Ok(count)
}

fn in_guests(trial: &Trial, kernels: &[Kernel]) -> anyhow::Result<Vec<Judged>> {
    println!("seed {}", trial.seed);
    let store = store()?;
    let images = kernels.iter().map(|kernel| store.image(*kernel)).collect::<Result<Vec<_>, _>>()?;
    let judged = side_by_side(&images, |image| in_guest(&store, image, trial));
    let judged = judged.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    judged.iter().for_each(Judged::print);
    Ok(judged)
}

fn in_guest(store: &Store, image: &Image, trial: &Trial) -> anyhow::Result<Judged> {
    let Trial { decisions, seed, sets, broken } = trial;
    let program = std::env::current_exe()?;
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let options = [
        broken.iter().map(|number| format!(" --mutant {number}")).collect::<Vec<_>>(),
        sets.iter().map(|set| format!(" --set {}", set.name())).collect(),
    ];
    let options = options.concat().concat();
    let command =
        format!("./{name} guest oracle --decisions {decisions} --seed {seed} --results results{options}");
    let mut reports: BTreeMap<u64, BTreeMap<String, Value>> = BTreeMap::new();
    let mut model = None;
    // A packet takes about 2 ms at the worst, in a guest that has a core for itself.
    let limit =
        Duration::from_secs(120) + Duration::from_millis(20) * u32::try_from(*decisions).unwrap_or(u32::MAX);
    let run = guest(store, image, "oracle", &[program])?.run(&command, limit, |line| {
        let Ok(mut object) = serde_json::from_str::<Value>(line) else { return };
        if let Some(compared) = object.get_mut("model") {
            model = Some(compared.take());
        } else if let (Some(set), Some(number)) = (object["set"].as_str(), object["mutant"].as_u64()) {
            reports.entry(number).or_default().insert(set.to_owned(), object.clone());
        }
    });
    Ok(Judged { version: image.version.clone(), reports, model, run: run.map_err(Into::into) })
}

impl Judged {
    fn wrong(&self, broken: u8) -> u64 {
        let reports = self.reports.get(&broken.into()).into_iter().flatten();
        reports.filter_map(|(_, report)| report["wrong"].as_u64()).sum()
    }

    /// Everything that is not as it should be.
    fn failures(&self, trial: &Trial) -> Vec<String> {
        let mut failures = Vec::new();
        match &self.run {
            Ok(run) => {
                if run.status != 0 {
                    failures.push(format!("the guest failed: {}", run.output));
                }
                failures.extend(run.complaints.iter().map(|line| format!("the kernel said: {line}")));
            }
            Err(error) => failures.push(format!("{error:#}")),
        }
        for (position, &number) in trial.broken.iter().enumerate() {
            let wrong = self.wrong(number);
            // The first is on trial; what is broken after it shows that the judge notices.
            match position {
                0 if wrong > 0 => failures.push(format!("{wrong} decisions were wrong")),
                1.. if wrong == 0 => failures.push(format!("broken rule {number} was not noticed")),
                _ => {}
            }
        }
        let reports = self.reports.get(&0).into_iter().flatten();
        for (set, report) in reports.filter(|(_, report)| report["too_slow"] == true) {
            failures.push(format!("too few eligible packets of {set} were fast: {}", report["fast_share"]));
        }
        if let Some(model) = &self.model {
            let number = |name: &str| model[name].as_u64().unwrap_or(u64::MAX);
            let often = number("disagreements") > number("compared") / MODEL_DISAGREES_BELOW;
            if number("other_endings") > 0 || often {
                failures.push(format!("the model of the kernel's order disagrees with it: {model}"));
            }
        }
        failures.iter().map(|failure| format!("Linux {}: {failure}", self.version)).collect()
    }

    fn print(&self) {
        let took = self.run.as_ref().map_or(0.0, |run| run.took.as_secs_f64());
        println!("\nLinux {}, {took:.1} s", self.version);
        for (number, reports) in &self.reports {
            if *number > 0 {
                println!("broken rule {number}: must be noticed");
            }
            print_head();
            for (set, report) in reports {
                print(set, report);
            }
        }
        if let Some(model) = &self.model {
            println!(
                "the model of the order: {} stories, {} with another ending; {} packets, {} disagreements",
                model["stories"], model["other_endings"], model["compared"], model["disagreements"]
            );
        }
    }

    fn json(&self, trial: &Trial) -> Value {
        let failures = self.failures(trial);
        let judged = *trial.broken.first().unwrap_or(&0);
        let sets = self.reports.get(&judged.into()).cloned().unwrap_or_default();
        let sum = |name| sets.values().filter_map(|report: &Value| report[name].as_u64()).sum::<u64>();
        let others = trial.broken.iter().skip(1).map(|number| (number.to_string(), self.wrong(*number)));
        json!({
            "ok": failures.is_empty(),
            "kernel": self.version,
            "seconds": self.run.as_ref().map_or(0.0, |run| run.took.as_secs_f64()),
            "seed": trial.seed,
            "mutant": (judged > 0).then_some(judged),
            "decisions": sum("decisions"),
            "executed": sum("executed"),
            "fast": sum("fast"),
            "wrong": sum("wrong"),
            "sets": sets,
            "mutants_wrong": others.collect::<BTreeMap<_, _>>(),
            "model": self.model,
            "failures": failures,
        })
    }
}
