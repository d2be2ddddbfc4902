//! What a run has shown.

use std::{fmt, time::Duration};

use serde_json::{Value, json};

use super::{
    gateway::Look,
    memory::Memory,
    traffic::{Arrived, Tally},
};

/// What a run has shown.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Policies that the kernel has.
    pub policies: u32,
    /// Policies that the first table has room for.
    pub room: u32,
    /// How long it took the kernel to add all policies.
    pub added: Duration,
    /// Policies that were fast with the first table, and that passed for want of room.
    pub small: [u64; 2],
    /// The same with the second table.
    pub large: [u64; 2],
    /// From loading the second program until the first gateway had ended.
    pub took_over: Duration,
    /// Packets that the first gateway had counted as forwarded when the second began.
    pub counted_by_first: u64,
    /// Policies for which the second gateway, in the end, had counted fewer than the first.
    pub not_inherited: u64,
    /// Packets that the second gateway had counted in the end, those that it has inherited included.
    pub counted: fastswan::table::Traffic,
    /// Frames that were fast meanwhile.
    pub forwarded: u64,
    /// Frames that were sent, all the time.
    pub sent: u64,
    /// How they have arrived.
    pub fast: u64,
    /// The same.
    pub kernel: u64,
    /// Those that have not arrived.
    pub lost: u64,
    /// Those that came more than once.
    pub again: u64,
    /// Frames that passed while the second gateway began, of policies that were fast with the first table.
    pub slow_meanwhile: u64,
    /// Frames that passed after all policies were fast.
    pub slow_afterwards: u64,
    /// Deleting half of the policies one by one.
    pub one_by_one: Deletion,
    /// Deleting the others at once.
    pub at_once: Deletion,
    /// Policies that the gateway still had after that.
    pub left: u64,
    /// Renewals of the second gateway's lease that came too late.
    pub lease_expiries: u64,
    /// Why, and how often, the second gateway has read all policies.
    pub resyncs: Vec<(&'static str, u64)>,
    /// Without a gateway.
    pub memory_before: Memory,
    /// With the first one.
    pub memory_small: Memory,
    /// The most while the second one began beside the first.
    pub memory_most: Memory,
    /// With the second one.
    pub memory_large: Memory,
    /// After all policies were deleted.
    pub memory_after: Memory,
}

/// How policies were deleted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deletion {
    /// How long it took the kernel.
    pub took: Duration,
    /// How long after that the last fast frame arrived.
    pub fast_for: Duration,
    /// How long after that the gateway knew.
    pub followed: Duration,
}

impl Report {
    pub(super) fn new(policies: u32, room: u32, added: Duration) -> Self {
        Self { policies, room, added, ..Self::default() }
    }

    pub(super) fn small(&mut self, look: &Look) {
        self.small = [look.fast_policies, look.without_room];
    }

    /// Takes up what the first gateway had counted before the second began, and what the second does.
    pub(super) fn large(&mut self, first: &Look, second: &Look) {
        self.large = [second.fast_policies, second.without_room];
        self.counted_by_first = first.traffic.packets;
        let inherited = second.packets.iter().copied().chain(std::iter::repeat(0));
        let not_inherited = first.packets.iter().zip(inherited).filter(|(first, second)| second < *first);
        self.not_inherited = not_inherited.count() as u64;
    }

    /// Takes up what became of frames.
    pub(super) fn traffic(&mut self, tally: &Tally) {
        let Arrived { fast, kernel } = tally.arrived();
        self.sent += u64::from(tally.sent);
        self.fast += fast;
        self.kernel += kernel;
        self.lost += tally.lost();
        self.again += tally.again();
    }

    /// Takes up what the second gateway did when it ended.
    pub(super) fn ended(&mut self, look: &Look) {
        self.left = look.policies as u64;
        self.lease_expiries = look.lease_expiries;
        self.resyncs.clone_from(&look.resyncs);
    }

