//! Changes policies, from the event into the table.

use std::sync::atomic::{AtomicBool, Ordering, fence};

use fastswan::{
    Compiler, Database, HostFacts, OffloadTable as _, PolicyEvent,
    forwarder::LoadConfig,
    policy::MacAddr,
    table::{Forwards, Port, Ports as _, ReversePath},
};
use fastswan_testkit_ebpf::PORT;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::{super::error::DatapathError, error::VerdictError, kind::Kind, policies::Policies};
use crate::{prog_run::ProgRun, sys::SharedNumbers};

/// The policies of a gateway, and fastswan's program with its table.
pub(super) struct Churn {
    policies: Policies,
    pub(super) ours: ProgRun,
    database: Database,
    compiler: Compiler,
    /// What has become of each group: its version. Policies that are always shadowed have taken so many turns.
    at: Vec<u32>,
    /// Groups that change.
    changing: Vec<u16>,
    /// How often the lone policy has come and gone.
    turns: u32,
    rng: SmallRng,
    /// Events so far.
    pub(super) changes: u64,
}

/// The versions that the judge reads: of each group the one that is done and the one that has begun.
pub(super) struct VersionsOfGroups(SharedNumbers);

impl VersionsOfGroups {
    /// How many numbers there are for so many groups.
    pub(super) fn numbers(groups: u16) -> usize {
        usize::from(groups) * 2
    }

    pub(super) fn new(numbers: SharedNumbers, policies: Policies) -> Self {
        let versions = Self(numbers);
        // They are to pass, in every version there is.
        let shadowed = |group: &u16| Policies::kind(*group) == Kind::AlwaysShadowed;
        for group in (0..policies.groups()).filter(shadowed) {
            versions.begin(group, 1);
            versions.finish(group, 1);
        }
        versions
    }

    /// Says that policies of a group may be in this version from now on.
    fn begin(&self, group: u16, version: u32) {
        self.0[usize::from(group) * 2 + 1].store(version.into(), Ordering::Relaxed);
        // A lookup that sees a change sees this afterwards.
        fence(Ordering::SeqCst);
    }

    /// Says that none of them is in an earlier version.
    fn finish(&self, group: u16, version: u32) {
        fence(Ordering::SeqCst);
        self.0[usize::from(group) * 2].store(version.into(), Ordering::Relaxed);
    }
}

impl Churn {
    /// Loads fastswan's program, and writes all policies in their first version. `seed` says which of them change when.
    pub(super) fn new(
        policies: Policies,
        ingress: u32,
        seed: u64,
        configure: impl FnOnce(LoadConfig) -> LoadConfig,
    ) -> Result<Self, VerdictError> {
        let config = policies.table();
        // The kernel has no routes for them.
        let load = configure(LoadConfig::from(&config).ask_back(0));
        let ours = ProgRun::load(load).map_err(DatapathError::from)?;
        let mut compiler = Compiler::new(config.capacity());
        compiler.set_host(&HostFacts::vouched());
        let changing =
            (0..policies.groups()).filter(|&group| Policies::kind(group) != Kind::Steady).collect();
        let mut churn = Self {
            policies,
            ours,
            database: Database::default(),
            compiler,
            at: vec![0; usize::from(policies.groups())],
            changing,
            turns: 0,
            rng: SmallRng::seed_from_u64(seed),
            changes: 0,
        };
        churn.ours.table.set_port(&Port {
            ifindex: ingress,
            vlan: 0,
            receiver: ingress,
            address: MacAddr(PORT),
            forwards: Forwards { v4: true, v6: true },
            reverse_path: ReversePath::Off,
        })?;
        churn.take([PolicyEvent::Snapshot(policies.snapshot())])?;
        churn.changes = 0;
        Ok(churn)
    }

    /// Changes one group after the other until it is told to stop.
    pub(super) fn run(&mut self, versions: &VersionsOfGroups, stop: &AtomicBool) -> Result<(), VerdictError> {
        while !stop.load(Ordering::Relaxed) {
            let group = self.changing[self.rng.random_range(0..self.changing.len())];
            self.advance(group, versions)?;
            self.turn_lone()?;
        }
        Ok(())
    }

    /// Changes all policies of a group, one after the other.
    fn advance(&mut self, group: u16, versions: &VersionsOfGroups) -> Result<(), VerdictError> {
        let kind = Policies::kind(group);
        let version = self.at[usize::from(group)] + kind.stride();
        self.at[usize::from(group)] = version;
        let has_versions = kind != Kind::AlwaysShadowed;
        if has_versions {
            versions.begin(group, version);
        }
        for number in self.policies.members(group) {
            self.take(self.policies.events(number, version).into_iter().flatten())?;
        }
        if has_versions {
            versions.finish(group, version);
        }
        Ok(())
    }

    fn turn_lone(&mut self) -> Result<(), VerdictError> {
        let lone = self.policies.lone(self.turns / 2);
        let event = if self.turns.is_multiple_of(2) {
            PolicyEvent::Policy(lone)
        } else {
            PolicyEvent::PolicyRemoved(lone.id)
        };
        self.turns = self.turns.wrapping_add(1);
        self.take([event])
    }

    /// Writes what follows from some events, all at once.
    fn take(&mut self, events: impl IntoIterator<Item = PolicyEvent>) -> Result<(), VerdictError> {
        for event in events {
            self.database.apply(event);
            self.changes += 1;
        }
        let update = self.compiler.compile(&self.database);
        Ok(self.ours.table.apply(&update)?)
    }
}
