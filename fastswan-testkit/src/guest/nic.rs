//! The ports of the software NIC, through its files in debugfs.

use std::{collections::BTreeMap, fs, io, path::PathBuf, process::Command};

use anyhow::{Context as _, ensure};

const FOLDER: &str = "/sys/kernel/debug/testnic";
/// Where guests have the module.
const MODULE: &str = "/testnic.ko";
/// Names of the ports of the only pair that a scenario has.
const NAMES: [&str; 2] = ["tn0", "tn1"];

/// Two ports that are joined back to back.
#[derive(Debug)]
pub struct Pair(());

/// A port of a pair, by its name when it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port(usize);

impl Pair {
    /// Makes a pair in the initial network namespace.
    ///
    /// # Errors
    ///
    /// The errno of a system call; `ENOENT` if the module is not loaded.
    pub fn new() -> io::Result<Self> {
        fs::write(format!("{FOLDER}/new"), NAMES.join(" "))?;
        Ok(Self(()))
    }

    /// The two ports.
    pub const PORTS: [Port; 2] = [Port(0), Port(1)];

    /// Removes the pair of a process that is gone.
    pub fn remove_leftovers() {
        let _ = fs::write(format!("{FOLDER}/remove"), NAMES[0]);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        Self::remove_leftovers();
    }
}

/// Removes the driver, and all ports.
///
/// # Errors
///
/// If the kernel does not let it go.
pub fn unload() -> anyhow::Result<()> {
    module("rmmod", "testnic")
}

/// Loads the driver again.
///
/// # Errors
///
/// If the kernel does not take it.
pub fn load() -> anyhow::Result<()> {
    module("insmod", MODULE)
}

fn module(program: &str, argument: &str) -> anyhow::Result<()> {
    let output =
        Command::new(program).arg(argument).output().with_context(|| format!("running {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program} {argument}: {said}");
    Ok(())
}

/// Whether this machine has the NIC.
#[must_use]
pub fn is_there() -> bool {
    fs::exists(FOLDER).unwrap_or(false)
}

/// A clear packet that left although a policy covered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clear {
    /// Why: `no_sa`, `fragment` or `removed`.
    pub cause: String,
    /// From where: `stack` or `xdp`.
    pub path: String,
    /// Nanoseconds since the kernel removed the policy or the association.
    pub since: Option<u64>,
}

impl Port {
    /// Its name when it was made.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES[self.0]
    }

    /// Lets it leak as real NICs do, or not.
    ///
    /// # Errors
    ///
    /// The errno of a system call.
    pub fn set_leak(self, leak: bool) -> io::Result<()> {
        fs::write(self.file("leak"), if leak { "1" } else { "0" })
    }

    /// Whether it leaks.
    ///
    /// # Errors
    ///
    /// The errno of a system call.
    pub fn leaks(self) -> io::Result<bool> {
        Ok(fs::read_to_string(self.file("leak"))?.starts_with(['1', 'Y']))
    }

    /// All its counters.
    ///
    /// # Errors
    ///
    /// The errno of a system call.
    pub fn counters(self) -> io::Result<BTreeMap<String, u64>> {
        Ok(counters(&fs::read_to_string(self.file("stats"))?))
    }

    /// One counter; 0 if there is no such.
    ///
    /// # Errors
    ///
    /// The errno of a system call.
    pub fn counter(self, name: &str) -> io::Result<u64> {
        Ok(self.counters()?.get(name).copied().unwrap_or(0))
    }

    /// The clear packets that left although a policy covered them; of many, the last.
    ///
    /// # Errors
    ///
    /// The errno of a system call.
    pub fn clear(self) -> io::Result<Vec<Clear>> {
        Ok(fs::read_to_string(self.file("clear"))?.lines().filter_map(clear).collect())
    }

    /// What it has in a table, for people: `associations` or `policies`.
    #[must_use]
    pub fn table(self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_else(|error| error.to_string())
    }

    fn file(self, name: &str) -> PathBuf {
        [FOLDER, self.name(), name].iter().collect()
    }
}

fn counters(text: &str) -> BTreeMap<String, u64> {
    let counter = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(counter).collect()
}

fn clear(line: &str) -> Option<Clear> {
    let mut words = line.split_whitespace().skip(1);
    let (cause, path, since) = (words.next()?, words.next()?, words.next()?);
    Some(Clear { cause: cause.to_owned(), path: path.to_owned(), since: since.parse().ok() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_clear_packets_are_read() {
        assert_eq!(counters("tx_esp 12\ntx_plain 0\n")["tx_esp"], 12);
        let line = "1234 removed xdp 5678 10.1.0.5 10.2.0.9 17 92";
        let read = Clear { cause: "removed".to_owned(), path: "xdp".to_owned(), since: Some(5678) };
        assert_eq!(clear(line), Some(read));
        assert_eq!(clear("1234 no_sa stack - 10.1.0.5 10.2.0.9 17 92").unwrap().since, None);
    }
}
