//! The assembled loop: what a source says goes through the database and the compiler into a table.
//!
//! A gateway owns no sockets and no maps of its own. Whoever wants other parts between source and table uses
//! [`Database`] and [`Compiler`] directly; this module shows how.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    pin::pin,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fastswan_ebpf::PassReason;
use futures::FutureExt as _;
use tokio::time::{self, MissedTickBehavior, interval};

use crate::{
    compiler::{Cause, Compiler, Explanation, Flow, PolicyReport, PolicyState},
    database::{Database, Freshness},
    host::HostFacts,
    metrics::Meters,
    source::{PolicyEvent, PolicySource, SourceError},
    table::{OffloadTable, Removals, Slot, TableError, TableUpdate, Traffic},
};

/// How long fast forwarding goes on after the last sign of life of the loop, unless set otherwise.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(1);

/// The loop looks at the wall clock at least this often.
const LOOK: Duration = Duration::from_millis(250);
/// How often the loop looks whether a guard has shut the fast path.
const LOOK_FOR_REMOVALS: Duration = Duration::from_millis(5);

/// Events that are applied before the table is written again.
const BATCH: usize = 4096;

/// Changes that are written to the table at once.
const PART: usize = 1024;

/// Keeps a table equal to what a source says. The [crate's documentation](crate) shows one at work.
#[derive(Debug)]
pub struct Gateway<S, T: OffloadTable> {
    source: S,
    source_ended: bool,
    table: T,
    database: Database,
    compiler: Compiler,
    lease: Duration,
    /// When the lease began last, unless everything passes anyway.
    renewed: Option<time::Instant>,
    has_been_fast: bool,
    host: Host,
    resyncs: BTreeMap<&'static str, u64>,
    lease_expiries: u64,
    /// Times that a guard had shut the fast path when the loop looked.
    times_shut: u64,
    /// The source or the table has failed. The table may lack what the compiler believes to be in it.
    failed: bool,
    meters: Meters,
}

/// Whether what the host does with addresses is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    Known,
    /// Everything passes.
    Unknown,
    /// Everything passes until the loop has caught up.
    KnownAgain,
}

impl<S: PolicySource, T: OffloadTable> Gateway<S, T> {
    /// Joins a source and a table, which must be empty. Nothing is fast before [`Self::run_until`] runs.
    #[must_use]
    pub fn new(source: S, table: T, host: &HostFacts) -> Self {
        let mut compiler = Compiler::new(table.capacity());
        compiler.set_host(host);
        let database = Database::default();
        Self {
            source,
            source_ended: false,
            table,
            database,
            compiler,
            lease: DEFAULT_LEASE,
            renewed: None,
            has_been_fast: false,
            host: Host::Known,
            resyncs: BTreeMap::new(),
            lease_expiries: 0,
            times_shut: 0,
            failed: false,
            meters: Meters::new(),
        }
    }

