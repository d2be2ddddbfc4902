//! A brute force that applies the rule to one packet at a time, to judge the compiler by.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use fastswan_ebpf::PassReason;
use ipnet::{IpNet, Ipv4Net};

use super::{
    Compiler, Explanation, Flow,
    model::{AMPLE, LAN, Model, NIC, Packet, association_of, template_of, to, tunnel},
};
use crate::{
    database::Database,
    event::{PolicyEvent, PolicyOrder, Snapshot, StaleCause},
    host::{HostChange, HostFacts, Link, PathMtu, Route, RouteKind, Rule},
    policy::{
        Action, DefaultPolicy, Direction, Family, Mark, OffloadKind, Origin, Policy, PolicyType, PortMatch,
        SecurityAssociation, Template, Templates,
    },
    table::{Capacity, ReversePath, Slot, TableUpdate},
};

/// A change of what the compiler reads.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Policy(Box<Policy>),
    /// Removes the policy at this position, counted around.
    RemovePolicy(usize),
    Sa(Box<SecurityAssociation>),
    RemoveSa(Box<SecurityAssociation>),
    Default(Action),
    /// Everything that is known about routes is told again.
    Routes(Vec<(IpNet, RouteKind)>),
    /// A table has this route for a prefix now, or none.
    Route(u32, IpNet, Option<RouteKind>),
    /// The kernel has learnt a path MTU, or knows none any longer.
    PathMtu(IpAddr, Option<u32>),
    /// An address is the host's, or no longer; and the table local says so, or not.
    Own(Ipv4Addr, [bool; 2]),
    /// A rule asks [`TABLE`] before the table main, or no longer.
    Rule(bool),
    Flush,
    Stale,
    Resync,
    /// The same, from a source of the other kind.
    OtherOrder,
}

/// A table that a rule may ask before the table main.
const TABLE: u32 = 100;

fn family(v6: bool) -> Family {
    if v6 { Family::V6 } else { Family::V4 }
}

