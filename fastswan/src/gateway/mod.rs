//! The tokio driver of a [`Mirror`]: reads the sources, writes the table, attaches the program.
//!
//! A [`Gateway`] joins a [`PolicySource`], a [`HostSource`] and a table. It decides nothing itself: what may be fast, and in
//! which order things are done, is the mirror's. While it runs, a [`GatewayHandle`] asks and commands it from any thread.
//!
//! For other parts between the sources and the table, or another runtime, drive a mirror directly.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::{Future, pending, ready},
    pin::pin,
    time::{Duration, Instant, SystemTime},
};

#[cfg(feature = "bpf")]
use std::os::fd::OwnedFd;

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
#[cfg(feature = "bpf")]
use tokio::io::unix::AsyncFd;
use tokio::{
    sync::oneshot,
    task::unconstrained,
    time::{self, MissedTickBehavior, interval, sleep_until},
};

mod collection;
mod error;
mod handle;
mod journal;
mod lag;
#[cfg_attr(not(feature = "bpf"), path = "elsewhere.rs")]
mod ports;
mod status;
#[cfg(test)]
mod tests;

use self::{
    collection::{Collection, LookedAt},
    handle::{Command, Ends},
    journal::Journal,
    lag::Histogram,
    ports::{Attached, is_superseded},
};
pub use self::{
    error::GatewayError,
    handle::{GatewayHandle, HandleError, StateWatch},
    lag::Lag,
    status::{Freshness, GatewayState, InterfaceStatus, PolicyStatus, RemovedPolicy, Status},
};
#[cfg(feature = "bpf")]
use crate::forwarder::{AttachConfig, ForwarderError, XdpForwarder};
use crate::{
    compiler::{Explanation, Flow},
    event::PolicyEvent,
    host::{Hooks, HostChange, HostEvent},
    metrics::Meters,
    mirror::{Action, HoldId, Input, InputState, Mirror},
    source::{HostSource, PolicySource, SourceError},
    table::{Devices, OffloadTable, Ports, Slot, TableCounters, TableError, TableUpdate, Traffic},
};

/// How long fast forwarding goes on after the last sign of life of the loop, unless set otherwise.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(1);

/// How often the loop looks whether a guard has shut the fast path, where nothing tells it.
const LOOK_FOR_REMOVALS: Duration = Duration::from_millis(5);

/// Between two records of the metrics that are looked at and not counted.
const RECORD: Duration = Duration::from_secs(5);

/// Events of a source that are handed over before the table is written.
const BATCH: usize = 4096;

/// Changes that are written to the table at once.
const PART: usize = 1024;

/// Removed policies whose traffic is remembered until the next status.
const MOST_REMOVED: usize = 65_536;

/// What a [`Gateway`] asks of a table. Every type that is all of these is one.
pub trait GatewayTable: OffloadTable + Ports + TableCounters + Devices {}

impl<T: OffloadTable + Ports + TableCounters + Devices> GatewayTable for T {}

/// Keeps a table equal to what two sources say, and the program attached. The [crate's documentation](crate) shows one at
/// work.
///
/// Needs no kernel by itself; with a `BpfTable` or netlink sources, what these need.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fastswan::{Gateway, MemoryTable, StaticSource, VouchedHost, table::TableConfig};
///
/// let table = MemoryTable::new(&TableConfig::default());
/// let mut gateway = Gateway::new(StaticSource::new(&[]), VouchedHost::new(), table);
/// gateway.synchronise().await?;
/// println!("{}", gateway.status());
/// // Once it has run, what it was made of can be had back.
/// assert!(gateway.into_parts().is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Gateway<S, H, T: OffloadTable> {
    mirror: Mirror,
    source: Followed<S>,
    host: Followed<H>,
    table: Switched<T>,
    attached: Attached,
    ends: Ends,
    /// Where the answer to a hold goes, once it is in effect.
    held: HashMap<HoldId, oneshot::Sender<HoldId>>,
    /// Holds that the table knows of, and that packets in the program may not know of.
    leaving: FuturesUnordered<BoxFuture<'static, HoldId>>,
    settling: Option<Settling>,
    /// When the removals were noticed that have settled and are not acknowledged.
    settled_from: Option<Instant>,
    collection: Collection,
    removed: VecDeque<RemovedPolicy>,
    removed_unnamed: Traffic,
    /// When the first event came out of a source that the table does not hold yet.
    since: Option<Instant>,
    /// Events of the policy source that were handed over since the last write.
    unwritten_events: usize,
    lag: Histogram,
    journal: Journal,
    meters: Meters,
    record: Option<time::Instant>,
    has_failed: bool,
    /// What keeps everything from being fast, as it was told last.
    obstacles: Vec<String>,
    /// That may have changed.
    may_be_obstructed: bool,
}

