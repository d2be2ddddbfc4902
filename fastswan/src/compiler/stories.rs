//! Each clause of the rule, and of what surrounds it, told as a packet's fate.

use std::net::{IpAddr, Ipv4Addr};

use fastswan_ebpf::PassReason;

use super::{
    Cause, Compiler, Explanation, Flow, MANY, PolicyState,
    model::{
        AMPLE, LAN, Model, NIC, Packet, association, association_of, offloaded, template, template_of, to,
        tunnel,
    },
};
use crate::{
    database::Database,
    event::{PolicyEvent, PolicyOrder, Snapshot, StaleCause},
    host::{
        HostChange, HostFacts, Link, Neighbour, PathMtu, Route, RouteKind, Rule, RuleAction, RuleSelector,
    },
    policy::{
        Action, DefaultPolicy, Direction, Egress, Family, MacAddr, Mark, Mode, NextHop, OffloadKind,
        Overhead, Policy, PolicyId, PolicyType, PortMatch, SaId, SecurityAssociation, Selector, Template,
        Templates,
    },
    table::{Capacity, Fact, Forwarding, Forwards, Port, ReversePath, Side, Slot},
};

const NIC_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const ROUTER_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

/// A gateway whose default route leads through the packet-offload device, and a table.
struct Scene {
    database: Database,
    host: HostFacts,
    compiler: Compiler,
    table: Model,
    capacity: Capacity,
}

impl Scene {
    fn new() -> Self {
        Self::with_capacity(AMPLE)
    }

    fn with_capacity(capacity: Capacity) -> Self {
        let link = |ifindex| Link {
            ifindex,
            address: Some(NIC_MAC),
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            carrier: true,
            ..Link::default()
        };
        let mut database = Database::default();
        let sas = [Family::V4, Family::V6].map(association_of).into();
        database.apply(PolicyEvent::Snapshot(Snapshot { sas, ..Snapshot::default() }));
        Self {
            database,
            host: HostFacts {
                links: vec![link(NIC), link(LAN)],
                routes: vec![
                    route("0.0.0.0/0", via(NIC)),
                    route("::/0", via(NIC)),
                    route("192.0.2.1/32", RouteKind::Local),
                ],
                rules: [Rule::ordinary(Family::V4), Rule::ordinary(Family::V6)].concat(),
                ..HostFacts::default()
            },
            compiler: Compiler::new(capacity),
            table: Model::default(),
            capacity,
        }
    }

    fn has(mut self, policy: Policy) -> Self {
        self.database.apply(PolicyEvent::Policy(policy));
        self
    }

    fn routes(mut self, destination: &str, kind: RouteKind) -> Self {
        self.host.routes.push(route(destination, kind));
        self
    }

    fn after(&mut self, event: PolicyEvent) -> &mut Self {
        self.database.apply(event);
        self
    }

    fn link(&mut self, ifindex: u32) -> &mut Link {
        self.host.links.iter_mut().find(|link| link.ifindex == ifindex).unwrap()
    }

    fn compile(&mut self) {
        self.compiler.set_host(&self.host);
        let update = self.compiler.compile(&self.database);
        self.table.apply(&update);
        self.table.assert_fits(self.capacity);
    }

    fn sends(&mut self, packet: &Packet) -> Result<Slot, PassReason> {
        self.compile();
        self.table.decide(packet)
    }

    /// Whose slot a packet takes, or why it passes.
    fn fate(&mut self, source: &str, destination: &str) -> Result<PolicyId, PassReason> {
        let slot = self.sends(&packet(source, destination))?;
        let reports = self.compiler.policies(&self.database);
        let owner = reports.iter().find(|report| report.slot == Some(slot));
        Ok(owner.expect("a slot in use has an owner").id.clone())
    }

    fn reason(&mut self, source: &str, destination: &str) -> PassReason {
        self.fate(source, destination).expect_err("the packet should pass")
    }
}

fn packet(source: &str, destination: &str) -> Packet {
    Packet::between(source.parse().unwrap(), destination.parse().unwrap())
}

fn route(destination: &str, kind: RouteKind) -> Route {
    let table = if kind == RouteKind::Local { 255 } else { 254 };
    Route::new(table, destination.parse().unwrap(), kind)
}

fn via(ifindex: u32) -> RouteKind {
    RouteKind::Unicast { ifindex, gateway: None, mtu: None }
}

fn site() -> Policy {
    offloaded("10.1.0.0/16", "10.2.0.0/16")
}

fn with_priority(priority: u32, policy: Policy) -> Policy {
    Policy { priority, ..policy }
}

fn with_direction(direction: Direction, policy: Policy) -> Policy {
    Policy { id: PolicyId { direction, ..policy.id }, ..policy }
}

fn bypass(source: &str, destination: &str) -> Policy {
    Policy { templates: Templates::default(), ..tunnel(source, destination) }
}

#[test]
fn a_lone_offloaded_policy_with_an_association_is_fast_in_its_own_region_only() {
    let mut scene = Scene::new().has(site());
    assert_eq!(scene.fate("10.1.2.3", "10.2.3.4"), Ok(site().id));
    assert_eq!(scene.reason("10.2.3.4", "10.1.2.3"), PassReason::NoPolicy);
    assert_eq!(scene.reason("10.1.2.3", "10.3.0.1"), PassReason::NoPolicy);
    assert_eq!(scene.compiler.fast_policies(&scene.database), 1);
    assert_eq!(scene.database.highest_offloaded_priority(Family::V4), Some(0));
    assert_eq!(scene.database.highest_offloaded_priority(Family::V6), None);
}

#[test]
fn more_changes_than_a_database_remembers_end_in_the_same_table() {
    let mut scene = Scene::new().has(site());
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    let other = offloaded("10.1.0.0/16", "10.3.0.0/16");
    let events = [PolicyEvent::PolicyRemoved(site().id), PolicyEvent::Policy(other.clone())];
    let changes = (0..10_000).map(|number| {
        let ports = with_priority(number, bypass("10.1.0.0/16", "10.4.0.0/16"));
        if number == 5_000 { PolicyEvent::PolicyRemoved(ports.id) } else { PolicyEvent::Policy(ports) }
    });
    // Nobody compiles in between.
    events.into_iter().chain(changes).for_each(|event| scene.database.apply(event));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPolicy);
    assert_eq!(scene.fate("10.1.0.1", "10.3.0.1"), Ok(other.id));
    assert_eq!(scene.reason("10.1.0.1", "10.4.0.1"), PassReason::NotOffloaded);
}

#[test]
fn of_many_policies_each_leaves_by_its_own_route_and_association() {
    // Far ends that are routed elsewhere, and associations that are not there, in between.
    let far_end = |number: u32| Ipv4Addr::new(192, 0, if number % 3 == 1 { 3 } else { 2 }, 9);
    let policies = (0..u32::try_from(MANY).unwrap() + 300).map(|number| {
        let destination = Ipv4Addr::from(0x0a02_0000 + number);
        let reqid = if number % 5 == 2 { 77 } else { number };
        let template = Template::esp_tunnel([192, 0, 2, 1].into(), far_end(number).into(), reqid);
        Policy { templates: [template].into(), ..offloaded("10.1.0.0/16", &format!("{destination}/32")) }
    });
    let policies: Vec<_> = policies.collect();
    let has_sa = |policy: &&Policy| policy.templates[0].reqid != 77;
    let sas = policies.iter().filter(has_sa).map(|policy| {
        let template = policy.templates[0];
        SecurityAssociation {
            offload: policy.offload,
            overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16)),
            ..SecurityAssociation::for_template(&template, template.reqid + 1)
        }
    });
    let snapshot = Snapshot { policies: policies.clone(), sas: sas.collect(), ..Snapshot::default() };
    let mut scene = Scene::new().routes("192.0.3.0/24", via(LAN));
    scene.after(PolicyEvent::Snapshot(snapshot)).compile();
    let assert_ways = |scene: &Scene, is_up: bool| {
        for (number, policy) in (0_u32..).zip(&policies) {
            let expected = match number {
                _ if number % 5 == 2 => Err(PassReason::NoSa),
                _ if number % 3 == 1 || !is_up => Err(PassReason::NoPath),
                _ => Ok(NIC),
            };
            let slot = scene.compiler.slot(&scene.database, &policy.id).expect("a slot");
            assert_eq!(scene.table.slots[&slot].map(|way| way.ifindex), expected, "{number}");
        }
    };
    assert_ways(&scene, true);
    let link = scene.host.links[0].clone();
    for is_up in [false, true] {
        scene.compiler.change_host(&HostChange::Link(Link { up: is_up, ..link.clone() }));
        let update = scene.compiler.compile(&scene.database);
        scene.table.apply(&update);
        assert_ways(&scene, is_up);
    }
}

#[test]
fn ipv6_in_an_ipv6_tunnel_is_fast_too() {
    let policy = offloaded("2001:db8:1::/48", "2001:db8:2::/48");
    let mut scene = Scene::new().has(policy.clone());
    assert_eq!(scene.fate("2001:db8:1::1", "2001:db8:2::1"), Ok(policy.id));
}

#[test]
fn host_bits_of_a_selector_do_not_matter_and_twins_shadow_each_other() {
    let policy = offloaded("10.1.0.5/16", "10.2.0.6/16");
    let mut scene = Scene::new().has(policy.clone());
    assert_eq!(scene.fate("10.1.2.3", "10.2.3.4"), Ok(policy.id));
    let mut scene = scene.has(to_peer(2, site()));
    assert_eq!(scene.reason("10.1.2.3", "10.2.3.4"), PassReason::Shadowed);
}

