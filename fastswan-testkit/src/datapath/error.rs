//! What can go wrong in a bench of the data path.

use fastswan::{forwarder::ForwarderError, table::TableError};

use super::subject::Subject;
use crate::lab::LabError;

/// The data path cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatapathError {
    /// The lab could not be set up.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The library's program could not be loaded.
    #[error(transparent)]
    Forwarder(#[from] ForwarderError),
    /// Its table did not take the policies.
    #[error("writing the policies into the table failed: {0}")]
    Table(#[from] TableError),
    /// A program or a map of the testkit's own failed.
    #[error("{attempt} failed: {error}")]
    Bpf {
        /// What was tried.
        attempt: String,
        /// Why.
        #[source]
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The compiler does not make all policies fast.
    #[error("only {fast} of {policies} policies of {mix} are fast; the first other one passes: {reason}")]
    NotFast {
        /// Whose policies they are.
        mix: &'static str,
        /// Policies that are fast.
        fast: usize,
        /// Policies that should be.
        policies: u32,
        /// Why another one passes.
        reason: &'static str,
    },
    /// A program did not forward all packets of a run.
    #[error("{program} forwarded {forwarded} of {packets} packets; passed: {}", reasons(.passed))]
    Passed {
        /// The program.
        program: Subject,
        /// Packets that it counted as forwarded.
        forwarded: u64,
        /// Packets that it was given.
        packets: u64,
        /// Why the others were passed, and how many, if the program counts that.
        passed: Vec<(&'static str, u64)>,
    },
    /// A program did not count the bytes that it forwarded.
    #[error("{program} counted {counted} of {bytes} bytes")]
    Bytes {
        /// The program.
        program: Subject,
        /// Bytes that it counted.
        counted: u64,
        /// Bytes that it was given.
        bytes: u64,
    },
    /// A program gave a frame another fate than to leave where it came from, or made something else of it.
    #[error(
        "{program} answers {answer} to a packet from {flow}, with the frame {frame:02x?} and not {expected:02x?}"
    )]
    WrongFrame {
        /// The program.
        program: Subject,
        /// Source and destination.
        flow: String,
        /// What the program returned: `XDP_TX` is 3.
        answer: u32,
        /// The headers that it left.
        frame: Vec<u8>,
        /// Those that it should have.
        expected: Vec<u8>,
    },
    /// The kernel has not run the driver as often as it was told to.
    #[error("{program}: the driver has sent {sent} of {packets} packets")]
    Unsent {
        /// The program under test.
        program: Subject,
        /// Packets that the driver has counted.
        sent: u64,
        /// Packets that were asked for.
        packets: u64,
    },
}

impl DatapathError {
    pub(super) fn bpf<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        attempt: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        |error| Self::Bpf { attempt: attempt.into(), error: error.into() }
    }
}

fn reasons(passed: &[(&'static str, u64)]) -> String {
    if passed.is_empty() {
        return "it does not say why".to_owned();
    }
    let passed: Vec<String> = passed.iter().map(|(reason, packets)| format!("{packets} {reason}")).collect();
    passed.join(", ")
}