/// A source, and whether it has ended: then what it said stays true.
#[derive(Debug)]
struct Followed<S> {
    source: S,
    has_ended: bool,
}

/// A table that is switched off when it is dropped: its sources are not followed any longer.
#[derive(Debug)]
struct Switched<T: OffloadTable>(Option<T>);

/// Waiting until all that the kernel had begun to remove is to be read.
struct Settling {
    removals: u64,
    began: Instant,
    done: BoxFuture<'static, Result<(), SourceError>>,
}

/// What a gateway was made of.
#[derive(Debug)]
#[non_exhaustive]
pub struct Parts<S, H, T> {
    /// The policy source.
    pub source: S,
    /// The host source.
    pub host: H,
    /// The table, which is off. It may hold anything if the gateway has failed.
    pub table: T,
    /// The forwarder, if it had one; the program is still attached.
    #[cfg(feature = "bpf")]
    pub forwarder: Option<XdpForwarder>,
}

impl<S: PolicySource, H: HostSource, T: GatewayTable> Gateway<S, H, T> {
    /// Joins two sources and a table, which must be empty. Nothing is fast before [`Self::run_until`] runs.
    #[must_use]
    pub fn new(source: S, host: H, table: T) -> Self {
        Self {
            mirror: Mirror::new(table.capacity(), DEFAULT_LEASE),
            source: Followed { source, has_ended: false },
            host: Followed { source: host, has_ended: false },
            table: Switched(Some(table)),
            attached: Attached::default(),
            ends: Ends::new(),
            held: HashMap::new(),
            leaving: FuturesUnordered::new(),
            settling: None,
            settled_from: None,
            collection: Collection::default(),
            removed: VecDeque::new(),
            removed_unnamed: Traffic::default(),
            since: None,
            unwritten_events: 0,
            lag: Histogram::default(),
            journal: Journal::default(),
            meters: Meters::new(),
            record: None,
            has_failed: false,
            obstacles: Vec::new(),
            may_be_obstructed: true,
        }
    }

