//! Policies as different systems have them, and how they change.

use std::net::IpAddr;

use fastswan::{
    Policy, PolicyId, Selector,
    policy::{
        Action, DefaultPolicy, Direction, Family, Mark, Mode, OffloadDev, OffloadKind, PolicyType, PortMatch,
        Template, Templates,
    },
};
use ipnet::IpNet;
use rand::{
    RngExt as _,
    rngs::StdRng,
    seq::{IndexedRandom as _, SliceRandom as _},
};

use super::{addresses::place, judge::Lab};
use crate::requests::Change;

/// A kind of policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Set {
    /// Tunnels between networks that do not overlap.
    SiteToSite,
    /// Tunnels from a network to each of many inside it.
    HubAndSpoke,
    /// Tunnels from everywhere to single addresses.
    RoadWarrior,
    /// strongSwan's priorities, IKE bypass policies, traps and shunts.
    StrongSwan,
    /// Priorities by prefix length, neighbour discovery in clear, opportunistic holes and blocks.
    Libreswan,
    /// Prefixes inside prefixes, with few different priorities.
    Nested,
    /// Prefixes inside prefixes of one tunnel: subnets of one connection as libreswan has them, or a hub's network and the
    /// sites of one peer inside it.
    OneTunnel,
    /// Policies for protocols, ports and ICMP types.
    Ports,
    /// Everything that a policy may have, at random.
    Random,
    /// Like nested ones, but offloaded: the judge is a model of the kernel, which orders those in its own way.
    OffloadedModel,
    /// The same, and bypass policies and blocks that are offloaded: the judge is the kernel.
    Offloaded,
}

impl Set {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::SiteToSite,
        Self::HubAndSpoke,
        Self::RoadWarrior,
        Self::StrongSwan,
        Self::Libreswan,
        Self::Nested,
        Self::OneTunnel,
        Self::Ports,
        Self::Random,
        Self::OffloadedModel,
        Self::Offloaded,
    ];

    /// Those that can be judged where policies are really offloaded, or where none can be.
    #[must_use]
    pub fn judged(offloads: bool) -> Vec<Self> {
        let elsewhere = if offloads { Self::OffloadedModel } else { Self::Offloaded };
        Self::ALL.into_iter().filter(|set| *set != elsewhere).collect()
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SiteToSite => "site-to-site",
            Self::HubAndSpoke => "hub-and-spoke",
            Self::RoadWarrior => "road-warrior",
            Self::StrongSwan => "strongswan",
            Self::Libreswan => "libreswan",
            Self::Nested => "nested",
            Self::OneTunnel => "one-tunnel",
            Self::Ports => "ports",
            Self::Random => "random",
            Self::OffloadedModel => "offloaded-model",
            Self::Offloaded => "offloaded",
        }
    }

    /// The share of packets of its plain policies that must be fast, if there is one.
    #[must_use]
    pub fn least_fast_share(self) -> Option<f64> {
        matches!(self, Self::SiteToSite | Self::RoadWarrior | Self::StrongSwan | Self::OneTunnel)
            .then_some(0.95)
    }

    /// How many groups of policies there are to begin with.
    fn groups(self) -> usize {
        match self {
            Self::SiteToSite | Self::StrongSwan | Self::Libreswan | Self::HubAndSpoke => 40,
            Self::RoadWarrior => 60,
            Self::OneTunnel
            | Self::Nested
            | Self::Ports
            | Self::Random
            | Self::OffloadedModel
            | Self::Offloaded => 20,
        }
    }
}

/// Whether a policy is offloaded, or the mirror is told so. Its reqid says that, which all sides see.
pub(super) fn is_promoted(policy: &Policy) -> bool {
    policy.is_packet_offloaded()
        || policy.id.direction == Direction::Out
            && matches!(policy.templates[..], [Template { reqid, .. }] if reqid % 2 == 1)
}

/// Whether NICs offload such a policy. mlx5 takes none for everything without a reqid.
fn is_offloadable(policy: &Policy) -> bool {
    let selector = &policy.id.selector;
    let is_for_all = selector.protocol == 0
        && selector.source.addr().is_unspecified()
        && selector.destination.addr().is_unspecified();
    let has_reqid = policy.templates.first().is_some_and(|template| template.reqid != 0);
    policy.id.policy_type == PolicyType::Main
        && policy.id.direction != Direction::Forward
        && policy.templates.len() <= 1
        && matches!(policy.id.selector.protocol, 0 | 6 | 17)
        && policy.priority != u32::MAX
        && (has_reqid || !is_for_all)
}

