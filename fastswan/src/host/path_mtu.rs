//! Path MTUs that the kernel has learnt.

use std::net::IpAddr;

use crate::policy::Family;

/// Packets to an address must not be longer than this, as the kernel has learnt from a router on the way.
///
/// The kernel keeps it as an exception of a route, for some minutes (`net.ipv4.route.mtu_expires`,
/// `net.ipv6.route.mtu_expires`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathMtu {
    /// The address.
    pub destination: IpAddr,
    /// Longest packet in bytes, from the IP header on.
    pub mtu: u32,
}

/// The least path MTU in bytes that the kernel can have learnt: the longest packet that every link takes (RFC 791, RFC 8200
/// section 5). For IPv4 it mostly takes none below `net.ipv4.route.min_pmtu`, of which it does not tell.
pub(crate) fn least(family: Family) -> u32 {
    match family {
        Family::V4 => 68,
        Family::V6 => 1280,
    }
}
