//! Hears of ICMP messages to the host by which the kernel may learn path MTUs.
//!
//! Anybody may have sent them. So of what they say only the addresses of the packet that they quote count, and these only for a
//! question to the kernel.

use std::{
    future::pending,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::{
    io::Errno,
    net::{
        RecvFlags, recv,
        sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force},
    },
};
use tokio::{io::unix::AsyncFd, time::Instant};

use super::{
    path_mtu::{PathMtus, Question},
    request::Requests,
    route::ask_path_mtu,
};
use crate::{
    policy::Family,
    sys::{Unread, icmp_socket, unread, watch_descriptor},
};

/// Some thousand messages.
const RECEIVE_BUFFER: usize = 2 << 20;

/// Messages of a family that are read at once, and that are thrown away at once.
const MOST_MESSAGES: usize = 256;
const MOST_UNREAD: usize = 1 << 16;

/// Of a message, the headers and what follows on the header that is quoted may be cut off: the longest IPv4 header, that of
/// ICMP, and the header of a packet.
const LONGEST: usize = 60 + 8 + 40;

/// `linux/icmp.h`, `linux/icmpv6.h`
const ICMP_DEST_UNREACH: u8 = 3;
const ICMP_FRAG_NEEDED: u8 = 4;
const ICMPV6_PKT_TOOBIG: u8 = 2;
const ICMP_HEADER: usize = 8;

/// Hears messages of both families, and asks the kernel what it has learnt.
#[derive(Debug)]
pub(crate) struct IcmpSockets {
    /// `None` where messages cannot be heard.
    v4: Option<IcmpSocket>,
    v6: Option<IcmpSocket>,
    kernel: Requests,
}

impl IcmpSockets {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let open = |family| {
            IcmpSocket::open(family).inspect_err(|error| {
                if family == Family::V6 && error.raw_os_error() == Some(libc::EAFNOSUPPORT) {
                    tracing::debug!(%error, "there is no IPv6");
                } else {
                    tracing::warn!(
                        %error, ?family,
                        "ICMP messages cannot be heard, which takes CAP_NET_RAW: the path MTUs that the kernel learns from \
                         them are looked for five times a second, and those that no packet of the kernel's has used yet are \
                         missed"
                    );
                }
            })
        };
        let (v4, v6) = (open(Family::V4).ok(), open(Family::V6).ok());
        Ok(Self { v4, v6, kernel: Requests::open(NETLINK_ROUTE)? })
    }

    /// Families whose messages cannot be heard.
    pub(crate) fn unheard(&self) -> impl Iterator<Item = Family> {
        let v4 = self.v4.is_none().then_some(Family::V4);
        v4.into_iter().chain(self.v6.is_none().then_some(Family::V6))
    }

    /// Takes up messages that have come, and asks the kernel what is to be asked. However many there are, it ends soon.
    pub(crate) fn follow(&mut self, path_mtus: &mut PathMtus, now: Instant) {
        while let Some(family) = path_mtus.start_settling(now) {
            self.discard(family);
        }
        for family in [Family::V4, Family::V6] {
            let Some(socket) = self.of(family) else { continue };
            if socket.has_lost().unwrap_or(true) {
                path_mtus.lose(family, now);
            }
            for _ in 0..MOST_MESSAGES {
                if !path_mtus.listens(family) {
                    break;
                }
                match socket.try_receive() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    received => take(received, family, path_mtus, now),
                }
            }
        }
        for question in path_mtus.questions(now) {
            match ask_path_mtu(&mut self.kernel, &question) {
                Ok(mtu) => path_mtus.answered(&question, mtu, now),
                Err(error) => {
                    tracing::debug!(%error, "the kernel does not answer about a path MTU");
                    path_mtus.lose(question.destination.into(), now);
                }
            }
        }
    }

    /// Throws away the messages that are there, of what was lost too: all is going to be read.
    pub(crate) fn discard(&mut self, family: Family) {
        let Some(socket) = self.of(family) else { return };
        for _ in 0..MOST_UNREAD {
            if socket.try_receive().is_err() {
                break;
            }
        }
        // If it fails, it fails again, and then counts as a loss.
        let _ = socket.has_lost();
    }

    /// Waits for a message of the families that are to be heard. Cancel-safe.
    pub(crate) async fn receive(&mut self, [v4, v6]: [bool; 2]) -> (Family, io::Result<Option<Question>>) {
        let Self { v4: socket_v4, v6: socket_v6, .. } = self;
        tokio::select! {
            received = receive_if(socket_v4, v4) => (Family::V4, received),
            received = receive_if(socket_v6, v6) => (Family::V6, received),
        }
    }

    /// The socket of a family.
    fn of(&mut self, family: Family) -> Option<&mut IcmpSocket> {
        match family {
            Family::V4 => self.v4.as_mut(),
            Family::V6 => self.v6.as_mut(),
        }
    }
}

