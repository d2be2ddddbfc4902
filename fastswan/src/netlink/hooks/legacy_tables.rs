//! Legacy tables of iptables and ip6tables. The kernel does not tell of changes, so they are read again and again.
//!
//! As of `nf_tables`, a table does no harm if all that it does at the hooks that forwarded packets pass is to accept. The
//! tables of ARP and of bridges are not about packets that are forwarded.

use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant},
};

use crate::{
    host::{Hook, HookKind, HookPlace},
    policy::Family,
    sys::XtablesOption,
};

/// Names of the tables that there are, in the calling thread's network namespace; for root.
const NAMES: [(Family, &str); 2] = [
    (Family::V4, "/proc/thread-self/net/ip_tables_names"),
    (Family::V6, "/proc/thread-self/net/ip6_tables_names"),
];

/// `struct ipt_getinfo`, the same for IPv6: name, mask of hooks, first and last entry of each hook, and two numbers.
const INFO_LENGTH: usize = 84;
const NAME_LENGTH: usize = 32;
const VALID_HOOKS: usize = 32;
const HOOK_ENTRIES: usize = 36;
const UNDERFLOWS: usize = 56;
const SIZE: usize = 80;
/// `struct ipt_get_entries`: name and size, before the entries.
const ENTRIES_HEADER: usize = 40;

/// Hooks that forwarded packets pass.
const PREROUTING: usize = 0;
const FORWARD: usize = 2;
const OUTPUT: usize = 3;
const POSTROUTING: usize = 4;

/// `struct xt_entry_target` and `struct xt_entry_match`: length, and a name of up to 29 bytes.
const MODULE_NAME: usize = 2;
const MODULE_NAME_LENGTH: usize = 29;
/// A verdict comes behind it.
const MODULE_HEADER: usize = 32;

/// The target that heads a chain, and that no packet comes to.
const ERROR: &str = "ERROR";
/// Verdicts of the nameless target: to accept, and to go back to the caller. From 0 on it is where to go on.
const ACCEPT: i32 = -2;
const RETURN: i32 = -5;

/// Targets and matches that have connections tracked.
const TRACK: [&str; 18] = [
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DNAT",
    "MASQUERADE",
    "NETMAP",
    "REDIRECT",
    "SNAT",
    "SYNPROXY",
    "cluster",
    "connbytes",
    "connlabel",
    "connlimit",
    "connmark",
    "conntrack",
    "helper",
    "nat",
    "state",
];

/// Attempts to read a table that changes meanwhile.
const ATTEMPTS: u32 = 8;
/// A table that does harm is read again after so many times as long as reading it has taken: it is not urgent to know that
/// it does no longer.
const REST: u32 = 20;

/// Whether a target or match of iptables has connections tracked.
pub(super) fn tracks(name: &str) -> bool {
    TRACK.contains(&name)
}

/// The tables, as they were read last.
#[derive(Debug, Default)]
pub(super) struct LegacyTables(BTreeMap<(Family, String), Known>);

#[derive(Debug)]
struct Known {
    hooks: Vec<Hook>,
    /// It is not read again before.
    rests_until: Option<Instant>,
}

