//! The assembled loop: what a source says goes through the database and the compiler into a table.
//!
//! A gateway owns no sockets and no maps of its own. Whoever wants other parts between source and table uses
//! [`Database`] and [`Compiler`] directly; this module shows how.

use std::{fmt, future::Future, pin::pin, time::Duration};

use fastswan_ebpf::PassReason;
use futures::FutureExt as _;
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    compiler::{Compiler, PolicyState},
    database::Database,
    host::HostFacts,
    policy::PolicyId,
    source::{PolicyEvent, PolicySource, SourceError},
    table::{OffloadTable, Slot, TableError, Traffic},
};

/// How long fast forwarding goes on after the last sign of life of the loop, unless set otherwise.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(1);

/// Events that are applied before the table is written again.
const BATCH: usize = 4096;

/// Keeps a table equal to what a source says.
///
/// ```no_run
/// use fastswan::{Gateway, HostFacts, NetlinkSource, XdpForwarder};
/// use fastswan::forwarder::AttachConfig;
/// use fastswan::table::{OffloadTable as _, TableConfig};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let host = HostFacts::read().await?;
/// let (mut forwarder, mut table) = XdpForwarder::load(&TableConfig::default())?;
/// for interface in ["lan0", "nic0"] {
///     let attachment = forwarder.attach(&AttachConfig::new(interface))?;
///     for port in host.ports(attachment.ifindex) {
///         table.set_port(&port)?;
///     }
/// }
/// let mut gateway = Gateway::new(NetlinkSource::open()?, table, host);
/// gateway.run_until(std::future::pending()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Gateway<S, T: OffloadTable> {
    source: S,
    source_ended: bool,
    table: T,
    host: HostFacts,
    database: Database,
    compiler: Compiler,
    lease: Duration,
}

impl<S: PolicySource, T: OffloadTable> Gateway<S, T> {
    /// Joins a source and a table, which must be empty. Nothing is fast before [`Self::run_until`] runs.
    #[must_use]
    pub fn new(source: S, table: T, host: HostFacts) -> Self {
        let compiler = Compiler::new(table.capacity());
        let database = Database::default();
        Self { source, source_ended: false, table, host, database, compiler, lease: DEFAULT_LEASE }
    }

    /// Sets how long the table stays valid without a sign of life of the loop, from 50 ms up. Shorter values
    /// count as 50 ms: the loop renews the lease four times as often.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease.max(Duration::from_millis(50));
        self
    }

    /// Follows the source until `stop` is ready. Call it again to go on; in between the lease runs.
    ///
    /// The lease is only renewed when the source has nothing more to say at the moment and all that it said
    /// is in the table. Cancel-safe: dropping the future loses nothing but the lease.
    ///
    /// # Errors
    ///
    /// [`GatewayError`]. Everything passes to the kernel from then on.
    pub async fn run_until(&mut self, stop: impl Future<Output = ()>) -> Result<(), GatewayError> {
        let mut stop = pin!(stop);
        let mut renewal = interval(self.lease / 4);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                event = self.source.next_event(), if !self.source_ended => {
                    let result = self.follow(event);
                    self.off_if_failed(result)?;
                }
                _ = renewal.tick() => if self.database.is_current() {
                    self.table.renew_lease(self.lease);
                },
            }
        }
    }

    /// Applies an event, and those that are there already, and writes what follows from them.
    fn follow(&mut self, first: Result<Option<PolicyEvent>, SourceError>) -> Result<(), GatewayError> {
        let mut event = first?;
        let mut caught_up = false;
        for applied in 1..=BATCH {
            match event {
                Some(event) => self.apply(event),
                None => self.source_ended = true,
            }
            if self.source_ended || applied == BATCH {
                caught_up = self.source_ended;
                break;
            }
            match self.source.next_event().now_or_never() {
                Some(next) => event = next?,
                None => {
                    caught_up = true;
                    break;
                }
            }
        }
        if self.database.is_current() {
            let update = self.compiler.compile(&self.database, &self.host);
            self.table.apply(&update)?;
            if caught_up {
                self.table.renew_lease(self.lease);
                self.table.set_enabled(true);
            }
        }
        Ok(())
    }

    fn apply(&mut self, event: PolicyEvent) {
        if let PolicyEvent::Stale(cause) = event {
            // At once, not when the batch is done.
            self.table.set_enabled(false);
            tracing::warn!(?cause, "the source lost track: everything passes until it knows again");
        }
        self.database.apply(event);
    }
}
