//! Rules of policy routing.

use ipnet::IpNet;

use super::super::{
    command::{Command, ip, ip_of},
    draw::{Change, Draw},
};

/// What a rule may do, and what is to be there for it.
struct Effect {
    action: String,
    add: Vec<Command>,
    remove: Vec<Command>,
    inside: Vec<IpNet>,
}

/// A lookup in a table that has a route, or a denial.
fn effect(draw: &mut Draw<'_>, v6: bool, to: IpNet) -> Effect {
    if draw.below(4) == 0 {
        let action = draw.one(&["blackhole", "unreachable", "prohibit"]).to_owned();
        return Effect { action, add: Vec::new(), remove: Vec::new(), inside: Vec::new() };
    }
    let table = 100 + draw.below(20);
    let inside = draw.inside(to);
    let route = match draw.below(4) {
        0 => format!("{} {inside}", draw.denial()),
        1 => format!("throw {inside}"),
        _ => format!("{inside} {}", draw.via(v6)),
    };
    Effect {
        action: format!("lookup {table}"),
        add: vec![ip(format!("route add {route} table {table}"))],
        remove: vec![ip(format!("route del {route} table {table}"))],
        inside: vec![inside],
    }
}

/// A rule with a selector. Where it stands matters.
fn rule(draw: &mut Draw<'_>, v6: bool, to: IpNet, selector: &str) -> Change {
    let Effect { action, add, remove, inside } = effect(draw, v6, to);
    let priority = draw.one(&[50_u32, 120, 32_000, 32_766]);
    let rule = format!("priority {priority} {selector} {action}");
    Change::once(add)
        .then([ip_of(v6, format!("rule add {rule}"))])
        .undone_by([ip_of(v6, format!("rule del {rule}"))])
        .undone_by(remove)
        .to([to])
        .to(inside)
}

pub(super) fn to(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let not = draw.one(&["", "", "not"]);
    let selected = draw.inside(to);
    rule(draw, v6, to, &format!("{not} to {selected}")).to([selected])
}

pub(super) fn from(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, from) = (draw.destination(v6), draw.source(v6));
    let not = draw.one(&["", "", "not"]);
    let and = if draw.flip() { format!("to {to}") } else { String::new() };
    rule(draw, v6, to, &format!("{not} from {from} {and}")).from([from])
}

pub(super) fn iif(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (not, device) = (draw.one(&["", "", "not"]), draw.one(&["lan0", "lan1", "lo", "out1", "absent"]));
    rule(draw, v6, to, &format!("{not} iif {device}"))
}

pub(super) fn oif(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, device) = (draw.destination(v6), draw.one(&["out0", "out1"]));
    rule(draw, v6, to, &format!("oif {device}"))
}

/// Received packets have the mark 0.
pub(super) fn fwmark(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let mark =
        draw.one(&["fwmark 1", "not fwmark 0x42", "fwmark 0x80000/0xff0000", "fwmark 0/0xff", "fwmark 1/1"]);
    rule(draw, v6, to, mark)
}

pub(super) fn tos(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, tos) = (draw.destination(v6), draw.one(&[0x08_u8, 0x10]));
    rule(draw, v6, to, &format!("tos {tos:#x}")).tos(tos)
}

pub(super) fn ports(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let selector = draw.one(&["ipproto udp dport 53", "ipproto tcp sport 53", "ipproto udp", "dport 50-60"]);
    rule(draw, v6, to, selector).ports(53)
}

/// A jump over a rule that would matter, or over none.
pub(super) fn goto(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let over = rule(draw, v6, to, "");
    let jump = draw.one(&["goto 32766", "goto 32767", "goto 140", "nop"]);
    let selector = if draw.flip() { format!("to {to}") } else { String::new() };
    let jump = format!("priority 40 {selector} {jump}");
    over.then([ip_of(v6, format!("rule add {jump}"))]).undone_by([ip_of(v6, format!("rule del {jump}"))])
}

/// As wg-quick and others do: the main table but for its default route, or all but the next table's short routes.
pub(super) fn suppress(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, length) = (draw.destination(v6), draw.one(&[0, 8, 16, 24]));
    let via = draw.via(v6);
    let everything = if v6 { "::/0" } else { "0.0.0.0/0" };
    let rules = [
        format!("priority 200 lookup main suppress_prefixlength {length}"),
        "priority 201 lookup 130".to_owned(),
    ];
    Change::once([ip(format!("route add {everything} {via} table 130"))])
        .then(rules.clone().map(|rule| ip_of(v6, format!("rule add {rule}"))))
        .undone_by(rules.map(|rule| ip_of(v6, format!("rule del {rule}"))))
        .undone_by([ip(format!("route del {everything} {via} table 130"))])
        .to([to])
}

pub(super) fn denies(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let (to, from) = (draw.destination(v6), draw.source(v6));
    let selector = match draw.below(3) {
        0 => format!("to {to}"),
        1 => format!("from {from}"),
        _ => format!("from {from} to {to}"),
    };
    let rule = format!("priority 60 {selector} {}", draw.denial());
    Change::once([ip_of(v6, format!("rule add {rule}"))])
        .undone_by([ip_of(v6, format!("rule del {rule}"))])
        .to([to])
        .from([from])
}

