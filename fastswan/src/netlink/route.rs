//! Reads host facts from the kernel: rtnetlink dumps and sysctls.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        InfoData, InfoVlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, VlanProtocol,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia},
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{
    hooks::read_hooks,
    links::settle as settle_links,
    remedy,
    request::{DUMP, RequestError, Requests},
};
use crate::{
    host::{self, HostError, HostFacts, Link, Neighbour, Route, RouteKind, Rule, RuleSelector},
    policy::{Family, MacAddr},
    table::{Forwards, ReversePath},
};

/// How often a dump is asked for that changes keep interrupting.
const ATTEMPTS: u32 = 16;

impl HostFacts {
    /// Reads them from the kernel, in the network namespace of the calling thread, and blocks meanwhile. They age at once: to
    /// forward by them, follow a [`NetlinkHost`](crate::NetlinkHost), as a gateway does.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    pub fn read() -> Result<Self, HostError> {
        Ok(Self { hooks: read_hooks(), ..read_host()? })
    }
}

/// Reads the facts from the kernel, in the network namespace of this thread.
///
/// The kernel answers at once, so this waits for nothing but what is being done to links; it takes a few microseconds for
/// each route and neighbour. A change while it reads may be seen in part: read again after a change.
pub(crate) fn read_host() -> Result<HostFacts, HostError> {
    // A link's notification comes before the routes go that it takes along, which are not notified of.
    match settle_links() {
        // Whoever lacks privilege for that cannot forward either.
        Err(error) if error.raw_os_error() != Some(libc::EPERM) => {
            return Err(system("waiting for changes of links", error));
        }
        _ => {}
    }
    let mut dumps = Dumps::open()?;
    let sysctls = Sysctls::default();
    let links = dumps.links()?.iter().map(|message| link(message, &sysctls)).collect();
    let mut facts = HostFacts { links, ..HostFacts::default() };
    for family in [Family::V4, Family::V6] {
        facts.rules.extend(dumps.rules(family)?.iter().filter_map(|message| rule(message, family)));
        for message in dumps.routes(family)? {
            facts.routes.extend(route(&message, family)?);
        }
    }
    facts.neighbours = dumps.neighbours()?.iter().filter_map(neighbour).collect();
    Ok(facts)
}

fn system(attempt: &str, error: io::Error) -> HostError {
    HostError::System { attempt: attempt.to_owned(), remedy: remedy(&error), error }
}

/// Asks for one list after the other.
struct Dumps(Requests);

impl Dumps {
    fn open() -> Result<Self, HostError> {
        let kernel = Requests::open(NETLINK_ROUTE);
        kernel.map(Self).map_err(|error| system("opening a NETLINK_ROUTE socket", error))
    }