/// Takes up a message.
pub(crate) fn take(
    received: io::Result<Option<Question>>,
    family: Family,
    path_mtus: &mut PathMtus,
    now: Instant,
) {
    match received {
        Ok(Some(question)) => path_mtus.hear(question, now),
        Ok(None) => {}
        Err(error) => {
            tracing::debug!(%error, ?family, "ICMP messages cannot be read");
            path_mtus.lose(family, now);
        }
    }
}

/// Waits for a message; for ever if none is to be heard. Cancel-safe.
async fn receive_if(socket: &mut Option<IcmpSocket>, listens: bool) -> io::Result<Option<Question>> {
    match socket {
        Some(socket) if listens => socket.receive().await,
        _ => pending().await,
    }
}

/// A raw socket that gets a copy of the messages of a family.
#[derive(Debug)]
struct IcmpSocket {
    family: Family,
    socket: AsyncFd<OwnedFd>,
    /// Messages that were dropped, when they were looked at last.
    dropped: u32,
}

impl IcmpSocket {
    fn open(family: Family) -> io::Result<Self> {
        let socket = match family {
            Family::V4 => icmp_socket(false, ICMP_DEST_UNREACH)?,
            Family::V6 => icmp_socket(true, ICMPV6_PKT_TOOBIG)?,
        };
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)
            .or_else(|_| set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER))?;
        Ok(Self { family, socket: watch_descriptor(socket)?, dropped: 0 })
    }

    /// Whether messages were dropped since it was asked last because they did not fit into the buffer: then it is nearly full
    /// now, since no more than [`MOST_MESSAGES`] are read in between. Others were dropped because an inbound policy asks
    /// for IPsec; these the kernel does not take up itself, and anybody could send them to make path MTUs unclear.
    fn has_lost(&mut self) -> io::Result<bool> {
        let Unread { taken, room, dropped } = unread(&self.socket)?;
        let is_new = std::mem::replace(&mut self.dropped, dropped) != dropped;
        Ok(is_new && taken >= room / 2)
    }

    /// The next message: what to ask the kernel, if it is of the right kind. `WouldBlock` if there is none.
    fn try_receive(&mut self) -> io::Result<Option<Question>> {
        receive(self.socket.get_ref(), self.family)
    }

    /// Waits for the next message. Cancel-safe.
    async fn receive(&mut self) -> io::Result<Option<Question>> {
        loop {
            let mut guard = self.socket.readable().await?;
            let family = self.family;
            if let Ok(result) = guard.try_io(|socket| receive(socket.get_ref(), family)) {
                return result;
            }
        }
    }
}

