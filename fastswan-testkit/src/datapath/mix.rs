//! The policies of gateways, and what else their tables hold.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastswan::{
    HostFacts, Policy, PolicyId, Selector,
    host::{Forwards, Link, Route, RouteKind, Rule},
    policy::{
        Direction, Egress, Family, MacAddr, NextHop, OffloadDev, OffloadKind, Overhead, PortMatch, Template,
        Templates,
    },
};
use fastswan_testkit_ebpf::{NEXT_HOP, PORT};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::lab::{LOCAL, LOCAL_V6};

/// Addresses of the host inside the sources of its policies.
const HOST_FACTS: u32 = 50;
/// Forward policies.
const GUARDS: u32 = 1000;
/// Destinations that many sources share.
const FEW: u32 = 16;
const LONGEST_PACKET: u16 = 1400;
const UDP: u8 = 17;

/// A kind of gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Networks on both sides, of /24 or, for IPv6, /48, each pair with a tunnel of its own.
    SiteToSite,
    /// From one /8 to networks of /24.
    Hub,
    /// From one /8 to single addresses.
    Pool,
    /// From many networks of /24 to each of 16.
    ManySources,
    /// As site-to-site, with this many pairs of prefix lengths, up to 16: destinations of /24, /26, /28 and /30, for each of them
    /// sources of the same lengths.
    Tuples(u32),
    /// As hub, with 50 addresses of the host inside the /8: each packet's source is looked up.
    Facts,
    /// From a network that covers the peers', with forward policies of 1,000 of these: each packet's source is looked up.
    Guards,
    /// As hub, with the bypass policies for IKE: each packet's protocol and ports are looked up.
    Ike,
}

