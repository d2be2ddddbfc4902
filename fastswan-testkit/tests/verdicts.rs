//! No verdict is wrong while policies change as fast as they can, and the judge of that notices if one is.

use std::{sync::Mutex, time::Duration};

use fastswan_testkit::{
    cpu,
    datapath::verdicts::{Kind, Tally, VerdictBench, VerdictConfig, VerdictError, VerdictLab},
    lab,
};

/// Few, so that a lookup and a change are often of the same one.
const POLICIES: u32 = 200;
const PACKETS: u32 = 1 << 13;
/// For how long verdicts are judged.
const TIME: Duration = Duration::from_secs(3);
/// A judge that has not convicted by then never will. On a quiet machine it does within a second.
const LONGEST: Duration = Duration::from_secs(300);

/// One test has the processors for itself, so that lookups and changes are made at the same time.
static PROCESSORS: Mutex<()> = Mutex::new(());

/// Has verdicts judged for some time with the bench that is made.
fn judge(
    what: &str,
    make: impl FnOnce(VerdictConfig) -> Result<VerdictBench, VerdictError> + Send,
    (time, until_wrong): (Duration, bool),
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
        make(config).unwrap().run(time, until_wrong).unwrap()
    });
    let tally = tally.unwrap();
    eprintln!("{tally:#?}");
    Some(tally)
}

#[test]
fn no_verdict_is_wrong_while_policies_change() {
    let Some(tally) = judge("verdicts", VerdictBench::new, (TIME, false)) else { return };
    assert!(tally.is_right(), "{tally:?}");
    // That means something: packets of each kind were forwarded, told to pass, and met changes.
    for (kind, tally) in Kind::ALL.into_iter().zip(tally.kinds) {
        assert_eq!(tally.forwarded > 0, kind != Kind::AlwaysShadowed, "{kind:?}: {tally:?}");
        // Now and then one passes for a reason that was not there, which is unexplained.
        let has_reason_to_pass = !matches!(kind, Kind::Steady | Kind::Moves);
        assert_eq!(tally.told_to_pass > tally.unexplained, has_reason_to_pass, "{kind:?}: {tally:?}");
        assert!(tally.updating > 0, "{kind:?}: {tally:?}");
    }
    assert!(tally.changes > 1000, "{tally:?}");
}

#[test]
fn a_program_that_does_not_look_whether_the_table_changes_is_convicted() {
    let Some(tally) = judge("verdicts of a broken program", VerdictBench::without_sequence, (LONGEST, true))
    else {
        return;
    };
    assert!(tally.total().wrong > 0, "{tally:?}");
    assert!(tally.evidence.is_some());
}
