//! Facts about single addresses: which destinations and sources inside a cell are not to be fast.
//!
//! Most are the host's; the sources that cells are [guarded](Region::guarded) against are added. They are not multiplied with the policies. A cell only says that some lie inside it, and then the program
//! looks the address up.

use std::collections::{BTreeMap, BTreeSet};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::{cells::Region, path::Paths};
use crate::{
    host::{HostFacts, RouteKind, routing::Routing},
    policy::Family,
    prefix_map::PrefixMap,
    table::{Cell, Fact, ReversePath, Side},
};

/// Stands for any device where only "there is a route" counts; no interface has this index.
const SOME_DEVICE: u32 = 0;

/// The facts about the addresses of one family, without those that repeat what the next shorter prefix says.
pub(super) struct AddressFacts {
    destinations: Destinations,
    /// What the host says about sources. One that no fact is about may be fast, if no reverse path is asked for.
    sources: PrefixMap<Fact>,
    /// Those of the sources that are denied.
    denied_sources: PrefixMap<()>,
    /// The same with the sources that cells are guarded against.
    guarded_sources: PrefixMap<Fact>,
    /// A port may ask for the reverse path.
    reverse_path: bool,
}

enum Destinations {
    /// Nothing is known.
    Unknown,
    /// The embedder answers for it that all may be fast.
    Vouched,
    /// These. One that no fact is about is unreachable.
    Known(PrefixMap<Fact>),
}

/// What the program must look up for the packets of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Probes {
    pub(super) destination: bool,
    pub(super) source: bool,
}

impl Probes {
    pub(super) fn on(self, side: Side) -> bool {
        match side {
            Side::Destination => self.destination,
            Side::Source => self.source,
        }
    }
}

impl AddressFacts {
    /// What the host says, and that nothing from `guards` is fast where a cell is guarded against them.
    pub(super) fn new(
        host: &HostFacts,
        paths: &Paths<'_>,
        family: Family,
        guards: impl Iterator<Item = IpNet>,
    ) -> Self {
        let none = PrefixMap::new(Vec::new());
        let (destinations, routes) = match paths.routing(family) {
            Routing::Unknown => (Destinations::Unknown, &none),
            Routing::Vouched => (Destinations::Vouched, &none),
            Routing::Known(routes) => (Destinations::Known(by_destination(routes, paths, family)), routes),
        };
        // IPv6 has no reverse path filter.
        let reverse_path =
            family == Family::V4 && host.links.iter().any(|link| link.reverse_path != ReversePath::Off);
        let otherwise = (!reverse_path).then_some(Fact::Via(SOME_DEVICE));
        let sources: Vec<_> =
            routes.iter().map(|(prefix, route)| (prefix, by_source(*route, reverse_path))).collect();

        let guards = PrefixMap::new(guards.map(|guard| (guard, Fact::Denied)).collect());
        let inside_a_guard = |prefix: IpNet| guards.covering(prefix).next().is_some();
        let outside = sources.iter().filter(|(prefix, _)| !inside_a_guard(*prefix)).copied();
        let guarded =
            PrefixMap::new(outside.chain(guards.iter().map(|(guard, fact)| (guard, *fact))).collect());

        let sources = distinct(sources.into_iter(), otherwise);
        let denied = sources.iter().filter(|(_, fact)| **fact == Fact::Denied);
        Self {
            destinations,
            denied_sources: PrefixMap::new(denied.map(|(prefix, _)| (prefix, ())).collect()),
            guarded_sources: distinct(guarded.iter().map(|(prefix, fact)| (prefix, *fact)), otherwise),
            sources,
            reverse_path,
        }
    }

    /// Whether packets of a cell may leave through a device, and what must be looked up for each.
    pub(super) fn admit(&self, region: &Region, device: u32) -> Result<Probes, PassReason> {
        let destination = match &self.destinations {
            Destinations::Unknown => return Err(PassReason::NoPath),
            Destinations::Vouched => false,
            Destinations::Known(facts) => match answer(facts, region.cell.destination) {
                (Some(Fact::Via(ifindex)), true) if ifindex == device => false,
                (Some(Fact::Via(_)), true) => return Err(PassReason::RouteElsewhere),
                (Some(Fact::Denied) | None, true) => return Err(PassReason::DeniedDestination),
                (_, false) => true,
            },
        };
        let source = match answer(&self.sources, region.cell.source) {
            (Some(Fact::Denied), true) => return Err(PassReason::DeniedSource),
            (Some(Fact::Denied), false) => true,
            _ => region.guarded || self.denied_sources.inside(region.cell.source).len() > 0,
        };
        Ok(Probes { destination, source })
    }

    /// The facts on one side that the program needs for cells that are fast.
    pub(super) fn needed(
        &self,
        side: Side,
        cells: impl Iterator<Item = (Cell, Probes)>,
    ) -> BTreeMap<IpNet, Fact> {
        let probed = cells.filter(|(_, probes)| probes.on(side) || side == Side::Source && self.reverse_path);
        let (facts, regions): (_, BTreeSet<IpNet>) = match (side, &self.destinations) {
            (Side::Destination, Destinations::Known(facts)) => {
                (facts, probed.map(|(cell, _)| cell.destination).collect())
            }
            (Side::Destination, _) => return BTreeMap::new(),
            (Side::Source, _) => (&self.guarded_sources, probed.map(|(cell, _)| cell.source).collect()),
        };
        PrefixMap::new(regions.into_iter().map(|region| (region, ())).collect())
            .outermost()
            .flat_map(|region| facts.covering(region).take(1).chain(facts.inside(region)))
            .map(|(prefix, fact)| (prefix, *fact))
            .collect()
    }
}

fn by_destination(routes: &PrefixMap<RouteKind>, paths: &Paths<'_>, family: Family) -> PrefixMap<Fact> {
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
