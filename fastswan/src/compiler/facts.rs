//! Host facts about single addresses: which destinations and sources inside a cell are not to be fast.
//!
//! They are not multiplied with the policies. A cell only says that some lie inside it, and then the program
//! looks the address up.

use std::net::IpAddr;

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::path::Paths;
use crate::{
    host::{
        RouteKind,
        routing::{Kinds, Purpose, Routes, kind},
    },
    policy::Family,
    table::{Fact, Port, Probes, ReversePath, Side},
};

/// Stands for any device where only "there is a route" counts; no interface has this index.
const SOME_DEVICE: u32 = 0;

/// The facts about the addresses of one family.
#[derive(Clone, Copy, Debug)]
pub(super) struct AddressFacts<'p> {
    paths: &'p Paths,
    routes: &'p Routes,
    /// A port may ask for the reverse path.
    reverse_path: bool,
}

impl<'p> AddressFacts<'p> {
    pub(super) fn new(paths: &'p Paths, family: Family) -> Self {
        // IPv6 has no reverse path filter.
        let reverse_path = family == Family::V4 && paths.filters_by_reverse_path();
        Self { paths, routes: paths.routes(family), reverse_path }
    }

    /// Whether packets to a prefix may leave through a device, and if so, whether each destination must be looked up.
    pub(super) fn admit_destination(&self, prefix: IpNet, device: u32) -> Result<bool, PassReason> {
        if self.routes.is_vouched() {
            return Ok(false);
        }
        if self.routes.is_unknown() {
            return Err(PassReason::NoPath);
        }
        let fact = self.at(Side::Destination, prefix);
        // Of these there may be many, and mostly the first one says enough.
        let mut learnt = self.routes.path_mtus_inside(prefix);
        if learnt.any(|address| self.at(Side::Destination, address) != fact) {
            return Ok(true);
        }
        let is_one = !self.others_inside(Side::Destination, prefix).any(|(_, other)| other != fact);
        match (fact, is_one) {
            (Fact::Via(ifindex), true) if ifindex == device => Ok(false),
            (Fact::Via(_), true) => Err(PassReason::RouteElsewhere),
            (Fact::Denied, true) => Err(PassReason::DeniedDestination),
            (_, false) => Ok(true),
        }
    }

    /// Whether packets from a prefix may be fast, and if so, whether each source must be looked up.
    pub(super) fn admit_source(&self, prefix: IpNet) -> Result<bool, PassReason> {
        if !self.routes.are_known() {
            return Ok(false);
        }
        let mut others = self.others_inside(Side::Source, prefix);
        match self.fact(Side::Source, prefix) {
            Some(Fact::Denied) if others.all(|(_, other)| other == Fact::Denied) => {
                Err(PassReason::DeniedSource)
            }
            Some(Fact::Denied) => Ok(true),
            // Packets from where no route leads pass if their port asks for one.
            None | Some(Fact::Via(_)) => Ok(others.any(|(_, other)| other == Fact::Denied)),
        }
    }

    /// A prefix around this one, the shortest, inside which [`Self::admit_destination`], or [`Self::admit_source`], says the same of
    /// every prefix; `None` if inside this one it may not.
    pub(super) fn even(&self, side: Side, prefix: IpNet) -> Option<IpNet> {
        match side {
            Side::Destination => self.routes.even(prefix),
            Side::Source => self.routes.even_source(prefix),
        }
    }

    /// Whether the program looks up addresses of a fast cell.
    pub(super) fn probes(&self, side: Side, probes: Probes) -> bool {
        match side {
            Side::Destination => probes.destination,
            Side::Source => probes.source || self.reverse_path,
        }
    }

    /// What the program needs to know to look up the addresses of a prefix: what holds for the prefix, and what else holds
    /// inside it. Of what the program has no fact of, it knows what holds without one.
    pub(super) fn about(&self, side: Side, prefix: IpNet) -> Vec<(IpNet, Fact)> {
        if !self.routes.are_known() {
            return Vec::new();
        }
        let own = self.known(side, prefix);
        self.distinct(side, None, own.into_iter().chain(self.others_inside(side, prefix)))
    }

    /// What of [`Self::about`] a prefix that contains this one lies inside this one, or is it.
    pub(super) fn part(&self, side: Side, prefix: IpNet) -> Vec<(IpNet, Fact)> {
        if !self.routes.are_known() {
            return Vec::new();
        }
        let above = prefix.supernet().and_then(|shorter| self.known(side, shorter));
        let own = self.known(side, prefix).filter(|(covering, _)| *covering == prefix);
        self.distinct(side, above, own.into_iter().chain(self.others_inside(side, prefix)))
    }

