//! The mirror under test, on a thread of its own: the kernel as its source, the XDP program's table, the loop that
//! joins them, and the host's facts as they change. What passes between the parts is noted.

use std::{
    net::IpAddr,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use fastswan::{
    BpfTable, Database, Gateway, HostEvent, HostFacts, HostSource as _, NetlinkHost, NetlinkSource,
    OffloadTable, PassReason, PolicyEvent, PolicySource, Snapshot, SourceError,
    policy::OffloadDev,
    source::{BoxFuture, NetlinkConfig},
    table::{Capacity, Fact, Port, Side, Slot, Standing, TableError, TableUpdate, Traffic, Verdict},
};
use tokio::sync::{mpsc::UnboundedReceiver, oneshot};

use super::{
    host::Host,
    lag::{Note, Subject},
    offload::pretend,
};

/// A sixteenth of the default, so that it overruns: room for less than a thousand notifications.
const RECEIVE_BUFFER: usize = 512 << 10;
/// Soon after the mirror has read everything, which it does all the time.
const AUDIT: Duration = Duration::from_millis(50);
/// The shortest that a gateway takes.
pub(super) const LEASE: Duration = Duration::from_millis(50);

/// Asks what the database holds; `None` if it is not what the kernel has.
pub(super) type Question = oneshot::Sender<Option<Snapshot>>;

/// What became of a mirror.
pub(super) struct Life {
    /// For how long everything passed.
    pub(super) passed: Duration,
    pub(super) audit_repairs: u64,
}

/// Runs until nobody can ask any longer. Takes a thread that is on the host. Drops one of so many removals, if told to.
pub(super) fn run(
    table: BpfTable,
    host: &Host,
    questions: UnboundedReceiver<Question>,
    notes: &mpsc::Sender<Note>,
    drops: Option<u64>,
) -> anyhow::Result<Life> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(follow(table, host, questions, notes, drops))
}

async fn follow(
    table: BpfTable,
    host: &Host,
    mut questions: UnboundedReceiver<Question>,
    notes: &mpsc::Sender<Note>,
    drops: Option<u64>,
) -> anyhow::Result<Life> {
    let mut watch = NetlinkHost::open()?;
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
        drops,
        removals: 0,
    };
    let table = Timed::new(table, notes.clone());
    let mut gateway = Gateway::new(source, table, &HostFacts::default()).with_lease(LEASE);
    loop {
        let (mut question, mut change) = (None, None);
        let interrupted = async {
            tokio::select! {
                asked = questions.recv() => question = Some(asked),
                event = watch.next_event() => change = Some(event),
            }
        };
        gateway.run_until(interrupted).await?;
        match change.transpose()?.flatten() {
            Some(HostEvent::Snapshot(facts)) => gateway.set_host(&facts)?,
            Some(_) => gateway.forget_host(),
            None => {}
        }
        match question {
            Some(Some(question)) => {
                let database = gateway.database();
                // Whoever does not wait for the answer does not need it.
                let _ = question.send(database.is_current().then(|| database.snapshot()));
            }
            Some(None) => {
                let audit_repairs = gateway.database().audit_repairs();
                return Ok(Life { passed: gateway.table_mut().passed(), audit_repairs });
            }
            None => {}
        }
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

/// Takes the processor away from the mirror from time to time, as other processes do, where it hurts most: when it
/// knows that it has caught up and the table does not say so yet, and when it has just said so.
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

/// The table, and for how long everything passed: while the kill switch was on, the lease was out, or something was
/// being written.
struct Timed {
    table: BpfTable,
    notes: mpsc::Sender<Note>,
    enabled: bool,
    leased_until: Instant,
    /// Everything before is in `passed`.
    counted_until: Instant,
    passed: Duration,
    starvation: Starvation,
}

impl Timed {
    fn new(table: BpfTable, notes: mpsc::Sender<Note>) -> Self {
        let now = Instant::now();
        Self {
            table,
            notes,
            enabled: false,
            leased_until: now,
            counted_until: now,
            passed: Duration::ZERO,
            starvation: Starvation { next: now },
        }
    }

    fn count(&mut self) {
        let now = Instant::now();
        let fast_until = if self.enabled { self.leased_until } else { self.counted_until };
        self.passed += now.saturating_duration_since(fast_until.max(self.counted_until));
        self.counted_until = now;
    }

    fn passed(&mut self) -> Duration {
        self.count();
        self.passed
    }
}

impl OffloadTable for Timed {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        self.starvation.strike();
        self.count();
        let applied = self.table.apply(update);
        let now = Instant::now();
        if !update.is_empty() {
            self.passed += now - self.counted_until;
            self.counted_until = now;
        }
        applied
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.table.set_enabled(enabled);
        self.count();
        self.enabled = enabled;
        if enabled {
            // The gateway does so when all that it was told is written.
            let _ = self.notes.send(Note::Written(self.counted_until));
        }
    }

    fn renew_lease(&mut self, lease: Duration) {
        self.table.renew_lease(lease);
        self.count();
        self.leased_until = self.counted_until + lease;
        self.starvation.strike();
    }

    fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        self.table.set_port(port)
    }

    fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        self.table.remove_port(ifindex, vlan);
    }

    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        self.table.port(ifindex, vlan)
    }

    fn capacity(&self) -> Capacity {
        self.table.capacity()
    }

    fn verdict(&self, source: IpAddr, destination: IpAddr) -> Option<Verdict> {
        self.table.verdict(source, destination)
    }

    fn fact(&self, side: Side, address: IpAddr) -> Option<Fact> {
        self.table.fact(side, address)
    }

    fn is_guarded(&self, source: IpAddr) -> bool {
        self.table.is_guarded(source)
    }

    fn is_exception(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        ports: Option<(u16, u16)>,
    ) -> bool {
        self.table.is_exception(source, destination, protocol, ports)
    }

    fn standing(&self, slot: Slot) -> Option<Standing> {
        self.table.standing(slot)
    }

    fn traffic(&self, slot: Slot) -> Traffic {
        self.table.traffic(slot)
    }

    fn passes(&self) -> Vec<(PassReason, u64)> {
        self.table.passes()
    }
}
