//! Sources made of other sources.
//!
//! Adapters only take away: no packet is fast through one that would not be fast without it. So none can change what a
//! source says of the kernel, since each policy has a part in the fate of the packets of others.

mod merge;
#[cfg(all(test, feature = "tokio"))]
mod properties;

use std::fmt;

use async_trait::async_trait;

pub use self::merge::{Merge, merge};
use super::{BoxFuture, PolicyEvent, PolicySource, SourceError};
use crate::policy::{Egress, Policy};

/// Adapters for every source.
///
/// ```
/// use fastswan::policy::{Egress, NextHop};
/// use fastswan::{PolicyEvent, PolicySource as _, PolicySourceExt as _, Selector, StaticSource};
/// use fastswan::source::fixed::StaticPolicy;
///
/// # futures::executor::block_on(async {
/// let selector = Selector::between("10.99.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let tunnel = StaticPolicy::new(selector, 7, "192.0.2.1".parse()?, "192.0.2.2".parse()?);
/// let source = StaticSource::new(&[tunnel]);
///
/// // One customer's traffic stays in the kernel, and the NIC wants frames with the header of the next router.
/// let customer: ipnet::IpNet = "10.99.0.0/16".parse()?;
/// let mut source = source
///     .withhold(move |policy| policy.id.selector.source == customer)
///     .with_egress(|policy| Egress { next_hop: NextHop::Neighbour, ..policy.egress });
///
/// let Some(PolicyEvent::Snapshot(snapshot)) = source.next_event().await? else { panic!("first comes a snapshot") };
/// assert!(snapshot.policies[0].withheld);
/// assert_eq!(snapshot.policies[0].egress.next_hop, NextHop::Neighbour);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
pub trait PolicySourceExt: PolicySource + Sized {
    /// Keeps policies from being fast for which `is_withheld` is true; packets that the kernel would choose one for
    /// pass ([`PassReason::Held`](crate::PassReason::Held)). Nothing else changes: they shadow others as before.
    fn withhold<F: FnMut(&Policy) -> bool + Send>(self, is_withheld: F) -> Withhold<Self, F> {
        Withhold { source: self, is_withheld }
    }

    /// Says how the packets of each policy leave, which the kernel does not tell. Of two limits of the length, the
    /// source's and this one, the lower counts.
    fn with_egress<F: FnMut(&Policy) -> Egress + Send>(self, egress: F) -> WithEgress<Self, F> {
        WithEgress { source: self, egress }
    }
}

impl<S: PolicySource> PolicySourceExt for S {}

/// A source some of whose policies are kept from being fast: see [`PolicySourceExt::withhold`].
pub struct Withhold<S, F> {
    source: S,
    is_withheld: F,
}

/// A source that says how packets leave: see [`PolicySourceExt::with_egress`].
pub struct WithEgress<S, F> {
    source: S,
    egress: F,
}

/// Goes through all policies that an event tells of.
fn for_each_policy(event: &mut PolicyEvent, mut annotate: impl FnMut(&mut Policy)) {
    match event {
        PolicyEvent::Policy(policy) => annotate(policy),
        PolicyEvent::Snapshot(snapshot) | PolicyEvent::Audit(snapshot) => {
            snapshot.policies.iter_mut().for_each(annotate);
        }
        _ => {}
    }
}

#[async_trait]
impl<S: PolicySource, F: FnMut(&Policy) -> bool + Send> PolicySource for Withhold<S, F> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        let mut event = self.source.next_event().await?;
        if let Some(event) = &mut event {
            // What was withheld before stays so.
            for_each_policy(event, |policy| policy.withheld = policy.withheld || (self.is_withheld)(policy));
        }
        Ok(event)
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

    fn queued(&self) -> usize {
        self.source.queued()
    }
}

#[async_trait]
impl<S: PolicySource, F: FnMut(&Policy) -> Egress + Send> PolicySource for WithEgress<S, F> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        let mut event = self.source.next_event().await?;
        if let Some(event) = &mut event {
            for_each_policy(event, |policy| {
                let Egress { next_hop, max_length } = (self.egress)(policy);
                let lengths = [policy.egress.max_length, max_length];
                policy.egress = Egress { next_hop, max_length: lengths.into_iter().flatten().min() };
            });
        }
        Ok(event)
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

    fn queued(&self) -> usize {
        self.source.queued()
    }
}

impl<S: fmt::Debug, F> fmt::Debug for Withhold<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Withhold").field("source", &self.source).finish_non_exhaustive()
    }
}

impl<S: fmt::Debug, F> fmt::Debug for WithEgress<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WithEgress").field("source", &self.source).finish_non_exhaustive()
    }
}