/// Policies that come and go.
#[derive(Debug)]
pub(super) struct World {
    set: Set,
    /// The device that packets leave by, and the other one.
    devices: [u32; 2],
    /// Whether policies are really offloaded, to the device that packets leave by.
    offloads: bool,
    policies: Vec<Policy>,
    default_policy: DefaultPolicy,
    /// How many policies and groups there were.
    made: u32,
    groups: u16,
    /// The reqids of a hub's tunnels, if there is one: for IPv4 and for IPv6.
    hub: Option<[u32; 2]>,
}

impl World {
    pub(super) fn new(set: Set, lab: &Lab) -> Self {
        Self {
            set,
            devices: [lab.egress, lab.ingress],
            offloads: lab.offloads(),
            policies: Vec::new(),
            default_policy: DefaultPolicy::default(),
            made: 0,
            groups: 0,
            hub: None,
        }
    }

    /// The policies that are there.
    pub(super) fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// Starts over with other policies.
    pub(super) fn renew(&mut self, rng: &mut StdRng) -> Vec<Change> {
        let mut changes = self.clear();
        for _ in 0..self.set.groups() {
            changes.extend(self.add_group(rng));
        }
        changes
    }

    /// Nothing is left. The kernel does not tell that it has deleted none.
    pub(super) fn clear(&mut self) -> Vec<Change> {
        let has = |table| self.policies.iter().any(|policy| policy.id.policy_type == table);
        let tables = [PolicyType::Main, PolicyType::Sub].into_iter().filter(|table| has(*table));
        let mut changes: Vec<Change> = tables.map(Change::Flush).collect();
        if self.default_policy != DefaultPolicy::default() {
            self.default_policy = DefaultPolicy::default();
            changes.push(Change::Default(self.default_policy));
        }
        self.policies.clear();
        self.groups = 0;
        changes
    }

    /// Some additions, changes and deletions. `index` tells the kernel's number of a policy.
    pub(super) fn change(
        &mut self,
        rng: &mut StdRng,
        index: impl Fn(&PolicyId) -> Option<u32>,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for _ in 0..=self.policies.len() / 12 {
            match rng.random_range(0..6) {
                0 | 1 => changes.extend(self.add_group(rng)),
                2 | 3 => {
                    if self.policies.is_empty() {
                        continue;
                    }
                    let at = rng.random_range(0..self.policies.len());
                    let id = self.policies.remove(at).id;
                    // One that was added in this round has no number yet.
                    let index = index(&id).filter(|_| rng.random());
                    let is_new = |change: &Change| match change {
                        Change::Add(policy) => policy.id == id,
                        _ => false,
                    };
                    let index = index.filter(|_| !changes.iter().any(is_new));
                    changes.push(Change::Delete { id, index });
                }
                _ => changes.extend(self.update(rng)),
            }
        }
        if matches!(self.set, Set::OffloadedModel | Set::Offloaded) && rng.random_bool(0.1) {
            let at = rng.random_range(0..=changes.len());
            changes.insert(at, Change::Resynchronise);
        }
        if self.set == Set::Random && rng.random_bool(0.1) {
            let action = if rng.random() { Action::Block } else { Action::Allow };
            self.default_policy = if rng.random() {
                DefaultPolicy { forward: action, ..DefaultPolicy::default() }
            } else {
                DefaultPolicy { outbound: action, ..DefaultPolicy::default() }
            };
            changes.push(Change::Default(self.default_policy));
        }
        changes
    }

    fn add_group(&mut self, rng: &mut StdRng) -> Vec<Change> {
        let group = self.group(rng);
        self.groups = self.groups.wrapping_add(1);
        let mut changes = Vec::new();
        for mut policy in group {
            self.offload(&mut policy, rng);
            if self.policies.iter().all(|other| other.id != policy.id) {
                self.policies.push(policy.clone());
                changes.push(Change::Add(policy));
            }
        }
        changes
    }