    /// Sets how long the table stays valid without a sign of life of the loop, from 50 ms up. Shorter values
    /// count as 50 ms: the loop renews the lease at least four times as often.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease.max(Duration::from_millis(50));
        self
    }

    /// Follows the source until `stop` is ready. Call it again to go on; in between the lease runs.
    ///
    /// The lease is only renewed when the source has nothing more to say and all that it said is in the table, and
    /// begins when the source was asked. Cancel-safe: dropping the future loses nothing but the lease.
    ///
    /// # Errors
    ///
    /// [`GatewayError`]. Everything passes to the kernel from then on.
    pub async fn run_until(&mut self, stop: impl Future<Output = ()>) -> Result<(), GatewayError> {
        let mut stop = pin!(stop);
        let mut look = interval((self.lease / 4).min(LOOK));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look_for_removals = interval(LOOK_FOR_REMOVALS);
        look_for_removals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let has_guard = self.table.removals().begun != 0;
            tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                event = self.source.next_event(), if !self.source_ended => {
                    let result = self.follow(event);
                    self.off_if_failed(result)?;
                }
                _ = look.tick() => {
                    let result = self.go_on();
                    self.off_if_failed(result)?;
                }
                _ = look_for_removals.tick(), if has_guard => {
                    let result = self.open_after_removals().await;
                    self.off_if_failed(result)?;
                }
            }
        }
    }

    /// Passes everything until [`Self::set_host`]: what the host does with addresses has changed and cannot be read,
    /// or is not to be read yet. What the source says is followed meanwhile.
    pub fn forget_host(&mut self) {
        self.host = Host::Unknown;
        self.set_off();
    }

    /// Takes up what the host does with addresses now: read it again when
    /// [`HostWatch`](crate::netlink::HostWatch) says so.
    ///
    /// # Errors
    ///
    /// [`GatewayError`]. Everything passes to the kernel from then on.
    pub fn set_host(&mut self, host: &HostFacts) -> Result<(), GatewayError> {
        self.compiler.set_host(host);
        if self.host == Host::Unknown {
            self.host = Host::KnownAgain;
        }
        if !self.database.is_current() {
            return Ok(());
        }
        let update = self.compiler.compile(&self.database);
        let result = self.write(&update).map_err(GatewayError::from);
        self.off_if_failed(result)
    }

    /// Follows the source until the table holds all that it knows, for instance before the program is
    /// [attached](crate::XdpForwarder::attach_pinned) in place of an earlier one. Without
    /// [`Self::run_until`] soon after, the lease runs out. Returns at once if nothing is missing, or if the source
    /// has ended.
    ///
    /// # Errors
    ///
    /// [`GatewayError`]. Everything passes to the kernel from then on.
    pub async fn synchronise(&mut self) -> Result<(), GatewayError> {
        while !self.database.is_current() && !self.source_ended {
            let event = self.source.next_event().await;
            let result = self.follow(event);
            self.off_if_failed(result)?;
        }
        let result = self.open_after_removals().await;
        self.off_if_failed(result)
    }

    /// Lets packets be fast again if a guard has shut the fast path: when the table holds what follows from every
    /// removal that had begun by now. If others begin meanwhile, it stays shut until the next look.
    async fn open_after_removals(&mut self) -> Result<(), GatewayError> {
        let Removals { begun, acknowledged } = self.table.removals();
        if begun == acknowledged || !self.database.is_current() {
            return Ok(());
        }
        let looked = Instant::now();
        self.source.settle().await?;
        let event = if self.source_ended { None } else { self.source.next_event().now_or_never() };
        if event.map_or(Ok(true), |event| self.follow(event))? {
            self.table.acknowledge(begun);
            self.times_shut += 1;
            self.meters.opened(looked.elapsed());
        }
        Ok(())
    }

    /// Renews the lease, unless the source has something to say, and switches off what is about to expire.
    fn go_on(&mut self) -> Result<(), GatewayError> {
        // When it was asked before is not known: this task, or the whole process, may have had no processor since.
        let asked = time::Instant::now();
        if !self.source_ended
            && let Some(event) = self.source.next_event().now_or_never()
        {
            return self.follow(event).map(drop);
        }
        let expires = self.database.set_time(wall_clock());
        if self.database.is_current() && !self.failed {
            if expires {
                let update = self.compiler.compile(&self.database);
                self.write(&update)?;
            }
            match self.host {
                Host::Known => self.renew_lease(asked),
                Host::KnownAgain => self.caught_up(asked),
                Host::Unknown => {}
            }
        }
        Ok(())
    }

    /// All that was known when the source was asked is in the table.
    fn caught_up(&mut self, asked: time::Instant) {
        if self.host != Host::Unknown && !self.failed {
            self.host = Host::Known;
            self.renew_lease(asked);
            self.table.set_enabled(true);
        }
    }

    /// Applies an event, and those that are there already, and writes what follows from them. True if the table then
    /// holds all that the source knows.
    fn follow(&mut self, first: Result<Option<PolicyEvent>, SourceError>) -> Result<bool, GatewayError> {
        let mut event = first?;
        let received = Instant::now();
        let mut applied = 0;
        // When the source was asked and had nothing more to say.
        let caught_up = loop {
            let Some(current) = event else {
                self.source_ended = true;
                break Some(time::Instant::now());
            };
            self.apply(current);
            applied += 1;
            if applied == BATCH {
                break None;
            }
            let asked = time::Instant::now();
            let Some(next) = self.source.next_event().now_or_never() else { break Some(asked) };
            event = next?;
        };
        self.meters.applied(applied);
        self.database.set_time(wall_clock());
        if self.database.is_current() {
            let compiling = Instant::now();
            let update = self.compiler.compile(&self.database);
            self.meters.compiled(compiling.elapsed());
            self.write(&update)?;
            self.meters.written(update.len(), received.elapsed());
            if let Some(asked) = caught_up {
                self.caught_up(asked);
            }
        }
        Ok(caught_up.is_some() && self.database.is_current())
    }

    /// Writes an update, a little at a time unless everything passes anyway, as it does while something is being written.
    fn write(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        self.meters.writing(update, |slot| self.table.traffic(slot));
        if !self.has_been_fast && update.slots.iter().any(|(_, standing)| matches!(standing, Some(Ok(_)))) {
            self.has_been_fast = true;
            tracing::info!("the first policy has all that the fast path needs");
        }
        if update.len() <= PART || self.renewed.is_none() {
            return self.table.apply(update);
        }
        for part in update.clone().split(PART) {
            if let Err(error) = self.table.apply(&part) {
                // There is not enough room for the old and the new together. The kill switch is on now.
                tracing::debug!(%error, "writing a large update at once");
                return self.table.apply(update);
            }
        }
        Ok(())
    }

    fn apply(&mut self, event: PolicyEvent) {
        match &event {
            PolicyEvent::Stale(cause) => {
                // At once, not when the batch is done.
                self.set_off();
                let cause = cause.name();
                self.meters.lost_track(cause);
                tracing::warn!(cause, "the source lost track: everything passes until it knows again");
            }
            PolicyEvent::Snapshot(snapshot) => {
                let cause = match self.database.freshness() {
                    Freshness::Unknown => "start",
                    Freshness::Current => "snapshot",
                    Freshness::Stale(cause) => cause.name(),
                };
                *self.resyncs.entry(cause).or_default() += 1;
                self.meters.resynchronised(cause);
                let (policies, associations) = (snapshot.policies.len(), snapshot.sas.len());
                tracing::info!(cause, policies, associations, "the source knows everything");
            }
            _ => {}
        }
        let repairs = self.database.audit_repairs();
        self.database.apply(event);
        self.meters.repaired(self.database.audit_repairs() - repairs);
    }

    /// The lease begins when the source was asked: what has changed since then is not in the table.
    fn renew_lease(&mut self, asked: time::Instant) {
        self.table.renew_lease(self.lease.saturating_sub(asked.elapsed()));
        if let Some(since) = self.renewed.replace(asked).map(|renewed| renewed.elapsed())
            && since > self.lease
        {
            self.lease_expiries += 1;
            self.meters.lease_expired();
            tracing::warn!(?since, lease = ?self.lease, "the lease was renewed too late: packets passed meanwhile");
        }
    }

    /// Looks at all that is not counted when it happens, and records the [`metrics`](crate::metrics). Looks at all
    /// policies, 0.3 µs each with 100,000 (`cargo testkit bench mirror`), and the loop waits meanwhile: the lease must
    /// outlast it.
    #[cfg(feature = "metrics")]
    pub fn record_metrics(&mut self) {
        let policies = self.compiler.states(&self.database);
        let moment = crate::metrics::Moment {
            policies: policies.map(|(slot, state)| (state, self.traffic(slot))).collect(),
            passes: self.table.passes(),
            associations: self.database.sas().count(),
            is_current: self.database.is_current(),
            queued: self.source.queued(),
        };
        self.meters.look(&moment);
    }
}

