//! The mirror is right while everything changes, and would not be if it missed removals.

use std::{process::Command, time::Duration};

use fastswan_testkit::{chaos::Chaos, lab};
use serde_json::Value;

#[test]
fn nothing_is_forwarded_wrong_while_everything_changes() {
    if !lab::require_root("chaos") {
        return;
    }
    let report = Chaos::new(rand::random(), Duration::from_secs(3)).run().unwrap();
    eprintln!("{:#}", report.json());
    assert_eq!(report.divergences, 0, "{:?}", report.examples);
    // Being right means something: there was much to be wrong about.
    assert!(report.overruns > 0 && report.looks > 0 && report.fast_packets > 0);
}

#[test]
fn a_mirror_that_misses_removals_is_noticed() {
    if !lab::require_root("chaos") {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastswan-testkit"));
    command.args(["chaos", "--seconds", "3", "--mutant", "20", "--seed", "7", "--json"]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let object: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("no object on the last line:\n{text}\n{error}"));
    assert!(object["divergences"].as_u64() > Some(0), "{object}");
    assert!(object["examples"].as_array().is_some_and(|examples| !examples.is_empty()), "{object}");
    assert_eq!(object["seed"], 7);
    assert!(!output.status.success() && error.contains("diverged"), "{error}");
}
