//! Installs what is missing: packages as root, the rest with cargo and rustup.

use std::{path::Path, process::Command as Process};

use anyhow::{Context as _, ensure};

use super::{features, fuzz, msrv, musl};
use crate::command::{api, cargo, count::Count, ebpf, succeed};

/// Debian packages, and a file of each that tells whether it is there.
const PACKAGES: [(&str, &str); 8] = [
    ("cpio", "/usr/bin/cpio"),
    ("g++", "/usr/bin/g++"),
    ("iproute2", "/usr/sbin/ip"),
    ("iptables", "/usr/sbin/iptables-legacy"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("nftables", "/usr/sbin/nft"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("util-linux", "/usr/bin/setpriv"),
];

/// Programs of crates, with the versions that are known to work.
const TOOLS: [(&str, &str); 2] = [("cargo-deny", "0.20.2"), ("cargo-fuzz", "0.13.2")];

/// Toolchains besides the one that runs this.
const TOOLCHAINS: [&str; 3] = [fuzz::TOOLCHAIN, msrv::TOOLCHAIN, api::TOOLCHAIN];

/// Targets that the toolchain that runs this builds or checks for.
const TARGETS: [&str; 3] = [musl::TARGET, features::OTHER_PLATFORMS[0], features::OTHER_PLATFORMS[1]];

pub(super) fn install() -> anyhow::Result<Count> {
    packages()?;
    ebpf::install()?;
    for (tool, version) in TOOLS {
        tool_of_crate(tool, version)?;
    }
    for toolchain in TOOLCHAINS {
        let found = Process::new("rustup").args(["run", toolchain, "rustc", "--version"]).output();
        if !found.context("running rustup")?.status.success() {
            let arguments = ["toolchain", "install", toolchain, "--profile", "minimal"];
            succeed(Process::new("rustup").args(arguments))?;
        }
    }
    let installed = Process::new("rustup").args(["target", "list", "--installed"]).output();
    let installed = String::from_utf8_lossy(&installed.context("running rustup")?.stdout).into_owned();
    let is_missing = |target: &&str| installed.lines().all(|line| line != *target);
    let missing: Vec<&str> = TARGETS.into_iter().filter(is_missing).collect();
    if !missing.is_empty() {
        succeed(Process::new("rustup").args(["target", "add"]).args(&missing))?;
    }
    Ok(Count::PASSED)
}

fn packages() -> anyhow::Result<()> {
    let missing = PACKAGES.into_iter().filter(|(_, file)| !Path::new(file).exists());
    let missing: Vec<&str> = missing.map(|(package, _)| package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let root = nix::unistd::geteuid().is_root();
    ensure!(root, "packages are missing: run `sudo apt-get install {}`", missing.join(" "));
    succeed(Process::new("apt-get").arg("update"))?;
    succeed(Process::new("apt-get").args(["install", "--yes", "--no-install-recommends"]).args(&missing))
}

fn tool_of_crate(tool: &str, version: &str) -> anyhow::Result<()> {
    let found = Process::new(tool).arg("--version").output();
    if found.is_ok_and(|found| String::from_utf8_lossy(&found.stdout).contains(version)) {
        return Ok(());
    }
    let arguments = ["install", "--locked", "--force", tool, "--version", version];
    succeed(Process::new(cargo()).args(arguments))
}
