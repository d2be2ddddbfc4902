//! System calls that no library here offers safely.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    time::Duration,
};

use netlink_sys::Socket;
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, ipproto, socket, socket_with},
    thread::{MembarrierCommand, membarrier},
};
use tokio::io::unix::AsyncFd;

/// The index of the interface with this name in this thread's network namespace.
#[cfg(feature = "serde")]
pub(crate) fn ifindex(interface: &str) -> io::Result<u32> {
    Ok(rustix::net::netdevice::name_to_index(any_socket()?, interface)?)
}

/// A socket for requests that any socket takes. Of this family because a process that may open few families may
/// nearly always open this one.
fn any_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::UNIX, SocketType::DGRAM, None)?)
}

/// The type differs between C libraries.
#[allow(clippy::unnecessary_cast, reason = "musl's is another type")]
const ETHTOOL: libc::Ioctl = libc::SIOCETHTOOL as libc::Ioctl;
/// `linux/ethtool.h`
#[cfg(feature = "bpf")]
const ETHTOOL_GDRVINFO: u32 = 3;
#[cfg(feature = "bpf")]
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;

/// The names of the features that are on at an interface of this thread's network namespace, as
/// `ethtool --show-features` has them in the kernel's spelling (`rx-vlan-hw-parse`, `rx-gro`).
pub(crate) fn active_features(interface: &str) -> io::Result<Vec<String>> {
    let count = feature_count(interface)?;
    // `struct ethtool_gstrings` in words of 32 bits: command, set, length, and the strings.
    let mut strings = vec![0_u32; 3 + count * ETH_GSTRING_LEN / 4];
    strings[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count_u32(count)?]);
    ethtool(interface, &mut strings)?;
    // `struct ethtool_gfeatures`: command, number of blocks, and of each the masks available, requested, active and
    // never changed.
    let blocks = count.div_ceil(32);
    let mut masks = vec![0_u32; 2 + blocks * 4];
    masks[..2].copy_from_slice(&[ETHTOOL_GFEATURES, count_u32(blocks)?]);
    ethtool(interface, &mut masks)?;

    let names: Vec<u8> = strings[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let name = |bytes: &[u8]| {
        let bytes: Vec<u8> = bytes.iter().copied().take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let is_active = |feature: usize| masks[2 + feature / 32 * 4 + 2] & (1 << (feature % 32)) != 0;
    let names = names.chunks_exact(ETH_GSTRING_LEN).map(name).enumerate();
    Ok(names.filter(|(feature, _)| is_active(*feature)).map(|(_, name)| name).collect())
}

/// How many features the running kernel knows, which is the same for each interface and at any time.
fn feature_count(interface: &str) -> io::Result<usize> {
    // `struct ethtool_sset_info`: command, reserved, a mask of 64 bits of sets, and the length of the only set.
    let mask = (1_u64 << ETH_SS_FEATURES).to_ne_bytes();
    let half = |at: usize| u32::from_ne_bytes([mask[at], mask[at + 1], mask[at + 2], mask[at + 3]]);
    let mut info = vec![ETHTOOL_GSSET_INFO, 0, half(0), half(4), 0];
    ethtool(interface, &mut info)?;
    Ok(info[4] as usize)
}

fn count_u32(count: usize) -> io::Result<u32> {
    u32::try_from(count).map_err(io::Error::other)
}

/// Drivers that let all CPUs share what channels there are.
#[cfg(feature = "bpf")]
const SHARE_CHANNELS: [&str; 8] = ["bnxt_en", "ena", "igb", "igc", "ixgbe", "tun", "veth", "virtio_net"];

/// A device of this thread's network namespace takes redirected frames from this many CPUs, those with lower numbers;
/// `None` if from all. Other drivers than a few have a channel for each CPU, or lose the frames of those that have none.
#[cfg(feature = "bpf")]
pub(crate) fn transmitting_cpus(ifindex: u32) -> io::Result<Option<u16>> {
    let interface = rustix::net::netdevice::index_to_name(any_socket()?, ifindex)?;
    let optional = |result: io::Result<()>| match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    };
    // `struct ethtool_channels`: command, four numbers of channels that there may be, and four of those that are used.
    let mut channels = [0_u32; 9];
    channels[0] = ETHTOOL_GCHANNELS;
    if !optional(ethtool(&interface, &mut channels))? {
        return Ok(None);
    }
    // `struct ethtool_drvinfo`: command, name of the driver in 32 bytes, and more.
    let mut info = [0_u32; 49];
    info[0] = ETHTOOL_GDRVINFO;
    let is_known = optional(ethtool(&interface, &mut info))?;
    let driver: Vec<u8> =
        info[1..9].iter().flat_map(|word| word.to_ne_bytes()).take_while(|byte| *byte != 0).collect();
    let shares = is_known && SHARE_CHANNELS.iter().any(|name| name.as_bytes() == driver);
    Ok((!shares).then(|| that_transmit(&channels)))
}

