//! A static build, as small images and routers want it.

use std::process::{Command as Process, Stdio};

use anyhow::{Context as _, ensure};

use crate::command::{count::Count, succeed, workspace, workspace_cargo};

/// With musl libc.
pub(super) const TARGET: &str = "x86_64-unknown-linux-musl";

/// Builds the crate and the examples, and runs the one that needs no privilege.
pub(super) fn check() -> anyhow::Result<Count> {
    let packages = ["--package", "fastswan", "--package", "fastswan-examples"];
    succeed(
        workspace_cargo()
            .args(["build", "--locked", "--target", TARGET])
            .args(packages)
            // Nobody debugs these, and they take long to link with.
            .env("CARGO_PROFILE_DEV_DEBUG", "0"),
    )?;
    let program = workspace().join("target").join(TARGET).join("debug/custom_source");
    let linked = Process::new("ldd").arg(&program).output().context("running ldd")?;
    let linked =
        [linked.stdout, linked.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    let is_static =
        ["statically linked", "not a dynamic executable"].iter().any(|words| linked.contains(words));
    ensure!(is_static, "{} is not static: {linked}", program.display());
    // It takes its policies from stdin.
    succeed(Process::new(&program).stdin(Stdio::null()))?;
    Ok(Count::PASSED)
}
