//! What ran, and how it ended.

/// How many things passed and failed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl Count {
    /// One thing that passed.
    pub(crate) const PASSED: Self = Self { passed: 1, failed: 0 };
    /// One thing that failed.
    pub(crate) const FAILED: Self = Self { passed: 0, failed: 1 };
}
