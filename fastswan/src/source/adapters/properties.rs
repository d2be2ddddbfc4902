//! Adapters only take away, for random databases and nests of adapters: packet by packet, with the compiler.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use futures::FutureExt as _;
use proptest::{collection::vec, prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use super::{PolicySourceExt as _, merge};
use crate::{
    Compiler, Database, HostFacts, MemoryTable, OffloadTable as _, Snapshot,
    event::{PolicyEvent, StaleCause},
    host::Link,
    policy::{
        Action, DefaultPolicy, Direction, Egress, Family, MacAddr, NextHop, OffloadDev, OffloadKind,
        Overhead, Policy, PolicyId, PolicyType, SaId, SecurityAssociation, Selector, Template,
    },
    source::{
        PolicySource,
        channel::{ChannelSource, PolicySender},
    },
    table::{Forwarding, ReadBack as _, TableConfig, Verdict},
};

const NIC: u32 = 7;
const HOSTS: u8 = 6;

fn policy(
    (destination, length): (u8, u8),
    priority: u32,
    (offloaded, reqid): (bool, u32),
    kind: u8,
) -> Policy {
    let prefix = |host: u8, length: u8| format!("10.2.0.{host}/{length}").parse().unwrap();
    let selector = Selector::between("10.1.0.0/16".parse().unwrap(), prefix(destination, length)).unwrap();
    let template = Template::esp_tunnel([192, 0, 2, 1].into(), [192, 0, 2, 2].into(), reqid);
    let offload = OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false };
    let mut policy = Policy {
        priority,
        templates: [template].into(),
        offload: offloaded.then_some(offload),
        ..Policy::new(PolicyId::new(Direction::Out, selector))
    };
    match kind {
        0 => policy.action = Action::Block,
        1 => policy.id.direction = Direction::Forward,
        2 => policy.assumed = Some(Overhead::aes_gcm_tunnel(Family::V4, true, 16)),
        3 => policy.id.policy_type = PolicyType::Sub,
        _ => {}
    }
    policy
}

fn sa(spi: u32, reqid: u32, offloaded: bool) -> SecurityAssociation {
    let template = Template::esp_tunnel([192, 0, 2, 1].into(), [192, 0, 2, 2].into(), reqid);
    let offload = OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false };
    SecurityAssociation {
        offload: offloaded.then_some(offload),
        overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, spi == 1, 16)),
        ..SecurityAssociation::for_template(&template, spi)
    }
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let place = (0..HOSTS, prop_oneof![Just(32u8), Just(31), Just(29)]);
    (place, 1..4u32, (prop::bool::weighted(0.7), 1..3u32), 0..20u8)
        .prop_map(|(place, priority, offload, kind)| policy(place, priority, offload, kind))
}

fn any_sa() -> impl Strategy<Value = SecurityAssociation> {
    (1..4u32, 1..3u32, prop::bool::weighted(0.9))
        .prop_map(|(spi, reqid, offloaded)| sa(spi, reqid, offloaded))
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    let blocks = DefaultPolicy { forward: Action::Block, ..DefaultPolicy::default() };
    let default_policy = prop_oneof![30 => Just(DefaultPolicy::default()), 1 => Just(blocks)];
    (vec(any_policy(), 0..5), vec(any_sa(), 0..4), default_policy).prop_map(
        |(policies, sas, default_policy)| {
            let mut database = Database::default();
            for policy in policies {
                database.apply(PolicyEvent::Policy(policy));
            }
            for sa in sas {
                database.apply(PolicyEvent::Sa(sa));
            }
            Snapshot { default_policy, ..database.snapshot() }
        },
    )
}

fn event() -> impl Strategy<Value = PolicyEvent> {
    prop_oneof![
        8 => any_policy().prop_map(PolicyEvent::Policy),
        3 => any_policy().prop_map(|policy| PolicyEvent::PolicyRemoved(policy.id)),
        3 => any_sa().prop_map(PolicyEvent::Sa),
        1 => any_sa().prop_map(|sa| PolicyEvent::SaRemoved(sa.id)),
        1 => snapshot().prop_map(PolicyEvent::Snapshot),
        1 => Just(PolicyEvent::PoliciesFlushed(PolicyType::Main)),
        1 => Just(PolicyEvent::SasFlushed(0)),
        1 => Just(PolicyEvent::Stale(StaleCause::Requested)),
    ]
}

/// How sources are adapted; the numbers choose for which policies.
#[derive(Clone, Debug)]
enum Nest {
    Plain,
    Withhold(Box<Nest>, u64),
    WithEgress(Box<Nest>, u64),
    Merge(Vec<Nest>),
}

