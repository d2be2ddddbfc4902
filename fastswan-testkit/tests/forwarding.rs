//! Real packets from end to end: what a client sends arrives at the peer although the gateway's kernel does
//! not forward, in both modes.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use fastswan::{
    BpfTable, OffloadTable as _, PassReason, XdpForwarder,
    forwarder::{AttachConfig, AttachMode},
    policy::PortMatch,
    table::{
        Cell, Change, Devices as _, Exception, Forwarding, Forwards, Port, Ports as _, Probes, ReversePath,
        Slot, TableConfig, TableCounters as _, TableUpdate, Verdict,
    },
};
use fastswan_testkit::{
    frames::{Frame, Tag},
    lab::{self, Namespace, wire},
    site::{CLIENT, LAN, OUT, PEER, Site},
};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, recvmsg, setsockopt,
    sockopt::{Ipv4RecvTtl, Ipv6RecvHopLimit},
};

const MODES: [AttachMode; 2] = [AttachMode::Native, AttachMode::Generic];
const TO_PEER: Slot = Slot(0);
const TO_CLIENT: Slot = Slot(1);
const HAIRPIN: Slot = Slot(2);
const VLAN: u16 = 5;
/// Nothing that is sent here takes longer, unless it is lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// The fast path of a site's gateway.
struct FastPath {
    _forwarder: XdpForwarder,
    table: BpfTable,
}

/// Attaches the program to both ports of the gateway and forwards what belongs to the two sites.
fn fast_path(site: &Site, mode: AttachMode) -> FastPath {
    let (lan, out) = (site.gateway.ifindex("lan0").unwrap(), site.gateway.ifindex("out0").unwrap());
    // Devices are looked for in the thread's namespace.
    site.gateway.enter(|| fast_path_between(lan, out, mode))
}

fn fast_path_between(lan: u32, out: u32, mode: AttachMode) -> FastPath {
    let (mut forwarder, mut table) =
        XdpForwarder::load(&TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 64, slots: 4 }).unwrap();
    let port = |ifindex, address| Port {
        ifindex,
        vlan: 0,
        receiver: ifindex,
        address,
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    };
    for port in [port(lan, LAN), port(out, OUT), Port { vlan: VLAN, ..port(lan, LAN) }] {
        table.set_port(&port).unwrap();
    }
    let fast = |source: &str, destination: &str, slot| {
        let cell = Cell { source: source.parse().unwrap(), destination: destination.parse().unwrap() };
        Change::Cell(cell, Some(Verdict::Fast { slot, probes: Probes::default() }))
    };
    let leave = |slot, ifindex, source, destination| {
        Change::Slot(
            slot,
            Some(Ok(Forwarding { ifindex, max_length: 1500, rewrite: Some((source, destination)) })),
        )
    };
    table
        .apply(&TableUpdate::from_iter([
            fast("10.1.0.0/16", "10.2.0.0/16", TO_PEER),
            fast("2001:db8:1::/48", "2001:db8:2::/48", TO_PEER),
            fast("10.2.0.0/16", "10.1.0.0/16", TO_CLIENT),
            fast("2001:db8:2::/48", "2001:db8:1::/48", TO_CLIENT),
            fast("10.1.0.0/16", "10.3.0.0/16", HAIRPIN),
            leave(TO_PEER, out, OUT, PEER),
            leave(TO_CLIENT, lan, LAN, CLIENT),
            leave(HAIRPIN, lan, LAN, CLIENT),
        ]))
        .unwrap();
    table.set_enabled(true);
    table.renew_lease(Instant::now() + Duration::from_secs(3600));
    for interface in ["lan0", "out0"] {
        let config = AttachConfig::new(interface).mode(mode).complete_frames(true);
        forwarder.attach(&config).unwrap();
    }
    FastPath { _forwarder: forwarder, table }
}

/// A socket of a host, which tells the TTL or hop limit of what it receives.
fn socket(host: &Namespace, address: &str) -> UdpSocket {
    let socket = host.enter(|| UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    if address.starts_with('[') {
        setsockopt(&socket, Ipv6RecvHopLimit, &true).unwrap();
    } else {
        setsockopt(&socket, Ipv4RecvTtl, &true).unwrap();
    }
    socket
}

/// Waits, and tells of the packets that passed if it was in vain.
fn wait_until(condition: impl Fn() -> bool, passes: impl Fn() -> Vec<(PassReason, u64)>) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{:?}", passes());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The next datagram and its TTL or hop limit.
fn receive(socket: &UdpSocket) -> (Vec<u8>, i32) {
    let mut payload = [0; 2048];
    let mut room = nix::cmsg_space!(i32);
    let mut buffers = [std::io::IoSliceMut::new(&mut payload)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut room), MsgFlags::empty())
        .expect("a datagram");
    let ttl = message.cmsgs().unwrap().find_map(|told| match told {
        ControlMessageOwned::Ipv4Ttl(ttl) | ControlMessageOwned::Ipv6HopLimit(ttl) => Some(ttl),
        _ => None,
    });
    let length = message.bytes;
    (payload[..length].to_vec(), ttl.unwrap())
}

