//! Addresses, neighbours, links and sysctls.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;

use super::super::{
    command::{self, Command, FAR, ip, ip_of, sysctl},
    draw::{Change, Draw},
    icmp,
    world::Device,
};

/// One more address of the host.
pub(super) fn address_own(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = if draw.below(4) == 0 { draw.source(v6) } else { draw.destination(v6) };
    let own = draw.address(to);
    let (device, length) = (draw.one(&["lo", "lan0", "out0"]), if v6 { "128 nodad" } else { "32" });
    Change::once([ip(format!("address add {own}/{length} dev {device}"))])
        .then([ip(format!("address del {own}/{} dev {device}", if v6 { 128 } else { 32 }))])
        .undone_by([ip(format!("address del {own}/{} dev {device}", if v6 { 128 } else { 32 }))])
        .to([own.into()])
        .from([own.into()])
}

/// One more address of the host, with no route that says so. The kernel takes no packets from it all the same, until the
/// device has lost it as often as it has it.
pub(super) fn address_without_route(draw: &mut Draw<'_>) -> Change {
    let from = draw.source(false);
    let own = draw.address(from);
    let device = draw.one(&["lo", "lan0", "out0"]);
    let lengths: &[u8] = if draw.flip() { &[32, 31] } else { &[32] };
    let each = |how: &str| {
        let how = how.to_owned();
        lengths.iter().map(move |length| ip(format!("address {how} {own}/{length} dev {device}")))
    };
    let mut change = Change::once(each("add"))
        .then([ip(format!("route del local {own} dev {device} table local"))])
        .undone_by(each("del"))
        .from([own.into()]);
    for deletion in each("del") {
        change = change.then([deletion]);
    }
    change
}

/// The address of a device that goes down stays the host's.
pub(super) fn address_down(draw: &mut Draw<'_>) -> Change {
    let from = draw.source(false);
    let own = draw.address(from);
    Change::once([ip("link add dn0 type veth peer name dn1"), ip(format!("address add {own}/32 dev dn0"))])
        .then([ip("link set dn0 up")])
        .then([ip("link set dn0 down")])
        .then([ip(format!("address del {own}/32 dev dn0"))])
        .undone_by([ip("link del dn0")])
        .from([own.into()])
}

/// One more network, with its broadcast addresses.
pub(super) fn address_subnet(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let own = draw.address(to);
    let (length, nodad) =
        if v6 { (draw.one(&[64_u8, 112]), "nodad") } else { (draw.one(&[24_u8, 28, 31]), "") };
    let device = draw.one(&["lan0", "lan1", "out0"]);
    let network = IpNet::new(own, length).expect("a length of the family").trunc();
    Change::once([ip(format!("address add {own}/{length} dev {device} {nodad}"))])
        .then([ip(format!("address del {own}/{length} dev {device}"))])
        .undone_by([ip(format!("address del {own}/{length} dev {device}"))])
        .to([network, own.into()])
}

/// The template's source goes. IPv4 asks for it, IPv6 does not.
pub(super) fn address_outer_lost(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let tunnel = draw.tunnel(v6);
    let own = own_address(tunnel.device, v6);
    let device = tunnel.device.name();
    Change::once([ip(format!("address del {own} dev {device}"))])
        .then([ip(format!("address add {own} dev {device} {}", if v6 { "nodad" } else { "" }))])
        .to([tunnel.destination])
}

/// The same, with another one that takes its place, so that the routes stay.
pub(super) fn address_promoted(draw: &mut Draw<'_>) -> Change {
    let tunnel = draw.tunnel(false);
    let own = own_address(tunnel.device, false);
    let (prefix, device) = (own.rsplit_once('.').map_or("", |(prefix, _)| prefix), tunnel.device.name());
    Change::once([
        sysctl("ipv4/conf/all/promote_secondaries", "1"),
        ip(format!("address add {prefix}.9/24 dev {device}")),
    ])
    .then([ip(format!("address del {own} dev {device}"))])
    .to([tunnel.destination])
}

