//! Which links went down or left. The kernel then deletes what was offloaded to them without a notification of
//! `NETLINK_XFRM`, so those about links are all that tells.

use std::io;

use netlink_packet_core::NetlinkBuffer;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{
    request::{RequestError, Requests},
    socket::{Datagram, NetlinkSocket},
};

const RTNLGRP_LINK: u32 = 1;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_SETLINK: u16 = 19;
const IFF_UP: u32 = 1;
const AF_UNSPEC: u8 = 0;

/// Length of `struct ifinfomsg` in bytes.
const LINK_LENGTH: usize = 16;

/// Hears about the links of a namespace.
#[derive(Debug)]
pub(crate) struct Links {
    socket: NetlinkSocket,
}

impl Links {
    /// Subscribes, in the network namespace of this thread.
    pub(crate) fn open(receive_buffer: usize) -> io::Result<Self> {
        Ok(Self { socket: NetlinkSocket::open(NETLINK_ROUTE, &[RTNLGRP_LINK], Some(receive_buffer))? })
    }

    /// Waits for the next datagram: indices of links that went down or left, if it says so of any. Cancel-safe.
    pub(crate) async fn lost(&mut self) -> io::Result<Vec<u32>> {
        lost(&self.socket.receive().await?)
    }

    /// The same of a datagram that is there already.
    pub(crate) fn try_lost(&mut self) -> io::Result<Option<Vec<u32>>> {
        self.socket.try_receive()?.as_ref().map(lost).transpose()
    }
}

/// Returns when what the kernel has begun to do to links is done. It tells that a link is down before it deletes
/// what was offloaded to it, but holds one lock (RTNL) over both, which this request waits for: one that would change a
/// link, if there were one of this index. Reading takes that lock no longer (Linux 7.3).
pub(crate) fn settle() -> io::Result<()> {
    let mut link = [0; LINK_LENGTH];
    link[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
    match Requests::open(NETLINK_ROUTE)?.ask((RTM_SETLINK, 0, &link), |_, _| Ok(())) {
        Ok(()) | Err(RequestError::Refused(libc::ENODEV)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn lost(datagram: &Datagram) -> io::Result<Vec<u32>> {
    let mut lost = Vec::new();
    if datagram.sender != 0 {
        return Ok(lost);
    }
    let undecodable = || io::Error::from(io::ErrorKind::InvalidData);
    if datagram.truncated {
        return Err(undecodable());
    }
    let mut rest = &datagram.bytes[..];
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest).map_err(|_| undecodable())?;
        if matches!(message.message_type(), RTM_NEWLINK | RTM_DELLINK) {
            let link = message.payload().get(..LINK_LENGTH).ok_or_else(undecodable)?;
            let word = |at: usize| u32::from_ne_bytes([link[at], link[at + 1], link[at + 2], link[at + 3]]);
            let (ifindex, flags) = (word(4), word(8));
            // Those of other families are about ports of bridges.
            if link[0] == AF_UNSPEC && (message.message_type() == RTM_DELLINK || flags & IFF_UP == 0) {
                lost.push(ifindex);
            }
        }
        rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(lost)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    const HEADER_LENGTH: usize = 16;
    const MESSAGE_LENGTH: usize = HEADER_LENGTH + LINK_LENGTH;
    const GONE: u32 = 7;
    const DOWN: u32 = 8;
    const UP: u32 = 9;

    /// One that left, one that is down, and one that is up.
    fn datagram() -> Datagram {
        let mut bytes = Vec::new();
        for (kind, ifindex, flags) in
            [(RTM_DELLINK, GONE, IFF_UP), (RTM_NEWLINK, DOWN, 0), (RTM_NEWLINK, UP, IFF_UP)]
        {
            bytes.extend(u32::try_from(MESSAGE_LENGTH).unwrap().to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            // Flags, sequence and port number, family and type of the link.
            bytes.extend([0; 14]);
            bytes.extend(ifindex.to_ne_bytes());
            bytes.extend(flags.to_ne_bytes());
            bytes.extend([0; 4]);
        }
        Datagram { bytes: bytes.into(), sender: 0, truncated: false }
    }

    #[test]
    fn links_that_left_or_are_down_are_lost_if_the_kernel_says_so() {
        assert_eq!(lost(&datagram()).unwrap(), [GONE, DOWN]);
        assert_eq!(lost(&Datagram { sender: 1, ..datagram() }).unwrap(), [0; 0]);
        lost(&Datagram { truncated: true, ..datagram() }).unwrap_err();
    }

    /// Cut short anywhere but between messages, as a datagram or by its own account, a datagram is refused.
    #[test]
    fn a_datagram_cut_short_is_refused() {
        let whole = datagram().bytes;
        for length in 1..whole.len() {
            let cut = Datagram { bytes: whole.slice(..length), ..datagram() };
            assert_eq!(lost(&cut).is_ok(), length.is_multiple_of(MESSAGE_LENGTH), "{length}");
        }
        for length in 0..MESSAGE_LENGTH {
            let mut bytes = whole.to_vec();
            bytes[..4].copy_from_slice(&u32::try_from(length).unwrap().to_ne_bytes());
            bytes.truncate(length.max(4));
            lost(&Datagram { bytes: Bytes::from(bytes), ..datagram() }).unwrap_err();
        }
    }
}
