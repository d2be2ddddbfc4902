//! What one message says about a route (`struct rtmsg`, `linux/rtnetlink.h`).

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use ipnet::IpNet;
use smallvec::SmallVec;

use super::wire::{CutOff, address, attributes, family, i32_at, u16_at, u32_at, unspecified};
use crate::{host::RouteKind, policy::Family};

const ROUTE_LENGTH: usize = 12;
const NEXT_HOP_LENGTH: usize = 8;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_NEWDST: u16 = 19;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_NH_ID: u16 = 30;
const RTAX_MTU: u16 = 2;

const RTNH_F_DEAD: u32 = 1;
const RTNH_F_LINKDOWN: u32 = 16;
const RTNH_F_UNRESOLVED: u32 = 32;
const RTM_F_CLONED: u32 = 0x200;

const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTN_BROADCAST: u8 = 3;
const RTN_ANYCAST: u8 = 4;
const RTN_MULTICAST: u8 = 5;
const RTN_BLACKHOLE: u8 = 6;
const RTN_PROHIBIT: u8 = 8;
const RTN_THROW: u8 = 9;
const RTPROT_RA: u8 = 9;

/// Of `rta_expires` (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// What the routes of a table for one prefix are found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RouteKey {
    pub(crate) table: u32,
    pub(crate) prefix: IpNet,
}

/// Everything about a route but its prefix and table, and when it ends. Many routes share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RouteInfo {
    pub(crate) metric: u32,
    pub(crate) tos: u8,
    /// `RTN_*`
    kind: u8,
    protocol: u8,
    scope: u8,
    pub(crate) source: Option<IpNet>,
    pub(crate) preferred: Option<IpAddr>,
    /// Of a next hop object, else 0.
    pub(crate) next_hop: u32,
    pub(crate) mtu: Option<u32>,
    /// Of all metrics.
    metrics: u32,
    /// It is dead or not resolved, for another reason than that its link is down, or has something that is not known here.
    unclear: bool,
    pub(crate) hops: SmallVec<[Hop; 1]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Hop {
    /// Interface index, 0 if there is none.
    pub(crate) device: u32,
    pub(crate) gateway: Option<IpAddr>,
    /// Of the encapsulation, else 0.
    encapsulation: u32,
}

/// A message about a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RouteMessage {
    pub(crate) key: RouteKey,
    pub(crate) info: RouteInfo,
    /// It ends after this time; zero if it has ended.
    pub(crate) ends: Option<Duration>,
}

impl RouteMessage {
    /// Reads it; `None` if it is about another family or a cached decision.
    pub(crate) fn read(payload: &[u8]) -> Result<Option<Self>, CutOff> {
        let cut_off = CutOff { object: "a route" };
        let &[family_number, length, source_length, tos, table, protocol, scope, kind, ..] = payload else {
            return Err(cut_off);
        };
        let flags = u32_at(payload, 8).ok_or(cut_off)?;
        let Some(family) = family(family_number) else { return Ok(None) };
        if flags & RTM_F_CLONED != 0 {
            return Ok(None);
        }
        let mut table = u32::from(table);
        let (mut destination, mut source) = (unspecified(family), unspecified(family));
        let mut hop = Hop { device: 0, gateway: None, encapsulation: 0 };
        let mut hops = SmallVec::new();
        let mut ends = None;
        let mut info = RouteInfo {
            metric: 0,
            tos,
            kind,
            protocol,
            scope,
            source: None,
            preferred: None,
            next_hop: 0,
            mtu: None,
            metrics: 0,
            unclear: is_unclear(flags),
            hops: SmallVec::new(),
        };
        for (kind, value) in attributes(payload, ROUTE_LENGTH) {
            match kind {
                RTA_DST => destination = address(value).ok_or(cut_off)?,
                RTA_SRC => source = address(value).ok_or(cut_off)?,
                RTA_PRIORITY => info.metric = u32_at(value, 0).ok_or(cut_off)?,
                RTA_PREFSRC => info.preferred = address(value),
                RTA_TABLE => table = u32_at(value, 0).ok_or(cut_off)?,
                RTA_NH_ID => info.next_hop = u32_at(value, 0).ok_or(cut_off)?,
                RTA_METRICS => {
                    let mtu = attributes(value, 0).find(|(kind, _)| *kind == RTAX_MTU);
                    info.mtu = mtu.and_then(|(_, value)| u32_at(value, 0));
                    info.metrics = hash(value);
                }
                RTA_CACHEINFO => {
                    // clntref, lastuse, expires
                    let ticks = i32_at(value, 8).unwrap_or_default();
                    ends = (ticks != 0).then(|| TICK * u32::try_from(ticks).unwrap_or(0));
                }
                RTA_MULTIPATH => hops = read_hops(value, &mut info.unclear).ok_or(cut_off)?,
                RTA_NEWDST => info.unclear = true,
                kind => hop.read(kind, value),
            }
        }
        if hops.is_empty() && hop != (Hop { device: 0, gateway: None, encapsulation: 0 }) {
            hops.push(hop);
        }
        info.hops = hops;
        let prefix = |address: IpAddr, length: u8| {
            IpNet::new(address, length).map(|prefix| prefix.trunc()).map_err(|_| cut_off)
        };
        info.source = if source_length == 0 { None } else { Some(prefix(source, source_length)?) };
        Ok(Some(Self { key: RouteKey { table, prefix: prefix(destination, length)? }, info, ends }))
    }
}