fn own_address(device: Device, v6: bool) -> &'static str {
    let own = device.addresses().iter().find(|address| address.contains(':') == v6);
    own.copied().unwrap_or_default()
}

/// Anycast addresses, those that come with forwarding among them.
pub(super) fn anycast(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let own = draw.address(to);
    let network = IpNet::new(own, 64).expect("a length of the family").trunc();
    Change::once([ip(format!("address add {own}/64 dev lan0 nodad"))])
        .then([sysctl("ipv6/conf/lan0/forwarding", "0")])
        .then([sysctl("ipv6/conf/lan0/forwarding", "1")])
        .undone_by([ip(format!("address del {own}/64 dev lan0")), sysctl("ipv6/conf/all/forwarding", "1")])
        .to([network, network.network().into()])
}

/// The next hop of a tunnel that asks for it moves, or is lost. For the others the kernel of the judge, which
/// encrypts nothing, needs one where IPsec does not.
pub(super) fn neighbour(draw: &mut Draw<'_>) -> Change {
    let asking: Vec<_> =
        draw.tunnels.iter().filter(|tunnel| tunnel.by_neighbour).map(|tunnel| tunnel.peer).collect();
    let next_hop = draw.one(&asking);
    let replace = |how: &str| ip(format!("neighbour replace {next_hop} dev out0 {how}"));
    let second = match draw.below(3) {
        0 => replace("nud failed"),
        1 => ip(format!("neighbour del {next_hop} dev out0")),
        _ => replace("lladdr 02:00:00:00:00:c3 nud stale"),
    };
    Change::once([replace("lladdr 02:00:00:00:00:c2")])
        .then([second])
        .then([replace("lladdr 02:00:00:00:00:c4")])
}

/// Neighbours that are of no concern.
pub(super) fn neighbours_elsewhere(draw: &mut Draw<'_>) -> Change {
    let first = draw.below(200);
    let each = |how: &str| {
        let how = how.to_owned();
        (first..first + 30).map(move |at| ip(format!("neighbour {how} 10.1.77.{at} dev lan0")))
    };
    let add = each("replace").map(|command| match command {
        Command::Ip(text) => ip(format!("{text} lladdr 02:00:00:00:01:01 nud stale")),
        other => other,
    });
    Change::once(add).undone_by(each("del"))
}

/// A device goes down and comes back. IPv4 routes that go with it are not told of.
pub(super) fn flap(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["lan0", "out0", "out1", "lan1"]);
    let change =
        Change::once([ip(format!("link set {device} down"))]).then([ip(format!("link set {device} up"))]);
    let routes: &[&str] = match device {
        "out0" => &[
            "0.0.0.0/0 via 192.0.2.2",
            "10.2.0.0/16 via 192.0.2.2",
            "10.3.0.0/16 via 192.0.2.3",
            "::/0 via 2001:db8:f::2",
            "2001:db8:2::/48 via 2001:db8:f::2",
        ],
        "out1" => &["10.4.0.0/16 via 198.51.100.2"],
        _ => &[],
    };
    // Devices without an own IPv6 address have lost it.
    let addresses =
        ["lan0", "out0", "out1", "lan1"].iter().zip([Device::Lan0, Device::Out0, Device::Out1, Device::Lan1]);
    let address = addresses
        .filter(|(name, _)| **name == device)
        .map(|(name, of)| ip(format!("address replace {} dev {name} nodad", own_address(of, true))));
    let address: Vec<Command> = address.collect();
    change.then(address).then(routes.iter().map(|route| ip(format!("route replace {route}"))))
}

/// The other end of a wire goes, and comes back.
pub(super) fn carrier(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&Device::ALL);
    Change::once(command::carrier(device, false)).then(command::carrier(device, true))
}

pub(super) fn mtu(draw: &mut Draw<'_>) -> Change {
    let (device, mtu) = (draw.one(&["out0", "out0", "out1"]), draw.one(&[1280, 1300, 1400, 1499]));
    Change::once([ip(format!("link set {device} mtu {mtu}"))])
        .undone_by([ip(format!("link set {device} mtu 1500"))])
        .lengths(mtu)
        .lengths(mtu - 54)
}

