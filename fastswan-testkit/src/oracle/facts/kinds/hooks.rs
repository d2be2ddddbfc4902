//! What can change a packet's fate behind routing: netfilter and traffic control.

use super::super::{
    command::{Command, other},
    draw::{Change, Draw},
};

fn nft(text: impl Into<String>) -> Command {
    Command::Nft(text.into())
}

/// A filter at a port, or at a device that packets leave by.
pub(super) fn tc(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (protocol, word) = if v6 { ("ipv6", "ip6") } else { ("ip", "ip") };
    // Not all kernels have an action that drops.
    let elsewhere = draw.one(&["lan1", "out1"]);
    let redirect = format!("action mirred egress redirect dev {elsewhere}");
    filter(draw, &format!("protocol {protocol} u32 match {word} dst {to} {redirect}")).to([to])
}

/// The same by its fields, which not all kernels have.
pub(super) fn flower(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let protocol = if v6 { "ipv6" } else { "ip" };
    filter(draw, &format!("protocol {protocol} flower dst_ip {to} action drop")).to([to])
}

fn filter(draw: &mut Draw<'_>, filter: &str) -> Change {
    let (device, direction) =
        draw.one(&[("lan0", "ingress"), ("lan1", "ingress"), ("out0", "egress"), ("out1", "egress")]);
    let tc = |text: String| Command::Tc(text);
    Change::once([tc(format!("qdisc add dev {device} clsact"))])
        .then([tc(format!("filter add dev {device} {direction} {filter}"))])
        .then([tc(format!("filter del dev {device} {direction}"))])
        .undone_by([tc(format!("qdisc del dev {device} clsact"))])
}

/// A filter with an action where packets queue to leave: of the discipline, of a class that another filter leads to, or of a
/// discipline below a class.
pub(super) fn tc_queue(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (protocol, word) = if v6 { ("ipv6", "ip6") } else { ("ip", "ip") };
    let (device, elsewhere) = draw.one(&[("out0", "out1"), ("out1", "out0")]);
    let tc = |text: String| Command::Tc(text);
    let filter = |parent: &str, what: &str| {
        tc(format!("filter add dev {device} parent {parent} protocol {protocol} prio 1 u32 {what}"))
    };
    let harmful = |parent| {
        filter(parent, &format!("match {word} dst {to} action mirred egress redirect dev {elsewhere}"))
    };
    let onwards = |parent, class| filter(parent, &format!("match u32 0 0 flowid {class}"));
    let change = Change::once([
        tc(format!("qdisc add dev {device} root handle 1: htb default 2")),
        tc(format!("class add dev {device} parent 1: classid 1:1 htb rate 10gbit")),
        tc(format!("class add dev {device} parent 1:1 classid 1:2 htb rate 10gbit")),
    ]);
    let (change, parent) = match draw.below(4) {
        0 | 1 => (change.then([harmful("1:")]), "1:"),
        2 => (change.then([onwards("1:", "1:1")]).then([harmful("1:1")]), "1:1"),
        _ => (
            change.then([tc(format!("qdisc add dev {device} parent 1:2 handle 2: htb")), harmful("2:")]),
            "2:",
        ),
    };
    change
        .then([tc(format!("filter del dev {device} parent {parent}"))])
        .undone_by([tc(format!("qdisc del dev {device} root"))])
        .to([to])
}

/// Filters that choose a class, and change no packet's fate.
pub(super) fn tc_classes(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (protocol, word) = if v6 { ("ipv6", "ip6") } else { ("ip", "ip") };
    let device = draw.one(&["out0", "out1"]);
    let tc = |text: String| Command::Tc(text);
    Change::once([
        tc(format!("qdisc add dev {device} root handle 1: htb default 1")),
        tc(format!("class add dev {device} parent 1: classid 1:1 htb rate 10gbit")),
        tc(format!("class add dev {device} parent 1: classid 1:2 htb rate 10gbit")),
    ])
    .then([tc(format!(
        "filter add dev {device} parent 1: protocol {protocol} prio 1 u32 match {word} dst {to} flowid 1:2"
    ))])
    .undone_by([tc(format!("qdisc del dev {device} root"))])
    .to([to])
}

