//! The compiler against a brute force that applies the rule to one packet at a time.

use std::{collections::BTreeMap, net::IpAddr};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{
    Compiler,
    model::{AMPLE, LAN, Model, NIC, Packet, association, offloaded, template, to, tunnel},
};
use crate::{
    database::Database,
    host::{HostFacts, Link, Route, RouteKind, Rule},
    policy::{
        Action, DefaultPolicy, Direction, Family, Mark, OffloadKind, Policy, PolicyId, PolicyType, PortMatch,
        SecurityAssociation, Template,
    },
    source::{PolicyEvent, Snapshot, StaleCause},
    table::{Capacity, Fact, ReversePath, Side},
};

/// A change of what the compiler reads.
#[derive(Clone, Debug)]
enum Step {
    Policy(Box<Policy>),
    /// Removes the policy at this position, counted around.
    RemovePolicy(usize),
    Sa(Box<SecurityAssociation>),
    RemoveSa(Box<SecurityAssociation>),
    Default(Action),
    Routes(Vec<(IpNet, RouteKind)>),
    Flush,
    Stale,
    Resync,
}

fn prefix(v6: bool) -> impl Strategy<Value = IpNet> {
    (0..16u8, prop_oneof![1 => Just(0), 6 => 28..=32u8]).prop_map(move |(host, length)| {
        let text = match (v6, length) {
            (false, _) => format!("10.0.0.{host}/{length}"),
            (true, 0) => format!("2001:db8::{host:x}/0"),
            (true, _) => format!("2001:db8::{host:x}/{}", length + 96),
        };
        text.parse().unwrap()
    })
}

fn rarely<T: Clone + std::fmt::Debug + 'static>(usual: T, rare: T) -> impl Strategy<Value = T> {
    prop_oneof![12 => Just(usual), 1 => Just(rare)]
}

fn templates() -> impl Strategy<Value = Vec<Template>> {
    let one = (1..3u32, rarely(false, true))
        .prop_map(|(reqid, optional)| vec![Template { reqid, optional, ..template() }]);
    prop_oneof![10 => one, 1 => Just(vec![]), 1 => Just(vec![template(), template()])]
}

fn policy() -> impl Strategy<Value = Policy> {
    let addresses = any::<bool>().prop_flat_map(|v6| (prefix(v6), prefix(v6)));
    let direction = prop_oneof![
        14 => Just(Direction::Out),
        1 => Just(Direction::Forward),
        1 => Just(Direction::In),
    ];
    let offload = prop_oneof![
        8 => Just(Some(to(NIC, OffloadKind::Packet))),
        4 => Just(None),
        1 => Just(Some(to(LAN, OffloadKind::Packet))),
        1 => Just(Some(to(NIC, OffloadKind::Crypto))),
    ];
    let upper = prop_oneof![
        12 => Just((0, PortMatch::default())),
        1 => Just((6, PortMatch::default())),
        1 => Just((17, PortMatch::exactly(500))),
    ];
    let rare = (
        rarely(PolicyType::Main, PolicyType::Sub),
        rarely(Action::Allow, Action::Block),
        rarely(Mark::default(), Mark { value: 1, mask: 1 }),
        rarely(0, 5u32),
        rarely(0, NIC),
        rarely(false, true),
    );
    (addresses, direction, (1..5u32), offload, upper, templates(), rare).prop_map(
        |((source, destination), direction, priority, offload, (protocol, port), templates, rare)| {
            let (policy_type, action, mark, if_id, ifindex, use_limited) = rare;
            let mut policy = tunnel(&source.to_string(), &destination.to_string());
            policy.id = PolicyId { direction, policy_type, mark, if_id, ..policy.id };
            policy.id.selector.protocol = protocol;
            policy.id.selector.destination_port = port;
            policy.id.selector.ifindex = ifindex;
            Policy { priority: priority * 10, offload, action, templates, use_limited, ..policy }
        },
    )
}

