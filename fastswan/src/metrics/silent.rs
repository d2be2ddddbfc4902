//! What is counted without the feature: nothing. The same methods as in `recorded`.

use std::time::Duration;

use crate::{host::Hook, table::Traffic};

#[derive(Debug)]
pub(crate) struct Meters;

#[expect(clippy::unused_self, reason = "the signatures are those of `recorded`")]
impl Meters {
    pub(crate) fn new() -> Self {
        Self
    }

    pub(crate) fn lost_track(&mut self, _: &'static str, _: &'static str) {}

    pub(crate) fn resynchronised(&mut self, _: &'static str, _: &'static str) {}

    pub(crate) fn repaired(&mut self, _: u64) {}

    pub(crate) fn applied(&mut self, _: usize) {}

    pub(crate) fn compiled(&mut self, _: Duration) {}

    pub(crate) fn retired(&mut self, _: Traffic) {}

    pub(crate) fn written(&mut self, _: usize) {}

    pub(crate) fn caught_up(&mut self, _: Duration) {}

    pub(crate) fn opened(&mut self, _: Duration) {}

    pub(crate) fn lease_expired(&mut self, _: u64) {}

    pub(crate) fn switched(&mut self, _: bool) {}

    pub(crate) fn skipped(&mut self, _: &[Hook]) {}
}