#[test]
fn a_shadowing_bypass_policy_keeps_the_packet_in_the_kernel() {
    let mut scene = Scene::new()
        .has(with_priority(10, site()))
        .has(with_priority(5, bypass("10.1.7.0/24", "10.2.0.0/16")));
    assert_eq!(scene.reason("10.1.7.1", "10.2.0.1"), PassReason::Shadowed);
    assert_eq!(scene.fate("10.1.8.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn a_worse_software_policy_does_not_disturb() {
    let mut scene = Scene::new()
        .has(with_priority(10, site()))
        .has(with_priority(20, tunnel("10.0.0.0/8", "10.0.0.0/8")));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    assert_eq!(scene.reason("10.1.0.1", "10.3.0.1"), PassReason::NotOffloaded);
}

#[test]
fn equal_priorities_are_a_tie_that_a_dump_does_not_decide() {
    let mut scene =
        Scene::new().has(with_priority(10, site())).has(with_priority(10, tunnel("0.0.0.0/0", "0.0.0.0/0")));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
}

/// Under another reqid, so with other associations.
fn to_peer(reqid: u32, mut policy: Policy) -> Policy {
    policy.templates.iter_mut().for_each(|template| template.reqid = reqid);
    policy
}

#[test]
fn r5_whichever_of_several_policies_of_one_tunnel_the_kernel_chooses_the_packet_is_fast() {
    // Subnets of one connection, as libreswan orders them; the kernel finds any of them first.
    let subnets = ["10.2.5.7/32", "10.2.5.0/24", "10.2.0.0/21", "10.2.0.0/16", "10.0.0.0/8"];
    let policies = (0..)
        .zip(subnets)
        .map(|(number, subnet)| with_priority(1_753_281 + 12 * number, offloaded("10.1.0.0/16", subnet)));
    let policies: Vec<Policy> = policies.collect();
    let mut scene = policies.iter().cloned().fold(Scene::new(), Scene::has);
    let fates = [("10.2.5.7", 0), ("10.2.5.8", 1), ("10.2.4.1", 2), ("10.2.9.1", 3), ("10.9.0.1", 4)];
    for (destination, best) in fates {
        assert_eq!(scene.fate("10.1.0.1", destination), Ok(policies[best].id.clone()), "{destination}");
    }
    assert_eq!(scene.compiler.fast_policies(&scene.database), 5);
    // The order does not matter, so a snapshot does not either.
    scene.after(PolicyEvent::Snapshot(scene.database.snapshot()));
    assert_eq!(scene.fate("10.1.0.1", "10.2.5.7"), Ok(policies[0].id.clone()));
    scene.after(PolicyEvent::SaRemoved(association().id));
    assert_eq!(scene.reason("10.1.0.1", "10.2.5.7"), PassReason::NoSa);
}

#[test]
fn r5_a_policy_whose_packets_are_all_fast_for_an_equivalent_one_is_fast_and_has_no_slot() {
    let (narrow, wide) = (offloaded("10.1.7.0/24", "10.2.0.0/16"), with_priority(5, site()));
    let narrow = with_priority(10, narrow);
    let mut scene = Scene::new().has(narrow.clone()).has(wide.clone());
    assert_eq!(scene.fate("10.1.7.1", "10.2.0.1"), Ok(wide.id.clone()));
    let reports = scene.compiler.policies(&scene.database);
    let states: Vec<_> = reports.iter().map(|report| (&report.id, report.slot, report.state)).collect();
    assert_eq!(states, [(&wide.id, Some(Slot(0)), PolicyState::Fast), (&narrow.id, None, PolicyState::Fast)]);
}

#[test]
fn r5_policies_that_lead_elsewhere_or_end_at_another_time_are_not_equivalent() {
    let narrow = with_priority(20, offloaded("10.1.7.0/24", "10.2.0.0/16"));
    let template = |change: fn(&mut Template)| {
        let mut template = template();
        change(&mut template);
        Policy { templates: [template].into(), ..narrow.clone() }
    };
    let hop = Egress { next_hop: NextHop::Neighbour, ..Egress::default() };
    let others = [
        ("reqid", to_peer(2, narrow.clone())),
        ("spi", template(|template| template.spi = 0x100)),
        ("outer source", template(|template| template.source = [192, 0, 2, 9].into())),
        ("outer destination", template(|template| template.destination = [192, 0, 2, 3].into())),
        ("device", Policy { offload: Some(to(LAN, OffloadKind::Packet)), ..narrow.clone() }),
        ("next hop", Policy { egress: hop, ..narrow.clone() }),
        ("end", Policy { expires: Some(1_000), ..narrow.clone() }),
        ("bypass", Policy { templates: [].into(), ..narrow.clone() }),
        ("block", Policy { action: Action::Block, ..narrow.clone() }),
        ("use limit", Policy { use_limited: true, ..narrow.clone() }),
        ("interface", {
            let mut policy = narrow.clone();
            policy.id.selector.ifindex = NIC;
            policy
        }),
    ];
    for (why, other) in others {
        // The newest, so that no order helps.
        let mut scene = Scene::new().has(with_priority(10, site())).has(other);
        assert_eq!(scene.reason("10.1.7.1", "10.2.0.1"), PassReason::Shadowed, "{why}");
        assert_eq!(scene.fate("10.1.8.1", "10.2.0.1"), Ok(site().id), "{why}");
    }
}

#[test]
fn r5_equivalent_policies_take_the_speed_from_each_other_when_one_changes_and_give_it_back() {
    let narrow = with_priority(20, offloaded("10.1.7.0/24", "10.2.0.0/16"));
    let mut scene = Scene::new().has(with_priority(10, site())).has(narrow.clone());
    assert_eq!(scene.fate("10.1.7.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Policy(to_peer(2, narrow.clone())));
    assert_eq!(scene.reason("10.1.7.1", "10.2.0.1"), PassReason::Shadowed);
    assert_eq!(scene.fate("10.1.8.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Policy(narrow));
    assert_eq!(scene.fate("10.1.7.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn r5_equivalent_policies_beat_software_only_in_a_known_order() {
    let everything = with_priority(30, tunnel("0.0.0.0/0", "0.0.0.0/0"));
    let narrow = with_priority(20, offloaded("10.1.7.0/24", "10.2.0.0/16"));
    let mut scene = Scene::new().has(everything).has(with_priority(10, site())).has(narrow.clone());
    assert_eq!(scene.fate("10.1.7.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Snapshot(scene.database.snapshot()));
    assert_eq!(scene.reason("10.1.7.1", "10.2.0.1"), PassReason::Shadowed);
    scene.after(PolicyEvent::Policy(narrow.clone()));
    assert_eq!(scene.fate("10.1.7.1", "10.2.0.1"), Ok(site().id), "one that is told of is enough");
    let far_away = with_priority(30, offloaded("172.16.0.0/24", "172.16.1.0/24"));
    scene.after(PolicyEvent::Policy(far_away));
    assert_eq!(scene.reason("10.1.7.1", "10.2.0.1"), PassReason::Shadowed, "software may stand first");
}

#[test]
fn r2_a_forward_policy_lets_equivalent_policies_pass_and_one_with_ports_only_its_packets() {
    let narrow = with_priority(20, offloaded("10.1.7.0/24", "10.2.0.0/16"));
    let mut scene = Scene::new().has(with_priority(10, site())).has(narrow).has(ike(500));
    assert_eq!(scene.fate("10.1.7.1", "10.2.0.1"), Ok(site().id));
    let ike = Packet { destination_port: 500, ..packet("10.1.7.1", "10.2.0.1") };
    assert_eq!(scene.sends(&ike), Err(PassReason::Exception));
    let check = with_direction(Direction::Forward, tunnel("10.0.0.0/8", "10.0.0.0/8"));
    assert_eq!(scene.has(check).reason("10.1.7.1", "10.2.0.1"), PassReason::ForwardOrSubPolicy);
}

/// A default tunnel to one peer.
fn default_tunnel(priority: u32) -> Policy {
    to_peer(2, with_priority(priority, offloaded("10.1.0.0/16", "0.0.0.0/0")))
}

#[test]
fn r6_a_site_that_came_after_the_default_tunnel_is_fast() {
    let other_peer =
        SecurityAssociation { id: SaId { spi: 0x200, ..association().id }, reqid: 2, ..association() };
    let mut scene = Scene::new().has(default_tunnel(200)).has(with_priority(100, site()));
    scene.after(PolicyEvent::Sa(other_peer));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    assert_eq!(scene.fate("10.1.0.1", "10.3.0.1"), Ok(default_tunnel(200).id));
}

#[test]
fn r6b_the_newest_stands_first_and_every_update_makes_a_policy_the_newest() {
    let mut scene = Scene::new().has(with_priority(100, site())).has(default_tunnel(200));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed, "the default tunnel is newer");
    // A rekey that changes nothing that the fast path knows of.
    scene.after(PolicyEvent::Policy(with_priority(100, site())));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Policy(default_tunnel(200)));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    scene.after(PolicyEvent::Policy(with_priority(100, site())));
    scene.after(PolicyEvent::Snapshot(scene.database.snapshot()));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed, "a snapshot tells no ages");
    scene.after(PolicyEvent::Policy(with_priority(100, site())));
    assert_eq!(
        scene.fate("10.1.0.1", "10.2.0.1"),
        Ok(site().id),
        "what is in a snapshot is older than what is told"
    );
}

#[test]
fn r6a_the_newest_with_the_worse_number_or_an_equal_one_is_not_certain() {
    for priority in [100, 50] {
        let mut scene = Scene::new().has(default_tunnel(priority)).has(with_priority(100, site()));
        assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    }
    // One of its own way with a worse number is taken instead of it if it is in front, and loses to the default tunnel then.
    let worse = || with_priority(300, offloaded("10.1.0.0/16", "10.2.0.0/24"));
    let site = || with_priority(100, site());
    let mut in_front = Scene::new().has(default_tunnel(200)).has(site()).has(worse());
    assert_eq!(in_front.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    assert_eq!(in_front.fate("10.1.0.1", "10.2.1.1"), Ok(site().id));
    let mut behind = Scene::new().has(default_tunnel(200)).has(worse()).has(site());
    assert_eq!(behind.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn r6c_one_between_two_hosts_hides_newer_ones_that_are_wider() {
    let hosts = to_peer(2, with_priority(200, offloaded("10.1.0.1/32", "10.2.0.1/32")));
    let mut scene = Scene::new().has(hosts).has(with_priority(100, site()));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.2"), Ok(site().id));
}

#[test]
fn r6_worse_numbers_elsewhere_do_not_disturb_the_newest_and_best() {
    let wide = || with_priority(100, offloaded("10.0.0.0/8", "10.2.0.0/16"));
    let default = || to_peer(2, with_priority(200, offloaded("10.0.0.0/8", "0.0.0.0/0")));
    let mut scene = Scene::new().has(default()).has(wide());
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(wide().id));
    scene.after(PolicyEvent::Policy(with_priority(300, offloaded("172.16.0.0/12", "172.16.1.0/24"))));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(wide().id));
}

#[test]
fn r6c_a_prefix_of_the_unspecified_address_is_short_to_the_kernel_however_long_it_is() {
    let odd = with_priority(100, offloaded("::/96", "2001:db8:2::/48"));
    let default = to_peer(2, with_priority(200, offloaded("::/64", "2001:db8::/32")));
    let mut scene = Scene::new().has(default).has(odd);
    assert_eq!(scene.reason("::5:1", "2001:db8:2::1"), PassReason::Shadowed);
}

/// A snapshot of a source that has no kernel behind it.
fn by_priority(policies: &[Policy]) -> PolicyEvent {
    let sas = [Family::V4, Family::V6].map(association_of).into();
    PolicyEvent::Snapshot(Snapshot {
        policies: policies.to_vec(),
        sas,
        order: PolicyOrder::ByPriority,
        ..Snapshot::default()
    })
}

#[test]
fn r7_where_priority_alone_decides_the_best_is_fast_whatever_its_age_and_a_tie_passes() {
    let best = with_priority(10, site());
    let mut scene = Scene::new();
    scene.after(by_priority(&[
        with_priority(20, tunnel("10.0.0.0/8", "10.0.0.0/8")),
        best.clone(),
        default_tunnel(15),
        with_priority(99, offloaded("172.16.0.0/24", "172.16.1.0/24")),
    ]));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Policy(default_tunnel(10)));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    scene.after(PolicyEvent::Policy(to_peer(1, default_tunnel(10))));
    assert!(scene.fate("10.1.0.1", "10.2.0.1").is_ok(), "both lead the same way");
    scene.after(PolicyEvent::Policy(with_priority(10, tunnel("10.0.0.0/8", "10.0.0.0/8"))));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    scene.after(by_priority(&[with_priority(20, tunnel("10.0.0.0/8", "10.0.0.0/8")), best]));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    // The kernel's order again.
    let told = Snapshot { order: PolicyOrder::Kernel, ..scene.database.snapshot() };
    scene.after(PolicyEvent::Snapshot(told));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
}

#[test]
fn a_tunnel_from_an_address_that_the_host_has_lost_is_no_path() {
    let mut scene = Scene::new().has(site());
    assert!(scene.fate("10.1.0.1", "10.2.0.1").is_ok());
    scene.host.routes.retain(|route| route.kind != RouteKind::Local);
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath);
    assert_eq!(
        explanation(&mut scene, "10.1.0.1", "10.2.0.1"),
        "kernel (no_path): the tunnel of out 10.1.0.0/16 → 10.2.0.0/16 begins at 192.0.2.1, which is not an address of \
         this host"
    );
    let mut ipv6 = Scene::new().has(offloaded("2001:db8:1::/48", "2001:db8:2::/48"));
    assert!(ipv6.fate("2001:db8:1::1", "2001:db8:2::1").is_ok(), "IPv6 does not ask");
}

#[test]
fn a_loser_better_than_some_offloaded_policy_elsewhere_keeps_the_packet_in_the_kernel() {
    let far_away = with_priority(30, offloaded("172.16.0.0/24", "172.16.1.0/24"));
    let mut scene = Scene::new()
        .has(with_priority(10, site()))
        .has(with_priority(30, tunnel("10.0.0.0/8", "10.0.0.0/8")))
        .has(far_away.clone());
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    assert_eq!(scene.database.highest_offloaded_priority(Family::V4), Some(30));
    // While it was there, the kernel may have put the loser before the winner.
    scene.after(PolicyEvent::PolicyRemoved(far_away.id));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    // One that is added when no other is offloaded stands before all that are not.
    scene.after(PolicyEvent::PolicyRemoved(site().id));
    scene.after(PolicyEvent::Policy(with_priority(10, site())));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn a_loser_that_was_offloaded_itself_keeps_the_packet_in_the_kernel() {
    // An update leaves it where it stands: at the head, before the older winner.
    let loser = with_priority(30, offloaded("10.1.0.0/24", "10.2.0.0/24"));
    let mut scene = Scene::new().has(with_priority(10, site())).has(loser.clone());
    scene.after(PolicyEvent::Policy(Policy { offload: None, ..loser.clone() }));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    // With a higher number it would have gone behind.
    scene.after(PolicyEvent::Policy(Policy { offload: None, priority: 31, ..loser }));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn policies_of_a_snapshot_stand_in_an_order_that_nobody_knows() {
    let loser = with_priority(20, tunnel("10.0.0.0/8", "10.0.0.0/8"));
    let mut scene = Scene::new().has(with_priority(10, site())).has(loser.clone());
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Snapshot(scene.database.snapshot()));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
    // A rekey puts it to the head again.
    scene.after(PolicyEvent::Policy(with_priority(10, site())));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    // Where nothing else matches, the order does not matter.
    scene.after(PolicyEvent::PolicyRemoved(loser.id));
    scene.after(PolicyEvent::Snapshot(scene.database.snapshot()));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn an_offloaded_policy_with_ports_counts_for_the_highest_priority_too() {
    let mut with_ports = with_priority(30, offloaded("172.16.0.0/24", "172.16.1.0/24"));
    with_ports.id.selector.protocol = 6;
    let mut scene = Scene::new()
        .has(with_priority(10, site()))
        .has(with_priority(20, tunnel("10.0.0.0/8", "10.0.0.0/8")))
        .has(with_ports);
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::Shadowed);
}

#[test]
fn policies_of_the_other_family_do_not_matter() {
    let mut scene = Scene::new()
        .has(with_priority(10, site()))
        .has(with_priority(20, tunnel("10.0.0.0/8", "10.0.0.0/8")))
        .has(with_priority(30, offloaded("2001:db8:1::/48", "2001:db8:2::/48")));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn a_forward_policy_or_a_sub_policy_is_for_the_kernel_to_check_and_an_inbound_one_is_not_asked() {
    let everything = || with_priority(99, tunnel("0.0.0.0/0", "0.0.0.0/0"));
    let sub = Policy { id: PolicyId { policy_type: PolicyType::Sub, ..everything().id }, ..everything() };
    let mut forward = Scene::new().has(site()).has(with_direction(Direction::Forward, everything()));
    assert_eq!(forward.reason("10.1.0.1", "10.2.0.1"), PassReason::ForwardOrSubPolicy);
    let mut with_sub = Scene::new().has(site()).has(sub);
    assert_eq!(with_sub.reason("10.1.0.1", "10.2.0.1"), PassReason::ForwardOrSubPolicy);
    let inbound = Policy { action: Action::Block, ..with_direction(Direction::In, everything()) };
    let mut inbound = Scene::new().has(site()).has(inbound);
    assert_eq!(inbound.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn a_longer_route_opens_no_hole_in_what_a_forward_policy_is_about() {
    let wide = offloaded("10.0.0.0/8", "10.2.7.0/24");
    let mut scene = Scene::new()
        .has(wide.clone())
        .has(with_direction(Direction::Forward, tunnel("10.1.0.0/16", "10.2.0.0/16")))
        .routes("10.1.5.0/24", via(LAN));
    assert_eq!(scene.fate("10.3.0.1", "10.2.7.1"), Ok(wide.id));
    assert_eq!(scene.reason("10.1.0.1", "10.2.7.1"), PassReason::Guarded);
    assert_eq!(scene.reason("10.1.5.1", "10.2.7.1"), PassReason::Guarded);
    assert_eq!(scene.reason("10.1.5.1", "10.2.8.1"), PassReason::ForwardOrSubPolicy);
}

#[test]
fn without_a_live_association_on_the_device_nothing_is_fast() {
    let mut scene = Scene::new().has(site());
    scene.after(PolicyEvent::SaRemoved(association().id));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoSa);

    let mut larval = association();
    larval.id.spi = 0;
    let elsewhere = SecurityAssociation { offload: Some(to(LAN, OffloadKind::Packet)), ..association() };
    let crypto = SecurityAssociation { offload: Some(to(NIC, OffloadKind::Crypto)), ..association() };
    let other_reqid = SecurityAssociation { reqid: 9, ..association() };
    for useless in [larval, elsewhere, crypto, other_reqid] {
        scene.after(PolicyEvent::Sa(useless));
        assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoSa);
    }
    scene.after(PolicyEvent::Sa(association()));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::SasFlushed(0));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoSa);
    assert_eq!(scene.compiler.policies(&scene.database)[0].state, PolicyState::Pass(PassReason::NoSa));
}

#[test]
fn an_association_with_a_selector_serves_policies_inside_it_and_an_explanation_names_it_otherwise() {
    let between = |source: &str, destination: &str| {
        let prefix = |text: &str| text.parse().unwrap();
        SecurityAssociation {
            selector: Some(Selector::between(prefix(source), prefix(destination)).unwrap()),
            ..association()
        }
    };
    let mut scene = Scene::new().has(site());
    scene.after(PolicyEvent::Sa(between("10.1.0.5/16", "10.0.0.0/8")));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    scene.after(PolicyEvent::Sa(between("10.1.0.5/24", "10.2.0.9/24")));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoSa);
    assert_eq!(
        explanation(&mut scene, "10.1.0.1", "10.2.0.1"),
        "kernel (no_sa): the SA of out 10.1.0.0/16 → 10.2.0.0/16 (dst 192.0.2.2 proto 50 spi 0x00000100) is for \
         10.1.0.5/24 → 10.2.0.9/24 only, which is not all of its packets"
    );
}

#[test]
fn a_policy_that_the_fast_path_cannot_stand_in_for_passes() {
    let id = |change: fn(&mut PolicyId)| {
        let mut policy = site();
        change(&mut policy.id);
        policy
    };
    let templates =
        |templates: &[Template]| Policy { templates: templates.iter().copied().collect(), ..site() };
    let not_offloaded = [
        ("software", tunnel("10.1.0.0/16", "10.2.0.0/16")),
        ("crypto offload", Policy { offload: Some(to(NIC, OffloadKind::Crypto)), ..site() }),
        ("offloaded bypass", templates(&[])),
        ("offloaded block", Policy { action: Action::Block, ..site() }),
    ];
    let ineligible = [
        ("mark", id(|id| id.mark = Mark { value: 1, mask: 1 })),
        ("mark that matches 0", id(|id| id.mark = Mark { value: 0, mask: 1 })),
        ("interface id", id(|id| id.if_id = 1)),
        ("security context", id(|id| id.security_context = [1].into())),
        ("interface", id(|id| id.selector.ifindex = NIC)),
        ("use limit", Policy { use_limited: true, ..site() }),
        ("associations per processor", Policy { asks_per_cpu: true, ..site() }),
        ("two templates", templates(&[template(), template()])),
        ("transport mode", templates(&[Template { mode: Mode::Transport, ..template() }])),
        ("AH", templates(&[Template { protocol: 51, ..template() }])),
        ("optional", templates(&[Template { optional: true, ..template() }])),
        ("outer addresses of the other family", templates(&[template_of(Family::V6)])),
    ];
    for (policies, reason) in
        [(&not_offloaded[..], PassReason::NotOffloaded), (&ineligible[..], PassReason::Ineligible)]
    {
        for (why, policy) in policies {
            let mut scene = Scene::new().has(policy.clone());
            assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), reason, "{why}");
        }
    }
}

#[test]
fn a_policy_with_a_mark_still_shadows() {
    let mut marked = with_priority(5, tunnel("10.1.7.0/24", "10.2.0.0/16"));
    marked.id.mark = Mark { value: 1, mask: 1 };
    let mut scene = Scene::new().has(with_priority(10, site())).has(marked);
    assert_eq!(scene.reason("10.1.7.1", "10.2.0.1"), PassReason::Shadowed);
}

#[test]
fn a_default_of_block_keeps_everything_in_the_kernel() {
    for default_policy in [
        DefaultPolicy { forward: Action::Block, ..DefaultPolicy::default() },
        DefaultPolicy { outbound: Action::Block, ..DefaultPolicy::default() },
    ] {
        let mut scene = Scene::new().has(site());
        scene.after(PolicyEvent::DefaultPolicy(default_policy));
        assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::DefaultBlock);
    }
    let mut scene = Scene::new().has(site());
    let default_policy = DefaultPolicy { inbound: Action::Block, ..DefaultPolicy::default() };
    scene.after(PolicyEvent::DefaultPolicy(default_policy));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
}

#[test]
fn a_database_that_is_not_current_compiles_to_nothing_and_keeps_the_slots() {
    let mut scene = Scene::new().has(site());
    scene.compile();
    let slot = scene.compiler.slot(&scene.database, &site().id);
    scene.after(PolicyEvent::Stale(StaleCause::Overrun));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPolicy);
    assert_eq!(scene.compiler.policies(&scene.database)[0].state, PolicyState::Pass(PassReason::Disabled));
    assert_eq!(
        (scene.compiler.slot(&scene.database, &site().id), scene.compiler.fast_policies(&scene.database)),
        (slot, 0)
    );
    let snapshot = scene.database.snapshot();
    scene.after(PolicyEvent::Snapshot(snapshot));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    assert_eq!(scene.compiler.slot(&scene.database, &site().id), slot);

    let mut compiler = Compiler::new(AMPLE);
    let mut unknown = Database::default();
    unknown.apply(PolicyEvent::Policy(site()));
    assert!(compiler.compile(&unknown).is_empty());
}

fn ike(port: u16) -> Policy {
    let mut policy = with_priority(1, bypass("0.0.0.0/0", "0.0.0.0/0"));
    policy.id.selector.protocol = 17;
    policy.id.selector.destination_port = PortMatch::exactly(port);
    policy
}

#[test]
fn a_bypass_for_ike_keeps_ike_in_the_kernel_and_nothing_else() {
    let mut scene = Scene::new().has(with_priority(10, site())).has(ike(500)).has(ike(4500));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    for port in [500, 4500] {
        let ike = Packet { destination_port: port, ..packet("10.1.0.1", "10.2.0.1") };
        assert_eq!(scene.sends(&ike), Err(PassReason::Exception));
    }
    let offloaded_bypass = Policy { offload: Some(to(NIC, OffloadKind::Packet)), ..ike(500) };
    let mut scene = Scene::new().has(with_priority(10, site())).has(offloaded_bypass);
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    assert_eq!(scene.compiler.policies(&scene.database)[0].state, PolicyState::Pass(PassReason::Exception));
}

#[test]
fn an_exception_that_does_not_fit_keeps_its_whole_region_in_the_kernel() {
    let mut narrow = ike(500);
    narrow.id.selector.destination = "10.2.7.0/24".parse().unwrap();
    let mut scene = Scene::with_capacity(Capacity { exceptions: 1, ..AMPLE })
        .has(with_priority(10, site()))
        .has(narrow)
        .has(ike(500));
    assert_eq!(scene.reason("10.1.0.1", "10.2.7.1"), PassReason::Capacity);
    assert_eq!(scene.fate("10.1.0.1", "10.2.8.1"), Ok(site().id), "the widest exception has the place");
    let ike = Packet { destination_port: 500, ..packet("10.1.0.1", "10.2.8.1") };
    assert_eq!(scene.sends(&ike), Err(PassReason::Exception));
}

#[test]
fn a_policy_without_a_free_slot_passes_until_one_is_freed() {
    let other = offloaded("10.1.0.0/16", "10.9.0.0/16");
    let mut scene = Scene::with_capacity(Capacity { slots: 1, ..AMPLE }).has(site()).has(other.clone());
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    assert_eq!(scene.reason("10.1.0.1", "10.9.0.1"), PassReason::Capacity);
    scene.after(PolicyEvent::PolicyRemoved(site().id));
    assert_eq!(scene.fate("10.1.0.1", "10.9.0.1"), Ok(other.id));
}

#[test]
fn a_freed_slot_is_freed_in_the_update_before_it_is_filled_again() {
    let other = offloaded("10.1.0.0/16", "10.9.0.0/16");
    let mut scene = Scene::with_capacity(Capacity { slots: 1, ..AMPLE }).has(site());
    scene.compile();
    scene.after(PolicyEvent::PolicyRemoved(site().id)).after(PolicyEvent::Policy(other));
    let update = scene.compiler.compile(&scene.database);
    let forwarding = Forwarding { ifindex: NIC, max_length: 1446, rewrite: None };
    assert_eq!(update.slots, [(Slot(0), None), (Slot(0), Some(Ok(forwarding)))]);
}

#[test]
fn a_policy_keeps_its_slot_while_it_exists_and_slots_are_reused_oldest_first() {
    let sites: Vec<_> = (1..=4).map(|n| offloaded("10.1.0.0/16", &format!("10.2.{n}.0/24"))).collect();
    let mut scene = Scene::with_capacity(Capacity { slots: 3, ..AMPLE });
    for site in &sites[..3] {
        scene.after(PolicyEvent::Policy(site.clone()));
    }
    scene.compile();
    let slots: Vec<_> =
        sites[..3].iter().map(|site| scene.compiler.slot(&scene.database, &site.id)).collect();
    assert_eq!(slots, [Some(Slot(0)), Some(Slot(1)), Some(Slot(2))]);

    scene.after(PolicyEvent::SaRemoved(association().id));
    scene.compile();
    assert_eq!(scene.compiler.slot(&scene.database, &sites[1].id), Some(Slot(1)), "not fast, but there");
    scene.after(PolicyEvent::Sa(association())).after(PolicyEvent::PolicyRemoved(sites[1].id.clone()));
    scene.compile();
    scene.after(PolicyEvent::PolicyRemoved(sites[0].id.clone()));
    scene.compile();
    scene.after(PolicyEvent::Policy(sites[3].clone()));
    scene.compile();
    assert_eq!(scene.compiler.slot(&scene.database, &sites[3].id), Some(Slot(1)));
}

#[test]
fn a_slot_is_told_with_the_kernels_index_of_its_policy_and_again_when_that_changes() {
    let indexed = |index| Policy { index, ..site() };
    let mut scene = Scene::new().has(indexed(81));
    let compile = |scene: &mut Scene| scene.compiler.compile(&scene.database);
    assert_eq!(compile(&mut scene).owners, [(Slot(0), 81)]);
    scene.after(PolicyEvent::SaRemoved(association().id));
    let update = compile(&mut scene);
    assert_eq!((update.len(), update.owners), (1, vec![]), "a lost association is one write");
    scene.after(PolicyEvent::PolicyRemoved(site().id)).after(PolicyEvent::Policy(indexed(89)));
    assert_eq!(compile(&mut scene).owners.last().map(|(_, index)| *index), Some(89));
}

#[test]
fn cells_that_do_not_fit_pass_and_so_do_the_wider_ones_that_would_catch_their_packets() {
    let narrow = |n: u8| with_priority(5, bypass("10.1.0.0/16", &format!("10.2.{n}.0/24")));
    let capacity = Capacity { tuples: 1, ..AMPLE };
    let mut scene = Scene::with_capacity(capacity).has(with_priority(10, site())).has(narrow(7));
    assert_ne!(scene.fate("10.1.0.1", "10.2.7.1"), Ok(site().id));
    let mut scene = scene.has(narrow(8));
    assert_eq!(scene.reason("10.1.0.1", "10.2.7.1"), PassReason::Shadowed, "the larger tuple is kept");
    assert_eq!(scene.reason("10.1.0.1", "10.2.9.1"), PassReason::NoPolicy, "the wide cell was left out");

    let wide = |n: u8| offloaded(&format!("10.{n}.0.0/16"), "10.2.0.0/16");
    let mut scene = Scene::with_capacity(capacity).has(wide(3)).has(wide(4)).has(narrow(7));
    scene.after(PolicyEvent::Policy(with_priority(5, bypass("10.3.0.0/16", "10.2.7.0/24"))));
    scene.after(PolicyEvent::PolicyRemoved(narrow(7).id));
    assert_eq!(scene.reason("10.3.0.1", "10.2.7.1"), PassReason::Capacity);
    assert_eq!(scene.reason("10.3.0.1", "10.2.8.1"), PassReason::Capacity);
    assert_eq!(scene.fate("10.4.0.1", "10.2.7.1"), Ok(wide(4).id), "it has no part in what was left out");
}

#[test]
fn sources_of_covering_destinations_that_do_not_fit_let_the_region_pass() {
    let mut scene = Scene::with_capacity(Capacity { cells_v4: 12, cells_v6: 12, ..AMPLE })
        .has(offloaded("10.0.0.0/8", "10.2.7.0/24"));
    for n in 0..10 {
        scene.after(PolicyEvent::Policy(offloaded(&format!("10.1.{n}.0/24"), "10.2.0.0/16")));
    }
    assert_eq!(scene.reason("10.1.3.1", "10.2.7.1"), PassReason::Capacity);
    assert_eq!(scene.reason("10.9.0.1", "10.2.7.1"), PassReason::Capacity);
    assert_eq!(scene.fate("10.1.3.1", "10.2.8.1"), Ok(offloaded("10.1.3.0/24", "10.2.0.0/16").id));
}

#[test]
fn a_policy_for_which_the_table_has_no_cell_is_explained_by_that() {
    let mut scene = Scene::with_capacity(Capacity { cells_v4: 1, cells_v6: 1, ..AMPLE });
    for n in 0..3 {
        scene.after(PolicyEvent::Policy(offloaded("10.1.0.0/16", &format!("10.{}.0.0/16", 2 + n))));
    }
    let told = (2..5).map(|n| explanation(&mut scene, "10.1.0.1", &format!("10.{n}.0.1")));
    let told: Vec<String> = told.filter(|told| told.contains("no_policy")).collect();
    assert!(!told.is_empty() && told.iter().all(|told| told.contains("has no room")), "{told:?}");
    let unknown = explanation(&mut scene, "10.1.0.1", "10.9.0.1");
    assert!(unknown.contains("no policy matches"), "{unknown}");
}

#[test]
fn host_facts_that_do_not_fit_let_the_cells_that_need_them_pass() {
    for capacity in [Capacity { fact_lengths: 1, ..AMPLE }, Capacity { cells_v4: 3, cells_v6: 3, ..AMPLE }] {
        let clean = offloaded("10.1.0.0/16", "10.9.0.0/16");
        let mut scene = Scene::with_capacity(capacity)
            .has(site())
            .has(clean.clone())
            .routes("10.2.0.1/32", RouteKind::Local)
            .routes("10.2.1.0/24", RouteKind::Blackhole);
        assert_eq!(scene.reason("10.1.0.1", "10.2.3.1"), PassReason::Capacity);
        assert_eq!(scene.fate("10.1.0.1", "10.9.0.1"), Ok(clean.id));
        assert_eq!(scene.table.facts.len(), 0);
    }
}

#[test]
fn own_and_unroutable_addresses_inside_a_policy_stay_with_the_kernel() {
    let mut scene = Scene::new()
        .has(site())
        .routes("10.2.0.1/32", RouteKind::Local)
        .routes("10.2.0.255/32", RouteKind::Broadcast)
        .routes("10.2.1.0/24", RouteKind::Blackhole)
        .routes("10.2.1.8/32", via(NIC))
        .routes("10.2.2.0/24", via(LAN))
        .routes("10.2.3.0/24", RouteKind::Unclear)
        .routes("10.200.0.0/16", RouteKind::Blackhole);
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.2"), Ok(site().id));
    assert_eq!(scene.fate("10.1.0.1", "10.2.1.8"), Ok(site().id));
    for denied in ["10.2.0.1", "10.2.0.255", "10.2.1.1", "10.2.3.1"] {
        assert_eq!(scene.reason("10.1.0.1", denied), PassReason::DeniedDestination, "{denied}");
    }
    assert_eq!(scene.reason("10.1.0.1", "10.2.2.1"), PassReason::RouteElsewhere);
    let facts: Vec<_> = scene.table.facts.keys().map(|(_, prefix)| prefix.to_string()).collect();
    assert!(!facts.contains(&"10.200.0.0/16".to_owned()), "no policy is about it: {facts:?}");
}

#[test]
fn a_policy_that_is_denied_or_routed_elsewhere_as_a_whole_needs_no_lookup() {
    for (kind, reason) in [
        (RouteKind::Unreachable, PassReason::DeniedDestination),
        (RouteKind::Prohibit, PassReason::DeniedDestination),
        (RouteKind::Throw, PassReason::DeniedDestination),
        (RouteKind::Multicast, PassReason::DeniedDestination),
        (RouteKind::Anycast, PassReason::DeniedDestination),
        (via(LAN), PassReason::RouteElsewhere),
    ] {
        let mut scene = Scene::new().has(site()).routes("10.0.0.0/8", kind);
        assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), reason, "{kind:?}");
        assert_eq!(scene.table.facts.len(), 0);
    }
    let mut scene = Scene::new().has(site());
    scene.host.routes = vec![route("192.0.2.0/24", via(NIC))];
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::DeniedDestination, "there is no route");
}

