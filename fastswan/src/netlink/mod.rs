//! Everything that speaks netlink: sockets, requests, dumps, settling, and reading messages of all families.
//!
//! [`decode`] reads what the kernel's XFRM netlink says, for programs that have a socket of their own. All else here
//! serves [`NetlinkSource`](crate::NetlinkSource) and what reads [`HostFacts`](crate::HostFacts).

mod audit;
mod back_off;
mod decode;
mod dump;
mod links;
#[cfg_attr(not(feature = "bpf"), allow(dead_code, reason = "redirects need a program"))]
mod netdev;
mod request;
mod route;
mod socket;
mod watch;

#[cfg(feature = "bpf")]
pub(crate) use self::netdev::takes_redirected_frames;
pub(crate) use self::{
    audit::Audit,
    back_off::BackOff,
    dump::{Dump, DumpConfig, DumpError, Dumped, settle as settle_requests},
    links::{Links, settle as settle_links},
    socket::{Datagram, NetlinkSocket},
};
pub use self::{
    decode::{Content, DecodeError, Message, decode},
    watch::HostWatch,
};
