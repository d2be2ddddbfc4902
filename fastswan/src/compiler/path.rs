//! How the packets of a policy leave: the device, the Ethernet header and the longest packet.

use std::net::{IpAddr, Ipv4Addr};

use fastswan_ebpf::PassReason;
use hashbrown::HashMap;
use ipnet::{IpNet, Ipv4Net};

use super::{hooks::HooksAhead, last::Last, obstacles::Obstacle, rule::eligible};
use crate::{
    host::{
        Hook, HostChange, HostFacts, Link, Neighbour, PathMtu, RouteKind,
        path_mtu::least,
        routing::{Effect, Purpose, Routes},
    },
    policy::{Family, MacAddr, NextHop, OffloadDev, Overhead, Policy, Template},
    table::{Forwarding, ReversePath},
};

/// What the host knows about paths.
#[derive(Debug)]
pub(super) struct Paths {
    links: HashMap<u32, Link>,
    neighbours: HashMap<(u32, IpAddr), MacAddr>,
    v4: Routes,
    v6: Routes,
    vouched: bool,
    /// Families of which more path MTUs may have been learnt than are known.
    unclear_path_mtus: Vec<Family>,
    /// A link asks for the reverse path, or did: that a link comes and goes which does changes nothing else.
    filters_by_reverse_path: bool,
    hooks: HooksAhead,
}

impl Paths {
    pub(super) fn new(host: &HostFacts) -> Self {
        let neighbours = host
            .neighbours
            .iter()
            .map(|neighbour| ((neighbour.ifindex, neighbour.destination), neighbour.address));
        let mut new = Self {
            links: host.links.iter().map(|link| (link.ifindex, link.clone())).collect(),
            neighbours: neighbours.collect(),
            v4: Routes::new(host, Family::V4),
            v6: Routes::new(host, Family::V6),
            vouched: host.vouched,
            unclear_path_mtus: host.unclear_path_mtus.clone(),
            filters_by_reverse_path: false,
            hooks: HooksAhead::new(&host.hooks),
        };
        new.look_for_filters();
        new
    }

    /// Takes up a change, and returns what it may change in turn.
    pub(super) fn change(&mut self, change: &HostChange) -> Concerns {
        match change {
            // Tables ask devices themselves.
            HostChange::Device { .. } => Concerns::Nothing,
            HostChange::Link(link) => {
                let old = self.links.insert(link.ifindex, link.clone());
                if old.as_ref() == Some(link) {
                    return Concerns::Nothing;
                }
                let is_renamed = old.as_ref().is_none_or(|old| old.name != link.name);
                let has_other_length =
                    old.as_ref().is_none_or(|old| (old.mtu, old.mtu_v6) != (link.mtu, link.mtu_v6));
                self.of_link(link.ifindex, is_renamed, has_other_length)
            }
            HostChange::LinkGone(ifindex) => match self.links.remove(ifindex) {
                Some(_) => self.of_link(*ifindex, true, true),
                None => Concerns::Nothing,
            },
            HostChange::Routes { table, destination, routes } => {
                let family = Family::of(destination);
                let known = self.routes_mut(family);
                if known.is_vouched() {
                    return Concerns::Nothing;
                }
                match known.set_routes(*table, *destination, routes) {
                    Effect::Nothing => Concerns::Nothing,
                    Effect::Prefix => Concerns::Addresses(*destination, Some(*table)),
                    Effect::Everything => Concerns::Everything,
                }
            }
            HostChange::Rules(family, rules) => {
                let Self { links, v4, v6, .. } = self;
                let known = if *family == Family::V4 { v4 } else { v6 };
                if !known.is_vouched() && known.set_rules(rules.clone(), |name| is_named(links, name)) {
                    Concerns::Everything
                } else {
                    Concerns::Nothing
                }
            }
            HostChange::Neighbour(Neighbour { ifindex, destination, address }) => {
                let key = (*ifindex, *destination);
                match self.neighbours.insert(key, *address) {
                    Some(old) if old == *address => Concerns::Nothing,
                    _ => Concerns::Neighbour(key),
                }
            }
            HostChange::NeighbourGone { ifindex, destination } => {
                let key = (*ifindex, *destination);
                self.neighbours.remove(&key).map_or(Concerns::Nothing, |_| Concerns::Neighbour(key))
            }
            HostChange::PathMtu(PathMtu { destination, mtu }) => self.set_path_mtu(*destination, Some(*mtu)),
            HostChange::PathMtuGone(destination) => self.set_path_mtu(*destination, None),
            HostChange::Address(own) => self.set_own(*own, true),
            HostChange::AddressGone(own) => self.set_own(*own, false),
            HostChange::UnclearPathMtus(families) => {
                if *families == self.unclear_path_mtus {
                    return Concerns::Nothing;
                }
                self.unclear_path_mtus.clone_from(families);
                Concerns::Policies
            }
            HostChange::Hooks(hooks) => {
                let hooks = HooksAhead::new(hooks);
                if hooks == self.hooks {
                    return Concerns::Nothing;
                }
                self.hooks = hooks;
                Concerns::Policies
            }
        }
    }

