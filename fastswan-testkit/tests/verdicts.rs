//! No verdict is wrong while policies change as fast as they can, and the judge of that notices if one is.

use std::{sync::Mutex, time::Duration};

use fastswan_testkit::{
    cpu,
    datapath::verdicts::{Kind, Tally, VerdictBench, VerdictConfig, VerdictError, VerdictLab},
    lab,
};

/// Few, so that a lookup and a change are often of the same one.
const POLICIES: u32 = 200;
/// Many, so that most of the time is for lookups, and not for reading what was counted.
const PACKETS: u32 = 1 << 17;
/// For how long verdicts are judged.
const TIME: Duration = Duration::from_secs(3);
/// A judge that has not convicted by then never will. On a quiet machine it convicts a wrong verdict within a second; a reason that
/// was not there took it up to 31 s in eleven runs with 96 to 300 policies, beside builds of other programs.
const LONGEST: Duration = Duration::from_secs(300);

/// One test has the processors for itself, so that lookups and changes are made at the same time.
static PROCESSORS: Mutex<()> = Mutex::new(());

/// Has verdicts judged for some time with the bench that is made.
fn judge(
    what: &str,
    make: impl FnOnce(VerdictConfig) -> Result<VerdictBench, VerdictError> + Send,
    (time, is_enough): (Duration, fn(&Tally) -> bool),
) -> Option<Tally> {
    if !lab::require_root(what) {
        return None;
    }
    let _alone = PROCESSORS.lock();
    let mut allowed = cpu::allowed().unwrap().into_iter();
    let first = allowed.next().unwrap();
    // With one CPU only, whichever thread has it is interrupted by the other one.
    let cpus = [first, allowed.next().unwrap_or(first)];
    let seed = rand::random();
    eprintln!("seed {seed}");
    let lab = VerdictLab::new().unwrap();
    let tally = lab.enter(|devices| {
        let config = VerdictConfig { policies: POLICIES, packets: PACKETS, seed, devices, cpus };
        make(config).unwrap().run(time, is_enough).unwrap()
    });
    let tally = tally.unwrap();
    eprintln!("{tally:#?}");
    Some(tally)
}

#[test]
fn no_verdict_is_wrong_while_policies_change() {
    let Some(tally) = judge("verdicts", VerdictBench::new, (TIME, |_| false)) else { return };
    assert!(tally.is_right(), "{tally:?}");
    // That means something: packets of each kind were forwarded, told to pass, and met changes.
    for (kind, tally) in Kind::ALL.into_iter().zip(tally.kinds) {
        assert_eq!(tally.forwarded > 0, kind != Kind::AlwaysShadowed, "{kind:?}: {tally:?}");
        let has_reason_to_pass = !matches!(kind, Kind::Steady | Kind::Moves);
        assert_eq!(tally.told_to_pass > 0, has_reason_to_pass, "{kind:?}: {tally:?}");
        assert!(tally.updating > 0, "{kind:?}: {tally:?}");
    }
    assert!(tally.changes > 1000, "{tally:?}");
}

#[test]
fn a_program_that_does_not_look_whether_the_table_changes_is_convicted() {
    let until_wrong = |tally: &Tally| tally.total().wrong > 0;
    let what = "verdicts of a program that does not look whether the table changes";
    let Some(tally) = judge(what, VerdictBench::without_sequence, (LONGEST, until_wrong)) else { return };
    assert!(until_wrong(&tally) && tally.evidence.is_some(), "{tally:?}");
}

#[test]
fn a_program_that_counts_packets_with_reasons_of_a_table_that_has_changed_is_convicted() {
    let until_unexplained = |tally: &Tally| tally.total().unexplained > 0;
    let what = "verdicts of a program that does not look whether the table has changed for packets that pass";
    let Some(tally) = judge(what, VerdictBench::without_reasons, (LONGEST, until_unexplained)) else {
        return;
    };
    assert!(until_unexplained(&tally) && tally.evidence.is_some(), "{tally:?}");
    assert_eq!(tally.total().wrong, 0, "what it forwards is right: {tally:?}");
}