/// How many of the channels in use transmit: those of transmission, and combined ones.
#[cfg(feature = "bpf")]
fn that_transmit(channels: &[u32; 9]) -> u16 {
    let [.., _, transmitting, _, combined] = *channels;
    u16::try_from(transmitting.saturating_add(combined)).unwrap_or(u16::MAX)
}

/// Passes a request to the driver of an interface. The request must have the size that its command and the lengths in it
/// ask for.
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
    let socket = any_socket()?;
    // SAFETY: `ifreq` is terminated by a zero, since the name is shorter than the field, and points to a
    // structure of the size that the kernel writes for its command; both live through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), ETHTOOL, &raw mut ifreq) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A number that no other network namespace has had since the kernel started: that of this thread's (Linux 5.14).
pub(crate) fn network_namespace() -> io::Result<u64> {
    let socket = any_socket()?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: the option is a number of 64 bits, which `cookie` has room for; both live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// `linux/icmp.h`, `linux/icmpv6.h`
const ICMP_FILTER: libc::c_int = 1;
const SOL_RAW: libc::c_int = 255;
const ICMPV6_FILTER: libc::c_int = 1;

/// A raw socket in this thread's network namespace that gets a copy of each ICMP or ICMPv6 message to the host of a type, which is
/// below 32. Does not block. Takes `CAP_NET_RAW`.
pub(crate) fn icmp_socket(v6: bool, kind: u8) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (family, protocol, level, option) = if v6 {
        (AddressFamily::INET6, ipproto::ICMPV6, libc::IPPROTO_ICMPV6, ICMPV6_FILTER)
    } else {
        (AddressFamily::INET, ipproto::ICMP, SOL_RAW, ICMP_FILTER)
    };
    let socket = socket_with(family, SocketType::RAW, flags, Some(protocol))?;
    // A bit for each type that is kept out: of IPv4 one word, of IPv6 eight.
    let mut filter = [u32::MAX; 8];
    filter[0] &= !(1 << (kind % 32));
    let length = if v6 { size_of_val(&filter) } else { size_of::<u32>() };
    // SAFETY: the kernel reads `length` bytes of the filter, which has at least as many and lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const filter).cast(),
            libc::socklen_t::try_from(length).map_err(io::Error::other)?,
        )
    };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// What waits in a socket, and what did not come so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unread {
    /// Bytes of memory that unread datagrams take, and that they may take.
    pub(crate) taken: u32,
    pub(crate) room: u32,
    /// Datagrams that were dropped, for whatever reason. It goes on after its highest number with 0.
    pub(crate) dropped: u32,
}

/// What waits in a socket (Linux 4.12).
pub(crate) fn unread(socket: impl AsFd) -> io::Result<Unread> {
    /// `linux/socket.h`, `linux/sock_diag.h`
    const SO_MEMINFO: libc::c_int = 55;
    const SK_MEMINFO_RMEM_ALLOC: usize = 0;
    const SK_MEMINFO_RCVBUF: usize = 1;
    const SK_MEMINFO_DROPS: usize = 8;
    let mut numbers = [0_u32; SK_MEMINFO_DROPS + 1];
    let mut length = libc::socklen_t::try_from(size_of_val(&numbers)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes up to `length` bytes, for which `numbers` has room; both live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            (&raw mut numbers).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Unread {
        taken: numbers[SK_MEMINFO_RMEM_ALLOC],
        room: numbers[SK_MEMINFO_RCVBUF],
        dropped: numbers[SK_MEMINFO_DROPS],
    })
}

/// What the kernel says about a legacy table of iptables (`linux/netfilter_ipv4/ip_tables.h`), the same for IPv6.
#[derive(Clone, Copy, Debug)]
pub(crate) enum XtablesOption {
    /// `IPT_SO_GET_INFO`: takes the table's name, and makes the table if there is none.
    Info = 64,
    /// `IPT_SO_GET_ENTRIES`: takes the table's name and size.
    Entries = 65,
}

