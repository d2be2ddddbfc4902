//! What ran, and how it ended.

use std::fmt::Display;

/// How many things passed, and why others failed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failures: Vec<String>,
}

impl Count {
    /// One thing that passed.
    pub(crate) const PASSED: Self = Self { passed: 1, failures: Vec::new() };

    /// One more has passed.
    pub(crate) fn pass(&mut self) {
        self.passed += 1;
    }

    /// One more has failed: says so at once, and once more at the end.
    pub(crate) fn fail(&mut self, why: impl Display) {
        println!("{why}");
        self.failures.push(why.to_string());
    }

    /// One more has passed if this holds.
    pub(crate) fn expect(&mut self, holds: bool, or_else: impl Display) {
        if holds {
            self.pass();
        } else {
            self.fail(or_else);
        }
    }
}