/// Bytes that choose what happens. Those of a fuzzer lead it to what it has not seen; 0 is the usual choice.
pub(super) struct Choices<'a>(pub(super) &'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn one_of<T: Clone>(&mut self, options: &[T]) -> T {
        options[usize::from(self.next()) % options.len()].clone()
    }

    fn prefix(&mut self, v6: bool) -> IpNet {
        let (host, length) = (self.next() % 16, self.one_of(&[32, 31, 30, 29, 28, 12, 0]));
        let text = match (v6, length) {
            (false, _) => format!("10.0.0.{host}/{length}"),
            (true, 0) => format!("2001:db8::{host:x}/0"),
            (true, _) => format!("2001:db8::{host:x}/{}", length + 96),
        };
        text.parse().expect("a prefix")
    }

    fn policy(&mut self) -> Policy {
        let v6 = self.next() % 2 == 1;
        let (source, destination) = (self.prefix(v6), self.prefix(v6));
        let mut policy = tunnel(&source.to_string(), &destination.to_string());
        policy.priority = u32::from(self.next() % 4 + 1) * 10;
        policy.offload = match self.next() % 14 {
            0..8 => Some(to(NIC, OffloadKind::Packet)),
            8..12 => None,
            12 => Some(to(LAN, OffloadKind::Packet)),
            _ => Some(to(NIC, OffloadKind::Crypto)),
        };
        let reqid = u32::from(self.next() % 2 + 1);
        let template = |v6| Template { reqid, ..template_of(family(v6)) };
        policy.templates = match self.next() % 16 {
            0..12 => [template(v6)].into(),
            12 => [template(!v6)].into(),
            13 => [Template { optional: true, ..template(v6) }].into(),
            14 => Templates::default(),
            _ => vec![template(v6), template(v6)].into(),
        };
        match self.next() % 32 {
            0..19 => {}
            19 => policy.expires = Some(u64::MAX),
            20..22 => policy.id.direction = Direction::Forward,
            22 => policy.id.direction = Direction::In,
            23 => policy.id.policy_type = PolicyType::Sub,
            24 => policy.action = Action::Block,
            25 => policy.id.mark = Mark { value: 1, mask: 1 },
            26 => policy.id.if_id = 5,
            27 => policy.id.selector.ifindex = NIC,
            28 => policy.use_limited = true,
            29..31 => policy.id.selector.protocol = 6,
            _ => {
                policy.id.selector.protocol = 17;
                policy.id.selector.destination_port = PortMatch::exactly(500);
            }
        }
        match self.next() % 24 {
            0..19 => {}
            19 => policy.withheld = true,
            20 => policy.disputed = true,
            21 => policy.origin = Origin(1),
            _ => policy.assumed = association_of(family(v6)).overhead,
        }
        policy
    }

    fn sa(&mut self) -> SecurityAssociation {
        let mut sa = association_of(family(self.next() % 2 == 1));
        sa.reqid = u32::from(self.next() % 2 + 1);
        let which = self.next();
        (sa.id.spi, sa.id.origin) = (u32::from(which % 3), Origin(u32::from(which / 3 % 8 == 7)));
        sa.offload = Some(to(self.one_of(&[NIC, NIC, NIC, LAN]), OffloadKind::Packet));
        sa
    }

    fn routes(&mut self) -> Vec<(IpNet, RouteKind)> {
        let mut routes = BTreeMap::new();
        if self.next() % 4 != 3 {
            routes.extend([Family::V4, Family::V6].map(|family| (family.everything(), via(NIC))));
        }
        for _ in 0..self.next() % 5 {
            let v6 = self.next() % 2 == 1;
            routes.insert(self.prefix(v6).trunc(), self.route());
        }
        routes.into_iter().collect()
    }

    fn route(&mut self) -> RouteKind {
        self.one_of(&[via(NIC), via(NIC), via(LAN), RouteKind::Local, RouteKind::Blackhole])
    }

    fn change_of_route(&mut self) -> Step {
        let (table, v6) = (self.one_of(&[254, 254, TABLE]), self.next() % 2 == 1);
        let kind = match self.next() % 8 {
            0..2 => None,
            2 => Some(RouteKind::Throw),
            _ => Some(self.route()),
        };
        Step::Route(table, self.prefix(v6).trunc(), kind)
    }

    /// The last one is no less than the MTU of the devices.
    fn path_mtu(&mut self) -> Step {
        let v6 = self.next() % 2 == 1;
        let mtu = self.one_of(&[Some(1300), Some(1300), Some(1499), Some(1500), None, None]);
        Step::PathMtu(self.prefix(v6).addr(), mtu)
    }

    fn step(&mut self) -> Step {
        match self.next() % 37 {
            0..12 => Step::Policy(Box::new(self.policy())),
            12..16 => Step::RemovePolicy(self.next().into()),
            16..18 => Step::Sa(Box::new(self.sa())),
            18 => Step::RemoveSa(Box::new(self.sa())),
            19 => Step::Default(self.one_of(&[Action::Allow, Action::Allow, Action::Block])),
            20..22 => Step::Routes(self.routes()),
            22 => Step::Flush,
            23 => Step::Stale,
            24 => Step::Resync,
            25 => Step::OtherOrder,
            26 => Step::Rule(self.next() % 3 != 2),
            27..30 => self.path_mtu(),
            30..32 => {
                let own = Ipv4Addr::new(10, 0, 0, self.next() % 16);
                Step::Own(own, self.one_of(&[[true, false], [true, true], [false, false], [false, true]]))
            }
            _ => self.change_of_route(),
        }
    }

    /// Some policies with live associations to begin with, then changes, until the bytes are used up.
    pub(super) fn steps(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        for family in [Family::V4, Family::V6] {
            let mut second = SecurityAssociation { reqid: 2, ..association_of(family) };
            second.id.spi = 0x200;
            steps.extend([association_of(family), second].map(|sa| Step::Sa(Box::new(sa))));
        }
        steps.push(Step::Routes(self.routes()));
        for _ in 0..=self.next() % 7 {
            steps.push(Step::Policy(Box::new(self.policy())));
        }
        while !self.0.is_empty() && steps.len() < 24 {
            steps.push(self.step());
        }
        steps
    }

    /// Too little of one thing, enough of the others.
    pub(super) fn capacity(&mut self) -> Capacity {
        let (what, some) = (self.next() % 13, usize::from(self.next()));
        match what {
            0..4 => Capacity { cells_v4: some % 10, cells_v6: some % 10, ..AMPLE },
            4..8 => Capacity { tuples: some % 5, ..AMPLE },
            8..10 => Capacity { fact_lengths: some % 3, ..AMPLE },
            10..12 => Capacity { exceptions: some % 2, ..AMPLE },
            _ => Capacity { slots: some % 3, ..AMPLE },
        }
    }
}

