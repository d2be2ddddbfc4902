//! Reads what the kernel has: rtnetlink dumps, and the sysctls of the whole host.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::thread::gettid;
use tokio::time::Instant;

use super::{
    addresses::DeviceAddress,
    link_state::{ConfTold, Everywhere, LinkState, LinkTold},
    links::settle as settle_links,
    path_mtu::{PathMtusRead, Question, RTM_F_CLONED, learnt},
    remedy,
    request::{DUMP, RequestError, Requests},
    route_message::{RouteInfo, RouteKey, RouteMessage},
    route_store::{RouteAction, RouteStore, RouteTold},
    wire::{
        CutOff, address, attribute, attributes, ethernet_address, family, i32_at, of_family, u16_at, u32_at,
    },
};
use crate::{
    host::{self, HostError, Rule, RuleSelector},
    policy::{Family, MacAddr},
};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
pub(super) const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
pub(super) const RTM_GETNEIGH: u16 = 30;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const RTM_NEWNETCONF: u16 = 80;
const RTM_GETNSID: u16 = 90;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_APPEND: u16 = 0x800;

/// Lengths of the fixed parts in bytes.
const LINK_LENGTH: usize = 16;
const ADDRESS_LENGTH: usize = 8;
const ROUTE_LENGTH: usize = 12;
pub(super) const NEIGHBOUR_LENGTH: usize = 12;
const RULE_LENGTH: usize = 12;
const NEXTHOP_LENGTH: usize = 8;
const NAMESPACE_LENGTH: usize = 4;

const IFLA_EXT_MASK: u16 = 29;
const IFLA_TARGET_NETNSID: u16 = 46;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
const NETNSA_NSID: u16 = 1;
const NETNSA_PID: u16 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
pub(super) const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// Reachable, stale, delay, probe, permanent: states in which a neighbour's address is used.
const NUD_KNOWN: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x80;
const NTF_PROXY: u8 = 8;
const FRA_PRIORITY: u16 = 6;
/// `FIB_RULE_UNRESOLVED`, `FIB_RULE_IIF_DETACHED`, `FIB_RULE_OIF_DETACHED`: flags that come and go with devices and rules.
const FRA_PASSING_FLAGS: u8 = 4 | 8 | 16;
const NHA_ID: u16 = 1;

/// How often a dump is asked for that changes keep interrupting.
const ATTEMPTS: u32 = 16;

/// What one notification of `NETLINK_ROUTE` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Link(LinkTold),
    Conf(ConfTold),
    Route(RouteTold),
    Rule {
        family: Family,
        is_new: bool,
        rule: RuleState,
    },
    /// An IPv4 address of a link.
    Address {
        ifindex: u32,
        address: DeviceAddress,
        is_new: bool,
    },
    /// Something about a next hop object.
    NextHop(u32),
    Neighbour(NeighbourTold),
    /// Nothing that matters.
    Nothing,
}

/// What is known of a neighbour: its Ethernet address, or `None`.
pub(crate) type NeighbourTold = (u32, IpAddr, Option<MacAddr>);

/// A rule, and the kernel's words for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleState {
    pub(crate) words: Vec<u8>,
    pub(crate) rule: Rule,
}