impl XtablesOption {
    /// Asks about a table of this thread's network namespace. The buffer holds the question, and then the answer.
    pub(crate) fn get(self, v6: bool, buffer: &mut [u8]) -> io::Result<()> {
        let (family, level) = if v6 {
            (AddressFamily::INET6, libc::IPPROTO_IPV6)
        } else {
            (AddressFamily::INET, libc::IPPROTO_IP)
        };
        let socket = socket(family, SocketType::DGRAM, None)?;
        let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
        // SAFETY: the kernel reads and writes up to `length` bytes of the buffer, which has as many; both live through
        // the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                self as libc::c_int,
                buffer.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Commands of `bpf(2)` and their structures, as in `linux/bpf.h`.
pub(crate) mod bpf {
    use std::{
        ffi::CString,
        io,
        os::{
            fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
            unix::ffi::OsStrExt as _,
        },
        path::Path,
    };

    const BPF_OBJ_PIN: u32 = 6;
    const BPF_OBJ_GET: u32 = 7;
    const BPF_PROG_TEST_RUN: u32 = 10;
    const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
    const BPF_PROG_QUERY: u32 = 16;
    const BPF_LINK_CREATE: u32 = 28;
    const BPF_LINK_UPDATE: u32 = 29;
    const BPF_LINK_GET_FD_BY_ID: u32 = 30;
    const BPF_LINK_GET_NEXT_ID: u32 = 31;
    const BPF_LINK_DETACH: u32 = 34;
    const BPF_XDP: u32 = 37;
    const BPF_LINK_TYPE_XDP: u32 = 6;
    const BPF_LINK_TYPE_NETFILTER: u32 = 10;
    /// `linux/if_link.h`
    const XDP_FLAGS_SKB_MODE: u32 = 2;
    const XDP_FLAGS_DRV_MODE: u32 = 4;

    #[repr(C)]
    struct Pin {
        path: u64,
        object: u32,
        flags: u32,
    }

    /// The kernel writes the answer, the length of the output and the duration.
    #[repr(C)]
    #[derive(Default)]
    struct TestRun {
        program: u32,
        answer: u32,
        input_length: u32,
        output_length: u32,
        input: u64,
        output: u64,
        repeat: u32,
        duration: u32,
        context_input_length: u32,
        context_output_length: u32,
        context_input: u64,
        context_output: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        padding: u32,
    }

    // As in `union bpf_attr`.
    const _: () = assert!(size_of::<TestRun>() == 80 && std::mem::offset_of!(TestRun, duration) == 36);

    #[repr(C)]
    struct GetInfo {
        object: u32,
        length: u32,
        info: u64,
    }

    #[repr(C)]
    #[derive(Default)]
    struct LinkInfo {
        kind: u32,
        link: u32,
        program: u32,
        padding: u32,
        /// Of an XDP program; of one at a netfilter hook, the family.
        ifindex: u32,
        /// The number of a netfilter hook.
        hook: u32,
    }

    /// What the kernel says about a link.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct XdpLinkInfo {
        /// The number of its program.
        pub(crate) program: u32,
        /// The index of its interface in the interface's network namespace; 0 if the interface is gone.
        pub(crate) ifindex: u32,
    }

    /// Attaches an XDP program to an interface of this thread's network namespace (Linux 5.9).
    pub(crate) fn attach_xdp(program: BorrowedFd<'_>, ifindex: u32, generic: bool) -> io::Result<OwnedFd> {
        let mode = if generic { XDP_FLAGS_SKB_MODE } else { XDP_FLAGS_DRV_MODE };
        let mut create = [program.as_raw_fd().cast_unsigned(), ifindex, BPF_XDP, mode];
        descriptor(command(BPF_LINK_CREATE, &mut create)?)
    }

    /// Makes a link run another program, between two packets.
    pub(crate) fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut update = [link.as_raw_fd(), program.as_raw_fd(), 0, 0];
        command(BPF_LINK_UPDATE, &mut update).map(drop)
    }