#[test]
fn a_route_with_a_length_limit_of_its_own_stays_with_the_kernel() {
    let limited = |mtu| RouteKind::Unicast { ifindex: NIC, gateway: None, mtu: Some(mtu) };
    let mut scene = Scene::new().has(site()).routes("10.2.0.0/16", limited(1200));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::DeniedDestination);
    let mut scene = Scene::new().has(site()).routes("10.2.0.0/16", limited(1500));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id), "the device allows no more either");
}

fn learnt(destination: &str, mtu: u32) -> PathMtu {
    PathMtu { destination: destination.parse().unwrap(), mtu }
}

#[test]
fn an_address_with_a_learnt_path_mtu_stays_with_the_kernel_and_nothing_else_does() {
    let mut scene = Scene::new().has(site());
    scene.host.path_mtus =
        vec![learnt("10.2.0.9", 1300), learnt("10.2.0.10", 1500), learnt("10.1.0.5", 1300)];
    assert_eq!(scene.reason("10.1.0.5", "10.2.0.9"), PassReason::DeniedDestination);
    assert_eq!(scene.fate("10.1.0.5", "10.2.0.8"), Ok(site().id));
    assert_eq!(scene.fate("10.1.0.5", "10.2.0.10"), Ok(site().id), "the device takes no longer ones either");
    assert_eq!(scene.fate("10.2.0.9", "10.1.0.5"), Err(PassReason::NoPolicy));
    let text = explanation(&mut scene, "10.1.0.5", "10.2.0.9");
    assert!(text.contains("path MTU of 1300 has been learnt for 10.2.0.9"), "{text}");

    // A shorter MTU of the route makes no difference, nor does another reason.
    scene.host.routes.push(route("10.2.0.9/32", RouteKind::Blackhole));
    let text = explanation(&mut scene, "10.1.0.5", "10.2.0.9");
    assert!(text.contains("unroutable"), "{text}");
}