impl Told {
    /// Reads a notification of this kind and with these flags.
    pub(crate) fn read(kind: u16, flags: u16, payload: &[u8]) -> Result<Self, CutOff> {
        Ok(match kind {
            RTM_NEWLINK | RTM_DELLINK => Self::Link(LinkTold::read(kind == RTM_DELLINK, payload)?),
            RTM_NEWNETCONF => ConfTold::read(payload).map_or(Self::Nothing, Self::Conf),
            RTM_NEWROUTE | RTM_DELROUTE => {
                let action = if kind == RTM_DELROUTE {
                    RouteAction::Removed
                } else {
                    let is_set = |flag| flags & flag != 0;
                    RouteAction::Added { replaces: is_set(NLM_F_REPLACE), is_last: is_set(NLM_F_APPEND) }
                };
                RouteMessage::read(payload)?.map_or(Self::Nothing, |message| Self::Route((action, message)))
            }
            RTM_NEWRULE | RTM_DELRULE => match RuleState::read(payload)? {
                Some((family, rule)) => Self::Rule { family, is_new: kind == RTM_NEWRULE, rule },
                None => Self::Nothing,
            },
            RTM_NEWADDR | RTM_DELADDR => match own_address(payload)? {
                Some((ifindex, address)) => Self::Address { ifindex, address, is_new: kind == RTM_NEWADDR },
                None => Self::Nothing,
            },
            RTM_NEWNEXTHOP | RTM_DELNEXTHOP => {
                let id = attributes(payload, NEXTHOP_LENGTH).find(|(kind, _)| *kind == NHA_ID);
                id.and_then(|(_, id)| u32_at(id, 0)).map_or(Self::Nothing, Self::NextHop)
            }
            RTM_NEWNEIGH | RTM_DELNEIGH => match neighbour(payload)? {
                Some((ifindex, destination, address)) => {
                    Self::Neighbour((ifindex, destination, address.filter(|_| kind == RTM_NEWNEIGH)))
                }
                None => Self::Nothing,
            },
            _ => Self::Nothing,
        })
    }
}

/// Everything, as it was read.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) links: Vec<LinkState>,
    /// Links of other network namespaces that are on links of ours.
    pub(crate) elsewhere: Vec<LinkState>,
    pub(crate) everywhere: Everywhere,
    pub(crate) addresses: Vec<(u32, DeviceAddress)>,
    pub(crate) rules: [Vec<RuleState>; 2],
    pub(crate) routes: [RoutesRead; 2],
    pub(crate) neighbours: Vec<NeighbourTold>,
    pub(crate) path_mtus: [PathMtusRead; 2],
}

/// The routes of a family, as they were read.
#[derive(Debug, Default)]
pub(crate) struct RoutesRead {
    pub(crate) store: RouteStore,
    /// Those with a lifetime.
    pub(crate) ends: Vec<(RouteKey, RouteInfo, Instant)>,
    /// In so many datagrams.
    pub(crate) parts: usize,
    /// Prefixes that had other routes before, if they were compared.
    pub(crate) differences: Vec<RouteKey>,
}

/// The sysctls of links, and what is on them from elsewhere.
#[derive(Debug)]
pub(crate) struct Sysctls {
    pub(crate) links: Vec<LinkState>,
    pub(crate) elsewhere: Vec<LinkState>,
    /// How many links were read for that, in all namespaces.
    pub(crate) read: usize,
    pub(crate) everywhere: Everywhere,
}

/// Reads everything.
pub(crate) fn read_all() -> Result<Read, HostError> {
    settle()?;
    let mut dumps = Dumps::open()?;
    Ok(Read {
        links: dumps.links(None)?,
        elsewhere: dumps.elsewhere()?.0,
        everywhere: Everywhere::read(),
        addresses: dumps.addresses()?,
        rules: [dumps.rules(Family::V4)?, dumps.rules(Family::V6)?],
        routes: [dumps.routes(Family::V4)?, dumps.routes(Family::V6)?],
        neighbours: dumps.neighbours()?,
        path_mtus: [read_path_mtus(Family::V4)?, read_path_mtus(Family::V6)?],
    })
}

/// Reads the routes of a family, and compares them with those that were known.
pub(crate) fn read_routes(family: Family, known: &Arc<RouteStore>) -> Result<RoutesRead, HostError> {
    settle()?;
    let mut routes = Dumps::open()?.routes(family)?;
    routes.differences = routes.store.differences(known);
    Ok(routes)
}

/// Reads the rules of a family.
pub(crate) fn read_rules(family: Family) -> Result<Vec<RuleState>, HostError> {
    Dumps::open()?.rules(family)
}

/// Reads all neighbours.
pub(crate) fn read_neighbours() -> Result<Vec<NeighbourTold>, HostError> {
    Dumps::open()?.neighbours()
}

/// Reads the path MTUs of a family that the kernel has learnt.
pub(crate) fn read_path_mtus(family: Family) -> Result<PathMtusRead, HostError> {
    let mut dumps = Dumps::open()?;
    // Otherwise the kernel tells the routes too.
    dumps.0.check_strictly().map_err(|error| system("asking for exceptions of routes", error))?;
    dumps.path_mtus(family)
}

