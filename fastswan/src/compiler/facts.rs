//! Host facts about single addresses: which destinations and sources inside a cell are not to be fast.
//!
//! They are not multiplied with the policies. A cell only says that some lie inside it, and then the program
//! looks the address up.

use std::collections::{BTreeMap, BTreeSet};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::path::Paths;
use crate::{
    host::{HostFacts, RouteKind, routing::Routing},
    policy::Family,
    prefix_map::PrefixMap,
    table::{Cell, Fact, ReversePath, Side},
};

/// Stands for any device where only "there is a route" counts; no interface has this index.
const SOME_DEVICE: u32 = 0;

/// The host facts of one family, without those that repeat what the next shorter prefix says.
pub(super) enum AddressFacts {
    /// Nothing is known.
    Unknown,
    /// The embedder answers for it that all addresses may be fast.
    Vouched,
    /// These.
    Known {
        /// Destinations. One that no fact is about is unreachable.
        destinations: PrefixMap<Fact>,
        /// Sources. One that no fact is about may be fast, if no reverse path is asked for.
        sources: PrefixMap<Fact>,
        /// Those of the sources that are denied.
        denied_sources: PrefixMap<()>,
    },
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
    pub(super) fn new(host: &HostFacts, paths: &Paths<'_>, family: Family) -> Self {
        let routes = match paths.routing(family) {
            Routing::Unknown => return Self::Unknown,
            Routing::Vouched => return Self::Vouched,
            Routing::Known(routes) => routes,
        };
        let destinations = routes.iter().map(|(prefix, route)| {
            let fact = match *route {
                // The kernel also refuses packets that are longer than the inner route allows.
                RouteKind::Unicast { ifindex, mtu, .. }
                    if mtu.is_none_or(|mtu| {
                        paths.link(ifindex).is_some_and(|link| mtu >= link.mtu(family))
                    }) =>
                {
                    Fact::Via(ifindex)
                }
                _ => Fact::Denied,
            };
            (prefix, fact)
        });
        // IPv6 has no reverse path filter.
        let reverse_path =
            family == Family::V4 && host.links.iter().any(|link| link.reverse_path != ReversePath::Off);
        let sources = routes.iter().map(|(prefix, route)| {
            let fact = match *route {
                RouteKind::Unicast { ifindex, .. } if reverse_path => Fact::Via(ifindex),
                RouteKind::Unicast { .. } => Fact::Via(SOME_DEVICE),
                RouteKind::Unclear if !reverse_path => Fact::Via(SOME_DEVICE),
                _ => Fact::Denied,
            };
            (prefix, fact)
        });
        let sources = distinct(sources, (!reverse_path).then_some(Fact::Via(SOME_DEVICE)));
        let denied = sources.iter().filter(|(_, fact)| **fact == Fact::Denied);
        Self::Known {
            destinations: distinct(destinations, None),
            denied_sources: PrefixMap::new(denied.map(|(prefix, _)| (prefix, ())).collect()),
            sources,
        }
    }

    /// Whether packets of a cell may leave through a device, and what must be looked up for each.
    pub(super) fn admit(&self, cell: Cell, device: u32) -> Result<Probes, PassReason> {
        let (destinations, sources, denied_sources) = match self {
            Self::Unknown => return Err(PassReason::NoPath),
            Self::Vouched => return Ok(Probes { destination: false, source: false }),
            Self::Known { destinations, sources, denied_sources } => (destinations, sources, denied_sources),
        };
        let destination = match answer(destinations, cell.destination) {
            (Some(Fact::Via(ifindex)), true) if ifindex == device => false,
            (Some(Fact::Via(_)), true) => return Err(PassReason::RouteElsewhere),
            (Some(Fact::Denied) | None, true) => return Err(PassReason::DeniedDestination),
            (_, false) => true,
        };
        let source = match answer(sources, cell.source) {
            (Some(Fact::Denied), true) => return Err(PassReason::DeniedSource),
            (Some(Fact::Denied), false) => true,
            _ => denied_sources.inside(cell.source).len() > 0,
        };
        Ok(Probes { destination, source })
    }

    /// The facts on one side that the program needs for cells that are fast.
    ///
    /// For destinations those of the cells that are probed; for sources all, because a port may ask for the
    /// reverse path.
    pub(super) fn needed(
        &self,
        side: Side,
        cells: impl Iterator<Item = (Cell, Probes)>,
    ) -> BTreeMap<IpNet, Fact> {
        let Self::Known { destinations, sources, .. } = self else { return BTreeMap::new() };
        let (facts, regions): (_, BTreeSet<IpNet>) = match side {
            Side::Destination => (
                destinations,
                cells.filter(|(_, probes)| probes.destination).map(|(cell, _)| cell.destination).collect(),
            ),
            Side::Source => (sources, cells.map(|(cell, _)| cell.source).collect()),
        };
        let outermost = PrefixMap::new(regions.into_iter().map(|region| (region, ())).collect());
        outermost
            .outermost()
            .flat_map(|region| facts.covering(region).take(1).chain(facts.inside(region)))
            .map(|(prefix, fact)| (prefix, *fact))
            .collect()
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
