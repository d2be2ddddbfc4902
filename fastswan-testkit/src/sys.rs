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
    let mut request = [command as u32, value];
    ethtool(interface, &mut request)
}

/// Sets a feature of an interface of this thread's network namespace, by the kernel's name of it.
pub(crate) fn feature_set(interface: &str, feature: &str, on: bool) -> io::Result<()> {
    const ETHTOOL_GSTRINGS: u32 = 0x1b;
    const ETHTOOL_SFEATURES: u32 = 0x3b;
    const ETH_SS_FEATURES: u32 = 4;
    /// More strings of 32 bytes than any kernel has features.
    const ROOM: usize = 256;
    let mut strings = vec![0_u32; 3 + ROOM * 8];
    strings[..2].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES]);
    ethtool(interface, &mut strings)?;
    let (count, names) = (strings[2] as usize, &strings[3..]);
    let name = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
    };
    let bit = names.chunks_exact(8).take(count).position(|words| name(words) == feature);
    let bit = bit.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    // Command, number of blocks, and of each which bits are valid and which are asked for.
    let mut request = vec![0_u32; 2 + count.div_ceil(32) * 2];
    request[..2].copy_from_slice(&[ETHTOOL_SFEATURES, u32::try_from(count.div_ceil(32)).unwrap_or(0)]);
    let (block, mask) = (2 + bit / 32 * 2, 1 << (bit % 32));
    request[block] = mask;
    request[block + 1] = if on { mask } else { 0 };
    ethtool(interface, &mut request)
}

/// Passes a request to the driver of an interface. It must have room for what its command writes.
fn ethtool(interface: &str, request: &mut [u32]) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data, for which zero is valid.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= ifreq.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    ifreq.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the name is terminated by a zero, and the request has the size of each command above, or more; both
    // live through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut ifreq) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
