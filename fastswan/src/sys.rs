//! System calls that no library here offers safely.
#![allow(unsafe_code)]

use std::{io, os::fd::AsRawFd as _};

use netlink_sys::Socket;
use rustix::{
    net::{
        AddressFamily, SocketType,
        netdevice::{index_to_name, name_to_index},
        socket,
    },
    time::{ClockId, clock_gettime},
};
use tokio::io::unix::AsyncFd;

/// `linux/ethtool.h`
const ETHTOOL_GDRVINFO: u32 = 3;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
/// `ETH_FLAG_RXVLAN`: the device takes VLAN tags off received frames.
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

/// The index of the interface with this name in this thread's network namespace.
pub(crate) fn ifindex(interface: &str) -> io::Result<u32> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(name_to_index(socket, interface)?)
}

/// Whether an interface of this thread's network namespace takes VLAN tags off received frames.
pub(crate) fn strips_vlan_tags(interface: &str) -> io::Result<bool> {
    /// `struct ethtool_value`
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut flags = Value { command: ETHTOOL_GFLAGS, data: 0 };
    ethtool(interface, &mut flags)?;
    Ok(flags.data & ETH_FLAG_RXVLAN != 0)
}

/// Drivers that let all CPUs share what channels there are.
const SHARE_CHANNELS: [&str; 8] = ["bnxt_en", "ena", "igb", "igc", "ixgbe", "tun", "veth", "virtio_net"];

/// A device of this thread's network namespace takes redirected frames from this many CPUs, those with lower numbers;
/// `None` if from all. Other drivers than a few have a channel for each CPU, or lose the frames of those that have none.
pub(crate) fn transmitting_cpus(ifindex: u32) -> io::Result<Option<u16>> {
    let interface = index_to_name(socket(AddressFamily::INET, SocketType::DGRAM, None)?, ifindex)?;
    let optional = |result: io::Result<()>| match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    };
    let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    if !optional(ethtool(&interface, &mut channels))? {
        return Ok(None);
    }
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 40] };
    let is_known = optional(ethtool(&interface, &mut info))?;
    let driver = info.driver.split(|byte| *byte == 0).next().unwrap_or_default();
    let shares = is_known && SHARE_CHANNELS.iter().any(|name| name.as_bytes() == driver);
    Ok((!shares).then(|| channels.that_transmit()))
}

/// `struct ethtool_channels`
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    /// Of reception, transmission, other things, and reception with transmission.
    most: [u32; 4],
    /// Likewise, as they are now.
    used: [u32; 4],
}

impl Channels {
    fn that_transmit(&self) -> u16 {
        let [_, transmitting, _, combined] = self.used;
        u16::try_from(transmitting.saturating_add(combined)).unwrap_or(u16::MAX)
    }
}

/// `struct ethtool_drvinfo`
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u32; 40],
}

/// Passes a request to the driver of an interface. `T` must be the structure that its first field asks for.
fn ethtool<T>(interface: &str, request: &mut T) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data, for which zero is valid.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= ifreq.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    ifreq.ifr_ifru.ifru_data = std::ptr::from_mut(request).cast();
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: `ifreq` is terminated by a zero, since the name is shorter than the field, and points to a
    // structure of the size that the kernel writes for its command; both live through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut ifreq) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a socket known to the tokio runtime that the caller runs in.
pub(crate) fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(io::Error::other("there is no tokio runtime: call this inside one"));
    }
    // SAFETY: `Socket` owns its descriptor, always returns the same, and closes it when it is dropped, which
    // `AsyncFd` sees to.
    let watched = unsafe { AsyncFd::register(socket) };
    watched.map_err(io::Error::from)
}

/// `CLOCK_MONOTONIC_COARSE` in nanoseconds: the clock of `bpf_ktime_get_coarse_ns`, but for the offset of a
/// time namespace.
pub(crate) fn monotonic_coarse_nanoseconds() -> u64 {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_transmit_are_those_of_transmission_and_combined_ones() {
        let channels = |used| Channels { command: ETHTOOL_GCHANNELS, most: [0, 64, 0, 64], used };
        assert_eq!(channels([0, 0, 1, 8]).that_transmit(), 8);
        assert_eq!(channels([8, 4, 1, 0]).that_transmit(), 4);
        assert_eq!(channels([0, 0, 0, 1 << 20]).that_transmit(), u16::MAX);
        assert_eq!((size_of::<Channels>(), size_of::<DriverInfo>()), (36, 196), "what the kernel writes");
    }

    #[test]
    fn a_device_without_channels_has_no_limit() {
        // The loopback device, which every namespace has.
        assert_eq!(transmitting_cpus(1).unwrap(), None);
        transmitting_cpus(999_999).unwrap_err();
    }
}
