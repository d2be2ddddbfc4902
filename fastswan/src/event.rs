//! What sources say.
//!
//! A [`PolicySource`](crate::PolicySource) tells of policies with [`PolicyEvent`]s: first a [`PolicyEvent::Snapshot`] of
//! everything, then single changes. The [`Database`](crate::Database) applies them.

use crate::policy::{DefaultPolicy, Policy, PolicyId, PolicyType, SaId, SecurityAssociation};

/// What a source says.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum PolicyEvent {
    /// Everything that the source knows now. It replaces all that it said before.
    Snapshot(Snapshot),
    /// Everything that the source has told must come to this: it has asked again. Where it does not, something was
    /// never told, and this is what counts. A source that lost track still has to send a snapshot.
    Audit(Snapshot),
    /// A policy was added, or the one with the same identity was changed.
    Policy(Policy),
    /// A policy was deleted or has expired.
    PolicyRemoved(PolicyId),
    /// All policies of one table were deleted.
    PoliciesFlushed(PolicyType),
    /// A security association was added or changed.
    Sa(SecurityAssociation),
    /// A security association was deleted or has expired.
    SaRemoved(SaId),
    /// All associations of an IPsec protocol were deleted; 0 and 255 stand for every protocol.
    SasFlushed(u8),
    /// What happens to packets without a policy has changed.
    DefaultPolicy(DefaultPolicy),
    /// What the source said may no longer be true, and a [`PolicyEvent::Snapshot`] will follow. Until then
    /// nothing may be fast.
    Stale(StaleCause),
}

/// Everything a source knows at one moment.
///
/// ```
/// use fastswan::{PolicyOrder, Snapshot};
///
/// // Of a source that has no kernel behind it, whose author says that priority alone decides.
/// let snapshot = Snapshot { order: PolicyOrder::ByPriority, ..Snapshot::default() };
/// assert!(snapshot.policies.is_empty());
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// All policies of the namespace: offloaded or not, of every direction.
    pub policies: Vec<Policy>,
    /// All security associations with a SPI.
    pub sas: Vec<SecurityAssociation>,
    /// The default policy.
    pub default_policy: DefaultPolicy,
    /// Which of several policies a packet is for.
    pub order: PolicyOrder,
}

/// Which policy a packet is for if several match.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PolicyOrder {
    /// The one that the kernel finds first. Packet-offloaded policies stand in the order in which they were added or
    /// updated, whatever their priorities; so a source must tell of these in the kernel's order.
    #[default]
    Kernel,
    /// The one with the lowest priority number, and nothing else matters. For a source that has no kernel behind it, and
    /// whose author says what packets are for. Of several with that number none is certain: their packets pass, unless
    /// they lead the same way.
    ByPriority,
}

/// Why a source lost track.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum StaleCause {
    /// The kernel had more notifications than the socket's receive buffer holds (`ENOBUFS`).
    Overrun,
    /// A notification could not be decoded.
    Undecodable,
    /// A dump was cut short or interrupted by a change (`NLM_F_DUMP_INTR`).
    DumpInterrupted,
    /// The device with this index went down, or left the namespace. The kernel then deletes what was offloaded
    /// to it and says nothing.
    DeviceLost(u32),
    /// Policies or associations were given other addresses (`XFRM_MSG_MIGRATE`, `XFRM_MSG_MIGRATE_STATE`). The kernel
    /// does not tell what they are now.
    Migrated,
    /// The kernel has sorted its policies anew, since the prefix lengths changed from which on it hashes them (`hthresh`).
    /// The order among equal priorities may be another one.
    Rehashed,
    /// The source asked for a resynchronisation itself.
    Requested,
}

impl StaleCause {
    /// Its name in metrics and events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Overrun => "overrun",
            Self::Undecodable => "undecodable",
            Self::DumpInterrupted => "dump_interrupted",
            Self::DeviceLost(_) => "device_lost",
            Self::Migrated => "migrated",
            Self::Rehashed => "rehashed",
            Self::Requested => "requested",
        }
    }
}
