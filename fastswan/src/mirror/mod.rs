//! The mirror as one state machine: what sources say goes in, what is to be done comes out.
//!
//! A [`Mirror`] does no I/O and has no clock, so the order in which things happen, on which the promise rests, is tested
//! without a kernel or a runtime. [`Gateway`](crate::Gateway) drives one with tokio; write a driver of your own for another
//! runtime, or a simulation.
//!
//! # Driving it
//!
//! 1. Hand it everything that happens: `handle_…`. Each takes the time; a later call may not have an earlier one.
//! 2. After each, do what [`poll_action`](Mirror::poll_action) says until it returns `None`.
//! 3. Whenever a source says, on being asked, that nothing is left to tell, pass on the moment *before* it was asked
//!    ([`handle_caught_up`](Mirror::handle_caught_up)). A future that is pending does not say that.
//! 4. After a write that took long, call [`handle_time`](Mirror::handle_time).
//! 5. No later than [`poll_timeout`](Mirror::poll_timeout), call [`handle_time`](Mirror::handle_time) and ask the sources.
//!
//! # What it keeps to
//!
//! What was told is written before anything else is done but to turn the fast path off. So when the lease is renewed, the
//! table holds everything that each [`Input`] had to tell when it was asked last, and the lease ends one lease after the
//! oldest of these moments. The fast path is turned on only when every input is known and has been asked since it was, and
//! off as soon as one loses track, and while what concerns more than 8,192 cells or policies is written. Removals are
//! acknowledged only after the source, asked when they had settled, had nothing more to tell, and all of it is written. The
//! program is attached, and taken over from an earlier process, only while at least half of the lease is left.
//!
//! # Example
//!
//! ```
//! use std::time::{Duration, Instant, SystemTime};
//!
//! use fastswan::{
//!     HostFacts, MemoryTable, OffloadTable as _, PolicyEvent, Snapshot,
//!     host::HostEvent,
//!     mirror::{Action, Input, Mirror},
//!     table::TableConfig,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut table = MemoryTable::new(&TableConfig::default());
//! let mut mirror = Mirror::new(table.capacity(), Duration::from_secs(1));
//! let now = Instant::now();
//! mirror.handle_host_event(HostEvent::Snapshot(HostFacts::vouched()), now);
//! mirror.handle_policy_event(PolicyEvent::Snapshot(Snapshot::default()), now);
//! mirror.handle_caught_up(Input::Host, now);
//! mirror.handle_caught_up(Input::Policies, now);
//! mirror.handle_time(now, SystemTime::now());
//! while let Some(action) = mirror.poll_action() {
//!     match action {
//!         Action::Write(update) => {
//!             table.apply(&update)?;
//!             mirror.handle_written(true);
//!         }
//!         Action::Renew { until } => table.renew_lease(until),
//!         Action::Enable => table.set_enabled(true),
//!         Action::Disable => table.set_enabled(false),
//!         _ => {}
//!     }
//! }
//! assert!(mirror.is_enabled());
//! # Ok(())
//! # }
//! ```

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

mod action;
mod asking;
mod holds;
mod input;
mod interfaces;
mod mutation;
#[cfg(test)]
mod properties;
mod removals;
mod solicitation;
#[cfg(test)]
mod stories;

pub use self::{
    action::Action,
    holds::{HoldId, HoldTarget},
    input::{Input, InputState},
    interfaces::InterfaceState,
};
use fastswan_ebpf::PassReason;

use self::{
    asking::{ASKED_BACK, Asking},
    holds::Holds,
    input::{Revision, Track},
    interfaces::Interfaces,
    mutation::Mutation,
    removals::Pending,
    solicitation::Solicitation,
};
use crate::{
    compiler::{Cause, Compiler, Explanation, Flow},
    database::{Database, Freshness},
    event::PolicyEvent,
    host::{Hook, Hooks, HostChange, HostEvent, HostFacts, HostStaleCause},
    policy::PolicyId,
    table::{Capacity, Removals, Slot, TableUpdate},
};

/// Shorter leases count as this: it must outlast a few turns of the driver.
const SHORTEST_LEASE: Duration = Duration::from_millis(50);