fn nest() -> impl Strategy<Value = Nest> {
    Just(Nest::Plain).prop_recursive(4, 8, 3, |inner| {
        prop_oneof![
            1 => (inner.clone(), any::<u64>()).prop_map(|(nest, salt)| Nest::Withhold(Box::new(nest), salt)),
            1 => (inner.clone(), any::<u64>()).prop_map(|(nest, salt)| Nest::WithEgress(Box::new(nest), salt)),
            2 => vec(inner, 1..4).prop_map(Nest::Merge),
        ]
    })
}

fn is_chosen(policy: &Policy, salt: u64) -> bool {
    let mut hasher = DefaultHasher::new();
    (&policy.id, salt).hash(&mut hasher);
    hasher.finish().is_multiple_of(4)
}

impl Nest {
    fn leaves(&self) -> usize {
        match self {
            Self::Plain => 1,
            Self::Withhold(nest, _) | Self::WithEgress(nest, _) => nest.leaves(),
            Self::Merge(nests) => nests.iter().map(Self::leaves).sum(),
        }
    }

    fn build(&self, leaves: &mut impl Iterator<Item = ChannelSource>) -> Box<dyn PolicySource> {
        match self {
            Self::Plain => Box::new(leaves.next().unwrap()),
            Self::Withhold(nest, salt) => {
                let salt = *salt;
                Box::new(nest.build(leaves).withhold(move |policy| is_chosen(policy, salt)))
            }
            Self::WithEgress(nest, salt) => {
                let salt = *salt;
                let fixed = NextHop::Fixed { source: MacAddr::default(), destination: MacAddr([2; 6]) };
                let egress = Egress { next_hop: fixed, max_length: Some(1300) };
                let source = nest.build(leaves);
                Box::new(source.with_egress(
                    move |policy| {
                        if is_chosen(policy, salt) { egress } else { policy.egress }
                    },
                ))
            }
            Self::Merge(nests) => Box::new(merge(nests.iter().map(|nest| nest.build(leaves)).collect())),
        }
    }
}

/// A mirror without a kernel.
struct Mirror {
    database: Database,
    compiler: Compiler,
    table: MemoryTable,
    forwardings: std::collections::BTreeMap<crate::table::Slot, Forwarding>,
}

impl Mirror {
    fn new() -> Self {
        let table =
            MemoryTable::new(&TableConfig { cells_v4: 1024, cells_v6: 64, exceptions: 64, slots: 256 });
        let mut compiler = Compiler::new(table.capacity());
        let link = Link {
            ifindex: NIC,
            name: "nic".to_owned(),
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            carrier: true,
            ..Link::default()
        };
        compiler.set_host(&HostFacts { links: vec![link], ..HostFacts::vouched() });
        Self { database: Database::default(), compiler, table, forwardings: <_>::default() }
    }

    fn compile(&mut self) {
        let update = self.compiler.compile(&self.database);
        for (slot, standing) in &update.slots {
            match standing {
                Some(Ok(forwarding)) => drop(self.forwardings.insert(*slot, *forwarding)),
                _ => drop(self.forwardings.remove(slot)),
            }
        }
        self.table.apply(&update).unwrap();
    }

    /// The policy that a packet to this host is fast by, and the longest such packet.
    fn fast(&self, host: u8) -> Option<(PolicyId, u16)> {
        if !self.database.is_current() {
            return None;
        }
        let verdict = self.table.verdict([10, 1, 0, 5].into(), [10, 2, 0, host].into());
        let Some(Verdict::Fast { slot, .. }) = verdict else { return None };
        let length = self.forwardings.get(&slot)?.max_length;
        let owner = self
            .database
            .policies()
            .find(|policy| self.compiler.slot(&self.database, &policy.id) == Some(slot));
        Some((owner?.id.clone(), length))
    }
}

