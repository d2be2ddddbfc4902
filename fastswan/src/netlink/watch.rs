//! Hears when what the host does with addresses may have changed.

use std::{collections::HashMap, io, net::IpAddr};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};

use super::{
    netdev::management_group,
    route::{destination, neighbour},
    socket::{Datagram, NetlinkSocket},
};
use crate::{
    host::{HostFacts, HostStaleCause, Neighbour},
    policy::MacAddr,
};

/// Multicast groups (`enum rtnetlink_groups`): links, neighbours, addresses, routes and rules of both families; what IPv6
/// has learnt of a link from router advertisements (12); the sysctls `forwarding` and `rp_filter` of both (24, 25); and next
/// hop objects, since an IPv4 route goes in silence with its next hop (32).
const GROUPS: [u32; 12] = [1, 3, 5, 7, 8, 9, 11, 12, 19, 24, 25, 32];

/// Holds what a burst of changes brings; when it overruns, that is a change too.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Notifications that are looked at at once; if there are more, that is a change.
const MOST_UNREAD: usize = 4096;

/// Subscribed to what the kernel tells of a network namespace, sysctls without a notification excepted.
#[derive(Debug)]
pub(crate) struct HostChanges {
    route: NetlinkSocket,
    /// Whether devices take redirected frames. Kernels before Linux 6.3 do not tell.
    devices: Option<NetlinkSocket>,
    /// As they were read last, by interface index and address; `None` if they were not.
    neighbours: Option<HashMap<(u32, IpAddr), MacAddr>>,
}

impl HostChanges {
    /// In the network namespace of the calling thread.
    pub(crate) fn subscribe() -> io::Result<Self> {
        let route = NetlinkSocket::open(NETLINK_ROUTE, &GROUPS, Some(RECEIVE_BUFFER))?;
        let devices = management_group()
            .and_then(|group| NetlinkSocket::open(NETLINK_GENERIC, &[group], None))
            .inspect_err(|error| tracing::debug!(%error, "the kernel does not tell what devices can do"))
            .ok();
        Ok(Self { route, devices, neighbours: None })
    }

    /// Throws away what was told: it is about to be read.
    pub(crate) fn forget(&mut self) {
        for socket in [Some(&mut self.route), self.devices.as_mut()].into_iter().flatten() {
            for _ in 0..MOST_UNREAD {
                if matches!(socket.try_receive(), Ok(None)) {
                    break;
                }
            }
        }
    }

    /// Takes note of what was read. What says the same of a neighbour is no change: the kernel tells of each time that it
    /// has heard from one.
    pub(crate) fn know(&mut self, host: &HostFacts) {
        let known = host.neighbours.iter().map(|one| ((one.ifindex, one.destination), one.address));
        self.neighbours = Some(known.collect());
    }

    /// Looks whether something has changed. If so, more changes may be unread.
    pub(crate) fn try_changed(&mut self) -> io::Result<Option<HostStaleCause>> {
        for _ in 0..MOST_UNREAD {
            let told = match self.route.try_receive().transpose() {
                Some(told) => self.judge(told)?,
                None => match self.devices.as_mut().and_then(|devices| devices.try_receive().transpose()) {
                    Some(told) => judge_device(told)?,
                    None => return Ok(None),
                },
            };
            if told.is_some() {
                return Ok(told);
            }
        }
        Ok(Some(HostStaleCause::Changed))
    }

    /// Waits until something has changed. Cancel-safe.
    pub(crate) async fn changed(&mut self) -> io::Result<HostStaleCause> {
        loop {
            let told = match &mut self.devices {
                None => {
                    let told = self.route.receive().await;
                    self.judge(told)?
                }
                Some(devices) => tokio::select! {
                    told = self.route.receive() => self.judge(told)?,
                    told = devices.receive() => judge_device(told)?,
                },
            };
            if let Some(cause) = told {
                return Ok(cause);
            }
        }
    }

    fn judge(&self, told: io::Result<Datagram>) -> io::Result<Option<HostStaleCause>> {
        judge(told, |datagram| self.is_change(datagram))
    }

    fn is_change(&self, datagram: &Datagram) -> bool {
        let Some(known) = &self.neighbours else { return true };
        let mut rest = &datagram.bytes[..];
        while !rest.is_empty() {
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else { return true };
            let says_new = match &message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
                    match neighbour(message) {
                        Some(Neighbour { ifindex, destination, address }) => {
                            known.get(&(ifindex, destination)) != Some(&address)
                        }
                        None => destination(message).is_some_and(|which| known.contains_key(&which)),
                    }
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message)) => {
                    destination(message).is_some_and(|which| known.contains_key(&which))
                }
                _ => true,
            };
            if says_new {
                return true;
            }
            rest = rest.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
        }
        false
    }
}

/// Each message of that group is about a device.
fn judge_device(told: io::Result<Datagram>) -> io::Result<Option<HostStaleCause>> {
    judge(told, |_| true)
}

fn judge(
    told: io::Result<Datagram>,
    is_change: impl FnOnce(&Datagram) -> bool,
) -> io::Result<Option<HostStaleCause>> {
    match told {
        // Only the kernel knows.
        Ok(datagram) if datagram.sender != 0 || !is_change(&datagram) => Ok(None),
        Ok(_) => Ok(Some(HostStaleCause::Changed)),
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(Some(HostStaleCause::Overrun)),
        Err(error) => Err(error),
    }
}