#[test]
fn a_path_mtu_comes_and_goes_with_the_cells_of_its_address() {
    let mut scene = Scene::new().has(site()).has(offloaded("10.1.0.0/16", "10.3.0.9/32"));
    scene.compile();
    let change = |scene: &mut Scene, change: HostChange| {
        scene.compiler.change_host(&change);
        let update = scene.compiler.compile(&scene.database);
        scene.table.apply(&update);
        update
    };
    let update = change(&mut scene, HostChange::PathMtu(learnt("10.2.0.9", 1300)));
    // The cell looks destinations up from now on: those of the prefix, and of the address.
    assert_eq!((update.cells.len(), update.facts.len(), update.slots.len()), (1, 2, 0));
    assert_eq!(scene.table.decide(&packet("10.1.0.5", "10.2.0.9")), Err(PassReason::DeniedDestination));
    let update = change(&mut scene, HostChange::PathMtu(learnt("10.2.0.10", 1300)));
    assert_eq!((update.cells.len(), update.facts.len()), (0, 1), "{update:?}");
    let update = change(&mut scene, HostChange::PathMtu(learnt("10.2.0.10", 1200)));
    assert!(update.is_empty(), "as before: {update:?}");
    let update = change(&mut scene, HostChange::PathMtu(learnt("10.3.0.9", 1300)));
    assert_eq!((update.cells.len(), update.facts.len()), (1, 0), "the whole cell passes: {update:?}");
    let update = change(&mut scene, HostChange::PathMtu(learnt("172.16.0.9", 1300)));
    assert!(update.is_empty(), "in no policy: {update:?}");
    for address in ["10.2.0.9", "10.2.0.10", "10.3.0.9", "172.16.0.9"] {
        change(&mut scene, HostChange::PathMtuGone(address.parse().unwrap()));
    }
    assert_eq!(scene.table.facts.len(), 0, "{:?}", scene.table.facts);
    assert!(["10.2.0.9", "10.3.0.9"].iter().all(|to| scene.table.decide(&packet("10.1.0.5", to)).is_ok()));
}