/// More cells than these are looked at while nothing is fast: it takes tens of milliseconds until the table has what follows from
/// a change that concerns them, and that long packets would go where they went before.
const MANY: usize = 8192;

/// The wall clock is looked at, and sources are asked, at least this often.
const LOOK: Duration = Duration::from_millis(250);

/// What the kernel has, what may be fast, and whether anything may be: see the [module](self).
#[derive(Debug)]
pub struct Mirror {
    database: Database,
    compiler: Compiler,
    /// The links of the host, for ports. Routes and the rest are in the compiler.
    links: HostFacts,
    /// Which hooks the fast path may skip.
    allowed: Hooks,
    /// Those of them that there are.
    skipped: Vec<Hook>,
    lease: Duration,
    /// Of the table.
    slots: usize,
    /// See [`MANY`].
    many: usize,
    policies: Track,
    host: Track,
    clock: Track,
    /// Of everything that was told so far.
    revision: Revision,
    /// What the compiler has taken up.
    compiled: Revision,
    /// What the table holds.
    written: Revision,
    /// An update was handed out, and whether it is in the table is not known.
    is_writing: bool,
    /// An update was not written: what the table holds is not known any longer.
    has_failed: bool,
    is_killed: bool,
    is_enabled: bool,
    /// The end of the lease, while the table has one.
    until: Option<Instant>,
    /// The latest time that was told.
    now: Option<Instant>,
    removals: Pending,
    asking: Asking,
    /// The embedder answers for the host: the kernel's routes need not lead where packets go.
    is_vouched: bool,
    /// The program was told to ask the kernel.
    asks: bool,
    /// The host source is to be asked for everything.
    resync_is_due: bool,
    solicitation: Solicitation,
    holds: Holds,
    interfaces: Interfaces,
    /// Policies that were removed, and the slots that they have in the table until the next write.
    departed: Vec<(Slot, PolicyId)>,
    statistics: Statistics,
    #[cfg(test)]
    mutation: Option<Mutation>,
}

/// What a mirror has met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Statistics {
    /// Events of policies and associations that were taken up.
    pub events: u64,
    /// Snapshots of policies by what made them necessary: the [name](crate::event::StaleCause::name) of a cause, `start`,
    /// or `snapshot` for one that was not announced.
    pub resyncs: BTreeMap<&'static str, u64>,
    /// Snapshots of the host, by the same.
    pub host_resyncs: BTreeMap<&'static str, u64>,
    /// Renewals of the lease that came too late: packets passed for a while.
    pub lease_expiries: u64,
    /// See [`Database::audit_repairs`].
    pub audit_repairs: u64,
    /// Times that removals were acknowledged, after a guard had shut the fast path.
    pub times_shut: u64,
    /// Times that a neighbour was to be found or kept ([`Action::Solicit`]).
    pub solicitations: u64,
}

/// The neighbours whose Ethernet addresses policies depend on: those of
/// [`NextHop::Neighbour`](crate::policy::NextHop::Neighbour) whose packets leave for one, or would if its address were known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct NeighbourCounts {
    /// Those whose address is known.
    pub resolved: usize,
    /// Those whose address is not known: the packets of their policies pass.
    pub unresolved: usize,
}

impl Mirror {
    /// A mirror for an empty table of this capacity, whose lease lasts this long; less than 50 ms counts as 50 ms.
    /// Nothing is known yet.
    #[must_use]
    pub fn new(capacity: Capacity, lease: Duration) -> Self {
        let mut database = Database::default();
        database.remember_departures();
        Self {
            database,
            compiler: Compiler::new(capacity),
            links: HostFacts::default(),
            allowed: Hooks::none(),
            skipped: Vec::new(),
            lease: lease.max(SHORTEST_LEASE),
            slots: capacity.slots,
            many: MANY,
            policies: Track::default(),
            host: Track::default(),
            clock: Track::default(),
            revision: 1,
            compiled: 0,
            written: 0,
            is_writing: false,
            has_failed: false,
            is_killed: false,
            is_enabled: false,
            until: None,
            now: None,
            removals: Pending::default(),
            asking: Asking::default(),
            is_vouched: false,
            asks: false,
            resync_is_due: false,
            solicitation: Solicitation::default(),
            holds: Holds::default(),
            interfaces: Interfaces::default(),
            departed: Vec::new(),
            statistics: Statistics::default(),
            #[cfg(test)]
            mutation: None,
        }
    }

