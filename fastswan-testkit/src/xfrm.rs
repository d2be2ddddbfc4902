//! XFRM netlink messages: real ones to learn from, and a way to send them.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};

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
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    // The kernel numbers groups from 1, an address has a bit for each.
    let address = SocketAddr::new(0, 1 << (group as u32 - 1));
    socket.send_to(message, &address, 0).map(drop)
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