#[test]
fn a_device_with_another_mtu_may_take_what_a_path_mtu_kept_back() {
    let mut scene = Scene::new().has(site());
    scene.host.path_mtus = vec![learnt("10.2.0.9", 1300)];
    scene.compile();
    for (mtu, is_fast) in [(1300, true), (1400, false)] {
        let link = Link { mtu, ..scene.link(NIC).clone() };
        scene.compiler.change_host(&HostChange::Link(link));
        let update = scene.compiler.compile(&scene.database);
        scene.table.apply(&update);
        assert_eq!(scene.table.decide(&packet("10.1.0.5", "10.2.0.9")).is_ok(), is_fast, "{mtu}");
    }
}

#[test]
fn a_path_mtu_of_the_outer_destination_limits_the_longest_packet() {
    let mut scene = Scene::new().has(site());
    let mut longest = |change: Option<HostChange>| {
        match change {
            None => scene.compiler.set_host(&scene.host),
            Some(change) => scene.compiler.change_host(&change),
        }
        let update = scene.compiler.compile(&scene.database);
        scene.table.apply(&update);
        assert!(update.cells.is_empty() || update.slots.len() == 1, "{update:?}");
        scene.table.slots.values().next().and_then(|standing| standing.ok()).map(|way| way.max_length)
    };
    assert_eq!(longest(None), Some(1446));
    assert_eq!(longest(Some(HostChange::PathMtu(learnt("192.0.2.2", 1300)))), Some(1246));
    assert_eq!(longest(Some(HostChange::PathMtu(learnt("192.0.2.3", 1200)))), Some(1246), "another's");
    assert_eq!(longest(Some(HostChange::PathMtu(learnt("192.0.2.2", 2000)))), Some(1446));
    // Nothing is known about the other family.
    assert_eq!(longest(Some(HostChange::UnclearPathMtus(vec![Family::V6]))), Some(1446));
    // No longer than any path MTU may be, neither inside nor outside.
    let unclear = longest(Some(HostChange::UnclearPathMtus(vec![Family::V4, Family::V6])));
    assert!(unclear.is_none_or(|longest| longest <= 68 - 54), "{unclear:?}");
    assert_eq!(longest(Some(HostChange::UnclearPathMtus(Vec::new()))), Some(1446));
}