impl<S, T: OffloadTable> Gateway<S, T> {
    /// Whether a packet is fast, via which policy and association, or why not. Looks at all policies.
    #[must_use]
    pub fn explain(&self, flow: &Flow) -> Explanation {
        if self.host == Host::Unknown {
            return Explanation::Pass { reason: PassReason::Disabled, cause: Cause::HostUnknown };
        }
        let port = flow.ingress.and_then(|(ifindex, vlan)| self.table.port(ifindex, vlan));
        self.compiler.explain(&self.database, flow, port.as_ref())
    }

    /// What the source has told.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The table, for instance to set the kill switch or a port.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }

    /// What became of every packet-offloaded outbound policy, and why packets were passed.
    #[must_use]
    pub fn report(&self) -> Report {
        let policies = self.compiler.policies(&self.database).into_iter().map(|policy| {
            let traffic = self.traffic(policy.slot);
            (policy, traffic)
        });
        Report {
            policies: policies.collect(),
            passes: self.table.passes(),
            resyncs: self.resyncs.clone(),
            lease_expiries: self.lease_expiries,
            audit_repairs: self.database.audit_repairs(),
            times_shut: self.times_shut,
        }
    }

    fn traffic(&self, slot: Option<Slot>) -> Traffic {
        slot.map_or_else(Traffic::default, |slot| self.table.traffic(slot))
    }