/// Links that are of no concern.
pub(super) fn links_elsewhere(draw: &mut Draw<'_>) -> Change {
    let number = draw.below(100);
    Change::once([ip(format!("link add other{number} type veth peer name rehto{number}"))])
        .then([
            ip(format!("link set other{number} up")),
            ip(format!("address add 198.18.{number}.1/24 dev other{number}")),
        ])
        .then([ip(format!("link del other{number}"))])
        .undone_by([ip(format!("link del other{number}"))])
}

/// The port's Ethernet address changes.
pub(super) fn link_address(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["lan0", "lan1"]);
    Change::once([ip(format!("link set {device} address 02:00:00:00:00:4{}", draw.below(8)))])
}

pub(super) fn forwarding_v4(draw: &mut Draw<'_>) -> Change {
    let key = draw.one(&[
        "ipv4/ip_forward",
        "ipv4/conf/lan0/forwarding",
        "ipv4/conf/out0/forwarding",
        "ipv4/conf/all/forwarding",
    ]);
    Change::once([sysctl(key, "0")])
        .then([sysctl(key, "1")])
        .undone_by([sysctl("ipv4/ip_forward", "0"), sysctl("ipv4/ip_forward", "1")])
}

pub(super) fn forwarding_v6(draw: &mut Draw<'_>) -> Change {
    let key =
        draw.one(&["ipv6/conf/all/forwarding", "ipv6/conf/lan0/forwarding", "ipv6/conf/out0/forwarding"]);
    Change::once([sysctl(key, "0")])
        .then([sysctl(key, "1")])
        .undone_by([sysctl("ipv6/conf/all/forwarding", "0"), sysctl("ipv6/conf/all/forwarding", "1")])
}

/// IPv6 from one port although forwarding is off (Linux 6.17).
pub(super) fn force_forwarding(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["lan0", "lan1", "all"]);
    Change::once([
        sysctl("ipv6/conf/all/forwarding", "0"),
        sysctl(format!("ipv6/conf/{device}/force_forwarding"), "1"),
    ])
    .undone_by([
        sysctl(format!("ipv6/conf/{device}/force_forwarding"), "0"),
        sysctl("ipv6/conf/all/forwarding", "1"),
    ])
}

/// Reverse path filters, with sources that are routed elsewhere.
pub(super) fn rp_filter(draw: &mut Draw<'_>) -> Change {
    let (device, filter) = (draw.one(&["lan0", "lan1", "all"]), draw.one(&["1", "2"]));
    let from = draw.source(false);
    let route = match draw.below(4) {
        0 => format!("{} {from} metric 1", draw.denial()),
        1 => format!("{from} {} tos 0x10 metric 1", draw.via(false)),
        _ => format!("{from} {} metric 1", draw.via(false)),
    };
    let key = format!("ipv4/conf/{device}/rp_filter");
    Change::once([sysctl(key.clone(), filter)])
        .then([ip(format!("route add {route}"))])
        .undone_by([ip(format!("route del {route}")), sysctl(key, "0")])
        .from([from])
        .tos(0x10)
}

/// A loose filter at a port without an IPv4 address is a strict one.
pub(super) fn rp_filter_bare(draw: &mut Draw<'_>) -> Change {
    let from = draw.source(false);
    let via = draw.via(false);
    Change::once([sysctl("ipv4/conf/lan0/rp_filter", "2"), ip(format!("route add {from} {via} metric 1"))])
        .then([ip("address del 10.1.0.1/16 dev lan0")])
        .then([ip("route add 10.1.0.0/16 dev lan0")])
        .from([from])
}

pub(super) fn disable_xfrm(draw: &mut Draw<'_>) -> Change {
    let key = format!("ipv4/conf/{}/disable_xfrm", draw.one(&["out0", "all", "out1", "lan0"]));
    Change::once([sysctl(key.clone(), "1")]).undone_by([sysctl(key, "0")])
}

