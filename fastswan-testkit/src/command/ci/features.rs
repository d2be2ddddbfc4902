//! Each feature alone, none, and those by default: features only add, and what is not asked for is not paid for.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::command::{count::Count, succeed, workspace_cargo};

/// Targets without Linux, for which the crate without features is checked.
pub(super) const OTHER_PLATFORMS: [&str; 2] = ["x86_64-apple-darwin", "x86_64-pc-windows-gnu"];

/// Crates that do I/O; without features there is none. Names that end in `-` stand for all that begin so.
const IO_CRATES: [&str; 6] = ["tokio", "aya", "aya-", "netlink-", "rustix", "libc"];

pub(super) fn check() -> anyhow::Result<Count> {
    let mut count = Count::default();
    for features in [vec![], vec!["--no-default-features".to_owned()]].into_iter().chain(alone()?) {
        // Tests too: they must not take for granted what they do not ask for.
        let arguments = ["clippy", "--locked", "--package", "fastswan", "--all-targets"];
        succeed(workspace_cargo().args(arguments).args(features).args(["--", "-Dwarnings"]))?;
        count.pass();
    }
    let core = ["--locked", "--package", "fastswan", "--no-default-features"];
    // Properties take long, and are the same with every feature.
    succeed(workspace_cargo().arg("test").args(core).args(["--", "--skip=properties"]))?;
    let tree = tree(&core)?;
    let io = io_crates(&tree);
    ensure!(io.is_empty(), "without features the crate depends on {}", io.join(", "));
    for platform in OTHER_PLATFORMS {
        succeed(workspace_cargo().arg("check").args(core).args(["--target", platform]))?;
    }
    count.passed += 2 + OTHER_PLATFORMS.len() as u64;
    Ok(count)
}

/// The arguments for each feature that the manifest names, without any other.
fn alone() -> anyhow::Result<Vec<Vec<String>>> {
    let arguments = ["metadata", "--locked", "--no-deps", "--format-version=1"];
    let metadata = workspace_cargo().args(arguments).output().context("running cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&metadata.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let package = packages.iter().find(|package| package["name"] == "fastswan");
    let features = package.and_then(|package| package["features"].as_object()).context("no features")?;
    let features = features.keys().filter(|feature| *feature != "default");
    Ok(features.map(|name| vec!["--no-default-features".to_owned(), format!("--features={name}")]).collect())
}

/// What cargo builds for a program that depends on the crate.
fn tree(arguments: &[&str]) -> anyhow::Result<String> {
    let options = ["--edges", "normal", "--prefix", "none"];
    let output = workspace_cargo().arg("tree").args(arguments).args(options).output();
    let output = output.context("running cargo tree")?;
    ensure!(output.status.success(), "cargo tree failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The crates of a tree that do I/O.
fn io_crates(tree: &str) -> Vec<&str> {
    let names = tree.lines().filter_map(|line| line.split(' ').next());
    let does_io = |name: &str| {
        IO_CRATES.iter().any(|io| if io.ends_with('-') { name.starts_with(io) } else { name == *io })
    };
    names.filter(|name| does_io(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::io_crates;

    #[test]
    fn a_crate_that_does_io_is_found_in_the_tree() {
        let tree = "fastswan v0.1.0 (/somewhere)\nayah v1.0.0\ntokio v1.54.1\nnetlink-sys v0.9.0 (*)\n";
        assert_eq!(io_crates(tree), ["tokio", "netlink-sys"]);
    }
}
