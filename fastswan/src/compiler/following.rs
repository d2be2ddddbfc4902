//! Following changes against starting over, in random worlds: routes and rules of all kinds, neighbours, links, policies and
//! associations come and go.

use std::{collections::BTreeMap, net::IpAddr};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*};

use super::{
    Compiler,
    facts::AddressFacts,
    model::{AMPLE, LAN, Model, NIC, Packet, association_of, to, tunnel},
    path::Paths,
    standings::Standings,
};
use crate::{
    database::Database,
    event::{PolicyEvent, Snapshot, StaleCause},
    host::{
        HostChange, HostFacts, Link, Neighbour, PathMtu, Route, RouteKind, Rule, RuleAction, RuleSelector,
    },
    policy::{
        Action, DefaultPolicy, Direction, Egress, Family, MacAddr, NextHop, OffloadKind, Policy,
        SecurityAssociation, Template,
    },
    table::{Capacity, Fact, ReversePath, Side, Slot},
};

const TABLES: [u32; 4] = [100, 200, 254, 255];

fn address(v6: bool, last: u8) -> IpAddr {
    if v6 { [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into() } else { [10, 0, 0, last].into() }
}

fn prefix(v6: bool) -> impl Strategy<Value = IpNet> {
    (0..32u8, prop_oneof![8 => 26..=32u8, 1 => Just(8u8), 2 => Just(0u8), 1 => Just(1u8)]).prop_map(
        move |(host, length)| {
            let length = if v6 && length > 8 { length + 96 } else { length };
            IpNet::new(address(v6, host), length).unwrap().trunc()
        },
    )
}

fn kind() -> impl Strategy<Value = RouteKind> {
    let unicast = (
        prop_oneof![3 => Just(NIC), 1 => Just(LAN)],
        prop::option::weighted(0.3, 0..3u8),
        prop::option::weighted(0.2, prop_oneof![Just(1300), Just(1500), Just(9000)]),
    );
    prop_oneof![
        10 => unicast.prop_map(|(ifindex, gateway, mtu)| RouteKind::Unicast { ifindex, gateway: gateway.map(|g| if g == 0 { "0.0.0.0".parse().unwrap() } else { IpAddr::from([192, 0, 2, 100 + g]) }), mtu }),
        2 => Just(RouteKind::Throw),
        2 => Just(RouteKind::Local),
        1 => Just(RouteKind::Blackhole),
        1 => Just(RouteKind::Broadcast),
        1 => Just(RouteKind::Unclear),
    ]
}

fn route(v6: bool) -> impl Strategy<Value = Route> {
    (
        prop::sample::select(&TABLES[..]),
        prefix(v6),
        kind(),
        0..3u32,
        prop::bool::weighted(0.15),
        prop::option::weighted(0.1, prefix(v6)),
    )
        .prop_map(move |(table, destination, kind, metric, tos, source)| Route {
            metric,
            tos: if tos && !v6 { 16 } else { 0 },
            source: source.filter(|_| v6),
            ..Route::new(table, destination, kind)
        })
}

fn rule(v6: bool) -> impl Strategy<Value = Rule> {
    let selector = (
        prop::bool::weighted(0.15),
        prop::option::weighted(0.2, prefix(v6)),
        prop::option::weighted(0.3, prefix(v6)),
        prop::option::weighted(0.2, prop::sample::select(&["lan", "none", "lo"][..])),
        prop::option::weighted(0.1, Just("nic")),
        prop::bool::weighted(0.15),
    );
    let suppress = prop::option::weighted(
        0.3,
        prop::sample::select(if v6 { &[0u8, 8, 122, 125][..] } else { &[0u8, 8, 26, 29][..] }),
    );
    let action = prop_oneof![
        8 => (prop::sample::select(&TABLES[..]), suppress, prop::bool::weighted(0.1)).prop_map(|(table, suppress_prefix_length, suppress_group)| RuleAction::Lookup { table, suppress_prefix_length, suppress_group }),
        2 => (0..40u32).prop_map(RuleAction::Goto),
        1 => Just(RuleAction::Deny),
        1 => Just(RuleAction::Nop),
    ];
    (0..40u32, selector, action).prop_map(
        move |(priority, (inverted, source, destination, iif, oif, other), action)| {
            let selector = RuleSelector {
                inverted,
                source,
                destination,
                iif: iif.map(str::to_owned),
                oif: oif.map(str::to_owned),
                other,
                ..RuleSelector::default()
            };
            Rule::new(if v6 { Family::V6 } else { Family::V4 }, priority, selector, action)
        },
    )
}

/// The ordinary rules, some of them perhaps missing, and others.
fn rules(v6: bool) -> impl Strategy<Value = Vec<Rule>> {
    (
        prop_oneof![2 => Just(vec![true; 3]), 1 => vec(prop::bool::weighted(0.85), 3)],
        prop_oneof![2 => vec(rule(v6), 0..1), 2 => vec(rule(v6), 0..5)],
    )
        .prop_map(move |(kept, others)| {
            let ordinary = Rule::ordinary(if v6 { Family::V6 } else { Family::V4 });
            let mut rules: Vec<Rule> =
                ordinary.into_iter().zip(kept).filter(|(_, kept)| *kept).map(|(rule, _)| rule).collect();
            rules.extend(others);
            rules.sort_by_key(|rule| rule.priority);
            rules
        })
}

fn link(ifindex: u32, name: &str, reverse_path: ReversePath) -> Link {
    Link {
        ifindex,
        name: name.to_owned(),
        mtu: 1500,
        mtu_v6: 1500,
        up: true,
        carrier: true,
        reverse_path,
        address: Some(MacAddr([2, 0, 0, 0, 0, 1])),
        ..Link::default()
    }
}

fn host(v6: bool) -> impl Strategy<Value = HostFacts> {
    (rules(v6), vec(route(v6), 0..14), vec(0..32u8, 0..3), vec(0..32u8, 0..3), any::<bool>()).prop_map(
        move |(rules, routes, learnt, own, filter)| HostFacts {
            links: vec![
                link(NIC, "nic", ReversePath::Off),
                link(LAN, "lan", if filter { ReversePath::Loose } else { ReversePath::Off }),
            ],
            rules,
            routes,
            path_mtus: learnt
                .into_iter()
                .map(|last| PathMtu {
                    destination: address(v6, last),
                    mtu: if last % 4 == 0 { 1500 } else { 1300 },
                })
                .collect(),
            addresses: own.into_iter().filter(|_| !v6).map(|last| [10, 0, 0, last].into()).collect(),
            ..HostFacts::default()
        },
    )
}

fn even_is_even(host: &HostFacts, asked: IpNet, others: &[IpNet], v6: bool) -> Result<(), TestCaseError> {
    let paths = Paths::new(host);
    let facts = AddressFacts::new(&paths, if v6 { Family::V6 } else { Family::V4 });
    for side in [Side::Destination, Side::Source] {
        let Some(even) = facts.even(side, asked) else { continue };
        let all =
            (0..34u8).map(|last| IpNet::from(address(v6, last))).chain(others.iter().copied()).chain([even]);
        for other in all.filter(|other| even.contains(other)) {
            match side {
                Side::Destination => {
                    for device in [NIC, LAN] {
                        prop_assert_eq!(
                            facts.admit_destination(asked, device),
                            facts.admit_destination(other, device),
                            "{} {} {}",
                            asked,
                            other,
                            even
                        );
                    }
                }
                Side::Source => prop_assert_eq!(
                    facts.admit_source(asked),
                    facts.admit_source(other),
                    "{} {} {}",
                    asked,
                    other,
                    even
                ),
            }
            if side == Side::Destination
                && other.prefix_len() == other.max_prefix_len()
                && asked.prefix_len() == asked.max_prefix_len()
            {
                for device in [NIC, LAN] {
                    for source in [address(v6, 3), address(v6, 17), address(v6, 40)] {
                        let of = |net: IpNet| {
                            paths
                                .outer_route(&Template::esp_tunnel(source, net.addr(), 1), device)
                                .map(|route| format!("{route:?}"))
                        };
                        prop_assert_eq!(of(asked), of(other));
                    }
                }
            }
        }
    }
    Ok(())
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(2000))]
    /// What is admitted, and by which outer route packets leave, is the same everywhere where it is said to be.
    #[test]
    fn where_it_is_even_the_same_is_admitted_v4((host, asked, others) in (host(false), prefix(false), vec(prefix(false), 40))) {
        even_is_even(&host, asked, &others, false)?;
    }
    #[test]
    fn where_it_is_even_the_same_is_admitted_v6((host, asked, others) in (host(true), prefix(true), vec(prefix(true), 40))) {
        even_is_even(&host, asked, &others, true)?;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Policy(Box<Policy>),
    Remove(usize),
    Sa(Box<SecurityAssociation>),
    RemoveSa(Box<SecurityAssociation>),
    Default(Action),
    Host(HostChange),
    SetHost(Box<HostFacts>),
    Stale,
    Resync,
    /// Another database with these policies.
    Other(Vec<Policy>),
    Time(u64),
    Nothing,
}

