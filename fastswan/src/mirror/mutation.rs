//! Ways to break the order on purpose: the property tests must convict each. Nothing but a test chooses one.

/// An order that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(super) enum Mutation {
    /// What an input has lost track of may be fast.
    IgnoresStaleness,
    /// Nothing is asked of the host: facts that were read once count for ever.
    ForgetsTheHost,
    /// The fast path is turned on while something that was told is not written.
    EnablesUnwritten,
    /// The lease begins when it is renewed, and not when the sources were asked.
    RenewsFromNow,
    /// Removals are acknowledged as soon as they have settled, whatever the source has to tell of them.
    AcknowledgesEarly,
    /// A table that could not be written is taken for written.
    IgnoresFailures,
    /// A hold is told to be in effect when it is asked for.
    HoldsAtOnce,
}

#[cfg(test)]
impl Mutation {
    pub(super) const ALL: [Self; 7] = [
        Self::IgnoresStaleness,
        Self::ForgetsTheHost,
        Self::EnablesUnwritten,
        Self::RenewsFromNow,
        Self::AcknowledgesEarly,
        Self::IgnoresFailures,
        Self::HoldsAtOnce,
    ];
}
