//! Tells when what the host does with addresses may have changed.

use std::{collections::HashMap, io, net::IpAddr};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{
    route::{destination, neighbour},
    socket::{Datagram, NetlinkSocket},
};
use crate::{
    host::{HostError, HostFacts},
    policy::MacAddr,
};

/// Multicast groups (`enum rtnetlink_groups`): links, neighbours, addresses, routes and rules of both families.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// Holds what a burst of changes brings; when it overruns, that is a change too.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Notifications that are thrown away at once; those that are left are one more change.
const MOST_UNREAD: usize = 4096;

/// Watches the links, neighbours, addresses, routes and rules of a network namespace. Sysctls are not told of.
#[derive(Debug)]
pub struct HostWatch {
    socket: NetlinkSocket,
    /// As they were read last, by interface index and address; `None` if they were not, or that has failed.
    neighbours: Option<HashMap<(u32, IpAddr), MacAddr>>,
}

impl HostWatch {
    /// Begins to watch the network namespace of the calling thread. Must be called inside a tokio runtime with
    /// I/O, and before [`HostFacts::read`], so that no change is missed between the two.
    ///
    /// # Errors
    ///
    /// Those of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        let socket = NetlinkSocket::open(NETLINK_ROUTE, &GROUPS, Some(RECEIVE_BUFFER))?;
        Ok(Self { socket, neighbours: None })
    }

    /// Reads the facts, as [`HostFacts::read`] does in the network namespace of the calling thread. What was told
    /// before is then no change, and neither is what says of a neighbour what was read: the kernel tells of each
    /// time that it has heard from one.
    ///
    /// # Errors
    ///
    /// [`HostError`]. What has changed is then still to be read.
    pub fn read(&mut self) -> Result<HostFacts, HostError> {
        self.forget();
        self.neighbours = None;
        let host = HostFacts::read()?;
        let known = host.neighbours.iter().map(|one| ((one.ifindex, one.destination), one.address));
        self.neighbours = Some(known.collect());
        Ok(host)
    }

    /// Waits until something has changed since the last call, and forgets how often: then [`read`](Self::read) again,
    /// for [`Gateway::set_host`](crate::Gateway::set_host). Cancel-safe.
    ///
    /// # Errors
    ///
    /// The socket failed.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            match self.socket.receive().await {
                Ok(datagram) if !self.is_change(&datagram) => {}
                Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error),
                _ => break,
            }
        }
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        for _ in 0..MOST_UNREAD {
            if matches!(self.socket.try_receive(), Ok(None)) {
                break;
            }
        }
    }

    fn is_change(&self, datagram: &Datagram) -> bool {
        let Some(known) = &self.neighbours else { return true };
        let mut rest = &datagram.bytes[..];
        while !rest.is_empty() {
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else { return true };
            let says_new = match &message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
                    match neighbour(message) {
                        Some(now) => known.get(&(now.ifindex, now.destination)) != Some(&now.address),
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
