//! The tests of the workspace.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use anyhow::{Context as _, ensure};

use crate::command::{count::Count, workspace_cargo};

/// Tiers 0 and 1.
pub(super) fn run() -> anyhow::Result<Count> {
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
        } else if line.starts_with("test ") && (line.ends_with(" FAILED") || line.contains(" ... ignored")) {
            count.failures.push(line);
        }
    }
    if !child.wait()?.success() && count.failures.is_empty() {
        count.fail("cargo test has failed");
    }
    ensure!(count.passed > 0, "no test ran");
    Ok(count)
}

/// The number that stands before a word, as in "ok. 12 passed; 0 failed".
fn number_before(text: &str, word: &str) -> u64 {
    let before = text.find(word).map_or("", |end| &text[..end]);
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
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
