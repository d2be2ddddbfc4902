//! Where policies come from.
//!
//! A [`PolicySource`] tells a [`Gateway`](crate::Gateway) or an embedder what the kernel has: first a
//! [`PolicyEvent::Snapshot`] of everything, then single changes. `NetlinkSource` asks the running kernel,
//! `StaticSource` holds what the embedder or a file says, `ChannelSource` is pushed by the embedder.

use std::io;

use async_trait::async_trait;
use futures::{FutureExt as _, Stream, future::ready, stream};

pub mod adapters;
#[cfg(feature = "tokio")]
pub mod channel;
pub mod fixed;
mod host;
#[cfg(feature = "netlink")]
mod netlink;
#[cfg(feature = "netlink")]
mod netlink_host;

pub use self::host::{HostSource, VouchedHost};
#[cfg(feature = "netlink")]
pub use self::{
    netlink::{NetlinkConfig, NetlinkSource, NetlinkStatistics},
    netlink_host::NetlinkHost,
};

/// What [`PolicySource::settle`] returns.
pub use futures::future::BoxFuture;

pub use crate::event::{PolicyEvent, PolicyOrder, Snapshot, StaleCause};

/// A source of policies.
///
/// First comes a [`PolicyEvent::Snapshot`], then each change; another snapshot may come at any time. The trait is
/// dyn-safe: `Box<dyn PolicySource>` is a source too. [`into_stream`] makes a [`futures::Stream`] of any source.
///
/// A source that wraps others passes all five methods on to them.
///
/// # A source of your own
///
/// Events that come over a channel need no trick: the channel says whether there are any left. A future that is
/// pending does not, since a runtime may make it wait to let other tasks run.
///
/// ```
/// use fastswan::{PolicyEvent, PolicySource, SourceError};
/// use tokio::sync::mpsc::Receiver;
///
/// struct Daemon {
///     /// A snapshot first, then changes.
///     events: Receiver<PolicyEvent>,
/// }
///
/// #[async_trait::async_trait]
/// impl PolicySource for Daemon {
///     async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
///         // When the daemon is gone, what it said is true no longer.
///         self.events.recv().await.map(Some).ok_or(SourceError::ChannelClosed)
///     }
///
///     fn caught_up(&mut self) -> Result<bool, SourceError> {
///         Ok(self.events.is_empty() && !self.events.is_closed())
///     }
/// }
/// ```
#[async_trait]
pub trait PolicySource: Send {
    /// Waits for the next event. Cancel-safe: dropping the future loses nothing.
    ///
    /// `Ok(None)` means that the source has nothing more to say and that what it said stays true. A pending future
    /// means nothing: a runtime may have made it wait although there is an event. Ask [`Self::caught_up`].
    ///
    /// # Errors
    ///
    /// [`SourceError`]: the source cannot go on, and nothing that it said may be relied on any longer.
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError>;

    /// Whether [`Self::next_event`] has yielded all that there was to tell at the moment of the call. Packets are
    /// fast only as long as a source says so again and again.
    ///
    /// It looks and does not wait; to find out, it may read what is there into a queue of its own. When in doubt,
    /// the answer is false.
    ///
    /// # Errors
    ///
    /// [`SourceError`], as above.
    fn caught_up(&mut self) -> Result<bool, SourceError>;

    /// A future that completes when all that the kernel had begun to remove at the call is to be read: once
    /// [`Self::caught_up`] is true after that, [`Self::next_event`] has yielded it. For a guard, after which the fast
    /// path is open again. The future does not borrow the source, and must not block the thread that polls it.
    ///
    /// # Errors
    ///
    /// The future's [`SourceError`], as above.
    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        ready(Ok(())).boxed()
    }

    /// Tells the source that everything that it has yielded so far is in the table.
    fn written(&mut self) {}

    /// How many events it holds that were not read yet, as far as it knows; for metrics.
    fn queued(&self) -> usize {
        0
    }
}

#[async_trait]
impl<S: PolicySource + ?Sized> PolicySource for Box<S> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        (**self).next_event().await
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        (**self).caught_up()
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        (**self).settle()
    }

    fn written(&mut self) {
        (**self).written();
    }

    fn queued(&self) -> usize {
        (**self).queued()
    }
}

/// A source as a [`futures::Stream`] that ends when the source does, or after its first error.
pub fn into_stream<S: PolicySource>(source: S) -> impl Stream<Item = Result<PolicyEvent, SourceError>> {
    stream::unfold(Some(source), |source| async move {
        let mut source = source?;
        match source.next_event().await {
            Ok(Some(event)) => Some((Ok(event), Some(source))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// A source cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// A system call failed.
    #[error("{attempt} failed: {error}{remedy}")]
    System {
        /// What was tried, on which object.
        attempt: String,
        /// Why it failed. It is in the text, and so not the source of this error: it is printed once.
        error: io::Error,
        /// What to do, starting with "; ", or empty.
        remedy: &'static str,
    },
    /// The sender of a channel source is gone, and with it the truth of what it said.
    #[error("the sender of the policy channel was dropped: keep it as long as its policies are valid")]
    ChannelClosed,
}
