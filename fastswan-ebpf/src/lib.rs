//! Map layouts shared by fastswan and its XDP program.
#![cfg_attr(target_arch = "bpf", no_std)]
mod reason;
pub use reason::PassReason;