    /// Takes up what a policy source says.
    pub fn handle_policy_event(&mut self, mut event: PolicyEvent, now: Instant) {
        self.tick(now);
        self.statistics.events += 1;
        match &mut event {
            PolicyEvent::Stale(cause) => self.policies.lose_track(cause.name()),
            PolicyEvent::Snapshot(snapshot) => {
                self.holds.mark(&mut snapshot.policies);
                let cause = match self.database.freshness() {
                    Freshness::Unknown => "start",
                    Freshness::Current => "snapshot",
                    Freshness::Stale(cause) => cause.name(),
                };
                *self.statistics.resyncs.entry(cause).or_default() += 1;
                self.policies.tell_everything();
            }
            PolicyEvent::Audit(snapshot) => self.holds.mark(&mut snapshot.policies),
            PolicyEvent::Policy(policy) => self.holds.mark([policy]),
            _ => {}
        }
        self.database.apply(event);
        for (key, id) in self.database.departed() {
            // More than once if it comes and goes before anything is written.
            if let Some(slot) = self.compiler.slot_of_key(key).filter(|_| self.departed.len() < self.slots) {
                self.departed.push((slot, id));
            }
        }
        self.statistics.audit_repairs = self.database.audit_repairs();
        self.revision += 1;
    }

    /// Takes up what a host source says.
    pub fn handle_host_event(&mut self, event: HostEvent, now: Instant) {
        self.tick(now);
        match event {
            // What this mirror has asked for.
            HostEvent::Stale(HostStaleCause::Requested)
                if self.host.state() == (InputState::Stale { cause: ASKED_BACK }) => {}
            HostEvent::Stale(cause) => self.host.lose_track(cause.name()),
            HostEvent::Changes(changes) => {
                let mut links_changed = false;
                for change in changes {
                    if let HostChange::Hooks(hooks) = change {
                        self.set_hooks(hooks);
                        links_changed = true;
                        continue;
                    }
                    self.compiler.change_host(&change);
                    if let HostChange::LinkGone(ifindex) = change {
                        self.interfaces.lose(ifindex);
                    }
                    if matches!(change, HostChange::Link(_) | HostChange::LinkGone(_)) {
                        self.links.apply(change);
                        links_changed = true;
                    }
                }
                if links_changed {
                    self.interfaces.resolve(&self.links);
                }
            }
            HostEvent::Snapshot(mut facts) => {
                let cause = match self.host.state() {
                    InputState::Unknown => "start",
                    InputState::Stale { cause } => cause,
                    InputState::CatchingUp | InputState::Current { .. } => "snapshot",
                };
                *self.statistics.host_resyncs.entry(cause).or_default() += 1;
                self.skipped = facts.allow(self.allowed);
                self.compiler.set_host(&facts);
                self.is_vouched = facts.vouched;
                self.links = HostFacts { links: facts.links, hooks: facts.hooks, ..HostFacts::default() };
                self.interfaces.resolve(&self.links);
                self.host.tell_everything();
            }
        }
        self.revision += 1;
    }

    /// Sets which hooks the fast path may skip; at first none.
    pub fn allow_hooks(&mut self, allowed: Hooks) {
        self.allowed = allowed;
        let mut hooks = std::mem::take(&mut self.links.hooks);
        hooks.append(&mut self.skipped);
        self.set_hooks(hooks);
        self.interfaces.resolve(&self.links);
        self.revision += 1;
    }

    /// The hooks that there are and that the fast path skips, as it is allowed to.
    #[must_use]
    pub fn skipped_hooks(&self) -> &[Hook] {
        &self.skipped
    }

    /// Notes that an input, asked at this moment or later, had nothing to tell that was not handed over. It counts for
    /// nothing while the input has lost track.
    pub fn handle_caught_up(&mut self, input: Input, asked: Instant) {
        match input {
            Input::Policies => self.policies.catch_up(asked),
            Input::Host => {
                self.host.catch_up(asked);
                self.asking.catch_up(asked);
                self.doubt_host();
            }
            Input::Clock => self.clock.catch_up(asked),
        }
    }