    /// Changes the priority of a policy, or what it does, or whether it is offloaded.
    fn update(&mut self, rng: &mut StdRng) -> Option<Change> {
        let at = rng.random_range(0..self.policies.len().max(1));
        let old = self.policies.get(at)?.clone();
        if self.set == Set::OneTunnel {
            // As when a tunnel gets new keys.
            return Some(Change::Update(old));
        }
        let mut new = Policy { offload: None, ..old.clone() };
        let promoted = if rng.random_bool(0.3) { !is_promoted(&old) } else { is_promoted(&old) };
        if let [template] = &mut new.templates[..] {
            template.reqid = self.reqid(promoted && old.id.direction == Direction::Out);
        }
        new.priority = match self.set {
            Set::StrongSwan if is_promoted(&new) => strongswan(&new, 400_000),
            Set::StrongSwan if new.templates.is_empty() => old.priority,
            Set::StrongSwan => strongswan(&new, 600_000),
            Set::SiteToSite | Set::HubAndSpoke | Set::RoadWarrior | Set::Libreswan | Set::OneTunnel => {
                old.priority
            }
            Set::Nested | Set::Ports | Set::Random | Set::OffloadedModel | Set::Offloaded => {
                priority(rng, is_promoted(&new))
            }
        };
        self.offload(&mut new, rng);
        self.policies[at] = new.clone();
        Some(Change::Update(new))
    }

    /// Offloads a policy, if it is to be and can be.
    fn offload(&mut self, policy: &mut Policy, rng: &mut StdRng) {
        policy.offload = None;
        if !self.offloads {
            return;
        }
        let without_tunnel = policy.templates.is_empty() && policy.id.direction == Direction::Out;
        let wanted = is_promoted(policy)
            || without_tunnel
                && match self.set {
                    // charon's own.
                    Set::StrongSwan => policy.priority == 32,
                    Set::Offloaded | Set::Random => rng.random_bool(0.3),
                    _ => false,
                };
        if wanted && is_offloadable(policy) {
            let [ifindex, _] = self.devices;
            policy.offload = Some(OffloadDev { ifindex, kind: OffloadKind::Packet, inbound: false });
        } else if let [template] = &mut policy.templates[..] {
            template.reqid &= !1;
        }
    }

    /// Policies that come together.
    fn group(&mut self, rng: &mut StdRng) -> Vec<Policy> {
        let v6 = rng.random_bool(0.4);
        let number = self.groups;
        let [zone, net] = [2 + number / 200, number % 200];
        match self.set {
            Set::Nested | Set::OffloadedModel | Set::Offloaded if rng.random_bool(0.25) => self.nest(rng, v6),
            Set::SiteToSite => {
                let local = place(v6, 1, rng.random_range(1..5), 0, 24);
                self.tunnel(local, place(v6, zone, net, 0, 24), 2000, true)
            }
            Set::HubAndSpoke => self.tunnel(place(v6, 0, 0, 0, 8), place(v6, zone, net, 0, 24), 2000, true),
            Set::RoadWarrior => {
                let address = place(v6, 9, rng.random_range(0..4), rng.random_range(1..255), 32);
                self.tunnel(place(v6, 0, 0, 0, 0), address, 2000, true)
            }
            Set::StrongSwan => self.strongswan_group(rng, v6),
            Set::Libreswan => self.libreswan_group(rng, v6),
            Set::OneTunnel => self.one_tunnel_group(rng, v6),
            Set::Nested => {
                vec![self.nested(rng, v6, &[0, 8, 15, 16, 20, 24, 24, 26, 28, 29, 30, 31, 32, 32])]
            }
            Set::OffloadedModel | Set::Offloaded => {
                vec![self.nested(rng, v6, &[0, 8, 14, 16, 20, 22, 24, 24, 26, 28, 29, 30, 31, 32, 32])]
            }
            Set::Ports => {
                let mut policy = self.nested(rng, v6, &[8, 16, 24, 28, 32]);
                if rng.random_bool(0.5) {
                    upper_layer(&mut policy.id.selector, rng);
                }
                vec![policy]
            }
            Set::Random => vec![self.random(rng, v6)],
        }
    }