    /// What must not be on any machine.
    #[must_use]
    pub fn wrongs(&self) -> Vec<String> {
        let [fast_before, without_room] = self.small;
        let all = u64::from(self.policies);
        let wrongs = [
            (self.lost > 0, format!("{} frames are lost", self.lost)),
            (self.again > 0, format!("{} frames came more than once", self.again)),
            (
                fast_before == 0 || fast_before > u64::from(self.room) || fast_before + without_room != all,
                format!(
                    "with the first table {fast_before} policies were fast, and {without_room} had no room"
                ),
            ),
            (
                self.large != [all, 0],
                format!(
                    "with the second table {} policies were fast, and {} had no room",
                    self.large[0], self.large[1]
                ),
            ),
            (self.counted_by_first == 0, "the first gateway has counted nothing".to_owned()),
            (
                self.not_inherited > 0,
                format!("counters of {} policies were not inherited", self.not_inherited),
            ),
            (
                self.counted.packets != self.forwarded,
                format!("{} packets were counted, and {} were fast", self.counted.packets, self.forwarded),
            ),
            (self.left > 0, format!("{} policies are left", self.left)),
        ];
        wrongs.into_iter().filter(|(is_so, _)| *is_so).map(|(_, wrong)| wrong).collect()
    }

    /// All of it. Memory is that of the process and that of BPF maps, in bytes.
    #[must_use]
    pub fn json(&self) -> Value {
        let memory = |memory: Memory| json!([memory.process, memory.maps]);
        let deletion = |deletion: Deletion| {
            json!({
                "took_seconds": deletion.took.as_secs_f64(),
                "fast_for_seconds": deletion.fast_for.as_secs_f64(),
                "followed_seconds": deletion.followed.as_secs_f64(),
            })
        };
        json!({
            "policies": self.policies,
            "room": self.room,
            "added_seconds": self.added.as_secs_f64(),
            "fast_before": self.small[0],
            "without_room_before": self.small[1],
            "fast_afterwards": self.large[0],
            "without_room_afterwards": self.large[1],
            "took_over_seconds": self.took_over.as_secs_f64(),
            "counted_by_first": self.counted_by_first,
            "not_inherited": self.not_inherited,
            "counted": self.counted.packets,
            "sent": self.sent,
            "fast": self.fast,
            "kernel": self.kernel,
            "lost": self.lost,
            "again": self.again,
            "slow_meanwhile": self.slow_meanwhile,
            "slow_afterwards": self.slow_afterwards,
            "deleted_one_by_one": deletion(self.one_by_one),
            "deleted_at_once": deletion(self.at_once),
            "left": self.left,
            "lease_expiries": self.lease_expiries,
            "resyncs": self.resyncs.iter().map(|(cause, times)| json!([cause, times])).collect::<Vec<_>>(),
            "memory_before": memory(self.memory_before),
            "memory_small": memory(self.memory_small),
            "memory_most": memory(self.memory_most),
            "memory_large": memory(self.memory_large),
            "memory_after": memory(self.memory_after),
            "ok": self.wrongs().is_empty(),
        })
    }
}

/// For people.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, figure: String| writeln!(f, "{what:<62} {figure:>22}");
        let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
        row("the kernel has added all policies, s", seconds(self.added))?;
        row("fast with the first table; without room", pair(self.small))?;
        row("the second gateway has taken over, s", seconds(self.took_over))?;
        row("fast with the second table; without room", pair(self.large))?;
        row("packets that the first gateway had counted", self.counted_by_first.to_string())?;
        row("policies whose counters were not inherited", self.not_inherited.to_string())?;
        row("packets counted in the end; fast frames", pair([self.counted.packets, self.forwarded]))?;
        row("passed while the second began, though fast before", self.slow_meanwhile.to_string())?;
        row("passed after all were fast", self.slow_afterwards.to_string())?;
        for (what, deletion) in [("half, one by one", self.one_by_one), ("the rest, at once", self.at_once)] {
            row(&format!("the kernel has deleted {what}, s"), seconds(deletion.took))?;
            row("  the last fast frame came after that, s", seconds(deletion.fast_for))?;
            row("  the gateway knew after that, s", seconds(deletion.followed))?;
        }
        row("frames sent", self.sent.to_string())?;
        row("frames forwarded by the program; by the kernel", pair([self.fast, self.kernel]))?;
        row("frames lost; twice", pair([self.lost, self.again]))?;
        row("lease expiries of the second gateway", self.lease_expiries.to_string())?;
        let mebibytes = |bytes: u64| bytes >> 20;
        for (when, memory) in [
            ("before", self.memory_before),
            ("with the first gateway", self.memory_small),
            ("at most, with both", self.memory_most),
            ("with the second gateway", self.memory_large),
            ("after the deletion", self.memory_after),
        ] {
            let figures = [memory.process, memory.maps].map(mebibytes);
            row(&format!("MiB of the process; of maps, {when}"), pair(figures))?;
        }
        Ok(())
    }
}

fn pair([one, other]: [u64; 2]) -> String {
    format!("{one}; {other}")
}