impl Mix {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::SiteToSite,
        Self::Hub,
        Self::Pool,
        Self::ManySources,
        Self::Tuples(1),
        Self::Tuples(4),
        Self::Tuples(8),
        Self::Tuples(16),
        Self::Facts,
        Self::Guards,
        Self::Ike,
    ];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SiteToSite => "site-to-site",
            Self::Hub => "hub",
            Self::Pool => "pool",
            Self::ManySources => "many-sources",
            Self::Tuples(1) => "tuples-1",
            Self::Tuples(4) => "tuples-4",
            Self::Tuples(8) => "tuples-8",
            Self::Tuples(16) => "tuples-16",
            Self::Tuples(_) => "tuples",
            Self::Facts => "facts",
            Self::Guards => "guards",
            Self::Ike => "ike",
        }
    }

    /// The families that it is measured with.
    #[must_use]
    pub fn families(self) -> &'static [Family] {
        match self {
            Self::SiteToSite => &[Family::V4, Family::V6],
            _ => &[Family::V4],
        }
    }

    /// Source and destination of an outbound policy. No two policies have a packet in common.
    pub(super) fn networks(self, family: Family, number: u32) -> (IpNet, IpNet) {
        let local = v4(0x0a00_0000, 8);
        match (self, family) {
            (_, Family::V6) => (v6(0x2a00, number), v6(0x2a10, number)),
            (Self::SiteToSite, _) => (v4(0x1000_0000 | number << 8, 24), remote(number)),
            (Self::Hub | Self::Facts | Self::Ike, _) => (local, remote(number)),
            (Self::Pool, _) => (local, v4(0x2000_0000 | number, 32)),
            (Self::ManySources, _) => (v4(0x1000_0000 | (number / FEW) << 8, 24), remote(number % FEW)),
            (Self::Tuples(pairs), _) => {
                let pair = number % pairs;
                let length = |which: u32| u8::try_from(24 + which % 4 * 2).unwrap_or(24);
                let (source, destination) = (length(pair / 4), length(pair));
                (v4(0x1000_0000 | number << 8, source), v4(0x2000_0000 | number << 8, destination))
            }
            (Self::Guards, _) => (v4(0x2000_0000, 3), remote(number)),
        }
    }

    /// The part of a policy's sources that no fact and no guard is about.
    pub(super) fn sources(self, family: Family, number: u32) -> IpNet {
        match self {
            Self::Facts => v4(0x0a80_0000, 9),
            Self::Guards => v4(0x3000_0000, 4),
            _ => self.networks(family, number).0,
        }
    }

    /// An outbound policy, whose packets the device encrypts.
    pub(crate) fn policy(self, family: Family, number: u32, device: u32) -> Policy {
        let (source, destination) = self.networks(family, number);
        let mut policy = software(Direction::Out, source, destination);
        let (local, peer) = match family {
            Family::V4 => (LOCAL.parse().ok(), IpAddr::from(Ipv4Addr::from(0xc600_0000 | number))),
            Family::V6 => {
                (LOCAL_V6.parse().ok(), Ipv6Addr::from(0x2001_0db8_000e << 80 | u128::from(number)).into())
            }
        };
        policy.templates =
            local.map(|local| Template::esp_tunnel(local, peer, number + 1)).into_iter().collect();
        policy.offload = Some(OffloadDev { ifindex: device, kind: OffloadKind::Packet, inbound: false });
        let next_hop = NextHop::Fixed { source: MacAddr(PORT), destination: MacAddr(NEXT_HOP) };
        policy.egress = Egress { next_hop, max_length: Some(LONGEST_PACKET) };
        policy.assumed = Some(Overhead::aes_gcm_tunnel(family, false, 16));
        policy
    }

    /// An outbound policy for the same packets that lets them go as they are, in software.
    pub(super) fn allowance(self, family: Family, number: u32) -> Policy {
        let (source, destination) = self.networks(family, number);
        software(Direction::Out, source, destination)
    }

    /// The other policies of the gateway.
    pub(super) fn others(self) -> Vec<Policy> {
        match self {
            Self::Guards => (0..GUARDS)
                .map(|number| {
                    let (local, remote) = self.networks(Family::V4, number);
                    software(Direction::Forward, remote, local)
                })
                .collect(),
            Self::Ike => [500, 4500]
                .map(|port| {
                    let mut bypass = software(Direction::Out, v4(0, 0), v4(0, 0));
                    bypass.id.selector.protocol = UDP;
                    bypass.id.selector.destination_port = PortMatch::exactly(port);
                    bypass.priority = 32;
                    bypass
                })
                .into(),
            _ => Vec::new(),
        }
    }

    /// What is known of the host.
    pub(super) fn host(self, device: u32) -> HostFacts {
        if self != Self::Facts {
            return HostFacts::vouched();
        }
        let link = Link {
            ifindex: device,
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            carrier: true,
            forwards: Forwards { v4: true, v6: true },
            ..Link::default()
        };
        let (local, main) = (255, 254);
        let everywhere = RouteKind::Unicast { ifindex: device, gateway: None, mtu: None };
        let own = (0..HOST_FACTS).map(|number| v4(0x0a00_0001 | number << 8, 32));
        let own = own.chain([IpNet::from(LOCAL.parse::<IpAddr>().unwrap_or(Ipv4Addr::LOCALHOST.into()))]);
        let own = own.map(|address| Route::new(local, address, RouteKind::Local));
        HostFacts {
            links: vec![link],
            routes: own.chain([Route::new(main, v4(0, 0), everywhere)]).collect(),
            rules: Rule::ordinary(Family::V4).into(),
            ..HostFacts::default()
        }
    }

    /// Cells that a table needs for this, beside one for each outbound policy. A forward policy is a cell and a guard.
    pub(super) fn other_cells(self) -> u32 {
        match self {
            Self::Facts => 2 * HOST_FACTS,
            Self::Guards => 2 * GUARDS,
            _ => 16,
        }
    }
}

fn software(direction: Direction, source: IpNet, destination: IpNet) -> Policy {
    let selector = Selector::between(source, destination).expect("both are of one family");
    Policy {
        priority: 100,
        templates: Templates::default(),
        ..Policy::new(PolicyId::new(direction, selector))
    }
}

/// A peer's network.
fn remote(number: u32) -> IpNet {
    v4(0x2000_0000 | number << 8, 24)
}

fn v4(bits: u32, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(bits), length))
}

fn v6(start: u16, number: u32) -> IpNet {
    let bits = u128::from(start) << 112 | u128::from(number) << 80;
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(bits), 48))
}