    /// Those that say something else than the next shorter prefix; the shortest is in `above`, if there is one.
    fn distinct(
        &self,
        side: Side,
        above: Option<(IpNet, Fact)>,
        facts: impl Iterator<Item = (IpNet, Fact)>,
    ) -> Vec<(IpNet, Fact)> {
        let mut above = Vec::from_iter(above);
        let mut distinct = Vec::new();
        for (prefix, fact) in facts {
            while above.pop_if(|(last, _)| !last.contains(&prefix)).is_some() {}
            if above.last().map(|(_, fact)| *fact).or(self.otherwise(side)) != Some(fact) {
                distinct.push((prefix, fact));
            }
            above.push((prefix, fact));
        }
        distinct
    }

    /// What holds for an address that the program has no fact of, if it goes on then.
    fn otherwise(&self, side: Side) -> Option<Fact> {
        (side == Side::Source && !self.reverse_path).then_some(Fact::Via(SOME_DEVICE))
    }

    /// The longest prefix that contains one, or is it, and has a fact of its own.
    fn covering(&self, side: Side, prefix: IpNet) -> Option<IpNet> {
        let special = self.special_sources(side).filter(|special| special.contains(&prefix));
        let is_learnt = side == Side::Destination && self.routes.path_mtu(prefix).is_some();
        let is_own = side == Side::Source && self.routes.has_own(prefix);
        let itself = (is_learnt || is_own).then_some(prefix);
        self.routes.covering(prefix).into_iter().chain(special).chain(itself).max_by_key(IpNet::prefix_len)
    }

    /// The prefixes strictly inside one for which something else may hold, and what does, in order.
    fn others_inside(&self, side: Side, prefix: IpNet) -> impl Iterator<Item = (IpNet, Fact)> {
        let same = |covering: Option<RouteKind>, kinds: Kinds| match side {
            Side::Destination => is_same_destination(covering, kinds),
            Side::Source => self.is_same_source(covering, kinds),
        };
        let mut inside = self.routes.inside(prefix, same);
        let special = self.special_sources(side);
        inside.extend(special.filter(|special| *special != prefix && prefix.contains(special)));
        match side {
            Side::Destination => inside.extend(self.routes.path_mtus_inside(prefix)),
            Side::Source => inside.extend(self.routes.own_inside(prefix)),
        }
        inside.into_iter().map(move |prefix| (prefix, self.at(side, prefix)))
    }

    fn special_sources(&self, side: Side) -> impl Iterator<Item = IpNet> {
        self.routes.special_sources().filter(move |_| side == Side::Source)
    }

    /// The path MTU that is learnt for an address, if packets to it pass because of that.
    pub(super) fn limiting_path_mtu(&self, destination: IpAddr) -> Option<u32> {
        let family = self.routes.family();
        match self.routes.answer(destination.into(), Purpose::Forward) {
            RouteKind::Unicast { ifindex, mtu, .. } => self
                .routes
                .path_mtu(destination.into())
                .filter(|learnt| mtu == Some(*learnt) && !self.paths.takes_less(ifindex, *learnt, family)),
            _ => None,
        }
    }

    /// Whether a route of a table may decide about addresses for which a longer prefix counts.
    pub(super) fn reaches_inside(&self, table: u32, prefix: IpNet) -> bool {
        self.routes.reaches_inside(table, prefix)
    }

    /// What holds for the addresses of a prefix as destinations and as sources.
    pub(super) fn both(&self, prefix: IpNet) -> [Option<Fact>; 2] {
        [Side::Destination, Side::Source].map(|side| self.fact(side, prefix))
    }

    /// What holds for the addresses of a prefix that no longer prefix is about; `None` if there is no fact of them.
    fn fact(&self, side: Side, prefix: IpNet) -> Option<Fact> {
        self.known(side, prefix).map(|(_, fact)| fact)
    }

    /// The same, and the prefix that it is known of.
    pub(super) fn known(&self, side: Side, prefix: IpNet) -> Option<(IpNet, Fact)> {
        if !self.routes.are_known() {
            return None;
        }
        Some((self.covering(side, prefix)?, self.at(side, prefix)))
    }

    /// What follows for the addresses of a prefix that no longer prefix is about.
    fn at(&self, side: Side, prefix: IpNet) -> Fact {
        match side {
            Side::Destination => self.of_destination(self.routes.answer(prefix, Purpose::Forward)),
            Side::Source => {
                let is_special = || self.special_sources(side).any(|special| special.contains(&prefix));
                match self.of_source(self.routes.answer(prefix, Purpose::Return)) {
                    Fact::Via(_) if self.routes.has_own(prefix) || is_special() => Fact::Denied,
                    fact => fact,
                }
            }
        }
    }