/// Asks what path MTU the kernel has learnt for an address. `None` too if the kernel has no such route.
pub(crate) fn ask_path_mtu(kernel: &mut Requests, question: &Question) -> Result<Option<u32>, RequestError> {
    let (mut mtu, mut cut_off) = (None, None);
    let asked = kernel.ask((RTM_GETROUTE, 0, &question.request()), |_, payload| {
        match learnt(payload) {
            Ok(found) => mtu = mtu.or(found.map(|found| found.mtu)),
            Err(error) => cut_off = Some(error),
        }
        Ok::<_, RequestError>(())
    });
    match (asked, cut_off) {
        (_, Some(cut_off)) => Err(RequestError::Undecodable(cut_off.to_string())),
        (Ok(()) | Err(RequestError::Refused(_)), None) => Ok(mtu),
        (Err(error), None) => Err(error),
    }
}

/// Reads the sysctls of all links and of the host.
pub(crate) fn read_sysctls() -> Result<Sysctls, HostError> {
    let mut dumps = Dumps::open()?;
    let links = dumps.links(None)?;
    let (elsewhere, read) = dumps.elsewhere()?;
    Ok(Sysctls { read: links.len() + read, links, elsewhere, everywhere: Everywhere::read() })
}

/// A link's notification comes before the routes go that it takes along, which are not notified of.
fn settle() -> Result<(), HostError> {
    match settle_links() {
        // Whoever lacks privilege for that cannot forward either.
        Err(error) if error.raw_os_error() != Some(libc::EPERM) => {
            Err(system("waiting for changes of links", error))
        }
        _ => Ok(()),
    }
}

pub(super) fn system(attempt: &str, error: io::Error) -> HostError {
    HostError::System { attempt: attempt.to_owned(), remedy: remedy(&error), error }
}

impl Everywhere {
    /// Of the calling thread's namespace: procfs shows that.
    fn read() -> Self {
        let read = |family, name| {
            let path = format!("/proc/sys/net/{family}/conf/all/{name}");
            fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        Self {
            rp_filter: read("ipv4", "rp_filter"),
            disable_xfrm: read("ipv4", "disable_xfrm"),
            forwarding_v6: read("ipv6", "forwarding"),
        }
    }
}

/// Asks for one list after the other.
struct Dumps(Requests);

impl Dumps {
    fn open() -> Result<Self, HostError> {
        let kernel = Requests::open(NETLINK_ROUTE);
        kernel.map(Self).map_err(|error| system("opening a NETLINK_ROUTE socket", error))
    }

    /// The links of a network namespace by our number for it, or of ours.
    fn links(&mut self, namespace: Option<i32>) -> Result<Vec<LinkState>, HostError> {
        let mut request = vec![0; LINK_LENGTH];
        request.extend(attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes()));
        if let Some(namespace) = namespace {
            request.extend(attribute(IFLA_TARGET_NETNSID, &namespace.to_ne_bytes()));
        }
        self.list("links", RTM_GETLINK, &request, |payload| {
            LinkTold::read(false, payload).map(|told| match told {
                LinkTold::Is(link) => Some(link),
                _ => None,
            })
        })
    }

    /// The links of other network namespaces that are on links of ours, as far as ours has a number for these namespaces, as
    /// it has for each that one of its links has moved to. Those that may not be looked into are left out. And how many links
    /// were read for it.
    fn elsewhere(&mut self) -> Result<(Vec<LinkState>, usize), HostError> {
        let namespaces = self.list("network namespaces", RTM_GETNSID, &[0; NAMESPACE_LENGTH], |payload| {
            Ok(namespace(payload))
        })?;
        let mut links = Vec::new();
        for number in namespaces {
            match self.links(Some(number)) {
                Ok(its) => links.extend(its),
                Err(error) => tracing::debug!(%error, number, "cannot look into a network namespace"),
            }
        }
        // That it is known by a number to itself may come of telling those links.
        let mut request = vec![0; NAMESPACE_LENGTH];
        request.extend(attribute(NETNSA_PID, &gettid().as_raw_nonzero().get().to_ne_bytes()));
        let mut ours = None;
        let asked = self.0.ask((RTM_GETNSID, 0, &request), |_, payload| {
            ours = namespace(payload);
            Ok::<_, RequestError>(())
        });
        asked.map_err(|error| system("asking for the number of this network namespace", error.into()))?;
        let read = links.len();
        Ok((links.into_iter().filter_map(|link| link.seen_from(ours?)).collect(), read))
    }

