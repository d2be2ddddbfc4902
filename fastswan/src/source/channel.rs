//! A source that the embedder pushes: for daemons that know their policies themselves.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::{
    mpsc::{
        Permit, Receiver, Sender, channel,
        error::{TryRecvError, TrySendError},
    },
    watch,
};

use super::{PolicyEvent, PolicySource, Snapshot, SourceError};

/// The pushing end of a [`ChannelSource`]. Keep it as long as what was sent is true: when the last clone is
/// dropped, the source fails and nothing is fast any longer.
#[derive(Clone, Debug)]
pub struct PolicySender {
    events: Sender<PolicyEvent>,
    /// How many events were pushed. Locked while one is, so that they are counted in order.
    pushed: Arc<Mutex<u64>>,
    written: watch::Receiver<u64>,
}

impl PolicySender {
    /// Pushes an event, and waits while the channel is full, as it may stay if the gateway has failed. Cancel-safe: the event is
    /// then not pushed.
    ///
    /// # Errors
    ///
    /// [`PushError::Closed`] if the source is gone.
    pub async fn push(&self, event: PolicyEvent) -> Result<Pushed, PushError> {
        let place = self.events.reserve().await.map_err(|_| PushError::Closed)?;
        Ok(self.put(place, event))
    }

    /// Pushes an event if there is room.
    ///
    /// # Errors
    ///
    /// [`PushError::Full`] or [`PushError::Closed`].
    pub fn try_push(&self, event: PolicyEvent) -> Result<Pushed, PushError> {
        let place = self.events.try_reserve().map_err(|error| match error {
            TrySendError::Full(()) => PushError::Full,
            TrySendError::Closed(()) => PushError::Closed,
        })?;
        Ok(self.put(place, event))
    }

    /// [`Self::push`] for callers that do not ask when the event is in the table.
    ///
    /// # Errors
    ///
    /// Those of [`Self::push`].
    pub async fn send(&self, event: PolicyEvent) -> Result<(), PushError> {
        self.push(event).await.map(drop)
    }

    /// [`Self::try_push`] for callers that do not ask when the event is in the table.
    ///
    /// # Errors
    ///
    /// Those of [`Self::try_push`].
    pub fn try_send(&self, event: PolicyEvent) -> Result<(), PushError> {
        self.try_push(event).map(drop)
    }

    fn put(&self, place: Permit<'_, PolicyEvent>, event: PolicyEvent) -> Pushed {
        let mut pushed = self.pushed.lock().unwrap_or_else(PoisonError::into_inner);
        *pushed += 1;
        place.send(event);
        Pushed { position: *pushed, written: self.written.clone() }
    }
}

/// An event that was pushed; tells when it is in the table.
#[derive(Clone, Debug)]
pub struct Pushed {
    /// Among all that were pushed, from 1.
    position: u64,
    /// How many are in the table.
    written: watch::Receiver<u64>,
}

impl Pushed {
    /// Returns when the table holds what follows from the event: when a [`Gateway`](crate::Gateway) has written it.
    /// Packets that the program had begun to handle just before may still meet what was there. Cancel-safe; may be
    /// called more than once. A gateway that has failed writes nothing any longer: this waits until it is dropped, or the source
    /// is that it gave back ([`Gateway::into_parts`](crate::Gateway::into_parts)).
    ///
    /// # Errors
    ///
    /// [`PushError::Closed`] if the source was dropped before.
    pub async fn written(&self) -> Result<(), PushError> {
        let mut written = self.written.clone();
        let waited = written.wait_for(|written| *written >= self.position).await;
        waited.map(drop).map_err(|_| PushError::Closed)
    }
}

/// An event could not be pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The gateway does not read fast enough.
    #[error("the policy channel is full: wait with `push`, or push a snapshot later instead of this change")]
    Full,
    /// The source was dropped.
    #[error("the policy channel is closed: its source was dropped")]
    Closed,
}

/// A source of what a [`PolicySender`] pushes.
///
/// ```
/// use fastswan::policy::PolicyType;
/// use fastswan::{ChannelSource, PolicyEvent, PolicySource as _, Snapshot};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
/// # runtime.block_on(async {
/// let (sender, mut source) = ChannelSource::new(Snapshot::default(), 1024);
/// let pushed = sender.push(PolicyEvent::PoliciesFlushed(PolicyType::Main)).await?;
///
/// // What a gateway does.
/// while !source.caught_up()? {
///     source.next_event().await?;
/// }
/// source.written();
///
/// // From here on, no packet is fast by what was flushed.
/// pushed.written().await?;
/// # Ok(()) })
/// # }
/// ```
#[derive(Debug)]
pub struct ChannelSource {
    snapshot: Option<Snapshot>,
    events: Receiver<PolicyEvent>,
    /// How many events were yielded, without the snapshot that it began with.
    yielded: u64,
    written: watch::Sender<u64>,
}

impl ChannelSource {
    /// A source that begins with this snapshot, and holds up to `capacity` events (at least 1) that were
    /// not read.
    #[must_use]
    pub fn new(snapshot: Snapshot, capacity: usize) -> (PolicySender, Self) {
        let (sender, events) = channel(capacity.max(1));
        let (written, watched) = watch::channel(0);
        let sender = PolicySender { events: sender, pushed: Arc::default(), written: watched };
        (sender, Self { snapshot: Some(snapshot), events, yielded: 0, written })
    }
}

