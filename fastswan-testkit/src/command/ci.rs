//! `cargo testkit ci`: installs what the tests need, and runs all of them.
//!
//! Nothing is skipped: a step that cannot run has failed.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command as Process, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use super::{cargo, chaos, ebpf, guest_oracle, oracle, vm, workspace};

/// What `cargo testkit ci` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long each fuzz target runs.
    #[arg(long, default_value_t = 60)]
    fuzz_seconds: u64,
}

/// Debian packages, and a file of each that tells whether it is there.
const PACKAGES: [(&str, &str); 6] = [
    ("cpio", "/usr/bin/cpio"),
    ("g++", "/usr/bin/g++"),
    ("iproute2", "/usr/sbin/ip"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("util-linux", "/usr/bin/setpriv"),
];

/// Programs of crates, with the versions that are known to work.
pub(crate) const TOOLS: [(&str, &str); 2] = [("cargo-deny", "0.20.2"), ("cargo-fuzz", "0.13.2")];

/// What ran.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl Count {
    const ONE: Self = Self { passed: 1, failed: 0 };
}

type Step<'a> = (&'static str, Box<dyn Fn() -> anyhow::Result<Count> + 'a>);

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let fuzz_seconds = arguments.fuzz_seconds;
    let steps: [Step<'_>; 12] = [
        ("install", Box::new(install)),
        ("format", Box::new(format)),
        ("lint", Box::new(lint)),
        ("docs", Box::new(docs)),
        ("deny", Box::new(deny)),
        ("bytecode", Box::new(|| ebpf::run(ebpf::Command::Check).map(|()| Count::ONE))),
        ("tests", Box::new(tests)),
        ("oracle", Box::new(oracle::check)),
        ("chaos", Box::new(chaos::check)),
        ("guests", Box::new(vm::check)),
        ("guest oracle", Box::new(guest_oracle::check)),
        ("fuzz", Box::new(|| fuzz(fuzz_seconds))),
    ];
    let mut rows = Vec::new();
    for (name, step) in steps {
        println!("\n== {name}");
        let start = Instant::now();
        let count = step().unwrap_or_else(|error| {
            println!("{name}: {error:#}");
            Count { failed: 1, ..Count::default() }
        });
        rows.push((name, count, start.elapsed()));
    }

    println!("\n{:<12} {:>8} {:>8} {:>8}", "step", "passed", "failed", "seconds");
    for (name, Count { passed, failed }, took) in &rows {
        println!("{name:<12} {passed:>8} {failed:>8} {:>8}", took.as_secs());
    }
    let passed: u64 = rows.iter().map(|(_, count, _)| count.passed).sum();
    let failed: u64 = rows.iter().map(|(_, count, _)| count.failed).sum();
    println!("\n{passed} passed, {failed} failed");
    ensure!(failed == 0, "not everything ran and passed");
    Ok(())
}

/// Installs what is missing: packages as root, the rest with cargo.
fn install() -> anyhow::Result<Count> {
    let missing = PACKAGES.into_iter().filter(|(_, file)| !Path::new(file).exists());
    let missing: Vec<&str> = missing.map(|(package, _)| package).collect();
    if !missing.is_empty() {
        let root = nix::unistd::geteuid().is_root();
        ensure!(root, "packages are missing: run `sudo apt-get install {}`", missing.join(" "));
        succeed(Process::new("apt-get").arg("update"))?;
        succeed(
            Process::new("apt-get").args(["install", "--yes", "--no-install-recommends"]).args(&missing),
        )?;
    }
    ebpf::install()?;
    for (tool, version) in TOOLS {
        let found = Process::new(tool).arg("--version").output();
        let found = found.is_ok_and(|found| String::from_utf8_lossy(&found.stdout).contains(version));
        if !found {
            succeed(Process::new(cargo()).args([
                "install",
                "--locked",
                "--force",
                tool,
                "--version",
                version,
            ]))?;
        }
    }
    let nightly = Process::new("rustup").args(["run", "nightly", "rustc", "--version"]).output();
    if !nightly.context("running rustup")?.status.success() {
        succeed(Process::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]))?;
    }
    Ok(Count::ONE)
}