    fn addresses(&mut self) -> Result<Vec<(u32, DeviceAddress)>, HostError> {
        let request = of_family(Family::V4, ADDRESS_LENGTH);
        self.list("addresses", RTM_GETADDR, &request, own_address)
    }

    fn rules(&mut self, family: Family) -> Result<Vec<RuleState>, HostError> {
        self.list("rules", RTM_GETRULE, &of_family(family, RULE_LENGTH), |payload| {
            let rule = RuleState::read(payload)?;
            Ok(rule.filter(|(told, _)| *told == family).map(|(_, rule)| rule))
        })
    }

    fn neighbours(&mut self) -> Result<Vec<NeighbourTold>, HostError> {
        self.list("neighbours", RTM_GETNEIGH, &[0; NEIGHBOUR_LENGTH], |payload| {
            Ok(neighbour(payload)?.filter(|(_, _, address)| address.is_some()))
        })
    }

    fn routes(&mut self, family: Family) -> Result<RoutesRead, HostError> {
        let request = of_family(family, ROUTE_LENGTH);
        let mut routes =
            self.dump("routes", RTM_GETROUTE, &request, |routes: &mut RoutesRead, payload| {
                let Some(RouteMessage { key, info, ends }) = RouteMessage::read(payload)? else {
                    return Ok(());
                };
                if key.family() == family {
                    routes.store.push(key, &info);
                    routes.ends.extend(ends.map(|ends| (key, info, Instant::now() + ends)));
                }
                Ok(())
            })?;
        routes.0.store.shrink();
        routes.0.parts = routes.1;
        Ok(routes.0)
    }

    fn path_mtus(&mut self, family: Family) -> Result<PathMtusRead, HostError> {
        let mut request = of_family(family, ROUTE_LENGTH);
        request[8..].copy_from_slice(&RTM_F_CLONED.to_ne_bytes());
        let read = self.dump("path MTUs", RTM_GETROUTE, &request, |all: &mut PathMtusRead, payload| {
            let learnt = learnt(payload)?.filter(|learnt| Family::from(learnt.destination) == family);
            if let Some(learnt) = learnt {
                all.take(learnt);
            }
            Ok(())
        });
        Ok(read?.0)
    }

    fn list<T>(
        &mut self,
        object: &'static str,
        kind: u16,
        request: &[u8],
        read: impl Fn(&[u8]) -> Result<Option<T>, CutOff>,
    ) -> Result<Vec<T>, HostError> {
        let dumped = self.dump(object, kind, request, |all: &mut Vec<T>, payload| {
            all.extend(read(payload)?);
            Ok(())
        });
        Ok(dumped?.0)
    }

    /// Reads a whole dump, and tells in how many datagrams it came.
    fn dump<T: Default>(
        &mut self,
        object: &'static str,
        kind: u16,
        request: &[u8],
        mut take: impl FnMut(&mut T, &[u8]) -> Result<(), CutOff>,
    ) -> Result<(T, usize), HostError> {
        let undecodable = |reason| HostError::Undecodable { object, reason };
        let failed = |error| system(&format!("listing {object}"), error);
        for _ in 0..ATTEMPTS {
            let (mut all, mut parts) = (T::default(), 0);
            let mut cut_off = None;
            let mut read = || -> Result<(), RequestError> {
                self.0.send(kind, DUMP, request)?;
                loop {
                    parts += 1;
                    let is_last = self.0.read(|_, payload| {
                        cut_off = cut_off.or(take(&mut all, payload).err());
                        Ok::<_, RequestError>(())
                    })?;
                    if is_last {
                        return Ok(());
                    }
                }
            };
            match (read(), cut_off) {
                (Ok(()), None) => return Ok((all, parts)),
                (_, Some(cut_off)) => return Err(undecodable(cut_off.to_string())),
                // The kernel was built without it.
                (Err(RequestError::Refused(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)), _) => {
                    return Ok((T::default(), 0));
                }
                (Err(RequestError::Interrupted), _) => {}
                (Err(RequestError::Undecodable(reason)), _) => return Err(undecodable(reason)),
                (Err(error @ (RequestError::System(_) | RequestError::Refused(_))), _) => {
                    return Err(failed(error.into()));
                }
            }
        }
        Err(HostError::Changing { object })
    }
}

