//! What the process and its BPF maps take.

use std::{collections::BTreeMap, fs};

use anyhow::Context as _;

/// Memory that is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of this process that are in memory, without what it has mapped of BPF maps.
    pub process: u64,
    /// Bytes of the BPF maps that this process has open.
    pub maps: u64,
}

impl Memory {
    /// What is in use now.
    ///
    /// # Errors
    ///
    /// If `/proc` cannot be read.
    pub fn now() -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let anonymous = number(&status, "RssAnon:").context("an odd status")?;
        let mut maps = BTreeMap::new();
        for entry in fs::read_dir("/proc/self/fdinfo")? {
            // It may have been closed since, by another thread.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            if let (Some(map), Some(bytes)) = (number(&info, "map_id:"), number(&info, "memlock:")) {
                maps.insert(map, bytes);
            }
        }
        Ok(Self { process: anonymous * 1024, maps: maps.values().sum() })
    }

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { process: self.process.max(other.process), maps: self.maps.max(other.maps) }
    }
}

/// The number behind a name that begins a line.
fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_allocates_is_part_of_its_memory() {
        let before = Memory::now().unwrap();
        let allocated = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = Memory::now().unwrap();
        assert!(after.process >= before.process + (32 << 20), "{before:?} {after:?}");
        drop(allocated);
    }

    #[test]
    fn numbers_stand_behind_names() {
        let info = "pos:\t0\nmap_id:\t17\nmemlock:\t4096\n";
        assert_eq!((number(info, "map_id:"), number(info, "memlock:")), (Some(17), Some(4096)));
        assert_eq!(number(info, "map_type:"), None);
    }
}
