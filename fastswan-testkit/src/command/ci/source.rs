//! What is said of the source without running it: its form, lints, documentation and dependencies.

use crate::command::{count::Count, succeed, workspace_cargo};

pub(super) fn format() -> anyhow::Result<Count> {
    succeed(workspace_cargo().args(["fmt", "--all", "--check"]))?;
    succeed(workspace_cargo().args(["fmt", "--check", "--manifest-path", "fuzz/Cargo.toml"]))?;
    Ok(Count::PASSED)
}

pub(super) fn lint() -> anyhow::Result<Count> {
    let all = ["clippy", "--locked", "--workspace", "--all-targets", "--all-features", "--", "-Dwarnings"];
    succeed(workspace_cargo().args(all))?;
    Ok(Count::PASSED)
}

pub(super) fn docs() -> anyhow::Result<Count> {
    let arguments = ["doc", "--locked", "--workspace", "--all-features", "--no-deps"];
    succeed(workspace_cargo().args(arguments).env("RUSTDOCFLAGS", "-Dwarnings"))?;
    Ok(Count::PASSED)
}

pub(super) fn deny() -> anyhow::Result<Count> {
    // Not the advisories: their database is not in a package registry.
    succeed(workspace_cargo().args(["deny", "--all-features", "check", "bans", "licenses", "sources"]))?;
    Ok(Count::PASSED)
}
