//! Host facts about single addresses: which destinations and sources inside a cell are not to be fast.
//!
//! They are not multiplied with the policies. A cell only says that some lie inside it, and then the program
//! looks the address up.

use std::net::IpAddr;

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::path::Paths;
use crate::{
    host::{RouteKind, routing::Routing},
    policy::Family,
    prefix_map::PrefixMap,
    table::{Fact, Port, Probes, ReversePath, Side},
};

/// Stands for any device where only "there is a route" counts; no interface has this index.
const SOME_DEVICE: u32 = 0;

/// The facts about the addresses of one family, without those that repeat what the next shorter prefix says.
#[derive(Debug)]
pub(super) struct AddressFacts {
    destinations: Destinations,
    /// A source that no fact is about may be fast, if no reverse path is asked for.
    sources: PrefixMap<Fact>,
    /// Those of the sources that are denied.
    denied_sources: PrefixMap<()>,
    /// A port may ask for the reverse path.
    reverse_path: bool,
}

#[derive(Debug)]
enum Destinations {
    /// Nothing is known.
    Unknown,
    /// The embedder answers for it that all may be fast.
    Vouched,
    /// These. One that no fact is about is unreachable.
    Known(PrefixMap<Fact>),
}

impl AddressFacts {
    pub(super) fn new(paths: &Paths, family: Family) -> Self {
        let none = PrefixMap::new(Vec::new());
        let (destinations, routes) = match paths.routing(family) {
            Routing::Unknown => (Destinations::Unknown, &none),
            Routing::Vouched => (Destinations::Vouched, &none),
            Routing::Known(routes) => (Destinations::Known(by_destination(routes, paths, family)), routes),
        };
        // IPv6 has no reverse path filter.
        let reverse_path = family == Family::V4 && paths.filters_by_reverse_path();
        let otherwise = (!reverse_path).then_some(Fact::Via(SOME_DEVICE));
        let sources = routes.iter().map(|(prefix, route)| (prefix, by_source(*route, reverse_path)));
        let sources = distinct(sources, otherwise);
        let denied = sources.iter().filter(|(_, fact)| **fact == Fact::Denied);
        let denied_sources = PrefixMap::new(denied.map(|(prefix, _)| (prefix, ())).collect());
        Self { destinations, sources, denied_sources, reverse_path }
    }

    /// Whether packets to a prefix may leave through a device, and if so, whether each destination must be looked up.
    pub(super) fn admit_destination(&self, prefix: IpNet, device: u32) -> Result<bool, PassReason> {
        match &self.destinations {
            Destinations::Unknown => Err(PassReason::NoPath),
            Destinations::Vouched => Ok(false),
            Destinations::Known(facts) => match answer(facts, prefix) {
                (Some(Fact::Via(ifindex)), true) if ifindex == device => Ok(false),
                (Some(Fact::Via(_)), true) => Err(PassReason::RouteElsewhere),
                (Some(Fact::Denied) | None, true) => Err(PassReason::DeniedDestination),
                (_, false) => Ok(true),
            },
        }
    }

    /// Whether packets from a prefix may be fast, and if so, whether each source must be looked up.
    pub(super) fn admit_source(&self, prefix: IpNet) -> Result<bool, PassReason> {
        match answer(&self.sources, prefix) {
            (Some(Fact::Denied), true) => Err(PassReason::DeniedSource),
            (Some(Fact::Denied), false) => Ok(true),
            _ => Ok(self.denied_sources.inside(prefix).len() > 0),
        }
    }

    /// Whether the program looks up addresses of a fast cell.
    pub(super) fn probes(&self, side: Side, probes: Probes) -> bool {
        match side {
            Side::Destination => probes.destination,
            Side::Source => probes.source || self.reverse_path,
        }
    }

    /// What the program needs to know to look up the addresses of a prefix.
    pub(super) fn about(&self, side: Side, prefix: IpNet) -> Vec<(IpNet, Fact)> {
        let facts = match (side, &self.destinations) {
            (Side::Destination, Destinations::Known(facts)) => facts,
            (Side::Destination, _) => return Vec::new(),
            (Side::Source, _) => &self.sources,
        };
        let covering = facts.covering(prefix).take(1).filter(|(covering, _)| *covering != prefix);
        covering.chain(facts.inside(prefix)).map(|(prefix, fact)| (prefix, *fact)).collect()
    }
}