fn policy() -> impl Strategy<Value = Policy> {
    let general = (any::<bool>(), 0..32u8, 0..32u8, 26..=32u8, 26..=32u8, 0..4u8);
    let offload = prop_oneof![8 => Just(Some(to(NIC, OffloadKind::Packet))), 1 => Just(None), 2 => Just(Some(to(LAN, OffloadKind::Packet)))];
    let next_hop = prop_oneof![5 => Just(NextHop::Neighbour), 1 => Just(NextHop::Device)];
    (
        general,
        0..32u8,
        0..3u8,
        offload,
        next_hop,
        prop::bool::weighted(0.1),
        0..12u8,
        prop::option::weighted(0.1, 50..60u64),
    )
        .prop_map(
            |(
                (v6, source, destination, one, other, priority),
                far,
                near,
                offload,
                next_hop,
                is_forward,
                withheld,
                expires,
            )| {
                let text = |last, length| {
                    if v6 {
                        format!("2001:db8::{last:x}/{}", length + 96)
                    } else {
                        format!("10.0.0.{last}/{length}")
                    }
                };
                let mut policy = tunnel(&text(source, one), &text(destination, other));
                policy.priority = 10 * u32::from(priority);
                policy.offload = offload;
                policy.egress = Egress { next_hop, max_length: Some(1400) };
                policy.templates = [Template {
                    reqid: 1 + u32::from(far % 2),
                    ..Template::esp_tunnel(address(v6, near), address(v6, far), 1)
                }]
                .into();
                policy.withheld = withheld == 0;
                policy.expires = expires;
                if withheld < 4 && !is_forward {
                    policy.assumed = association_of(if v6 { Family::V6 } else { Family::V4 }).overhead;
                }
                if is_forward {
                    policy.id.direction = Direction::Forward;
                }
                policy
            },
        )
}

