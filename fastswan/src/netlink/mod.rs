//! Everything that speaks netlink: sockets, requests, dumps, settling, and reading messages of all families.
//!
//! [`decode`] reads what the kernel's XFRM netlink says, for programs that have a socket of their own. All else here
//! serves [`NetlinkSource`](crate::NetlinkSource) and [`NetlinkHost`](crate::NetlinkHost).

mod addresses;
mod anchor;
mod audit;
mod back_off;
mod decode;
mod due;
mod dump;
mod follow;
mod hooks;
mod icmp;
#[cfg(feature = "bpf")]
mod interface;
mod link_state;
mod links;
mod netdev;
mod path_mtu;
mod request;
mod route;
mod route_message;
mod route_store;
mod socket;
mod solicit;
mod thresholds;
mod watch;
mod wire;

use std::io;

pub use self::decode::{Content, DecodeError, Message, decode};
pub(crate) use self::{
    anchor::{Anchor, Job},
    audit::Audit,
    back_off::BackOff,
    dump::{Dump, DumpConfig, DumpError, Dumped, settle as settle_requests},
    follow::{Follower, Found, Wanted, read_host},
    hooks::{HookWatch, read_hooks},
    icmp::take as take_icmp,
    links::{Links, settle as settle_links},
    path_mtu::Question,
    route::{
        Sysctls, Told, read_all, read_neighbours, read_path_mtus, read_routes, read_rules, read_sysctls,
    },
    socket::{Datagram, NetlinkSocket},
    solicit::Solicitor,
    thresholds::{ThresholdWatch, Thresholds, thresholds},
    watch::{HostSockets, hear, heard_device},
};
#[cfg(feature = "bpf")]
pub(crate) use self::{
    interface::{PortLink, find_link, members, read_link},
    netdev::takes_redirected_frames,
};

/// What to do about an error of a netlink socket, starting with "; ", or nothing.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run with CAP_NET_ADMIN, or as root",
        Some(libc::EPROTONOSUPPORT) => {
            "; the kernel needs CONFIG_XFRM_USER for policies: `modprobe xfrm_user` loads it where it is a module"
        }
        Some(libc::EAFNOSUPPORT) => {
            "; this process is not allowed to open netlink sockets: if systemd starts it, add AF_NETLINK to its \
             RestrictAddressFamilies="
        }
        Some(libc::EMFILE | libc::ENFILE) => "; raise the limit of open files",
        Some(libc::EAGAIN) => "; raise the limit of threads",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_forbids_a_socket_is_named_with_a_remedy() {
        for (errno, names) in [
            (libc::EPERM, "CAP_NET_ADMIN"),
            (libc::EPROTONOSUPPORT, "CONFIG_XFRM_USER"),
            (libc::EAFNOSUPPORT, "RestrictAddressFamilies"),
            (libc::EMFILE, "open files"),
        ] {
            let remedy = remedy(&io::Error::from_raw_os_error(errno));
            assert!(remedy.starts_with("; ") && remedy.contains(names), "{remedy}");
        }
    }
}