/// Why an address keeps a packet from being fast: the reason, which address, and what is known about it.
pub(super) type Denial = (PassReason, Side, Option<(IpNet, Fact)>);

impl AddressFacts {
    /// What the program finds out about the addresses of a packet.
    pub(super) fn allow(
        &self,
        (source, destination): (IpAddr, IpAddr),
        probes: Probes,
        device: u32,
        port: Option<&Port>,
    ) -> Result<(), Denial> {
        let known = |facts: &PrefixMap<Fact>, address: IpAddr| {
            facts.covering(address.into()).next().map(|(prefix, fact)| (prefix, *fact))
        };
        if probes.destination
            && let Destinations::Known(facts) = &self.destinations
        {
            let known = known(facts, destination);
            match known {
                Some((_, Fact::Via(ifindex))) if ifindex == device => {}
                Some((_, Fact::Via(_))) => {
                    return Err((PassReason::RouteElsewhere, Side::Destination, known));
                }
                _ => return Err((PassReason::DeniedDestination, Side::Destination, known)),
            }
        }
        let known = known(&self.sources, source);
        // The kernel has no reverse path filter for IPv6.
        let port = port.filter(|port| source.is_ipv4() && port.reverse_path != ReversePath::Off);
        match (known, port) {
            (Some((_, Fact::Denied)), port) if probes.source || port.is_some() => {
                Err((PassReason::DeniedSource, Side::Source, known))
            }
            (None, Some(_)) => Err((PassReason::ReversePath, Side::Source, None)),
            (Some((_, Fact::Via(ifindex))), Some(port))
                if port.reverse_path == ReversePath::Strict && ifindex != port.receiver =>
            {
                Err((PassReason::ReversePath, Side::Source, known))
            }
            _ => Ok(()),
        }
    }
}

fn by_destination(routes: &PrefixMap<RouteKind>, paths: &Paths, family: Family) -> PrefixMap<Fact> {
    let fact = |route| match route {
        // The kernel also refuses packets that are longer than the inner route allows.
        RouteKind::Unicast { ifindex, mtu, .. }
            if mtu.is_none_or(|mtu| paths.link(ifindex).is_some_and(|link| mtu >= link.mtu(family))) =>
        {
            Fact::Via(ifindex)
        }
        _ => Fact::Denied,
    };
    distinct(routes.iter().map(|(prefix, route)| (prefix, fact(*route))), None)
}

fn by_source(route: RouteKind, reverse_path: bool) -> Fact {
    match route {
        RouteKind::Unicast { ifindex, .. } if reverse_path => Fact::Via(ifindex),
        RouteKind::Unicast { .. } => Fact::Via(SOME_DEVICE),
        RouteKind::Unclear if !reverse_path => Fact::Via(SOME_DEVICE),
        _ => Fact::Denied,
    }
}

/// The fact about a prefix as a whole, and whether it holds for all of its addresses.
fn answer(facts: &PrefixMap<Fact>, prefix: IpNet) -> (Option<Fact>, bool) {
    let inside = facts.inside(prefix).any(|(inside, _)| inside != prefix);
    (facts.covering(prefix).next().map(|(_, fact)| *fact), !inside)
}

/// The facts that say something else than the next shorter prefix; `otherwise` is what holds without any.
fn distinct(facts: impl Iterator<Item = (IpNet, Fact)>, otherwise: Option<Fact>) -> PrefixMap<Fact> {
    let mut kept = Vec::new();
    let mut covering: Vec<(IpNet, Fact)> = Vec::new();
    for (prefix, fact) in facts {
        while covering.pop_if(|(last, _)| !last.contains(&prefix)).is_some() {}
        if covering.last().map(|(_, fact)| *fact).or(otherwise) != Some(fact) {
            kept.push((prefix, fact));
            covering.push((prefix, fact));
        }
    }
    PrefixMap::new(kept)
}