/// The number that our network namespace has for another one, if it has one.
fn namespace(payload: &[u8]) -> Option<i32> {
    let number = attributes(payload, NAMESPACE_LENGTH).find(|(kind, _)| *kind == NETNSA_NSID);
    number.and_then(|(_, number)| i32_at(number, 0)).filter(|number| *number >= 0)
}

/// Interface index and IPv4 address of this host.
fn own_address(payload: &[u8]) -> Result<Option<(u32, DeviceAddress)>, CutOff> {
    let cut_off = CutOff { object: "an address" };
    let ifindex = u32_at(payload, 4).ok_or(cut_off)?;
    if i32::from(payload[0]) != libc::AF_INET {
        return Ok(None);
    }
    let find = |sought| {
        let (_, value) = attributes(payload, ADDRESS_LENGTH).find(|(kind, _)| *kind == sought)?;
        <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from)
    };
    let (own, peer) = (find(IFA_LOCAL), find(IFA_ADDRESS));
    let address = own.or(peer).zip(peer.or(own)).map(|(own, peer)| DeviceAddress {
        own,
        peer,
        prefix_length: payload[1],
    });
    Ok(address.map(|address| (ifindex, address)))
}

/// A neighbour, with its Ethernet address if it is known.
fn neighbour(payload: &[u8]) -> Result<Option<NeighbourTold>, CutOff> {
    let cut_off = CutOff { object: "a neighbour" };
    let (ifindex, state) = (u32_at(payload, 4).ok_or(cut_off)?, u16_at(payload, 8).ok_or(cut_off)?);
    let &flags = payload.get(10).ok_or(cut_off)?;
    // Others are what a bridge or a tunnel has learnt.
    if family(payload[0]).is_none() || flags & NTF_PROXY != 0 {
        return Ok(None);
    }
    let find = |sought| attributes(payload, NEIGHBOUR_LENGTH).find(|(kind, _)| *kind == sought);
    let Some(destination) = find(NDA_DST).and_then(|(_, value)| address(value)) else { return Ok(None) };
    let known = find(NDA_LLADDR).filter(|_| state & NUD_KNOWN != 0);
    Ok(Some((ifindex, destination, known.and_then(|(_, value)| ethernet_address(value)))))
}

impl RuleState {
    /// Reads a rule; `None` if it is for another family.
    pub(crate) fn read(payload: &[u8]) -> Result<Option<(Family, Self)>, CutOff> {
        if payload.len() < RULE_LENGTH {
            return Err(CutOff { object: "a rule" });
        }
        let Some(family) = family(payload[0]) else { return Ok(None) };
        let mut words = payload.to_vec();
        // The lowest byte of the flags, in the byte order of the host.
        let lowest = if cfg!(target_endian = "big") { 11 } else { 8 };
        words[lowest] &= !FRA_PASSING_FLAGS;
        let mut header = NetlinkHeader::default();
        header.message_type = RTM_NEWRULE;
        let told = match RouteNetlinkMessage::deserialize(&header, payload) {
            Ok(RouteNetlinkMessage::NewRule(message)) => rule(&message, family),
            _ => None,
        };
        // One that cannot be read may be for anything and do anything.
        let priority = || attributes(payload, RULE_LENGTH).find(|(kind, _)| *kind == FRA_PRIORITY);
        let rule = told.unwrap_or_else(|| {
            let priority = priority().and_then(|(_, value)| u32_at(value, 0)).unwrap_or(0);
            Rule::new(family, priority, RuleSelector::default(), host::RuleAction::Unclear)
        });
        Ok(Some((family, Self { words, rule })))
    }
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
            RuleAttribute::FwMark(told) => value = Some(*told),
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

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}