    /// Takes up the time, by a clock that only goes on, and by the wall clock, which may be set.
    pub fn handle_time(&mut self, now: Instant, wall: SystemTime) {
        self.tick(now);
        let seconds = wall.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        if self.database.set_time(seconds) {
            self.revision += 1;
        }
        self.clock.tell_everything();
        self.clock.catch_up(now);
        self.doubt_host();
    }

    /// Takes up what came of [`Action::Write`]. After a failure everything passes for good: what the table holds is not
    /// known.
    pub fn handle_written(&mut self, is_written: bool) {
        if std::mem::take(&mut self.is_writing) {
            if is_written {
                self.written = self.compiled;
                self.now.into_iter().for_each(|now| self.asking.change(now));
            } else {
                self.has_failed = !self.is_broken(Mutation::IgnoresFailures);
            }
        }
    }

    /// Takes up how many removals have begun and were acknowledged, as the table says.
    pub fn handle_removals(&mut self, removals: Removals, now: Instant) {
        self.tick(now);
        self.removals.look(removals.begun, removals.acknowledged);
    }

    /// Takes up how many packets the kernel's own routes disagreed about ([`Asked::differs`](crate::table::Asked)), as the
    /// table says. Call it before the host source is asked whether it has caught up.
    ///
    /// If the source, asked 10 ms later, has nothing more to tell, and nothing of what it told has changed the table since or
    /// in the 10 ms before, the host is stale, for the cause `asked_back`, and the source is asked for everything
    /// ([`Action::ResyncHost`]), at most once a second. Of a host that is [vouched](HostFacts::vouched) for nothing is asked.
    pub fn handle_differences(&mut self, differs: u64, now: Instant) {
        self.tick(now);
        self.asking.look(differs, now);
        self.doubt_host();
    }

    /// Takes up how many packets slots have forwarded, as the table says when it is asked for one. Call it in every turn: it asks
    /// for those of some slots that send to a neighbour, four times a second. Without it, no neighbour is kept: those that
    /// packets go to are known by this.
    pub fn handle_traffic(&mut self, packets: impl FnMut(Slot) -> u64, now: Instant) {
        self.tick(now);
        self.solicitation.look(self.compiler.neighbours(), packets, now);
    }

    /// Notes that at this moment all that the kernel had begun to remove was to be read: the end of [`Action::Settle`].
    pub fn handle_settled(&mut self, removals: u64, at: Instant) {
        self.removals.settled(removals, at);
    }

    /// Notes that the table has no room for a port: its frames pass.
    pub fn handle_port_refused(&mut self, ifindex: u32, vlan: u16) {
        self.interfaces.refuse_port(ifindex, vlan);
    }

    /// Takes up what came of attaching the program to an interface: nothing, or the reason. After a failure it is tried
    /// again a second later.
    #[expect(clippy::needless_pass_by_value, reason = "callers have no further use for it")]
    pub fn handle_attached(&mut self, ifindex: u32, result: Result<(), String>, now: Instant) {
        self.tick(now);
        self.interfaces.attached(ifindex, &result, now);
    }

    /// Takes up that the program, which was attached to an interface, runs there no longer: it is attached again.
    pub fn handle_detached(&mut self, ifindex: u32) {
        if self.interfaces.detached(ifindex, &self.links) {
            self.revision += 1;
        }
    }

    /// Takes up why the frames of an interface do not show all of a packet, or that they do. Until they do they pass.
    pub fn handle_suitability(&mut self, ifindex: u32, problem: Option<&str>) {
        if self.interfaces.suit(ifindex, problem, &self.links) {
            self.revision += 1;
        }
    }

    /// Has packets that come in on an interface be fast, as soon as it is there. `ifindex` is its index, if that is known
    /// already; when the interface goes and another one of its name comes, that one counts.
    pub fn follow_interface(&mut self, name: impl Into<String>, ifindex: Option<u32>) {
        self.interfaces.follow(name.into(), ifindex, &self.links);
        self.revision += 1;
    }