    /// Sets how long the table stays valid without a sign of life of the loop, from 50 ms up. Shorter values
    /// count as 50 ms: the loop renews the lease at least four times as often. The program counts the kernel's ticks, whole
    /// ones, so the lease ends up to one tick early (1 ms with `CONFIG_HZ` 1000, 4 with 250, 10 with 100), and not late.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.mirror.set_lease(lease);
        self
    }

    /// Has everything pass until [`GatewayHandle::set_kill_switch`] says otherwise: to look at what would be fast before
    /// anything is. A status then says `disabled` of the policies that would be, and of the others why not.
    ///
    /// ```
    /// # use fastswan::{Gateway, MemoryTable, StaticSource, VouchedHost, table::TableConfig};
    /// # let table = MemoryTable::new(&TableConfig::default());
    /// let gateway = Gateway::new(StaticSource::new(&[]), VouchedHost::new(), table).with_kill_switch(true);
    /// # drop(gateway);
    /// ```
    #[must_use]
    pub fn with_kill_switch(mut self, on: bool) -> Self {
        self.mirror.set_kill_switch(on);
        self
    }

    /// Has packets be fast that skip hooks of these kinds: the embedder answers for it that this changes no packet's fate.
    /// See [`host::hooks`](crate::host::hooks) for when that is so. The status names those that are skipped.
    ///
    /// ```
    /// use fastswan::host::{HookKind, Hooks};
    /// # use fastswan::{Gateway, MemoryTable, StaticSource, VouchedHost, table::TableConfig};
    ///
    /// # let table = MemoryTable::new(&TableConfig::default());
    /// let gateway = Gateway::new(StaticSource::new(&[]), VouchedHost::new(), table)
    ///     .with_allowed_hooks(Hooks::none().allow(HookKind::NfTables));
    /// # let _ = gateway;
    /// ```
    #[must_use]
    pub fn with_allowed_hooks(mut self, hooks: Hooks) -> Self {
        self.mirror.allow_hooks(hooks);
        self
    }

    /// Has the program attached to these interfaces, as soon as the table holds everything, and attached again when one
    /// of them comes back. The gateway keeps their ports. The forwarder must be the one that the table came with.
    ///
    /// # Errors
    ///
    /// [`ForwarderError`] of an interface that is not there or not suitable.
    #[cfg(feature = "bpf")]
    pub fn with_forwarder(
        mut self,
        forwarder: XdpForwarder,
        interfaces: impl IntoIterator<Item = AttachConfig>,
    ) -> Result<Self, ForwarderError> {
        let configs: Vec<AttachConfig> = interfaces.into_iter().collect();
        for port in self.attached.begin(forwarder, configs)? {
            self.mirror.follow_interface(port.interface, Some(port.ifindex));
        }
        Ok(self)
    }

    /// Has the program pinned in a directory of a BPF file system, so that it stays attached when the process ends, and
    /// taken over from an earlier process: see [`XdpForwarder::attach_pinned`].
    ///
    /// So a table grows, too: a gateway with a larger one takes over from this one, in another process or in the same, and this
    /// one's [`Self::run_until`] ends with [`ForwarderError::Superseded`]. Both run on threads of their own, since filling a
    /// large table takes longer than a lease.
    ///
    #[cfg_attr(feature = "netlink", doc = "```no_run")]
    #[cfg_attr(not(feature = "netlink"), doc = "```ignore")]
    /// use std::{error::Error, sync::mpsc, thread, time::Duration};
    ///
    /// use fastswan::{Gateway, NetlinkHost, NetlinkSource, XdpForwarder};
    /// use fastswan::{forwarder::AttachConfig, gateway::GatewayHandle, table::TableConfig};
    ///
    /// /// Runs until another gateway takes over.
    /// #[tokio::main(flavor = "current_thread")]
    /// async fn follow(policies: u32, grow: mpsc::Sender<u32>) -> Result<(), Box<dyn Error + Send + Sync>> {
    ///     let config = TableConfig { cells_v4: policies * 4, slots: policies, ..TableConfig::default() };
    ///     let (forwarder, table) = XdpForwarder::load(config)?;
    ///     let mut gateway = Gateway::new(NetlinkSource::open()?, NetlinkHost::open()?, table)
    ///         .with_forwarder(forwarder, [AttachConfig::new("lan0")])?
    ///         .pinned_in("/sys/fs/bpf/gateway");
    ///     let handle = gateway.handle();
    ///     tokio::spawn(async move {
    ///         if is_full(&handle).await {
    ///             let _ = grow.send(policies * 2);
    ///         }
    ///     });
    ///     Ok(gateway.run_until(std::future::pending()).await?)
    /// }
    ///
    /// /// Waits until policies find no room; false if the gateway ends before.
    /// async fn is_full(handle: &GatewayHandle) -> bool {
    ///     while let Ok(status) = handle.status().await {
    ///         if status.totals.contains_key("capacity") {
    ///             return true;
    ///         }
    ///         tokio::time::sleep(Duration::from_secs(10)).await;
    ///     }
    ///     false
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn Error>> {
    /// let (grow, sizes) = mpsc::channel();
    /// grow.send(100_000)?;
    /// for policies in sizes {
    ///     let grow = grow.clone();
    ///     thread::spawn(move || println!("{:?}", follow(policies, grow)));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "bpf")]
    #[must_use]
    pub fn pinned_in(mut self, directory: impl Into<std::path::PathBuf>) -> Self {
        self.attached.pin_in(directory.into());
        self
    }

    /// Has packets fast that come in on an interface to which another program attaches the XDP program, as soon as there is one
    /// of this name. The gateway keeps its ports.
    #[must_use]
    pub fn with_interface(mut self, name: impl Into<String>) -> Self {
        self.mirror.follow_interface(name, None);
        self
    }

    /// Asks and commands the gateway while it runs.
    #[must_use]
    pub fn handle(&self) -> GatewayHandle {
        self.ends.handle()
    }

    /// Follows the sources until `stop` is ready. Call it again to go on; in between the lease runs, and what a
    /// [`GatewayHandle`] asks waits.
    ///
    /// Cancel-safe: dropping the future loses nothing but the lease.
    ///
    /// # Errors
    ///
    /// [`GatewayError`]. Everything passes to the kernel from then on, and handles are refused ([`HandleError::Failed`]);
    /// [`Self::into_parts`] gives back what the gateway was made of.
    pub async fn run_until(&mut self, stop: impl Future<Output = ()>) -> Result<(), GatewayError> {
        self.run(stop, |_| false).await
    }

    /// Follows the sources until the table holds all that they have told. Without [`Self::run_until`] soon after, the
    /// lease runs out.
    ///
    /// # Errors
    ///
    /// [`GatewayError`], as above.
    pub async fn synchronise(&mut self) -> Result<(), GatewayError> {
        self.run(pending(), |gateway| gateway.mirror.is_synchronised() && !gateway.mirror.awaits_source())
            .await
    }

    /// What it was made of. Nothing is fast any longer; the program stays attached, and passes.
    #[must_use]
    pub fn into_parts(mut self) -> Option<Parts<S, H, T>> {
        let mut table = self.table.0.take()?;
        table.set_enabled(false);
        Some(Parts {
            source: self.source.source,
            host: self.host.source,
            table,
            #[cfg(feature = "bpf")]
            forwarder: self.attached.take(),
        })
    }

    /// What is mirrored: policies, associations, what became of them.
    #[must_use]
    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// What it does, and why, while it is not run: looks at all policies at once. While it runs, a [`GatewayHandle`] tells.
    #[must_use]
    pub fn status(&mut self) -> Status {
        let mut status = self.complete(LookedAt::all(&self.mirror, self.table.get()));
        status.sort();
        status
    }

    /// Whether a packet is fast, via which policy and association, or why not. Takes interfaces and devices into account as a
    /// status does; the lease and the next moment it does not know.
    #[must_use]
    pub fn explain(&self, flow: &Flow) -> Explanation {
        collection::explain(&self.mirror, self.table.get(), flow)
    }

    /// The table, to look things up in.
    #[must_use]
    pub fn table(&self) -> &T {
        self.table.get()
    }

    async fn run(
        &mut self,
        stop: impl Future<Output = ()>,
        is_done: impl Fn(&Self) -> bool,
    ) -> Result<(), GatewayError> {
        if self.has_failed {
            self.refuse_questions().await;
            return Err(GatewayError::Failed);
        }
        let result = self.follow(stop, is_done).await;
        if let Err(error) = &result {
            self.has_failed = true;
            self.table.set_enabled(false);
            self.ends.fail();
            self.meters.switched(false);
            if is_superseded(error) {
                tracing::info!(%error, "the gateway ends");
            } else {
                tracing::error!(%error, "the gateway cannot go on: everything passes");
            }
            self.refuse_questions().await;
        }
        result
    }

    /// Answers nobody any longer: a handle that waits learns that the gateway has failed. It may live on for long.
    async fn refuse_questions(&mut self) {
        self.held.clear();
        self.collection = Collection::default();
        self.ends.refuse_commands().await;
    }

    async fn follow(
        &mut self,
        stop: impl Future<Output = ()>,
        is_done: impl Fn(&Self) -> bool,
    ) -> Result<(), GatewayError> {
        let mut stop = pin!(stop);
        let signal = removal_signal(self.table.get());
        let mut look_for_removals = interval(LOOK_FOR_REMOVALS);
        look_for_removals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.turn()?;
            if is_done(self) {
                return Ok(());
            }
            let has_guard = self.table.removals().begun != 0;
            let due = self.due();
            tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                error = self.attached.superseded() => return Err(error),
                event = self.source.source.next_event(), if !self.source.has_ended => self.take_policy_event(event?)?,
                event = self.host.source.next_event(), if !self.host.has_ended => self.take_host_event(event?)?,
                result = settled(&mut self.settling) => {
                    result?;
                    self.settled();
                }
                Some(hold) = self.leaving.next() => self.answer_hold(hold),
                Some(command) = self.ends.commands.recv() => self.obey(command)?,
                () = removal(signal.as_ref()) => self.table.drain_removal_signal(),
                _ = look_for_removals.tick(), if has_guard && signal.is_none() => {}
                () = sleep_until(due) => {}
                () = ready(()), if self.collection.is_under_way() => self.collect(),
            }
        }
    }

    /// Hands over everything that is there, and does what follows from it.
    fn turn(&mut self) -> Result<(), GatewayError> {
        self.mirror.handle_time(now(), SystemTime::now());
        self.mirror.handle_removals(self.table.removals(), now());
        self.mirror.handle_differences(self.table.asked().differs, now());
        let table = self.table.get();
        self.mirror.handle_traffic(|slot| table.traffic(slot).packets, now());
        for _ in 0..BATCH {
            // Without a budget: that would make it wait although there is something to read.
            let next = unconstrained(self.source.source.next_event());
            let Some(event) = (!self.source.has_ended).then(|| next.now_or_never()).flatten() else { break };
            self.take_policy_event(event?)?;
        }
        for _ in 0..BATCH {
            let next = unconstrained(self.host.source.next_event());
            let Some(event) = (!self.host.has_ended).then(|| next.now_or_never()).flatten() else { break };
            self.take_host_event(event?)?;
        }
        let asked = now();
        if self.source.has_ended || self.source.source.caught_up()? {
            self.mirror.handle_caught_up(Input::Policies, asked);
        }
        let asked = now();
        if self.host.has_ended || self.host.source.caught_up()? {
            self.mirror.handle_caught_up(Input::Host, asked);
        }
        self.act()?;
        if self.mirror.is_written() {
            if self.unwritten_events > 0 {
                self.meters.applied(std::mem::take(&mut self.unwritten_events));
            }
            if let Some(since) = self.since.take() {
                self.lag.record(since.elapsed());
                self.meters.caught_up(since.elapsed());
            }
            self.source.source.written();
        }
        self.look_for_obstacles();
        self.tell_state();
        Ok(())
    }

    /// Says once what keeps everything, or all of a family, from being fast.
    fn look_for_obstacles(&mut self) {
        if !(self.may_be_obstructed && self.mirror.is_written()) {
            return;
        }
        self.may_be_obstructed = false;
        let obstacles = self.mirror.compiler().obstacles(self.mirror.database());
        let obstacles: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
        for obstacle in obstacles.iter().filter(|obstacle| !self.obstacles.contains(obstacle)) {
            tracing::warn!(obstacle, "packets pass");
        }
        self.obstacles = obstacles;
    }

    fn take_policy_event(&mut self, event: Option<PolicyEvent>) -> Result<(), GatewayError> {
        let Some(event) = event else {
            self.source.has_ended = true;
            return Ok(());
        };
        self.since.get_or_insert_with(Instant::now);
        let (stale, snapshot) = match &event {
            PolicyEvent::Stale(cause) => (Some(cause.name()), None),
            PolicyEvent::Snapshot(all) => (None, Some((all.policies.len(), all.sas.len()))),
            _ => (None, None),
        };
        self.may_be_obstructed |= match &event {
            PolicyEvent::Snapshot(_) | PolicyEvent::DefaultPolicy(_) => true,
            PolicyEvent::Policy(policy) => policy.id.selector.matches_everything(),
            PolicyEvent::PolicyRemoved(policy) => policy.selector.matches_everything(),
            _ => false,
        };
        let before = self.mirror.statistics().audit_repairs;
        let known = self.mirror.input(Input::Policies);
        self.mirror.handle_policy_event(event, now());
        self.unwritten_events += 1;
        self.meters.repaired(self.mirror.statistics().audit_repairs - before);
        if let Some(cause) = stale {
            self.meters.lost_track(Input::Policies.name(), cause);
            tracing::warn!(cause, "the policy source lost track: everything passes until it knows again");
            // At once, not when all has been read.
            self.act()?;
        }
        if let Some((policies, associations)) = snapshot {
            let cause = cause_of(known);
            self.meters.resynchronised(Input::Policies.name(), cause);
            tracing::info!(cause, policies, associations, "the policy source knows everything");
        }
        Ok(())
    }

    fn take_host_event(&mut self, event: Option<HostEvent>) -> Result<(), GatewayError> {
        let Some(event) = event else {
            self.host.has_ended = true;
            return Ok(());
        };
        self.since.get_or_insert_with(Instant::now);
        let known = self.mirror.input(Input::Host);
        let stale = if let HostEvent::Stale(cause) = &event { Some(cause.name()) } else { None };
        let is_snapshot = matches!(event, HostEvent::Snapshot(_));
        let concerns = |concerns: fn(&HostChange) -> bool| match &event {
            HostEvent::Changes(changes) => changes.iter().any(concerns),
            _ => is_snapshot,
        };
        let (concerns_devices, may_obstruct) = (concerns(is_about_devices), concerns(may_obstruct));
        self.mirror.handle_host_event(event, now());
        if let Some(cause) = stale {
            self.meters.lost_track(Input::Host.name(), cause);
            tracing::debug!(cause, "the host source lost track: everything passes until it knows again");
            return self.act();
        }
        if is_snapshot {
            let cause = cause_of(known);
            self.meters.resynchronised(Input::Host.name(), cause);
            tracing::debug!(cause, "the host is known");
        }
        self.may_be_obstructed |= may_obstruct;
        if concerns_devices {
            self.table.refresh_devices();
            self.attached.look_again(&mut self.mirror);
        }
        Ok(())
    }

    /// Does what the mirror wants done.
    fn act(&mut self) -> Result<(), GatewayError> {
        loop {
            let began = Instant::now();
            let expiries = self.mirror.statistics().lease_expiries;
            let Some(action) = self.mirror.poll_action() else { break };
            self.meters.lease_expired(self.mirror.statistics().lease_expiries - expiries);
            match action {
                Action::Disable => self.table.set_enabled(false),
                Action::ResyncHost => self.resync_host(),
                Action::AskBack(asks) => self.table.set_asking(asks),
                Action::Write(update) => {
                    self.meters.compiled(began.elapsed());
                    self.write(&update)?;
                }
                Action::RemovePort { ifindex, vlan } => self.table.remove_port(ifindex, vlan),
                Action::SetPort(port) => {
                    if let Err(error) = self.table.set_port(&port) {
                        tracing::warn!(%error, "a port is left out: its packets pass");
                        self.mirror.handle_port_refused(port.ifindex, port.vlan);
                    }
                }
                Action::Renew { until } => self.table.renew_lease(until),
                Action::Enable => self.table.set_enabled(true),
                Action::Attach { interfaces } => {
                    self.attached.attach(&interfaces, &mut self.mirror, now())?;
                }
                Action::Settle { removals } => {
                    let done = self.source.source.settle();
                    self.settling = Some(Settling { removals, began: Instant::now(), done });
                }
                Action::Acknowledge { removals } => {
                    self.table.acknowledge(removals);
                    if let Some(began) = self.settled_from.take() {
                        self.meters.opened(began.elapsed());
                    }
                }
                Action::Solicit { neighbours } => self.host.source.solicit(&neighbours),
                Action::Held(hold) => self.leaving.push(left_the_program(hold).boxed()),
            }
        }
        Ok(())
    }

    /// Has the host read again, which the kernel has contradicted.
    fn resync_host(&mut self) {
        if let InputState::Stale { cause } = self.mirror.input(Input::Host) {
            self.meters.lost_track(Input::Host.name(), cause);
        }
        tracing::warn!(
            differences = self.table.asked().differs,
            "the kernel routes packets otherwise than the host source says: everything passes until it has told again"
        );
        self.host.source.resync();
    }

    /// Writes an update, a little at a time unless everything passes anyway, as it does while something is being written.
    fn write(&mut self, update: &TableUpdate) -> Result<(), GatewayError> {
        let departed = self.mirror.take_departed();
        // Mostly nothing has departed, and a first update fills every slot.
        let filled: HashSet<Slot> = if departed.is_empty() {
            HashSet::new()
        } else {
            let filled = update.slots.iter().filter(|(_, standing)| standing.is_some());
            filled.map(|(slot, _)| *slot).collect()
        };
        let mut removed: Vec<(RemovedPolicy, _)> = departed
            .into_iter()
            .map(|(slot, id)| (RemovedPolicy { id, traffic: self.table.traffic(slot) }, slot))
            .collect();
        let written = self.write_parts(update);
        // Those that this explains.
        self.mirror.handle_differences(self.table.asked().differs, now());
        self.mirror.handle_written(written.is_ok());
        // A large table takes its time, and the lease may be over by now.
        self.mirror.handle_time(now(), SystemTime::now());
        written?;
        // Packets that were counted meanwhile, unless the slot is another policy's by now.
        for (policy, slot) in removed.iter_mut().filter(|(_, slot)| !filled.contains(slot)) {
            policy.traffic = self.table.traffic(*slot);
        }
        for (policy, _) in removed {
            self.meters.retired(policy.traffic);
            self.remember_removed(policy);
        }
        self.meters.written(update.len());
        self.journal.note(update, &self.mirror);
        Ok(())
    }

    fn write_parts(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        if update.len() <= PART || !self.mirror.is_enabled() {
            return self.table.apply(update);
        }
        for part in update.clone().split(PART) {
            if let Err(error) = self.table.apply(&part) {
                // There is not enough room for the old and the new together. The kill switch is on now.
                tracing::debug!(%error, "writing a large update at once");
                self.table.apply(update)?;
                self.table.set_enabled(true);
                return Ok(());
            }
        }
        Ok(())
    }

    fn remember_removed(&mut self, policy: RemovedPolicy) {
        if self.removed.len() < MOST_REMOVED {
            self.removed.push_back(policy);
        } else {
            self.removed_unnamed = self.removed_unnamed + policy.traffic;
        }
    }

    fn settled(&mut self) {
        if let Some(Settling { removals, began, .. }) = self.settling.take() {
            self.settled_from = Some(began);
            self.mirror.handle_settled(removals, now());
        }
    }

    fn answer_hold(&mut self, hold: HoldId) {
        if let Some(asker) = self.held.remove(&hold) {
            // Whoever asked may have gone; the hold stays.
            let _ = asker.send(hold);
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), GatewayError> {
        // An answer that nobody waits for any longer is of no use to anybody.
        match command {
            Command::Status(asker) => self.collection.ask(asker),
            Command::Explain(flow, asker) => drop(asker.send(self.explain(&flow))),
            Command::Kill(on, asker) => {
                self.mirror.set_kill_switch(on);
                tracing::info!(on, "the kill switch");
                self.act()?;
                let _ = asker.send(());
            }
            Command::Hold(target, asker) => {
                tracing::info!(%target, "holding");
                let hold = self.mirror.hold(target);
                self.held.insert(hold, asker);
            }
            Command::Release(hold, asker) => drop(asker.send(self.mirror.release(hold))),
            #[cfg(feature = "bpf")]
            Command::Attach(config, asker) => {
                let added = self.attached.add(config);
                if let Ok(port) = &added {
                    self.mirror.follow_interface(port.interface.clone(), Some(port.ifindex));
                }
                drop(asker.send(added));
            }
            #[cfg(feature = "bpf")]
            Command::Detach(interface, asker) => {
                self.mirror.forget_interface(&interface);
                self.act()?;
                drop(asker.send(self.attached.remove(&interface)));
            }
        }
        Ok(())
    }

    /// Goes on with a status, a few policies at a time.
    fn collect(&mut self) {
        if let Some(looked_at) = self.collection.go_on(&self.mirror, self.table.get()) {
            #[cfg(feature = "metrics")]
            self.record(&looked_at);
            if self.collection.is_asked_for() {
                let status = self.complete(looked_at);
                self.collection.answer(status);
            }
        }
    }

    #[cfg(all(test, feature = "metrics"))]
    pub(crate) fn record_now(&mut self) {
        let looked_at = LookedAt::all(&self.mirror, self.table.get());
        self.meters.switched(self.mirror.is_enabled());
        self.record(&looked_at);
    }

    /// Records the metrics that are looked at and not counted.
    #[cfg(feature = "metrics")]
    fn record(&mut self, looked_at: &LookedAt) {
        self.meters.look(&crate::metrics::Moment {
            policies: looked_at.policies.iter().map(|policy| (policy.state, policy.traffic)).collect(),
            software_policies: looked_at.software,
            room: self.mirror.compiler().room(),
            passes: self.table.passes(),
            asked: self.table.asked(),
            neighbours: self.mirror.neighbours(),
            solicitations: self.mirror.statistics().solicitations,
            failed_solicitations: self.host.source.failed_solicitations(),
            associations: self.mirror.database().sas().count(),
            queued: self.source.source.queued(),
        });
    }

    /// Adds all but the policies to a status.
    fn complete(&mut self, looked_at: LookedAt) -> Status {
        let interface =
            |(name, ifindex, state): (&str, _, _)| InterfaceStatus { name: name.to_owned(), ifindex, state };
        Status {
            state: self.state(),
            removed: self.removed.drain(..).collect(),
            removed_unnamed: std::mem::take(&mut self.removed_unnamed),
            lost: self.table.lost(),
            asked: self.table.asked(),
            neighbours: self.mirror.neighbours(),
            failed_solicitations: self.host.source.failed_solicitations(),
            passes: self.table.passes().into_iter().map(|(reason, count)| (reason.name(), count)).collect(),
            interfaces: self.mirror.interfaces().map(interface).collect(),
            holds: self.mirror.holds().map(|(hold, target)| (hold, target.clone())).collect(),
            room: self.mirror.compiler().room(),
            lag: self.lag.lag(),
            statistics: self.mirror.statistics().clone(),
            ..Status::of(looked_at)
        }
    }

    fn state(&self) -> GatewayState {
        let freshness = |input: &Input| {
            let state = match self.mirror.input(*input) {
                InputState::Unknown => Freshness::Unknown,
                InputState::CatchingUp => Freshness::CatchingUp,
                InputState::Current { .. } => Freshness::Current,
                InputState::Stale { cause } => Freshness::Stale(cause),
            };
            (input.name(), state)
        };
        GatewayState {
            is_on: self.mirror.is_enabled(),
            is_killed: self.mirror.is_killed(),
            has_ended: self.has_failed,
            inputs: Input::ALL.iter().map(freshness).collect(),
            obstacles: self.obstacles.iter().cloned().chain(self.unattached()).collect(),
            skipped_hooks: self.mirror.skipped_hooks().iter().map(ToString::to_string).collect(),
        }
    }

    /// What to say if packets come in nowhere.
    fn unattached(&self) -> Option<String> {
        let is_unattached = !collection::has_ports(&self.mirror);
        is_unattached.then(|| "no interface is attached: all packets pass".to_owned())
    }

    fn tell_state(&mut self) {
        let state = self.state();
        self.meters.switched(state.is_on);
        self.meters.skipped(self.mirror.skipped_hooks());
        self.ends.states.send_if_modified(|told| {
            let is_new = *told != state;
            *told = state;
            is_new
        });
    }

    /// When the loop turns at the latest.
    fn due(&mut self) -> time::Instant {
        let look = self.mirror.poll_timeout().map_or_else(time::Instant::now, time::Instant::from_std);
        if cfg!(feature = "metrics") {
            let record = *self.record.get_or_insert_with(time::Instant::now);
            if record <= time::Instant::now() {
                self.record = Some(time::Instant::now() + RECORD);
                self.collection.begin();
            }
            return look.min(record);
        }
        look
    }
}

