//! Netlink sockets of our own: bounded by their receive buffer, never peeked at, drained until they are empty.

use std::io;

use bytes::{Bytes, BytesMut};
use netlink_sys::Socket;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio::io::unix::AsyncFd;

use crate::sys::watch;

/// The kernel never makes a datagram of a dump longer, and a notification is a few hundred bytes.
const LONGEST_DATAGRAM: usize = 64 * 1024;

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