fn sa() -> impl Strategy<Value = SecurityAssociation> {
    (1..3u32, prop_oneof![4 => Just(NIC), 1 => Just(LAN)], 0..3u32).prop_map(|(reqid, device, spi)| {
        let mut sa = association();
        sa.id.spi = spi;
        SecurityAssociation { reqid, offload: Some(to(device, OffloadKind::Packet)), ..sa }
    })
}

fn routes() -> impl Strategy<Value = Vec<(IpNet, RouteKind)>> {
    let kind = prop_oneof![
        4 => Just(via(NIC)),
        1 => Just(via(LAN)),
        1 => Just(RouteKind::Local),
        1 => Just(RouteKind::Blackhole),
    ];
    let route = any::<bool>().prop_flat_map(prefix).prop_map(|prefix| prefix.trunc());
    let defaults = [Family::V4, Family::V6].map(|family| (family.everything(), via(NIC)));
    (any::<bool>(), proptest::collection::btree_map(route, kind, 0..5)).prop_map(move |(with, routes)| {
        let mut all: BTreeMap<IpNet, RouteKind> = if with { defaults.into() } else { BTreeMap::new() };
        all.extend(routes);
        all.into_iter().collect()
    })
}

fn via(ifindex: u32) -> RouteKind {
    RouteKind::Unicast { ifindex, gateway: None, mtu: None }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => policy().prop_map(|policy| Step::Policy(Box::new(policy))),
        4 => (0..16usize).prop_map(Step::RemovePolicy),
        2 => sa().prop_map(|sa| Step::Sa(Box::new(sa))),
        1 => sa().prop_map(|sa| Step::RemoveSa(Box::new(sa))),
        1 => rarely(Action::Allow, Action::Block).prop_map(Step::Default),
        2 => routes().prop_map(Step::Routes),
        1 => Just(Step::Flush).boxed(),
        1 => Just(Step::Stale),
        2 => Just(Step::Resync),
    ]
}

/// Some policies with live associations to begin with, then changes.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let start = (routes(), proptest::collection::vec(policy(), 1..8)).prop_map(|(routes, policies)| {
        let second = SecurityAssociation { reqid: 2, ..association() };
        let second = SecurityAssociation { id: crate::policy::SaId { spi: 0x200, ..second.id }, ..second };
        let sas = [association(), second].map(|sa| Step::Sa(Box::new(sa)));
        let policies = policies.into_iter().map(|policy| Step::Policy(Box::new(policy)));
        sas.into_iter().chain([Step::Routes(routes)]).chain(policies).collect::<Vec<_>>()
    });
    (start, proptest::collection::vec(step(), 0..10)).prop_map(|(start, more)| [start, more].concat())
}

/// Too little of one thing, enough of the others.
fn capacity() -> impl Strategy<Value = Capacity> {
    prop_oneof![
        4 => (0..10usize).prop_map(|cells| Capacity { cells, ..AMPLE }),
        4 => (0..5usize).prop_map(|tuples| Capacity { tuples, ..AMPLE }),
        2 => (0..3usize).prop_map(|fact_lengths| Capacity { fact_lengths, ..AMPLE }),
        2 => (0..2usize).prop_map(|exceptions| Capacity { exceptions, ..AMPLE }),
        1 => (0..3usize).prop_map(|slots| Capacity { slots, ..AMPLE }),
    ]
}

/// What the steps make, and the table that the compiler's updates add up to.
struct World {
    database: Database,
    host: HostFacts,
    compiler: Compiler,
    table: Model,
    capacity: Capacity,
}