impl<T: OffloadTable> Switched<T> {
    fn get(&self) -> &T {
        let Self(Some(table)) = self else {
            unreachable!("only `into_parts` takes the table, and the gateway with it")
        };
        table
    }
}

impl<T: OffloadTable> std::ops::Deref for Switched<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.get()
    }
}

impl<T: OffloadTable> std::ops::DerefMut for Switched<T> {
    fn deref_mut(&mut self) -> &mut T {
        let Self(Some(table)) = self else {
            unreachable!("only `into_parts` takes the table, and the gateway with it")
        };
        table
    }
}

impl<T: OffloadTable> Drop for Switched<T> {
    fn drop(&mut self) {
        if let Some(table) = &mut self.0 {
            table.set_enabled(false);
        }
    }
}

impl std::fmt::Debug for Settling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settling").field("removals", &self.removals).finish_non_exhaustive()
    }
}

/// The time by the runtime's clock, which tests may stop.
fn now() -> Instant {
    time::Instant::now().into_std()
}

/// What becomes readable when a guard has seen a removal begin, if there is such a thing.
#[cfg(feature = "bpf")]
fn removal_signal(table: &impl OffloadTable) -> Option<AsyncFd<OwnedFd>> {
    let signal = table.removal_signal()?.try_clone_to_owned().ok()?;
    crate::sys::watch_descriptor(signal).ok()
}

