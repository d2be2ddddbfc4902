//! Frames: the XDP program does with each what the model does. Needs root, and sends nothing.
#![no_main]

use std::cell::LazyCell;

use fastswan_testkit::conformance::{Conformance, frame};
use libfuzzer_sys::fuzz_target;

/// With an exception list and without one.
const SEEDS: std::ops::Range<u64> = 0..8;

thread_local! {
    static BOTH: LazyCell<Vec<Conformance>> = LazyCell::new(|| {
        SEEDS.map(|seed| Conformance::new(seed, None).expect("this takes root")).collect()
    });
}

fuzz_target!(|bytes: &[u8]| {
    let [choice, bytes @ ..] = bytes else { return };
    BOTH.with(|both| {
        // What both did is the same, whatever it is.
        let _ = both[usize::from(*choice) % both.len()].check(&frame(bytes));
    });
});
