//! Routes and next hops.

use std::time::Duration;

use super::super::{
    command::{Command, carrier, ip, ip_of, sysctl},
    draw::{Change, Draw},
    tunnels::Tunnel,
    world::Device,
};

/// A route that drops.
pub(super) fn denied(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, how) = (draw.destination(v6), draw.denial());
    let metric = draw.one(&["", "metric 1", "metric 2000"]);
    Change::once([ip(format!("route add {how} {to} {metric}"))])
        .undone_by([ip(format!("route del {how} {to} {metric}"))])
        .to([to])
}

/// A route to another device.
pub(super) fn elsewhere(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, via) = (draw.destination(v6), draw.via(v6));
    Change::once([ip(format!("route add {to} {via} metric 7"))])
        .undone_by([ip(format!("route del {to} {via} metric 7"))])
        .to([to])
}

/// A route that changes nothing but the next hop.
pub(super) fn same_device(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let how = if draw.flip() { format!("via {} dev out0", draw.gateway(v6)) } else { "dev out0".to_owned() };
    Change::once([ip(format!("route add {to} {how} metric 9"))])
        .undone_by([ip(format!("route del {to} {how} metric 9"))])
        .to([to])
}

/// A route that throws, perhaps with another one inside.
pub(super) fn throw(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (inner, via) = (draw.inside(to), draw.via(v6));
    Change::once([ip(format!("route add throw {to} metric 3"))])
        .then([ip(format!("route add {inner} {via} metric 2"))])
        .undone_by([
            ip(format!("route del throw {to} metric 3")),
            ip(format!("route del {inner} {via} metric 2")),
        ])
        .to([to, inner])
}

/// An IPv4 route for one type of service, which wins whatever its metric.
pub(super) fn tos(draw: &mut Draw<'_>) -> Change {
    let (to, tos) = (draw.destination(false), draw.one(&[0x04_u8, 0x08, 0x10, 0x1c]));
    let how = draw.one(&["blackhole", "unreachable", "prohibit", "throw", ""]);
    let via = if how.is_empty() { draw.via(false) } else { String::new() };
    let metric = draw.one(&[0, 500]);
    let route = format!("{how} {to} {via} tos {tos:#x} metric {metric}");
    Change::once([ip(format!("route add {route}"))])
        .undone_by([ip(format!("route del {route}"))])
        .to([to])
        .tos(tos)
}

/// The same, for the outer packets.
pub(super) fn tos_outer(draw: &mut Draw<'_>) -> Change {
    let (tunnel, tos) = (draw.tunnel(false), draw.one(&[0x08_u8, 0x10]));
    let (to, how) = (tunnel.peer, draw.denial());
    let route = format!("{how} {to}/32 tos {tos:#x} metric 500");
    Change::once([ip(format!("route add {route}"))]).undone_by([ip(format!("route del {route}"))]).tos(tos)
}

/// Another route for the outer packets.
pub(super) fn outer(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let tunnel = draw.tunnel(v6);
    let (to, length) = (tunnel.peer, if v6 { 128 } else { 32 });
    let how = match draw.below(5) {
        0 => format!("{} {to}/{length}", draw.denial()),
        1 => format!("{to}/{length} via {} dev out0 onlink", draw.gateway(v6)),
        2 => format!("{to}/{length} via {} dev out1", if v6 { "2001:db8:e::2" } else { "198.51.100.2" }),
        3 => format!("{to}/{length} dev {} mtu {}", tunnel.device.name(), draw.one(&[1280, 1400])),
        _ => format!("{to}/{length} dev {}", tunnel.device.name()),
    };
    Change::once([ip(format!("route add {how}"))]).undone_by([ip(format!("route del {how}"))]).lengths(1346)
}

/// Two IPv4 routes for one prefix, one of which goes.
pub(super) fn metrics(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let (one, other) = (draw.via(false), draw.via(false));
    let first =
        if draw.flip() { format!("{to} {one} metric 10") } else { format!("blackhole {to} metric 10") };
    let second = format!("{to} {other} metric 20");
    Change::once([ip(format!("route add {second}")), ip(format!("route add {first}"))])
        .then([ip(format!("route del {first}"))])
        .undone_by([ip(format!("route del {first}")), ip(format!("route del {second}"))])
        .to([to])
}