#[test]
fn while_path_mtus_are_unclear_short_ipv6_packets_are_fast() {
    let mut scene = Scene::new().has(offloaded("2001:db8:1::/48", "2001:db8:2::/48"));
    scene.host.unclear_path_mtus = vec![Family::V6];
    let longest = forwarding(&mut scene).map(|way| way.max_length);
    assert_eq!(longest, Some(1206), "1280 without the overhead");
    // The embedder answers for the host.
    scene.host.vouched = true;
    assert_eq!(forwarding(&mut scene).map(|way| way.max_length), Some(1426));
}

#[test]
fn packets_from_own_addresses_stay_with_the_kernel() {
    let mut scene = Scene::new().has(site()).routes("10.1.0.1/32", RouteKind::Local);
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::DeniedSource);
    assert_eq!(scene.fate("10.1.0.2", "10.2.0.1"), Ok(site().id));
    let mut scene = Scene::new().has(site()).routes("10.1.0.0/16", RouteKind::Local);
    assert_eq!(scene.reason("10.1.0.2", "10.2.0.1"), PassReason::DeniedSource);
    assert_eq!(scene.table.facts.len(), 0, "the whole policy passes, so there is nothing to look up");
}

#[test]
fn packets_from_an_own_address_stay_with_the_kernel_though_no_route_says_that_it_is_one() {
    let mut scene = Scene::new().has(site()).has(offloaded("2001:db8:1::/48", "2001:db8:2::/48"));
    scene.compile();
    let own = |text: &str| text.parse().unwrap();
    let change = |scene: &mut Scene, change: HostChange| {
        scene.compiler.change_host(&change);
        let update = scene.compiler.compile(&scene.database);
        scene.table.apply(&update);
        update
    };
    change(&mut scene, HostChange::Address(own("10.1.0.1")));
    assert_eq!(scene.table.decide(&packet("10.1.0.1", "10.2.0.1")), Err(PassReason::DeniedSource));
    assert!(scene.table.decide(&packet("10.1.0.2", "10.2.0.1")).is_ok());
    let update = change(&mut scene, HostChange::Address(own("10.1.0.1")));
    assert!(update.is_empty(), "as before: {update:?}");
    let update = change(&mut scene, HostChange::Address(own("10.9.0.1")));
    assert!(update.is_empty(), "a source of no policy: {update:?}");

    // A route that says the same, as most addresses have one, changes nothing.
    let (facts, prefix) = (scene.table.facts.len(), "10.1.0.1/32".parse().unwrap());
    let local = |routes: Vec<Route>| HostChange::Routes { table: 255, destination: prefix, routes };
    let update = change(&mut scene, local(vec![route("10.1.0.1/32", RouteKind::Local)]));
    assert!(update.is_empty(), "{update:?}");
    let update = change(&mut scene, HostChange::AddressGone(own("10.1.0.1")));
    assert!(update.is_empty(), "{update:?}");
    assert_eq!(scene.table.facts.len(), facts);
    change(&mut scene, local(Vec::new()));
    assert!(scene.table.decide(&packet("10.1.0.1", "10.2.0.1")).is_ok());
    assert_eq!(scene.table.facts.len(), 0, "{:?}", scene.table.facts);

    scene.host.addresses = vec![own("10.1.0.7")];
    assert_eq!(scene.reason("10.1.0.7", "10.2.0.1"), PassReason::DeniedSource);
    assert!(explanation(&mut scene, "10.1.0.7", "10.2.0.1").ends_with("(10.1.0.7/32)"));
}

#[test]
fn the_reverse_path_is_told_only_where_a_link_asks_for_it() {
    let mut scene =
        Scene::new().has(site()).routes("10.1.0.0/16", via(LAN)).routes("10.1.7.0/24", RouteKind::Unclear);
    scene.compile();
    assert_eq!(scene.table.facts.len(), 0);
    scene.link(LAN).reverse_path = ReversePath::Strict;
    scene.compile();
    let fact =
        |scene: &Scene, address: &str| scene.table.fact(Side::Source, address.parse::<IpAddr>().unwrap());
    assert_eq!(fact(&scene, "10.1.0.1"), Some(Fact::Via(LAN)));
    assert_eq!(fact(&scene, "10.1.7.1"), Some(Fact::Denied), "several ways back");
}

#[test]
fn policy_routing_and_unknown_routes_leave_everything_to_the_kernel() {
    let mut scene = Scene::new().has(site());
    scene.host.rules.push(Rule::new(Family::V4, 1, RuleSelector::default(), RuleAction::Unclear));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath);
    scene.host = HostFacts::default();
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath);
}

#[test]
fn an_embedder_may_answer_for_the_host() {
    let mut scene = Scene::new().has(site());
    scene.host = HostFacts::vouched();
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "how long may its packets be?");
    let egress = Egress { max_length: Some(1400), ..Egress::default() };
    scene.after(PolicyEvent::Policy(Policy { egress, ..site() }));
    assert_eq!(scene.fate("10.1.0.1", "10.2.0.1"), Ok(site().id));
    let down = Link { ifindex: NIC, up: false, carrier: true, mtu: 1500, ..Link::default() };
    scene.host.links.push(down);
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "what it does tell is heeded");
}

#[test]
fn a_device_that_cannot_send_or_bypasses_ipsec_is_no_path() {
    let changes: [(_, fn(&mut Link)); 4] = [
        ("down", |link| link.up = false),
        ("no carrier", |link| link.carrier = false),
        ("disable_xfrm", |link| link.bypasses_xfrm = true),
        ("gone", |link| link.ifindex = 99),
    ];
    for (why, change) in changes {
        let mut scene = Scene::new().has(site());
        change(scene.link(NIC));
        assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "{why}");
    }
}

#[test]
fn the_outer_destination_must_be_routed_through_the_policys_device() {
    let mut scene = Scene::new().has(site()).routes("192.0.2.0/24", via(LAN));
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath);
    let mut scene = Scene::new().has(site());
    scene.host.routes = vec![route("10.0.0.0/8", via(NIC))];
    assert_eq!(scene.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "there is no outer route");
}

#[test]
fn what_is_about_to_expire_is_switched_off_in_one_write() {
    let ages = SecurityAssociation { expires: Some(1000), ..association() };
    let mut scene = Scene::new().has(site());
    scene.after(PolicyEvent::Sa(ages.clone())).database.set_time(997);
    assert!(scene.fate("10.1.0.1", "10.2.0.1").is_ok());
    let compile = |scene: &mut Scene| {
        let update = scene.compiler.compile(&scene.database);
        scene.table.apply(&update);
        (update.slots.len(), update.cells.len() + update.facts.len())
    };
    for (now, fate) in [(998, Err(PassReason::NoSa)), (997, Ok(())), (2000, Err(PassReason::NoSa))] {
        assert!(scene.database.set_time(now));
        assert_eq!(compile(&mut scene), (1, 0), "one slot, no cell");
        assert_eq!(scene.table.decide(&packet("10.1.0.1", "10.2.0.1")).map(drop), fate, "at {now}");
    }
    // A rekey.
    let younger = SecurityAssociation { expires: Some(5000), ..ages };
    let younger = SecurityAssociation { id: SaId { spi: 0x200, ..younger.id }, ..younger };
    scene.after(PolicyEvent::Sa(younger));
    assert!(scene.fate("10.1.0.1", "10.2.0.1").is_ok());

    let mut scene = Scene::new().has(Policy { expires: Some(1000), ..site() });
    assert!(scene.fate("10.1.0.1", "10.2.0.1").is_ok());
    assert!(scene.database.set_time(999));
    assert_eq!(compile(&mut scene), (1, 0), "one slot, no cell");
    let flow = Flow::between("10.1.0.1".parse().unwrap(), "10.2.0.1".parse().unwrap());
    let explanation = scene.compiler.explain(&scene.database, &flow, None).to_string();
    assert!(explanation.contains("is about to expire"), "{explanation}");
}

/// How the packets of the only policy leave.
fn forwarding(scene: &mut Scene) -> Option<Forwarding> {
    scene.compile();
    let slot = scene.compiler.slot(&scene.database, &scene.compiler.policies(&scene.database)[0].id)?;
    scene.table.slots.get(&slot)?.ok()
}

