//! Why the facts about the host cannot be known.

use std::io;

/// Host facts could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// A system call failed.
    #[error("{attempt} failed: {error}{remedy}")]
    System {
        /// What was tried.
        attempt: String,
        /// Why it failed. It is in the text, and so not the source of this error: it is printed once.
        error: io::Error,
        /// What to do, starting with "; ", or empty.
        remedy: &'static str,
    },
    /// The kernel said something that could not be understood.
    #[error("the kernel's list of {object} could not be decoded: {reason}; please report this")]
    Undecodable {
        /// What was being read.
        object: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// What was being read kept changing.
    #[error("the kernel's list of {object} changed during each of many attempts to read it; try again later")]
    Changing {
        /// What was being read.
        object: &'static str,
    },
}
