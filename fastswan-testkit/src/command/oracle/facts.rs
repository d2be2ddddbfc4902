//! `cargo testkit oracle --facts`: the kernel judges how the mirror follows the host.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use fastswan_testkit::{
    guest::append_line,
    oracle::facts::{FactsOracle, FactsReport, HostMutant, KindReport, StoryReport},
    vm::{Image, Kernel, Store},
};
use serde_json::{Value, json};

use crate::command::{
    count::Count,
    vm::{guest, side_by_side, store},
};

/// Packets that `cargo testkit ci` has judged.
const CI_DECISIONS: u64 = 60_000;
/// The same for each host source that lies, if it is not noticed before. Some are wrong in every second part of a run only.
const CI_MUTANT_DECISIONS: u64 = 200_000;
/// The share of eligible packets that must be fast, over all kinds without hooks.
const LEAST_SHARE: f64 = 0.88;
/// Fewer packets tell nothing about it.
const ENOUGH_FOR_SHARE: u64 = 20_000;
/// Fewer packets tell nothing about a kind's share.
const ENOUGH: u64 = 20;

/// What `cargo testkit oracle --facts` is told besides.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// With --facts: the host source lies in this way, which must be noticed.
    #[arg(long, value_parser = lie, requires = "facts")]
    lie: Option<HostMutant>,
    /// With --facts: only this kind of change; may be given more than once.
    #[arg(long = "kind", value_parser = kind, requires = "facts")]
    kinds: Vec<String>,
    /// With --facts: tells only the cases from the field.
    #[arg(long, requires = "facts")]
    stories: bool,
}

impl Options {
    /// The kinds of change that were named.
    pub(crate) fn kinds(&self) -> &[String] {
        &self.kinds
    }
}

fn lie(name: &str) -> Result<HostMutant, String> {
    let names = || HostMutant::ALL.map(HostMutant::name).join(", ");
    HostMutant::ALL
        .into_iter()
        .find(|mutant| mutant.name() == name)
        .ok_or_else(|| format!("one of {}", names()))
}

fn kind(name: &str) -> Result<String, String> {
    let names = || FactsOracle::kinds().collect::<Vec<_>>().join(", ");
    FactsOracle::kinds()
        .find(|kind| *kind == name)
        .map(str::to_owned)
        .ok_or_else(|| format!("one of {}", names()))
}

pub(crate) fn run(options: &Options, seed: u64, decisions: u64, json: bool) -> anyhow::Result<()> {
    println!("seed {seed}");
    let start = Instant::now();
    let mut oracle = FactsOracle::new(seed, decisions);
    if !options.kinds.is_empty() {
        oracle = oracle.only(&options.kinds);
    }
    if let Some(mutant) = options.lie {
        oracle = oracle.mutant(mutant);
    }
    let mut report = if options.stories { FactsReport::empty(seed) } else { judge(&oracle)? };
    if options.lie.is_none() && options.kinds.is_empty() {
        report.stories = oracle.tell_stories()?;
        report.stories.iter().for_each(print_story);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} decisions in {seconds:.1} s, {} wrong, {} late, fast share {:.4}, seed {seed}",
        report.decisions(),
        report.wrong(),
        report.late(),
        report.fast_share()
    );
    if json {
        let mut object = report.json();
        object["seconds"] = seconds.into();
        object["lie"] = options.lie.map(HostMutant::name).into();
        println!("{object}");
    }
    if options.kinds.is_empty() {
        return acquit(&report);
    }
    let wrong = report.unexpectedly_wrong();
    ensure!(wrong.is_empty(), "decisions were wrong in {}, seed {seed}", wrong.join(", "));
    Ok(())
}

/// What `testkit guest facts` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct InGuest {
    /// How many packets are judged.
    #[arg(long)]
    decisions: u64,
    /// Where chance begins.
    #[arg(long)]
    seed: u64,
    /// Only these kinds of change.
    #[arg(long = "kind", value_parser = kind)]
    kinds: Vec<String>,
    /// Where a JSON object is appended.
    #[arg(long)]
    results: PathBuf,
}