fn sa() -> impl Strategy<Value = SecurityAssociation> {
    (any::<bool>(), 0..32u8, 0..3u8, 1..4u32, prop::bool::weighted(0.8)).prop_map(
        |(v6, far, near, spi, nic)| {
            let template = Template {
                reqid: 1 + u32::from(far % 2),
                ..Template::esp_tunnel(address(v6, near), address(v6, far), 1)
            };
            SecurityAssociation {
                offload: Some(to(if nic { NIC } else { LAN }, OffloadKind::Packet)),
                overhead: association_of(if v6 { Family::V6 } else { Family::V4 }).overhead,
                ..SecurityAssociation::for_template(&template, spi)
            }
        },
    )
}

fn change() -> impl Strategy<Value = HostChange> {
    let neighbour =
        (any::<bool>(), 0..36u8, prop_oneof![Just(NIC), Just(LAN)], prop::option::weighted(0.7, 1..4u8))
            .prop_map(|(v6, last, ifindex, mac)| {
                let destination =
                    if last < 32 { address(v6, last) } else { IpAddr::from([192, 0, 2, 69 + last]) };
                match mac {
                    Some(mac) => HostChange::Neighbour(Neighbour {
                        ifindex,
                        destination,
                        address: MacAddr([2, 0, 0, 0, 1, mac]),
                    }),
                    None => HostChange::NeighbourGone { ifindex, destination },
                }
            });
    let routes = any::<bool>().prop_flat_map(|v6| (route(v6), prop::bool::weighted(0.75))).prop_map(
        |(route, is_there)| HostChange::Routes {
            table: route.table,
            destination: route.destination,
            routes: is_there.then_some(route).into_iter().collect(),
        },
    );
    let links = (
        any::<bool>(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.8),
        any::<bool>(),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(nic, up, has_address, long, gone)| {
            let ifindex = if nic { NIC } else { LAN };
            if gone {
                return HostChange::LinkGone(ifindex);
            }
            let mut link = link(ifindex, if nic { "nic" } else { "lan" }, ReversePath::Off);
            link.up = up;
            link.mtu = if long { 9000 } else { 1500 };
            if !has_address {
                link.address = None;
            }
            HostChange::Link(link)
        });
    let rules = any::<bool>().prop_flat_map(|v6| {
        rules(v6).prop_map(move |rules| HostChange::Rules(if v6 { Family::V6 } else { Family::V4 }, rules))
    });
    let mtu = (any::<bool>(), 0..32u8, any::<bool>()).prop_map(|(v6, last, there)| {
        if there {
            HostChange::PathMtu(PathMtu { destination: address(v6, last), mtu: 1300 })
        } else {
            HostChange::PathMtuGone(address(v6, last))
        }
    });
    let own = (0..32u8, any::<bool>()).prop_map(|(last, there)| {
        if there {
            HostChange::Address([10, 0, 0, last].into())
        } else {
            HostChange::AddressGone([10, 0, 0, last].into())
        }
    });
    let unclear =
        any::<bool>().prop_map(|is| HostChange::UnclearPathMtus(if is { vec![Family::V4] } else { vec![] }));
    prop_oneof![6 => neighbour, 6 => routes, 2 => links, 1 => rules, 2 => mtu, 1 => own, 1 => unclear]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => policy().prop_map(|policy| Step::Policy(Box::new(policy))),
        3 => any::<usize>().prop_map(Step::Remove),
        2 => sa().prop_map(|sa| Step::Sa(Box::new(sa))),
        1 => sa().prop_map(|sa| Step::RemoveSa(Box::new(sa))),
        1 => prop::bool::weighted(0.7).prop_map(|allow| Step::Default(if allow { Action::Allow } else { Action::Block })),
        12 => change().prop_map(Step::Host),
        1 => (host(false), host(true)).prop_map(|(one, other)| Step::SetHost(Box::new(both(one, other)))),
        1 => Just(Step::Stale),
        1 => Just(Step::Resync),
        1 => vec(policy(), 0..6).prop_map(Step::Other),
        1 => (40..60u64).prop_map(Step::Time),
        1 => Just(Step::Nothing),
    ]
}

