//! The mirror under test, on a thread of its own: the kernel as its source, the XDP program's table, the loop that
//! joins them, and the host as it changes. What passes between the parts is noted.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use fastswan::{
    BpfTable, Database, Gateway, HostEvent, HostFacts, HostSource, NetlinkHost, NetlinkSource, OffloadTable,
    PassReason, PolicyEvent, PolicySource, Snapshot, SourceError,
    host::{HostChange, HostError},
    policy::OffloadDev,
    source::{BoxFuture, NetlinkConfig},
    table::{Capacity, Devices, Port, Ports, Slot, TableCounters, TableError, TableUpdate, Traffic},
};
use tokio::sync::{mpsc::UnboundedReceiver, oneshot};

use super::{
    Drops,
    host::{Host, INGRESS},
    lag::{Note, Subject},
    offload::pretend,
};

/// A sixteenth of the default, so that it overruns: room for less than a thousand notifications.
const RECEIVE_BUFFER: usize = 512 << 10;
/// Soon after the mirror has read everything, which it does all the time.
const AUDIT: Duration = Duration::from_millis(50);
/// The shortest that a gateway takes.
pub(super) const LEASE: Duration = Duration::from_millis(50);

/// Asks what the mirror knows of policies and of the host; `None` if it knows that it does not know everything.
pub(super) type Question = oneshot::Sender<Option<(Snapshot, HostFacts)>>;

/// What became of a mirror.
pub(super) struct Life {
    /// For how long everything passed.
    pub(super) passed: Duration,
    pub(super) audit_repairs: u64,
}

/// Runs until nobody can ask any longer. Takes a thread that is on the host. Drops what it is told to.
pub(super) fn run(
    table: BpfTable,
    host: &Host,
    questions: UnboundedReceiver<Question>,
    notes: &mpsc::Sender<Note>,
    drops: Drops,
) -> anyhow::Result<Life> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(follow(table, host, questions, notes, drops))
}

async fn follow(
    table: BpfTable,
    host: &Host,
    mut questions: UnboundedReceiver<Question>,
    notes: &mpsc::Sender<Note>,
    drops: Drops,
) -> anyhow::Result<Life> {
    let config = NetlinkConfig::default()
        .receive_buffer(RECEIVE_BUFFER)
        .audit(Some(AUDIT))
        .believe_anyone()
        .count_larval();
    let source = Noted {
        source: NetlinkSource::with_config(config)?,
        device: host.egress,
        loose: host.loose,
        told: Database::default(),
        notes: notes.clone(),
        drops: drops.removals,
        removals: 0,
    };
    let passed = Arc::new(Mutex::new(Passed::begin()));
    let table = Timed::new(table, notes.clone(), passed.clone());
    let facts = Arc::new(Mutex::new(None));
    let host = NotedHost {
        source: NetlinkHost::with_receive_buffers(RECEIVE_BUFFER, RECEIVE_BUFFER)?,
        facts: facts.clone(),
        drops: drops.host_changes,
        changes: 0,
    };
    let mut gateway = Gateway::new(source, host, table).with_lease(LEASE).with_interface(INGRESS);
    loop {
        let mut question = None;
        gateway.run_until(async { question = questions.recv().await }).await?;
        let database = gateway.mirror().database();
        let Some(question) = question else {
            let passed = lock(&passed).until_now();
            return Ok(Life { passed, audit_repairs: database.audit_repairs() });
        };
        // Whoever does not wait for the answer does not need it.
        let facts = lock(&facts).clone();
        let _ =
            question.send(facts.filter(|_| database.is_current()).map(|facts| (database.snapshot(), facts)));
    }
}

/// The source, whose events look as if policies were offloaded.
struct Noted {
    source: NetlinkSource,
    device: u32,
    loose: u32,
    told: Database,
    notes: mpsc::Sender<Note>,
    drops: Option<u64>,
    removals: u64,
}

impl Noted {
    /// Whether this is a removal that is to be lost.
    fn is_dropped(&mut self, event: &PolicyEvent) -> bool {
        let Some(every) = self.drops.filter(|_| matches!(event, PolicyEvent::PolicyRemoved(_))) else {
            return false;
        };
        self.removals += 1;
        self.removals.is_multiple_of(every)
    }

    /// An audit finds nothing of what is told in the kernel's stead.
    fn complete(&self, found: &mut Snapshot) {
        let is_loose = |offload: Option<OffloadDev>| offload.is_some_and(|to| to.ifindex == self.loose);
        let missing = self.told.policies().filter(|policy| is_loose(policy.offload));
        let missing: Vec<_> = missing
            .filter(|policy| found.policies.iter().all(|other| other.id != policy.id))
            .cloned()
            .collect();
        found.policies.extend(missing);
        let missing = self.told.sas().filter(|sa| is_loose(sa.offload));
        let missing: Vec<_> =
            missing.filter(|sa| found.sas.iter().all(|other| other.id != sa.id)).cloned().collect();
        found.sas.extend(missing);
    }
}

