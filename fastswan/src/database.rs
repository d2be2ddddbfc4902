//! What the kernel has right now, as far as the sources have told.

use crate::{
    policy::{Policy, SecurityAssociation},
    source::PolicyEvent,
};

/// All policies and security associations.
#[derive(Clone, Debug, Default)]
pub struct Database {}

impl Database {
    /// Applies an event.
    pub fn apply(&mut self, _event: PolicyEvent) {}

    /// All policies.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> {
        std::iter::empty()
    }

    /// All security associations.
    pub fn sas(&self) -> impl Iterator<Item = &SecurityAssociation> {
        std::iter::empty()
    }
}
