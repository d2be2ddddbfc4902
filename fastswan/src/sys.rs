//! System calls that no library here offers safely.
#![allow(unsafe_code)]

use std::{io, os::fd::AsRawFd as _, time::Duration};

use netlink_sys::Socket;
use rustix::{
    net::{AddressFamily, SocketType, netdevice::name_to_index, socket},
    thread::{MembarrierCommand, membarrier},
    time::{ClockId, clock_gettime},
};
use tokio::io::unix::AsyncFd;

/// `linux/ethtool.h`
const ETHTOOL_GFLAGS: u32 = 0x25;
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

/// Returns when every packet that was in a program at the call has left it.
///
/// `MEMBARRIER_CMD_GLOBAL` waits for an RCU grace period, and XDP programs run inside RCU read sections.
pub(crate) fn grace_period() {
    if membarrier(MembarrierCommand::Global).is_err() {
        // Not available with nohz_full. A packet is in the program for microseconds.
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// `CLOCK_MONOTONIC_COARSE` in nanoseconds: the clock of `bpf_ktime_get_coarse_ns`, but for the offset of a
/// time namespace.
pub(crate) fn monotonic_coarse_nanoseconds() -> u64 {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