fn both(mut one: HostFacts, other: HostFacts) -> HostFacts {
    one.rules.extend(other.rules);
    one.routes.extend(other.routes);
    one.path_mtus.extend(other.path_mtus);
    for last in (0..32u8).step_by(2) {
        let neighbour = |v6| Neighbour {
            ifindex: NIC,
            destination: address(v6, last),
            address: MacAddr([2, 0, 0, 0, 0, 9]),
        };
        one.neighbours.extend([neighbour(false), neighbour(true)]);
    }
    for last in 0..3u8 {
        let own: IpNet = address(false, last).into();
        one.routes.push(Route::new(255, own, RouteKind::Local));
    }
    for family in [Family::V4, Family::V6] {
        one.routes.push(Route::new(
            254,
            family.everything(),
            RouteKind::Unicast { ifindex: NIC, gateway: None, mtu: None },
        ));
    }
    one
}

fn capacity() -> impl Strategy<Value = Capacity> {
    prop_oneof![3 => Just(AMPLE), 1 => (0..4usize).prop_map(|slots| Capacity { slots, ..AMPLE }), 1 => (0..12usize).prop_map(|cells| Capacity { cells_v4: cells, cells_v6: cells, ..AMPLE })]
}

fn followed(capacity: Capacity, mut host: HostFacts, steps: Vec<(Step, bool)>) -> Result<(), TestCaseError> {
    // That some link has a filter is never taken back: it is the same all the time here.
    let filter = host.links[1].reverse_path;
    let mut database = Database::default();
    database.apply(PolicyEvent::Snapshot(Snapshot::default()));
    let mut compiler = Compiler::new(capacity);
    compiler.set_host(&host);
    let mut table = Model::default();
    let mut time = 10;
    for (step, compiles) in steps {
        match step {
            Step::Policy(policy) => database.apply(PolicyEvent::Policy(*policy)),
            Step::Remove(position) => {
                let mut policies = database.snapshot().policies;
                if !policies.is_empty() {
                    let policy = policies.swap_remove(position % policies.len());
                    database.apply(PolicyEvent::PolicyRemoved(policy.id));
                }
            }
            Step::Sa(sa) => database.apply(PolicyEvent::Sa(*sa)),
            Step::RemoveSa(sa) => database.apply(PolicyEvent::SaRemoved(sa.id)),
            Step::Default(action) => database.apply(PolicyEvent::DefaultPolicy(DefaultPolicy {
                outbound: action,
                ..DefaultPolicy::default()
            })),
            Step::Host(mut change) => {
                if let HostChange::Link(link) = &mut change
                    && link.ifindex == LAN
                {
                    link.reverse_path = filter;
                }
                if matches!(change, HostChange::LinkGone(LAN)) && filter != ReversePath::Off {
                    continue;
                }
                compiler.change_host(&change);
                host.apply(change);
            }
            Step::SetHost(facts) => {
                host = *facts;
                host.links[1].reverse_path = filter;
                compiler.set_host(&host);
            }
            Step::Stale => database.apply(PolicyEvent::Stale(StaleCause::Overrun)),
            Step::Resync => database.apply(PolicyEvent::Snapshot(database.snapshot())),
            Step::Other(policies) => {
                database = Database::default();
                database.apply(PolicyEvent::Snapshot(Snapshot { policies, ..Snapshot::default() }));
                database.set_time(time);
            }
            Step::Time(to) => {
                time = to;
                database.set_time(to);
            }
            Step::Nothing => {}
        }
        if !compiles {
            continue;
        }
        table.apply(&compiler.compile(&database));
        table.assert_fits(capacity);
        if !database.is_current() {
            continue;
        }
        let paths = Paths::new(&host);
        let mut expected: BTreeMap<Slot, _> = BTreeMap::new();
        for (key, policy) in database.keyed_policies() {
            if let Some(slot) = compiler.slot_of_key(key) {
                let way = Standings::new(&database, &paths).of(policy);
                prop_assert_eq!(
                    table.slots.get(&slot),
                    Some(&way.standing),
                    "standing of {:?} {:?}",
                    slot,
                    policy
                );
                if let Some(neighbour) = way.neighbour {
                    expected.insert(slot, neighbour);
                }
            }
        }
        prop_assert_eq!(
            compiler.neighbours().slots_round(None).collect::<BTreeMap<_, _>>(),
            expected.clone()
        );
        let mut distinct: Vec<_> = expected.values().copied().collect();
        distinct.sort_unstable();
        distinct.dedup();
        prop_assert_eq!(compiler.neighbours().round(None).collect::<Vec<_>>(), distinct);
        if capacity == AMPLE {
            let mut fresh = Model::default();
            let mut other = Compiler::new(capacity);
            other.set_host(&host);
            fresh.apply(&other.compile(&database));
            // Which facts there are may depend on the way there; each is judged by what holds for single addresses.
            prop_assert_eq!(&fresh.guards, &table.guards);
            for v6 in [false, true] {
                for source in 0..32 {
                    for destination in 0..32 {
                        let packet = Packet::between(address(v6, source), address(v6, destination));
                        let facts = AddressFacts::new(&paths, if v6 { Family::V6 } else { Family::V4 });
                        for (what, table) in [("followed", &table), ("anew", &fresh)] {
                            let Ok(slot) = table.decide(&packet) else { continue };
                            let device = table.slots[&slot].unwrap().ifindex;
                            prop_assert_eq!(
                                facts.both(packet.destination.into())[0],
                                Some(Fact::Via(device)),
                                "{} {:?}",
                                what,
                                packet
                            );
                            prop_assert_ne!(
                                facts.both(packet.source.into())[1],
                                Some(Fact::Denied),
                                "{} {:?}",
                                what,
                                packet
                            );
                        }
                        // Where facts are not the reason, the verdict is the same.
                        let cell = |table: &Model| table.decide(&packet).map(|slot| table.slots[&slot]);
                        let (one, other) = (cell(&fresh), cell(&table));
                        let of_facts = |way: &Result<_, PassReason>| {
                            matches!(
                                way,
                                Err(PassReason::DeniedSource
                                    | PassReason::DeniedDestination
                                    | PassReason::RouteElsewhere)
                            )
                        };
                        prop_assert!(
                            one == other || of_facts(&one) || of_facts(&other),
                            "{:?}: {:?} {:?}",
                            packet,
                            one,
                            other
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(200))]
    /// After any steps the table has the standings, neighbours and guards of one that is compiled anew, and makes no packet fast
    /// that it would not, or whose addresses are denied one by one.
    #[test]
    fn following_is_as_good_as_starting_over(
        capacity in capacity(),
        (one, other) in (host(false), host(true)),
        steps in vec((step(), prop::bool::weighted(0.7)), 1..60),
    ) {
        followed(capacity, both(one, other), steps)?;
    }
}

/// A host that asks table 100 for packets that come in on one interface, and these routes.
fn with_a_table_for_some(routes: &[(u32, &str, RouteKind)], reverse_path: ReversePath) -> HostFacts {
    let iif = RuleSelector { iif: Some("lan".to_owned()), ..RuleSelector::default() };
    let look_up = RuleAction::Lookup { table: 100, suppress_prefix_length: None, suppress_group: false };
    let mut rules = Rule::ordinary(Family::V4).to_vec();
    rules.insert(1, Rule::new(Family::V4, 100, iif, look_up));
    let routes = routes.iter().map(|(table, net, kind)| Route::new(*table, net.parse().unwrap(), *kind));
    HostFacts {
        links: vec![link(NIC, "nic", ReversePath::Off), link(LAN, "lan", reverse_path)],
        rules,
        routes: routes.chain([Route::new(255, "192.0.2.1/32".parse().unwrap(), RouteKind::Local)]).collect(),
        ..HostFacts::default()
    }
}

fn via(ifindex: u32, gateway: Option<&str>) -> RouteKind {
    RouteKind::Unicast { ifindex, gateway: gateway.map(|gateway| gateway.parse().unwrap()), mtu: None }
}

/// The table of a policy from 10.1.0.0/16 to 10.2.0.0/16 after a change of the host that was followed, and one that is compiled anew.
fn followed_and_anew(mut host: HostFacts, change: HostChange) -> [Model; 2] {
    let mut policy = tunnel("10.1.0.0/16", "10.2.0.0/16");
    policy.offload = Some(to(NIC, OffloadKind::Packet));
    policy.assumed = association_of(Family::V4).overhead;
    let mut database = Database::default();
    database.apply(PolicyEvent::Snapshot(Snapshot { policies: vec![policy], ..Snapshot::default() }));

    let (mut compiler, mut table) = (Compiler::new(AMPLE), Model::default());
    compiler.set_host(&host);
    table.apply(&compiler.compile(&database));
    compiler.change_host(&change);
    host.apply(change);
    table.apply(&compiler.compile(&database));

    let (mut anew, mut fresh) = (Compiler::new(AMPLE), Model::default());
    anew.set_host(&host);
    fresh.apply(&anew.compile(&database));
    [table, fresh]
}

/// The table's routes lead through the same device as main's, by a gateway or not. Then the kernel learns a path MTU of an inner
/// destination: packets to it must pass.
#[test]
fn a_path_mtu_counts_where_tables_agree_about_the_device_and_not_about_the_gateway() {
    let routes = [
        (254, "0.0.0.0/0", via(NIC, None)),
        (100, "10.2.0.0/16", via(NIC, None)),
        (100, "10.2.3.0/24", via(NIC, Some("192.0.2.254"))),
    ];
    let learnt = HostChange::PathMtu(PathMtu { destination: [10, 2, 3, 9].into(), mtu: 600 });
    let tables = followed_and_anew(with_a_table_for_some(&routes, ReversePath::Off), learnt);
    let decide = |table: &Model| table.decide(&Packet::between([10, 1, 0, 5].into(), [10, 2, 3, 9].into()));
    assert_eq!(decide(&tables[0]), decide(&tables[1]));
}

/// The same with a reverse path filter, and the host gets an address for which the table local has no route (as while a daemon has
/// taken it out). Packets from it must pass: the kernel drops them as martians.
#[test]
fn an_own_address_is_denied_where_tables_agree_about_the_device_and_not_about_the_gateway() {
    let routes = [
        (254, "0.0.0.0/0", via(NIC, None)),
        (254, "10.1.0.0/16", via(LAN, None)),
        (100, "10.1.0.0/16", via(LAN, None)),
        (100, "10.1.3.0/24", via(LAN, Some("10.1.0.254"))),
    ];
    let own = HostChange::Address([10, 1, 3, 1].into());
    let tables = followed_and_anew(with_a_table_for_some(&routes, ReversePath::Loose), own);
    let decide = |table: &Model| {
        let source: IpAddr = [10, 1, 3, 1].into();
        // The port has a filter, so the program looks the source up whatever the cell says.
        (table.decide(&Packet::between(source, [10, 2, 3, 9].into())), table.fact(Side::Source, source))
    };
    assert_eq!(decide(&tables[0]), decide(&tables[1]));
}
