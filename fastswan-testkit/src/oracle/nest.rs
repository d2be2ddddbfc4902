//! Adapters around sources, nested at random, and lies that a merge must not believe.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use async_trait::async_trait;
use fastswan::{
    Policy, PolicyEvent, PolicyId, PolicySource, PolicySourceExt as _, SourceError,
    policy::{Egress, MacAddr, NextHop},
    source::{BoxFuture, adapters::merge},
};
use rand::{RngExt as _, rngs::StdRng};

/// How sources are adapted. The numbers choose for which policies.
#[derive(Clone, Debug)]
pub(super) enum Nest {
    Plain,
    Withhold(Box<Nest>, u64),
    WithEgress(Box<Nest>, u64),
    Merge(Vec<Nest>),
    /// Hides some policies and tells others with another priority. Only a part of a merge that has the truth as well.
    Lie(u64),
    /// **Wrong:** some policies lose their offload, which matters to others.
    Filter(u64),
}

impl Nest {
    /// Some adapters around sources that tell the truth.
    pub(super) fn random(rng: &mut StdRng, depth: u32) -> Self {
        if depth == 0 {
            return Self::Plain;
        }
        let inner = Self::random(rng, depth - 1);
        match rng.random_range(0..4) {
            0 => Self::Withhold(inner.into(), rng.random()),
            1 => Self::WithEgress(inner.into(), rng.random()),
            2 => Self::Merge(vec![inner, Self::Lie(rng.random())]),
            _ => Self::Merge(vec![Self::Plain, inner]),
        }
    }

    /// How many sources it has.
    pub(super) fn leaves(&self) -> usize {
        match self {
            Self::Plain | Self::Lie(_) | Self::Filter(_) => 1,
            Self::Withhold(nest, _) | Self::WithEgress(nest, _) => nest.leaves(),
            Self::Merge(nests) => nests.iter().map(Self::leaves).sum(),
        }
    }

    /// Puts it around sources.
    pub(super) fn build(
        &self,
        leaf: &mut impl FnMut() -> anyhow::Result<Box<dyn PolicySource>>,
    ) -> anyhow::Result<Box<dyn PolicySource>> {
        Ok(match self {
            Self::Plain => leaf()?,
            Self::Withhold(nest, salt) => {
                let salt = *salt;
                Box::new(nest.build(leaf)?.withhold(move |policy| lot(&policy.id, salt).is_multiple_of(8)))
            }
            Self::WithEgress(nest, salt) => {
                let salt = *salt;
                let next_hop = NextHop::Fixed { source: MacAddr::default(), destination: MacAddr([4; 6]) };
                Box::new(nest.build(leaf)?.with_egress(move |policy| {
                    let is_chosen = lot(&policy.id, salt).is_multiple_of(8);
                    if is_chosen { Egress { next_hop, ..policy.egress } } else { policy.egress }
                }))
            }
            Self::Merge(nests) => {
                let nests: anyhow::Result<Vec<_>> = nests.iter().map(|nest| nest.build(leaf)).collect();
                Box::new(merge(nests?))
            }
            Self::Lie(salt) => Box::new(Changed { source: leaf()?, change: lie, salt: *salt }),
            Self::Filter(salt) => Box::new(Changed { source: leaf()?, change: strip, salt: *salt }),
        })
    }
}

fn lot(id: &PolicyId, salt: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (id, salt).hash(&mut hasher);
    hasher.finish()
}

fn lie(policy: &mut Policy, salt: u64) -> bool {
    let lot = lot(&policy.id, salt) % 16;
    if lot == 0 {
        policy.priority = policy.priority.wrapping_add(1);
    }
    lot != 1
}

fn strip(policy: &mut Policy, salt: u64) -> bool {
    if lot(&policy.id, salt).is_multiple_of(4) {
        policy.offload = None;
    }
    true
}

/// A source whose policies are changed, and those left out for which that gives false.
struct Changed {
    source: Box<dyn PolicySource>,
    change: fn(&mut Policy, u64) -> bool,
    salt: u64,
}

#[async_trait]
impl PolicySource for Changed {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        loop {
            let mut event = self.source.next_event().await?;
            match &mut event {
                #[expect(clippy::collapsible_match, reason = "a guard cannot change the policy")]
                Some(PolicyEvent::Policy(policy)) => {
                    if !(self.change)(policy, self.salt) {
                        continue;
                    }
                }
                Some(PolicyEvent::Snapshot(snapshot) | PolicyEvent::Audit(snapshot)) => {
                    snapshot.policies.retain_mut(|policy| (self.change)(policy, self.salt));
                }
                _ => {}
            }
            return Ok(event);
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

    fn queued(&self) -> usize {
        self.source.queued()
    }
}
