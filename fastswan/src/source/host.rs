//! Where facts about the host come from.

use std::net::IpAddr;

use async_trait::async_trait;

use crate::host::{HostError, HostEvent, HostFacts, Link};

/// A source of facts about the host: links, routes, rules, neighbours and sysctls.
///
/// The trait is dyn-safe: `Box<dyn HostSource>` is a source too.
#[async_trait]
pub trait HostSource: Send {
    /// Waits for the next event: first a [`HostEvent::Snapshot`], then [`HostEvent::Changes`]; at any time
    /// [`HostEvent::Stale`], if the source has lost track, and another snapshot.
    ///
    /// `Ok(None)` means that the source has nothing more to say and that what it said stays true. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    ///
    /// [`HostError`]: the source cannot go on, and nothing that it said may be relied on any longer.
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError>;

    /// Whether all that there was to tell at the moment of the call has been yielded. Looks, does not wait. A future
    /// that is pending does not say so: the runtime may have had other reasons not to ask.
    ///
    /// # Errors
    ///
    /// [`HostError`], as above.
    fn caught_up(&mut self) -> Result<bool, HostError>;

    /// Asks for everything again: the kernel has contradicted what the source said. [`Self::next_event`] then yields a
    /// [`HostEvent::Snapshot`] that was read after this call, and may yield a [`HostEvent::Stale`] before it. Until that
    /// snapshot nothing is fast; a source that cannot be asked, as by default, ends all fast forwarding until it tells one of
    /// itself.
    fn resync(&mut self) {}

    /// Has the host find these neighbours, or hear from them again, each by its device's interface index and its address, as it
    /// would if it had a packet for them. It is a request: it must not block, and what becomes of it is told as any
    /// [change](crate::host::HostChange::Neighbour). A source that cannot do that, as by default, leaves it to packets that
    /// are not fast.
    fn solicit(&mut self, neighbours: &[(u32, IpAddr)]) {
        let _ = neighbours;
    }

    /// How many of these requests have failed.
    fn failed_solicitations(&self) -> u64 {
        0
    }
}

#[async_trait]
impl<S: HostSource + ?Sized> HostSource for Box<S> {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        (**self).next_event().await
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        (**self).caught_up()
    }

    fn resync(&mut self) {
        (**self).resync();
    }

    fn solicit(&mut self, neighbours: &[(u32, IpAddr)]) {
        (**self).solicit(neighbours);
    }

    fn failed_solicitations(&self) -> u64 {
        (**self).failed_solicitations()
    }
}

/// Facts that the embedder answers for itself; see [`HostFacts::vouched`]. They never change.
///
/// ```
/// use fastswan::{HostEvent, HostSource as _, VouchedHost};
///
/// # futures::executor::block_on(async {
/// let mut host = VouchedHost::new();
/// let Some(HostEvent::Snapshot(facts)) = host.next_event().await? else { panic!() };
/// assert!(facts.vouched && host.caught_up()?);
/// # Ok::<_, fastswan::host::HostError>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct VouchedHost {
    /// Until they have been yielded.
    facts: Option<HostFacts>,
}

impl Default for VouchedHost {
    fn default() -> Self {
        Self::new()
    }
}

impl VouchedHost {
    /// Knows no links: each is taken to be up, but no port is known, and its policies need
    /// [`Egress::max_length`](crate::policy::Egress::max_length).
    #[must_use]
    pub fn new() -> Self {
        Self::with_links(Vec::new())
    }

    /// Knows these links: the ports on them, and how long the packets may be that leave by them.
    #[must_use]
    pub fn with_links(links: Vec<Link>) -> Self {
        Self { facts: Some(HostFacts { links, ..HostFacts::vouched() }) }
    }
}

#[async_trait]
impl HostSource for VouchedHost {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        Ok(self.facts.take().map(HostEvent::Snapshot))
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        Ok(self.facts.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn vouched_facts_are_told_once_and_stay_true() {
        let link = Link { ifindex: 7, name: "nic0".to_owned(), up: true, mtu: 1500, ..Link::default() };
        let mut host: Box<dyn HostSource> = Box::new(VouchedHost::with_links(vec![link.clone()]));
        assert!(!host.caught_up().unwrap(), "a snapshot is to come");
        let expected = HostFacts { links: vec![link], ..HostFacts::vouched() };
        assert_eq!(host.next_event().await.unwrap(), Some(HostEvent::Snapshot(expected)));
        assert!(host.caught_up().unwrap());
        assert_eq!(host.next_event().await.unwrap(), None);
    }
}
