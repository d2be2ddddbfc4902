//! System calls that no library here offers safely.
#![allow(unsafe_code)]

use std::{
    io,
    ops::Deref,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
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

/// Where a BPF program can be attached that always returns the same.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ProgramPlace {
    /// tcx on a device with this interface index: packets that come in, or that leave.
    Tcx { ifindex: u32, egress: bool },
    /// A hook of netfilter: `NFPROTO_IPV4` or `NFPROTO_IPV6`, and one of `enum nf_inet_hooks`.
    Netfilter { family: u32, hook: u32 },
}

/// Attaches a program that always returns this number, until the link is closed.
pub(crate) fn attach_program(place: ProgramPlace, returns: i32) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: u32 = 5;
    const BPF_LINK_CREATE: u32 = 28;
    const SCHED_CLS: u32 = 3;
    const NETFILTER: u32 = 32;
    const BPF_NETFILTER: u32 = 45;
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_TCX_EGRESS: u32 = 47;

    let (kind, attach_kind, target, options) = match place {
        ProgramPlace::Tcx { ifindex, egress: false } => (SCHED_CLS, BPF_TCX_INGRESS, ifindex, [0; 2]),
        ProgramPlace::Tcx { ifindex, egress: true } => (SCHED_CLS, BPF_TCX_EGRESS, ifindex, [0; 2]),
        ProgramPlace::Netfilter { family, hook } => (NETFILTER, BPF_NETFILTER, 0, [family, hook]),
    };
    // r0 = number; exit
    let mut instructions = [[0_u8; 8]; 2];
    instructions[0][0] = 0xb7;
    instructions[0][4..].copy_from_slice(&returns.to_ne_bytes());
    instructions[1][0] = 0x95;
    let licence = c"GPL";
    let mut load = Load {
        kind,
        count: 2,
        instructions: instructions.as_ptr().expose_provenance() as u64,
        licence: licence.as_ptr().expose_provenance() as u64,
        attach_kind: if kind == NETFILTER { attach_kind } else { 0 },
        ..Load::default()
    };
    let program = bpf(BPF_PROG_LOAD, &mut load)?;
    let number = program.as_raw_fd().cast_unsigned();
    // The last two are a priority and flags.
    let priority = u32::from(kind == NETFILTER);
    bpf(BPF_LINK_CREATE, &mut [number, target, attach_kind, 0, options[0], options[1], priority, 0])
}

/// What `BPF_PROG_LOAD` takes, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log: [u64; 2],
    version_and_flags: [u32; 2],
    name: [u8; 16],
    ifindex: u32,
    attach_kind: u32,
}

/// A command of `bpf(2)` that makes a descriptor. What the structure points to must live through the call.
fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the structure, which has this size, and what it points to, which its maker keeps alive.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of_val(attributes))
    };
    let descriptor = i32::try_from(result).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for the caller, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The numbers in the values of an array map, which BPF programs read and write at the same time.
#[derive(Debug)]
pub(crate) struct SharedNumbers {
    start: NonNull<AtomicU64>,
    length: usize,
}

impl SharedNumbers {
    /// Maps the values of a map that was made with `BPF_F_MMAPABLE` and has so many numbers of 64 bits.
    pub(crate) fn map(map: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let bytes = length.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use. The kernel refuses it if the
        // map is shorter than `bytes`, and keeps the map as long as the mapping.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, map.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { start, length })
    }
}

impl Deref for SharedNumbers {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has so many numbers and lives as long as `self`; it starts at a page, so it is aligned. Every bit
        // pattern is a number, and programs write whole numbers.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl Drop for SharedNumbers {
    fn drop(&mut self) {
        let bytes = self.length * size_of::<AtomicU64>();
        // SAFETY: the mapping was made by `map` with this length, and no slice of it outlives `self`. Unmapping it cannot fail.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), bytes) };
    }
}

// SAFETY: a mapping is memory like any other; it belongs to no thread.
unsafe impl Send for SharedNumbers {}
// SAFETY: it is only read and written as atomic numbers.
unsafe impl Sync for SharedNumbers {}