/// A route with an MTU of its own.
pub(super) fn mtu(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, gateway) = (draw.destination(v6), draw.gateway(v6));
    let mtu = draw.one(&[1300, 1400, 1446, 1500, 9000]);
    let lock = draw.one(&["", "lock"]);
    let route = format!("{to} via {gateway} dev out0 metric 4");
    Change::once([ip(format!("route add {route} mtu {lock} {mtu}"))])
        .undone_by([ip(format!("route del {route}"))])
        .to([to])
        .lengths(mtu.min(1499))
}

/// A route that is replaced, appended to and prepended to.
pub(super) fn replaced(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (one, other) = (draw.via(v6), draw.via(v6));
    let how = draw.one(&["replace", "append", "prepend", "replace"]);
    Change::once([ip(format!("route add {to} {one} metric 6"))])
        .then([ip(format!("route {how} {to} {other} metric 6"))])
        .undone_by([
            ip(format!("route del {to} {one} metric 6")),
            ip(format!("route del {to} {other} metric 6")),
        ])
        .to([to])
}

/// A prefix that is the host's own, or a broadcast or multicast one.
pub(super) fn local(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let kinds: &[&str] = if v6 { &["local", "anycast"] } else { &["local", "broadcast", "multicast"] };
    let (kind, device) = (draw.one(kinds), draw.one(&["lo", "lan0"]));
    let table = draw.one(&["", "table local"]);
    let route = format!("{kind} {to} dev {device} {table}");
    Change::once([ip(format!("route add {route}"))]).undone_by([ip(format!("route del {route}"))]).to([to])
}

/// A device without carrier, whose routes count or not.
pub(super) fn linkdown(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let family = if v6 { "ipv6" } else { "ipv4" };
    let to = draw.destination(v6);
    let via = if v6 { "2001:db8:e::2" } else { "198.51.100.2" };
    let ignore = draw.one(&["0", "1"]);
    Change::once([
        sysctl(format!("{family}/conf/out1/ignore_routes_with_linkdown"), ignore),
        ip(format!("route add {to} via {via} dev out1 metric 5")),
    ])
    .then(carrier(Device::Out1, false))
    .then(carrier(Device::Out1, true))
    .to([to])
}

/// Routes that are of no concern.
pub(super) fn churn(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let number = draw.below(200);
    let (net, gateway) = if v6 { ("2001:db8:aa", "2001:db8:f::2") } else { ("198.18", "192.0.2.2") };
    let prefix = |at: u32| if v6 { format!("{net}:{at:x}::/64") } else { format!("{net}.{at}.0/24") };
    let add = (number..number + 40).map(|at| ip(format!("route add {} via {gateway}", prefix(at))));
    let del = (number..number + 40).map(|at| ip(format!("route del {} via {gateway}", prefix(at))));
    Change::once(add).undone_by(del)
}

/// An encapsulation that changes nothing, since the device has none.
pub(super) fn encap(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let route = format!("{to} encap ip id 7 dst 192.0.2.9 via 192.0.2.2 dev out0 metric 8");
    Change::once([ip(format!("route add {route}"))])
        .undone_by([ip(format!("route del {to} metric 8"))])
        .to([to])
}

/// Several next hops behind one device.
pub(super) fn multipath_same_device(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let [one, other] = if v6 { ["2001:db8:f::2", "2001:db8:f::3"] } else { ["192.0.2.2", "192.0.2.3"] };
    Change::once([ip(format!(
        "route add {to} metric 3 nexthop via {one} dev out0 weight 1 nexthop via {other} dev out0 weight 2"
    ))])
    .undone_by([ip(format!("route del {to} metric 3"))])
    .to([to])
}

/// Several next hops behind several devices.
pub(super) fn multipath(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let [one, other] = if v6 { ["2001:db8:f::2", "2001:db8:e::2"] } else { ["192.0.2.2", "198.51.100.2"] };
    Change::once([ip(format!(
        "route add {to} metric 3 nexthop via {one} dev out0 nexthop via {other} dev out1"
    ))])
    .undone_by([ip(format!("route del {to} metric 3"))])
    .to([to])
}