pub(super) fn disable_policy(draw: &mut Draw<'_>) -> Change {
    let (family, device) = (draw.one(&["ipv4", "ipv6"]), draw.one(&["lan0", "out0", "all"]));
    let key = format!("{family}/conf/{device}/disable_policy");
    Change::once([sysctl(key.clone(), "1")]).undone_by([sysctl(key, "0")])
}

pub(super) fn mtu_v6(draw: &mut Draw<'_>) -> Change {
    let (device, mtu) = (draw.one(&["out0", "out0", "out1"]), draw.one(&[1280_usize, 1350, 1400]));
    let key = format!("ipv6/conf/{device}/mtu");
    Change::once([sysctl(key.clone(), mtu.to_string())])
        .undone_by([sysctl(key, "1500")])
        .lengths(mtu)
        .lengths(mtu - 74)
}

pub(super) fn disable_ipv6(draw: &mut Draw<'_>) -> Change {
    let key = format!("ipv6/conf/{}/disable_ipv6", draw.one(&["lan0", "out0", "all", "lan1"]));
    Change::once([sysctl(key.clone(), "1")]).then([sysctl(key, "0")])
}

/// Another device takes some of the port's frames.
pub(super) fn macvlan(draw: &mut Draw<'_>) -> Change {
    let (device, mode) =
        (draw.one(&["lan0", "lan1"]), draw.one(&["bridge", "private", "vepa", "passthru", "source"]));
    Change::once([ip(format!("link add mac0 link {device} type macvlan mode {mode}"))])
        .then([ip("link set mac0 up")])
        .undone_by([ip("link del mac0"), ip("link set lan0 promisc off")])
}

/// A device that takes the port's frames goes on doing so from another namespace. It cannot be seen to stop.
pub(super) fn macvlan_moved(draw: &mut Draw<'_>) -> Change {
    let (device, mode) = (draw.one(&["lan0", "lan1"]), draw.one(&["passthru", "passthru", "source"]));
    Change::once([ip(format!("link add mac0 link {device} type macvlan mode {mode}"))])
        .then([ip(format!("link set mac0 netns {FAR}"))])
        .then([Command::Far("link set mac0 up".to_owned())])
        .then([Command::Far("link set mac0 down".to_owned())])
}

/// The same of one that was never here.
pub(super) fn macvlan_elsewhere(draw: &mut Draw<'_>) -> Change {
    let (device, mode) = (draw.one(&["lan0", "lan1"]), draw.one(&["passthru", "passthru", "source"]));
    Change::once([ip(format!("link add mac0 link {device} netns {FAR} type macvlan mode {mode}"))])
        .then([Command::Far("link set mac0 up".to_owned())])
}

/// Another device takes frames with a tag, or all that are handed to the device for them.
pub(super) fn macvlan_tagged(draw: &mut Draw<'_>) -> Change {
    let (device, mode) = (draw.one(&["lan0", "lan1"]), draw.one(&["passthru", "bridge", "source"]));
    Change::once([
        ip(format!("link add vlan9 link {device} type vlan id 10")),
        ip("link set vlan9 up"),
        ip("address add 198.18.9.1/24 dev vlan9"),
    ])
    .then([ip(format!("link add mac0 link vlan9 type macvlan mode {mode}")), ip("link set mac0 up")])
    .then([ip("link del mac0")])
    .undone_by([ip("link del vlan9"), ip(format!("link set {device} promisc off"))])
}

/// The port becomes a bridge's, and is free again.
pub(super) fn bridge(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["lan0", "lan1", "out1"]);
    Change::once([ip("link add br0 type bridge"), ip("link set br0 up")])
        .then([ip(format!("link set {device} master br0"))])
        .then([ip(format!("link set {device} nomaster"))])
}