/// Judges inside a guest.
pub(crate) fn judge_in_guest(arguments: &InGuest) -> anyhow::Result<()> {
    let mut oracle = FactsOracle::new(arguments.seed, arguments.decisions).in_guest();
    if !arguments.kinds.is_empty() {
        oracle = oracle.only(&arguments.kinds);
    }
    let report = oracle.run()?;
    let mut object = report.json();
    object["failure"] = acquit(&report).err().map(|error| format!("{error:#}")).into();
    append_line(&arguments.results, &object.to_string())?;
    Ok(())
}

/// Judges in guests, whose kernels have devices and hooks that this one need not have.
pub(crate) fn run_in_guests(
    kinds: &[String],
    kernels: &[Kernel],
    seed: u64,
    decisions: u64,
    json: bool,
) -> anyhow::Result<()> {
    println!("seed {seed}");
    let store = store()?;
    let images = kernels.iter().map(|kernel| store.image(*kernel)).collect::<Result<Vec<_>, _>>()?;
    let judged = side_by_side(&images, |image| in_guest(&store, image, kinds, seed, decisions));
    let mut failures = Vec::new();
    let mut runs = Vec::new();
    for (image, judged) in images.iter().zip(judged) {
        let object = judged.with_context(|| format!("Linux {}", image.version))?;
        println!("\nLinux {}", image.version);
        print_rows(&object);
        failures
            .extend(object["failure"].as_str().map(|failure| format!("Linux {}: {failure}", image.version)));
        runs.push(object);
    }
    if json {
        let wrong: u64 = runs.iter().filter_map(|run| run["wrong"].as_u64()).sum();
        println!(
            "{}",
            json!({ "ok": failures.is_empty(), "wrong": wrong, "failures": failures, "runs": runs })
        );
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

fn in_guest(
    store: &Store,
    image: &Image,
    kinds: &[String],
    seed: u64,
    decisions: u64,
) -> anyhow::Result<Value> {
    let program = std::env::current_exe()?;
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let kinds: Vec<String> = kinds.iter().map(|kind| format!(" --kind {kind}")).collect();
    let kinds = kinds.concat();
    let command =
        format!("./{name} guest facts --decisions {decisions} --seed {seed} --results results{kinds}");
    let limit =
        Duration::from_secs(300) + Duration::from_millis(60) * u32::try_from(decisions).unwrap_or(u32::MAX);
    let mut report = None;
    let run = guest(store, image, "facts", &[program])?.run(&command, limit, |line| {
        report = serde_json::from_str::<Value>(line).ok().or_else(|| report.take());
    })?;
    ensure!(run.status == 0, "the guest failed: {}", run.output);
    ensure!(run.complaints.is_empty(), "the kernel said: {}", run.complaints.join("\n"));
    let mut report = report.context("the guest has judged nothing")?;
    report["kernel"] = image.version.clone().into();
    report["seconds"] = run.took.as_secs_f64().into();
    Ok(report)
}

/// Prints what a guest has found.
fn print_rows(report: &Value) {
    let number = |row: &Value, name: &str| row[name].as_u64().unwrap_or(0);
    print_head();
    let rows = report["kinds"].as_object().into_iter().flatten();
    for (name, row) in rows.filter(|(_, row)| number(row, "decisions") + number(row, "refused") > 0) {
        let [changes, decisions, fast, wrong, late, eligible] =
            ["changes", "decisions", "fast", "wrong", "late", "eligible"].map(|name| number(row, name));
        let share = row["fast_share"].as_f64().unwrap_or(0.0);
        println!(
            "{name:<24} {changes:>7} {decisions:>9} {fast:>8} {wrong:>6} {late:>6} {eligible:>9} {share:>10.4}"
        );
        if let Some(refusal) = row["refusal"].as_str() {
            println!("    {} refused: {refusal}", number(row, "refused"));
        }
        for example in row["examples"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            println!("    {example}");
        }
    }
    println!(
        "{} decisions in {:.1} s, {} wrong, {} late, fast share {:.4}",
        number(report, "decisions"),
        report["seconds"].as_f64().unwrap_or(0.0),
        number(report, "wrong"),
        number(report, "late"),
        report["fast_share"].as_f64().unwrap_or(0.0)
    );
}

fn print_head() {
    println!(
        "{:<24} {:>7} {:>9} {:>8} {:>6} {:>6} {:>9} {:>10}",
        "kind", "changes", "decisions", "fast", "wrong", "late", "eligible", "fast share"
    );
}

/// For `cargo testkit ci`: a fresh seed, the cases from the field, and every host source that lies.
pub(crate) fn check() -> anyhow::Result<Count> {
    let seed = rand::random();
    println!("seed {seed}");
    let oracle = FactsOracle::new(seed, CI_DECISIONS);
    let mut report = judge(&oracle)?;
    report.stories = oracle.tell_stories()?;
    report.stories.iter().for_each(print_story);
    acquit(&report)?;
    let mut count = Count::PASSED;
    for mutant in HostMutant::ALL {
        println!("\na host source that lies about {}: must be noticed", mutant.name());
        let convicted = FactsOracle::new(seed, CI_MUTANT_DECISIONS).convict(mutant)?;
        count.expect(convicted, format_args!("{}: was not noticed, seed {seed}", mutant.name()));
    }
    Ok(count)
}

fn judge(oracle: &FactsOracle) -> anyhow::Result<FactsReport> {
    let start = Instant::now();
    let report = oracle.run().context("judging how the host is followed")?;
    println!("{} decisions in {:.1} s", report.decisions(), start.elapsed().as_secs_f64());
    print_head();
    report.kinds.iter().filter(|kind| kind.decisions + kind.refused > 0).for_each(print_kind);
    Ok(report)
}

fn print_kind(kind: &KindReport) {
    println!(
        "{:<24} {:>7} {:>9} {:>8} {:>6} {:>6} {:>9} {:>10.4}",
        kind.name,
        kind.changes,
        kind.decisions,
        kind.fast,
        kind.wrong,
        kind.late,
        kind.eligible,
        kind.fast_share()
    );
    print_more(kind);
}

fn print_more(kind: &KindReport) {
    if let Some(refusal) = &kind.refusal {
        println!("    {} refused: {refusal}", kind.refused);
    }
    if kind.stuck > 0 {
        println!("    {} times the source did not catch up", kind.stuck);
    }
    if kind.eligible >= ENOUGH {
        let mut reasons: Vec<_> = kind.eligible_passes.iter().collect();
        reasons.sort_by_key(|(_, packets)| std::cmp::Reverse(**packets));
        let reasons: Vec<String> =
            reasons.iter().map(|(reason, packets)| format!("{} {packets}", reason.name())).collect();
        if !reasons.is_empty() {
            println!("    eligible but passed: {}", reasons.join(", "));
        }
    }
    for example in &kind.examples {
        println!("    {example}");
    }
}

fn print_story(story: &StoryReport) {
    let verdict = match (story.holds, story.is_known_gap) {
        (true, false) => "holds",
        (true, true) => "HOLDS: no longer a known gap",
        (false, true) => "KNOWN GAP: does not hold",
        (false, false) => "DOES NOT HOLD",
    };
    let packets = &story.packets;
    println!(
        "case {:<4} {:<56} {verdict}: {} wrong, {} late, {} of {} eligible are fast",
        story.case, packets.name, packets.wrong, packets.late, packets.eligible_fast, packets.eligible
    );
    if !story.holds {
        print_more(packets);
    }
}

/// Fails if a decision was wrong that was not known to be, or a story has an end that nobody knew of.
fn acquit(report: &FactsReport) -> anyhow::Result<()> {
    let known = report.kinds.iter().filter(|kind| kind.wrong > 0 && kind.is_known_gap);
    let known: Vec<String> = known.map(|kind| format!("{} {}", kind.name, kind.wrong)).collect();
    if !known.is_empty() {
        println!("KNOWN GAPS, in which decisions were wrong: {}", known.join(", "));
    }
    let wrong = report.unexpectedly_wrong();
    ensure!(wrong.is_empty(), "decisions were wrong in {}, seed {}", wrong.join(", "), report.seed);
    let share = report.fast_share();
    ensure!(
        report.decisions() < ENOUGH_FOR_SHARE || share >= LEAST_SHARE,
        "too few eligible packets were fast: {share:.4}, seed {}",
        report.seed
    );
    let failed = report.stories.iter().filter(|story| !story.holds && !story.is_known_gap);
    let failed: Vec<&str> = failed.map(|story| story.packets.name).collect();
    ensure!(failed.is_empty(), "cases that do not hold: {}", failed.join(", "));
    Ok(())
}
