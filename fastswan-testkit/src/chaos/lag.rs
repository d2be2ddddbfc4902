//! How long changes take from the kernel's acknowledgement to the table, and what the mirror lost track of.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use fastswan::{PolicyEvent, PolicyId, policy::SaId, source::StaleCause};

use crate::requests::Change;

/// What the mirror does, in order.
#[derive(Clone, Debug)]
pub(super) enum Note {
    /// Its source told a change.
    Told(Subject),
    /// Its source told everything, at this time.
    Snapshot(Instant),
    /// Its source lost track.
    Stale(StaleCause),
    /// Its source has asked for everything again.
    Audit,
    /// All that was told is in the table since then.
    Written(Instant),
}

/// What a change does to what.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Policy(PolicyId),
    PolicyRemoved(PolicyId),
    PoliciesFlushed,
    SaRemoved(SaId),
    SasFlushed,
    DefaultPolicy,
}

impl Subject {
    /// What an event is about, unless it is one that nobody waits for.
    pub(super) fn told(event: &PolicyEvent) -> Option<Self> {
        Some(match event {
            PolicyEvent::Policy(policy) => Self::Policy(policy.id.clone()),
            PolicyEvent::PolicyRemoved(id) => Self::PolicyRemoved(id.clone()),
            PolicyEvent::PoliciesFlushed(_) => Self::PoliciesFlushed,
            PolicyEvent::SaRemoved(id) => Self::SaRemoved(*id),
            PolicyEvent::SasFlushed(_) => Self::SasFlushed,
            PolicyEvent::DefaultPolicy(_) => Self::DefaultPolicy,
            _ => return None,
        })
    }

    /// What a change is about.
    pub(super) fn made(change: &Change) -> Option<Self> {
        Some(match change {
            Change::Add(policy) | Change::Update(policy) => Self::Policy(policy.id.clone()),
            Change::Delete { id, .. } => Self::PolicyRemoved(id.clone()),
            Change::Flush(_) => Self::PoliciesFlushed,
            Change::Default(_) => Self::DefaultPolicy,
            Change::Resynchronise => return None,
        })
    }
}

/// Joins acknowledgements with what the mirror noted.
#[derive(Debug, Default)]
pub(super) struct Lags {
    /// When the kernel acknowledged changes that are not in the table yet, as far as the notes tell.
    made: HashMap<Subject, VecDeque<Instant>>,
    /// When the kernel acknowledged those that were told and not written yet.
    told: Vec<Instant>,
    written: Option<Instant>,
    stale: Option<StaleCause>,
    found: Vec<Duration>,
    pub(super) overruns: u64,
    pub(super) audits: u64,
    /// How often everything was told, by cause.
    pub(super) resyncs: BTreeMap<&'static str, u64>,
}

impl Lags {
    /// The kernel has acknowledged a change.
    pub(super) fn acknowledged(&mut self, subject: Subject, at: Instant) {
        self.made.entry(subject).or_default().push_back(at);
    }

    /// Takes the notes up to a moment at which the mirror has caught up with all that was acknowledged.
    pub(super) fn take(&mut self, notes: impl Iterator<Item = Note>) {
        for note in notes {
            match note {
                // The kernel tells changes in the order in which it makes them, and the mirror loses none of them
                // but by losing track.
                Note::Told(subject) => {
                    self.finish();
                    self.told.extend(self.made.get_mut(&subject).and_then(VecDeque::pop_front));
                }
                Note::Snapshot(at) => {
                    self.finish();
                    let cause = self.stale.take().map_or("start", StaleCause::name);
                    *self.resyncs.entry(cause).or_default() += 1;
                    for acknowledged in self.made.values_mut() {
                        let known = acknowledged.partition_point(|acknowledged| *acknowledged <= at);
                        self.told.extend(acknowledged.drain(..known));
                    }
                }
                Note::Stale(cause) => {
                    self.finish();
                    self.overruns += u64::from(cause == StaleCause::Overrun);
                    self.stale = Some(cause);
                }
                Note::Audit => self.audits += 1,
                Note::Written(at) => self.written = Some(at),
            }
        }
        self.finish();
        self.made.clear();
    }

    /// What was told before the latest write is in the table.
    fn finish(&mut self) {
        if let Some(written) = self.written.take() {
            let told = self.told.drain(..);
            self.found.extend(told.map(|acknowledged| written.saturating_duration_since(acknowledged)));
        }
    }

    /// The lag in microseconds that so many of a thousand changes did not exceed. 0 is less than a microsecond, or that the
    /// table was written before the acknowledgement had been read.
    pub(super) fn permille(&mut self, permille: usize) -> u64 {
        self.found.sort_unstable();
        let at = (self.found.len() * permille / 1000).min(self.found.len().saturating_sub(1));
        self.found.get(at).map_or(0, |lag| u64::try_from(lag.as_micros()).unwrap_or(u64::MAX))
    }
}