#[test]
fn the_longest_packet_is_what_the_associations_leave_of_the_outer_path() {
    let longest = |scene: &mut Scene| forwarding(scene).map(|forwarding| forwarding.max_length);
    assert_eq!(longest(&mut Scene::new().has(site())), Some(1446));

    let narrow = RouteKind::Unicast { ifindex: NIC, gateway: None, mtu: Some(1400) };
    assert_eq!(longest(&mut Scene::new().has(site()).routes("192.0.2.0/24", narrow)), Some(1346));

    let mut rekeying = Scene::new().has(site());
    let mut longer = association();
    longer.id.spi += 1;
    longer.overhead = longer.overhead.map(|overhead| Overhead { header: overhead.header + 8, ..overhead });
    rekeying.after(PolicyEvent::Sa(longer.clone()));
    assert_eq!(longest(&mut rekeying), Some(1438));
    rekeying.after(PolicyEvent::Sa(SecurityAssociation { overhead: None, ..longer }));
    assert_eq!(rekeying.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "one of them is not known");

    let ipv6 = || Scene::new().has(offloaded("2001:db8:1::/48", "2001:db8:2::/48"));
    assert_eq!(longest(&mut ipv6()), Some(1426));
    let mut device = ipv6();
    device.link(NIC).mtu_v6 = 1300;
    assert_eq!(longest(&mut device), Some(1226));

    let egress = Egress { max_length: Some(700), ..Egress::default() };
    assert_eq!(longest(&mut Scene::new().has(Policy { egress, ..site() })), Some(700));
}

#[test]
fn the_next_hop_is_the_devices_the_given_one_or_the_kernels_neighbour() {
    let rewrite = |scene: &mut Scene| forwarding(scene).map(|forwarding| forwarding.rewrite);
    let hop = |next_hop| Policy { egress: Egress { next_hop, ..Egress::default() }, ..site() };
    let fixed = NextHop::Fixed { source: ROUTER_MAC, destination: NIC_MAC };
    assert_eq!(rewrite(&mut Scene::new().has(site())), Some(None));
    assert_eq!(rewrite(&mut Scene::new().has(hop(fixed))), Some(Some((ROUTER_MAC, NIC_MAC))));

    let neighbour = |ifindex, destination: &str| Neighbour {
        ifindex,
        destination: destination.parse().unwrap(),
        address: ROUTER_MAC,
    };
    let mut on_link = Scene::new().has(hop(NextHop::Neighbour));
    assert_eq!(on_link.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "nobody knows the neighbour");
    on_link.host.neighbours.push(neighbour(LAN, "192.0.2.2"));
    assert_eq!(on_link.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath, "that is on another device");
    on_link.host.neighbours.push(neighbour(NIC, "192.0.2.2"));
    assert_eq!(rewrite(&mut on_link), Some(Some((NIC_MAC, ROUTER_MAC))));

    let gateway = Some("192.0.2.254".parse().unwrap());
    let routed = RouteKind::Unicast { ifindex: NIC, gateway, mtu: None };
    let mut behind_a_gateway = Scene::new().has(hop(NextHop::Neighbour)).routes("192.0.2.0/24", routed);
    behind_a_gateway.host.neighbours.push(neighbour(NIC, "192.0.2.2"));
    assert_eq!(behind_a_gateway.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath);
    behind_a_gateway.host.neighbours.push(neighbour(NIC, "192.0.2.254"));
    assert_eq!(rewrite(&mut behind_a_gateway), Some(Some((NIC_MAC, ROUTER_MAC))));

    // Which of several is not known, and does not matter if the device finds it.
    let several = RouteKind::Unicast { ifindex: NIC, gateway: Some(Ipv4Addr::UNSPECIFIED.into()), mtu: None };
    let mut behind_several = Scene::new().has(hop(NextHop::Neighbour)).routes("192.0.2.0/24", several);
    behind_several.host.neighbours.extend(["192.0.2.2", "0.0.0.0"].map(|address| neighbour(NIC, address)));
    assert_eq!(behind_several.reason("10.1.0.1", "10.2.0.1"), PassReason::NoPath);
    let mut by_the_device = Scene::new().has(site()).routes("192.0.2.0/24", several);
    assert_eq!(rewrite(&mut by_the_device), Some(None));
}

#[test]
fn policies_depend_on_a_neighbour_if_they_lack_nothing_else() {
    let depends_on = |scene: &Scene| {
        let neighbours = scene.compiler.neighbours().round(None);
        neighbours.map(|(ifindex, address)| (ifindex, address.to_string())).collect::<Vec<_>>()
    };
    let egress = Egress { next_hop: NextHop::Neighbour, ..Egress::default() };
    let mut scene = Scene::new().has(Policy { egress, ..site() });
    scene.compile();
    let on_link = [(NIC, "192.0.2.2".to_owned())];
    assert_eq!(depends_on(&scene), on_link, "it waits");
    assert!(!scene.compiler.knows(&(NIC, [192, 0, 2, 2].into())));
    let address = ROUTER_MAC;
    scene.host.neighbours.push(Neighbour { ifindex: NIC, destination: [192, 0, 2, 2].into(), address });
    scene.compile();
    assert_eq!(depends_on(&scene), on_link, "it goes there");
    assert!(scene.compiler.knows(&(NIC, [192, 0, 2, 2].into())));

    scene.link(NIC).carrier = false;
    scene.compile();
    assert_eq!(depends_on(&scene), []);
    scene.link(NIC).carrier = true;
    scene.after(PolicyEvent::SaRemoved(association_of(Family::V4).id)).compile();
    assert_eq!(depends_on(&scene), []);
    scene.after(PolicyEvent::Sa(association_of(Family::V4)));
    let gateway = Some("192.0.2.254".parse().unwrap());
    let mut scene = scene.routes("192.0.2.0/24", RouteKind::Unicast { ifindex: NIC, gateway, mtu: None });
    scene.compile();
    assert_eq!(depends_on(&scene), [(NIC, "192.0.2.254".to_owned())], "another one now");

    scene.after(PolicyEvent::Policy(site())).compile();
    assert_eq!(depends_on(&scene), [], "the device finds it");
    scene.after(PolicyEvent::Policy(Policy { egress, ..site() })).compile();
    assert_eq!(depends_on(&scene).len(), 1);
    scene.after(PolicyEvent::PolicyRemoved(site().id)).compile();
    assert_eq!(depends_on(&scene), []);
}

#[test]
fn an_update_says_only_what_changed_removals_first_and_longest_prefixes_first() {
    let narrow = offloaded("10.1.0.0/16", "10.9.7.0/24");
    let mut scene = Scene::new().has(site()).has(narrow.clone()).has(offloaded("10.1.0.0/16", "10.9.0.0/16"));
    scene.compile();
    assert!(scene.compiler.compile(&scene.database).is_empty());

    scene.after(PolicyEvent::PolicyRemoved(site().id));
    scene.after(PolicyEvent::PolicyRemoved(narrow.id));
    scene.after(PolicyEvent::Policy(offloaded("10.1.0.0/16", "10.8.0.0/16")));
    scene.after(PolicyEvent::Policy(offloaded("10.1.2.0/24", "10.8.0.0/16")));
    let update = scene.compiler.compile(&scene.database);
    let changes: Vec<_> =
        update.cells.iter().map(|(cell, verdict)| (cell.to_string(), verdict.is_some())).collect();
    let expected = [
        ("10.1.0.0/16 → 10.9.7.0/24", false),
        ("10.1.0.0/16 → 10.2.0.0/16", false),
        ("10.1.2.0/24 → 10.8.0.0/16", true),
        ("10.1.0.0/16 → 10.8.0.0/16", true),
    ];
    assert_eq!(changes, expected.map(|(cell, set)| (cell.to_owned(), set)));
}

/// What the compiler says about a packet.
fn explanation(scene: &mut Scene, source: &str, destination: &str) -> String {
    scene.compile();
    let flow = Flow { protocol: 17, ..Flow::between(source.parse().unwrap(), destination.parse().unwrap()) };
    scene.compiler.explain(&scene.database, &flow, None).to_string()
}

#[test]
fn a_text_with_one_address_is_no_packet_and_the_error_says_what_it_needs() {
    let error = "10.1.0.5".parse::<Flow>().unwrap_err().to_string();
    assert!(
        error.starts_with("\"10.1.0.5\" is no packet: it needs a source and a destination address"),
        "{error}"
    );
}

#[test]
fn an_explanation_names_the_policy_and_what_stands_in_its_way() {
    let mut scene = Scene::new().has(with_priority(10, site()));
    let explain = |scene: &mut Scene| explanation(scene, "10.1.0.1", "10.2.0.1");
    assert_eq!(
        explain(&mut scene),
        "fast: out 10.1.0.0/16 → 10.2.0.0/16, device #7, up to 1446 bytes, SA dst 192.0.2.2 proto 50 spi 0x00000100"
    );
    for (other, how) in [
        (with_priority(5, bypass("10.0.0.0/8", "10.0.0.0/8")), "has a better priority"),
        (
            with_priority(10, bypass("10.0.0.0/8", "10.0.0.0/8")),
            "has the same priority, and which is older is not known",
        ),
        (
            to_peer(2, with_priority(20, offloaded("10.0.0.0/8", "10.0.0.0/8"))),
            "is packet-offloaded too, leads another way, and may be found first",
        ),
    ] {
        let mut scene = Scene::new().has(with_priority(10, site())).has(other);
        assert_eq!(
            explain(&mut scene),
            format!(
                "kernel (shadowed): out 10.1.0.0/16 → 10.2.0.0/16 is shadowed by out 10.0.0.0/8 → 10.0.0.0/8, which {how}"
            )
        );
    }
    let everything = with_direction(Direction::Forward, tunnel("0.0.0.0/0", "0.0.0.0/0"));
    assert_eq!(
        explain(&mut Scene::new().has(site()).has(everything)),
        "kernel (forward_or_sub_policy): the kernel must check fwd 0.0.0.0/0 → 0.0.0.0/0"
    );
    scene.after(PolicyEvent::SaRemoved(association().id));
    assert_eq!(
        explain(&mut scene),
        "kernel (no_sa): out 10.1.0.0/16 → 10.2.0.0/16 has no live outbound packet-offload association on its device"
    );
    scene.after(PolicyEvent::Sa(SecurityAssociation { sets_mark: true, ..association() }));
    assert_eq!(
        explain(&mut scene),
        "kernel (no_sa): an SA of out 10.1.0.0/16 → 10.2.0.0/16 (dst 192.0.2.2 proto 50 spi 0x00000100) sets a mark, by \
         which rules may route its packets another way"
    );
    scene.after(PolicyEvent::Stale(StaleCause::Overrun));
    assert!(explain(&mut scene).starts_with("kernel (disabled): the source has lost track"));
}