    fn set_path_mtu(&mut self, destination: IpAddr, mtu: Option<u32>) -> Concerns {
        let known = self.routes_mut(destination.into());
        if !known.is_vouched() && known.set_path_mtu(destination, mtu) {
            Concerns::Addresses(destination.into(), None)
        } else {
            Concerns::Nothing
        }
    }

    fn set_own(&mut self, own: Ipv4Addr, is_own: bool) -> Concerns {
        if !self.v4.is_vouched() && self.v4.set_own(own, is_own) {
            Concerns::Addresses(Ipv4Net::from(own).into(), None)
        } else {
            Concerns::Nothing
        }
    }

    fn of_link(&mut self, ifindex: u32, is_renamed: bool, has_other_length: bool) -> Concerns {
        let filtered = self.filters_by_reverse_path;
        self.look_for_filters();
        let mut is_everything = self.filters_by_reverse_path != filtered;
        if is_renamed {
            let has_link = |name: &str| is_named(&self.links, name);
            is_everything |= self.v4.links_changed(has_link) | self.v6.links_changed(has_link);
        }
        // Routes may be for shorter packets than the link takes.
        is_everything |= has_other_length && (self.v4.limits_on(ifindex) || self.v6.limits_on(ifindex));
        if is_everything {
            Concerns::Everything
        } else if self.hooks.are_on_devices() {
            // Packets may leave through a device with a hook now.
            Concerns::Policies
        } else {
            Concerns::Device(ifindex)
        }
    }

    fn look_for_filters(&mut self) {
        self.filters_by_reverse_path |= self.links.values().any(|link| link.reverse_path != ReversePath::Off);
    }

    pub(super) fn routes(&self, family: Family) -> &Routes {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    fn routes_mut(&mut self, family: Family) -> &mut Routes {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// What packets of a family that leave through a device must not skip.
    pub(super) fn hook(&self, family: Family, device: u32) -> Option<&Hook> {
        self.hooks.of(family, device, &self.links)
    }

    /// What keeps everything, or all of a family, from being fast.
    pub(super) fn obstacles(&self) -> Vec<Obstacle> {
        let mut obstacles = self.hooks.obstacles();
        if self.vouched {
            return obstacles;
        }
        for family in [Family::V4, Family::V6] {
            let routes = self.routes(family);
            if let Some(priority) = routes.obscure_rule() {
                obstacles.push(Obstacle::Rule { family, priority });
            } else if routes.is_unknown() {
                obstacles.push(Obstacle::UnknownHost(family));
                continue;
            }
            let forwards = |link: &Link| match family {
                Family::V4 => link.forwards.v4,
                Family::V6 => link.forwards.v6,
            };
            if !self.links.values().any(forwards) {
                obstacles.push(Obstacle::NotForwarding(family));
            }
        }
        obstacles
    }

    /// Whether a link takes no longer packets than these.
    pub(super) fn takes_less(&self, ifindex: u32, mtu: u32, family: Family) -> bool {
        self.links.get(&ifindex).is_some_and(|link| link.mtu(family) <= mtu)
    }

    /// Whether packets of some link are dropped if their source is not routed back.
    pub(super) fn filters_by_reverse_path(&self) -> bool {
        self.filters_by_reverse_path
    }

    /// How a policy's packets leave its device, or why they do not.
    ///
    /// `outer` is the [route](Self::outer_route) of the template, `overheads` are those of the associations that the device may use,
    /// at least one; `None` is not known.
    pub(super) fn forwarding(
        &self,
        policy: &Policy,
        device: OffloadDev,
        template: &Template,
        outer: Option<OuterRoute>,
        overheads: impl Iterator<Item = Option<Overhead>>,
    ) -> Result<Forwarding, Lack> {
        let family = policy.id.selector.family();
        let link = self.links.get(&device.ifindex);
        let is_usable = |link: &Link| {
            link.up
                && link.carrier
                && !(family == Family::V4 && link.bypasses_xfrm)
                && !link.controller.is_some_and(|controller| self.is_vrf(controller))
        };
        let usable = link.is_some_and(is_usable);
        if !(usable || link.is_none() && self.vouched) {
            return Err(Lack::PATH);
        }
        if !self.may_send_from(template.source) {
            return Err(Lack::PATH);
        }
        let route = outer.ok_or(Lack::PATH)?;
        let longest = link.and_then(|link| {
            let outer_mtu = route.mtu.unwrap_or(u32::MAX).min(link.mtu(family));
            let outer_mtu = bytes(self.longest_if_unclear(template.destination.into()).min(outer_mtu));
            // A rekey is no reason for a packet that is too long for one of the two associations.
            overheads.map(|overhead| Some(overhead?.longest_inner_packet(outer_mtu))).min()?
        });
        let max_length = [policy.egress.max_length, longest].into_iter().flatten().min();
        // What was learnt for the inner destination may be what is not known.
        let max_length = max_length.map(|length| length.min(bytes(self.longest_if_unclear(family))));
        let max_length = max_length.filter(|length| *length > 0).ok_or(Lack::PATH)?;
        let rewrite = match policy.egress.next_hop {
            NextHop::Device => None,
            NextHop::Fixed { source, destination } => Some((source, destination)),
            NextHop::Neighbour => {
                let source = link.and_then(|link| link.address).ok_or(Lack::PATH)?;
                let neighbour = neighbour(policy, outer).ok_or(Lack::PATH)?;
                let destination = self.neighbours.get(&neighbour).ok_or(Lack::Neighbour(neighbour))?;
                Some((source, *destination))
            }
        };
        Ok(Forwarding { ifindex: device.ifindex, max_length, rewrite })
    }

    /// Whether the Ethernet address of a neighbour is known.
    pub(super) fn knows(&self, neighbour: &(u32, IpAddr)) -> bool {
        self.neighbours.contains_key(neighbour)
    }

    /// Whether the kernel finds a route for packets from an outer source: IPv4 asks whether it is an address of the host
    /// (`ip_route_output_key_hash_rcu`; else `XfrmOutBundleGenError`), IPv6 does not.
    pub(super) fn may_send_from(&self, source: IpAddr) -> bool {
        let routes = self.routes(source.into());
        source.is_ipv6() || routes.is_vouched() || routes.is_own(source)
    }

    /// The route to a template's destination, if it leads through the device.
    pub(super) fn outer_route(&self, template: &Template, device: u32) -> Option<OuterRoute> {
        let routes = self.routes(template.destination.into());
        if routes.is_vouched() {
            return Some(OuterRoute { gateway: None, mtu: None });
        }
        if routes.is_unknown() {
            return None;
        }
        match routes.answer(template.destination.into(), Purpose::Output(template.source)) {
            RouteKind::Unicast { ifindex, gateway, mtu } if ifindex == device => {
                Some(OuterRoute { gateway, mtu })
            }
            _ => None,
        }
    }

    /// The longest packet that no path MTU keeps back, as far as they are known.
    fn longest_if_unclear(&self, family: Family) -> u32 {
        let is_unclear = !self.vouched && self.unclear_path_mtus.contains(&family);
        if is_unclear { least(family) } else { u32::MAX }
    }

    fn is_vrf(&self, ifindex: u32) -> bool {
        self.links.get(&ifindex).is_none_or(|link| link.kind == "vrf")
    }
}

/// Why a policy's packets must not leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// Something, for which this is the reason that is counted.
    Reason(PassReason),
    /// All is known but the Ethernet address of this neighbour.
    Neighbour((u32, IpAddr)),
}

impl Lack {
    const PATH: Self = Self::Reason(PassReason::NoPath);