/// What has no carrier is told by the link.
fn is_unclear(flags: u32) -> bool {
    flags & RTNH_F_UNRESOLVED != 0 || flags & (RTNH_F_DEAD | RTNH_F_LINKDOWN) == RTNH_F_DEAD
}

fn read_hops(mut rest: &[u8], unclear: &mut bool) -> Option<SmallVec<[Hop; 1]>> {
    let mut hops = SmallVec::new();
    while !rest.is_empty() {
        // struct rtnexthop: length, flags, hops, ifindex
        let length = usize::from(u16_at(rest, 0)?).max(NEXT_HOP_LENGTH);
        let mut hop = Hop { device: u32_at(rest, 4)?, gateway: None, encapsulation: 0 };
        *unclear |= is_unclear(u32::from(rest[2]));
        for (kind, value) in attributes(rest.get(..length)?, NEXT_HOP_LENGTH) {
            hop.read(kind, value);
        }
        hops.push(hop);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(hops)
}

impl Hop {
    fn read(&mut self, kind: u16, value: &[u8]) {
        match kind {
            RTA_OIF => self.device = u32_at(value, 0).unwrap_or_default(),
            RTA_GATEWAY => self.gateway = address(value),
            // struct rtvia: family, address
            RTA_VIA => self.gateway = value.get(2..).and_then(address),
            RTA_ENCAP_TYPE | RTA_ENCAP => {
                self.encapsulation = hash((self.encapsulation, kind, value)) | 1;
            }
            _ => {}
        }
    }
}

/// The same for the same within this process.
fn hash(what: impl Hash) -> u32 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    let hash = hasher.finish();
    #[expect(clippy::cast_possible_truncation, reason = "half of a hash is one")]
    {
        hash as u32
    }
}

