//! Routes.

use std::net::IpAddr;

use ipnet::IpNet;

/// A route.
///
/// ```
/// use fastswan::host::{Route, RouteKind};
///
/// let main = 254;
/// let kind = RouteKind::Unicast { ifindex: 3, gateway: Some("192.0.2.2".parse()?), mtu: None };
/// let route = Route::new(main, "10.2.0.0/16".parse()?, kind);
/// assert_eq!((route.metric, route.tos), (0, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Route {
    /// The table it is in.
    pub table: u32,
    /// The addresses it is for, without host bits.
    pub destination: IpNet,
    /// Lower is better among routes for the same prefix.
    pub metric: u32,
    /// The type of service of the packets that it is for; 0 is all. An IPv4 route whose type matches wins whatever its
    /// metric.
    pub tos: u8,
    /// The packets that it is for have a source in this prefix (IPv6 only).
    pub source: Option<IpNet>,
    /// What happens to packets.
    pub kind: RouteKind,
}

impl Route {
    /// One for all packets to these addresses, with metric 0.
    #[must_use]
    pub fn new(table: u32, destination: IpNet, kind: RouteKind) -> Self {
        Self { table, destination: destination.trunc(), metric: 0, tos: 0, source: None, kind }
    }
}

/// What a route does (`RTN_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// Forwards by one device.
    Unicast {
        /// Interface index of the device.
        ifindex: u32,
        /// The next hop's address; `None` if the destination is a neighbour itself, unspecified (0.0.0.0) if there are
        /// several next hops by this device.
        gateway: Option<IpAddr>,
        /// Longest packet in bytes, if the route says (`RTAX_MTU`).
        mtu: Option<u32>,
    },
    /// Forwards in a way that depends on more than the destination: several next hops that differ, an encapsulation, or a
    /// next hop that is down.
    Unclear,
    /// An address of this host.
    Local,
    /// A broadcast address.
    Broadcast,
    /// An anycast address of this host.
    Anycast,
    /// Multicast.
    Multicast,
    /// Drops.
    Blackhole,
    /// Drops and tells the sender.
    Unreachable,
    /// Drops and tells the sender that it is not allowed.
    Prohibit,
    /// Goes on with the next rule.
    Throw,
}
