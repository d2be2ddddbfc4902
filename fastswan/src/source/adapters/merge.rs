//! Several sources as one.

use std::{collections::VecDeque, fmt};

use async_trait::async_trait;
use futures::{
    FutureExt as _, TryFutureExt as _,
    future::{select_all, try_join_all},
};

use crate::{
    database::Database,
    event::{PolicyEvent, PolicyOrder, Snapshot},
    policy::{Action, DefaultPolicy, Origin, Policy, PolicyId, SaId, SecurityAssociation},
    source::{BoxFuture, PolicySource, SourceError},
};

/// Several sources as one: see [`merge`].
pub struct Merge<'a> {
    sources: Vec<Part<'a>>,
    /// What one event has led to and was not yielded yet.
    ready: VecDeque<PolicyEvent>,
    origins: u32,
}

struct Part<'a> {
    source: Box<dyn PolicySource + 'a>,
    /// What it said, with origins that no other part has.
    database: Database,
    /// Its own names of origins, and those in the database.
    origins: Vec<(Origin, Origin)>,
    ended: bool,
}

/// Joins sources. Each keeps what it said apart from the others: a snapshot or a flush of one replaces or removes
/// only its own, and its associations serve its own policies only.
///
/// When two sources say different things about one policy, packets that it matches pass
/// ([`disputed`](Policy::disputed)): which of them the kernel has is not known. One association of which they say
/// different things serves none. The default policy blocks if any source says so. Priority alone decides if that is so in
/// each source ([`PolicyOrder`]). A change of a policy that several sources tell of costs a snapshot, since the order in the
/// kernel is not known then. The whole is stale as long as one source is, and ends when all have.
///
/// ```
/// use fastswan::source::{adapters::merge, fixed::StaticPolicy};
/// use fastswan::{PolicyEvent, PolicySource as _, Selector, StaticSource};
///
/// # futures::executor::block_on(async {
/// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let one = StaticPolicy::new(selector, 7, "192.0.2.1".parse()?, "192.0.2.2".parse()?);
/// let other = one.clone().priority(100);
/// let (first, second) = (StaticSource::new(&[one]), StaticSource::new(&[other]));
///
/// let mut merged = merge(vec![Box::new(first), Box::new(second)]);
/// let Some(PolicyEvent::Snapshot(snapshot)) = merged.next_event().await? else { panic!("first comes a snapshot") };
/// assert!(snapshot.policies[0].disputed);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
#[must_use]
pub fn merge<'a>(sources: Vec<Box<dyn PolicySource + 'a>>) -> Merge<'a> {
    let part = |source| Part { source, database: Database::default(), origins: Vec::new(), ended: false };
    Merge { sources: sources.into_iter().map(part).collect(), ready: VecDeque::new(), origins: 0 }
}

/// What an event is about.
enum Touched {
    Policy(PolicyId),
    Sa(SaId),
    DefaultPolicy,
    Audited,
    Everything,
}