impl RouteInfo {
    /// Whether both are the same route to the kernel. What it learns from its next hop object or about its next hops
    /// may differ.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.metrics == other.metrics
            && self.mtu == other.mtu
            && self.protocol == other.protocol
            && self.scope == other.scope
            && self.preferred == other.preferred
            && self.is_like(other)
    }

    /// The same without what the kernel may have changed in silence.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.metric == other.metric
            && self.tos == other.tos
            && self.kind == other.kind
            && self.source == other.source
            && self.next_hop == other.next_hop
            && (self.next_hop != 0 || self.has_hops_of(other))
    }

    /// In whatever order.
    pub(super) fn has_hops_of(&self, other: &Self) -> bool {
        self.hops.len() == other.hops.len() && self.hops.iter().all(|hop| other.hops.contains(hop))
    }

    /// IPv6: may be one of several next hops (`rt6_qualify_for_ecmp`). `None` is not clear: those that router advertisements
    /// made may not, but others can say that they are such.
    pub(super) fn can_have_siblings(&self) -> Option<bool> {
        let has_gateway = self.next_hop == 0 && self.hops.iter().any(|hop| hop.gateway.is_some());
        if has_gateway && self.protocol == RTPROT_RA && self.hops.len() == 1 {
            None
        } else {
            Some(has_gateway)
        }
    }

    /// Whether it leads through a device.
    pub(crate) fn uses(&self, device: u32) -> bool {
        self.hops.iter().any(|hop| hop.device == device)
    }

    /// Whether it may go when its device is switched off. An address of this host stays.
    pub(crate) fn goes_with(&self, device: u32) -> bool {
        self.kind != RTN_LOCAL && self.uses(device)
    }

    /// Whether it leads through this device and no other.
    pub(crate) fn uses_only(&self, device: u32) -> bool {
        !self.hops.is_empty() && self.hops.iter().all(|hop| hop.device == device)
    }

    /// What it does, if the links that are usable are these.
    pub(crate) fn kind(&self, is_usable: impl Fn(u32) -> bool) -> RouteKind {
        match self.kind {
            RTN_UNICAST => match self.common_hop().filter(|hop| is_usable(hop.device)) {
                Some(hop) => RouteKind::Unicast { ifindex: hop.device, gateway: hop.gateway, mtu: self.mtu },
                None => RouteKind::Unclear,
            },
            RTN_LOCAL => RouteKind::Local,
            RTN_BROADCAST => RouteKind::Broadcast,
            RTN_ANYCAST => RouteKind::Anycast,
            RTN_MULTICAST => RouteKind::Multicast,
            RTN_BLACKHOLE => RouteKind::Blackhole,
            RTN_PROHIBIT => RouteKind::Prohibit,
            RTN_THROW if !self.unclear => RouteKind::Throw,
            // The others are not for packets that are forwarded, or not for all of them.
            _ => RouteKind::Unreachable,
        }
    }

    /// The next hop, if all are the same and nothing else matters; without a neighbour of its own, if all are by one device. Of
    /// IPv6, what else there is may depend on them.
    fn common_hop(&self) -> Option<Hop> {
        let first = *self.hops.first()?;
        let is_clear = !self.unclear && first.device != 0 && first.encapsulation == 0;
        if !is_clear || self.next_hop != 0 && self.hops.len() > 1 {
            return None;
        }
        if self.hops.iter().all(|hop| *hop == first) {
            return Some(first);
        }
        let is_v4 = |hop: &Hop| hop.gateway.is_none_or(|gateway| gateway.is_ipv4());
        let is_like = |hop: &Hop| hop.device == first.device && hop.encapsulation == 0 && is_v4(hop);
        let several = Hop { gateway: Some(Ipv4Addr::UNSPECIFIED.into()), ..first };
        self.hops.iter().all(is_like).then_some(several)
    }
}