#[async_trait]
impl PolicySource for Noted {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        loop {
            let Some(mut event) = self.source.next_event().await? else { return Ok(None) };
            if self.is_dropped(&event) {
                continue;
            }
            pretend(&mut event, self.device);
            match &mut event {
                PolicyEvent::Audit(found) => self.complete(found),
                event => self.told.apply(event.clone()),
            }
            let note = match &event {
                PolicyEvent::Snapshot(_) => Some(Note::Snapshot(Instant::now())),
                PolicyEvent::Audit(_) => Some(Note::Audit),
                PolicyEvent::Stale(cause) => Some(Note::Stale(*cause)),
                event => Subject::told(event).map(Note::Told),
            };
            // Nobody reads them when the run is over.
            note.map(|note| self.notes.send(note));
            return Ok(Some(event));
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        self.source.caught_up()
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        self.source.settle()
    }

    fn written(&mut self) {
        self.source.written();
    }
}

/// The host source, and what it has told, unless it has lost track.
struct NotedHost {
    source: NetlinkHost,
    facts: Arc<Mutex<Option<HostFacts>>>,
    drops: Option<u64>,
    changes: u64,
}

impl NotedHost {
    /// Loses one of so many changes, if told to.
    fn drop_some(&mut self, changes: &mut Vec<HostChange>) {
        let Some(every) = self.drops else { return };
        changes.retain(|_| {
            self.changes += 1;
            !self.changes.is_multiple_of(every)
        });
    }
}

#[async_trait]
impl HostSource for NotedHost {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        let Some(mut event) = self.source.next_event().await? else { return Ok(None) };
        if let HostEvent::Changes(changes) = &mut event {
            self.drop_some(changes);
        }
        let mut facts = lock(&self.facts);
        match &event {
            HostEvent::Snapshot(all) => *facts = Some(all.clone()),
            HostEvent::Changes(changes) => {
                if let Some(facts) = &mut *facts {
                    for change in changes {
                        facts.apply(change.clone());
                    }
                }
            }
            _ => *facts = None,
        }
        drop(facts);
        Ok(Some(event))
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        self.source.caught_up()
    }

    fn resync(&mut self) {
        self.source.resync();
    }
}

/// Takes the processor away from the mirror from time to time, as other processes do, where it hurts most: when it
/// knows that it has caught up and the table does not say so yet, when it is about to say so, and when it just has.
struct Starvation {
    next: Instant,
}

impl Starvation {
    fn strike(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        thread::sleep(rand::random_range(LEASE / 4..LEASE * 2));
        // Often twice in a row.
        let pause = if rand::random() { Duration::ZERO } else { rand::random_range(LEASE * 10..LEASE * 60) };
        self.next = Instant::now() + pause;
    }
}

/// For how long everything passed: while the kill switch was on, the lease was out, or something was being written.
struct Passed {
    enabled: bool,
    leased_until: Instant,
    /// Everything before is in `total`.
    counted_until: Instant,
    total: Duration,
}

impl Passed {
    fn begin() -> Self {
        let now = Instant::now();
        Self { enabled: false, leased_until: now, counted_until: now, total: Duration::ZERO }
    }

    fn count(&mut self) {
        let now = Instant::now();
        let fast_until = if self.enabled { self.leased_until } else { self.counted_until };
        self.total += now.saturating_duration_since(fast_until.max(self.counted_until));
        self.counted_until = now;
    }

    fn until_now(&mut self) -> Duration {
        self.count();
        self.total
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table, whose times are noted.
struct Timed {
    table: BpfTable,
    notes: mpsc::Sender<Note>,
    passed: Arc<Mutex<Passed>>,
    starvation: Starvation,
    /// Something was written since it was last told that all is.
    is_new: bool,
}

impl Timed {
    fn new(table: BpfTable, notes: mpsc::Sender<Note>, passed: Arc<Mutex<Passed>>) -> Self {
        Self { table, notes, passed, starvation: Starvation { next: Instant::now() }, is_new: false }
    }

    /// The gateway renews the lease, and turns the fast path on, when all that it was told is written.
    fn note_written(&mut self) {
        if std::mem::take(&mut self.is_new) {
            let _ = self.notes.send(Note::Written(Instant::now()));
        }
    }
}

impl OffloadTable for Timed {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        self.starvation.strike();
        lock(&self.passed).count();
        let applied = self.table.apply(update);
        let now = Instant::now();
        if !update.is_empty() {
            let mut passed = lock(&self.passed);
            let since = passed.counted_until;
            passed.total += now - since;
            passed.counted_until = now;
        }
        self.is_new = true;
        applied
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.table.set_enabled(enabled);
        {
            let mut passed = lock(&self.passed);
            passed.count();
            passed.enabled = enabled;
        }
        if enabled {
            self.is_new = true;
            self.note_written();
        }
    }

    fn renew_lease(&mut self, until: Instant) {
        self.starvation.strike();
        self.table.renew_lease(until);
        {
            let mut passed = lock(&self.passed);
            passed.count();
            passed.leased_until = until;
        }
        self.note_written();
        self.starvation.strike();
    }

    fn capacity(&self) -> Capacity {
        self.table.capacity()
    }
}

impl Ports for Timed {
    fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        self.table.set_port(port)
    }

    fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        self.table.remove_port(ifindex, vlan);
    }

    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        self.table.port(ifindex, vlan)
    }
}

impl TableCounters for Timed {
    fn traffic(&self, slot: Slot) -> Traffic {
        self.table.traffic(slot)
    }

    fn passes(&self) -> Vec<(PassReason, u64)> {
        self.table.passes()
    }
}

impl Devices for Timed {
    fn refresh_devices(&mut self) {
        self.table.refresh_devices();
    }

    fn takes_redirects(&self, ifindex: u32) -> bool {
        self.table.takes_redirects(ifindex)
    }
}