    fn links(&mut self) -> Result<Vec<LinkMessage>, HostError> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        self.dump("links", &RouteNetlinkMessage::GetLink(request), |message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })
    }

    fn rules(&mut self, family: Family) -> Result<Vec<RuleMessage>, HostError> {
        let mut request = RuleMessage::default();
        request.header.family = address_family(family);
        self.dump("rules", &RouteNetlinkMessage::GetRule(request), |message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        })
    }

    fn routes(&mut self, family: Family) -> Result<Vec<RouteMessage>, HostError> {
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        self.dump("routes", &RouteNetlinkMessage::GetRoute(request), |message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
    }

    fn neighbours(&mut self) -> Result<Vec<NeighbourMessage>, HostError> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump("neighbours", &request, |message| match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
            _ => None,
        })
    }

    fn dump<T>(
        &mut self,
        object: &'static str,
        request: &RouteNetlinkMessage,
        select: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, HostError> {
        for _ in 0..ATTEMPTS {
            let failed = |error| system(&format!("listing {object}"), error);
            match self.0.ask_for(DUMP, request) {
                Ok(messages) => return Ok(messages.into_iter().filter_map(select).collect()),
                // The kernel was built without it.
                Err(RequestError::Refused(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => return Ok(Vec::new()),
                Err(RequestError::Interrupted) => {}
                Err(RequestError::Undecodable(reason)) => {
                    return Err(HostError::Undecodable { object, reason });
                }
                Err(error @ (RequestError::System(_) | RequestError::Refused(_))) => {
                    return Err(failed(error.into()));
                }
            }
        }
        Err(HostError::Changing { object })
    }
}

/// `net.ipv4.conf` and `net.ipv6.conf`. What cannot be read counts as the value that makes nothing fast.
#[derive(Default)]
struct Sysctls(std::cell::RefCell<HashMap<String, Option<u32>>>);

impl Sysctls {
    fn read(&self, family: &str, device: &str, name: &str) -> Option<u32> {
        // procfs shows the calling thread's namespace.
        let path = format!("/proc/sys/net/{family}/conf/{device}/{name}");
        let mut known = self.0.borrow_mut();
        *known.entry(path).or_insert_with_key(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
    }

    fn is_on(&self, family: &str, device: &str, name: &str) -> bool {
        self.read(family, device, name).is_some_and(|value| value != 0)
    }

    /// Forwarding is a property of each device for IPv4, but of the host for IPv6 (`ip6_forward`); since
    /// Linux 6.17 a device can be made to forward although the host does not.
    fn forwards(&self, device: &str) -> Forwards {
        Forwards {
            v4: self.is_on("ipv4", device, "forwarding"),
            v6: self.read("ipv6", device, "disable_ipv6") == Some(0)
                && (self.is_on("ipv6", "all", "forwarding")
                    || self.is_on("ipv6", device, "force_forwarding")),
        }
    }

    /// `IN_DEV_RPFILTER`: the greater of both counts.
    fn reverse_path(&self, device: &str) -> ReversePath {
        let filters = ["all", device].map(|device| self.read("ipv4", device, "rp_filter").unwrap_or(1));
        match filters.into_iter().max() {
            Some(0) => ReversePath::Off,
            Some(2) => ReversePath::Loose,
            _ => ReversePath::Strict,
        }
    }

    /// `IN_DEV_NOXFRM`: either counts.
    fn bypasses_xfrm(&self, device: &str) -> bool {
        ["all", device].iter().any(|device| self.read("ipv4", device, "disable_xfrm") != Some(0))
    }
}

fn link(message: &LinkMessage, sysctls: &Sysctls) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        ..Link::default()
    };
    let mut parent_is_elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.address = ethernet_address(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(parent) => link.parent = Some(*parent).filter(|parent| *parent != 0),
            LinkAttribute::LinkNetNsId(_) => parent_is_elsewhere = true,
            LinkAttribute::Controller(controller) => {
                link.controller = Some(*controller).filter(|controller| *controller != 0);
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Vlan(vlan)) => link.vlan = vlan_id(vlan),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if parent_is_elsewhere {
        link.parent = None;
    }
    link.mtu_v6 = sysctls.read("ipv6", &link.name, "mtu").unwrap_or(0);
    link.forwards = sysctls.forwards(&link.name);
    link.reverse_path = sysctls.reverse_path(&link.name);
    link.bypasses_xfrm = sysctls.bypasses_xfrm(&link.name);
    link
}

fn vlan_id(infos: &[InfoVlan]) -> Option<u16> {
    let is_802_1q = |info: &InfoVlan| matches!(info, InfoVlan::Protocol(VlanProtocol::Ieee8021Q));
    let id = infos.iter().find_map(|info| match info {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    });
    id.filter(|_| infos.iter().any(is_802_1q))
}

/// A rule, or `None` if it is for another family.
fn rule(message: &RuleMessage, family: Family) -> Option<Rule> {
    let header = &message.header;
    if header.family != address_family(family) {
        return None;
    }
    let mut selector = RuleSelector { other: header.tos != 0, ..RuleSelector::default() };
    selector.inverted = header.flags.contains(RuleFlags::Invert);
    let (mut priority, mut table) = (0, u32::from(header.table));
    let (mut suppress_prefix_length, mut suppress_group, mut target) = (None, false, None);
    let (mut value, mut mask) = (None, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Goto(value) => target = Some(*value),
            RuleAttribute::Source(address) => {
                selector.source = IpNet::new(*address, header.src_len).ok().map(|prefix| prefix.trunc());
            }
            RuleAttribute::Destination(address) => {
                selector.destination = IpNet::new(*address, header.dst_len).ok().map(|prefix| prefix.trunc());
            }
            RuleAttribute::FwMark(number) => value = Some(*number),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Iifname(name) => selector.iif = Some(name.clone()),
            RuleAttribute::Oifname(name) => selector.oif = Some(name.clone()),
            RuleAttribute::L3MDev(is_on) => selector.l3mdev = *is_on,
            // All ones is how the kernel says that it suppresses nothing.
            RuleAttribute::Protocol(_)
            | RuleAttribute::SuppressPrefixLen(u32::MAX)
            | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            RuleAttribute::SuppressPrefixLen(length) => {
                suppress_prefix_length = Some(u8::try_from(*length).unwrap_or(u8::MAX));
            }
            RuleAttribute::SuppressIfGroup(_) => suppress_group = true,
            _ => selector.other = true,
        }
    }
    // The kernel tells of a mark that is 0 by its mask alone.
    if value.is_some() || mask != u32::MAX {
        selector.mark = Some((value.unwrap_or(0), mask));
    }
    let is_cut = |length: u8, prefix: &Option<IpNet>| length != 0 && prefix.is_none();
    selector.other |=
        is_cut(header.src_len, &selector.source) || is_cut(header.dst_len, &selector.destination);
    let action = match (header.action, target) {
        (RuleAction::ToTable, _) => {
            host::RuleAction::Lookup { table, suppress_prefix_length, suppress_group }
        }
        (RuleAction::Goto, Some(target)) => host::RuleAction::Goto(target),
        (RuleAction::Nop, _) => host::RuleAction::Nop,
        (RuleAction::Blackhole | RuleAction::Unreachable | RuleAction::Prohibit, _) => host::RuleAction::Deny,
        _ => host::RuleAction::Unclear,
    };
    Some(Rule::new(family, priority, selector, action))
}

/// A route, or `None` if it is for another family or a cached decision.
fn route(message: &RouteMessage, family: Family) -> Result<Option<Route>, HostError> {
    let header = &message.header;
    if header.address_family != address_family(family) || header.flags.contains(RouteFlags::Cloned) {
        return Ok(None);
    }
    let mut table = u32::from(header.table);
    let unspecified = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut destination = unspecified;
    let (mut metric, mut device, mut gateway, mut mtu) = (0, None, None, None);
    let mut source = None;
    let mut unclear =
        header.flags.intersects(RouteFlags::Dead | RouteFlags::Linkdown | RouteFlags::Unresolved);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = (*address).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => destination = (*address).into(),
            RouteAttribute::Source(RouteAddress::Inet(address)) => source = Some((*address).into()),
            RouteAttribute::Source(RouteAddress::Inet6(address)) => source = Some((*address).into()),
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Oif(value) => device = Some(*value),
            RouteAttribute::Gateway(RouteAddress::Inet(address))
            | RouteAttribute::Via(RouteVia::Inet(address)) => {
                gateway = Some((*address).into());
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(address))
            | RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(_)
            | RouteAttribute::EncapType(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_) => unclear = true,
            _ => {}
        }
    }
    let prefix = |address: IpAddr, length| {
        IpNet::new(address, length).map_err(|_| HostError::Undecodable {
            object: "routes",
            reason: format!("prefix {address}/{length}"),
        })
    };
    let destination = prefix(destination, header.destination_prefix_length)?;
    let source = match header.source_prefix_length {
        0 => None,
        length => Some(prefix(source.unwrap_or(unspecified), length)?.trunc()),
    };
    let kind = match (header.kind, device) {
        (RouteType::Unicast, Some(ifindex)) if !unclear => RouteKind::Unicast { ifindex, gateway, mtu },
        (RouteType::Unicast, _) => RouteKind::Unclear,
        (RouteType::Local, _) => RouteKind::Local,
        (RouteType::Broadcast, _) => RouteKind::Broadcast,
        (RouteType::Anycast, _) => RouteKind::Anycast,
        (RouteType::Multicast, _) => RouteKind::Multicast,
        (RouteType::BlackHole, _) => RouteKind::Blackhole,
        (RouteType::Prohibit, _) => RouteKind::Prohibit,
        (RouteType::Throw, _) if !unclear => RouteKind::Throw,
        // The others are not for packets that are forwarded, or not for all of them.
        _ => RouteKind::Unreachable,
    };
    Ok(Some(Route { metric, tos: header.tos, source, ..Route::new(table, destination, kind) }))
}