pub(super) fn via(ifindex: u32) -> RouteKind {
    RouteKind::Unicast { ifindex, gateway: None, mtu: None }
}

/// What the steps make, and the table that the compiler's updates add up to.
pub(super) struct World {
    pub(super) database: Database,
    pub(super) host: HostFacts,
    pub(super) compiler: Compiler,
    pub(super) table: Model,
    capacity: Capacity,
}

impl World {
    pub(super) fn new(capacity: Capacity, reverse_path: ReversePath) -> Self {
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
        let mut world = Self {
            database,
            host: HostFacts {
                links: vec![link(NIC, "nic"), link(LAN, "lan")],
                rules: [Rule::ordinary(Family::V4), Rule::ordinary(Family::V6)].concat(),
                ..HostFacts::default()
            },
            compiler: Compiler::new(capacity),
            table: Model::default(),
            capacity,
        };
        world.compiler.set_host(&world.host);
        world
    }

    pub(super) fn take(&mut self, step: Step) {
        let update = self.compile(step);
        self.table.apply(&update);
        self.table.assert_fits(self.capacity);
    }

    /// What the table has to be told after a step.
    pub(super) fn compile(&mut self, step: Step) -> TableUpdate {
        match step {
            Step::Policy(policy) => self.database.apply(PolicyEvent::Policy(*policy)),
            Step::RemovePolicy(position) => {
                let mut policies = self.database.snapshot().policies;
                if !policies.is_empty() {
                    let policy = policies.swap_remove(position % policies.len());
                    self.database.apply(PolicyEvent::PolicyRemoved(policy.id));
                }
            }
            Step::Sa(sa) => self.database.apply(PolicyEvent::Sa(*sa)),
            Step::RemoveSa(sa) => self.database.apply(PolicyEvent::SaRemoved(sa.id)),
            Step::Default(action) => {
                let default_policy = DefaultPolicy { forward: action, ..DefaultPolicy::default() };
                self.database.apply(PolicyEvent::DefaultPolicy(default_policy));
            }
            Step::Routes(routes) => {
                let own: IpNet = "192.0.2.1/32".parse().unwrap();
                let outer = [
                    ("192.0.2.0/24", via(NIC)),
                    ("192.0.2.1/32", RouteKind::Local),
                    ("2001:db8:f::/48", via(NIC)),
                ]
                .map(|(prefix, kind)| (prefix.parse().unwrap(), kind));
                let route = |(destination, kind)| {
                    Route::new(if destination == own { 255 } else { 254 }, destination, kind)
                };
                self.host.routes = routes.into_iter().chain(outer).map(route).collect();
                self.compiler.set_host(&self.host);
            }
            Step::Route(table, destination, kind) => {
                let routes = kind.map(|kind| Route::new(table, destination, kind)).into_iter().collect();
                self.change_host(HostChange::Routes { table, destination, routes });
            }
            Step::PathMtu(destination, Some(mtu)) => {
                self.change_host(HostChange::PathMtu(PathMtu { destination, mtu }));
            }
            Step::PathMtu(destination, None) => self.change_host(HostChange::PathMtuGone(destination)),
            Step::Own(own, [is_own, has_route]) => {
                let destination = Ipv4Net::from(own).into();
                let route = has_route.then(|| Route::new(255, destination, RouteKind::Local));
                let routes = route.into_iter().collect();
                self.change_host(HostChange::Routes { table: 255, destination, routes });
                let change = if is_own { HostChange::Address } else { HostChange::AddressGone };
                self.change_host(change(own));
            }
            Step::Rule(is_there) => {
                for family in [Family::V4, Family::V6] {
                    let mut rules = Rule::ordinary(family).to_vec();
                    rules.extend(is_there.then(|| Rule::lookup(family, 50, TABLE)));
                    self.change_host(HostChange::Rules(family, rules));
                }
            }
            Step::Flush => self.database.apply(PolicyEvent::PoliciesFlushed(PolicyType::Sub)),
            Step::Stale => self.database.apply(PolicyEvent::Stale(StaleCause::Overrun)),
            Step::Resync => self.database.apply(PolicyEvent::Snapshot(self.database.snapshot())),
            Step::OtherOrder => {
                let mut snapshot = self.database.snapshot();
                snapshot.order = match snapshot.order {
                    PolicyOrder::Kernel => PolicyOrder::ByPriority,
                    PolicyOrder::ByPriority => PolicyOrder::Kernel,
                };
                self.database.apply(PolicyEvent::Snapshot(snapshot));
            }
        }
        let update = self.compiler.compile(&self.database);
        assert_eq!(self.compiler.compile(&self.database), TableUpdate::default(), "nothing has changed");
        update
    }

