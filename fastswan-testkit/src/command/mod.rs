//! The subcommands of `cargo testkit`.

pub(crate) mod api;
pub(crate) mod bench;
pub(crate) mod chaos;
pub(crate) mod ci;
mod count;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod ebpf;
pub(crate) mod guest;
pub(crate) mod oracle;
pub(crate) mod vm;

use std::{
    path::{Path, PathBuf},
    process::Command as Process,
};

use anyhow::{Context as _, ensure};

/// The folder that the workspace lies in: the binary is run by cargo, from its own checkout.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// That cargo, in the workspace.
pub(crate) fn workspace_cargo() -> Process {
    let mut process = Process::new(cargo());
    process.current_dir(workspace());
    process
}

/// The cargo of another toolchain, in the workspace.
pub(crate) fn toolchain_cargo(toolchain: &str) -> Process {
    let mut process = Process::new("rustup");
    process.current_dir(workspace()).args(["run", toolchain, "cargo"]);
    // The variables of this run's own cargo would win over the toolchain.
    process.env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
    process
}

/// Runs a program to its end; it fails if the program does.
pub(crate) fn succeed(process: &mut Process) -> anyhow::Result<()> {
    let status = process.status().with_context(|| format!("running {process:?}"))?;
    ensure!(status.success(), "{process:?} failed: {status}");
    Ok(())
}
