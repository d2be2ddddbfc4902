//! What changes in the kernel: routes and neighbours, by requests of `linux/rtnetlink.h` and `linux/neighbour.h`.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Instant,
};

use fastswan::policy::MacAddr;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_sys::protocols::NETLINK_ROUTE;
use rand::{RngExt as _, rngs::StdRng};

use crate::requests::{BATCH, Message, Requests};

const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const NEW_NEIGHBOUR: u16 = 28;

/// `NLM_F_REPLACE | NLM_F_CREATE`
const REPLACE: u16 = 0x500;

const MAIN: u8 = 254;
/// `RTPROT_STATIC`
const STATIC: u8 = 4;
/// `RTN_UNICAST`
const UNICAST: u8 = 1;
/// `RTA_DST`, `RTA_OIF`, `RTA_GATEWAY`
const DESTINATION: u16 = 1;
const DEVICE: u16 = 4;
const GATEWAY: u16 = 5;
/// `NDA_DST`, `NDA_LLADDR`
const NEIGHBOUR: u16 = 1;
const LINK_ADDRESS: u16 = 2;
/// `NUD_REACHABLE`
const REACHABLE: u16 = 2;

/// Neighbours that change.
const NEIGHBOURS: u8 = 200;
/// One route in so many is of IPv6, and one of IPv4 in so many is a /22 instead of a /24.
const V6: u32 = 10;
const SHORT: u32 = 4;

/// A route of the main table by a gateway.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub(super) destination: IpNet,
    pub(super) device: u32,
    pub(super) gateway: IpAddr,
}

/// The devices of the host that changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Devices {
    pub(super) lan: u32,
    pub(super) out: u32,
}

/// Makes requests, in the network namespace of the thread that opens it.
pub(super) struct Kernel {
    requests: Requests,
    devices: Devices,
}

/// Changes routes and neighbours at random that concern no policy.
pub(super) struct Churner {
    kernel: Kernel,
    routes: u32,
    /// Next hops that are not those from the beginning; `None` if the route is gone.
    changed: HashMap<u32, Option<u32>>,
    rng: StdRng,
}

impl Kernel {
    pub(super) fn open(devices: Devices) -> io::Result<Self> {
        Ok(Self { requests: Requests::to(NETLINK_ROUTE)?, devices })
    }

