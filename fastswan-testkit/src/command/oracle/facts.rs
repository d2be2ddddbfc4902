//! `cargo testkit oracle --facts`: the kernel judges how the mirror follows the host.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use fastswan_testkit::oracle::facts::{FactsOracle, FactsReport, HostMutant, KindReport, StoryReport};

use crate::command::count::Count;

/// Packets that `cargo testkit ci` has judged.
const CI_DECISIONS: u64 = 60_000;
/// The same for each host source that lies, until it is noticed.
const CI_MUTANT_DECISIONS: u64 = 15_000;
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
    /// With --facts: also what netfilter and tc do.
    #[arg(long, requires = "facts")]
    hooks: bool,
    /// With --facts: tells only the cases from the field.
    #[arg(long, requires = "facts")]
    stories: bool,
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
    if options.hooks {
        oracle = oracle.hooks();
    }
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
    acquit(&report)
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
    let mut count = Count { passed: 1, failed: 0 };
    for mutant in HostMutant::ALL {
        println!("\na host source that lies about {}: must be noticed", mutant.name());
        let convicted = FactsOracle::new(seed, CI_MUTANT_DECISIONS).convict(mutant)?;
        if convicted {
            count.passed += 1;
        } else {
            println!("{}: was not noticed, seed {seed}", mutant.name());
            count.failed += 1;
        }
    }
    Ok(count)
}

fn judge(oracle: &FactsOracle) -> anyhow::Result<FactsReport> {
    let start = Instant::now();
    let report = oracle.run().context("judging how the host is followed")?;
    println!("{} decisions in {:.1} s", report.decisions(), start.elapsed().as_secs_f64());
    println!(
        "{:<24} {:>7} {:>9} {:>8} {:>6} {:>6} {:>9} {:>10}",
        "kind", "changes", "decisions", "fast", "wrong", "late", "eligible", "fast share"
    );
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
    let failed = report.stories.iter().filter(|story| !story.holds && !story.is_known_gap);
    let failed: Vec<&str> = failed.map(|story| story.packets.name).collect();
    ensure!(failed.is_empty(), "cases that do not hold: {}", failed.join(", "));
    Ok(())
}
