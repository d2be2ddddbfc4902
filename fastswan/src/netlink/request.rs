//! Requests to the kernel, of all netlink families: written, sent and read to the end of the answer in one place.
//!
//! On sockets of their own: a notification on the same socket whose sequence number happens to be the request's would end
//! an answer early. And not through a netlink library's connection, which hides what must not be mistaken for "there is
//! no such thing": a message that cannot be decoded, an interrupted dump, an error at its end.

use std::{fmt::Debug, io};

use bytes::BytesMut;
use netlink_packet_core::{NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_sys::{Socket, SocketAddr};

use super::socket::{receive, set_receive_buffer};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_MULTI: u16 = 2;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Asks for all that there is.
pub(super) const DUMP: u16 = 0x300;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// Length of a message's header in bytes (`linux/netlink.h`).
const HEADER_LENGTH: usize = 16;

/// A request was not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// A system call failed.
    #[error("{0}")]
    System(io::Error),
    /// The kernel answered with this errno.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// What was asked for changed while it was told.
    #[error("it changed while it was being read")]
    Interrupted,
    /// The answer is not what the kernel sends.
    #[error("undecodable: {0}")]
    Undecodable(String),
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl From<RequestError> for io::Error {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::System(error) => error,
            RequestError::Refused(errno) => Self::from_raw_os_error(errno),
            RequestError::Interrupted | RequestError::Undecodable(_) => {
                Self::new(io::ErrorKind::InvalidData, error)
            }
        }
    }
}

/// A socket that asks the kernel one thing after the other, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Requests {
    socket: Socket,
    buffer: BytesMut,
    /// Of the latest request.
    sequence: u32,
    is_dump: bool,
}

impl Requests {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        // From now on nobody but the kernel can send to it.
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, buffer: BytesMut::new(), sequence: 0, is_dump: false })
    }

    /// Sets the size of the receive buffer in bytes, as in `SO_RCVBUF`.
    pub(super) fn set_receive_buffer(&self, bytes: usize) -> io::Result<()> {
        set_receive_buffer(&self.socket, bytes)
    }

    /// Has the kernel refuse what it does not understand, and heed what else it would ignore (`NETLINK_GET_STRICT_CHK`).
    pub(super) fn check_strictly(&self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// Sends a request. At the return the kernel has handled it, and so has taken the locks that it handles such
    /// requests under; the answer, or the first part of a dump, is there to be [read](Self::read).
    pub(super) fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        self.is_dump = flags & DUMP == DUMP;
        let length = u32::try_from(HEADER_LENGTH + body.len()).unwrap_or(u32::MAX);
        let mut request = Vec::with_capacity(HEADER_LENGTH + body.len());
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        request.extend(self.sequence.to_ne_bytes());
        // Our port number; the kernel knows it.
        request.extend(0_u32.to_ne_bytes());
        request.extend(body);
        self.socket.send(&request, 0)?;
        Ok(())
    }

    /// Reads one datagram of the answer, and passes on kind and payload of each message. True if it was the last one.
    pub(super) fn read<E: From<RequestError>>(
        &mut self,
        mut take: impl FnMut(u16, &[u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let undecodable = |reason: String| RequestError::Undecodable(reason);
        // The kernel queues the next part of a dump before it hands out this one: nothing to wait for.
        let datagram =
            receive(&self.socket, &mut self.buffer, libc::MSG_DONTWAIT).map_err(RequestError::System)?;
        if datagram.sender != 0 {
            return Ok(false);
        }
        if datagram.truncated {
            return Err(undecodable("a datagram was cut off".to_owned()).into());
        }
        let mut rest = &datagram.bytes[..];
        let mut last = false;
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(|error| undecodable(error.to_string()))?;
            // Messages begin at multiples of 4 bytes; the last one need not end there.
            rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
            if message.sequence_number() != self.sequence {
                continue;
            }
            if message.flags() & NLM_F_DUMP_INTR != 0 {
                return Err(RequestError::Interrupted.into());
            }
            match message.message_type() {
                NLMSG_NOOP => {}
                NLMSG_OVERRUN => return Err(RequestError::Interrupted.into()),
                NLMSG_ERROR | NLMSG_DONE => {
                    let errno = message.payload().first_chunk().map(|errno| i32::from_ne_bytes(*errno));
                    match errno.ok_or_else(|| undecodable("an end without an errno".to_owned()))? {
                        0.. => last = true,
                        errno => return Err(RequestError::Refused(errno.saturating_neg()).into()),
                    }
                }
                kind => {
                    take(kind, message.payload())?;
                    last |= !self.is_dump && message.flags() & NLM_F_MULTI == 0;
                }
            }
        }
        Ok(last)
    }

    /// Sends a request and reads all of the answer.
    pub(crate) fn ask<E: From<RequestError>>(
        &mut self,
        (kind, flags, body): (u16, u16, &[u8]),
        mut take: impl FnMut(u16, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.send(kind, flags, body).map_err(RequestError::System)?;
        while !self.read(&mut take)? {}
        Ok(())
    }

    /// The same with the messages of a family.
    pub(super) fn ask_for<T>(&mut self, flags: u16, request: &T) -> Result<Vec<T>, RequestError>
    where
        T: NetlinkSerializable + NetlinkDeserializable<Error: Debug + ToString>,
    {
        let mut body = vec![0; request.buffer_len()];
        request.serialize(&mut body);
        let mut answer = Vec::new();
        self.ask((request.message_type(), flags, &body), |kind, payload| {
            let mut header = NetlinkHeader::default();
            header.message_type = kind;
            let message = T::deserialize(&header, payload);
            answer.push(message.map_err(|error| RequestError::Undecodable(error.to_string()))?);
            Ok::<_, RequestError>(())
        })?;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use netlink_sys::protocols::NETLINK_ROUTE;

    use super::*;

    const RTM_GETLINK: u16 = 18;
    const RTM_SETLINK: u16 = 19;

    #[test]
    fn an_answer_ends_with_a_dump_an_error_or_the_only_message() {
        let mut kernel = Requests::open(NETLINK_ROUTE).unwrap();
        let links = Cell::new(0);
        let mut count = |_: u16, _: &[u8]| {
            links.set(links.get() + 1);
            Ok::<_, RequestError>(())
        };
        kernel.ask((RTM_GETLINK, DUMP, &[0; 16]), &mut count).unwrap();
        let mut lo = [0; 16];
        lo[4] = 1;
        kernel.ask((RTM_GETLINK, 0, &lo), &mut count).unwrap();
        assert!(links.get() >= 2, "loopback twice");
        lo[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let refused = kernel.ask((RTM_GETLINK, 0, &lo), &mut count).unwrap_err();
        assert!(matches!(refused, RequestError::Refused(libc::ENODEV)), "{refused}");
        let refused = kernel.ask((RTM_SETLINK, 0, &lo), &mut count).unwrap_err();
        assert!(matches!(refused, RequestError::Refused(libc::ENODEV | libc::EPERM)), "{refused}");
    }
}
