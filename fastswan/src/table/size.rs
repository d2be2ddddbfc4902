//! How much a table holds.

use fastswan_ebpf::MAX_TUPLES;

use crate::policy::Family;

/// How much a table holds. Beyond these limits the [`Compiler`](crate::Compiler) lets regions pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Cells, host facts and guards together, of IPv4.
    pub cells_v4: usize,
    /// The same of IPv6.
    pub cells_v6: usize,
    /// Different pairs of prefix lengths of cells, of each family.
    pub tuples: usize,
    /// Different prefix lengths of host facts, of each family and side.
    pub fact_lengths: usize,
    /// Different prefix lengths of guards, of each family.
    pub guard_lengths: usize,
    /// Exceptions, of each family.
    pub exceptions: usize,
    /// Different combinations of prefix lengths, "any protocol" or one, and port masks of exceptions, of each
    /// family.
    pub exception_tuples: usize,
    /// Slots.
    pub slots: usize,
}

impl Capacity {
    /// Cells, host facts and guards together, of a family.
    #[must_use]
    pub fn cells(&self, family: Family) -> usize {
        match family {
            Family::V4 => self.cells_v4,
            Family::V6 => self.cells_v6,
        }
    }
}

/// How much of something a table has, and how much of it is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Room {
    /// In use.
    pub used: usize,
    /// As much as there is.
    pub limit: usize,
}

/// How large a table is made.
///
/// The default takes about 11 MiB, and 256 KiB for each CPU.
///
/// A policy takes a slot, and a cell; where selectors overlap, so does each part that two of them have in common. Host facts
/// are the prefixes in the networks of policies that the host treats in another way than the rest: its own addresses, other
/// routes, rules. A guard is the source of a forward policy, an exception a policy that asks for a protocol or ports. Twice
/// what there is leaves room. What finds none passes, and a status says `capacity`.
///
/// ```
/// use fastswan::table::TableConfig;
///
/// let config = TableConfig { cells_v4: 400_000, slots: 100_000, ..TableConfig::default() };
/// assert_eq!(config.capacity().slots, 100_000);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableConfig {
    /// Cells, host facts and guards together, of IPv4. Takes 22 bytes each.
    pub cells_v4: u32,
    /// The same of IPv6. Takes 54 bytes each.
    pub cells_v6: u32,
    /// Exceptions, of each family. Takes 64 bytes each for IPv4 and 128 for IPv6.
    pub exceptions: u32,
    /// Policies that can be fast at the same time. Takes 56 bytes each, and 16 for each CPU.
    pub slots: u32,
}

impl Default for TableConfig {
    fn default() -> Self {
        Self { cells_v4: 131_072, cells_v6: 131_072, exceptions: 4096, slots: 16_384 }
    }
}

impl TableConfig {
    /// What a table of this size holds.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        Capacity {
            cells_v4: self.cells_v4 as usize,
            cells_v6: self.cells_v6 as usize,
            tuples: MAX_TUPLES,
            fact_lengths: MAX_TUPLES,
            guard_lengths: MAX_TUPLES,
            exceptions: self.exceptions as usize,
            exception_tuples: MAX_TUPLES,
            slots: self.slots as usize,
        }
    }

    pub(super) fn cell_buckets(&self, family: Family) -> u32 {
        buckets_for(match family {
            Family::V4 => self.cells_v4,
            Family::V6 => self.cells_v6,
        })
    }

    /// One for each slot, one for a slot that gets another, and the first, which is that of free slots.
    pub(super) fn ways(&self) -> u32 {
        self.slots.saturating_add(2)
    }

    /// Each exception has an entry in two lists.
    pub(super) fn exception_buckets(&self) -> u32 {
        buckets_for(self.exceptions.saturating_mul(2))
    }
}

/// Three entries for each bucket of four: so there is room for all of them, whatever their hashes. There must be two to
/// choose from.
fn buckets_for(entries: u32) -> u32 {
    entries.div_ceil(3).max(2)
}
