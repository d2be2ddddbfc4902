//! The places in the kernel that programs are attached to.
//!
//! A hook knows its links and nothing of directories, other processes or ports that are suitable.

pub(super) mod xdp;