#[test]
fn an_explanation_names_the_address_that_the_host_keeps_for_itself() {
    let mut scene =
        Scene::new().has(site()).routes("10.2.0.1/32", RouteKind::Local).routes("10.2.9.0/24", via(LAN));
    assert_eq!(
        explanation(&mut scene, "10.1.0.1", "10.2.0.1"),
        "kernel (denied_destination): its destination is the host's own, broadcast, unroutable or unclear (10.2.0.1/32)"
    );
    assert_eq!(
        explanation(&mut scene, "10.1.0.1", "10.2.9.1"),
        "kernel (route_elsewhere): its destination is routed to device #8 (10.2.9.0/24)"
    );
    assert_eq!(explanation(&mut scene, "10.1.0.1", "172.16.0.1"), "kernel (no_policy): no policy matches");
    assert!(explanation(&mut scene, "127.0.0.1", "10.2.0.1").starts_with("kernel (martian_source)"));
}

/// The change decides nothing about its own prefix, for which the other table has a route, but about what that one throws.
#[test]
fn a_route_counts_for_what_another_table_throws_inside_its_prefix() {
    let mut scene = Scene::new().has(offloaded("10.1.0.0/16", "10.2.3.0/24"));
    scene.host.rules.push(Rule::lookup(Family::V4, 91, 91));
    for (destination, kind) in [("10.2.0.0/16", via(NIC)), ("10.2.3.0/24", RouteKind::Throw)] {
        scene.host.routes.push(Route { table: 91, ..route(destination, kind) });
    }
    scene.compile();
    let mut is_fast = |kind: RouteKind| {
        let route = route("10.2.0.0/16", kind);
        let Route { table, destination, .. } = route;
        scene.compiler.change_host(&HostChange::Routes { table, destination, routes: vec![route] });
        scene.table.apply(&scene.compiler.compile(&scene.database));
        scene.table.decide(&packet("10.1.0.1", "10.2.3.1"))
    };
    assert!(is_fast(via(NIC)).is_ok());
    assert_eq!(is_fast(RouteKind::Blackhole), Err(PassReason::DeniedDestination));
    assert!(is_fast(via(NIC)).is_ok());
}

/// A longer prefix decides about its addresses, whatever becomes of the default route; but not if its route is for some packets
/// only, and the others are left to the default route.
#[test]
fn a_change_of_the_default_route_looks_at_what_it_may_decide_and_at_nothing_else() {
    for (tos, is_decided) in [(0, true), (4, false)] {
        let mut scene = Scene::new().has(offloaded("10.1.0.0/16", "10.2.3.0/24"));
        for destination in ["10.1.0.0/16", "10.2.0.0/16", "192.0.2.0/24"] {
            scene.host.routes.push(Route { tos, ..route(destination, via(NIC)) });
        }
        scene.compile();
        assert!(scene.table.decide(&packet("10.1.0.1", "10.2.3.1")).is_ok());
        let route = route("0.0.0.0/0", via(LAN));
        let Route { table, destination, .. } = route;
        scene.compiler.change_host(&HostChange::Routes { table, destination, routes: vec![route] });
        assert_eq!(scene.compiler.awaited(&scene.database) == 0, is_decided);
        let update = scene.compiler.compile(&scene.database);
        assert_eq!(update.is_empty(), is_decided, "{update:?}");
        scene.table.apply(&update);
        assert_eq!(scene.table.decide(&packet("10.1.0.1", "10.2.3.1")).is_ok(), is_decided);
    }
}

#[test]
fn an_explanation_names_the_rule_that_decides_or_leaves_open_where_an_address_leads() {
    let everything = RuleSelector::default;
    let lookup = RuleAction::Lookup { table: 91, suppress_prefix_length: None, suppress_group: false };
    let with = |priority, selector, action| {
        let mut scene = Scene::new().has(site());
        let route = Route { table: 91, ..route("10.2.9.0/24", via(LAN)) };
        scene.host.routes.push(route);
        scene.host.rules.push(Rule::new(Family::V4, priority, selector, action));
        scene
    };
    let unclear = "its destination is the host's own, broadcast, unroutable or unclear (10.2.9.0/24)";
    for (selector, expected) in [
        (RuleSelector { other: true, ..everything() }, format!("kernel (denied_destination): {unclear}, by the rule with pref 91")),
        (
            everything(),
            "kernel (route_elsewhere): its destination is routed to device #8 (10.2.9.0/24), by the rule with pref 91".to_owned(),
        ),
    ] {
        assert_eq!(explanation(&mut with(91, selector, lookup), "10.1.0.1", "10.2.9.1"), expected);
    }
    let from = RuleSelector { source: Some("10.1.9.0/24".parse().unwrap()), ..everything() };
    let mut prohibited = with(92, from, RuleAction::Deny);
    let source = "its source is the host's own, broadcast, unroutable or unclear (10.1.9.0/24)";
    assert_eq!(
        explanation(&mut prohibited, "10.1.9.1", "10.2.8.1"),
        format!("kernel (denied_source): {source}, by the rule with pref 92")
    );
    assert!(explanation(&mut prohibited, "10.1.8.1", "10.2.8.1").starts_with("fast"));
}

#[test]
fn an_explanation_heeds_only_guards_that_the_table_has() {
    let forward = |source, destination| with_direction(Direction::Forward, tunnel(source, destination));
    let mut scene = Scene::new()
        .has(offloaded("10.1.0.0/30", "10.2.7.0/24"))
        .has(forward("10.1.0.1/32", "10.2.0.0/16"))
        // About a packet's source as well, but elsewhere.
        .has(forward("10.1.0.0/28", "10.3.0.0/16"));
    assert_eq!(
        explanation(&mut scene, "10.1.0.1", "10.2.7.1"),
        "kernel (guarded): the kernel must check fwd 10.1.0.1/32 → 10.2.0.0/16"
    );
    assert!(explanation(&mut scene, "10.1.0.2", "10.2.7.1").starts_with("fast"));
}

#[test]
fn an_explanation_heeds_the_port_the_mark_and_the_protocol() {
    let mut scene = Scene::new().has(with_priority(10, site())).has(ike(500));
    scene.compile();
    let flow = Flow {
        protocol: 17,
        destination_port: 500,
        ..Flow::between([10, 1, 0, 1].into(), [10, 2, 0, 1].into())
    };
    let reason = |flow: &Flow, port: Option<&Port>| match scene.compiler.explain(&scene.database, flow, port)
    {
        Explanation::Pass { reason, cause } => Some((reason, cause)),
        Explanation::Fast { .. } => None,
    };
    assert_eq!(reason(&flow, None), Some((PassReason::Exception, Cause::Exception(ike(500).id))));
    let flow = Flow { destination_port: 501, ingress: Some((LAN, 0)), ..flow };
    assert_eq!(reason(&flow, None), Some((PassReason::UnknownPort, Cause::Port)));
    let port = Port {
        ifindex: LAN,
        vlan: 0,
        receiver: LAN,
        address: NIC_MAC,
        forwards: Forwards { v4: true, v6: false },
        reverse_path: ReversePath::Strict,
    };
    assert_eq!(reason(&flow, Some(&port)).map(|(reason, _)| reason), Some(PassReason::ReversePath));
    let lenient = Port { reverse_path: ReversePath::Off, ..port };
    assert_eq!(reason(&flow, Some(&lenient)), None);
    let closed = Port { forwards: Forwards::default(), ..port };
    assert_eq!(reason(&flow, Some(&closed)).map(|(reason, _)| reason), Some(PassReason::NotForwarding));
    let marked = Flow { mark: 1, ..flow };
    assert_eq!(reason(&marked, Some(&lenient)).map(|(_, cause)| cause), Some(Cause::Marked));
}

#[test]
fn what_keeps_everything_from_being_fast_is_told_once_by_name() {
    let obstacles = |scene: &mut Scene| {
        scene.compile();
        let obstacles = scene.compiler.obstacles(&scene.database);
        obstacles.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let forwarding = || {
        let mut scene = Scene::new().has(site());
        scene.link(LAN).forwards = Forwards { v4: true, v6: true };
        scene
    };
    assert_eq!(obstacles(&mut forwarding()), [""; 0]);

    let everything = with_direction(Direction::Forward, tunnel("0.0.0.0/0", "0.0.0.0/0"));
    let mut with_ports = everything.clone();
    with_ports.id.selector.protocol = 6;
    assert_eq!(obstacles(&mut forwarding().has(with_ports)), [""; 0], "it is an exception");
    let check = "the policy fwd 0.0.0.0/0 → 0.0.0.0/0 is about every packet that is forwarded, and the kernel must check it";
    assert_eq!(obstacles(&mut forwarding().has(everything)), [check]);

    let mut blocks = forwarding();
    blocks.after(PolicyEvent::DefaultPolicy(DefaultPolicy {
        forward: Action::Block,
        ..DefaultPolicy::default()
    }));
    assert_eq!(
        obstacles(&mut blocks),
        ["the default policy blocks forwarded packets (`ip xfrm policy setdefault`)"]
    );

    let mut ruled = forwarding();
    ruled.host.rules.push(Rule::new(Family::V6, 220, RuleSelector::default(), RuleAction::Unclear));
    assert_eq!(
        obstacles(&mut ruled),
        ["the rule with pref 220 for IPv6 does something that is not understood, so routes are not clear"]
    );
    let mut quiet = forwarding();
    quiet.link(LAN).forwards = Forwards { v4: true, v6: false };
    assert_eq!(obstacles(&mut quiet), ["no interface forwards IPv6"]);
    let mut unknown = forwarding();
    unknown.host = HostFacts::default();
    let unknown = obstacles(&mut unknown);
    assert!(unknown.contains(&"the routes for IPv4 are not known".to_owned()), "{unknown:?}");
    let mut vouched = forwarding();
    vouched.host = HostFacts::vouched();
    assert_eq!(obstacles(&mut vouched), [""; 0]);
}
