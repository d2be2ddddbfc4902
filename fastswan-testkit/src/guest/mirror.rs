//! The `mirror` example as a process in gateway A.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child as Process, Command},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;

use super::{gateways::Gateways, wait_at_most, wait_for};

/// What it says when it runs on a port.
const ATTACHED: &str = "attached the XDP program";
/// What it says when it runs where another one did.
const TAKEN_OVER: &str = "took over from an earlier process";
/// What it says when it shuts the fast path before anything is removed.
const GUARDED: &str = "the guard shuts the fast path";
/// Where it runs.
const PORTS: [&str; 2] = ["lan0", "nic0"];

/// A mirror.
#[derive(Debug)]
pub struct Mirror {
    process: Process,
    /// Its reports, and its log.
    files: (PathBuf, PathBuf),
}

/// What a mirror has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Counted {
    /// Policies whose packets are fast.
    pub fast_policies: u64,
    /// Packets that it forwarded, of all policies that are there still.
    pub fast_packets: u64,
    /// Packets that it passed, by reason.
    pub passed: BTreeMap<String, u64>,
    /// Times that its guard has shut the fast path.
    pub times_shut: u64,
}

impl Mirror {
    /// Starts it on both ports of gateway A, and waits until it runs there. Logs are named after `name`.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn start(gateways: &Gateways, name: &str, arguments: &[&str], logs: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.with_file_name("mirror");
        let files = (logs.join(format!("{name}.reports")), logs.join(format!("{name}.log")));
        let (reports, log) = (File::create(&files.0)?, File::create(&files.1)?);
        let process = gateways.a.enter(|| {
            Command::new(&program)
                .args(PORTS)
                .args(["--complete-frames", "--report", "1", "--json"])
                .args(arguments)
                .env("RUST_LOG", "fastswan=debug,info")
                .env("NO_COLOR", "1")
                .stdout(reports)
                .stderr(log)
                .spawn()
                .with_context(|| format!("starting {}", program.display()))
        })?;
        let mut mirror = Self { process, files };
        let mut ended = None;
        // An emulated processor takes some 15 s to verify the program.
        let attached = wait_at_most(Duration::from_secs(90), "the mirror", || {
            ended = mirror.process.try_wait().ok().flatten();
            let log = mirror.log();
            ended.is_some() || log.matches(ATTACHED).count() >= PORTS.len() || log.contains(TAKEN_OVER)
        });
        ensure!(attached.is_ok() && ended.is_none(), "the mirror does not run: {}", mirror.log());
        Ok(mirror)
    }

    /// What it has said so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.files.1).unwrap_or_default()
    }

    /// Whether it has a guard.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.log().contains(GUARDED)
    }

    /// Its last report.
    #[must_use]
    pub fn counted(&self) -> Counted {
        let reports = fs::read_to_string(&self.files.0).unwrap_or_default();
        counted(&reports)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// If it is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.process.id().cast_signed()), signal)?)
    }

    /// Kills it, which has no time to clean up.
    ///
    /// # Errors
    ///
    /// If it is gone.
    pub fn kill(mut self) -> anyhow::Result<Counted> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(self.counted())
    }

    /// Stops it, and returns its last report.
    ///
    /// # Errors
    ///
    /// If it does not end in order.
    pub fn stop(mut self) -> anyhow::Result<Counted> {
        self.signal(Signal::SIGTERM)?;
        let mut status = None;
        wait_for("the mirror's end", || {
            status = self.process.try_wait().ok().flatten();
            status.is_some()
        })?;
        ensure!(status.is_some_and(|status| status.success()), "the mirror failed: {}", self.log());
        Ok(self.counted())
    }

    /// Waits until it ends by itself, with an error, and returns what it said.
    ///
    /// # Errors
    ///
    /// If it does not end, or without an error.
    pub fn failed(mut self) -> anyhow::Result<String> {
        let mut status = None;
        wait_for("the mirror to give up", || {
            status = self.process.try_wait().ok().flatten();
            status.is_some()
        })?;
        ensure!(status.is_some_and(|status| !status.success()), "the mirror ended as if all was well");
        Ok(self.log())
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The last of some reports, each a JSON object on a line.
fn counted(reports: &str) -> Counted {
    let last = reports.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    last.unwrap_or_default()
}