    fn change_host(&mut self, change: HostChange) {
        self.compiler.change_host(&change);
        self.host.apply(change);
    }

    fn judge(&self) -> Judge<'_> {
        let Snapshot { policies, sas, default_policy, order } = self.database.snapshot();
        Judge { world: self, policies, sas, default_policy, order }
    }

    /// What the first table says that has a route and does not throw.
    pub(super) fn route(&self, address: IpAddr) -> Option<RouteKind> {
        self.routes_asked(address).into_iter().find(|kind| *kind != RouteKind::Throw)
    }

    /// The longest route of each table that has one.
    fn routes_asked(&self, address: IpAddr) -> Vec<RouteKind> {
        let has_rule = self.host.rules.iter().any(|rule| rule.priority == 50);
        let tables = [255].into_iter().chain(has_rule.then_some(TABLE)).chain([254]);
        let longest = |table| {
            let routes = self.host.routes.iter().filter(|route| route.table == table);
            let routes = routes.filter(|route| route.destination.contains(&address));
            routes.max_by_key(|route| route.destination.prefix_len()).map(|route| route.kind)
        };
        tables.filter_map(longest).collect()
    }

    /// Whether the kernel has learnt that packets to an address must be shorter than those that a device takes.
    fn has_path_mtu(&self, destination: IpAddr) -> bool {
        self.host.path_mtus.iter().any(|learnt| learnt.destination == destination && learnt.mtu < 1500)
    }

    /// Whether the kernel takes a packet from an address.
    fn takes_from(&self, source: IpAddr) -> bool {
        let is_own = self.host.addresses.iter().any(|own| IpAddr::from(*own) == source);
        match self.route(source) {
            _ if source.is_ipv6() => true,
            _ if is_own => false,
            Some(RouteKind::Unicast { .. }) => true,
            Some(RouteKind::Local) => false,
            // The program asks for a way back where a port does.
            None if self.routes_asked(source).is_empty() => true,
            _ => self.host.links[0].reverse_path == ReversePath::Off,
        }
    }

    /// Whether a forward, sub or disputed policy is about the packet's source.
    pub(super) fn is_guarded(&self, packet: &Packet) -> bool {
        self.database
            .policies()
            .any(|policy| is_check(policy) && policy.id.selector.source.contains(&packet.source))
    }
}

