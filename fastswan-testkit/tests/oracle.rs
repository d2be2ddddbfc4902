//! The kernel agrees with what the mirror makes of its policies, and would not if a rule were broken.

use std::process::Command;

use fastswan_testkit::{
    lab,
    oracle::{
        BrokenRule, Oracle, Set,
        facts::{FactsOracle, HostMutant},
    },
};
use serde_json::Value;

const DECISIONS: u64 = 1500;

/// The packets of all stories.
const STORIES: u64 = 23;

#[test]
fn what_is_forwarded_is_what_the_kernel_would_have_encrypted_under_the_same_policy() {
    if !lab::require_root("the oracle") {
        return;
    }
    let seed: u64 = rand::random();
    for set in Set::judged(false) {
        eprintln!("{}, seed {seed}", set.name());
        let oracle = Oracle::new(seed, DECISIONS).sets(&[set]);
        let report = oracle.run(|_| {}).unwrap();
        assert_eq!((report.decisions(), report.executed()), (DECISIONS, DECISIONS));
        assert_eq!(report.wrong(), 0, "{:#}", report.json());
        // Agreeing means something: there were packets to be wrong about.
        let [only] = &report.sets[..] else { panic!("{report:?}") };
        assert!(only.fast > 0 && only.eligible > 0, "{:#}", report.json());
        assert!(!only.is_too_slow(), "{:#}", report.json());
    }
}

#[test]
fn a_seed_repeats_a_run() {
    if !lab::require_root("the oracle") {
        return;
    }
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let run = |seed| Oracle::new(seed, DECISIONS).sets(&[Set::Random]).run(|_| {}).unwrap().sets;
    assert_eq!(run(seed), run(seed));
    assert_ne!(run(seed), run(seed.wrapping_add(1)));
}

#[test]
fn every_broken_rule_is_noticed() {
    if !lab::require_root("the oracle") {
        return;
    }
    let seed: u64 = rand::random();
    for rule in BrokenRule::ALL {
        eprintln!("{rule:?}, seed {seed}");
        let report = Oracle::new(seed, 40_000).broken_rule(rule).run(|_| {}).unwrap();
        assert!(report.wrong() > 0, "{rule:?}: {:#}", report.json());
        assert!(report.sets.iter().any(|set| !set.examples.is_empty()), "{rule:?}");
    }
}

#[test]
fn the_command_says_what_was_wrong_and_fails() {
    if !lab::require_root("the oracle") {
        return;
    }
    for (mutant, wrong) in [(None, false), (Some("2"), true)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastswan-testkit"));
        command.args(["oracle", "--decisions", "5000", "--set", "nested", "--seed", "7", "--json"]);
        command.args(mutant.iter().flat_map(|number| ["--mutant", number]));
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        let object: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
            .unwrap_or_else(|_| panic!("no object on the last line:\n{text}\n{error}"));
        assert_eq!((&object["seed"], &object["decisions"]), (&7.into(), &5000.into()));
        assert_eq!(object["executed"], 5000);
        assert_eq!(object["wrong"].as_u64() > Some(0), wrong, "{object}");
        assert!(object["sets"]["nested"]["fast_share"].is_number(), "{object}");
        assert_eq!(output.status.success(), !wrong, "{error}");
    }
}

/// The stories alone convict them: what is random could miss them.
#[test]
fn the_stories_notice_the_rules_about_the_order_of_offloaded_policies() {
    if !lab::require_root("the oracle") {
        return;
    }
    // No packet of these is random.
    let oracle = Oracle::new(0, STORIES).sets(&[Set::OffloadedModel]);
    assert_eq!(oracle.run(|_| {}).unwrap().wrong(), 0);
    for rule in [BrokenRule::HighestPriority, BrokenRule::Age, BrokenRule::ExactFirst] {
        let broken = oracle.clone().broken_rule(rule).sets(&[Set::OffloadedModel]);
        let report = broken.run(|_| {}).unwrap();
        assert!(report.wrong() > 0, "{rule:?}: {:#}", report.json());
    }
}

#[test]
fn the_host_is_followed_as_the_kernel_has_it() {
    if !lab::require_root("the oracle of host facts") {
        return;
    }
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let report = FactsOracle::new(seed, 4000).run().unwrap();
    assert!(report.decisions() >= 4000);
    assert!(report.unexpectedly_wrong().is_empty(), "{:#}", report.json());
    // Agreeing means something: there were packets to be wrong about.
    assert!(report.fast_share() > 0.5, "{:#}", report.json());
}

#[test]
fn a_host_source_that_lies_is_noticed() {
    if !lab::require_root("the oracle of host facts") {
        return;
    }
    let seed: u64 = rand::random();
    for mutant in HostMutant::ALL {
        eprintln!("{}, seed {seed}", mutant.name());
        // Some are wrong in every second part of a run only.
        assert!(FactsOracle::new(seed, 200_000).convict(mutant).unwrap(), "{}", mutant.name());
    }
}