impl World {
    fn new(capacity: Capacity, reverse_path: ReversePath) -> Self {
        let link = |ifindex, name: &str| Link {
            ifindex,
            name: name.to_owned(),
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            carrier: true,
            reverse_path,
            ..Link::default()
        };
        let mut database = Database::default();
        database.apply(PolicyEvent::Snapshot(Snapshot::default()));
        Self {
            database,
            host: HostFacts {
                links: vec![link(NIC, "nic"), link(LAN, "lan")],
                rules: [Rule::ordinary(Family::V4), Rule::ordinary(Family::V6)].concat(),
                ..HostFacts::default()
            },
            compiler: Compiler::new(capacity),
            table: Model::default(),
            capacity,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Policy(policy) => self.database.apply(PolicyEvent::Policy(*policy)),
            Step::RemovePolicy(position) => {
                let count = self.database.policies().count().max(1);
                let id = self.database.policies().nth(position % count).map(|policy| policy.id.clone());
                if let Some(id) = id {
                    self.database.apply(PolicyEvent::PolicyRemoved(id));
                }
            }
            Step::Sa(sa) => self.database.apply(PolicyEvent::Sa(*sa)),
            Step::RemoveSa(sa) => self.database.apply(PolicyEvent::SaRemoved(sa.id)),
            Step::Default(action) => {
                let default_policy = DefaultPolicy { forward: action, ..DefaultPolicy::default() };
                self.database.apply(PolicyEvent::DefaultPolicy(default_policy));
            }
            Step::Routes(routes) => {
                let outer = ("192.0.2.0/24".parse().unwrap(), via(NIC));
                let route = |(destination, kind)| Route { table: 254, destination, metric: 0, kind };
                self.host.routes = routes.into_iter().chain([outer]).map(route).collect();
            }
            Step::Flush => self.database.apply(PolicyEvent::PoliciesFlushed(PolicyType::Sub)),
            Step::Stale => self.database.apply(PolicyEvent::Stale(StaleCause::Overrun)),
            Step::Resync => self.database.apply(PolicyEvent::Snapshot(self.database.snapshot())),
        }
        let update = self.compiler.compile(&self.database, &self.host);
        self.table.apply(&update);
        self.table.assert_fits(self.capacity);
        assert!(self.compiler.compile(&self.database, &self.host).is_empty(), "nothing has changed");
    }

    /// The kind of the longest route.
    fn route(&self, address: IpAddr) -> Option<RouteKind> {
        let routes = self.host.routes.iter().filter(|route| route.destination.contains(&address));
        routes.max_by_key(|route| route.destination.prefix_len()).map(|route| route.kind)
    }

    fn matching(&self, packet: &Packet) -> impl Iterator<Item = &Policy> {
        self.database.policies().filter(|policy| {
            let selector = &policy.id.selector;
            policy.id.direction != Direction::In
                && selector.source.contains(&packet.source)
                && selector.destination.contains(&packet.destination)
                && (selector.protocol == 0 || selector.protocol == packet.protocol)
                && selector.source_port.matches(packet.source_port)
                && selector.destination_port.matches(packet.destination_port)
        })
    }

    /// Whether a policy asks for the packet's protocol or ports.
    fn is_exception(&self, packet: &Packet) -> bool {
        self.database.is_current()
            && self.matching(packet).any(|policy| policy.id.selector.looks_at_upper_layer())
    }

    /// Whether a forward or sub policy is about the packet's source.
    fn is_guarded(&self, packet: &Packet) -> bool {
        self.database.policies().any(|policy| {
            (policy.id.direction == Direction::Forward || policy.id.policy_type == PolicyType::Sub)
                && policy.id.selector.source.contains(&packet.source)
        })
    }

    /// The policy that the kernel is certain to choose and that the fast path can stand in for.
    fn rule(&self, packet: &Packet) -> Option<&Policy> {
        let family = if packet.source.is_ipv4() { Family::V4 } else { Family::V6 };
        let snapshot = self.database.snapshot();
        if !self.database.is_current()
            || snapshot.default_policy.forward == Action::Block
            || snapshot.default_policy.outbound == Action::Block
        {
            return None;
        }
        let matching: Vec<_> = self.matching(packet).collect();
        let passes = |policy: &&Policy| {
            policy.id.direction == Direction::Forward || policy.id.policy_type == PolicyType::Sub
        };
        if matching.iter().any(passes) {
            return None;
        }
        let highest = self
            .database
            .policies()
            .filter(|policy| policy.id.direction == Direction::Out && policy.is_packet_offloaded())
            .filter(|policy| policy.id.selector.family() == family)
            .map(|policy| policy.priority)
            .max()?;
        let best = *matching.iter().min_by_key(|policy| policy.priority)?;
        for other in matching.iter().filter(|other| other.id != best.id) {
            if other.priority <= best.priority || other.is_packet_offloaded() || other.priority < highest {
                return None;
            }
        }
        let plain = best.action == Action::Allow
            && best.id.mark == Mark::default()
            && best.id.if_id == 0
            && best.id.selector.ifindex == 0
            && !best.id.selector.looks_at_upper_layer()
            && !best.use_limited
            && best.templates.len() == 1
            && !best.templates[0].optional;
        let device = best.offload.filter(|device| device.kind == OffloadKind::Packet)?.ifindex;
        let is_live = |sa: &SecurityAssociation| {
            sa.id.spi != 0
                && sa.reqid == best.templates[0].reqid
                && sa.offload.is_some_and(|offload| offload.ifindex == device)
        };
        let routed = self.route(packet.destination) == Some(via(device))
            && matches!(self.route(packet.source), None | Some(RouteKind::Unicast { .. }));
        (plain && device == NIC && snapshot.sas.iter().any(is_live) && routed).then_some(best)
    }
}