/// Waits until a removal begins; for ever if nothing tells.
#[cfg(feature = "bpf")]
async fn removal(signal: Option<&AsyncFd<OwnedFd>>) {
    let Some(signal) = signal else { return pending().await };
    match signal.readable().await {
        Ok(mut readable) => readable.clear_ready(),
        Err(_) => pending().await,
    }
}

#[cfg(not(feature = "bpf"))]
fn removal_signal(_: &impl OffloadTable) -> Option<std::convert::Infallible> {
    None
}

#[cfg(not(feature = "bpf"))]
fn removal(_: Option<&std::convert::Infallible>) -> impl Future<Output = ()> {
    pending()
}

/// Whether all packets, or those of a family, may be kept from being fast after a change, or no longer.
fn may_obstruct(change: &HostChange) -> bool {
    !matches!(
        change,
        HostChange::Routes { .. }
            | HostChange::Neighbour(_)
            | HostChange::NeighbourGone { .. }
            | HostChange::Device { .. }
            | HostChange::PathMtu(_)
            | HostChange::PathMtuGone(_)
            | HostChange::UnclearPathMtus(_)
            | HostChange::Address(_)
            | HostChange::AddressGone(_)
    )
}

/// Whether what a device can do, or whether it is there, may be different after a change.
fn is_about_devices(change: &HostChange) -> bool {
    matches!(change, HostChange::Link(_) | HostChange::LinkGone(_) | HostChange::Device { .. })
}

/// What made a snapshot necessary.
fn cause_of(before: InputState) -> &'static str {
    match before {
        InputState::Unknown => "start",
        InputState::Stale { cause } => cause,
        InputState::CatchingUp | InputState::Current { .. } => "snapshot",
    }
}

async fn settled(settling: &mut Option<Settling>) -> Result<(), SourceError> {
    match settling {
        Some(settling) => (&mut settling.done).await,
        None => pending().await,
    }
}

/// Waits until every packet that was in the program has left it.
#[cfg(feature = "bpf")]
async fn left_the_program(hold: HoldId) -> HoldId {
    if tokio::task::spawn_blocking(crate::sys::grace_period).await.is_err() {
        tracing::warn!("the thread that waits for a grace period has gone");
    }
    hold
}

/// No program runs that this process could wait for.
#[cfg(not(feature = "bpf"))]
fn left_the_program(hold: HoldId) -> impl Future<Output = HoldId> {
    ready(hold)
}
