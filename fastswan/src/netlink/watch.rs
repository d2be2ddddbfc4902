//! Hears what the kernel tells about the host.

use std::io;

use netlink_packet_core::NetlinkBuffer;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};

use super::{
    icmp::IcmpSockets,
    netdev::management_group,
    route::Told,
    socket::{Datagram, NetlinkSocket},
    wire::{attributes, u32_at},
};
use crate::host::{HostChange, HostStaleCause};

/// Multicast groups (`enum rtnetlink_groups`): links, IPv4 addresses, routes and rules of both families; what IPv6 has learnt of
/// a link from router advertisements (12); the sysctls `forwarding` and `rp_filter` of both (24, 25); and next hop objects (32).
const GROUPS: [u32; 10] = [1, 5, 7, 8, 11, 12, 19, 24, 25, 32];

/// `RTNLGRP_NEIGH`, on a socket of its own: whoever is on the LAN can make the kernel tell of neighbours without end, and must
/// not overrun the others.
const NEIGHBOURS: [u32; 1] = [3];

const NLMSG_OVERRUN: u16 = 4;
const GENERIC_LENGTH: usize = 4;
/// `NETDEV_A_DEV_IFINDEX`
const NETDEV_IFINDEX: u16 = 1;

/// Subscribed to what the kernel tells of a network namespace, sysctls without a notification excepted.
#[derive(Debug)]
pub(crate) struct HostSockets {
    pub(crate) route: NetlinkSocket,
    pub(crate) neighbours: NetlinkSocket,
    /// Whether devices take redirected frames. Kernels before Linux 6.3 do not tell.
    pub(crate) devices: Option<NetlinkSocket>,
    /// What the kernel may learn path MTUs from.
    pub(crate) icmp: IcmpSockets,
}

impl HostSockets {
    /// In the network namespace of the calling thread, with receive buffers of so many bytes.
    pub(crate) fn subscribe(route: usize, neighbours: usize) -> io::Result<Self> {
        let devices = management_group()
            .and_then(|group| NetlinkSocket::open(NETLINK_GENERIC, &[group], None))
            .inspect_err(|error| tracing::debug!(%error, "the kernel does not tell what devices can do"))
            .ok();
        Ok(Self {
            route: NetlinkSocket::open(NETLINK_ROUTE, &GROUPS, Some(route))?,
            neighbours: NetlinkSocket::open(NETLINK_ROUTE, &NEIGHBOURS, Some(neighbours))?,
            devices,
            icmp: IcmpSockets::open()?,
        })
    }
}

/// Reads a datagram from the kernel, and passes on what it says. Others count for nothing. Returns how many messages there
/// were, or why track was lost.
pub(crate) fn hear(
    received: io::Result<Datagram>,
    mut take: impl FnMut(Told),
) -> io::Result<Result<usize, HostStaleCause>> {
    let datagram = match received {
        Ok(datagram) => datagram,
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Err(HostStaleCause::Overrun)),
        Err(error) => return Err(error),
    };
    // Only the kernel knows.
    if datagram.sender != 0 {
        return Ok(Ok(1));
    }
    let undecodable = |reason: &dyn std::fmt::Display| {
        tracing::warn!(%reason, "the kernel told something about the host that cannot be read; please report this");
        Ok(Err(HostStaleCause::Unreadable))
    };
    if datagram.truncated {
        return undecodable(&"a datagram was cut off");
    }
    let mut rest = &datagram.bytes[..];
    let mut messages = 0;
    while !rest.is_empty() {
        let message = match NetlinkBuffer::new_checked(rest) {
            Ok(message) => message,
            Err(error) => return undecodable(&error),
        };
        messages += 1;
        if message.message_type() == NLMSG_OVERRUN {
            return Ok(Err(HostStaleCause::Overrun));
        }
        match Told::read(message.message_type(), message.flags(), message.payload()) {
            Ok(told) => take(told),
            Err(cut_off) => return undecodable(&cut_off),
        }
        rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Ok(messages))
}

/// What is told of a device; of any if notifications were lost.
pub(crate) fn heard_device(received: io::Result<Datagram>) -> io::Result<Option<HostChange>> {
    let ifindex = match received {
        Ok(datagram) if datagram.sender != 0 => return Ok(None),
        Ok(datagram) => {
            let message = NetlinkBuffer::new_checked(&datagram.bytes[..]).ok();
            let payload = message.map(|message| message.payload()).unwrap_or_default();
            let ifindex = attributes(payload, GENERIC_LENGTH).find(|(kind, _)| *kind == NETDEV_IFINDEX);
            ifindex.and_then(|(_, value)| u32_at(value, 0))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => None,
        Err(error) => return Err(error),
    };
    Ok(Some(HostChange::Device { ifindex }))
}