impl Merge<'_> {
    fn is_current(&self) -> bool {
        self.sources.iter().all(|part| part.database.is_current())
    }

    /// Takes up what one source has said, and what the whole says then.
    fn apply(&mut self, index: usize, mut event: PolicyEvent) {
        self.rename(index, &mut event);
        let touched = match &event {
            PolicyEvent::Stale(_) => {
                self.ready.push_back(event.clone());
                self.sources[index].database.apply(event);
                return;
            }
            PolicyEvent::Policy(Policy { id, .. }) | PolicyEvent::PolicyRemoved(id) => {
                Touched::Policy(id.clone())
            }
            PolicyEvent::Sa(SecurityAssociation { id, .. }) | PolicyEvent::SaRemoved(id) => Touched::Sa(*id),
            PolicyEvent::DefaultPolicy(_) => Touched::DefaultPolicy,
            PolicyEvent::Audit(_) => Touched::Audited,
            _ => Touched::Everything,
        };
        let repairs = self.sources[index].database.audit_repairs();
        self.sources[index].database.apply(event);
        // What is not said now is part of the snapshot that ends the staleness.
        if !self.is_current() {
            return;
        }
        match touched {
            // Which telling came last in the kernel is not known, and only a snapshot claims nothing about that.
            Touched::Policy(id) if self.others_have(index, &id) => {
                self.ready.push_back(PolicyEvent::Snapshot(self.snapshot()));
            }
            Touched::Policy(id) => self.ready.push_back(match self.policy(&id) {
                Some(policy) => PolicyEvent::Policy(policy),
                None => PolicyEvent::PolicyRemoved(id),
            }),
            Touched::Sa(id) => {
                if self.sources[index].database.sa(&id).is_none() {
                    self.ready.push_back(PolicyEvent::SaRemoved(id));
                }
                let told: Vec<_> = self.versions(id).map(|sa| PolicyEvent::Sa(self.told(sa))).collect();
                self.ready.extend(told);
            }
            Touched::DefaultPolicy => {
                self.ready.push_back(PolicyEvent::DefaultPolicy(self.default_policy()));
            }
            Touched::Audited => {
                let snapshot = self.snapshot();
                // What differed in one source need not differ in the whole, but its order is not known any longer.
                let is_repaired = self.sources[index].database.audit_repairs() != repairs;
                let after = is_repaired.then(|| PolicyEvent::Snapshot(snapshot.clone()));
                self.ready.push_back(PolicyEvent::Audit(snapshot));
                self.ready.extend(after);
            }
            Touched::Everything => self.ready.push_back(PolicyEvent::Snapshot(self.snapshot())),
        }
    }

    /// Gives what a source tells of origins that no other source has.
    fn rename(&mut self, index: usize, event: &mut PolicyEvent) {
        let (part, origins) = (&mut self.sources[index], &mut self.origins);
        let mut rename = |origin: &mut Origin| {
            let known = part.origins.iter().find(|(own, _)| own == origin).map(|(_, here)| *here);
            let here = known.unwrap_or_else(|| {
                *origins += 1;
                part.origins.push((*origin, Origin(*origins)));
                Origin(*origins)
            });
            *origin = here;
        };
        match event {
            PolicyEvent::Policy(policy) => rename(&mut policy.origin),
            PolicyEvent::Sa(sa) => rename(&mut sa.id.origin),
            PolicyEvent::SaRemoved(id) => rename(&mut id.origin),
            PolicyEvent::Snapshot(snapshot) | PolicyEvent::Audit(snapshot) => {
                snapshot.policies.iter_mut().for_each(|policy| rename(&mut policy.origin));
                snapshot.sas.iter_mut().for_each(|sa| rename(&mut sa.id.origin));
            }
            _ => {}
        }
    }

    fn others_have(&self, index: usize, id: &PolicyId) -> bool {
        let others = self.sources.iter().enumerate().filter(|(other, _)| *other != index);
        others.map(|(_, part)| &part.database).any(|database| database.policy(id).is_some())
    }

    /// A policy as the whole says it.
    fn policy(&self, id: &PolicyId) -> Option<Policy> {
        let mut said = self.sources.iter().filter_map(|part| part.database.policy(id));
        let first = said.next()?;
        let mut policy = first.clone();
        for other in said {
            policy.disputed |= Policy { origin: first.origin, ..other.clone() } != *first;
            // To the order of the others, the highest number counts that it may have as an offloaded one.
            if other.is_packet_offloaded()
                && (!policy.is_packet_offloaded() || other.priority > policy.priority)
            {
                (policy.priority, policy.offload) = (other.priority, other.offload);
            }
        }
        Some(policy)
    }

    /// What the sources say of the association that has this identity but for its origin.
    fn versions(&self, id: SaId) -> impl Iterator<Item = &SecurityAssociation> {
        self.sources.iter().flat_map(move |part| {
            let ids = part.origins.iter().map(move |(_, origin)| SaId { origin: *origin, ..id });
            ids.filter_map(|id| part.database.sa(&id))
        })
    }

    /// An association as the whole says it: where the sources disagree, one of software, which serves no policy and
    /// hides those that have its addresses and reqid.
    fn told(&self, sa: &SecurityAssociation) -> SecurityAssociation {
        let is_same = |other: &SecurityAssociation| SecurityAssociation { id: sa.id, ..other.clone() } == *sa;
        let is_agreed = self.versions(sa.id).all(is_same);
        SecurityAssociation { offload: sa.offload.filter(|_| is_agreed), ..sa.clone() }
    }

    fn default_policy(&self) -> DefaultPolicy {
        let any = |action: fn(&DefaultPolicy) -> Action| {
            let mut said = self.sources.iter().map(|part| part.database.default_policy());
            if said.any(|policy| action(&policy) == Action::Block) { Action::Block } else { Action::Allow }
        };
        DefaultPolicy {
            inbound: any(|policy| policy.inbound),
            forward: any(|policy| policy.forward),
            outbound: any(|policy| policy.outbound),
        }
    }

    fn snapshot(&self) -> Snapshot {
        let mut policies = Vec::new();
        for (index, part) in self.sources.iter().enumerate() {
            let is_first = |id: &PolicyId| {
                self.sources[..index].iter().all(|earlier| earlier.database.policy(id).is_none())
            };
            let ids = part.database.policies().map(|policy| &policy.id).filter(|id| is_first(id));
            policies.extend(ids.filter_map(|id| self.policy(id)));
        }
        let sas = self.sources.iter().flat_map(|part| part.database.sas()).map(|sa| self.told(sa)).collect();
        let is_kernels = self.sources.iter().any(|part| part.database.order() == PolicyOrder::Kernel);
        let order = if is_kernels { PolicyOrder::Kernel } else { PolicyOrder::ByPriority };
        Snapshot { policies, sas, default_policy: self.default_policy(), order }
    }
}