/// A next hop object that goes, and its route with it.
pub(super) fn nexthop(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (gateway, how) = (draw.gateway(v6), draw.denial());
    let inner = draw.inside(to);
    let id = draw.below(50) + 1;
    let how =
        if draw.flip() { format!("route add {how} {to} metric 900") } else { "link set lo up".to_owned() };
    Change::once([ip(how), ip(format!("nexthop add id {id} via {gateway} dev out0"))])
        .then([ip(format!("route add {inner} nhid {id}"))])
        .then([ip(format!("nexthop del id {id}"))])
        .undone_by(
            ["blackhole", "unreachable", "prohibit"]
                .map(|how| ip(format!("route del {how} {to} metric 900"))),
        )
        .to([to, inner])
}

/// A next hop object that becomes another one.
pub(super) fn nexthop_replaced(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let id = 100 + draw.below(50);
    let gateway = draw.gateway(v6);
    let next = match draw.below(3) {
        0 => "blackhole".to_owned(),
        1 => format!("via {} dev lan0", if v6 { "2001:db8:1::5" } else { "10.1.0.5" }),
        _ => format!("via {} dev out1", if v6 { "2001:db8:e::2" } else { "198.51.100.2" }),
    };
    Change::once([
        ip(format!("nexthop add id {id} via {gateway} dev out0")),
        ip(format!("route add {to} metric 2 nhid {id}")),
    ])
    .then([ip_of(v6, format!("nexthop replace id {id} {next}"))])
    .then([ip(format!("nexthop replace id {id} via {gateway} dev out0"))])
    .undone_by([ip(format!("nexthop del id {id}"))])
    .to([to])
}

/// A group of next hop objects.
pub(super) fn nexthop_group(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let [one, other] = if v6 { ["2001:db8:f::2", "2001:db8:f::3"] } else { ["192.0.2.2", "192.0.2.3"] };
    let elsewhere = if v6 { "2001:db8:e::2" } else { "198.51.100.2" };
    let other = if draw.flip() { format!("{other} dev out0") } else { format!("{elsewhere} dev out1") };
    Change::once([
        ip(format!("nexthop add id 201 via {one} dev out0")),
        ip(format!("nexthop add id 202 via {other}")),
        ip("nexthop add id 203 group 201/202"),
        ip(format!("route add {to} metric 2 nhid 203")),
    ])
    .then([ip(format!("nexthop del id {}", draw.one(&[201, 202])))])
    .then([ip("nexthop del id 203")])
    .undone_by(["201", "202", "203"].map(|id| ip(format!("nexthop del id {id}"))))
    .to([to])
}

/// An IPv4 route that goes without a word when its preferred source does.
pub(super) fn prefsrc_gone(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let inner = draw.inside(to);
    let gateway = draw.gateway(false);
    let device = draw.one(&["lo", "lan0", "out0"]);
    Change::once([
        ip(format!("route add unreachable {to} metric 901")),
        ip(format!("address add 10.99.0.9/32 dev {device}")),
        ip(format!("route add {inner} via {gateway} src 10.99.0.9")),
    ])
    .then([ip(format!("address del 10.99.0.9/32 dev {device}"))])
    .undone_by([ip(format!("route del unreachable {to} metric 901"))])
    .to([to, inner])
}

/// Routes that do not belong there in the table that is asked first. IPv4 keeps it and the main table together until a
/// rule is added.
pub(super) fn table_local(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (inner, gateway) = (draw.inside(to), draw.gateway(v6));
    let (how, via) = (draw.denial(), draw.via(v6));
    let change = match draw.below(3) {
        0 => Change::once([ip(format!("route add throw {to} table local"))]),
        1 => Change::once([ip(format!("route add {to} via {gateway} table local"))])
            .then([ip(format!("route add {how} {inner} metric 1"))]),
        _ => Change::once([ip(format!("route add {to} {via} table local"))])
            .then([ip(format!("route add {inner} via {gateway} metric 1"))]),
    };
    let change = change.to([to, inner]);
    if draw.flip() {
        return change;
    }
    // From now on they are two.
    change.then([ip_of(v6, "rule add priority 30000 iif nowhere lookup 9")])
}

/// Routes in a table that no rule asks.
pub(super) fn table_unasked(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, how) = (draw.destination(v6), draw.denial());
    Change::once([ip(format!("route add {how} {to} table 77"))])
        .undone_by([ip(format!("route del {how} {to} table 77"))])
        .to([to])
}