/// Follows nests of adapters beside the plain sources that are in them, and returns how many packets were fast.
fn check(nest: &Nest, snapshots: &[Snapshot], events: Vec<(usize, PolicyEvent)>) -> usize {
    let leaves = nest.leaves();
    let (mut senders, mut sources): (Vec<PolicySender>, Vec<ChannelSource>) = (Vec::new(), Vec::new());
    let mut plain: Vec<Mirror> = Vec::new();
    for snapshot in snapshots.iter().cycle().take(leaves) {
        let (sender, source) = ChannelSource::new(snapshot.clone(), 4);
        senders.push(sender);
        sources.push(source);
        let mut mirror = Mirror::new();
        mirror.database.apply(PolicyEvent::Snapshot(snapshot.clone()));
        plain.push(mirror);
    }
    let mut source = nest.build(&mut sources.into_iter());
    let mut adapted = Mirror::new();
    let mut fast = 0;
    for told in std::iter::once(None).chain(events.into_iter().map(Some)) {
        if let Some((index, event)) = told {
            let index = index % leaves;
            senders[index].try_send(event.clone()).unwrap();
            plain[index].database.apply(event);
        }
        while !source.caught_up().unwrap() {
            // Nothing comes of an event that is part of a snapshot to come.
            let Some(event) = source.next_event().now_or_never() else { continue };
            let event = event.unwrap().unwrap();
            // What a snapshot forgets of the order in which policies came, each source alone may forget then, too.
            if matches!(event, PolicyEvent::Snapshot(_)) {
                for mirror in plain.iter_mut().filter(|mirror| mirror.database.is_current()) {
                    let again = mirror.database.snapshot();
                    mirror.database.apply(PolicyEvent::Snapshot(again));
                }
            }
            adapted.database.apply(event);
        }
        adapted.compile();
        plain.iter_mut().for_each(Mirror::compile);
        for host in 0..HOSTS + 4 {
            let Some((policy, length)) = adapted.fast(host) else { continue };
            fast += 1;
            // Of several that lead the same way and have one priority, each mirror counts packets for one.
            let way = |mirror: &Mirror, id: &PolicyId| {
                mirror.database.policy(id).map(|policy| (policy.templates.clone(), policy.offload))
            };
            let is_fast = |mirror: &Mirror| {
                mirror.fast(host).is_some_and(|(own, longest)| {
                    way(mirror, &own) == way(&adapted, &policy) && length <= longest
                })
            };
            assert!(
                plain.iter().any(is_fast),
                "10.2.0.{host} is fast for {policy}, up to {length} bytes, and by no source alone"
            );
        }
    }
    fast
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// For every database and every nest of adapters: what is fast through it would be fast without it.
    #[test]
    fn what_is_fast_through_adapters_is_fast_without_them(
        nest in nest(),
        snapshots in vec(snapshot(), 1..4),
        events in vec((0..8usize, event()), 0..12),
    ) {
        check(&nest, &snapshots, events);
    }
}

#[test]
fn nests_of_adapters_leave_packets_to_be_fast() {
    let mut runner = TestRunner::deterministic();
    let mut some_fast = 0;
    for _ in 0..100 {
        let nest = nest().new_tree(&mut runner).unwrap().current();
        let snapshots = vec(snapshot(), 1..4).new_tree(&mut runner).unwrap().current();
        let events = vec((0..8usize, event()), 0..12).new_tree(&mut runner).unwrap().current();
        some_fast += usize::from(check(&nest, &snapshots, events) > 0);
    }
    assert!(some_fast > 30, "{some_fast} of 100 nests have fast packets");
}

#[test]
fn an_association_that_is_assumed_serves_no_policy_of_the_kernel_with_its_reqid() {
    let assumed = policy((0, 32), 1, (true, 1), 2);
    let trap = policy((1, 32), 1, (true, 1), 9);
    let one = |policy| Snapshot { policies: vec![policy], ..Snapshot::default() };
    let (_first, author) = ChannelSource::new(one(assumed.clone()), 1);
    let (_second, kernel) = ChannelSource::new(one(trap), 1);
    let mut merged = merge(vec![Box::new(author), Box::new(kernel)]);
    let mut mirror = Mirror::new();
    mirror.database.apply(merged.next_event().now_or_never().unwrap().unwrap().unwrap());
    mirror.compile();
    // AES-GCM in UDP over a link of 1500 bytes.
    assert_eq!(mirror.fast(0), Some((assumed.id, 1438)));
    assert_eq!(mirror.fast(1), None);
}

#[test]
fn an_association_serves_no_policy_of_another_source() {
    let policies = vec![policy((0, 32), 1, (true, 1), 9)];
    let (_first, first) = ChannelSource::new(Snapshot { policies, ..Snapshot::default() }, 1);
    let (sender, second) =
        ChannelSource::new(Snapshot { sas: vec![sa(2, 1, true)], ..Snapshot::default() }, 1);
    let mut merged = merge(vec![Box::new(first), Box::new(second)]);
    let mut mirror = Mirror::new();
    let mut follow = |mirror: &mut Mirror| {
        while !merged.caught_up().unwrap() {
            mirror.database.apply(merged.next_event().now_or_never().unwrap().unwrap().unwrap());
        }
        mirror.compile();
    };
    follow(&mut mirror);
    assert_eq!((mirror.database.sas().count(), mirror.fast(0)), (1, None));
    sender.try_send(PolicyEvent::SaRemoved(SaId::new([192, 0, 2, 2].into(), 2, 50))).unwrap();
    follow(&mut mirror);
    assert_eq!(mirror.database.sas().count(), 0);
}
