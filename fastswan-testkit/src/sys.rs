//! System calls that no library here offers safely.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Commands of `linux/ethtool.h` that set one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Ethtool {
    /// `ETHTOOL_STXCSUM`: checksums are left to the device.
    TxChecksums = 0x17,
    /// `ETHTOOL_STSO`
    TcpSegmentation = 0x1f,
    /// `ETHTOOL_SGSO`
    Segmentation = 0x24,
    /// `ETHTOOL_SFLAGS`: VLAN and other offloads, all at once.
    Flags = 0x26,
    /// `ETHTOOL_SGRO`
    Gro = 0x2c,
}

/// Sets a feature of an interface of this thread's network namespace.
pub(crate) fn ethtool_set(interface: &str, command: Ethtool, value: u32) -> io::Result<()> {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut request = Value { command: command as u32, data: value };
    // SAFETY: `ifreq` is plain data, for which zero is valid.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= ifreq.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    ifreq.ifr_ifru.ifru_data = (&raw mut request).cast();
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the name is terminated by a zero, and the request is the structure of every command above;
    // both live through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut ifreq) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A socket that sends whole frames from an interface of this thread's network namespace, and receives those with
/// this Ethernet type: 0 is none, `ETH_P_ALL` all.
pub(crate) fn packet_socket(ifindex: u32, ether_type: u16) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: `sockaddr_ll` is plain data, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = ether_type.to_be();
    address.sll_ifindex = ifindex.cast_signed();
    let length = u32::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: the address is the structure of its family, has this length and lives through the call.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}
