//! Which verdicts on a packet are right while its policy changes.
//!
//! Policies belong to groups, and all policies of a group change together, one after the other: from one version to the next.
//! In an even version, packets of the group's policies leave by the way of that group and version, which the Ethernet
//! addresses that are written tell; in an odd one they pass. Whoever changes the policies says for each group which version
//! is [done](Versions::done), that is which is the least that any policy may still be in, and which has
//! [begun](Versions::begun), that is which is the greatest. So a verdict is right if it is that of a version from the one that
//! was done when the lookup began to the one that had begun when it ended. Versions only grow: however much has changed during a
//! lookup, no right verdict is taken for a wrong one.

use core::sync::atomic::AtomicU64;

use crate::{PORT, SENDER, TTL};

/// Versions have so many bits. Nobody changes policies for long enough to count so far.
const VERSION_BITS: u32 = 24;

/// The versions of a group.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Versions {
    /// All of its policies are at least in this version.
    pub done: AtomicU64,
    /// None of them is in a greater one.
    pub begun: AtomicU64,
}

/// What is seen of a frame behind the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The destination of its Ethernet header, and the beginning of the source, as they lie in memory.
    pub first: u64,
    /// What is left of the source, likewise.
    pub rest: u32,
    /// The TTL.
    pub ttl: u8,
}

impl Seen {
    /// A frame that was not touched.
    pub const UNTOUCHED: Self = Self::with(PORT, SENDER, TTL);

    /// A frame that left by the way of a group in a version.
    #[must_use]
    pub const fn forwarded(group: u16, version: u32) -> Self {
        let (destination, source) = way(group, version);
        Self::with(destination, source, TTL - 1)
    }

    const fn with(destination: [u8; 6], source: [u8; 6], ttl: u8) -> Self {
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (destination, source);
        Self {
            first: u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]),
            rest: u32::from_ne_bytes([s2, s3, s4, s5]),
            ttl,
        }
    }
}

/// What a judge says of a verdict: its index in `JUDGED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Judgement {
    /// The packet was forwarded by a way that was right.
    Forwarded,
    /// The packet passed, and there was a version in which it was to pass.
    ToldToPass,
    /// The packet passed, and only a change that was being written can be the reason.
    Updating,
    /// The packet was forwarded by a way that was not right, or its frame is neither one that passed nor one that was forwarded.
    Wrong,
}

impl Judgement {
    /// How many there are.
    pub const COUNT: u32 = 4;
}

/// The Ethernet addresses, destination and source, that packets of a group leave with in a version. Each alone tells both.
#[must_use]
pub const fn way(group: u16, version: u32) -> ([u8; 6], [u8; 6]) {
    let [g0, g1] = group.to_be_bytes();
    let [_, v0, v1, v2] = version.to_be_bytes();
    ([2, g0, g1, v0, v1, v2], [6, g0, g1, v0, v1, v2])
}

/// Judges a verdict on a packet of a group, for which `done` was read before the lookup and `begun` after it.
#[inline(always)]
#[must_use]
pub fn judge(seen: Seen, group: u16, done: u64, begun: u64) -> Judgement {
    if seen == Seen::UNTOUCHED {
        // Of two versions in a row one is odd.
        return if done != begun || done & 1 != 0 { Judgement::ToldToPass } else { Judgement::Updating };
    }
    let version = u32::from_be(seen.rest) & ((1 << VERSION_BITS) - 1);
    let was_there = done <= u64::from(version) && u64::from(version) <= begun;
    if was_there && version & 1 == 0 && seen == Seen::forwarded(group, version) {
        Judgement::Forwarded
    } else {
        Judgement::Wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_right_in_the_versions_that_were_there() {
        for (version, judgement) in [
            (2, Judgement::Wrong),
            (4, Judgement::Forwarded),
            (5, Judgement::Wrong),
            (6, Judgement::Forwarded),
            (8, Judgement::Wrong),
        ] {
            assert_eq!(judge(Seen::forwarded(0x1ff, version), 0x1ff, 4, 7), judgement, "{version}");
        }
        assert_eq!(
            judge(Seen::forwarded(0x1ff, 4), 0x1fe, 4, 4),
            Judgement::Wrong,
            "the way of another group"
        );
    }

    #[test]
    fn a_mixture_of_two_ways_is_wrong() {
        let (old, new) = (Seen::forwarded(3, 4), Seen::forwarded(3, 6));
        for mixture in [
            Seen { first: old.first, ..new },
            Seen { rest: old.rest, ..new },
            Seen { ttl: TTL, ..new },
            Seen { first: Seen::UNTOUCHED.first, ..new },
            Seen { ttl: TTL - 1, ..Seen::UNTOUCHED },
        ] {
            assert_eq!(judge(mixture, 3, 4, 6), Judgement::Wrong, "{mixture:x?}");
        }
    }

    #[test]
    fn a_packet_passes_in_an_odd_version_or_for_a_change() {
        for (done, begun, judgement) in [
            (4, 4, Judgement::Updating),
            (4, 5, Judgement::ToldToPass),
            (5, 5, Judgement::ToldToPass),
            (5, 6, Judgement::ToldToPass),
            (4, 6, Judgement::ToldToPass),
        ] {
            assert_eq!(judge(Seen::UNTOUCHED, 3, done, begun), judgement, "{done} to {begun}");
        }
        assert_eq!(judge(Seen::forwarded(3, 4), 3, 5, 5), Judgement::Wrong, "it was to pass");
    }
}