impl LegacyTables {
    /// Reads them. `output` says whether the kernel takes packets that it has forwarded through the output hook too.
    pub(super) fn read(&mut self, output: bool) -> io::Result<Vec<Hook>> {
        let mut known = std::mem::take(&mut self.0);
        for (family, path) in NAMES {
            let names = match fs::read_to_string(path) {
                Ok(names) => names,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for name in names.lines() {
                let key = (family, name.to_owned());
                let began = Instant::now();
                let resting = known.remove(&key).filter(|table| table.rests_until > Some(began));
                let table = if let Some(table) = resting {
                    table
                } else {
                    let hooks = read_table(family, name, output)?;
                    let rest = began.elapsed().checked_mul(REST).unwrap_or(Duration::MAX);
                    let rests_until = if hooks.is_empty() { None } else { began.checked_add(rest) };
                    Known { hooks, rests_until }
                };
                self.0.insert(key, table);
            }
        }
        Ok(self.0.values().flat_map(|table| table.hooks.clone()).collect())
    }
}

fn read_table(family: Family, name: &str, output: bool) -> io::Result<Vec<Hook>> {
    if name.is_empty() || name.len() >= NAME_LENGTH {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    for _ in 0..ATTEMPTS {
        let mut info = [0; INFO_LENGTH];
        info[..name.len()].copy_from_slice(name.as_bytes());
        match XtablesOption::Info.get(family == Family::V6, &mut info) {
            Ok(()) => {}
            // It has gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let size = word(&info, SIZE).ok_or(io::ErrorKind::InvalidData)?;
        let mut entries = vec![0; ENTRIES_HEADER + size as usize];
        entries[..name.len()].copy_from_slice(name.as_bytes());
        entries[NAME_LENGTH..NAME_LENGTH + 4].copy_from_slice(&size.to_ne_bytes());
        match XtablesOption::Entries.get(family == Family::V6, &mut entries) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => continue,
            Err(error) => return Err(error),
        }
        let table = Table { family, info: &info, entries: &entries[ENTRIES_HEADER..] };
        let (harm, track) = table.judge(output).ok_or(io::ErrorKind::InvalidData)?;
        let hook = |kind, name: String| Hook { kind, place: HookPlace::Forwarding(Some(family)), name };
        let program = match family {
            Family::V4 => "iptables-legacy",
            Family::V6 => "ip6tables-legacy",
        };
        let harm = harm.then(|| hook(HookKind::IpTables, format!("table {name} ({program})")));
        let track = track.then(|| {
            hook(HookKind::Conntrack, format!("connections are tracked for table {name} ({program})"))
        });
        return Ok(harm.into_iter().chain(track).collect());
    }
    Err(io::Error::from(io::ErrorKind::ResourceBusy))
}

/// What the kernel says about a table.
struct Table<'a> {
    family: Family,
    info: &'a [u8],
    entries: &'a [u8],
}

/// What one rule does.
struct Entry {
    harm: bool,
    track: bool,
    /// It goes on somewhere else.
    jumps: bool,
    length: usize,
}

impl Table<'_> {
    /// Whether it may change a forwarded packet's fate, and whether it has connections tracked; `None` if it is not laid
    /// out as it should.
    fn judge(&self, output: bool) -> Option<(bool, bool)> {
        let (mut any_harm, mut track) = (false, false);
        let mut offset = 0;
        while offset < self.entries.len() {
            let entry = self.entry(offset)?;
            any_harm |= entry.harm;
            track |= entry.track;
            offset += entry.length;
        }
        let valid = word(self.info, VALID_HOOKS)?;
        let mut harm = false;
        for hook in [PREROUTING, FORWARD, POSTROUTING].into_iter().chain(output.then_some(OUTPUT)) {
            if valid & 1 << hook == 0 {
                continue;
            }
            let mut offset = word(self.info, HOOK_ENTRIES + 4 * hook)? as usize;
            let last = word(self.info, UNDERFLOWS + 4 * hook)? as usize;
            while offset <= last {
                let entry = self.entry(offset)?;
                // Where it goes on is not followed.
                harm |= entry.harm || entry.jumps && any_harm;
                offset += entry.length;
            }
        }
        Some((harm, track))
    }

    fn entry(&self, offset: usize) -> Option<Entry> {
        let entry = self.entries.get(offset..)?;
        // `struct ipt_entry` and `struct ip6t_entry`: where the target and the next entry are, and the length.
        let (offsets, header) = match self.family {
            Family::V4 => (88, 112),
            Family::V6 => (140, 168),
        };
        let target_at = usize::from(half(entry, offsets)?);
        let length = usize::from(half(entry, offsets + 2)?);
        if target_at < header || length < target_at + MODULE_HEADER {
            return None;
        }
        let entry = entry.get(..length)?;
        let mut track = false;
        let mut at = header;
        while at < target_at {
            let (length, name) = module(entry, at)?;
            track |= tracks(&name);
            at += length;
        }
        let (_, target) = module(entry, target_at)?;
        track |= tracks(&target);
        let (harm, jumps) = match target.as_str() {
            "" => match word(entry, target_at + MODULE_HEADER)?.cast_signed() {
                ACCEPT | RETURN => (false, false),
                // Without a target it goes on with the next.
                next @ 0.. => (false, usize::try_from(next).ok()? != offset + length),
                _ => (true, false),
            },
            ERROR => (false, false),
            _ => (true, false),
        };
        Some(Entry { harm, track, jumps, length })
    }
}

