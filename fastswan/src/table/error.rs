//! What a table cannot do.

use super::Slot;
use crate::policy::Family;

/// A table could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A batch does not fit.
    #[error("the table is full: {what} of {family:?} does not fit into {limit}; make the table larger")]
    Full {
        /// What there is no room for.
        what: &'static str,
        /// The family it is about.
        family: Family,
        /// How many fit.
        limit: usize,
    },
    /// There is no room for another port.
    #[error("port #{ifindex} VLAN {vlan} does not fit: the table holds at most {limit} ports")]
    TooManyPorts {
        /// Its interface.
        ifindex: u32,
        /// Its VLAN.
        vlan: u16,
        /// How many ports fit.
        limit: usize,
    },
    /// A batch names a slot that the table does not have.
    #[error("slot {} does not exist: the table has {limit} slots; make the table larger", slot.0)]
    NoSuchSlot {
        /// The slot.
        slot: Slot,
        /// How many there are.
        limit: usize,
    },
    /// A cell joins prefixes of different families.
    #[error("a cell joins an IPv4 and an IPv6 prefix: give both prefixes of one family")]
    MixedFamilies,
}
