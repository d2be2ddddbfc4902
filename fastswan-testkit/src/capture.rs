//! What the devices of a namespace send and receive, frame by frame (`AF_PACKET`).

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use crate::{lab::Namespace, sys::packet_socket};

/// Room for what arrives while nobody reads.
const RECEIVE_BUFFER: usize = 64 << 20;

/// Follows all devices of a namespace.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// A frame that passed by.
#[derive(Clone, Copy, Debug)]
pub struct Captured<'a> {
    /// It was sent by this namespace.
    pub sent: bool,
    /// It was addressed to the device that received it.
    pub received: bool,
    /// The frame from its Ethernet header on.
    pub frame: &'a [u8],
}

impl Capture {
    /// Frames are kept from now on.
    ///
    /// # Errors
    ///
    /// The errno of a system call; `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.enter(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        })?;
        Self::of(socket)
    }

    /// Keeps the frames of one device of a namespace.
    ///
    /// # Errors
    ///
    /// The errno of a system call; `ENODEV` if there is no such device.
    pub fn at(namespace: &Namespace, device: &str) -> io::Result<Self> {
        let all = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?;
        Self::of(namespace.enter(|| packet_socket(if_nametoindex(device)?, all))?)
    }

    fn of(socket: OwnedFd) -> io::Result<Self> {
        setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
        Ok(Self { socket, buffer: vec![0; 1 << 16] })
    }

    /// Waits for a frame; `None` if none came in time.
    ///
    /// # Errors
    ///
    /// The errno of a system call.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<Captured<'_>>> {
        let patience = TimeVal::microseconds(i64::try_from(patience.as_micros()).unwrap_or(i64::MAX).max(1));
        setsockopt(&self.socket, ReceiveTimeout, &patience)?;
        let received = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut self.buffer);
        let (length, kind) = match received {
            Ok((length, address)) => (length, address.map(|address| address.pkttype())),
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(Captured {
            sent: kind == Some(libc::PACKET_OUTGOING),
            received: kind == Some(libc::PACKET_HOST),
            frame: &self.buffer[..length],
        }))
    }
}
