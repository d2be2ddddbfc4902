//! Random input for everything that reads bytes from outside.

use std::{
    fs,
    process::Command as Process,
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};

use crate::command::{count::Count, succeed, toolchain_cargo, workspace};

/// The sanitizers of the fuzz targets take a nightly.
pub(super) const TOOLCHAIN: &str = "nightly";

/// Runs every target for some time, two side by side.
pub(super) fn run(seconds: u64) -> anyhow::Result<Count> {
    let folder = workspace().join("fuzz");
    let mut targets: Vec<String> = fs::read_dir(folder.join("fuzz_targets"))?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    targets.sort();
    ensure!(!targets.is_empty(), "there is no fuzz target");
    succeed(cargo_fuzz().arg("build"))?;
    let mut count = Count::default();
    for pair in targets.chunks(2) {
        let results: Vec<anyhow::Result<()>> = thread::scope(|scope| {
            let runs: Vec<_> =
                pair.iter().map(|target| scope.spawn(|| fuzz_target(target, seconds))).collect();
            runs.into_iter()
                .map(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        for (target, result) in pair.iter().zip(results) {
            match result {
                Ok(()) => count.pass(),
                Err(error) => count.fail(format_args!("{target}: {error:#}")),
            }
        }
    }
    Ok(count)
}

fn fuzz_target(target: &str, seconds: u64) -> anyhow::Result<()> {
    let corpus = workspace().join("fuzz/corpus").join(target);
    fs::create_dir_all(&corpus)?;
    let start = Instant::now();
    // Real messages to begin with; for the other targets they are bytes like any.
    let seeds = workspace().join("fastswan-testkit/captures");
    let output = cargo_fuzz()
        .args(["run", target])
        .args([corpus, seeds])
        .args(["--", &format!("-max_total_time={seconds}"), "-rss_limit_mb=4096"])
        .output()?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let end: Vec<&str> = log.lines().rev().take(40).collect();
        bail!("failed:\n{}", end.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
    ensure!(start.elapsed() >= Duration::from_secs(seconds), "it ended too early");
    let done = log.lines().rev().find(|line| line.starts_with("Done ")).unwrap_or("no count of runs");
    println!("{target}: {done}");
    Ok(())
}

fn cargo_fuzz() -> Process {
    let mut process = toolchain_cargo(TOOLCHAIN);
    process.arg("fuzz");
    process
}