fn packets() -> impl Iterator<Item = Packet> {
    let ports = [(17, 40_000), (17, 500), (6, 500)];
    let address = |v6: bool, last: u8| -> IpAddr {
        if v6 { [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into() } else { [10, 0, 0, last].into() }
    };
    [false, true].into_iter().flat_map(move |v6| {
        (0..16).flat_map(move |source| {
            (0..16).map(move |destination| {
                let (protocol, port) = ports[usize::from(source ^ destination) % 3];
                let packet = Packet::between(address(v6, source), address(v6, destination));
                Packet { protocol, destination_port: port, ..packet }
            })
        })
    })
}

/// How many packets are fast, if that agrees with the rule for each; or, if the table may be too small, if none
/// is fast against the rule. Exceptions pass, and so may packets from where a forward or sub policy is about.
fn check(world: &World, exact: bool) -> Result<usize, TestCaseError> {
    let mut fast = 0;
    for packet in packets() {
        let allowed = world.rule(&packet).map(|policy| &policy.id);
        let found = world.table.decide(&packet);
        if let Ok(slot) = found {
            prop_assert!(!exact || !world.is_exception(&packet), "{:?}", packet);
            fast += 1;
            let slot_of_allowed = allowed.and_then(|policy| world.compiler.slot(policy));
            prop_assert_eq!(Some(slot), slot_of_allowed, "{:?}: {:?}", packet, allowed);
        } else if exact && world.is_exception(&packet) {
            prop_assert_eq!(found, Err(PassReason::Exception), "{:?}", packet);
        } else if exact && !(found == Err(PassReason::DeniedSource) && world.is_guarded(&packet)) {
            prop_assert_eq!(allowed, None, "{:?}: {:?}", packet, found);
        }
    }
    Ok(fast)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// For every packet, the first cell that contains it gives exactly the rule's answer, after every change.
    #[test]
    fn the_first_cell_gives_the_answer_of_the_rule(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Off);
        for step in steps {
            world.take(step);
            check(&world, true)?;
        }
    }

    /// With a reverse path filter, the source fact of a packet that is fast names the device of its route.
    #[test]
    fn source_facts_are_the_routes_back_when_a_link_filters_by_them(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Strict);
        for step in steps {
            world.take(step);
            check(&world, true)?;
            for packet in packets().filter(|packet| packet.source.is_ipv4()) {
                if world.table.decide(&packet).is_ok() && !world.is_guarded(&packet) {
                    let route = match world.table.fact(Side::Source, packet.source) {
                        Some(Fact::Via(ifindex)) => Some(via(ifindex)),
                        Some(Fact::Denied) => Some(RouteKind::Blackhole),
                        None => None,
                    };
                    prop_assert_eq!(route, world.route(packet.source), "{:?}", packet);
                }
            }
        }
    }

    /// Compiling everything at once and compiling after every change end in the same table, but for slots.
    #[test]
    fn the_way_to_a_database_does_not_matter(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Off);
        for step in steps {
            world.take(step);
        }
        let mut fresh = Model::default();
        fresh.apply(&Compiler::new(AMPLE).compile(&world.database, &world.host));
        prop_assert_eq!(fresh.cells.keys().collect::<Vec<_>>(), world.table.cells.keys().collect::<Vec<_>>());
        prop_assert_eq!(&fresh.facts, &world.table.facts);
        prop_assert_eq!(&fresh.exceptions, &world.table.exceptions);
        for packet in packets() {
            prop_assert_eq!(fresh.decide(&packet).err(), world.table.decide(&packet).err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// However small the table is, no packet is fast that the rule keeps in the kernel.
    #[test]
    fn a_table_that_is_too_small_is_never_fast_against_the_rule(steps in steps(), capacity in capacity()) {
        let mut world = World::new(capacity, ReversePath::Off);
        for step in steps {
            world.take(step);
            check(&world, false)?;
        }
    }
}

#[test]
fn the_random_worlds_have_fast_packets_to_be_wrong_about() {
    let mut runner = TestRunner::deterministic();
    let (mut fast, mut all, mut small) = (0, 0, 0);
    for _ in 0..64 {
        let steps = steps().new_tree(&mut runner).unwrap().current();
        let capacity = capacity().new_tree(&mut runner).unwrap().current();
        let mut world = World::new(AMPLE, ReversePath::Off);
        let mut cramped = World::new(capacity, ReversePath::Off);
        for step in steps {
            world.take(step.clone());
            cramped.take(step);
        }
        all += packets().count();
        fast += check(&world, true).unwrap();
        small += check(&cramped, false).unwrap();
    }
    assert!(fast * 50 > all, "{fast} of {all} packets are fast");
    assert!(small * 20 > fast && small < fast, "{small} of {fast} are fast in small tables");
}

#[test]
fn peers_inside_the_local_network_need_cells_in_proportion_to_their_number() {
    let mut database = Database::default();
    let peers = 1000;
    let policies = (0..peers).flat_map(|n: u32| {
        let peer = format!("10.{}.{}.0/24", n / 256, n % 256);
        let mut back = tunnel(&peer, "10.0.0.0/8");
        back.id.direction = Direction::Forward;
        [offloaded("10.0.0.0/8", &peer), back]
    });
    let (policies, sas) = (policies.collect(), vec![association()]);
    database.apply(PolicyEvent::Snapshot(Snapshot { policies, sas, ..Snapshot::default() }));
    let mut host = World::new(AMPLE, ReversePath::Off).host;
    host.routes = vec![Route { table: 254, destination: Family::V4.everything(), metric: 0, kind: via(NIC) }];
    let mut compiler = Compiler::new(AMPLE);
    let update = compiler.compile(&database, &host);
    assert_eq!((update.cells.len(), compiler.fast_policies()), (2000, 1000));

    let mut table = Model::default();
    table.apply(&update);
    let decide = |source: [u8; 4], destination: [u8; 4]| {
        table.decide(&Packet::between(source.into(), destination.into()))
    };
    assert!(decide([10, 99, 0, 1], [10, 1, 1, 1]).is_ok());
    assert_eq!(decide([10, 2, 2, 1], [10, 1, 1, 1]), Err(PassReason::DeniedSource), "from peer to peer");
    assert_eq!(decide([10, 2, 2, 1], [10, 99, 0, 1]), Err(PassReason::ForwardOrSubPolicy), "from a peer");
}

#[test]
fn twenty_thousand_sites_compile_to_one_cell_each() {
    let mut database = Database::default();
    let site = |n: u32| offloaded(&format!("10.{}.{}.0/24", n / 256, n % 256), "172.16.0.0/12");
    let policies = (0..20_000).map(site).collect();
    let sas = vec![association()];
    database.apply(PolicyEvent::Snapshot(Snapshot { policies, sas, ..Snapshot::default() }));
    let mut host = World::new(AMPLE, ReversePath::Off).host;
    host.routes = vec![Route { table: 254, destination: Family::V4.everything(), metric: 0, kind: via(NIC) }];
    let mut compiler = Compiler::new(AMPLE);
    let update = compiler.compile(&database, &host);
    assert_eq!((update.cells.len(), update.facts.len()), (20_000, 0));
    assert_eq!(compiler.fast_policies(), 20_000);
}