/// An IPv6 route with a lifetime, which ends without a word.
pub(super) fn expires(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let (inner, gateway) = (draw.inside(to), draw.gateway(true));
    let how = draw.denial();
    Change::once([
        ip(format!("route add {how} {to} metric 902")),
        ip(format!("route add {inner} via {gateway} expires 1 metric 20")),
    ])
    // Lifetimes are whole seconds, and a tick more.
    .then([Command::Wait(Duration::from_millis(1100))])
    .undone_by([
        ip(format!("route del {how} {to} metric 902")),
        ip(format!("route del {inner} via {gateway} metric 20")),
    ])
    .to([to, inner])
}

/// IPv6 routes for packets from some sources.
pub(super) fn source_specific(draw: &mut Draw<'_>) -> Change {
    let (to, from) = (draw.destination(true), draw.source(true));
    let how = if draw.flip() { String::new() } else { draw.denial().to_owned() };
    let via = if how.is_empty() { draw.via(true) } else { String::new() };
    let to_text = if draw.below(3) == 0 { "::/0".to_owned() } else { to.to_string() };
    let route = format!("{how} {to_text} from {from} {via} metric 5");
    Change::once([ip(format!("route add {route}"))])
        .undone_by([ip(format!("route del {route}"))])
        .to([to])
        .from([from])
}

/// Two IPv6 routes for one prefix.
pub(super) fn metrics_v6(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let other = if draw.flip() {
        format!("{to} via {} dev out0 metric 30", draw.gateway(true))
    } else {
        format!("{to} {} metric 30", draw.via(true))
    };
    let best = format!("{to} via {} dev out0 metric 25", draw.gateway(true));
    Change::once([ip(format!("route add {best}")), ip(format!("route add {other}"))])
        .then([ip(format!("route del {best}"))])
        .undone_by([ip(format!("route del {best}")), ip(format!("route del {other}"))])
        .to([to])
}

/// As FRR adds it.
pub(super) fn unreachable_default(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let route = "unreachable default metric 4278198272";
    Change::once([ip_of(true, format!("route add {route}"))])
        .undone_by([ip_of(true, format!("route del {route}"))])
        .to([to])
}

/// A better IPv6 route, by another device than the tunnel's, whose router does not answer. If it were the tunnel's, the
/// kernel of the judge would need the router, and IPsec would not.
pub(super) fn router_fails(draw: &mut Draw<'_>) -> Change {
    let is_out1 = |tunnel: &&Tunnel| tunnel.device == Device::Out1;
    let elsewhere: Vec<_> = draw.tunnels.iter().filter(is_out1).map(|tunnel| tunnel.destination).collect();
    let to = loop {
        let to = draw.destination(true);
        if !elsewhere.iter().any(|destination| destination.contains(&to)) {
            break to;
        }
    };
    let (elsewhere, router) = ("out1", "2001:db8:e::77");
    Change::once([
        ip(format!("neighbour replace {router} dev {elsewhere} lladdr 02:00:00:00:00:c7")),
        ip(format!("route add {to} via {router} dev {elsewhere} metric 15")),
        ip(format!("route add {to} via 2001:db8:f::2 dev out0 metric 16")),
    ])
    .then([ip(format!("neighbour replace {router} dev {elsewhere} nud failed"))])
    .undone_by([
        ip(format!("route del {to} metric 15")),
        ip(format!("route del {to} metric 16")),
        ip(format!("neighbour del {router} dev {elsewhere}")),
    ])
    .to([to])
}

/// Sources that are not routed back.
pub(super) fn source_denied(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (from, how) = (draw.source(v6), draw.denial());
    Change::once([ip(format!("route add {how} {from} metric 1"))])
        .undone_by([ip(format!("route del {how} {from} metric 1"))])
        .from([from])
}

/// The default route, and another one that is better.
pub(super) fn default(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, via, how) = (draw.destination(v6), draw.via(v6), draw.denial());
    let everything = if v6 { "::/0" } else { "0.0.0.0/0" };
    let metric = draw.one(&["metric 1", "metric 5000"]);
    let route = if draw.flip() {
        format!("{everything} {via} {metric}")
    } else {
        format!("{how} {everything} {metric}")
    };
    Change::once([ip(format!("route add {route}"))]).undone_by([ip(format!("route del {route}"))]).to([to])
}