    fn of_destination(&self, route: RouteKind) -> Fact {
        match route {
            // The kernel also refuses packets that are longer than the inner route allows.
            RouteKind::Unicast { ifindex, mtu, .. }
                if mtu.is_none_or(|mtu| self.paths.takes_less(ifindex, mtu, self.routes.family())) =>
            {
                Fact::Via(ifindex)
            }
            _ => Fact::Denied,
        }
    }

    fn of_source(&self, route: RouteKind) -> Fact {
        use RouteKind::{Anycast, Broadcast, Local, Multicast, Unicast};

        match route {
            // IPv6 forwards whatever the source is.
            _ if self.routes.family() == Family::V6 => Fact::Via(SOME_DEVICE),
            Unicast { ifindex, .. } if self.reverse_path => Fact::Via(ifindex),
            Local | Broadcast | Anycast | Multicast => Fact::Denied,
            _ if self.reverse_path => Fact::Denied,
            // Without the filter the kernel asks whether the source is the host's own, and not for a way back.
            _ => Fact::Via(SOME_DEVICE),
        }
    }

    /// The same of sources.
    fn is_same_source(&self, covering: Option<RouteKind>, kinds: Kinds) -> bool {
        let leads_anywhere = kind::FORWARDS | kind::LIMITED | kind::DENIES | kind::UNCLEAR;
        match covering {
            _ if self.routes.family() == Family::V6 => true,
            None | Some(RouteKind::Throw) => {
                !self.reverse_path && kinds.are_within(leads_anywhere | kind::THROWS)
            }
            Some(RouteKind::Unicast { ifindex, .. }) if self.reverse_path => {
                kinds.are_within(kind::FORWARDS | kind::LIMITED) && kinds.device() == Some(ifindex)
            }
            Some(covering) if self.of_source(covering) == Fact::Denied => {
                let others = if self.reverse_path { kind::DENIES | kind::UNCLEAR } else { 0 };
                kinds.are_within(kind::OWN | others)
            }
            Some(_) => kinds.are_within(leads_anywhere),
        }
    }
}

/// Whether all destinations of a subtree have the fact of what covers it.
fn is_same_destination(covering: Option<RouteKind>, kinds: Kinds) -> bool {
    match covering {
        Some(RouteKind::Unicast { ifindex, mtu: None, .. }) => {
            kinds.are_within(kind::FORWARDS) && kinds.device() == Some(ifindex)
        }
        None | Some(RouteKind::Unicast { .. } | RouteKind::Throw) => false,
        Some(_) => kinds.are_within(kind::OWN | kind::DENIES | kind::UNCLEAR),
    }
}

/// Why an address keeps a packet from being fast, and which of both it is.
pub(super) type Denial = (PassReason, Side);

impl AddressFacts<'_> {
    /// What the program finds out about the addresses of a packet.
    pub(super) fn allow(
        &self,
        (source, destination): (IpAddr, IpAddr),
        probes: Probes,
        device: u32,
        port: Option<&Port>,
    ) -> Result<(), Denial> {
        if !self.routes.are_known() {
            return Ok(());
        }
        if probes.destination {
            match self.fact(Side::Destination, destination.into()) {
                Some(Fact::Via(ifindex)) if ifindex == device => {}
                Some(Fact::Via(_)) => return Err((PassReason::RouteElsewhere, Side::Destination)),
                _ => return Err((PassReason::DeniedDestination, Side::Destination)),
            }
        }
        // The kernel has no reverse path filter for IPv6.
        let port = port.filter(|port| source.is_ipv4() && port.reverse_path != ReversePath::Off);
        match (self.fact(Side::Source, source.into()), port) {
            (Some(Fact::Denied), port) if probes.source || port.is_some() => {
                Err((PassReason::DeniedSource, Side::Source))
            }
            (None, Some(_)) => Err((PassReason::ReversePath, Side::Source)),
            (Some(Fact::Via(ifindex)), Some(port))
                if port.reverse_path == ReversePath::Strict && ifindex != port.receiver =>
            {
                Err((PassReason::ReversePath, Side::Source))
            }
            _ => Ok(()),
        }
    }

    /// The priority of the rule by which that is known, or because of which it is not certain.
    pub(super) fn rule(&self, side: Side, address: IpAddr) -> Option<u32> {
        let purpose = if side == Side::Source { Purpose::Return } else { Purpose::Forward };
        let special = || self.routes.special_rule(address).filter(|_| side == Side::Source);
        special().or_else(|| self.routes.rule(address.into(), purpose))
    }
}