#[async_trait]
impl PolicySource for ChannelSource {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        if let Some(snapshot) = self.snapshot.take() {
            return Ok(Some(PolicyEvent::Snapshot(snapshot)));
        }
        // `recv` may be pending although there is an event, to let other tasks run; `try_recv` is not.
        let event = match self.events.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) => self.events.recv().await,
        };
        self.yielded += u64::from(event.is_some());
        event.map(Some).ok_or(SourceError::ChannelClosed)
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        // Closed first: what is sent before the last sender is dropped is seen below.
        let is_closed = self.events.is_closed();
        match self.queued() {
            0 if is_closed => Err(SourceError::ChannelClosed),
            queued => Ok(queued == 0),
        }
    }

    fn written(&mut self) {
        self.written.send_replace(self.yielded);
    }

    fn queued(&self) -> usize {
        usize::from(self.snapshot.is_some()) + self.events.len()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::{
        database::Database,
        policy::{Action, DefaultPolicy, PolicyType},
    };

    #[tokio::test]
    async fn what_is_pushed_comes_out_in_order_after_the_snapshot() {
        let (sender, mut source) = ChannelSource::new(Snapshot::default(), 2);
        for event in [PolicyEvent::PoliciesFlushed(PolicyType::Main), PolicyEvent::SasFlushed(50)] {
            sender.try_send(event).unwrap();
        }
        assert_eq!(sender.try_send(PolicyEvent::SasFlushed(0)), Err(PushError::Full));
        let mut next = async || source.next_event().await.unwrap().unwrap();
        assert_eq!(next().await, PolicyEvent::Snapshot(Snapshot::default()));
        assert_eq!(next().await, PolicyEvent::PoliciesFlushed(PolicyType::Main));
        assert_eq!(next().await, PolicyEvent::SasFlushed(50));
    }

    #[tokio::test]
    async fn a_snapshot_makes_up_for_what_a_full_channel_refused() {
        let (sender, mut source) = ChannelSource::new(Snapshot::default(), 1);
        let mut database = Database::default();
        source.next_event().await.unwrap();
        sender.try_send(PolicyEvent::SasFlushed(50)).unwrap();
        let blocks = DefaultPolicy { forward: Action::Block, ..DefaultPolicy::default() };
        assert_eq!(sender.try_send(PolicyEvent::DefaultPolicy(blocks)), Err(PushError::Full));
        let all = PolicyEvent::Snapshot(Snapshot { default_policy: blocks, ..Snapshot::default() });
        // Waits until the source has been read.
        let (sent, ()) = tokio::join!(sender.send(all), async {
            for _ in 0..2 {
                database.apply(source.next_event().await.unwrap().unwrap());
            }
        });
        sent.unwrap();
        assert!(database.is_current());
        assert_eq!(database.default_policy(), blocks);
    }

    #[tokio::test]
    async fn a_dropped_sender_ends_the_truth_of_what_it_sent() {
        let (sender, mut source) = ChannelSource::new(Snapshot::default(), 1);
        source.next_event().await.unwrap();
        drop(sender);
        assert!(matches!(source.next_event().await, Err(SourceError::ChannelClosed)));
    }

    #[tokio::test]
    async fn a_sender_is_told_when_what_it_pushed_is_in_the_table_and_not_before() {
        let (sender, mut source) = ChannelSource::new(Snapshot::default(), 4);
        source.next_event().await.unwrap();
        let first = sender.push(PolicyEvent::SasFlushed(50)).await.unwrap();
        let second = sender.try_push(PolicyEvent::SasFlushed(51)).unwrap();
        source.written();
        assert_eq!(first.written().now_or_never(), None, "it was not yielded");
        source.next_event().await.unwrap();
        assert_eq!(first.written().now_or_never(), None, "it was yielded and not written");
        source.written();
        assert_eq!(first.written().now_or_never(), Some(Ok(())));
        assert_eq!(second.written().now_or_never(), None);
        assert_eq!(first.written().now_or_never(), Some(Ok(())), "it may be asked again");
        drop(source);
        assert_eq!(second.written().await, Err(PushError::Closed), "it never will be");
    }

    #[tokio::test]
    async fn a_source_has_caught_up_when_all_that_was_pushed_is_yielded_whatever_the_runtime_does() {
        let (sender, mut source) = ChannelSource::new(Snapshot::default(), 1024);
        (0..1000).for_each(|_| sender.try_send(PolicyEvent::SasFlushed(50)).unwrap());
        let mut yielded = 0;
        // More than tokio lets a task read at once.
        while !source.caught_up().unwrap() {
            yielded += u64::from(source.next_event().now_or_never().is_some());
        }
        assert_eq!(yielded, 1001);
        drop(sender);
        assert!(matches!(source.caught_up(), Err(SourceError::ChannelClosed)));
    }

    #[tokio::test]
    async fn a_push_that_is_given_up_pushes_nothing() {
        let (sender, mut source) = ChannelSource::new(Snapshot::default(), 1);
        sender.try_send(PolicyEvent::SasFlushed(50)).unwrap();
        assert!(sender.push(PolicyEvent::SasFlushed(51)).now_or_never().is_none());
        source.next_event().await.unwrap();
        assert_eq!(source.next_event().await.unwrap(), Some(PolicyEvent::SasFlushed(50)));
        assert!(source.caught_up().unwrap());
        let pushed = sender.push(PolicyEvent::SasFlushed(52)).await.unwrap();
        source.next_event().await.unwrap();
        source.written();
        assert_eq!(pushed.written().now_or_never(), Some(Ok(())), "the one that was given up is not counted");
    }
}