/// Whether a policy makes packets pass whatever else matches.
fn is_check(policy: &Policy) -> bool {
    policy.id.direction == Direction::Forward
        || policy.id.policy_type == PolicyType::Sub
        || policy.disputed && policy.id.direction == Direction::Out
}

/// The rule, applied to one packet at a time.
struct Judge<'a> {
    world: &'a World,
    policies: Vec<Policy>,
    sas: Vec<SecurityAssociation>,
    default_policy: DefaultPolicy,
    order: PolicyOrder,
}

impl Judge<'_> {
    fn matching(&self, packet: &Packet) -> impl Iterator<Item = &Policy> {
        self.policies.iter().filter(|policy| {
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
        self.world.database.is_current()
            && self.matching(packet).any(|policy| policy.id.selector.looks_at_upper_layer())
    }

    /// The policy that the kernel is certain to choose and that the fast path can stand in for.
    fn rule(&self, packet: &Packet) -> Option<&Policy> {
        if !self.world.database.is_current()
            || self.default_policy.forward == Action::Block
            || self.default_policy.outbound == Action::Block
        {
            return None;
        }
        let matching: Vec<_> = self.matching(packet).collect();
        if matching.iter().any(|policy| is_check(policy)) {
            return None;
        }
        let of_device = matching.iter().copied().filter(|policy| policy.is_packet_offloaded());
        let of_device: Vec<&Policy> = of_device.collect();
        let database = &self.world.database;
        let best = *of_device.iter().min_by_key(|policy| (policy.priority, database.key_of(&policy.id)))?;
        let software: Vec<&Policy> =
            matching.iter().copied().filter(|policy| !policy.is_packet_offloaded()).collect();
        if !Self::is_plain(best, packet) || !self.is_certain(best, &of_device, &software, packet) {
            return None;
        }
        let device = best.offload.filter(|device| device.kind == OffloadKind::Packet)?.ifindex;
        let is_live = |sa: &SecurityAssociation| {
            sa.id.spi != 0
                && sa.id.origin == best.origin
                && sa.id.destination == best.templates[0].destination
                && sa.reqid == best.templates[0].reqid
                && sa.offload.is_some_and(|offload| offload.ifindex == device)
        };
        let leads_there = |address| self.world.route(address) == Some(via(device));
        let routed = leads_there(packet.destination)
            && !self.world.has_path_mtu(packet.destination)
            && leads_there(best.templates[0].destination)
            && self.world.takes_from(packet.source);
        let is_served = best.assumed.is_some() || self.sas.iter().any(is_live);
        (device == NIC && is_served && routed).then_some(best)
    }

    /// R8.
    fn is_plain(policy: &Policy, packet: &Packet) -> bool {
        policy.action == Action::Allow
            && policy.id.mark == Mark::default()
            && policy.id.if_id == 0
            && policy.id.selector.ifindex == 0
            && !policy.id.selector.looks_at_upper_layer()
            && !policy.use_limited
            && !policy.withheld
            && policy.templates.len() == 1
            && policy.templates[0].destination.is_ipv4() == packet.source.is_ipv4()
            && !policy.templates[0].optional
    }

    /// R3 to R7, for an offloaded policy with the best priority.
    fn is_certain(
        &self,
        best: &Policy,
        of_device: &[&Policy],
        software: &[&Policy],
        packet: &Packet,
    ) -> bool {
        let database = &self.world.database;
        let is_same = |policy: &Policy| {
            policy.id == best.id
                || Self::is_plain(policy, packet)
                    && policy.templates == best.templates
                    && policy.offload == best.offload
                    && policy.expires == best.expires
                    && (policy.assumed, policy.origin) == (best.assumed, best.origin)
        };
        if self.order == PolicyOrder::ByPriority {
            return software.iter().all(|other| other.priority > best.priority)
                && of_device.iter().all(|other| other.priority > best.priority || is_same(other));
        }
        let highest = database.highest_offloaded_priority(family(packet.source.is_ipv6())).unwrap_or(0);
        if software.iter().any(|other| other.priority <= highest) {
            return false;
        }
        let (same, others): (Vec<&Policy>, Vec<&Policy>) =
            of_device.iter().partition(|policy| is_same(policy));
        let age = |policy: &Policy| database.key_of(&policy.id).map_or(0, |key| database.age(key));
        same.iter().any(|pivot| {
            let (destination, source) = (pivot.id.selector.destination, pivot.id.selector.source);
            let is_odd = |prefix: IpNet| prefix.addr().is_unspecified() && prefix.prefix_len() > 0;
            let beats = |other: &&Policy| {
                let is_behind = |policy: &&Policy| age(policy) < age(pivot);
                pivot.priority < other.priority
                    && same.iter().all(|policy| {
                        policy.id == pivot.id || policy.priority < other.priority || is_behind(policy)
                    })
                    && age(pivot) > age(other)
                    && other.id.selector.destination.prefix_len() <= destination.prefix_len()
                    && other.id.selector.source.prefix_len() <= source.prefix_len()
                    && !is_odd(source)
                    && !is_odd(destination)
            };
            (software.is_empty() || age(pivot) > 0) && others.iter().all(beats)
        })
    }
}

pub(super) fn packets() -> impl Iterator<Item = Packet> {
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

/// Asserts that the table agrees with the rule about every packet, or, if it may be too small, that none is fast
/// against the rule, and returns how many are fast. Exceptions pass, and so may packets from where a forward or sub policy is about.
pub(super) fn check(world: &World, exact: bool) -> usize {
    let mut fast = 0;
    let judge = world.judge();
    for packet in packets() {
        let allowed = judge.rule(&packet).map(|policy| &policy.id);
        let found = world.table.decide(&packet);
        if world.database.is_current() {
            assert_explained(world, &packet, found);
        }
        if let Ok(slot) = found {
            assert!(!exact || !judge.is_exception(&packet), "{packet:?}");
            fast += 1;
            let slot_of_allowed = allowed.and_then(|policy| world.compiler.slot(&world.database, policy));
            assert_eq!(Some(slot), slot_of_allowed, "{packet:?}: {allowed:?}");
        } else if exact && judge.is_exception(&packet) {
            assert_eq!(found, Err(PassReason::Exception), "{packet:?}");
        } else if exact && !(found == Err(PassReason::Guarded) && world.is_guarded(&packet)) {
            assert_eq!(allowed, None, "{packet:?}: {found:?}");
        }
    }
    fast
}

/// Asserts that the compiler explains a packet as the table treats it.
fn assert_explained(world: &World, packet: &Packet, found: Result<Slot, PassReason>) {
    let flow = Flow {
        protocol: packet.protocol,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        ..Flow::between(packet.source, packet.destination)
    };
    let explanation = world.compiler.explain(&world.database, &flow, None);
    let explained = match &explanation {
        Explanation::Fast { policy, sas, .. } => {
            let is_assumed = world.database.policy(policy).is_some_and(|policy| policy.assumed.is_some());
            assert_eq!(sas.is_empty(), is_assumed, "{packet:?}: {explanation}");
            world.compiler.slot(&world.database, policy).ok_or(PassReason::NoPolicy)
        }
        Explanation::Pass { reason, .. } => Err(*reason),
    };
    assert_eq!(explained, found, "{packet:?}: {explanation}");
}

/// Lets a fuzzer choose what happens: panics if the compiler goes against the rule in the end. Whatever it does
/// against it on the way is the end of a shorter input.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let exact = choices.next() % 2 == 0;
    let capacity = if exact { AMPLE } else { choices.capacity() };
    let mut world = World::new(capacity, ReversePath::Off);
    for step in choices.steps() {
        world.take(step);
    }
    check(&world, exact);
}