    /// Gives the kernel so many routes that concern no policy.
    pub(super) fn add_routes(&mut self, routes: u32) -> anyhow::Result<()> {
        let devices = self.devices;
        let mut messages =
            (0..routes).map(|number| request(NEW_ROUTE, &route(number, number, devices))).peekable();
        while messages.peek().is_some() {
            let made = self.requests.make_with(REPLACE, messages.by_ref().take(BATCH))?;
            made.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    /// Adds a route or puts it in the place of another one; returns when the kernel has acknowledged that.
    pub(super) fn add(&mut self, route: &Route) -> anyhow::Result<Instant> {
        self.make(REPLACE, request(NEW_ROUTE, route))
    }

    /// Deletes a route; returns when the kernel has acknowledged that.
    pub(super) fn delete(&mut self, route: &Route) -> anyhow::Result<Instant> {
        self.make(0, request(DELETE_ROUTE, route))
    }

    fn make(&mut self, flags: u16, message: Message) -> anyhow::Result<Instant> {
        self.requests.make_with(flags, [message])?.into_iter().collect::<Result<(), _>>()?;
        Ok(Instant::now())
    }

    pub(super) fn devices(&self) -> Devices {
        self.devices
    }
}

impl Churner {
    pub(super) fn new(kernel: Kernel, routes: u32, rng: StdRng) -> Self {
        Self { kernel, routes, changed: HashMap::new(), rng }
    }

    /// Changes a route: adds one that is gone; others go, or get another next hop.
    pub(super) fn change_route(&mut self) -> anyhow::Result<()> {
        let number = self.rng.random_range(0..self.routes);
        let hop = self.changed.get(&number).copied().unwrap_or(Some(number));
        let now = match hop {
            None => Some(number),
            Some(_) if self.rng.random() => None,
            Some(hop) => Some(hop.wrapping_add(1)),
        };
        match now {
            Some(hop) => self.kernel.add(&route(number, hop, self.kernel.devices))?,
            None => self.kernel.delete(&route(number, hop.unwrap_or(number), self.kernel.devices))?,
        };
        self.changed.insert(number, now);
        Ok(())
    }

    /// Gives a neighbour another address.
    pub(super) fn change_neighbour(&mut self) -> anyhow::Result<()> {
        let address = Ipv4Addr::new(10, 1, 200, self.rng.random_range(1..=NEIGHBOURS));
        let link_address = MacAddr([2, 0, 1, 0, self.rng.random(), self.rng.random()]);
        let message = neighbour(self.kernel.devices.lan, address, link_address);
        self.kernel.make(REPLACE, message).map(drop)
    }
}

/// The route with this number, by one of the next hops: those of a number and of the next one differ. All are apart
/// from the networks of policies and from the ends of tunnels.
fn route(number: u32, hop: u32, devices: Devices) -> Route {
    let Devices { lan, out } = devices;
    if number.is_multiple_of(V6) {
        let bits = 0x2a00 << 112 | u128::from(spread(number / V6, 20)) << 80;
        let (device, gateway) = match hop % 3 {
            0 => (lan, Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 5)),
            _ => (out, Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 2)),
        };
        let destination = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(bits), 48));
        return Route { destination, device, gateway: gateway.into() };
    }
    let (bits, length) = match number % SHORT {
        0 => (spread(number / SHORT, 20) << 10, 22),
        _ => (spread(number, 22) << 8, 24),
    };
    let destination = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(0x4000_0000 | bits), length));
    let (device, gateway) = match hop % 4 {
        0 => (lan, Ipv4Addr::new(10, 1, 0, 5)),
        hop => (out, Ipv4Addr::from_bits(0xc000_0200 | (hop + 1))),
    };
    Route { destination, device, gateway: gateway.into() }
}

/// Numbers of so many bits in another order, in which neighbours are far from each other.
fn spread(number: u32, bits: u32) -> u32 {
    number.wrapping_mul(0x9e37_79b1) & ((1 << bits) - 1)
}

/// `struct rtmsg` and its attributes.
fn request(kind: u16, route: &Route) -> Message {
    let mut message = Message::new(kind);
    let length = route.destination.prefix_len();
    message.extend(&[family(route.gateway), length, 0, 0, MAIN, STATIC, 0, UNICAST, 0, 0, 0, 0]);
    message.attribute(DESTINATION, &octets(route.destination.addr()));
    message.attribute(DEVICE, &route.device.to_ne_bytes());
    message.attribute(GATEWAY, &octets(route.gateway));
    message
}

/// `struct ndmsg` and its attributes.
fn neighbour(device: u32, address: Ipv4Addr, to: MacAddr) -> Message {
    let mut message = Message::new(NEW_NEIGHBOUR);
    message.extend(&[family(address.into()), 0, 0, 0]);
    message.extend(&device.to_ne_bytes());
    message.extend(&REACHABLE.to_ne_bytes());
    message.extend(&[0; 2]);
    message.attribute(NEIGHBOUR, &address.octets());
    message.attribute(LINK_ADDRESS, &to.0);
    message
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or(u8::MAX)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_route_has_a_prefix_of_its_own() {
        let devices = Devices { lan: 1, out: 2 };
        let routes = 1_000_000;
        let prefixes: HashSet<IpNet> =
            (0..routes).map(|number| route(number, number, devices).destination).collect();
        assert_eq!(prefixes.len(), routes as usize);
    }

    #[test]
    fn the_next_hop_of_the_next_number_is_another_one() {
        let devices = Devices { lan: 1, out: 2 };
        for number in 0..100 {
            let gateway = |hop| route(number, hop, devices).gateway;
            assert!((0..8).any(|hop| gateway(hop) != gateway(hop + 1)), "{number}");
        }
    }
}