/// Runs a story for each mode, on a site whose kernel does not forward.
fn in_both_modes(what: &str, story: impl Fn(&Site, &mut FastPath)) {
    if !lab::require_root(what) {
        return;
    }
    for mode in MODES {
        let site = Site::new().unwrap();
        story(&site, &mut fast_path(&site, mode));
    }
}

/// Sends datagrams of both families from the client to the peer, which must get them as they should be.
fn converse(site: &Site, fast_path: &FastPath) {
    for (from, to) in [("10.1.0.5:1000", "10.2.0.9:2000"), ("[2001:db8:1::5]:1000", "[2001:db8:2::9]:2000")] {
        let (client, peer) = (socket(&site.client, from), socket(&site.peer, to));
        let before = fast_path.table.traffic(TO_PEER).packets;
        for length in [0, 1, 100, 1400] {
            let sent: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
            client.send_to(&sent, to).unwrap();
            assert_eq!(receive(&peer), (sent, 63), "{length} bytes from {from}");
        }
        assert_eq!(fast_path.table.traffic(TO_PEER).packets - before, 4);
    }
}

#[test]
fn datagrams_of_both_families_arrive_with_their_ttl_down_by_one() {
    in_both_modes("forwarding datagrams", |site, fast_path| converse(site, fast_path));
}

#[test]
fn interfaces_may_have_any_index() {
    if !lab::require_root("forwarding between interfaces with high indices") {
        return;
    }
    for mode in MODES {
        let site = Site::with_indices(Some(5000), Some(1_000_000)).unwrap();
        assert_eq!(site.gateway.ifindex("lan0").unwrap(), 5000);
        converse(&site, &fast_path(&site, mode));
    }
}

#[test]
fn a_connection_carries_a_megabyte_each_way() {
    in_both_modes("forwarding a connection", |site, fast_path| {
        for address in ["10.2.0.9:2000", "[2001:db8:2::9]:2000"] {
            let address: SocketAddr = address.parse().unwrap();
            let listener = site.peer.enter(|| TcpListener::bind(address).unwrap());
            let sent: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[n as usize % 4]).collect();
            let connect = || TcpStream::connect_timeout(&address, PATIENCE).unwrap();
            let mut client = site.client.enter(connect);
            let (mut peer, _) = listener.accept().unwrap();
            for stream in [&client, &peer] {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.set_write_timeout(Some(PATIENCE)).unwrap();
            }
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut received = vec![0; sent.len()];
                    peer.read_exact(&mut received).unwrap();
                    peer.write_all(&received).unwrap();
                });
                client.write_all(&sent).unwrap();
                let mut returned = vec![0; sent.len()];
                client.read_exact(&mut returned).unwrap();
                assert!(returned == sent, "what came back is not what was sent");
            });
        }
        for slot in [TO_PEER, TO_CLIENT] {
            assert!(fast_path.table.traffic(slot).bytes > 2 << 20);
        }
    });
}

#[test]
fn tagged_frames_leave_without_their_tag() {
    in_both_modes("forwarding tagged frames", |site, fast_path| {
        // The peer has no VLAN device: it would drop a frame that is still tagged.
        let peers = [socket(&site.peer, "10.2.0.9:2000"), socket(&site.peer, "[2001:db8:2::9]:2000")];
        let frames =
            [Frame::v4("10.1.0.5", "10.2.0.9"), Frame::v6("2001:db8:1::5", "2001:db8:2::9")].map(|frame| {
                frame.macs(CLIENT, LAN).tags(&[Tag::vlan(VLAN)]).udp(1000, 2000).payload(100).ttl(9).build()
            });
        let mut wire = site.client.enter(|| wire("eth0").unwrap());
        for (peer, frame) in peers.iter().zip(frames) {
            wire.write_all(&frame).unwrap();
            let (payload, ttl) = receive(peer);
            assert_eq!((payload.len(), ttl), (100, 8));
        }
        assert_eq!(fast_path.table.traffic(TO_PEER).packets, 2);
    });
}