fn format() -> anyhow::Result<Count> {
    succeed(workspace_cargo().args(["fmt", "--all", "--check"]))?;
    succeed(workspace_cargo().args(["fmt", "--check", "--manifest-path", "fuzz/Cargo.toml"]))?;
    Ok(Count::ONE)
}

fn lint() -> anyhow::Result<Count> {
    let all = ["clippy", "--locked", "--workspace", "--all-targets", "--all-features", "--", "-Dwarnings"];
    succeed(workspace_cargo().args(all))?;
    // As whoever adds the crate gets it.
    succeed(workspace_cargo().args(["clippy", "--locked", "--package", "fastswan", "--", "-Dwarnings"]))?;
    Ok(Count::ONE)
}

fn docs() -> anyhow::Result<Count> {
    let arguments = ["doc", "--locked", "--workspace", "--all-features", "--no-deps"];
    succeed(workspace_cargo().args(arguments).env("RUSTDOCFLAGS", "-Dwarnings"))?;
    Ok(Count::ONE)
}

fn deny() -> anyhow::Result<Count> {
    // Not the advisories: their database is not in a package registry.
    succeed(workspace_cargo().args(["deny", "--all-features", "check", "bans", "licenses", "sources"]))?;
    Ok(Count::ONE)
}

/// Tiers 0 and 1.
fn tests() -> anyhow::Result<Count> {
    let mut child = workspace_cargo()
        .args(["test", "--locked", "--workspace", "--all-features", "--no-fail-fast"])
        // A tier that cannot run is to fail, not to be left out.
        .envs([("CI", "true"), ("FASTSWAN_REQUIRE_TIERS", "0,1")])
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("the output of cargo test")?;
    let mut count = Count::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        if let Some(result) = line.strip_prefix("test result: ") {
            count.passed += number_before(result, " passed");
            count.failed += number_before(result, " failed") + number_before(result, " ignored");
        }
    }
    if !child.wait()?.success() && count.failed == 0 {
        count.failed = 1;
    }
    ensure!(count.passed + count.failed > 0, "no test ran");
    Ok(count)
}

/// The number that stands before a word, as in "ok. 12 passed; 0 failed".
fn number_before(text: &str, word: &str) -> u64 {
    let before = text.find(word).map_or("", |end| &text[..end]);
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Runs every target for some time, two side by side.
fn fuzz(seconds: u64) -> anyhow::Result<Count> {
    let folder = workspace().join("fuzz");
    let mut targets: Vec<String> = fs::read_dir(folder.join("fuzz_targets"))?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    targets.sort();
    ensure!(!targets.is_empty(), "there is no fuzz target");
    succeed(nightly_fuzz().arg("build"))?;
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
                Ok(()) => count.passed += 1,
                Err(error) => {
                    println!("{target}: {error:#}");
                    count.failed += 1;
                }
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
    let output = nightly_fuzz()
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

fn nightly_fuzz() -> Process {
    let mut process = Process::new("rustup");
    process.current_dir(workspace()).args(["run", "nightly", "cargo", "fuzz"]);
    // The variables of this run's own cargo would win over the toolchain.
    process.env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
    process
}

fn workspace_cargo() -> Process {
    let mut process = Process::new(cargo());
    process.current_dir(workspace());
    process
}

fn succeed(process: &mut Process) -> anyhow::Result<()> {
    let status = process.status().with_context(|| format!("running {process:?}"))?;
    ensure!(status.success(), "{process:?} failed: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::number_before;

    #[test]
    fn results_of_cargo_test_are_counted() {
        let line = "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let counts = [" passed", " failed", " ignored", " skipped"].map(|word| number_before(line, word));
        assert_eq!(counts, [12, 3, 1, 0]);
    }
}