/// Length and name of a match or target.
fn module(entry: &[u8], at: usize) -> Option<(usize, String)> {
    let length = usize::from(half(entry, at)?);
    let name = entry.get(at + MODULE_NAME..at + MODULE_NAME + MODULE_NAME_LENGTH)?;
    let name = name.iter().copied().take_while(|byte| *byte != 0).collect();
    (length >= MODULE_HEADER).then(|| Some((length, String::from_utf8(name).ok()?)))?
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|half| u16::from_ne_bytes(*half))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: usize = 112;

    /// An entry of IPv4 with these matches, and a target with a verdict.
    fn entry(matches: &[&str], target: &str, verdict: i32) -> Vec<u8> {
        let module = |name: &str, length: u16| {
            let mut module = vec![0; usize::from(length)];
            module[..2].copy_from_slice(&length.to_ne_bytes());
            module[2..2 + name.len()].copy_from_slice(name.as_bytes());
            module
        };
        let mut entry = vec![0; HEADER];
        entry.extend(matches.iter().flat_map(|name| module(name, 40)));
        let target_at = u16::try_from(entry.len()).unwrap();
        entry.extend(module(target, 40));
        let verdict_at = usize::from(target_at) + MODULE_HEADER;
        entry[verdict_at..verdict_at + 4].copy_from_slice(&verdict.to_ne_bytes());
        let length = u16::try_from(entry.len()).unwrap();
        entry[88..90].copy_from_slice(&target_at.to_ne_bytes());
        entry[90..92].copy_from_slice(&length.to_ne_bytes());
        entry
    }

    /// A table whose chain FORWARD has these entries, the last of them for its policy, and others after them.
    fn judge(forward: &[&[u8]], others: &[&[u8]]) -> Option<(bool, bool)> {
        let mut info = [0; INFO_LENGTH];
        info[VALID_HOOKS] = 1 << FORWARD;
        let underflow: usize = forward.iter().rev().skip(1).map(|entry| entry.len()).sum();
        let at = UNDERFLOWS + 4 * FORWARD;
        info[at..at + 4].copy_from_slice(&u32::try_from(underflow).unwrap().to_ne_bytes());
        let entries = [forward.concat(), others.concat()].concat();
        Table { family: Family::V4, info: &info, entries: &entries }.judge(false)
    }

    #[test]
    fn a_table_does_harm_if_it_does_more_than_accept_what_is_forwarded() {
        let [accept, drop, back] = [ACCEPT, -1, RETURN].map(|verdict| entry(&[], "", verdict));
        let [accept, drop, back] = [&accept[..], &drop, &back];
        let error = &entry(&[], ERROR, 0)[..];
        let policy = accept;
        assert_eq!(judge(&[policy], &[error]), Some((false, false)));
        assert_eq!(judge(&[drop], &[error]), Some((true, false)));
        assert_eq!(judge(&[accept, back, policy], &[drop]), Some((false, false)));
        assert_eq!(judge(&[&entry(&[], "MARK", 0), policy], &[]), Some((true, false)));
        let tracked = &entry(&["tcp", "conntrack"], "", ACCEPT)[..];
        assert_eq!(judge(&[tracked, policy], &[]), Some((false, true)));
        assert_eq!(judge(&[policy], &[tracked]), Some((false, true)), "also in other chains");
        let next = entry(&[], "", i32::try_from(policy.len()).unwrap());
        assert_eq!(judge(&[&next, policy], &[drop]), Some((false, false)), "it only counts");
        let jump = &entry(&[], "", 1000)[..];
        assert_eq!(judge(&[jump, policy], &[drop]), Some((true, false)));
        assert_eq!(judge(&[jump, policy], &[error]), Some((false, false)));
    }

    #[test]
    fn a_table_that_is_not_laid_out_as_it_should_is_not_judged() {
        let whole = entry(&["tcp"], "", ACCEPT);
        for length in 1..whole.len() {
            assert_eq!(judge(&[&whole[..length]], &[]), None, "{length}");
        }
        for at in 88..92 {
            let mut changed = whole.clone();
            changed[at] = 0xff;
            assert_eq!(judge(&[&changed], &[]), None, "{at}");
        }
        let mut endless = whole.clone();
        endless[HEADER..HEADER + 2].copy_from_slice(&[0, 0]);
        assert_eq!(judge(&[&endless], &[]), None);
    }
}
