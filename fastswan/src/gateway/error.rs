//! Why a gateway ends.

use crate::{host::HostError, source::SourceError, table::TableError};

/// The gateway cannot go on. Everything passes to the kernel, even if it is run again: take its
/// [parts](super::Gateway::into_parts) and build another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// The policy source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The host source failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The table failed.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The program could not be attached at the start, or another gateway has taken over, which forwards from then on
    /// ([`ForwarderError::Superseded`](crate::forwarder::ForwarderError::Superseded)).
    #[cfg(feature = "bpf")]
    #[error(transparent)]
    Forwarder(#[from] crate::forwarder::ForwarderError),
    /// It had failed before.
    #[error(
        "the gateway has failed before, and does not know what its table holds: build another of its parts"
    )]
    Failed,
}