    fn off_if_failed<R>(&mut self, result: Result<R, GatewayError>) -> Result<R, GatewayError> {
        if let Err(error) = &result {
            self.set_off();
            self.failed = true;
            tracing::error!(%error, "the gateway cannot go on: everything passes");
        }
        result
    }

    fn set_off(&mut self) {
        self.table.set_enabled(false);
        self.renewed = None;
        if self.host == Host::KnownAgain {
            // It takes more now to switch on again.
            self.host = Host::Known;
        }
    }
}

/// Seconds since 1970. The kernel counts the age of policies and associations with this clock, which may be set.
fn wall_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl<S, T: OffloadTable> Drop for Gateway<S, T> {
    /// Passes everything from now on: nobody follows the source any longer.
    fn drop(&mut self) {
        self.table.set_enabled(false);
    }
}

/// What a gateway does at one moment.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// The packet-offloaded outbound policies, and what each has forwarded since it was added.
    pub policies: Vec<(PolicyReport, Traffic)>,
    /// Packets that were passed to the kernel, by reason; reasons without packets are left out.
    pub passes: Vec<(PassReason, u64)>,
    /// Snapshots that were applied, by what made them necessary: the [name](crate::source::StaleCause::name) of a
    /// cause, `start`, or `snapshot` for one that nobody announced.
    pub resyncs: BTreeMap<&'static str, u64>,
    /// Renewals of the lease that came too late: packets passed for a while.
    pub lease_expiries: u64,
    /// See [`Database::audit_repairs`].
    pub audit_repairs: u64,
    /// Times that a guard has shut the fast path, and the gateway has opened it again.
    pub times_shut: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (PolicyReport { id, state, .. }, Traffic { packets, bytes }) in &self.policies {
            match state {
                PolicyState::Fast => write!(f, "fast")?,
                PolicyState::Pass(reason) => write!(f, "kernel ({})", reason.name())?,
            }
            writeln!(f, ": {id}: {packets} fast packets, {bytes} bytes")?;
        }
        for (reason, packets) in &self.passes {
            writeln!(f, "passed, {}: {packets} packets", reason.name())?;
        }
        for (cause, snapshots) in &self.resyncs {
            writeln!(f, "resynchronised, {cause}: {snapshots}")?;
        }
        for (what, times) in [
            ("lease expired", self.lease_expiries),
            ("repaired by audits", self.audit_repairs),
            ("shut by the guard", self.times_shut),
        ] {
            if times > 0 {
                writeln!(f, "{what}: {times}")?;
            }
        }
        Ok(())
    }
}

