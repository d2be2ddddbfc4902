//! What can change a packet's fate behind routing.

use super::super::{
    command::Command,
    draw::{Change, Draw},
};

/// A filter at a port, or at a device that packets leave by.
pub(super) fn tc(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let (device, direction) = draw.one(&[("lan0", "ingress"), ("lan1", "ingress"), ("out0", "egress")]);
    let (protocol, word) = if v6 { ("ipv6", "ip6") } else { ("ip", "ip") };
    let tc = |text: String| Command::Tc(text);
    Change::once([tc(format!("qdisc add dev {device} clsact"))])
        .then([tc(format!(
            "filter add dev {device} {direction} protocol {protocol} u32 match {word} dst {to} action drop"
        ))])
        .then([tc(format!("qdisc del dev {device} clsact"))])
        .undone_by([tc(format!("qdisc del dev {device} clsact"))])
        .to([to])
}

/// A table of nftables.
pub(super) fn nft(draw: &mut Draw<'_>) -> Change {
    let v6 = draw.flip();
    let to = draw.destination(v6);
    let word = if v6 { "ip6" } else { "ip" };
    let nft = |text: String| Command::Nft(text);
    let hook = draw.one(&["prerouting", "forward", "postrouting"]);
    let rule = match draw.below(3) {
        0 => "counter accept".to_owned(),
        _ => format!("{word} daddr {to} drop"),
    };
    Change::once([
        nft(format!("add table inet judge {{ chain c {{ type filter hook {hook} priority 0; }} }}")),
        nft(format!("add rule inet judge c {rule}")),
    ])
    .then([nft("delete table inet judge".to_owned())])
    .undone_by([nft("delete table inet judge".to_owned())])
    .to([to])
}
