//! The program does with every frame what the model does, whatever the table holds.

use std::collections::BTreeMap;

use fastswan::{PassReason, policy::MacAddr};
use fastswan_testkit::{
    conformance::{Conformance, frame},
    lab::{self, End, Namespace},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

const TABLES: u64 = 40;
const FRAMES: u64 = 5000;

#[test]
fn the_program_does_what_the_model_does_for_random_tables_and_frames() {
    if !lab::require_root("the program against the model") {
        return;
    }
    let namespace = Namespace::new("conform").unwrap();
    let end = |device, last| End {
        namespace: &namespace,
        device,
        mac: MacAddr([2, 0, 0, 0, 1, last]),
        addresses: &[],
    };
    lab::join(end("out0", 1), end("out1", 2), 1500).unwrap();
    let egress = namespace.ifindex("out0").unwrap();

    let first: u64 = rand::random();
    let mut outcomes = BTreeMap::new();
    for number in 0..TABLES {
        let seed = first.wrapping_add(number);
        // Some tables lead to a device that is not there.
        let egress = (number % 4 != 0).then_some(egress);
        eprintln!("seed {seed}, egress {egress:?}");
        namespace.enter(|| {
            let both = Conformance::new(seed, egress).unwrap();
            let mut rng = StdRng::seed_from_u64(seed);
            for _ in 0..FRAMES {
                let bytes: Vec<u8> = (0..rng.random_range(6..14)).map(|_| rng.random()).collect();
                *outcomes.entry(both.check(&frame(&bytes)).err()).or_insert(0) += 1;
            }
        });
    }
    // The frames reach the end of every path, so that agreeing means something.
    let share = |reason| outcomes.get(&reason).copied().unwrap_or(0) * 100 / (TABLES * FRAMES);
    assert!(share(None) > 2, "{outcomes:?}");
    for reason in [
        PassReason::Shadowed,
        PassReason::NoPolicy,
        PassReason::Guarded,
        PassReason::NoSa,
        PassReason::NoPath,
        PassReason::DeniedDestination,
        PassReason::DeniedSource,
        PassReason::RouteElsewhere,
        PassReason::ReversePath,
        PassReason::TooLong,
        PassReason::EgressUnavailable,
        PassReason::Exception,
    ] {
        assert!(outcomes.contains_key(&Some(reason)), "{reason:?} in {outcomes:?}");
    }
}
