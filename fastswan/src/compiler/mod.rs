//! Which region of packet space is fast.

use crate::{
    database::Database,
    host::HostFacts,
    policy::PolicyId,
    table::{Capacity, Slot, TableUpdate},
};

/// Compiles a database to a table.
#[derive(Debug)]
pub struct Compiler {
    capacity: Capacity,
}

impl Compiler {
    /// A compiler for a table of this capacity that holds nothing yet.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity }
    }

    /// Recomputes and returns what has changed since the last call.
    pub fn compile(&mut self, _database: &Database, _host: &HostFacts) -> TableUpdate {
        let _ = self.capacity;
        TableUpdate::default()
    }

    /// The slot of a policy that some cell is fast through.
    #[must_use]
    pub fn slot(&self, _policy: &PolicyId) -> Option<Slot> {
        None
    }
}
