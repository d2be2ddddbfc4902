//! Netlink sockets of our own: bounded by their receive buffer, never peeked at, drained until they are empty.

use std::io;

use bytes::{Bytes, BytesMut};
use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio::io::unix::AsyncFd;

use crate::sys::watch;

/// The kernel never makes a datagram of a dump longer, and a notification is a few hundred bytes.
const LONGEST_DATAGRAM: usize = 64 * 1024;

/// Length of a message's header in bytes (`linux/netlink.h`).
const HEADER_LENGTH: usize = 16;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;

/// A datagram and where it came from.
#[derive(Debug)]
pub(crate) struct Datagram {
    pub(crate) bytes: Bytes,
    /// Port number of the sender; the kernel's is 0.
    pub(crate) sender: u32,
    /// It was longer than anything that the kernel sends, and its end is lost.
    pub(crate) truncated: bool,
}

/// A socket of a netlink protocol in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct NetlinkSocket {
    socket: AsyncFd<Socket>,
    buffer: BytesMut,
}

impl NetlinkSocket {
    /// Opens a socket that hears what is sent to these multicast groups.
    pub(crate) fn open(protocol: isize, groups: &[u32], receive_buffer: Option<usize>) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        if let Some(bytes) = receive_buffer {
            set_receive_buffer(&socket, bytes)?;
        }
        socket.bind_auto()?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Self { socket: watch(socket)?, buffer: BytesMut::new() })
    }

    /// The next datagram, if there is one already.
    pub(crate) fn try_receive(&mut self) -> io::Result<Option<Datagram>> {
        match receive(self.socket.get_ref(), &mut self.buffer, libc::MSG_DONTWAIT) {
            Ok(datagram) => Ok(Some(datagram)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the next datagram. While this is pending the socket is empty: the runtime is only asked after
    /// the kernel has said so. Cancel-safe.
    pub(crate) async fn receive(&mut self) -> io::Result<Datagram> {
        if let Some(datagram) = self.try_receive()? {
            return Ok(datagram);
        }
        loop {
            let mut guard = self.socket.readable().await?;
            let buffer = &mut self.buffer;
            if let Ok(result) = guard.try_io(|socket| receive(socket.get_ref(), buffer, libc::MSG_DONTWAIT)) {
                return result;
            }
        }
    }
}

/// A request of this kind with this fixed part.
pub(super) fn request(kind: u16, flags: u16, sequence: u32, fixed: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_LENGTH + fixed.len()).unwrap_or(u32::MAX);
    let mut request = Vec::from(length.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend(sequence.to_ne_bytes());
    // Our port number; the kernel knows it.
    request.extend(0_u32.to_ne_bytes());
    request.extend(fixed);
    request
}

/// Sends a request with this fixed part, and returns the first datagram of the answer. At the return the kernel has
/// handled the request, and so has taken the locks that it handles such requests under.
pub(super) fn converse(protocol: isize, kind: u16, fixed: &[u8]) -> io::Result<Datagram> {
    let socket = Socket::new(protocol)?;
    socket.send_to(&request(kind, 0, 0, fixed), &SocketAddr::new(0, 0), 0)?;
    // It is there already: the kernel handles a request before the call that sends it returns.
    receive(&socket, &mut BytesMut::new(), libc::MSG_DONTWAIT)
}

/// The same, but returns the errno of the answer, 0 if it is no error.
pub(super) fn pass_through(protocol: isize, kind: u16, fixed: &[u8]) -> io::Result<i32> {
    let Datagram { bytes, .. } = converse(protocol, kind, fixed)?;
    let is_error = bytes.get(4..6) == Some(&NLMSG_ERROR.to_ne_bytes());
    let code = bytes.get(HEADER_LENGTH..).and_then(|payload| payload.first_chunk()).filter(|_| is_error);
    Ok(code.map_or(0, |code| i32::from_ne_bytes(*code).saturating_neg()))
}

/// The next datagram. `flags` are those of `recv(2)`.
pub(super) fn receive(socket: &Socket, buffer: &mut BytesMut, flags: libc::c_int) -> io::Result<Datagram> {
    buffer.clear();
    buffer.reserve(LONGEST_DATAGRAM);
    // `MSG_TRUNC` asks for the length that a datagram really had.
    let (length, sender) = socket.recv_from(buffer, flags | libc::MSG_TRUNC)?;
    let truncated = length > buffer.len();
    Ok(Datagram { bytes: buffer.split().freeze(), sender: sender.port_number(), truncated })
}

/// With `CAP_NET_ADMIN` beyond what `net.core.rmem_max` allows, else up to that.
pub(super) fn set_receive_buffer(socket: &Socket, bytes: usize) -> io::Result<()> {
    set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| set_socket_recv_buffer_size(socket, bytes))?;
    Ok(())
}
