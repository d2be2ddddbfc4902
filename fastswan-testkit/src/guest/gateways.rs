//! Two gateways with a host behind each.
//!
//! ```text
//! host a          gateway A                        gateway B           host b
//! eth0 ───── lan0         nic0 ═══ the wire ─── nic0        lan0 ───── eth0
//! 10.1.0.5   10.1.0.1  192.0.2.1               192.0.2.2  10.2.0.1   10.2.0.9
//! 2001:db8:1::5     2001:db8:f::1           2001:db8:f::2        2001:db8:2::9
//! ```
//!
//! A's nic0 is a port of the software NIC. The other port is in a namespace of its own, the wire, and bridged to B: there
//! nobody decrypts, so a capture shows what is sent. (At B it would show decrypted packets as well.) B offloads nothing: its
//! kernel's own ESP judges what comes from A. Neighbours are known, since a mirror looks at them once.

use std::fmt::Write as _;

use anyhow::Context as _;
use fastswan::policy::MacAddr;

use super::nic::{Pair, Port};
use crate::lab::{End, LabError, Namespace, introduce, join};

/// Ethernet addresses.
pub const HOST_A: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
/// Of A's lan0.
pub const LAN_A: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
/// Of A's nic0.
pub const NIC_A: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
/// Of B's nic0.
pub const NIC_B: MacAddr = MacAddr([2, 0, 0, 0, 0, 3]);
/// Of B's lan0.
pub const LAN_B: MacAddr = MacAddr([2, 0, 0, 0, 0, 4]);
/// Of the wire's bridge and of its end at B, which nobody sends to.
const WIRE: MacAddr = MacAddr([2, 0, 0, 0, 0, 5]);
const WIRE_1: MacAddr = MacAddr([2, 0, 0, 0, 0, 6]);
/// Of somebody on the wire who forges packets.
pub const FORGER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x66]);
/// Of host b.
pub const HOST_B: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xbb]);

/// What hosts may send, so that it fits into a tunnel.
const HOST_MTU: u32 = 1400;

/// The namespaces and the wire.
#[derive(Debug)]
pub struct Gateways {
    /// The host behind A.
    pub host_a: Namespace,
    /// The gateway that offloads.
    pub a: Namespace,
    /// The gateway that does not.
    pub b: Namespace,
    /// The host behind B.
    pub host_b: Namespace,
    /// Between the gateways: `wire0` leads to A, `wire1` to B.
    pub wire: Namespace,
    pair: Option<Pair>,
}

impl Gateways {
    /// A's port of the NIC.
    pub const PORT_A: Port = Pair::PORTS[0];
    /// The port at the other end of the wire.
    pub const PORT_B: Port = Pair::PORTS[1];

    /// Makes them. They forward; nothing is encrypted yet.
    ///
    /// # Errors
    ///
    /// If the lab or the NIC is not to be had.
    pub fn new() -> anyhow::Result<Self> {
        let pair = Pair::new().context("making a pair of ports: is the test NIC loaded?")?;
        let gateways = Self {
            host_a: Namespace::new("hosta")?,
            a: Namespace::new("gatea")?,
            b: Namespace::new("gateb")?,
            host_b: Namespace::new("hostb")?,
            wire: Namespace::new("wire")?,
            pair: Some(pair),
        };
        gateways.wire.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        gateways
            .wire
            .ip(&format!("link add bridge0 address {WIRE} type bridge stp_state 0 mcast_snooping 0"))?;
        gateways.wire.ip("link set bridge0 up")?;
        let end_b = End { namespace: &gateways.b, device: "nic0", mac: NIC_B, addresses: &[] };
        let wire_1 = End { namespace: &gateways.wire, device: "wire1", mac: WIRE_1, addresses: &[] };
        join(end_b, wire_1, 1500)?;
        gateways.wire.ip("link set wire1 master bridge0")?;
        gateways.plug()?;
        let end = |namespace, device, mac, addresses| End { namespace, device, mac, addresses };
        let Self { host_a, a, b, host_b, .. } = &gateways;
        let host_a = end(host_a, "eth0", HOST_A, &["10.1.0.5/16", "2001:db8:1::5/48"]);
        let lan_a = end(a, "lan0", LAN_A, &["10.1.0.1/16", "2001:db8:1::1/48"]);
        let lan_b = end(b, "lan0", LAN_B, &["10.2.0.1/16", "2001:db8:2::1/48"]);
        let host_b = end(host_b, "eth0", HOST_B, &["10.2.0.9/16", "2001:db8:2::9/48"]);
        for (host, gateway) in [(host_a, lan_a), (host_b, lan_b)] {
            join(host, gateway, 1500)?;
            introduce(host, gateway)?;
            host.namespace.ip(&format!("link set eth0 mtu {HOST_MTU}"))?;
            for address in gateway.addresses {
                let address = address.split('/').next().unwrap_or_default();
                host.namespace.ip(&format!("route add default via {address}"))?;
            }
            gateway.namespace.forward()?;
        }
        Ok(gateways)
    }

