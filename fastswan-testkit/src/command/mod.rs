//! The subcommands of `cargo testkit`.

pub(crate) mod bench;
pub(crate) mod chaos;
pub(crate) mod ci;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod ebpf;
pub(crate) mod guest;
pub(crate) mod guest_oracle;
pub(crate) mod oracle;
pub(crate) mod vm;

use std::path::{Path, PathBuf};

/// The folder that the workspace lies in: the binary is run by cargo, from its own checkout.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}
