//! Sources made of other sources.

use std::mem;

use async_trait::async_trait;
use futures::{
    FutureExt as _, TryFutureExt as _,
    future::{BoxFuture, select_all, try_join_all},
};

use super::{PolicyEvent, PolicySource, Snapshot, SourceError};
use crate::{
    database::Database,
    policy::{Action, DefaultPolicy, Policy, PolicyId, SaId, SecurityAssociation},
};

/// Adapters for every source.
pub trait PolicySourceExt: PolicySource + Sized {
    /// Keeps only some policies from ever being fast: those for which `keep` is false lose their offload.
    ///
    /// They are not hidden, since they shadow other policies in the kernel whether or not they may be fast.
    fn filter<F: FnMut(&Policy) -> bool + Send>(
        self,
        mut keep: F,
    ) -> Map<Self, impl FnMut(Policy) -> Policy + Send> {
        self.map(move |policy| if keep(&policy) { policy } else { Policy { offload: None, ..policy } })
    }

    /// Changes policies, for instance how their packets leave. Their identity must stay; a change of it is
    /// [`SourceError::IdentityChanged`].
    fn map<F: FnMut(Policy) -> Policy + Send>(self, change: F) -> Map<Self, F> {
        Map { source: self, change }
    }
}

impl<S: PolicySource> PolicySourceExt for S {}

/// A source whose policies are changed on the way: see [`PolicySourceExt::map`].
#[derive(Debug)]
pub struct Map<S, F> {
    source: S,
    change: F,
}

impl<S, F: FnMut(Policy) -> Policy> Map<S, F> {
    fn changed(&mut self, policy: Policy) -> Result<Policy, SourceError> {
        let id = policy.id.clone();
        let changed = (self.change)(policy);
        if changed.id == id { Ok(changed) } else { Err(SourceError::IdentityChanged(Box::new(id))) }
    }

    fn all_changed(&mut self, mut snapshot: Snapshot) -> Result<Snapshot, SourceError> {
        let policies = mem::take(&mut snapshot.policies).into_iter();
        snapshot.policies = policies.map(|policy| self.changed(policy)).collect::<Result<_, _>>()?;
        Ok(snapshot)
    }
}

#[async_trait]
impl<S: PolicySource, F: FnMut(Policy) -> Policy + Send> PolicySource for Map<S, F> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        Ok(match self.source.next_event().await? {
            Some(PolicyEvent::Policy(policy)) => Some(PolicyEvent::Policy(self.changed(policy)?)),
            Some(PolicyEvent::Snapshot(snapshot)) => Some(PolicyEvent::Snapshot(self.all_changed(snapshot)?)),
            Some(PolicyEvent::Audit(snapshot)) => Some(PolicyEvent::Audit(self.all_changed(snapshot)?)),
            other => other,
        })
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

/// Several sources as one: see [`merge`].
pub struct Merge<'a> {
    sources: Vec<Part<'a>>,
}

struct Part<'a> {
    source: Box<dyn PolicySource + 'a>,
    database: Database,
    ended: bool,
}

/// Joins sources. Each keeps what it said apart from the others: a snapshot or a flush of one replaces or removes
/// only its own.
///
/// When two sources say different things about one policy, the first counts, without its offload: nobody
/// knows which of them the kernel has. Of two associations with one identity the first counts. The default
/// policy blocks if any source says so. The whole is stale as long as one source is, and ends when all have.
#[must_use]
pub fn merge<'a>(sources: Vec<Box<dyn PolicySource + 'a>>) -> Merge<'a> {
    let part = |source| Part { source, database: Database::default(), ended: false };
    Merge { sources: sources.into_iter().map(part).collect() }
}