    /// Takes a link's program off its interface, also if other processes hold the link.
    pub(crate) fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
        command(BPF_LINK_DETACH, &mut [link.as_raw_fd()]).map(drop)
    }

    /// About a link of an XDP program.
    pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<XdpLinkInfo> {
        let info = read_link_info(link)?;
        if info.kind != BPF_LINK_TYPE_XDP {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        Ok(XdpLinkInfo { program: info.program, ifindex: info.ifindex })
    }

    fn read_link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
        let mut info = LinkInfo::default();
        let mut get = GetInfo {
            object: link.as_raw_fd().cast_unsigned(),
            length: u32::try_from(size_of_val(&info)).map_err(io::Error::other)?,
            info: (&raw mut info).expose_provenance() as u64,
        };
        command(BPF_OBJ_GET_INFO_BY_FD, &mut get)?;
        Ok(info)
    }

    /// A BPF program at a hook of netfilter, of a network namespace that is not told.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct NetfilterLink {
        /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
        pub(crate) family: u32,
        /// `enum nf_inet_hooks`
        pub(crate) hook: u32,
    }

    /// The lowest number of a link that is higher than this one. Needs `CAP_SYS_ADMIN`.
    pub(crate) fn first_link(after: u32) -> io::Result<Option<u32>> {
        let mut get = [after, 0, 0];
        match command(BPF_LINK_GET_NEXT_ID, &mut get) {
            Ok(_) => Ok(Some(get[1])),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What a link with this number is, if it is there and of a program at a hook of netfilter (Linux 6.4); `EAGAIN` if it is
    /// being made. Needs `CAP_SYS_ADMIN`.
    pub(crate) fn netfilter_link(number: u32) -> io::Result<Option<NetfilterLink>> {
        let link = match command(BPF_LINK_GET_FD_BY_ID, &mut [number, 0, 0]) {
            Ok(link) => descriptor(link)?,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let info = read_link_info(link.as_fd())?;
        let is_at_hook = info.kind == BPF_LINK_TYPE_NETFILTER;
        Ok(is_at_hook.then_some(NetfilterLink { family: info.ifindex, hook: info.hook }))
    }

    /// Where tcx programs are attached.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Tcx {
        /// `BPF_TCX_INGRESS`
        Ingress = 46,
        /// `BPF_TCX_EGRESS`
        Egress = 47,
    }

    #[repr(C)]
    #[derive(Default)]
    struct Query {
        ifindex: u32,
        kind: u32,
        flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }

    /// The number of one of the tcx programs on a device of this thread's network namespace, if there is any. There is none
    /// before Linux 6.6, nor on a device that has gone.
    pub(crate) fn tcx_programs(ifindex: u32, side: Tcx) -> io::Result<Option<u32>> {
        let mut programs = [0_u32; 16];
        let mut query = Query {
            ifindex,
            kind: side as u32,
            programs: (&raw mut programs).expose_provenance() as u64,
            count: u32::try_from(programs.len()).map_err(io::Error::other)?,
            ..Query::default()
        };
        match command(BPF_PROG_QUERY, &mut query) {
            Ok(_) => Ok((query.count > 0).then_some(programs[0])),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL | libc::ENODEV | libc::ENOENT) => Ok(None),
                // There are more than fit.
                Some(libc::ENOSPC) => Ok(Some(programs[0])),
                _ => Err(error),
            },
        }
    }

    /// Makes a link, program or map stay at a path of a BPF file system.
    pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let object = object.as_raw_fd().cast_unsigned();
        let mut pin = Pin { path: path.as_ptr().expose_provenance() as u64, object, flags: 0 };
        command(BPF_OBJ_PIN, &mut pin).map(drop)
    }

    /// The link, program or map at a path of a BPF file system.
    pub(crate) fn from_pin(path: &Path) -> io::Result<OwnedFd> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut get = Pin { path: path.as_ptr().expose_provenance() as u64, object: 0, flags: 0 };
        descriptor(command(BPF_OBJ_GET, &mut get)?)
    }

    /// Runs a program once, on a packet that goes nowhere.
    pub(crate) fn run(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<()> {
        let mut run = TestRun {
            program: program.as_raw_fd().cast_unsigned(),
            input_length: u32::try_from(packet.len()).map_err(io::Error::other)?,
            input: packet.as_ptr().expose_provenance() as u64,
            ..TestRun::default()
        };
        command(BPF_PROG_TEST_RUN, &mut run).map(drop)
    }

    fn descriptor(number: i32) -> io::Result<OwnedFd> {
        if number < 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        // SAFETY: the kernel has just made this descriptor for the caller, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// `T` must be how the structure of the command begins, with all fields that the kernel writes: it does so whether they
    /// are within the length that it is told or not. What it points to must live through the call.
    fn command<T: ?Sized>(command: u32, attributes: &mut T) -> io::Result<i32> {
        // SAFETY: the kernel reads as many bytes as the structure has and takes the rest for zero. It writes only into
        // fields that `T` has, and where the structure points to, which its maker keeps alive and large enough.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                std::ptr::from_mut(attributes).cast::<u8>(),
                size_of_val(attributes),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(-1)) }
    }
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

/// Makes a descriptor known to the tokio runtime that the caller runs in.
pub(crate) fn watch_descriptor(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(io::Error::other("there is no tokio runtime: call this inside one"));
    }
    // SAFETY: the descriptor is owned and always the same, and is closed when it is dropped, which `AsyncFd` sees to.
    let watched = unsafe { AsyncFd::register(descriptor) };
    watched.map_err(io::Error::from)
}

#[cfg(all(test, feature = "bpf"))]
mod tests {
    use super::*;

    #[test]
    fn channels_that_transmit_are_those_of_transmission_and_combined_ones() {
        let used = |rx, tx, other, combined| [ETHTOOL_GCHANNELS, 0, 64, 0, 64, rx, tx, other, combined];
        assert_eq!(that_transmit(&used(0, 0, 1, 8)), 8);
        assert_eq!(that_transmit(&used(8, 4, 1, 0)), 4);
        assert_eq!(that_transmit(&used(0, 0, 0, 1 << 20)), u16::MAX);
    }

    #[test]
    fn a_device_without_channels_has_no_limit() {
        // The loopback device, which every namespace has.
        assert_eq!(transmitting_cpus(1).unwrap(), None);
        transmitting_cpus(999_999).unwrap_err();
    }
}