/// The host answers solicitations for somebody else.
pub(super) fn proxy_ndp(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let proxied = draw.address(to);
    let device = draw.one(&["lan0", "out0"]);
    Change::once([
        sysctl("ipv6/conf/all/proxy_ndp", "1"),
        sysctl("ipv6/conf/lan0/proxy_ndp", "1"),
        ip(format!("neighbour add proxy {proxied} dev {device}")),
    ])
    .undone_by([
        ip(format!("neighbour del proxy {proxied} dev {device}")),
        sysctl("ipv6/conf/all/proxy_ndp", "0"),
        sysctl("ipv6/conf/lan0/proxy_ndp", "0"),
    ])
    .to([proxied.into()])
    .solicitations()
}

pub(super) fn proxy_arp(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let proxied = draw.address(to);
    let pvlan = draw.one(&["proxy_arp", "proxy_arp_pvlan"]);
    Change::once([
        sysctl(format!("ipv4/conf/lan0/{pvlan}"), "1"),
        ip(format!("neighbour add proxy {proxied} dev lan0")),
    ])
    .undone_by([
        ip(format!("neighbour del proxy {proxied} dev lan0")),
        sysctl(format!("ipv4/conf/lan0/{pvlan}"), "0"),
    ])
    .to([proxied.into()])
}

/// A router tells an MTU, a prefix and a default route of short lifetimes.
pub(super) fn advertisement(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let network =
        IpNet::new(to.network(), to.prefix_len().clamp(48, 64)).expect("a length of the family").trunc();
    let router: Ipv6Addr = "fe80::b5".parse().expect("an address");
    let mtu = draw.one(&[None, Some(1300_u32), Some(1400)]);
    let prefix = draw.flip().then_some(network);
    let lifetime = draw.one(&[0_u16, 1]);
    let frame = icmp::advertisement(router, Device::Out0.mac(), mtu, prefix, lifetime);
    let told = format!("a router advertisement, MTU {mtu:?}, prefix {prefix:?}, lifetime {lifetime} s");
    Change::once([
        ip("address add fe80::2/64 dev out0 nodad"),
        sysctl("ipv6/conf/out0/accept_ra", "2"),
        sysctl("ipv6/conf/out0/autoconf", "0"),
    ])
    .then([Command::Frame(Device::Out0, frame, told)])
    .then([Command::Wait(Duration::from_millis(1200))])
    .to([network])
    .lengths(1300)
    .lengths(1226)
}

/// The host learns that packets to an address must be shorter.
pub(super) fn path_mtu(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let tunnel = draw.tunnel(v6);
    let to = if draw.below(3) == 0 { tunnel.peer } else { draw.destination(v6).network() };
    let own = own_address(Device::Out0, v6).split('/').next().unwrap_or_default();
    let own: IpAddr = own.parse().expect("an address");
    let mtu = 1300;
    let frame = icmp::too_big(to, own, Device::Out0.mac(), mtu);
    let uses = draw.one(&["0", "1"]);
    Change::once([sysctl("ipv4/ip_forward_use_pmtu", uses)])
        .then([Command::Frame(Device::Out0, frame, format!("too big: {mtu} for {to}"))])
        .then([ip_of(v6, "route flush cache")])
        .to([to.into()])
        .lengths(1300)
        .lengths(1246)
}

/// An address with a lifetime, which ends.
pub(super) fn address_lifetime(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let own = draw.address(to);
    let length = if v6 { draw.one(&[64_u8, 128]) } else { draw.one(&[24_u8, 32]) };
    let network = IpNet::new(own, length).expect("a length of the family").trunc();
    let nodad = if v6 { "nodad" } else { "" };
    Change::once([ip(format!("address add {own}/{length} dev lan1 valid_lft 1 preferred_lft 1 {nodad}"))])
        // The kernel looks a second later at the latest.
        .then([Command::Wait(Duration::from_millis(2600))])
        .undone_by([ip(format!("address del {own}/{length} dev lan1"))])
        .to([network, own.into()])
}

/// An address whose network is another one's.
pub(super) fn address_peer(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let peer = draw.address(to);
    let (device, length) = (draw.one(&["lan0", "out0", "out1"]), draw.one(&[24_u8, 32]));
    let network = IpNet::new(peer, length).expect("a length of the family").trunc();
    let address = format!("10.99.1.1 peer {peer}/{length} dev {device}");
    Change::once([ip(format!("address add {address}"))])
        .then([ip(format!("address del {address}"))])
        .undone_by([ip(format!("address del {address}"))])
        .to([network, peer.into()])
}