    pub(super) fn reason(self) -> PassReason {
        match self {
            Self::Reason(reason) => reason,
            Self::Neighbour(_) => PassReason::NoPath,
        }
    }
}

impl From<PassReason> for Lack {
    fn from(reason: PassReason) -> Self {
        Self::Reason(reason)
    }
}

/// What a change of the host may change in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Concerns {
    /// Nothing.
    Nothing,
    /// How packets to and from these addresses go; if a table's routes have changed, not those for which it has a longer prefix.
    Addresses(IpNet, Option<u32>),
    /// How packets leave by a device.
    Device(u32),
    /// What frames are sent to a neighbour by a device.
    Neighbour((u32, IpAddr)),
    /// How packets of any policy leave, but no address.
    Policies,
    /// All of it.
    Everything,
}

/// Where a policy's packets go once they are in the tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct OuterRoute {
    gateway: Option<IpAddr>,
    mtu: Option<u32>,
}

/// Outer routes of one policy after the other.
#[derive(Debug)]
pub(super) struct OuterRoutes<'p> {
    paths: &'p Paths,
    /// By device and outer source.
    last: Last<(u32, IpAddr), Option<OuterRoute>>,
}

impl<'p> OuterRoutes<'p> {
    pub(super) fn new(paths: &'p Paths) -> Self {
        Self { paths, last: Last::default() }
    }

    /// That of a policy whose packets could be fast.
    pub(super) fn of(&mut self, policy: &Policy) -> Option<OuterRoute> {
        let (template, device) = (eligible(policy).ok()?, policy.offload?.ifindex);
        let far_end = template.destination;
        self.last.get_or_find(
            (device, template.source),
            far_end.into(),
            || self.paths.routes(far_end.into()).even(far_end.into()),
            || self.paths.outer_route(template, device),
        )
    }
}

/// The neighbour that packets of a policy are sent to by their outer route, if it must be known and is not one of several.
pub(super) fn neighbour(policy: &Policy, outer: Option<OuterRoute>) -> Option<(u32, IpAddr)> {
    if policy.egress.next_hop != NextHop::Neighbour {
        return None;
    }
    let (template, device) = (eligible(policy).ok()?, policy.offload?);
    let address = outer?.gateway.unwrap_or(template.destination);
    (!address.is_unspecified()).then_some((device.ifindex, address))
}

fn is_named(links: &HashMap<u32, Link>, name: &str) -> bool {
    links.values().any(|link| link.name == name)
}

/// A length in bytes as IP writes it.
fn bytes(length: u32) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}
