//! Tells when what the host does with addresses may have changed.

use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;

use crate::source::netlink::NetlinkSocket;

/// Multicast groups (`enum rtnetlink_groups`): links, neighbours, addresses, routes and rules of both families.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// Holds what a burst of changes brings; when it overruns, that is a change too.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Watches the links, neighbours, addresses, routes and rules of a network namespace. Sysctls are not told of.
#[derive(Debug)]
pub struct HostWatch {
    socket: NetlinkSocket,
}

impl HostWatch {
    /// Begins to watch the network namespace of the calling thread. Must be called inside a tokio runtime with
    /// I/O, and before [`HostFacts::read`](super::HostFacts::read), so that no change is missed between the two.
    ///
    /// # Errors
    ///
    /// Those of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: NetlinkSocket::open(NETLINK_ROUTE, &GROUPS, Some(RECEIVE_BUFFER))? })
    }

    /// Waits until something has changed since the last call, and forgets how often: then
    /// [`HostFacts::read`](super::HostFacts::read) again, for
    /// [`Gateway::set_host`](crate::Gateway::set_host). Cancel-safe.
    ///
    /// # Errors
    ///
    /// The socket failed.
    pub async fn changed(&mut self) -> io::Result<()> {
        match self.socket.receive().await {
            Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error),
            _ => {}
        }
        // Those that are left after so many are one more change.
        for _ in 0..4096 {
            if matches!(self.socket.try_receive(), Ok(None)) {
                break;
            }
        }
        Ok(())
    }
}
