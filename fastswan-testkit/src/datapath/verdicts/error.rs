//! What can go wrong while verdicts are judged.

use std::io;

use fastswan::table::TableError;

use super::{super::error::DatapathError, kind::Kind, tally::KindTally};
use crate::lab::LabError;

/// Verdicts cannot be judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerdictError {
    /// The lab could not be set up.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The programs could not be loaded or run.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The table did not take a change.
    #[error("writing a change into the table failed: {0}")]
    Table(#[from] TableError),
    /// A system call failed.
    #[error("{attempt} failed: {error}")]
    System {
        /// What was tried.
        attempt: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A map of fastswan's program could not be found or read.
    #[error("reading why packets pass failed: {0}")]
    Passes(String),
    /// There are too few policies for all that is to become of them.
    #[error("{policies} policies are too few: take {fewest} or more")]
    TooFew {
        /// Those that were asked for.
        policies: u32,
        /// The least number.
        fewest: u32,
    },
    /// Verdicts are not those of the policies although nothing changes.
    #[error("while nothing changed, packets of policies that are {kind} met {tally:?}", kind = .kind.name())]
    Calm {
        /// Whose packets they are.
        kind: Kind,
        /// What became of them.
        tally: Box<KindTally>,
    },
    /// The judge did not see all packets.
    #[error("the judge has seen {judged} of {packets} packets")]
    Unseen {
        /// Packets that it has judged.
        judged: u64,
        /// Packets that it should have.
        packets: u32,
    },
}

impl VerdictError {
    pub(super) fn system<E: Into<io::Error>>(attempt: impl Into<String>) -> impl FnOnce(E) -> Self {
        |error| Self::System { attempt: attempt.into(), error: error.into() }
    }

    pub(super) fn passes<E: std::fmt::Display>(error: E) -> Self {
        Self::Passes(error.to_string())
    }
}