/// An address with a broadcast address of its own, or none, or without a route.
pub(super) fn address_broadcast(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let (own, other) = (draw.address(to), draw.address(to));
    let with = draw.one(&["brd +", "noprefixroute", "scope link", "metric 5"]);
    let with = if draw.flip() { format!("brd {other}") } else { with.to_owned() };
    let network = IpNet::new(own, 24).expect("a length of the family").trunc();
    Change::once([ip(format!("address add {own}/24 {with} dev lan1"))])
        .then([ip(format!("address del {own}/24 dev lan1"))])
        .undone_by([ip(format!("address del {own}/24 dev lan1"))])
        .to([network, own.into(), other.into()])
}

/// Secondary addresses, which go with the first.
pub(super) fn address_secondaries(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let network = IpNet::new(to.network(), 24).expect("a length of the family").trunc();
    let (first, second) = (draw.address(network), draw.address(network));
    let promoted = draw.one(&["0", "1"]);
    Change::once([
        sysctl("ipv4/conf/lan1/promote_secondaries", promoted),
        ip(format!("address add {first}/24 dev lan1")),
        ip(format!("address replace {second}/24 dev lan1")),
    ])
    .then([ip(format!("address del {first}/24 dev lan1"))])
    .undone_by([
        ip(format!("address del {first}/24 dev lan1")),
        ip(format!("address del {second}/24 dev lan1")),
        sysctl("ipv4/conf/lan1/promote_secondaries", "0"),
    ])
    .to([network, first.into(), second.into()])
}

/// An IPv6 address that is not the host's before nobody else claims it.
pub(super) fn address_tentative(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let own = draw.address(to);
    Change::once([
        ip("link set lan1 arp on"),
        sysctl("ipv6/conf/lan1/accept_dad", "1"),
        sysctl("ipv6/conf/lan1/dad_transmits", "2"),
        ip(format!("address add {own}/64 dev lan1")),
    ])
    .then([Command::Wait(Duration::from_millis(3500))])
    .undone_by([
        ip(format!("address del {own}/64 dev lan1")),
        sysctl("ipv6/conf/lan1/accept_dad", "0"),
        ip("link set lan1 arp off"),
    ])
    .to([own.into()])
}

/// A device goes down, and the kernel does not tell of the IPv6 routes that go with it; or addresses stay.
pub(super) fn flap_unsaid(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["out0", "out1", "lan0"]);
    let key = draw.one(&["ipv6/route/skip_notify_on_dev_down", "ipv6/conf/all/keep_addr_on_down"]);
    let change = flap(draw);
    Change::once([sysctl(key, "1"), ip(format!("link set {device} down"))])
        .then([ip(format!("link set {device} up"))])
        .then(change.steps.concat())
}

/// The port gets another name, so that it is none any longer, and its own one again.
pub(super) fn renamed(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["lan0", "lan1"]);
    Change::once([
        ip(format!("rule add priority 95 iif {device} lookup 170")),
        ip("route add blackhole 10.2.0.0/17 table 170"),
    ])
    .then([
        ip(format!("link set {device} down")),
        ip(format!("link set {device} name other0")),
        ip("link set other0 up"),
    ])
    .then([
        ip("link set other0 down"),
        ip(format!("link set other0 name {device}")),
        ip(format!("link set {device} up")),
    ])
    .to(["10.2.0.0/16".parse().expect("a prefix")])
}

/// A device is replaced by another one of the same name.
pub(super) fn replaced(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["out1", "lan1"]);
    Change::once([ip(format!("link del {device}"))]).then([
        ip(format!("link add {device} type veth peer name rehto")),
        ip(format!("link set {device} up")),
    ])
}