/// The loop cannot go on. Everything passes to the kernel, even if it is run again: it takes another gateway.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The table failed.
    #[error(transparent)]
    Table(#[from] TableError),
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
    };

    use async_trait::async_trait;
    use futures::future::BoxFuture;
    use tokio::time::sleep;

    use super::*;
    use crate::{
        MemoryTable, Selector, StaticSource,
        policy::{Egress, NextHop, PolicyType},
        source::{StaleCause, fixed::StaticPolicy},
        table::{TableConfig, delegate_lookups},
    };

    /// What a guard has counted, and what a table was told.
    #[derive(Clone, Debug, Default)]
    struct Guard {
        begun: Arc<AtomicU64>,
        acknowledged: Arc<AtomicU64>,
    }

    impl Guard {
        fn begin_removal(&self) {
            self.begun.fetch_add(1, Ordering::Relaxed);
        }

        fn is_shut(&self) -> bool {
            self.removals().begun != self.removals().acknowledged
        }

        fn removals(&self) -> Removals {
            let [begun, acknowledged] =
                [&self.begun, &self.acknowledged].map(|number| number.load(Ordering::Relaxed));
            Removals { begun, acknowledged }
        }
    }

    /// A kernel that notifies of nothing before it is waited for.
    struct Kernel {
        told: VecDeque<PolicyEvent>,
        to_tell: Vec<PolicyEvent>,
        /// Removals that begin while it is waited for.
        meanwhile: u64,
        guard: Guard,
    }

    #[async_trait]
    impl PolicySource for Kernel {
        async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
            match self.told.pop_front() {
                Some(event) => Ok(Some(event)),
                None => std::future::pending().await,
            }
        }

        fn caught_up(&mut self) -> Result<bool, SourceError> {
            Ok(self.told.is_empty())
        }

        fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
            self.told.extend(self.to_tell.drain(..));
            for _ in 0..std::mem::take(&mut self.meanwhile) {
                self.guard.begin_removal();
            }
            std::future::ready(Ok(())).boxed()
        }
    }

    /// A table with such a guard.
    struct Guarded {
        table: MemoryTable,
        guard: Guard,
        enabled: bool,
        fails: bool,
    }

    impl OffloadTable for Guarded {
        fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
            if self.fails {
                return Err(TableError::NoSuchSlot { slot: Slot(0), limit: 0 });
            }
            self.table.apply(update)
        }

        fn set_enabled(&mut self, enabled: bool) {
            self.enabled = enabled;
            self.table.set_enabled(enabled);
        }

        fn renew_lease(&mut self, lease: Duration) {
            self.table.renew_lease(lease);
        }

        fn removals(&self) -> Removals {
            self.guard.removals()
        }

        fn acknowledge(&mut self, removals: u64) {
            self.guard.acknowledged.store(removals, Ordering::Relaxed);
        }

        delegate_lookups!(table);
    }

    /// A gateway of one tunnel with a guard that has just been attached.
    async fn gateway() -> (Gateway<Kernel, Guarded>, Guard) {
        let mut source = StaticSource::new(&[StaticPolicy::new(
            Selector::between("10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()).unwrap(),
            7,
            "192.0.2.1".parse().unwrap(),
            "192.0.2.2".parse().unwrap(),
        )
        .priority(100)
        .egress(Egress { next_hop: NextHop::Device, max_length: Some(1400) })]);
        let told = source.next_event().await.unwrap().into_iter().collect();
        let guard = Guard::default();
        guard.begin_removal();
        let kernel = Kernel { told, to_tell: Vec::new(), meanwhile: 0, guard: guard.clone() };
        let config = TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 8 };
        let table =
            Guarded { table: MemoryTable::new(&config), guard: guard.clone(), enabled: false, fails: false };
        (Gateway::new(kernel, table, &HostFacts::vouched()), guard)
    }

    fn is_fast(gateway: &Gateway<Kernel, Guarded>) -> bool {
        matches!(gateway.table.standing(Slot(0)), Some(Ok(_)))
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_removal_the_fast_path_opens_when_the_table_holds_what_follows_from_it() {
        let (mut gateway, guard) = gateway().await;
        gateway.synchronise().await.unwrap();
        assert!(is_fast(&gateway) && !guard.is_shut(), "what began before is caught up with");

        guard.begin_removal();
        gateway.source.to_tell.push(PolicyEvent::PoliciesFlushed(PolicyType::Main));
        gateway.run_until(sleep(LOOK_FOR_REMOVALS * 2)).await.unwrap();
        assert!(!is_fast(&gateway) && !guard.is_shut());
        assert_eq!(gateway.report().times_shut, 2);
    }

    /// What could not be written is not in the table, whatever is written afterwards.
    #[tokio::test(start_paused = true)]
    async fn after_a_table_has_failed_everything_passes_whatever_is_told() {
        let (mut gateway, _guard) = gateway().await;
        gateway.synchronise().await.unwrap();
        assert!(gateway.table.enabled);
        gateway.table.fails = true;
        gateway.source.told.push_back(PolicyEvent::PoliciesFlushed(PolicyType::Main));
        gateway.run_until(sleep(LOOK * 2)).await.unwrap_err();
        gateway.table.fails = false;
        gateway.source.told.push_back(PolicyEvent::SasFlushed(51));
        gateway.run_until(sleep(LOOK * 2)).await.unwrap();
        assert!(is_fast(&gateway) && !gateway.table.enabled, "the slot is as it was, and nobody reads it");
    }

    #[tokio::test(start_paused = true)]
    async fn what_begins_while_the_kernel_settles_keeps_it_shut_until_the_next_look() {
        let (mut gateway, guard) = gateway().await;
        gateway.synchronise().await.unwrap();
        guard.begin_removal();
        gateway.source.meanwhile = 1;
        gateway.open_after_removals().now_or_never().unwrap().unwrap();
        assert_eq!(guard.removals(), Removals { begun: 3, acknowledged: 2 });
        gateway.open_after_removals().now_or_never().unwrap().unwrap();
        assert!(!guard.is_shut());
    }

    #[tokio::test(start_paused = true)]
    async fn it_stays_shut_until_all_that_the_kernel_has_told_is_applied() {
        let (mut gateway, guard) = gateway().await;
        gateway.synchronise().await.unwrap();
        guard.begin_removal();
        gateway.source.to_tell = vec![PolicyEvent::SasFlushed(51); BATCH];
        gateway.source.to_tell.push(PolicyEvent::PoliciesFlushed(PolicyType::Main));
        gateway.open_after_removals().now_or_never().unwrap().unwrap();
        assert!(is_fast(&gateway) && guard.is_shut());
        gateway.open_after_removals().now_or_never().unwrap().unwrap();
        assert!(!is_fast(&gateway) && !guard.is_shut());
    }

    #[tokio::test(start_paused = true)]
    async fn it_stays_shut_while_the_source_has_lost_track() {
        let (mut gateway, guard) = gateway().await;
        let snapshot = gateway.source.told[0].clone();
        gateway.synchronise().await.unwrap();
        guard.begin_removal();
        gateway.source.to_tell.push(PolicyEvent::Stale(StaleCause::DeviceLost(7)));
        gateway.run_until(sleep(LOOK_FOR_REMOVALS * 2)).await.unwrap();
        assert!(guard.is_shut());
        gateway.source.told.push_back(snapshot);
        gateway.run_until(sleep(LOOK_FOR_REMOVALS * 2)).await.unwrap();
        assert!(is_fast(&gateway) && !guard.is_shut());
    }
}