    fn strongswan_group(&mut self, rng: &mut StdRng, v6: bool) -> Vec<Policy> {
        let [zone, net] = [2 + self.groups / 200, self.groups % 200];
        if self.groups == 0 {
            // What charon installs at its start so that its own packets pass.
            let port = PortMatch::exactly;
            let bypasses = [false, true].into_iter().flat_map(|v6| [(v6, 500), (v6, 4500)]);
            return bypasses
                .flat_map(|(v6, ike)| {
                    let everything = place(v6, 0, 0, 0, 0);
                    let selector = selector(everything, everything);
                    let selector = Selector { protocol: 17, ifindex: self.devices[0], ..selector };
                    let outbound = Selector { source_port: port(ike), ..selector };
                    let inbound = Selector { destination_port: port(ike), ..selector };
                    [(Direction::Out, outbound), (Direction::In, inbound)]
                })
                .map(|(direction, selector)| bypass(direction, selector, 32))
                .collect();
        }
        let local =
            place(v6, 1, rng.random_range(1..5), rng.random_range(0..250), *pick(rng, &[24, 24, 24, 32]));
        let remote = place(v6, zone, net, rng.random_range(0..250), *pick(rng, &[24, 24, 24, 32, 28]));
        let shunt = |action| Policy { action, ..bypass(Direction::Out, selector(local, remote), 0) };
        let mut policies = match rng.random_range(0..20) {
            // Traps that wait for their first packet, for a network or one of its services.
            0 => self.tunnel(local, remote, 0, false),
            1 => vec![shunt(Action::Allow)],
            2 => vec![shunt(Action::Block)],
            3 => {
                let mut service = self.tunnel(local, remote, 0, true);
                for policy in &mut service {
                    policy.id.selector.protocol = 6;
                    let port = PortMatch::exactly(443);
                    match policy.id.direction {
                        Direction::Out => policy.id.selector.destination_port = port,
                        _ => policy.id.selector.source_port = port,
                    }
                }
                service
            }
            _ => self.tunnel(local, remote, 0, true),
        };
        for policy in &mut policies {
            let base = match policy.templates[..] {
                [] => 200_000,
                [Template { reqid, .. }] if reqid % 2 == 0 && policy.id.direction == Direction::Out => {
                    600_000
                }
                _ => 400_000,
            };
            policy.priority = strongswan(policy, base);
        }
        policies
    }

    fn libreswan_group(&mut self, rng: &mut StdRng, v6: bool) -> Vec<Policy> {
        let [zone, net] = [2 + self.groups / 200, self.groups % 200];
        if self.groups == 0 {
            // Neighbour discovery is never encrypted.
            let everything = place(true, 0, 0, 0, 0);
            let discovery = |kind| Selector {
                protocol: 58,
                source_port: PortMatch::exactly(kind),
                ..selector(everything, everything)
            };
            let directions = [Direction::In, Direction::Out, Direction::Forward];
            return directions
                .into_iter()
                .flat_map(|direction| (133..=137).map(move |kind| (direction, kind)))
                .map(|(direction, kind)| bypass(direction, discovery(kind), 1))
                .collect();
        }
        let local = place(v6, 1, rng.random_range(1..5), 0, *pick(rng, &[16, 24, 24]));
        let remote = place(v6, zone, net, 0, *pick(rng, &[24, 24, 28]));
        let host = place(v6, zone, net, rng.random_range(0..40), 32);
        let mut policies = match rng.random_range(0..20) {
            0 => vec![bypass(Direction::Out, selector(local, host), 0)],
            1 => vec![Policy { action: Action::Block, ..bypass(Direction::Out, selector(local, host), 0) }],
            2 => self.tunnel(place(v6, 1, 0, 5, 32), host, 0, false),
            3 => {
                let mut policies = self.tunnel(local, remote, 0, true);
                policies.push(bypass(Direction::Out, selector(local, host), 0));
                policies
            }
            _ => self.tunnel(local, remote, 0, true),
        };
        for policy in &mut policies {
            let selector = &policy.id.selector;
            let lengths =
                u32::from(selector.source.prefix_len()) + u32::from(selector.destination.prefix_len());
            policy.priority = 2_000_000 - lengths * 4096;
        }
        policies
    }

