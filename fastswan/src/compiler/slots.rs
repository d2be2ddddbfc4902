//! Which policy has which slot of the table.

use std::{
    collections::{BTreeSet, VecDeque},
    num::NonZeroU32,
};

use crate::{database::PolicyKey, table::Slot};

/// The slots in use. A policy keeps its slot as long as it exists, so that its counters go on.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// By policy key.
    assigned: Vec<Option<Assigned>>,
    /// By slot, whose it is, or was last.
    holders: Vec<PolicyKey>,
    /// Freed slots, the oldest first.
    free: VecDeque<Slot>,
    /// The first slot that was never used.
    fresh: u32,
    /// Policies that found no slot.
    waiting: BTreeSet<PolicyKey>,
    /// Slots are never freed; see [`BrokenRule::Descendants`](super::broken::BrokenRule::Descendants).
    hoarding: bool,
}

#[derive(Clone, Copy, Debug)]
struct Assigned {
    /// The slot's number plus 1, so that no slot takes no room of its own.
    number: NonZeroU32,
    /// Of the policy's key.
    generation: u32,
}

impl Assigned {
    fn new(slot: Slot, generation: u32) -> Self {
        Self { number: NonZeroU32::MIN.saturating_add(slot.0), generation }
    }

    fn slot(self) -> Slot {
        Slot(self.number.get() - 1)
    }
}

impl Slots {
    pub(super) fn get(&self, policy: PolicyKey) -> Option<Slot> {
        Some((*self.assigned.get(policy.0 as usize)?)?.slot())
    }

    /// How many slots are, or were, in use.
    pub(super) fn len(&self) -> usize {
        self.holders.len()
    }

    /// The policy's slot, perhaps a new one; `None` if all `limit` slots are in use.
    pub(super) fn allocate(&mut self, policy: PolicyKey, generation: u32, limit: usize) -> Option<Slot> {
        if let Some(slot) = self.get(policy) {
            return Some(slot);
        }
        let slot = if (self.fresh as usize) < limit {
            self.fresh += 1;
            Slot(self.fresh - 1)
        } else if let Some(slot) = self.free.pop_front() {
            slot
        } else {
            self.waiting.insert(policy);
            return None;
        };
        let index = policy.0 as usize;
        if self.assigned.len() <= index {
            self.assigned.resize(index + 1, None);
        }
        self.assigned[index] = Some(Assigned::new(slot, generation));
        let number = slot.0 as usize;
        if self.holders.len() <= number {
            self.holders.resize(number + 1, policy);
        }
        self.holders[number] = policy;
        self.waiting.remove(&policy);
        Some(slot)
    }

    /// Frees the slot of a key unless it still belongs to the policy of this generation.
    pub(super) fn release(&mut self, policy: PolicyKey, generation: Option<u32>) -> Option<Slot> {
        let assigned = self.assigned.get_mut(policy.0 as usize).filter(|_| !self.hoarding)?;
        let slot = assigned.take_if(|assigned| Some(assigned.generation) != generation)?.slot();
        self.free.push_back(slot);
        Some(slot)
    }

    #[cfg(feature = "broken-rules")]
    pub(super) fn set_hoarding(&mut self, hoarding: bool) {
        self.hoarding = hoarding;
    }

    /// Whose slot this is.
    pub(super) fn holder(&self, slot: Slot) -> Option<PolicyKey> {
        let holder = *self.holders.get(slot.0 as usize)?;
        (self.get(holder) == Some(slot)).then_some(holder)
    }

    /// The policies that have slots.
    pub(super) fn owners(&self) -> impl Iterator<Item = PolicyKey> {
        let keys = (0..).map(PolicyKey).zip(&self.assigned);
        keys.filter(|(_, assigned)| assigned.is_some()).map(|(key, _)| key)
    }

    /// Some policies that wait for a slot, as many as there are free ones. Who is not served must ask again.
    pub(super) fn next_waiting(&mut self) -> Vec<PolicyKey> {
        (0..self.free.len()).map_while(|_| self.waiting.pop_first()).collect()
    }
}