impl RouteKey {
    pub(crate) fn family(&self) -> Family {
        Family::of(&self.prefix)
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A route with a metric, a type of service, and a gateway, or, for 0, none.
    pub(in crate::netlink) fn info(metric: u32, tos: u8, gateway: u8) -> RouteInfo {
        let gateway = (gateway != 0).then(|| IpAddr::from([192, 0, 2, gateway]));
        let hop = Hop { device: 3, gateway, encapsulation: 0 };
        RouteInfo {
            metric,
            tos,
            kind: RTN_UNICAST,
            protocol: 3,
            scope: 0,
            source: None,
            preferred: None,
            next_hop: 0,
            mtu: None,
            metrics: 0,
            unclear: false,
            hops: [hop].into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![2, 16, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0];
        bytes.extend(attributes.concat());
        bytes
    }

    fn read(kind: u8, attributes: &[Vec<u8>]) -> RouteMessage {
        RouteMessage::read(&message(kind, attributes)).unwrap().unwrap()
    }

    const DESTINATION: [u8; 4] = [10, 2, 0, 0];
    const GATEWAY: [u8; 4] = [192, 0, 2, 2];

    fn hop(device: u32, gateway: [u8; 4]) -> Vec<u8> {
        let via = attribute(RTA_GATEWAY, &gateway);
        let length = u16::try_from(NEXT_HOP_LENGTH + via.len()).unwrap();
        [&length.to_ne_bytes()[..], &[0, 0], &device.to_ne_bytes(), &via].concat()
    }

    #[test]
    fn next_hops_are_clear_if_there_is_one_and_nothing_else_matters() {
        let destination = attribute(RTA_DST, &DESTINATION);
        let device = attribute(RTA_OIF, &7_u32.to_ne_bytes());
        let gateway = attribute(RTA_GATEWAY, &GATEWAY);
        let clear = RouteKind::Unicast { ifindex: 7, gateway: Some(GATEWAY.into()), mtu: None };
        let plain = read(1, &[destination.clone(), device.clone(), gateway.clone()]);
        assert_eq!(plain.key, RouteKey { table: 254, prefix: "10.2.0.0/16".parse().unwrap() });
        assert_eq!(plain.info.kind(|_| true), clear);
        assert_eq!(plain.info.kind(|ifindex| ifindex != 7), RouteKind::Unclear, "its link is down");

        let multipath =
            |hops: &[Vec<u8>]| read(1, &[destination.clone(), attribute(RTA_MULTIPATH, &hops.concat())]).info;
        assert_eq!(multipath(&[hop(7, GATEWAY), hop(7, GATEWAY)]).kind(|_| true), clear);
        assert_eq!(multipath(&[hop(7, GATEWAY), hop(8, GATEWAY)]).kind(|_| true), RouteKind::Unclear);
        let several =
            RouteKind::Unicast { ifindex: 7, gateway: Some(Ipv4Addr::UNSPECIFIED.into()), mtu: None };
        let other = [192, 0, 2, 3];
        assert_eq!(multipath(&[hop(7, GATEWAY), hop(7, other)]).kind(|_| true), several);
        assert_eq!(multipath(&[hop(7, GATEWAY), hop(7, other)]).kind(|_| false), RouteKind::Unclear);
        assert!(
            multipath(&[hop(7, GATEWAY), hop(8, GATEWAY)])
                .has_hops_of(&multipath(&[hop(8, GATEWAY), hop(7, GATEWAY)]))
        );

        let encapsulated = attribute(RTA_ENCAP_TYPE, &[1, 0]);
        let unclear = read(1, &[destination.clone(), device.clone(), gateway, encapsulated]);
        assert_eq!(unclear.info.kind(|_| true), RouteKind::Unclear);
        assert_eq!(
            read(1, &[destination.clone(), attribute(RTA_NH_ID, &[1, 0, 0, 0])]).info.kind(|_| true),
            RouteKind::Unclear
        );
        assert_eq!(read(RTN_THROW, std::slice::from_ref(&destination)).info.kind(|_| true), RouteKind::Throw);
        assert_eq!(
            read(77, &[destination]).info.kind(|_| true),
            RouteKind::Unreachable,
            "of an unknown kind"
        );
    }

    #[test]
    fn a_lifetime_is_told_in_hundredths_of_a_second() {
        let ends = |ticks: i32| {
            let info = [[0; 8].to_vec(), ticks.to_ne_bytes().to_vec(), vec![0; 20]].concat();
            read(1, &[attribute(RTA_DST, &DESTINATION), attribute(RTA_CACHEINFO, &info)]).ends
        };
        assert_eq!(ends(0), None);
        assert_eq!(ends(250), Some(Duration::from_millis(2500)));
        assert_eq!(ends(-3), Some(Duration::ZERO), "it has ended, and the kernel has not collected it");
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(family) = bytes.first_mut() {
                *family = if *family & 1 == 0 { 2 } else { 10 };
            }
            let _ = RouteMessage::read(&bytes);
        }

        #[test]
        fn a_message_cut_short_is_read_without_a_panic(length in 0..100usize, at in 0..100usize, byte in any::<u8>()) {
            let hops = [hop(7, GATEWAY), hop(8, GATEWAY)].concat();
            let mut bytes = message(1, &[attribute(RTA_DST, &DESTINATION), attribute(RTA_MULTIPATH, &hops)]);
            bytes.truncate(length);
            if let Some(changed) = bytes.get_mut(at) {
                *changed = byte;
            }
            let _ = RouteMessage::read(&bytes);
        }
    }
}
