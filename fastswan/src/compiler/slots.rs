//! Which policy has which slot of the table.

use std::collections::{BTreeMap, VecDeque};

use crate::{policy::PolicyId, table::Slot};

/// The slots in use. A policy keeps its slot as long as it exists, so that its counters go on.
#[derive(Debug, Default)]
pub(super) struct Slots {
    used: BTreeMap<PolicyId, Slot>,
    /// Freed slots, the oldest first.
    free: VecDeque<Slot>,
    /// The first slot that was never used.
    fresh: u32,
}

impl Slots {
    pub(super) fn get(&self, policy: &PolicyId) -> Option<Slot> {
        self.used.get(policy).copied()
    }

    /// The policy's slot, perhaps a new one; `None` if all `limit` slots are in use.
    pub(super) fn allocate(&mut self, policy: &PolicyId, limit: usize) -> Option<Slot> {
        if let Some(slot) = self.get(policy) {
            return Some(slot);
        }
        let slot = if (self.fresh as usize) < limit {
            self.fresh += 1;
            Slot(self.fresh - 1)
        } else {
            self.free.pop_front()?
        };
        self.used.insert(policy.clone(), slot);
        Some(slot)
    }

    /// Frees the slots of policies that no longer exist and returns them.
    pub(super) fn retain(&mut self, exists: impl Fn(&PolicyId) -> bool) -> Vec<Slot> {
        let mut freed = Vec::new();
        self.used.retain(|policy, slot| {
            let keep = exists(policy);
            if !keep {
                freed.push(*slot);
            }
            keep
        });
        self.free.extend(&freed);
        freed
    }
}