    /// Puts the ports where they belong, and switches them on.
    ///
    /// # Errors
    ///
    /// [`LabError`].
    fn plug(&self) -> Result<(), LabError> {
        for (namespace, port, name) in [(&self.a, Self::PORT_A, "nic0"), (&self.wire, Self::PORT_B, "wire0")]
        {
            crate::lab::ip(&["link", "set", port.name(), "netns", namespace.name(), "name", name])?;
        }
        // The NIC addresses what it encrypts to the port at the other end, which thus has B's address; and the bridge is
        // not to take that for its own.
        self.wire.ip(&format!("link set wire0 address {NIC_B} master bridge0 up"))?;
        let (wire, address) = (self.wire.name(), NIC_B.to_string());
        let own = ["bridge", "fdb", "del", address.as_str(), "dev", "wire0", "master"];
        crate::lab::ip(&[&["netns", "exec", wire], &own[..]].concat())?;
        self.set_up_ends()
    }

    /// Makes another pair of ports, after the driver was removed.
    ///
    /// # Errors
    ///
    /// If it is not to be had.
    pub fn renew_wire(&mut self) -> anyhow::Result<()> {
        // The old one is removed by its name, which the new one has as well.
        drop(self.pair.take());
        self.pair = Some(Pair::new().context("making a pair of ports")?);
        Ok(self.plug()?)
    }

    /// Gives the ends their addresses, switches them on, and lets the gateways know each other and the networks behind:
    /// again, if one of them was down.
    ///
    /// # Errors
    ///
    /// [`LabError`].
    pub fn set_up_ends(&self) -> Result<(), LabError> {
        let [end_a, end_b] = self.ends();
        for end in [end_a, end_b] {
            end.namespace.ip(&format!("link set nic0 address {} mtu 1500", end.mac))?;
            for address in end.addresses {
                let detection = if address.contains(':') { "nodad" } else { "" };
                end.namespace.ip(&format!("address replace {address} dev nic0 {detection}"))?;
            }
            end.namespace.ip("link set nic0 up")?;
        }
        introduce(end_a, end_b)?;
        for (gateway, network, peer) in [
            (&self.a, "10.2.0.0/16", "192.0.2.2"),
            (&self.a, "2001:db8:2::/48", "2001:db8:f::2"),
            (&self.b, "10.1.0.0/16", "192.0.2.1"),
            (&self.b, "2001:db8:1::/48", "2001:db8:f::1"),
        ] {
            gateway.ip(&format!("route replace {network} via {peer} dev nic0"))?;
        }
        Ok(())
    }

    fn ends(&self) -> [End<'_>; 2] {
        let end = |namespace, mac, addresses| End { namespace, device: "nic0", mac, addresses };
        [
            end(&self.a, NIC_A, &["192.0.2.1/24", "2001:db8:f::1/48"]),
            end(&self.b, NIC_B, &["192.0.2.2/24", "2001:db8:f::2/48"]),
        ]
    }

    /// Makes both kernels refuse to forward between the hosts' networks in clear, should no tunnel be there.
    ///
    /// # Errors
    ///
    /// [`LabError`].
    pub fn refuse_clear(&self) -> Result<(), LabError> {
        for (gateway, here) in [(&self.a, 1), (&self.b, 2)] {
            // Not with the selectors that are negotiated: charon would take such policies over.
            for (source, destination) in [
                (format!("10.{here}.0.0/16"), "10.0.0.0/8"),
                (format!("2001:db8:{here}::/48"), "2001:db8::/45"),
            ] {
                gateway.ip(&format!(
                    "xfrm policy add src {source} dst {destination} dir out action block priority 4000000000"
                ))?;
            }
        }
        Ok(())
    }

    /// What the kernels of the gateways have, for people who wonder.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (name, gateway, port) in [("A", &self.a, Self::PORT_A), ("B", &self.b, Self::PORT_B)] {
            for what in ["-s xfrm policy", "-s xfrm state", "-s link", "route", "neighbour"] {
                let said = gateway.ip(what).unwrap_or_else(|error| error.to_string());
                let _ = writeln!(text, "== {name}: ip {what}\n{said}");
            }
            let statistics = gateway
                .enter(|| std::fs::read_to_string("/proc/thread-self/net/xfrm_stat").unwrap_or_default());
            let _ = writeln!(text, "== {name}: xfrm_stat\n{statistics}");
            for table in ["stats", "associations", "policies", "clear"] {
                let _ = writeln!(text, "== {name}: NIC {table}\n{}", port.table(table));
            }
        }
        text
    }

    /// The errors that a gateway's kernel has counted for IPsec, those that are not 0.
    #[must_use]
    pub fn ipsec_errors(gateway: &Namespace) -> Vec<String> {
        let statistics =
            gateway.enter(|| std::fs::read_to_string("/proc/thread-self/net/xfrm_stat").unwrap_or_default());
        let is_zero = |line: &str| line.split_whitespace().nth(1).is_none_or(|value| value == "0");
        statistics
            .lines()
            .filter(|line| !is_zero(line))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }
}