    fn one_tunnel_group(&mut self, rng: &mut StdRng, v6: bool) -> Vec<Policy> {
        let [zone, net] = [2 + self.groups / 200, self.groups % 200];
        let everywhere = |v6| place(v6, 0, 0, 0, 8);
        if self.groups == 0 {
            self.hub = rng.random_bool(0.5).then(|| [self.reqid(true), self.reqid(true)]);
            if let Some(reqids) = self.hub {
                let wide = [false, true].into_iter().zip(reqids);
                return wide
                    .map(|(v6, reqid)| self.in_tunnel(everywhere(v6), everywhere(v6), reqid, rng))
                    .collect();
            }
        }
        if let Some(reqids) = self.hub {
            let site = place(v6, zone, net, rng.random_range(0..250), *pick(rng, &[24, 24, 24, 28, 32]));
            return vec![self.in_tunnel(everywhere(v6), site, reqids[usize::from(v6)], rng)];
        }
        let reqid = self.reqid(true);
        // Not the whole local network: packets from its first and last address pass.
        let local = place(v6, 1, rng.random_range(1..5), 0, 24);
        let mut subnets = vec![self.in_tunnel(local, place(v6, zone, net, 0, 24), reqid, rng)];
        for _ in 0..rng.random_range(1..5) {
            let remote = place(v6, zone, net, rng.random_range(0..40), *pick(rng, &[24, 26, 28, 30, 32]));
            let local = place(v6, 1, rng.random_range(1..5), 16, *pick(rng, &[22, 24, 28]));
            subnets.push(self.in_tunnel(local, remote, reqid, rng));
        }
        subnets.shuffle(rng);
        subnets
    }

    /// An outbound policy of a tunnel that others have, too. The longer its prefixes, the better, or it is left to chance.
    fn in_tunnel(&mut self, local: IpNet, remote: IpNet, reqid: u32, rng: &mut StdRng) -> Policy {
        let lengths = u32::from(local.prefix_len()) + u32::from(remote.prefix_len());
        let number = if rng.random_bool(0.7) { 2_000 - lengths * 4 } else { priority(rng, true) };
        let mut policy = self.outbound(selector(local, remote), number, true);
        policy.templates.iter_mut().for_each(|template| template.reqid = reqid);
        policy
    }

    /// A policy in one of three small networks on each side.
    fn nested(&mut self, rng: &mut StdRng, v6: bool, lengths: &[u8]) -> Policy {
        let mut somewhere = |zone| {
            let (net, host) = (rng.random_range(0..3), rng.random_range(0..16) * 4);
            place(v6, zone, net, host, *pick(rng, lengths))
        };
        let selector = selector(somewhere(1), somewhere(2));
        let promoted = rng.random_bool(0.55);
        let mut policy = self.outbound(selector, priority(rng, promoted), promoted);
        if !promoted {
            match rng.random_range(0..8) {
                0 => policy.templates = Templates::default(),
                1 => policy.action = Action::Block,
                _ => {}
            }
        }
        policy
    }

    /// An offloaded policy, and others about parts of it, in any order.
    fn nest(&mut self, rng: &mut StdRng, v6: bool) -> Vec<Policy> {
        let nets: [u16; 2] = [rng.random_range(0..6), rng.random_range(0..6)];
        let local = place(v6, 1, nets[0], 0, *pick(rng, &[0, 8, 24, 24]));
        let best = priority(rng, true);
        let mut policies = vec![self.outbound(selector(local, place(v6, 2, nets[1], 0, 24)), best, true)];
        for _ in 0..3 {
            let [source, destination] = [(1, nets[0]), (2, nets[1])].map(|(zone, net)| {
                place(v6, zone, net, rng.random_range(0..16) * 4, *pick(rng, &[24, 26, 28, 32]))
            });
            let promoted = rng.random_bool(0.2);
            let priority = if rng.random_bool(0.2) { best } else { priority(rng, promoted) };
            policies.push(self.outbound(selector(source, destination), priority, promoted));
        }
        policies.shuffle(rng);
        policies
    }

    /// One with anything that a policy may have.
    fn random(&mut self, rng: &mut StdRng, v6: bool) -> Policy {
        let mut policy = self.nested(rng, v6, &[0, 8, 16, 24, 28, 30, 31, 32]);
        let id = &mut policy.id;
        match rng.random_range(0..30) {
            0..3 => upper_layer(&mut id.selector, rng),
            3 => id.direction = Direction::In,
            4 | 5 => id.direction = Direction::Forward,
            6 => id.policy_type = PolicyType::Sub,
            7 => id.mark = *pick(rng, &[Mark { value: 1, mask: 1 }, Mark { value: 0, mask: 3 }]),
            8 => id.if_id = 5,
            9 => id.selector.ifindex = *pick(rng, &self.devices),
            10 => policy.use_limited = true,
            11 => policy.templates.iter_mut().for_each(|template| template.mode = Mode::Transport),
            12 => {
                let twice = policy.templates.first().copied();
                policy.templates.extend(twice);
            }
            13 => {
                for template in policy.templates.iter_mut() {
                    (template.mode, template.optional) = (Mode::Transport, true);
                }
            }
            14 => {
                id.direction = Direction::Forward;
                upper_layer(&mut id.selector, rng);
            }
            15 => {
                id.policy_type = PolicyType::Sub;
                upper_layer(&mut id.selector, rng);
            }
            // Host bits belong to the identity, and to nothing else.
            16 => {
                let destination = id.selector.destination;
                id.selector.destination =
                    IpNet::new(destination.broadcast(), destination.prefix_len()).unwrap_or(destination);
            }
            17 => id.selector.user = 1000,
            _ => {}
        }
        policy
    }