/// A chain of nftables that drops some packets, or none.
pub(super) fn nft_filter(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let word = if v6 { "ip6" } else { "ip" };
    let hook = draw.one(&["prerouting", "forward", "postrouting"]);
    let family = draw.one(&["inet", word]);
    let rule = match draw.below(4) {
        0 => "counter accept".to_owned(),
        1 => format!("{word} daddr {to} counter reject")
            .replace("reject", if hook == "forward" { "reject" } else { "drop" }),
        _ => format!("{word} daddr {to} drop"),
    };
    Change::once([
        nft(format!("add table {family} judge")),
        nft(format!("add chain {family} judge c {{ type filter hook {hook} priority 0; policy accept; }}")),
    ])
    .then([nft(format!("add rule {family} judge c {rule}"))])
    .then([nft(format!("flush chain {family} judge c"))])
    .then([nft(format!("delete table {family} judge"))])
    .undone_by([nft(format!("delete table {family} judge"))])
    .to([to])
}

/// A chain that drops what no rule accepts.
pub(super) fn nft_policy(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let word = if v6 { "ip6" } else { "ip" };
    Change::once([
        nft("add table inet judge"),
        nft("add chain inet judge c { type filter hook forward priority 0; policy drop; }"),
        nft(format!("add rule inet judge c {word} daddr {to} accept")),
    ])
    .then([nft("delete table inet judge")])
    .undone_by([nft("delete table inet judge")])
    .to([to])
}

/// A chain at a port, before IP has packets.
pub(super) fn nft_netdev(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let word = if v6 { "ip6" } else { "ip" };
    let (hook, device) = draw.one(&[("ingress", "lan0"), ("ingress", "lan1"), ("egress", "out0")]);
    Change::once([
        nft("add table netdev judge"),
        nft(format!("add chain netdev judge c {{ type filter hook {hook} device {device} priority 0; }}")),
        nft(format!("add rule netdev judge c {word} daddr {to} drop")),
    ])
    .then([nft("delete table netdev judge")])
    .undone_by([nft("delete table netdev judge")])
    .to([to])
}

/// Packets get another source.
pub(super) fn nft_translation(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let device = draw.one(&["out0", "out1"]);
    Change::once([
        nft("add table ip judge"),
        nft("add chain ip judge c { type nat hook postrouting priority srcnat; }"),
        nft(format!("add rule ip judge c oifname {device} ip daddr {to} masquerade")),
    ])
    .then([nft("delete table ip judge")])
    .undone_by([nft("delete table ip judge")])
    .to([to])
}

/// Connections that bypass all of IP once they are known.
pub(super) fn nft_flowtable(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let word = if v6 { "ip6" } else { "ip" };
    Change::once([
        nft("add table inet judge"),
        nft("add flowtable inet judge f { hook ingress priority 0; devices = { lan0, out0 }; }"),
        nft("add chain inet judge c { type filter hook forward priority 0; policy accept; }"),
        nft(format!("add rule inet judge c {word} daddr {to} meta l4proto {{ tcp, udp }} flow add @f")),
    ])
    .then([nft("delete table inet judge")])
    .undone_by([nft("delete table inet judge")])
    .to([to])
}

/// Chains that packets under way never meet.
pub(super) fn nft_elsewhere(draw: &mut Draw<'_>) -> Change {
    let hook = draw.one(&["input", "output"]);
    Change::once([
        nft("add table inet judge"),
        nft(format!("add chain inet judge c {{ type filter hook {hook} priority 0; policy accept; }}")),
        nft("add rule inet judge c meta mark 5 drop"),
    ])
    .undone_by([nft("delete table inet judge")])
}

/// A rule of the legacy tables.
pub(super) fn iptables(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let program = if v6 { "ip6tables-legacy" } else { "iptables-legacy" };
    Change::once([other(format!("{program} -w -A FORWARD -d {to} -j DROP"))])
        .then([other(format!("{program} -w -F FORWARD"))])
        .undone_by([other(format!("{program} -w -F FORWARD"))])
        .to([to])
}

/// A virtual service.
pub(super) fn ipvs(draw: &mut Draw<'_>) -> Change {
    let to = draw.destination(false);
    let service = draw.address(to);
    Change::once([other(format!("ipvsadm -A -u {service}:53 -s rr"))])
        .then([other(format!("ipvsadm -D -u {service}:53"))])
        .undone_by([other("ipvsadm -C")])
        .to([service.into()])
        .ports(53)
}