#[async_trait]
impl PolicySource for Merge<'_> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
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
                Some(event) => self.apply(index, event),
            }
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        for part in &mut self.sources {
            if !part.ended && !part.source.caught_up()? {
                return Ok(false);
            }
        }
        Ok(self.ready.is_empty())
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        let settled = self.sources.iter_mut().map(|part| part.source.settle());
        try_join_all(settled).map_ok(drop).boxed()
    }

    /// While one source is stale, what the others have yielded was not passed on: it is part of the snapshot to come.
    fn written(&mut self) {
        if self.is_current() && self.ready.is_empty() {
            self.sources.iter_mut().for_each(|part| part.source.written());
        }
    }

    fn queued(&self) -> usize {
        self.ready.len() + self.sources.iter().map(|part| part.source.queued()).sum::<usize>()
    }
}

impl fmt::Debug for Merge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Merge").field("sources", &self.sources.len()).finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "tokio"))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        policy::{Direction, OffloadDev, OffloadKind, PolicyType, Selector},
        source::{StaleCause, adapters::PolicySourceExt as _, channel::ChannelSource},
    };

    fn policy(destination: u8, priority: u32) -> Policy {
        let destination = format!("10.2.{destination}.0/24").parse().unwrap();
        let selector = Selector::between("10.1.0.0/16".parse().unwrap(), destination).unwrap();
        let offload = Some(OffloadDev { ifindex: 7, kind: OffloadKind::Packet, inbound: false });
        Policy { priority, offload, ..Policy::new(PolicyId::new(Direction::Out, selector)) }
    }

    /// A policy without its origin.
    fn nowhere(policy: Policy) -> Policy {
        Policy { origin: Origin::default(), ..policy }
    }

    /// Reads all that a source has to say now.
    fn read(source: &mut impl PolicySource, database: &mut Database) {
        while let Some(event) = source.next_event().now_or_never() {
            let Some(event) = event.unwrap() else { break };
            database.apply(event);
        }
    }

    #[tokio::test]
    async fn an_audit_compares_what_the_adapters_made_of_the_policies() {
        let one = |destination| Snapshot { policies: vec![policy(destination, 1)], ..Snapshot::default() };
        let (first_sender, first) = ChannelSource::new(one(1), 4);
        let (_second, second) = ChannelSource::new(one(2), 4);
        let first = first.withhold(|_| true);
        let mut merged = merge(vec![Box::new(first), Box::new(second)]);
        let mut database = Database::default();
        read(&mut merged, &mut database);
        let before = database.snapshot();
        first_sender.try_send(PolicyEvent::Audit(one(1))).unwrap();
        read(&mut merged, &mut database);
        assert_eq!((database.snapshot(), database.audit_repairs()), (before, 0));

        first_sender.try_send(PolicyEvent::Audit(one(3))).unwrap();
        read(&mut merged, &mut database);
        let mut policies: Vec<Policy> = database.policies().cloned().map(nowhere).collect();
        policies.sort_by(|one, other| one.id.cmp(&other.id));
        assert_eq!(
            (policies, database.audit_repairs()),
            (vec![policy(2, 1), Policy { withheld: true, ..policy(3, 1) }], 2)
        );
    }

    #[tokio::test]
    async fn a_policy_on_which_sources_disagree_makes_its_packets_pass_until_they_agree() {
        let one = |priority| Snapshot { policies: vec![policy(1, priority)], ..Snapshot::default() };
        let (_a, first) = ChannelSource::new(one(1), 1);
        let (second_sender, second) = ChannelSource::new(one(2), 4);
        let mut merged = merge(vec![Box::new(first), Box::new(second)]);
        let mut database = Database::default();
        read(&mut merged, &mut database);
        assert_eq!(database.policies().map(|p| p.disputed).collect::<Vec<_>>(), [true]);
        second_sender.try_send(PolicyEvent::PolicyRemoved(policy(1, 2).id)).unwrap();
        read(&mut merged, &mut database);
        assert_eq!(database.policies().cloned().map(nowhere).collect::<Vec<_>>(), [policy(1, 1)]);
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
        /// While all sources are current, the merged database has each policy that some source has, disputed where
        /// those that have it disagree, and then with the highest number of an offloaded one; while one is not, the
        /// whole is not. The order is known where all that have a policy know it.
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
                        [one, other, ..] => {
                            let priority = one.priority.max(other.priority);
                            Some(Policy { disputed: true, priority, ..one.clone() })
                        }
                    };
                    prop_assert_eq!(whole.policy(&id).cloned().map(nowhere), expected);
                    let is_known =
                        |database: &Database| database.key_of(&id).is_none_or(|key| database.is_told(key));
                    prop_assert!(parts.iter().all(is_known) || whole.policy(&id).is_none() || !is_known(&whole));
                }
            }
        }
    }
}