    /// The three policies of a tunnel.
    fn tunnel(&mut self, local: IpNet, remote: IpNet, priority: u32, promoted: bool) -> Vec<Policy> {
        let out = self.outbound(selector(local, remote), priority, promoted);
        let back = |direction, world: &mut Self| {
            let mut template = out.templates[0];
            (template.source, template.destination) = (template.destination, template.source);
            template.reqid = world.reqid(false);
            let id = PolicyId::new(direction, selector(remote, local));
            Policy { priority, templates: [template].into(), ..Policy::new(id) }
        };
        let back = [Direction::In, Direction::Forward].map(|direction| back(direction, self));
        [vec![out], back.to_vec()].concat()
    }

    /// An outbound policy with a tunnel of its own.
    fn outbound(&mut self, selector: Selector, priority: u32, promoted: bool) -> Policy {
        let (source, destination): (IpAddr, IpAddr) = match selector.family() {
            Family::V4 => ([192, 0, 2, 1].into(), [192, 0, 2, 2].into()),
            Family::V6 => {
                let [source, destination] = [1, 2].map(|host| [0x2001, 0xdb8, 0xf, 0, 0, 0, 0, host].into());
                (source, destination)
            }
        };
        let template = Template::esp_tunnel(source, destination, self.reqid(promoted));
        let id = PolicyId::new(Direction::Out, selector);
        Policy { priority, templates: [template].into(), ..Policy::new(id) }
    }

    /// A number that was not used yet.
    fn reqid(&mut self, promoted: bool) -> u32 {
        self.made += 1;
        self.made * 2 + u32::from(promoted)
    }
}

fn selector(source: IpNet, destination: IpNet) -> Selector {
    Selector::between(source, destination).expect("prefixes of one family")
}

fn bypass(direction: Direction, selector: Selector, priority: u32) -> Policy {
    Policy { priority, ..Policy::new(PolicyId::new(direction, selector)) }
}

/// Few different ones, so that there are ties. Many of those that are not offloaded are worse than all that are.
fn priority(rng: &mut StdRng, promoted: bool) -> u32 {
    match rng.random_range(0..10) {
        0..4 if !promoted => rng.random_range(41..80),
        0..8 => *pick(rng, &[10, 20, 30, 40, 40]),
        _ => rng.random_range(1..=40),
    }
}

/// As strongSwan computes it: the more a policy asks for, the lower.
fn strongswan(policy: &Policy, base: u32) -> u32 {
    let selector = &policy.id.selector;
    let lengths = u32::from(selector.source.prefix_len()) + u32::from(selector.destination.prefix_len());
    let ports = selector.source_port.mask.count_ones() + selector.destination_port.mask.count_ones();
    let is_trap = base == 600_000;
    base - lengths * 512 - u32::from(selector.protocol != 0) * 256 - ports * 4 - u32::from(!is_trap)
}

/// Asks for a protocol, and perhaps for ports, or for an ICMP type and code.
fn upper_layer(selector: &mut Selector, rng: &mut StdRng) {
    let icmp = if selector.destination.addr().is_ipv4() { 1 } else { 58 };
    selector.protocol = *pick(rng, &[6, 6, 17, 17, icmp, icmp, 50, 47, 132]);
    if !rng.random_bool(0.7) {
        return;
    }
    let port = if selector.protocol == icmp {
        PortMatch::exactly(*pick(rng, &[0, 8, 128, 3]))
    } else {
        PortMatch { port: *pick(rng, &[22, 443, 500, 0x1100]), mask: *pick(rng, &[0xffff, 0xffff, 0xff00]) }
    };
    if rng.random() {
        selector.source_port = port;
    } else {
        selector.destination_port = port;
    }
}

fn pick<'a, T>(rng: &mut StdRng, options: &'a [T]) -> &'a T {
    options.choose(rng).expect("there are options")
}
