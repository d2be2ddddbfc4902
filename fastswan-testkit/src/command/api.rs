//! `cargo testkit api`: the public API of the crate, as a text that is committed, so that no change of it goes unnoticed.
//!
//! rustdoc tells the API as JSON, an unstable format: one release of Rust is asked, whose format is known to be read.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;

use super::{succeed, toolchain_cargo, workspace};

/// What is done with the text.
#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Command {
    /// Writes it anew.
    Write,
    /// Fails if the API is another than the committed text says, and prints the difference.
    Check,
}

/// The Rust whose rustdoc is asked. Another one, or another version of the crate `public-api`, may tell the same API
/// in other words.
pub(crate) const TOOLCHAIN: &str = "1.95.0";

/// Traits that types have by themselves or with others. Of those that they have by themselves, losing `Send` or `Sync`
/// breaks programs.
const IMPLIED_TRAITS: [&str; 6] = [
    "impl core::marker::Freeze for ",
    "impl core::marker::StructuralPartialEq for ",
    "impl core::marker::Unpin for ",
    "impl core::marker::UnsafeUnpin for ",
    "impl core::panic::unwind_safe::RefUnwindSafe for ",
    "impl core::panic::unwind_safe::UnwindSafe for ",
];

/// Methods that the line with the trait implies.
const IMPLIED_METHODS: [&str; 6] = [
    "::clone(&self)",
    "::cmp(&self, ",
    "::eq(&self, ",
    "::fmt(&self, ",
    "::hash<__H: ",
    "::partial_cmp(&self, ",
];

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Write => Ok(fs::write(committed(), public_api()?)?),
        Command::Check => check(),
    }
}

/// For `cargo testkit ci`, too.
pub(crate) fn check() -> anyhow::Result<()> {
    let committed = committed();
    let told = fs::read_to_string(&committed).with_context(|| format!("reading {}", committed.display()))?;
    let found = public_api()?;
    println!("{} public items", found.lines().count());
    let difference = difference(&told, &found);
    if !difference.is_empty() {
        bail!(
            "the public API is not what fastswan/public-api.txt says:\n{difference}\
             If this is meant, run `cargo testkit api write`, commit the file, and say in CHANGELOG.md what embedders \
             have to change"
        );
    }
    Ok(())
}

fn committed() -> PathBuf {
    workspace().join("fastswan/public-api.txt")
}

/// One line for each public item, sorted.
fn public_api() -> anyhow::Result<String> {
    // A folder of its own: the variable below would have cargo build everything again, now and the next time.
    let target = workspace().join("target/api");
    succeed(
        toolchain_cargo(TOOLCHAIN)
            .args(["rustdoc", "--quiet", "--locked", "--package", "fastswan", "--lib", "--all-features"])
            .arg("--target-dir")
            .arg(&target)
            // With the flag of docs.rs, whose documentation names the feature that an item needs.
            .args(["--", "-Zunstable-options", "--output-format=json", "--cap-lints=allow", "--cfg=docsrs"])
            .env("RUSTC_BOOTSTRAP", "1"),
    )?;
    let api = public_api::Builder::from_rustdoc_json(target.join("doc/fastswan.json"))
        .omit_blanket_impls(true)
        .build()
        .context("reading what rustdoc tells of the API")?;
    let lines = api.items().map(ToString::to_string);
    let lines = lines.filter(|line| {
        !IMPLIED_TRAITS.iter().any(|start| line.starts_with(start))
            && !IMPLIED_METHODS.iter().any(|method| line.contains(method))
    });
    Ok(lines.map(|line| line + "\n").collect())
}

/// The lines that are in one text only.
fn difference(told: &str, found: &str) -> String {
    let [told_lines, found_lines] = [told, found].map(|text| text.lines().collect::<BTreeSet<_>>());
    let gone = told.lines().filter(|line| !found_lines.contains(line)).map(|line| format!("- {line}\n"));
    let new = found.lines().filter(|line| !told_lines.contains(line)).map(|line| format!("+ {line}\n"));
    gone.chain(new).collect()
}

#[cfg(test)]
mod tests {
    use super::difference;

    #[test]
    fn only_what_changed_in_the_api_is_printed() {
        let told = "pub fn a::kept()\npub fn a::changed() -> u8\npub fn a::gone()\n";
        let found = "pub fn a::changed() -> u16\npub fn a::kept()\n";
        let expected = "- pub fn a::changed() -> u8\n- pub fn a::gone()\n+ pub fn a::changed() -> u16\n";
        assert_eq!(difference(told, found), expected);
        assert_eq!(difference(found, found), "");
    }
}