    /// Has packets that come in on an interface pass from now on. Returns whether it was followed.
    pub fn forget_interface(&mut self, name: &str) -> bool {
        self.revision += 1;
        self.interfaces.forget(name, &self.links)
    }

    /// Passes everything as long as it is on.
    pub fn set_kill_switch(&mut self, on: bool) {
        self.is_killed = on;
    }

    /// Keeps policies from being fast until [`Self::release`]. [`Action::Held`] tells when that has taken effect.
    pub fn hold(&mut self, target: HoldTarget) -> HoldId {
        self.revision += 1;
        self.mark_held(&target, |_, _| true);
        self.holds.add(target, self.revision)
    }

    /// Ends a hold. Returns whether there was one.
    pub fn release(&mut self, hold: HoldId) -> bool {
        let Some(target) = self.holds.remove(hold) else { return false };
        self.revision += 1;
        self.mark_held(&target, Holds::holds);
        true
    }

    /// What to do next; `None` until something else happens. Call it after everything that was handed over.
    pub fn poll_action(&mut self) -> Option<Action> {
        if self.is_enabled && !self.may_be_enabled() {
            return Some(self.disable());
        }
        if std::mem::take(&mut self.resync_is_due) {
            return Some(Action::ResyncHost);
        }
        if self.is_writing {
            return None;
        }
        let is_off = !self.is_enabled || self.is_broken(Mutation::HoldsAtOnce);
        if let Some(hold) = self.holds.next_effective(self.written, is_off) {
            return Some(Action::Held(hold));
        }
        if self.has_failed {
            return None;
        }
        if self.is_broken(Mutation::EnablesUnwritten)
            && let Some(action) = self.enabling()
        {
            return Some(action);
        }
        if let Some((ifindex, vlan)) = self.interfaces.next_to_remove() {
            return Some(Action::RemovePort { ifindex, vlan });
        }
        if self.is_enabled && self.is_much_to_compile() {
            return Some(self.disable());
        }
        if let Some(update) = self.compile() {
            return Some(Action::Write(update));
        }
        // What was told does not concern the table, so it explains no difference.
        self.doubt_host();
        if self.resync_is_due {
            return self.poll_action();
        }
        if let Some(port) = self.interfaces.next_to_set() {
            return Some(Action::SetPort(port));
        }
        let asks = self.host.is_known() && !self.is_vouched;
        if asks != std::mem::replace(&mut self.asks, asks) {
            return Some(Action::AskBack(asks));
        }
        if let Some(action) = self.enabling() {
            return Some(action);
        }
        if let Some(removals) = self.removals.acknowledge(self.asked_for_removals()) {
            self.statistics.times_shut += 1;
            return Some(Action::Acknowledge { removals });
        }
        if self.is_killed || self.is_enabled && self.has_lease() {
            let interfaces = self.now.map_or_else(Vec::new, |now| self.interfaces.start_attaching(now));
            if !interfaces.is_empty() {
                return Some(Action::Attach { interfaces });
            }
        }
        if self.policies.is_known()
            && let Some(removals) = self.removals.start_settling()
        {
            return Some(Action::Settle { removals });
        }
        self.solicit()
    }

