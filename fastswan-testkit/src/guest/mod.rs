//! Stories that are told inside a guest, where the software NIC offloads and strongSwan does IKE.
//!
//! Each [`Scenario`] is told by a process of its own, in namespaces of its own and with a pair of ports of its own, and
//! its verdict is an [`Outcome`]. [`gateways`] is the place that most of them are about:
//!
//! - [`nic`]: the ports of the software NIC;
//! - [`swan`]: strongSwan in one gateway;
//! - [`mirror`]: the `mirror` example as a process;
//! - [`traffic`]: numbered packets between the hosts;
//! - [`wire`]: what passes between the gateways.

pub mod gateways;
pub mod mirror;
pub mod nic;
mod scenarios;
pub mod swan;
pub mod traffic;
pub mod wire;

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use self::nic::Pair;
use crate::lab;

/// Nothing takes longer in a guest, unless it never happens. Emulated machines are slow, and others use this one.
pub const PATIENCE: Duration = Duration::from_secs(25);

/// Something that happens between gateways.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Why it fails, if it is known to: what is not built yet.
    pub expected_failure: Option<&'static str>,
    /// How long it may take.
    pub limit: Duration,
    tell: fn(&mut Story) -> anyhow::Result<()>,
}

impl fmt::Debug for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Scenario {
    /// All of them.
    #[must_use]
    pub fn all() -> Vec<Self> {
        scenarios::all()
    }

    /// The one with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|scenario| scenario.name == name)
    }

    /// Tells it, in this process, and writes what was found into `logs`.
    ///
    /// # Errors
    ///
    /// If that cannot be written. What fails in the story is part of what was found.
    pub fn tell(&self, logs: &Path) -> anyhow::Result<()> {
        let mut story = Story { logs: logs.to_owned(), findings: Findings::default() };
        if let Err(error) = (self.tell)(&mut story) {
            story.findings.failures.push(format!("{error:#}"));
        }
        let findings = serde_json::to_vec(&story.findings)?;
        fs::write(logs.join(FINDINGS), findings).context("writing the findings")
    }

    /// Has it told by another process, `teller`, which must call [`Self::tell`], and cleans up behind it.
    #[must_use]
    pub fn run(&self, teller: &mut Command, logs: &Path) -> Outcome {
        let start = Instant::now();
        let findings = self
            .findings(teller, logs)
            .unwrap_or_else(|error| Findings { failures: vec![format!("{error:#}")], ..Findings::default() });
        Pair::remove_leftovers();
        lab::remove_leftovers();
        self.judge(findings, start.elapsed())
    }

    /// The outcome if the guest dies while it is told.
    #[must_use]
    pub fn died(&self, why: String, took: Duration) -> Outcome {
        let findings = Findings { failures: vec![why], ..Findings::default() };
        // That is not the failure which some are expected to have.
        Self { expected_failure: None, ..*self }.judge(findings, took)
    }

    fn findings(&self, teller: &mut Command, logs: &Path) -> anyhow::Result<Findings> {
        fs::create_dir_all(logs).context("making a folder for the logs")?;
        let log = fs::File::create(logs.join("story")).context("making a log")?;
        let process = teller.stdout(log.try_clone()?).stderr(log).process_group(0);
        let mut process = process.spawn().context("starting the process that tells the story")?;
        let group = Pid::from_raw(process.id().cast_signed());
        let deadline = Instant::now() + self.limit;
        let ended = loop {
            match process.try_wait()? {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => break None,
                None => sleep(Duration::from_millis(20)),
            }
        };
        // Whatever it has started goes with it.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = process.wait();
        let log = || fs::read_to_string(logs.join("story")).unwrap_or_default();
        let status =
            ended.with_context(|| format!("not done after {} s: {}", self.limit.as_secs(), log()))?;
        let findings = fs::read(logs.join(FINDINGS)).with_context(|| format!("{status}: {}", log()))?;
        Ok(serde_json::from_slice(&findings)?)
    }

    fn judge(&self, findings: Findings, took: Duration) -> Outcome {
        let Findings { figures, failures } = findings;
        let verdict = match (failures.is_empty(), self.expected_failure) {
            (true, None) => Verdict::Passed,
            (false, None) => Verdict::Failed,
            (false, Some(_)) => Verdict::FailedAsExpected,
            (true, Some(_)) => Verdict::PassedUnexpectedly,
        };
        Outcome {
            name: self.name.to_owned(),
            ok: matches!(verdict, Verdict::Passed | Verdict::FailedAsExpected),
            verdict,
            reason: self.expected_failure.map(str::to_owned),
            seconds: took.as_secs_f64(),
            failures,
            figures,
        }
    }
}

/// Where a teller writes what it has found.
const FINDINGS: &str = "findings.json";

