/// What the program does for safety, or to be able to tell: what a measurement can leave out, one by one, to see what it costs.
/// The program that the library loads does all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Check {
    /// The kill switch, and the lease with the ticks that it is judged by.
    Lease,
    /// The sequence number before and after the lookups.
    Sequence,
    /// The sequence number after the lookups, for packets that pass: their reason is one of a table that has not changed.
    Reasons,
    /// That the frame lies in one buffer.
    Buffers,
    /// That the frame was sent to the port's address.
    Address,
    /// IPv4's header checksum.
    Checksum,
    /// Addresses that are never forwarded.
    Special,
    /// Exceptions.
    Exceptions,
    /// Guards, and what the host has to do with the destination and the source.
    Probes,
    /// The longest packet.
    Length,
    /// Removals that the guard has counted.
    Removals,
    /// Asking the kernel's routes.
    Asking,
    /// Counting packets and bytes for their policy.
    Counting,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Lease,
        Self::Sequence,
        Self::Reasons,
        Self::Buffers,
        Self::Address,
        Self::Checksum,
        Self::Special,
        Self::Exceptions,
        Self::Probes,
        Self::Length,
        Self::Removals,
        Self::Asking,
        Self::Counting,
    ];

    /// The bit that stands for it.
    #[inline(always)]
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}