/// All addresses in two routes, as VPN clients add them.
pub(super) fn halves(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, via) = (draw.destination(v6), draw.via(v6));
    let halves = if v6 { ["::/1", "8000::/1"] } else { ["0.0.0.0/1", "128.0.0.0/1"] };
    Change::once(halves.map(|half| ip(format!("route add {half} {via} metric 11"))))
        .undone_by(halves.map(|half| ip(format!("route del {half} {via} metric 11"))))
        .to([to])
}

/// Metrics that are no concern of forwarded packets.
pub(super) fn harmless(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, gateway) = (draw.destination(v6), draw.gateway(v6));
    let with =
        draw.one(&["advmss 1300", "initcwnd 20", "rtt 30ms", "hoplimit 7", "quickack 1", "proto bird"]);
    Change::once([ip(format!("route add {to} via {gateway} dev out0 metric 8 {with}"))])
        .undone_by([ip(format!("route del {to} metric 8"))])
        .to([to])
}

/// An IPv4 route by an IPv6 next hop.
pub(super) fn via_v6(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let hop = draw.one(&["2001:db8:f::2 dev out0", "2001:db8:f::3 dev out0", "2001:db8:e::2 dev out1"]);
    let route = format!("{to} via inet6 {hop} metric 13");
    Change::once([ip(format!("route add {route}"))]).undone_by([ip(format!("route del {route}"))]).to([to])
}

/// All routes of a family go at once.
pub(super) fn flush(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, via) = (draw.destination(v6), draw.via(v6));
    let what = draw.one(&["flush table main", "flush table all", "flush proto boot"]);
    Change::once([ip_of(v6, format!("route {what}"))]).then([ip(format!("route add {to} {via}"))]).to([to])
}

/// A resilient group, whose buckets move.
pub(super) fn nexthop_resilient(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let [one, other] = if v6 { ["2001:db8:f::2", "2001:db8:f::3"] } else { ["192.0.2.2", "192.0.2.3"] };
    let elsewhere = if v6 { "2001:db8:e::2" } else { "198.51.100.2" };
    Change::once([
        ip(format!("nexthop add id 301 via {one} dev out0")),
        ip(format!("nexthop add id 302 via {other} dev out0")),
        ip(format!("nexthop add id 304 via {elsewhere} dev out1")),
        ip("nexthop add id 303 group 301/302 type resilient buckets 8"),
        ip(format!("route add {to} metric 2 nhid 303")),
    ])
    .then([ip("nexthop replace id 303 group 301/304 type resilient")])
    .then([ip("nexthop del id 301")])
    .undone_by(["303", "301", "302", "304"].map(|id| ip(format!("nexthop del id {id}"))))
    .to([to])
}

/// Routes that are told by the number of their next hop object alone.
pub(super) fn nexthop_compat(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let gateway = draw.gateway(v6);
    let elsewhere = if v6 { "2001:db8:e::2" } else { "198.51.100.2" };
    Change::once([
        sysctl("ipv4/nexthop_compat_mode", "0"),
        ip(format!("nexthop add id 401 via {gateway} dev out0")),
        ip(format!("route add {to} metric 2 nhid 401")),
    ])
    .then([ip(format!("nexthop replace id 401 via {elsewhere} dev out1"))])
    .then([ip("nexthop del id 401")])
    .undone_by([ip("nexthop del id 401"), sysctl("ipv4/nexthop_compat_mode", "1")])
    .to([to])
}

/// Routers of different preference.
pub(super) fn preference(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(true);
    let routes = ["2001:db8:f::2 dev out0", "2001:db8:e::2 dev out1"];
    let pref = draw.one(&[["high", "low"], ["low", "high"], ["medium", "medium"]]);
    let route = |at: usize| format!("{to} via {} metric {} pref {}", routes[at], 40 + at, pref[at]);
    Change::once([0, 1].map(|at| ip(format!("route add {}", route(at)))))
        .undone_by([0, 1].map(|at| ip(format!("route del {}", route(at)))))
        .to([to])
}