impl Merge<'_> {
    fn is_current(&self) -> bool {
        self.sources.iter().all(|part| part.database.is_current())
    }

    /// What the whole says after one source has said something; `None` if that changes nothing for now.
    fn apply(&mut self, index: usize, event: PolicyEvent) -> Option<PolicyEvent> {
        enum Touched {
            Policy(PolicyId),
            Sa(SaId),
            Audited,
            Everything,
        }
        let touched = match &event {
            PolicyEvent::Stale(cause) => {
                let cause = *cause;
                self.sources[index].database.apply(event);
                return Some(PolicyEvent::Stale(cause));
            }
            PolicyEvent::Policy(Policy { id, .. }) | PolicyEvent::PolicyRemoved(id) => {
                Touched::Policy(id.clone())
            }
            PolicyEvent::Sa(SecurityAssociation { id, .. }) | PolicyEvent::SaRemoved(id) => Touched::Sa(*id),
            PolicyEvent::Audit(_) => Touched::Audited,
            _ => Touched::Everything,
        };
        self.sources[index].database.apply(event);
        // What is not said now is part of the snapshot that ends the staleness.
        self.is_current().then(|| match touched {
            Touched::Policy(id) => match self.policy(&id) {
                Some(policy) => PolicyEvent::Policy(policy),
                None => PolicyEvent::PolicyRemoved(id),
            },
            Touched::Sa(id) => match self.sa(&id) {
                Some(sa) => PolicyEvent::Sa(sa.clone()),
                None => PolicyEvent::SaRemoved(id),
            },
            // What differed in one source differs in the whole.
            Touched::Audited => PolicyEvent::Audit(self.snapshot()),
            Touched::Everything => PolicyEvent::Snapshot(self.snapshot()),
        })
    }

    fn policy(&self, id: &PolicyId) -> Option<Policy> {
        let mut said = self.sources.iter().filter_map(|part| part.database.policy(id));
        let first = said.next()?.clone();
        if said.all(|other| *other == first) { Some(first) } else { Some(Policy { offload: None, ..first }) }
    }

    fn sa(&self, id: &SaId) -> Option<&SecurityAssociation> {
        self.sources.iter().find_map(|part| part.database.sa(id))
    }

    fn snapshot(&self) -> Snapshot {
        let databases = || self.sources.iter().map(|part| &part.database);
        let mut all = Database::default();
        for policy in databases().flat_map(Database::policies) {
            if all.policy(&policy.id).is_none()
                && let Some(policy) = self.policy(&policy.id)
            {
                all.apply(PolicyEvent::Policy(policy));
            }
        }
        for sa in databases().flat_map(Database::sas) {
            if all.sa(&sa.id).is_none() {
                all.apply(PolicyEvent::Sa(sa.clone()));
            }
        }
        let default_policies: Vec<DefaultPolicy> = databases().map(Database::default_policy).collect();
        let any = |action: fn(&DefaultPolicy) -> Action| {
            let blocks = default_policies.iter().any(|policy| action(policy) == Action::Block);
            if blocks { Action::Block } else { Action::Allow }
        };
        let default_policy = DefaultPolicy {
            inbound: any(|policy| policy.inbound),
            forward: any(|policy| policy.forward),
            outbound: any(|policy| policy.outbound),
        };
        Snapshot { default_policy, ..all.snapshot() }
    }
}

#[async_trait]
impl PolicySource for Merge<'_> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        loop {
            let waiting: Vec<_> = self
                .sources
                .iter_mut()
                .enumerate()
                .filter(|(_, part)| !part.ended)
                .map(|(index, part)| Box::pin(async move { (index, part.source.next_event().await) }))
                .collect();
            if waiting.is_empty() {
                return Ok(None);
            }
            // The others lose nothing by being dropped, and are asked again.
            let ((index, event), ..) = select_all(waiting).await;
            match event? {
                None => self.sources[index].ended = true,
                Some(event) => {
                    if let Some(event) = self.apply(index, event) {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        for part in &mut self.sources {
            if !part.ended && !part.source.caught_up()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        let settled = self.sources.iter_mut().map(|part| part.source.settle());
        try_join_all(settled).map_ok(drop).boxed()
    }

    /// While one source is stale, what the others have yielded was not passed on: it is part of the snapshot to come.
    fn written(&mut self) {
        if self.is_current() {
            self.sources.iter_mut().for_each(|part| part.source.written());
        }
    }

    fn queued(&self) -> usize {
        self.sources.iter().map(|part| part.source.queued()).sum()
    }
}

impl std::fmt::Debug for Merge<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merge").field("sources", &self.sources.len()).finish()
    }
}