/// What the teller of a story notes.
#[derive(Debug)]
pub struct Story {
    logs: PathBuf,
    findings: Findings,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Findings {
    figures: BTreeMap<String, f64>,
    failures: Vec<String>,
}

impl Story {
    /// Where logs are kept.
    #[must_use]
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Notes a figure.
    #[allow(clippy::cast_precision_loss)]
    pub fn figure(&mut self, name: &str, value: u64) {
        self.findings.figures.insert(name.to_owned(), value as f64);
    }

    /// Adds to a figure.
    #[allow(clippy::cast_precision_loss)]
    pub fn add(&mut self, name: &str, value: u64) {
        *self.findings.figures.entry(name.to_owned()).or_default() += value as f64;
    }

    /// Notes that something is not as it should be, if so. The story goes on.
    pub fn expect(&mut self, holds: bool, what: impl Into<String>) {
        if !holds {
            self.findings.failures.push(what.into());
        }
    }
}

/// How a scenario ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// All was as it should be.
    #[serde(rename = "passed")]
    Passed,
    /// It was not.
    #[serde(rename = "failed")]
    Failed,
    /// It was not, and is known not to be.
    #[serde(rename = "failed as expected")]
    FailedAsExpected,
    /// It was, although it is said not to be.
    #[serde(rename = "passed unexpectedly")]
    PassedUnexpectedly,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::FailedAsExpected => "failed as expected",
            Self::PassedUnexpectedly => "PASSED UNEXPECTEDLY",
        })
    }
}

/// What a scenario found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// Passed, or failed as expected.
    pub ok: bool,
    /// How it ended.
    pub verdict: Verdict,
    /// Why it is expected to fail.
    pub reason: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// What was not as it should be.
    pub failures: Vec<String>,
    /// What was counted and measured.
    pub figures: BTreeMap<String, f64>,
}

/// What a guest says of its scenarios, a line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// The scenario with this name has begun.
    Begun(String),
    /// One has come to its end.
    Ended(Outcome),
}

/// Appends a line to a file at once.
///
/// # Errors
///
/// The errno of a system call.
pub fn append_line(path: &Path, line: &str) -> io::Result<()> {
    let mut file = fs::File::options().create(true).append(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())
}

/// Waits until something holds.
///
/// # Errors
///
/// If it does not for a long time.
pub fn wait_for(what: &str, holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    wait_at_most(PATIENCE, what, holds)
}

/// Waits until something holds, for a limited time.
///
/// # Errors
///
/// If it does not.
pub fn wait_at_most(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !holds() {
        anyhow::ensure!(Instant::now() < deadline, "waited {} s in vain for {what}", limit.as_secs_f64());
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(
        expected_failure: Option<&'static str>,
        tell: fn(&mut Story) -> anyhow::Result<()>,
    ) -> Scenario {
        Scenario { name: "it", about: "", expected_failure, limit: Duration::from_millis(300), tell }
    }

    #[test]
    fn a_scenario_that_passes_although_it_is_expected_to_fail_is_not_ok() {
        let failed = || Findings { failures: vec!["no".to_owned()], ..Findings::default() };
        for (expected, findings, verdict, ok) in [
            (None, Findings::default(), Verdict::Passed, true),
            (None, failed(), Verdict::Failed, false),
            (Some("not built"), failed(), Verdict::FailedAsExpected, true),
            (Some("not built"), Findings::default(), Verdict::PassedUnexpectedly, false),
        ] {
            let outcome = scenario(expected, |_| Ok(())).judge(findings, Duration::ZERO);
            assert_eq!((outcome.verdict, outcome.ok), (verdict, ok));
        }
    }

    #[test]
    fn what_a_story_expects_in_vain_and_what_stops_it_are_failures() {
        let logs = tempfile::tempdir().unwrap();
        let story = scenario(None, |story| {
            story.figure("packets", 7);
            story.expect(true, "fine");
            story.expect(false, "a packet was lost");
            anyhow::bail!("charon did not start")
        });
        story.tell(logs.path()).unwrap();
        let outcome = story.run(&mut Command::new("true"), logs.path());
        assert_eq!(outcome.failures, ["a packet was lost", "charon did not start"]);
        assert_eq!(outcome.figures["packets"].to_bits(), 7_f64.to_bits());
    }

    #[test]
    fn a_teller_that_dies_or_does_not_end_is_a_failure_that_shows_its_log() {
        for (command, says) in [("echo hello; exit 3", "hello"), ("echo waiting; sleep 60", "not done after")]
        {
            let logs = tempfile::tempdir().unwrap();
            let mut teller = Command::new("sh");
            let outcome = scenario(None, |_| Ok(())).run(teller.args(["-c", command]), logs.path());
            assert_eq!(outcome.verdict, Verdict::Failed);
            assert!(outcome.failures[0].contains(says), "{:?}", outcome.failures);
        }
    }
}
