//! Asks for everything again while changes are followed, to find what was never told.
//!
//! An [`Audit`] dumps on sockets of its own and replays what was notified meanwhile: its snapshot is what the
//! database must hold once it has applied every event before it.

use std::{future::pending, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::anchor::Anchor;
use super::dump::{Dump, DumpConfig, DumpError, Dumped};
use crate::{database::Database, event::PolicyEvent};

/// More changes during one dump are not kept: the next audit may meet fewer.
const MOST_TOLD: usize = 1 << 16;

/// The kernel tells of what has expired just after it is gone, and nothing makes it wait for the one who asks. All
/// other changes are told before the last part of a dump is answered, since one lock (`xfrm_cfg_mutex`) covers a
/// request and its notification.
const SETTLING: Duration = Duration::from_millis(100);

/// Compares now and then; see the module.
#[derive(Debug)]
pub(crate) struct Audit {
    /// From the end of one to the beginning of the next; `None` is never.
    period: Option<Duration>,
    stage: Stage,
    /// What was notified since the dump began.
    told: Vec<PolicyEvent>,
}

#[derive(Debug)]
enum Stage {
    /// It begins then.
    Waiting(Option<Instant>),
    /// A dump is being read.
    Dumping(Dump),
    /// Until then notifications may come of what the dump has seen.
    Settling(Dumped, Instant),
}

impl Audit {
    /// The first one is due a period from now.
    pub(crate) fn new(period: Option<Duration>) -> Self {
        let mut audit = Self { period, stage: Stage::Waiting(None), told: Vec::new() };
        audit.restart();
        audit
    }

    /// Forgets what was found so far, and waits for a period.
    pub(crate) fn restart(&mut self) {
        self.told = Vec::new();
        self.stage = Stage::Waiting(self.period.and_then(|period| Instant::now().checked_add(period)));
    }

    /// Whether it has begun and not ended.
    pub(crate) fn is_running(&self) -> bool {
        !matches!(self.stage, Stage::Waiting(_))
    }

    /// Takes note of what was notified. False if it is too much.
    pub(crate) fn note(&mut self, event: &PolicyEvent) -> bool {
        if !self.is_running() {
            return true;
        }
        self.told.push(event.clone());
        self.told.len() <= MOST_TOLD
    }

    /// Waits for the next step and takes it. What it has found when it is done; the devices are those of the dump. Call it
    /// only while no notification is unread. Cancel-safe.
    pub(crate) async fn advance(
        &mut self,
        anchor: &Anchor,
        config: DumpConfig,
    ) -> Result<Option<Dumped>, DumpError> {
        match &mut self.stage {
            Stage::Waiting(None) => pending().await,
            Stage::Waiting(Some(until)) => {
                sleep_until(*until).await;
                self.stage = Stage::Dumping(Dump::start(anchor, config));
            }
            Stage::Dumping(dump) => {
                let dumped = dump.finish().await?;
                self.stage = Stage::Settling(dumped, Instant::now() + SETTLING);
            }
            Stage::Settling(dumped, until) => {
                sleep_until(*until).await;
                let Dumped { snapshot, devices } = std::mem::take(dumped);
                if self.told.is_empty() {
                    return Ok(Some(Dumped { snapshot, devices }));
                }
                let mut database = Database::default();
                database.apply(PolicyEvent::Snapshot(snapshot));
                self.told.drain(..).for_each(|event| database.apply(event));
                return Ok(Some(Dumped { snapshot: database.into_snapshot(), devices }));
            }
        }
        Ok(None)
    }
}
