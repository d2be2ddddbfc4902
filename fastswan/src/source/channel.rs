//! A source that the embedder pushes: for daemons that know their policies themselves.

use async_trait::async_trait;
use tokio::sync::mpsc::{
    Receiver, Sender, channel,
    error::{TryRecvError, TrySendError},
};

use super::{PolicyEvent, PolicySource, Snapshot, SourceError};

/// The pushing end of a [`ChannelSource`]. Keep it as long as what was sent is true: when the last clone is
/// dropped, the source fails and nothing is fast any longer.
#[derive(Clone, Debug)]
pub struct PolicySender(Sender<PolicyEvent>);

impl PolicySender {
    /// Sends an event, and waits while the channel is full. Cancel-safe: the event is then not sent.
    ///
    /// # Errors
    ///
    /// [`PushError::Closed`] if the source is gone.
    pub async fn send(&self, event: PolicyEvent) -> Result<(), PushError> {
        self.0.send(event).await.map_err(|_| PushError::Closed)
    }

    /// Sends an event if there is room.
    ///
    /// # Errors
    ///
    /// [`PushError::Full`] or [`PushError::Closed`].
    pub fn try_send(&self, event: PolicyEvent) -> Result<(), PushError> {
        self.0.try_send(event).map_err(|error| match error {
            TrySendError::Full(_) => PushError::Full,
            TrySendError::Closed(_) => PushError::Closed,
        })
    }
}

/// An event could not be pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The gateway does not read fast enough.
    #[error("the policy channel is full: wait with `send`, or push a snapshot later instead of this change")]
    Full,
    /// The source was dropped.
    #[error("the policy channel is closed: its source was dropped")]
    Closed,
}

/// A source of what a [`PolicySender`] pushes.
#[derive(Debug)]
pub struct ChannelSource {
    snapshot: Option<Snapshot>,
    events: Receiver<PolicyEvent>,
}

impl ChannelSource {
    /// A source that begins with this snapshot, and holds up to `capacity` events (at least 1) that nobody has
    /// read yet.
    #[must_use]
    pub fn new(snapshot: Snapshot, capacity: usize) -> (PolicySender, Self) {
        let (sender, events) = channel(capacity.max(1));
        (PolicySender(sender), Self { snapshot: Some(snapshot), events })
    }
}

#[async_trait]
impl PolicySource for ChannelSource {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        if let Some(snapshot) = self.snapshot.take() {
            return Ok(Some(PolicyEvent::Snapshot(snapshot)));
        }
        // `recv` may be pending although there is an event, to let other tasks run; `try_recv` is not.
        match self.events.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(TryRecvError::Disconnected) => Err(SourceError::ChannelClosed),
            Err(TryRecvError::Empty) => self.events.recv().await.map(Some).ok_or(SourceError::ChannelClosed),
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        // Closed first: what is sent before the last sender is dropped is seen below.
        let is_closed = self.events.is_closed();
        match self.queued() {
            0 if is_closed => Err(SourceError::ChannelClosed),
            queued => Ok(queued == 0),
        }
    }

    fn queued(&self) -> usize {
        usize::from(self.snapshot.is_some()) + self.events.len()
    }
}

#[cfg(test)]
mod tests {
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
}