#[cfg(all(test, feature = "tokio"))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        policy::{Direction, OffloadDev, OffloadKind, PolicyType, Selector},
        source::{StaleCause, channel::ChannelSource},
    };

    fn policy(destination: u8, priority: u32) -> Policy {
        let destination = format!("10.2.{destination}.0/24").parse().unwrap();
        let selector = Selector::between("10.1.0.0/16".parse().unwrap(), destination).unwrap();
        let offload = Some(OffloadDev { ifindex: 7, kind: OffloadKind::Packet, inbound: false });
        Policy { priority, offload, ..Policy::new(PolicyId::new(Direction::Out, selector)) }
    }

    /// Reads all that a source has to say now.
    fn read(source: &mut impl PolicySource, database: &mut Database) {
        while let Some(event) = source.next_event().now_or_never() {
            let Some(event) = event.unwrap() else { break };
            database.apply(event);
        }
    }

    #[tokio::test]
    async fn a_filtered_policy_still_shadows() {
        let snapshot = Snapshot { policies: vec![policy(1, 1), policy(2, 2)], ..Snapshot::default() };
        let (_sender, source) = ChannelSource::new(snapshot, 1);
        let mut database = Database::default();
        read(&mut source.filter(|policy| policy.priority == 1), &mut database);
        let offloaded: Vec<_> = database.policies().map(|p| (p.priority, p.offload.is_some())).collect();
        assert_eq!(offloaded, [(1, true), (2, false)]);
    }

    #[tokio::test]
    async fn a_map_that_makes_another_policy_is_an_error() {
        let snapshot = Snapshot { policies: vec![policy(1, 1)], ..Snapshot::default() };
        let (_sender, source) = ChannelSource::new(snapshot, 1);
        let error = source.map(|_| policy(2, 1)).next_event().await.unwrap_err();
        assert!(matches!(error, SourceError::IdentityChanged(_)), "{error}");
    }

    #[tokio::test]
    async fn an_audit_compares_what_the_adapters_made_of_the_policies() {
        let one = |destination| Snapshot { policies: vec![policy(destination, 1)], ..Snapshot::default() };
        let (first_sender, first) = ChannelSource::new(one(1), 4);
        let (_second, second) = ChannelSource::new(one(2), 4);
        let first = first.map(|policy| Policy { priority: 7, ..policy });
        let mut merged = merge(vec![Box::new(first), Box::new(second)]);
        let mut database = Database::default();
        read(&mut merged, &mut database);
        let before = database.snapshot();
        first_sender.try_send(PolicyEvent::Audit(one(1))).unwrap();
        read(&mut merged, &mut database);
        assert_eq!((database.snapshot(), database.audit_repairs()), (before, 0));

        first_sender.try_send(PolicyEvent::Audit(one(3))).unwrap();
        read(&mut merged, &mut database);
        let mut policies: Vec<Policy> = database.policies().cloned().collect();
        policies.sort_by(|one, other| one.id.cmp(&other.id));
        assert_eq!((policies, database.audit_repairs()), (vec![policy(2, 1), policy(3, 7)], 2));
    }

    #[tokio::test]
    async fn a_policy_on_which_sources_disagree_is_not_offloaded() {
        let one = |priority| Snapshot { policies: vec![policy(1, priority)], ..Snapshot::default() };
        let (_a, first) = ChannelSource::new(one(1), 1);
        let (second_sender, second) = ChannelSource::new(one(2), 4);
        let mut merged = merge(vec![Box::new(first), Box::new(second)]);
        let mut database = Database::default();
        read(&mut merged, &mut database);
        assert_eq!(database.policies().map(|p| p.offload).collect::<Vec<_>>(), [None]);
        second_sender.try_send(PolicyEvent::PolicyRemoved(policy(1, 2).id)).unwrap();
        read(&mut merged, &mut database);
        assert_eq!(database.policies().cloned().collect::<Vec<_>>(), [policy(1, 1)]);
    }

    #[derive(Clone, Debug)]
    enum Said {
        Policy(u8, u32),
        Removed(u8),
        Flushed,
        Stale,
        Snapshot(Vec<(u8, u32)>),
    }

    fn said() -> impl Strategy<Value = Said> {
        prop_oneof![
            6 => (0..6u8, 0..3u32).prop_map(|(destination, priority)| Said::Policy(destination, priority)),
            3 => (0..6u8).prop_map(Said::Removed),
            1 => Just(Said::Flushed),
            1 => Just(Said::Stale),
            1 => proptest::collection::vec((0..6u8, 0..3u32), 0..4).prop_map(Said::Snapshot),
        ]
    }

    fn event(said: Said) -> PolicyEvent {
        match said {
            Said::Policy(destination, priority) => PolicyEvent::Policy(policy(destination, priority)),
            Said::Removed(destination) => PolicyEvent::PolicyRemoved(policy(destination, 0).id),
            Said::Flushed => PolicyEvent::PoliciesFlushed(PolicyType::Main),
            Said::Stale => PolicyEvent::Stale(StaleCause::Requested),
            Said::Snapshot(policies) => PolicyEvent::Snapshot(Snapshot {
                policies: policies.into_iter().map(|(d, priority)| policy(d, priority)).collect(),
                ..Snapshot::default()
            }),
        }
    }

    proptest! {
        /// While all sources are current, the merged database has each policy that some source has, offloaded
        /// only where all that have it agree; while one is not, the whole is not.
        #[test]
        fn merged_sources_are_what_their_databases_together_say(
            steps in proptest::collection::vec((0..2usize, said()), 0..24),
        ) {
            let (a, first) = ChannelSource::new(Snapshot::default(), 1);
            let (b, second) = ChannelSource::new(Snapshot::default(), 1);
            let mut merged = merge(vec![Box::new(first), Box::new(second)]);
            let mut whole = Database::default();
            let mut parts = [Database::default(), Database::default()];
            for part in &mut parts {
                part.apply(PolicyEvent::Snapshot(Snapshot::default()));
            }
            read(&mut merged, &mut whole);
            for (index, said) in steps {
                [&a, &b][index].try_send(event(said.clone())).unwrap();
                parts[index].apply(event(said));
                read(&mut merged, &mut whole);
                let current = parts.iter().all(Database::is_current);
                prop_assert_eq!(whole.is_current(), current);
                if !current {
                    continue;
                }
                for destination in 0..6 {
                    let id = policy(destination, 0).id;
                    let said: Vec<_> = parts.iter().filter_map(|part| part.policy(&id)).collect();
                    let expected = match said[..] {
                        [] => None,
                        [one] => Some(one.clone()),
                        [one, other] if one == other => Some(one.clone()),
                        [one, ..] => Some(Policy { offload: None, ..one.clone() }),
                    };
                    prop_assert_eq!(whole.policy(&id), expected.as_ref());
                }
            }
        }
    }
}