#[test]
fn a_packet_may_leave_where_it_came_in() {
    in_both_modes("forwarding back", |site, fast_path| {
        site.client.ip("address add 10.3.0.9/16 dev eth0").unwrap();
        let neighbour = socket(&site.client, "10.3.0.9:2000");
        let frame = Frame::v4("10.1.0.77", "10.3.0.9").macs(CLIENT, LAN).udp(1000, 2000).payload(100).ttl(9);
        let mut wire = site.client.enter(|| wire("eth0").unwrap());
        wire.write_all(&frame.build()).unwrap();
        wait_until(|| fast_path.table.traffic(HAIRPIN).packets == 1, || fast_path.table.passes());
        // The far end of a veth that has no XDP program of its own is not told of what XDP_TX gives it, but finds it with
        // the next packet.
        let anything = site.gateway.enter(|| UdpSocket::bind("10.1.0.1:0").unwrap());
        anything.send_to(b"", "10.1.0.5:9").unwrap();
        let (payload, ttl) = receive(&neighbour);
        assert_eq!((payload.len(), ttl), (100, 8));
        assert_eq!(fast_path.table.traffic(HAIRPIN).packets, 1);
    });
}

/// The peer's driver stops polling while packets are forwarded to it; the kernel then drops what is redirected.
#[test]
fn what_is_lost_on_its_way_to_a_device_is_counted_until_the_table_asks_again() {
    if !lab::require_root("counting losses") {
        return;
    }
    let site = Site::new().unwrap();
    // In generic mode the kernel sends a packet as it sends any.
    let mut fast_path = fast_path(&site, AttachMode::Native);
    let client = socket(&site.client, "10.1.0.5:1000");
    let send = |fast_path: &FastPath, packets: u64| {
        let counted = || fast_path.table.traffic(TO_PEER).packets + passed(&fast_path.table);
        let before = counted();
        for _ in 0..packets {
            client.send_to(b"lost", "10.2.0.9:2000").unwrap();
        }
        wait_until(|| counted() >= before + packets, || fast_path.table.passes());
    };
    let Some(before) = fast_path.table.lost() else {
        assert!(!std::path::Path::new("/sys/kernel/btf/vmlinux").exists(), "with BTF, losses are counted");
        return;
    };
    send(&fast_path, 10);
    assert_eq!(fast_path.table.lost(), Some(before));
    site.peer.enter(|| lab::set_gro("eth0", false)).unwrap();
    send(&fast_path, 1000);
    assert_eq!((fast_path.table.lost(), passed(&fast_path.table)), (Some(before + 1000), 0));
    site.gateway.enter(|| fast_path.table.refresh_devices());
    send(&fast_path, 10);
    assert_eq!((fast_path.table.lost(), passed(&fast_path.table)), (Some(before + 1000), 10));
}

fn passed(table: &BpfTable) -> u64 {
    let passes = table.passes().into_iter();
    passes.filter(|(reason, _)| *reason == PassReason::EgressUnavailable).map(|(_, packets)| packets).sum()
}

#[test]
fn what_is_not_fast_is_the_kernels_to_forward() {
    in_both_modes("forwarding by the kernel", |site, fast_path| {
        site.route().unwrap();
        let exception = Exception {
            cell: Cell {
                source: "10.1.0.0/16".parse().unwrap(),
                destination: "10.2.0.0/16".parse().unwrap(),
            },
            protocol: 17,
            source_port: PortMatch::default(),
            destination_port: PortMatch::exactly(2001),
        };
        let update = Change::Exception(exception, true).into();
        fast_path.table.apply(&update).unwrap();
        let client = socket(&site.client, "10.1.0.5:1000");
        for (to, by_kernel) in [("10.2.0.9:2000", 0), ("10.2.0.9:2001", 1)] {
            let peer = socket(&site.peer, to);
            client.send_to(b"either way", to).unwrap();
            assert_eq!(receive(&peer), (b"either way".to_vec(), 63));
            assert_eq!(forwarded_by_kernel(&site.gateway), by_kernel);
        }
        let passes = fast_path.table.passes();
        assert!(passes.contains(&(PassReason::Exception, 1)), "{passes:?}");
    });
}

/// IPv4 packets that the kernel of a host has forwarded.
fn forwarded_by_kernel(host: &Namespace) -> u64 {
    let snmp = host.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = snmp.lines().filter(|line| line.starts_with("Ip:")).map(str::split_whitespace);
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let value = names.zip(values).find(|(name, _)| *name == "ForwDatagrams").unwrap().1;
    value.parse().unwrap()
}
