//! XFRM netlink messages: real ones to learn from, and a way to send them.

use std::{fs, io};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};

use crate::requests::{ACKNOWLEDGE, BATCH, DUMP, Message, REQUEST, acknowledgement, everything};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// The multicast groups that policies and associations are notified to (`enum xfrm_nlgroups`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Group {
    /// Associations that a policy's packet needs and that are not there.
    Acquire = 1,
    /// Expiries.
    Expire = 2,
    /// Security associations.
    Sa = 3,
    /// Policies.
    Policy = 4,
}

/// Sends a message to all that listen to a group in this thread's network namespace, as the kernel would. It
/// comes from this process's port number, not from the kernel's. Takes `CAP_NET_ADMIN`.
///
/// # Errors
///
/// The errno of `sendto(2)`; `ECONNREFUSED` if nobody listens.
pub fn inject(group: Group, message: &[u8]) -> io::Result<()> {
    // The kernel numbers groups from 1, an address has a bit for each.
    send(SocketAddr::new(0, 1 << (group as u32 - 1)), message)
}

/// Sends a message to the socket with this port number. It comes from a port number of this process, not from the
/// kernel's. Takes `CAP_NET_ADMIN`.
///
/// # Errors
///
/// The errno of `sendto(2)`; `ECONNREFUSED` if there is no such socket.
pub fn inject_at(port: u32, message: &[u8]) -> io::Result<()> {
    send(SocketAddr::new(port, 0), message)
}

fn send(to: SocketAddr, message: &[u8]) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    socket.send_to(message, &to, 0).map(drop)
}

/// A socket of `NETLINK_XFRM` in this thread's network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its port number.
    pub port: u32,
    /// A bit for each multicast group that it listens to, from the lowest up.
    pub groups: u32,
}

/// All of them.
///
/// # Errors
///
/// Those of reading a file.
pub fn listeners() -> io::Result<Vec<Listener>> {
    let table = fs::read_to_string("/proc/thread-self/net/netlink")?;
    // Columns: address, protocol, port, groups, and more.
    let listener = |line: &str| {
        let mut columns = line.split_whitespace().skip(1);
        columns.next().filter(|protocol| protocol.parse() == Ok(NETLINK_XFRM))?;
        let port = columns.next()?.parse().ok()?;
        let groups = u32::from_str_radix(columns.next()?, 16).ok()?;
        // The kernel's own has number 0.
        (port != 0).then_some(Listener { port, groups })
    };
    Ok(table.lines().filter_map(listener).collect())
}

/// Reads all associations and policies of this thread's network namespace into a buffer, and returns how many bytes
/// there were: what reading them takes at the least. Takes `CAP_NET_ADMIN`.
///
/// # Errors
///
/// The errno of a system call, or of what the kernel answers.
pub fn dump_undecoded() -> io::Result<usize> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    // As long as the source's: the kernel fills what it is given.
    let mut buffer = vec![0; 1 << 16];
    let mut all = 0;
    for request in everything() {
        socket.send_to(&request.bytes(REQUEST | DUMP, 1), &SocketAddr::new(0, 0), 0)?;
        loop {
            let length = socket.recv(&mut &mut buffer[..], 0)?;
            all += length;
            match buffer.get(4..6).and_then(|bytes| bytes.first_chunk().copied()).map(u16::from_ne_bytes) {
                Some(NLMSG_DONE) => break,
                Some(NLMSG_ERROR) | None => return Err(io::Error::other("the kernel dumps nothing")),
                Some(_) => {}
            }
        }
    }
    Ok(all)
}

/// Asks the kernel of this thread's network namespace, with the same sequence number every time, which its
/// notifications then carry too. Takes `CAP_NET_ADMIN`.
///
/// # Errors
///
/// The errno of the first request that was refused, or that of a system call. Others may have been granted.
pub fn ask(requests: &[Message], sequence: u32) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    let mut buffer = vec![0; 1 << 12];
    for batch in requests.chunks(BATCH) {
        let bytes = batch.iter().flat_map(|request| request.bytes(REQUEST | ACKNOWLEDGE, sequence));
        let bytes: Vec<u8> = bytes.collect();
        socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut acknowledged = 0;
        while acknowledged < batch.len() {
            let length = socket.recv(&mut &mut buffer[..], 0)?;
            let answer = &buffer[..length.min(buffer.len())];
            let kind = answer.get(4..6).and_then(|bytes| bytes.first_chunk().copied());
            if kind.map(u16::from_ne_bytes) != Some(NLMSG_ERROR) {
                continue;
            }
            match acknowledgement(answer).map_or(-libc::EPROTO, |(_, error)| error) {
                0 => acknowledged += 1,
                errno => return Err(io::Error::from_raw_os_error(-errno)),
            }
        }
    }
    Ok(())
}

macro_rules! captured {
    ($($name:literal,)+) => {
        &[$(($name, include_bytes!(concat!("../captures/", $name, ".bin")))),+]
    };
}

/// Messages that a kernel sent, by name, as bytes of a datagram; see `captures/README.md`.
pub const CAPTURED: &[(&str, &[u8])] = captured![
    "acquire-offload",
    "delpolicy-by-index-offload",
    "delpolicy-by-selector-offload",
    "delpolicy-not-offloaded",
    "delsa-offload",
    "dump-getpolicy-7-mixed-done",
    "dump-getpolicy-7-mixed-part1",
    "dump-getsa-2",
    "dump-getsa-2-done",
    "expire-sa-hard",
    "expire-sa-soft",
    "flushpolicy",
    "flushsa",
    "getdefault-notify",
    "newpolicy-block-not-offloaded",
    "newpolicy-fwd-not-offloaded",
    "newpolicy-in-offload",
    "newpolicy-out-offload",
    "newpolicy-out-offload-block",
    "newpolicy-out-offload-ipv6-sel",
    "newpolicy-out-offload-mark-ifid",
    "newpolicy-out-offload-no-tmpl",
    "newpolicy-out-offload-tcp-dport443",
    "newpolicy-out-offload-transport",
    "newsa-in-offload",
    "newsa-not-offloaded",
    "newsa-out-offload",
    "newsa-out-offload-esn",
    "polexpire-hard-offload",
    "polexpire-soft-offload",
    "strongswan-bypass-in-udp500",
    "strongswan-bypass-out-udp500",
    "strongswan-newpolicy-out",
    "strongswan-rekey-updpolicy-out",
    "updpolicy-offload-new-prio",
    "updpolicy-offload-removed",
    "updsa-offload",
];

/// The captured message with this name.
///
/// # Panics
///
/// If there is none.
#[must_use]
pub fn captured(name: &str) -> &'static [u8] {
    let found = CAPTURED.iter().find(|(captured, _)| *captured == name);
    found.unwrap_or_else(|| panic!("no captured message is named {name}")).1
}