    /// When to call [`Self::handle_time`] and to ask the sources whether they have caught up, at the latest. `None` is at
    /// once.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let look = self.clock.asked()? + self.look();
        // In vain once, it is not asked for this over and over.
        let doubt = self.asking.due().filter(|due| self.now.is_some_and(|now| now < *due));
        Some(doubt.map_or(look, |due| due.min(look)))
    }

    /// Sets how long the lease lasts, from its next renewal on.
    pub fn set_lease(&mut self, lease: Duration) {
        self.lease = lease.max(SHORTEST_LEASE);
    }

    /// Time between two looks at the clock and the sources.
    #[must_use]
    pub fn look(&self) -> Duration {
        (self.lease / 4).min(LOOK)
    }

    /// Whether a source is to be asked at once whether it has caught up, since a removal has settled.
    #[must_use]
    pub fn awaits_source(&self) -> bool {
        self.removals.awaits_source()
    }

    /// Whether the fast path is on, as far as the mirror is concerned. A lease that runs out or a removal that is not
    /// acknowledged turns it off all the same.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.is_enabled
    }

    /// Whether the table holds everything that was told, and all inputs are known.
    #[must_use]
    pub fn is_synchronised(&self) -> bool {
        self.written == self.revision && Input::ALL.iter().all(|input| self.track(*input).asked().is_some())
    }

    /// Whether the table holds everything that was told.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.written == self.revision
    }

    /// Whether the kill switch is on.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.is_killed
    }

    /// How fresh an input is.
    #[must_use]
    pub fn input(&self, input: Input) -> InputState {
        self.track(input).state()
    }

    /// The interfaces that are followed, by name, each with its index and state.
    pub fn interfaces(&self) -> impl Iterator<Item = (&str, Option<u32>, InterfaceState)> {
        self.interfaces.states()
    }

    /// How many neighbours there are that policies depend on. Looks at all of them.
    #[must_use]
    pub fn neighbours(&self) -> NeighbourCounts {
        let mut counts = NeighbourCounts::default();
        for neighbour in self.compiler.neighbours().round(None) {
            let is_known = self.compiler.knows(&neighbour);
            *if is_known { &mut counts.resolved } else { &mut counts.unresolved } += 1;
        }
        counts
    }

    /// The holds there are.
    pub fn holds(&self) -> impl Iterator<Item = (HoldId, &HoldTarget)> {
        self.holds.iter()
    }

    /// What was met so far.
    #[must_use]
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// What the source has told.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// What was compiled.
    #[must_use]
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// The policies that the update just handed out removes, and the slots that their traffic was counted in. Each is told
    /// once.
    pub fn take_departed(&mut self) -> Vec<(Slot, PolicyId)> {
        std::mem::take(&mut self.departed)
    }

    /// Whether a packet is fast, via which policy and association, or why not.
    #[must_use]
    pub fn explain(&self, flow: &Flow) -> Explanation {
        let port = flow.ingress.and_then(|(ifindex, vlan)| self.interfaces.port(ifindex, vlan));
        if self.is_killed {
            return Explanation::killed();
        }
        if !self.host.is_known() {
            return Explanation::host_unknown();
        }
        if let Some((ifindex, vlan)) = flow.ingress
            && port.is_none()
            && let Some(hook) = self.links.hook_at(ifindex, vlan)
        {
            return Explanation::Pass { reason: PassReason::UnknownPort, cause: Cause::Hook(hook.clone()) };
        }
        self.compiler.explain(&self.database, flow, port)
    }

    /// Whether the table has a port on a device.
    pub(crate) fn has_only_ports_on(&self, ifindex: u32) -> bool {
        self.interfaces.has_only_ports_on(ifindex)
    }

    fn disable(&mut self) -> Action {
        self.is_enabled = false;
        self.until = None;
        Action::Disable
    }

    /// Whether so much has changed that packets must not wait for the table.
    fn is_much_to_compile(&self) -> bool {
        self.compiled != self.revision && self.compiler.awaited(&self.database) > self.many
    }

    /// What the table lacks, once there is something to be fast by.
    fn compile(&mut self) -> Option<TableUpdate> {
        if self.compiled == self.revision || !self.policies.is_known() || !self.host.has_told() {
            return None;
        }
        self.compiled = self.revision;
        let update = self.compiler.compile(&self.database);
        if update.is_empty() {
            self.written = self.compiled;
            return None;
        }
        self.is_writing = true;
        Some(update)
    }

    /// Renews the lease, or turns the fast path on. Comes after everything is written.
    fn enabling(&mut self) -> Option<Action> {
        if let Some(until) = self.renewal() {
            return Some(Action::Renew { until });
        }
        let is_due = !self.is_enabled && self.until.is_some() && self.may_be_enabled();
        is_due.then(|| {
            self.is_enabled = true;
            Action::Enable
        })
    }

    /// Whether at least half of the lease is left: enough for the program to be fast when it is attached, and until the lease is
    /// renewed next. After a write that took long it is not, and a program that it replaces would be.
    fn has_lease(&self) -> bool {
        self.until.zip(self.now).is_some_and(|(until, now)| now + self.lease / 2 <= until)
    }

    /// Whether nothing forbids the fast path to be on.
    fn may_be_enabled(&self) -> bool {
        let is_known = |input: &Input| {
            *input == Input::Host && self.is_broken(Mutation::ForgetsTheHost)
                || self.track(*input).is_known()
                || self.is_broken(Mutation::IgnoresStaleness)
        };
        !self.is_killed && !self.has_failed && Input::ALL.iter().all(is_known)
    }

    /// The end that the lease may be renewed to, if that is later than it is.
    fn renewal(&mut self) -> Option<Instant> {
        if !self.may_be_enabled() {
            return None;
        }
        let mut oldest: Option<Instant> = None;
        for input in Input::ALL {
            if *input == Input::Host && self.is_broken(Mutation::ForgetsTheHost) {
                continue;
            }
            let asked = self.track(*input).asked()?;
            oldest = Some(oldest.map_or(asked, |oldest| oldest.min(asked)));
        }
        let asked = if self.is_broken(Mutation::RenewsFromNow) { self.now } else { oldest };
        let until = asked? + self.lease;
        if self.until.is_some_and(|old| until <= old) {
            return None;
        }
        let is_late = self.until.zip(self.now).is_some_and(|(until, now)| until < now);
        if is_late && self.is_enabled {
            self.statistics.lease_expiries += 1;
        }
        self.until = Some(until);
        Some(until)
    }

    /// Has neighbours found and kept, unless nothing may be fast.
    fn solicit(&mut self) -> Option<Action> {
        let now = self.now.filter(|_| self.may_be_enabled() && !self.is_vouched)?;
        let Self { solicitation, compiler, .. } = self;
        let neighbours =
            solicitation.batch(compiler.neighbours(), |neighbour| compiler.knows(neighbour), now);
        self.statistics.solicitations += neighbours.len() as u64;
        (!neighbours.is_empty()).then_some(Action::Solicit { neighbours })
    }

    /// Loses track of the host if the kernel has contradicted it.
    fn doubt_host(&mut self) {
        if !self.host.is_known() || self.is_vouched {
            self.asking.forget();
        } else if self.is_written() && self.now.is_some_and(|now| self.asking.convict(now)) {
            self.host.lose_track(ASKED_BACK);
            self.resync_is_due = true;
        }
    }

    fn asked_for_removals(&self) -> Option<Instant> {
        if self.is_broken(Mutation::AcknowledgesEarly) {
            return self.now.map(|now| now + Duration::from_nanos(1));
        }
        self.policies.asked()
    }

    /// Takes up all hooks there are.
    fn set_hooks(&mut self, hooks: Vec<Hook>) {
        self.links.hooks = hooks;
        self.skipped = self.links.allow(self.allowed);
        self.compiler.change_host(&HostChange::Hooks(self.links.hooks.clone()));
    }

    fn mark_held(&mut self, target: &HoldTarget, is_held: impl Fn(&Holds, &PolicyId) -> bool) {
        let Self { database, holds, .. } = self;
        let held = |id: &PolicyId| is_held(holds, id);
        match target {
            HoldTarget::Policy(id) => database.set_held(id, held(id)),
            HoldTarget::Selector(_) => {
                let ids = database.policies().map(|policy| &policy.id).filter(|id| target.holds(id));
                let ids: Vec<_> = ids.cloned().collect();
                for id in ids {
                    let is_held = held(&id);
                    database.set_held(&id, is_held);
                }
            }
        }
    }

    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "nothing is broken but in tests"))]
    fn is_broken(&self, mutation: Mutation) -> bool {
        #[cfg(test)]
        return self.mutation == Some(mutation);
        #[cfg(not(test))]
        {
            let _ = mutation;
            false
        }
    }

    fn tick(&mut self, now: Instant) {
        self.now = self.now.max(Some(now));
    }

    fn track(&self, input: Input) -> &Track {
        match input {
            Input::Policies => &self.policies,
            Input::Host => &self.host,
            Input::Clock => &self.clock,
        }
    }
}
