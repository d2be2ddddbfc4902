//! How the packets of a policy leave: the device, the Ethernet header and the longest packet.

use std::{collections::HashMap, net::IpAddr};

use super::{hooks::HooksAhead, obstacles::Obstacle};
use crate::{
    host::{Hook, HostFacts, Link, RouteKind, routing::Routing},
    policy::{Family, MacAddr, NextHop, OffloadDev, Overhead, Policy, Template},
    table::{Forwarding, ReversePath},
};

/// What the host knows about paths.
#[derive(Debug)]
pub(super) struct Paths {
    links: HashMap<u32, Link>,
    neighbours: HashMap<(u32, IpAddr), MacAddr>,
    v4: Routing,
    v6: Routing,
    vouched: bool,
    obstacles: Vec<Obstacle>,
    hooks: HooksAhead,
}

impl Paths {
    pub(super) fn new(host: &HostFacts) -> Self {
        let neighbours = host
            .neighbours
            .iter()
            .map(|neighbour| ((neighbour.ifindex, neighbour.destination), neighbour.address));
        Self {
            links: host.links.iter().map(|link| (link.ifindex, link.clone())).collect(),
            neighbours: neighbours.collect(),
            v4: host.routing(Family::V4),
            v6: host.routing(Family::V6),
            vouched: host.vouched,
            obstacles: Obstacle::of_host(host),
            hooks: HooksAhead::new(host),
        }
    }

    pub(super) fn routing(&self, family: Family) -> &Routing {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// What keeps everything, or all of a family, from being fast.
    pub(super) fn obstacles(&self) -> &[Obstacle] {
        &self.obstacles
    }

    /// What packets of a family that leave through a device must not skip.
    pub(super) fn hook(&self, family: Family, device: u32) -> Option<&Hook> {
        self.hooks.of(family, device)
    }

    pub(super) fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.get(&ifindex)
    }

    /// Whether packets of some link are dropped if their source is not routed back.
    pub(super) fn filters_by_reverse_path(&self) -> bool {
        self.links.values().any(|link| link.reverse_path != ReversePath::Off)
    }

    /// How a policy's packets leave its device, or `None` if that is not known or not possible.
    ///
    /// `overheads` are those of the associations that the device may use, at least one; `None` is not known.
    pub(super) fn forwarding(
        &self,
        policy: &Policy,
        device: OffloadDev,
        template: &Template,
        overheads: impl Iterator<Item = Option<Overhead>>,
    ) -> Option<Forwarding> {
        let family = policy.id.selector.family();
        let link = self.link(device.ifindex);
        let usable =
            link.is_some_and(|link| link.up && link.carrier && !(family == Family::V4 && link.bypasses_xfrm));
        if !(usable || link.is_none() && self.vouched) {
            return None;
        }
        if !self.may_send_from(template.source) {
            return None;
        }
        let (gateway, route_mtu) = self.outer_route(template.destination, device.ifindex)?;
        let longest = link.and_then(|link| {
            let outer_mtu = bytes(route_mtu.unwrap_or(u32::MAX).min(link.mtu(family)));
            // A rekey is no reason for a packet that is too long for one of the two associations.
            overheads.map(|overhead| Some(overhead?.longest_inner_packet(outer_mtu))).min()?
        });
        let max_length = [policy.egress.max_length, longest].into_iter().flatten().min()?;
        let rewrite = match policy.egress.next_hop {
            NextHop::Device => None,
            NextHop::Fixed { source, destination } => Some((source, destination)),
            NextHop::Neighbour => {
                let neighbour = gateway.unwrap_or(template.destination);
                Some((link?.address?, *self.neighbours.get(&(device.ifindex, neighbour))?))
            }
        };
        (max_length > 0).then_some(Forwarding { ifindex: device.ifindex, max_length, rewrite })
    }

    /// Whether the kernel finds a route for packets from an outer source: IPv4 asks whether it is an address of the host
    /// (`ip_route_output_key_hash_rcu`; else `XfrmOutBundleGenError`), IPv6 does not.
    pub(super) fn may_send_from(&self, source: IpAddr) -> bool {
        let routing = self.routing(source.into());
        source.is_ipv6()
            || matches!(routing, Routing::Vouched)
            || routing.route(source) == Some(RouteKind::Local)
    }

    /// Gateway and MTU of the route to an outer destination, if it leads through the device.
    fn outer_route(&self, destination: IpAddr, device: u32) -> Option<(Option<IpAddr>, Option<u32>)> {
        let family = Family::from(destination);
        match (self.routing(family), self.routing(family).route(destination)) {
            (Routing::Vouched, _) => Some((None, None)),
            (_, Some(RouteKind::Unicast { ifindex, gateway, mtu })) if ifindex == device => {
                Some((gateway, mtu))
            }
            _ => None,
        }
    }
}

/// A length in bytes as IP writes it.
fn bytes(length: u32) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}