/// A neighbour whose Ethernet address is known.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    use NeighbourState::{Delay, Permanent, Probe, Reachable, Stale};

    if !matches!(message.header.state, Reachable | Stale | Delay | Probe | Permanent) {
        return None;
    }
    let (ifindex, destination) = destination(message)?;
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => ethernet_address(bytes),
        _ => None,
    });
    Some(Neighbour { ifindex, destination, address: address? })
}

/// Interface index and address of a neighbour.
pub(super) fn destination(message: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some((*ip).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some((*ip).into()),
        _ => None,
    });
    Some((message.header.ifindex, destination?))
}

/// An Ethernet address; loopback and tunnel devices have none, or all zeros.
fn ethernet_address(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr).filter(|address| *address != MacAddr::default())
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_about_loopback_without_any_privilege() {
        let host = HostFacts::read().unwrap();
        let lo = host.ifindex("lo").and_then(|ifindex| host.link(ifindex)).unwrap();
        assert_eq!(lo.address, None);
        assert!(lo.mtu > 1280, "{lo:?}");
        assert_eq!(host.port(lo.ifindex, 0), None);
        if lo.up {
            let own: IpNet = "127.0.0.1/32".parse().unwrap();
            let is_own = |route: &Route| route.destination == own && route.kind == RouteKind::Local;
            assert!(host.routes.iter().any(is_own), "{:?}", host.routes);
            let local = Rule::lookup(Family::V4, 0, 255);
            assert!(host.rules.contains(&local), "{:?}", host.rules);
        }
    }
}