fn receive(socket: &OwnedFd, family: Family) -> io::Result<Option<Question>> {
    let mut message = [0; LONGEST];
    loop {
        match recv(socket, &mut message, RecvFlags::DONTWAIT) {
            Ok((length, _)) => return Ok(question(family, message.get(..length).unwrap_or(&message))),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What to ask the kernel when this message came, as a raw socket of the family gets it: with the IPv4 header, or without the
/// IPv6 header. `None` if it is of another kind or cut off.
fn question(family: Family, message: &[u8]) -> Option<Question> {
    match family {
        Family::V4 => {
            let header = usize::from(message.first()? & 0xf) * 4;
            let icmp = message.get(header..)?;
            if icmp.get(..2)? != [ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED] {
                return None;
            }
            let quoted = icmp.get(ICMP_HEADER..)?;
            let address = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 4] = quoted.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(octets).into())
            };
            let tos = quoted.get(1)? & 0xfc;
            Some(Question { source: address(12)?, destination: address(16)?, tos })
        }
        Family::V6 => {
            if *message.first()? != ICMPV6_PKT_TOOBIG {
                return None;
            }
            let quoted = message.get(ICMP_HEADER..)?;
            let address = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 16] = quoted.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(octets).into())
            };
            Some(Question { source: address(8)?, destination: address(24)?, tos: 0 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a raw socket gets it: "fragmentation needed, and DF set" from 192.0.2.2 to 192.0.2.1 with a path MTU of 1300, about an
    /// ESP packet of type of service 0xb9 to 198.51.100.7.
    const FRAGMENTATION_NEEDED: [u8; 56] = [
        0x45, 0xc0, 0, 56, 0, 0, 0, 0, 64, 1, 0xf6, 0x08, 192, 0, 2, 2, 192, 0, 2, 1, // IPv4
        3, 4, 0, 0, 0, 0, 0x05, 0x14, // ICMP
        0x45, 0xb9, 0x05, 0xdc, 0, 0, 0x40, 0, 63, 50, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7, // IPv4
        0, 0, 1, 0, 0, 0, 0, 1, // ESP
    ];

    /// The same of ICMPv6: "packet too big" about a packet from `2001:db8:f::1` to `2001:db8:2::9`.
    fn too_big() -> Vec<u8> {
        let mut message = vec![2, 0, 0, 0, 0, 0, 0x05, 0x14, 0x60, 0, 0, 0, 0, 64, 50, 64];
        for address in ["2001:db8:f::1", "2001:db8:2::9"] {
            message.extend(address.parse::<Ipv6Addr>().unwrap().octets());
        }
        message
    }

    fn asked(destination: &str, source: &str, tos: u8) -> Question {
        Question { destination: destination.parse().unwrap(), source: source.parse().unwrap(), tos }
    }

    #[test]
    fn the_kernel_is_asked_about_the_packet_that_a_message_quotes() {
        let about = Some(asked("198.51.100.7", "192.0.2.1", 0xb8));
        assert_eq!(question(Family::V4, &FRAGMENTATION_NEEDED), about);
        assert_eq!(question(Family::V6, &too_big()), Some(asked("2001:db8:2::9", "2001:db8:f::1", 0)));
        // With options in the header of the message.
        let mut longer = FRAGMENTATION_NEEDED.to_vec();
        longer[0] = 0x47;
        longer.splice(20..20, [1; 8]);
        assert_eq!(question(Family::V4, &longer), about);
    }

    #[test]
    fn a_message_that_is_cut_off_or_of_another_kind_asks_nothing() {
        for (family, message, needed) in
            [(Family::V4, FRAGMENTATION_NEEDED.to_vec(), 48), (Family::V6, too_big(), 48)]
        {
            for length in 0..message.len() {
                let asks = question(family, &message[..length]).is_some();
                assert_eq!(asks, length >= needed, "{family:?} {length}");
            }
        }
        let mut other = FRAGMENTATION_NEEDED;
        other[21] = 3;
        assert_eq!(question(Family::V4, &other), None, "port unreachable");
        let mut other = too_big();
        other[0] = 1;
        assert_eq!(question(Family::V6, &other), None, "destination unreachable");
        for byte in 0..=u8::MAX {
            for length in 0..LONGEST {
                let _ = question(Family::V4, &vec![byte; length]);
                let _ = question(Family::V6, &vec![byte; length]);
            }
        }
    }

    #[tokio::test]
    async fn the_kernel_answers_a_question_about_any_address() {
        let mut kernel = Requests::open(NETLINK_ROUTE).unwrap();
        for (destination, source) in [
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "::1"),
            ("192.0.2.77", "198.51.100.77"),
            ("0.0.0.0", "0.0.0.0"),
        ] {
            let question = asked(destination, source, 0xfc);
            assert_eq!(ask_path_mtu(&mut kernel, &question).unwrap(), None, "{question:?}");
        }
    }
}