/// A rule for all packets.
pub(super) fn table(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    rule(draw, v6, to, "")
}

/// Two rules for all packets, one of which changes its place.
pub(super) fn order(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (inner, how, gateway) = (draw.inside(to), draw.denial(), draw.gateway(v6));
    let add = |rule: &str| ip_of(v6, format!("rule add {rule}"));
    let del = |rule: &str| ip_of(v6, format!("rule del {rule}"));
    let routes = [format!("{how} {inner} table 141"), format!("{to} via {gateway} table 142")];
    Change::once(routes.clone().map(|route| ip(format!("route add {route}"))))
        .then([add("priority 70 lookup 141"), add("priority 80 lookup 142")])
        .then([add("priority 90 lookup 141"), del("priority 70 lookup 141")])
        .undone_by([
            del("priority 70 lookup 141"),
            del("priority 80 lookup 142"),
            del("priority 90 lookup 141"),
        ])
        .undone_by(routes.map(|route| ip(format!("route del {route}"))))
        .to([to, inner])
}

/// As VPN tools add them, with and without routes in their tables.
pub(super) fn vpn(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let tools: &[(&[&str], u32)] = &[
        (&["priority 100 fwmark 1/0xffffffff lookup 50"], 50),
        (&["priority 220 lookup 220"], 220),
        (&["priority 220 not fwmark 0x42 lookup 220"], 220),
        (
            &[
                "priority 5210 fwmark 0x80000/0xff0000 lookup main",
                "priority 5250 fwmark 0x80000/0xff0000 unreachable",
                "priority 5270 lookup 52",
            ],
            52,
        ),
        (
            &[
                "priority 32764 lookup main suppress_prefixlength 0",
                "priority 32765 not fwmark 0xca6c lookup 51820",
            ],
            51820,
        ),
    ];
    let (rules, table) = draw.one(tools);
    let route = if draw.flip() {
        format!("{to} via {} dev out0", draw.gateway(v6))
    } else {
        format!("{to} {}", draw.via(v6))
    };
    let change = Change::once(rules.iter().map(|rule| ip_of(v6, format!("rule add {rule}"))))
        .undone_by(rules.iter().map(|rule| ip_of(v6, format!("rule del {rule}"))))
        .to([to]);
    if draw.flip() {
        return change;
    }
    change
        .then([ip(format!("route add {route} table {table}"))])
        .undone_by([ip(format!("route del {route} table {table}"))])
}

/// The first rule goes, and comes back somewhere else.
pub(super) fn local(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let own = draw.address(to);
    let (length, device) = if v6 { (128, "lo") } else { (32, "lo") };
    let inner = draw.inside(to);
    let via = draw.via(v6);
    Change::once([
        ip(format!("address add {own}/{length} dev {device}")),
        ip(format!("route add {inner} {via} metric 1")),
    ])
    .then([ip_of(v6, "rule del priority 0")])
    .then([ip_of(v6, format!("rule add priority {} lookup local", draw.one(&[10, 32_767])))])
    .to([to, inner, own.into()])
}

/// A left-over of VRFs, of which there are none.
pub(super) fn l3mdev(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let rule =
        draw.one(&["priority 1000 l3mdev", "priority 1000 l3mdev unreachable", "priority 40000 l3mdev"]);
    Change::once([ip_of(v6, format!("rule add {rule}"))])
        .undone_by([ip_of(v6, format!("rule del {rule}"))])
        .to([to])
}

/// Received packets are root's.
pub(super) fn uid(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let selector = draw.one(&["uidrange 1000-2000", "uidrange 0-0"]);
    rule(draw, v6, to, selector)
}

/// A table whose routes by devices of a group do not count.
pub(super) fn group(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (device, group) = (draw.one(&["out0", "out1"]), draw.one(&[0, 7]));
    let rules =
        [format!("priority 210 lookup main suppress_ifgroup {group}"), "priority 211 lookup 160".to_owned()];
    let route = format!("{to} {} table 160", draw.via(v6));
    Change::once([ip(format!("link set {device} group {group}")), ip(format!("route add {route}"))])
        .then(rules.clone().map(|rule| ip_of(v6, format!("rule add {rule}"))))
        .then([ip(format!("link set {device} group {}", 7 - group))])
        .undone_by(rules.map(|rule| ip_of(v6, format!("rule del {rule}"))))
        .undone_by([ip(format!("link set {device} group 0")), ip(format!("route del {route}"))])
        .to([to])
}

/// A rule for packets of a tunnel, which received ones on these ports are not.
pub(super) fn tunnel(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    rule(draw, v6, to, "tun_id 5")
}

/// No rule but the first is left, and then there are others.
pub(super) fn flush(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    Change::once([ip_of(v6, "rule flush")])
        .then([ip_of(v6, "rule add priority 500 lookup main")])
        .then([ip_of(v6, format!("rule add priority 400 to {to} lookup default"))])
        .to([to])
}