/// Settings that are no concern of packets that are forwarded.
pub(super) fn harmless(draw: &mut Draw<'_>) -> Change {
    let (key, value, before) = draw.one(&[
        ("ipv4/conf/lan0/accept_local", "1", "0"),
        ("ipv4/conf/lan0/log_martians", "1", "0"),
        ("ipv4/conf/all/src_valid_mark", "1", "0"),
        ("ipv4/conf/lan0/route_localnet", "1", "0"),
        ("ipv4/conf/lan0/bc_forwarding", "1", "0"),
        ("ipv4/conf/lan0/arp_filter", "1", "0"),
        ("ipv4/conf/lan0/accept_source_route", "0", "1"),
        ("ipv4/fib_multipath_hash_policy", "1", "0"),
        ("ipv4/fwmark_reflect", "1", "0"),
        ("ipv6/conf/lan0/accept_redirects", "1", "0"),
        ("ipv6/conf/lan0/hop_limit", "3", "64"),
        ("ipv4/ip_default_ttl", "3", "64"),
        ("ipv4/ip_nonlocal_bind", "1", "0"),
    ]);
    Change::once([sysctl(key, value)]).undone_by([sysctl(key, before)])
}

/// Devices for the port's tags, which say what becomes of tagged frames.
pub(super) fn vlan(draw: &mut Draw<'_>) -> Change {
    let (device, id) = (draw.one(&["lan0", "lan0", "lan1"]), draw.one(&[10, 10, 0]));
    Change::once([ip(format!("link add vlan9 link {device} type vlan id {id}"))])
        .then([ip("link set vlan9 up"), ip("address add 198.18.9.1/24 dev vlan9")])
        .then([ip("link set vlan9 down")])
        .then([ip("link set vlan9 up")])
        .undone_by([ip("link del vlan9")])
}

/// A port, or a device that packets leave by, becomes a VRF's, and is free again.
pub(super) fn vrf(draw: &mut Draw<'_>) -> Change {
    let device = draw.one(&["lan0", "lan1", "out1"]);
    Change::once([ip("link add vrf0 type vrf table 300"), ip("link set vrf0 up")])
        .then([ip(format!("link set {device} master vrf0"))])
        .then([ip(format!("link set {device} nomaster"))])
        .then([ip("link del vrf0")])
}

/// A port becomes a bond's, and is free again.
pub(super) fn bond(draw: &mut Draw<'_>) -> Change {
    let (device, mode) = (draw.one(&["lan0", "lan1"]), draw.one(&["active-backup", "balance-rr"]));
    Change::once([ip(format!("link add bond7 type bond mode {mode}")), ip("link set bond7 up")])
        .then([ip(format!("link set {device} down")), ip(format!("link set {device} master bond7"))])
        .then([ip(format!("link set {device} nomaster")), ip(format!("link set {device} up"))])
}

/// Another device takes some of the port's packets by their addresses.
pub(super) fn ipvlan(draw: &mut Draw<'_>) -> Change {
    let (device, mode) = (draw.one(&["lan0", "lan1"]), draw.one(&["l2", "l3", "l3s"]));
    let to = draw.destination(false);
    let own = draw.address(to);
    Change::once([ip(format!("link add ipvl0 link {device} type ipvlan mode {mode}"))])
        .then([ip(format!("address add {own}/32 dev ipvl0")), ip("link set ipvl0 up")])
        .undone_by([ip("link del ipvl0")])
        .to([own.into()])
}

/// A device that swallows packets.
pub(super) fn dummy(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    Change::once([ip("link add dum0 type dummy"), ip("link set dum0 up")])
        .then([ip(format!("route add {to} dev dum0 metric 5"))])
        .then([ip("link set dum0 down")])
        .undone_by([ip("link del dum0")])
        .to([to])
}

/// A device that stands for an interface id.
pub(super) fn xfrm_interface(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let under = draw.one(&["dev out0", ""]);
    Change::once([ip(format!("link add xfrm7 type xfrm {under} if_id 7")), ip("link set xfrm7 up")])
        .then([ip(format!("route add {to} dev xfrm7 metric 5"))])
        .undone_by([ip("link del xfrm7")])
        .to([to])
}
