//! What can go wrong with live frames.

use std::io;

use fastswan::forwarder::ForwarderError;

use super::{super::error::DatapathError, contestant::Contestant};
use crate::lab::LabError;

/// Frames cannot be sent, or do not arrive as they should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VethError {
    /// The lab could not be set up.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The programs or what they know could not be set up.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The library's program could not be attached.
    #[error(transparent)]
    Forwarder(#[from] ForwarderError),
    /// A system call failed.
    #[error("{attempt} failed: {error}")]
    System {
        /// What was tried.
        attempt: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The generator has not made as many frames as it was told to.
    #[error("{contestant}: the generator has sent {sent} of {frames} frames")]
    Unsent {
        /// What was to forward them.
        contestant: Contestant,
        /// Frames that the generator has counted.
        sent: u64,
        /// Frames that were asked for.
        frames: u64,
    },
    /// Other frames have arrived than were sent.
    #[error(
        "{contestant}: {arrived} of {frames} frames have arrived, with {bytes} and not {expected_bytes} bytes"
    )]
    Arrived {
        /// What forwarded.
        contestant: Contestant,
        /// Frames that have arrived.
        arrived: u64,
        /// Frames that were sent.
        frames: u64,
        /// Bytes of those that have arrived, from the IP header on.
        bytes: u64,
        /// How many these should be.
        expected_bytes: u64,
    },
    /// A packet has not arrived as it should.
    #[error("{contestant}: of a packet from {flow}, not {expected:02x?} has arrived, but {frame:02x?}")]
    WrongFrame {
        /// What forwarded.
        contestant: Contestant,
        /// Source and destination.
        flow: String,
        /// A frame of the same batch that was not to arrive; empty if none has.
        frame: Vec<u8>,
        /// What it should be.
        expected: Vec<u8>,
    },
    /// The kernel has forwarded frames in a program's place.
    #[error("{contestant} has forwarded {forwarded} frames, but {arrived} have arrived; passed: {passed:?}")]
    NotByProgram {
        /// The program.
        contestant: Contestant,
        /// Frames that it has counted as forwarded.
        forwarded: u64,
        /// Frames that have arrived.
        arrived: u64,
        /// Why it passed frames, and how many, since it was loaded, if it counts that.
        passed: Vec<(&'static str, u64)>,
    },
}

impl VethError {
    pub(super) fn system<E: Into<io::Error>>(attempt: impl Into<String>) -> impl FnOnce(E) -> Self {
        |error| Self::System { attempt: attempt.into(), error: error.into() }
    }
}
