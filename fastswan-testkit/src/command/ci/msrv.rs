//! The oldest Rust that the manifest promises.

use crate::command::{count::Count, succeed, toolchain_cargo};

/// `rust-version` of the workspace, as rustup calls it.
pub(super) const TOOLCHAIN: &str = env!("CARGO_PKG_RUST_VERSION");

/// Checks the crate with the oldest Rust, as it is with no feature and with all of them. Only the crate that others
/// depend on: tests and tools may ask for more.
pub(super) fn check() -> anyhow::Result<Count> {
    let mut count = Count::default();
    for features in ["--no-default-features", "--all-features"] {
        let arguments = ["check", "--locked", "--package", "fastswan", features, "--target-dir"];
        succeed(toolchain_cargo(TOOLCHAIN).args(arguments).arg(format!("target/rust-{TOOLCHAIN}")))?;
        count.pass();
    }
    Ok(count)
}
