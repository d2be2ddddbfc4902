//! Client, gateway and peer: three namespaces in a row, and the policies of the gateway's kernel.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use fastswan::{policy::MacAddr, policy::NextHop};
use fastswan_testkit::lab::{self, End, LabError, Namespace};

/// Where packets enter and leave the gateway.
pub(super) const INGRESS: &str = "g0";
pub(super) const EGRESS: &str = "g1";

const CLIENT_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xc]);
const INGRESS_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const EGRESS_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const PEER_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xf]);
/// The XDP program writes this source address and the kernel writes the device's own: so the peer can tell
/// which of them forwarded a frame.
pub(super) const FAST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0xfa, 0x57]);

pub(super) const CLIENT: (IpAddr, IpAddr) =
    (IpAddr::V4(Ipv4Addr::new(10, 1, 0, 2)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2)));

/// Shorter than the link to the peer, so that every packet of the client's fits into a tunnel there.
const CLIENT_MTU: u32 = 1400;

/// A policy of the gateway's kernel, from the client's network to one behind the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tunnel {
    v6: bool,
    /// Which network behind the peer.
    network: u16,
}

impl Tunnel {
    pub(super) const fn v4(network: u16) -> Self {
        Self { v6: false, network }
    }

    pub(super) const fn v6(network: u16) -> Self {
        Self { v6: true, network }
    }

    /// A host in the network behind the peer.
    pub(super) fn host(self) -> IpAddr {
        if self.v6 {
            Ipv6Addr::new(0x2001, 0xdb8, self.network, 0, 0, 0, 0, 2).into()
        } else {
            Ipv4Addr::new(10, u8::try_from(self.network).unwrap_or(0), 0, 2).into()
        }
    }

    /// The client, as this tunnel's packets name it.
    pub(super) fn client(self) -> IpAddr {
        if self.v6 { CLIENT.1 } else { CLIENT.0 }
    }

    fn destination(self) -> String {
        if self.v6 {
            format!("2001:db8:{:x}::/48", self.network)
        } else {
            format!("10.{}.0.0/16", self.network)
        }
    }

    fn selector(self) -> String {
        let source = if self.v6 { "2001:db8:1::/48" } else { "10.1.0.0/16" };
        format!("src {source} dst {} dir out", self.destination())
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.destination())
    }
}

/// All tunnels, in the order in which they are added.
pub(super) const TUNNELS: [Tunnel; 6] =
    [Tunnel::v4(2), Tunnel::v4(3), DELETED, SHADOWED, Tunnel::v6(2), Tunnel::v6(3)];
/// The one whose policy is deleted half-way.
pub(super) const DELETED: Tunnel = Tunnel::v4(4);
/// The one with a better policy, for a part of it, that bypasses IPsec.
pub(super) const SHADOWED: Tunnel = Tunnel::v4(5);

/// The three hosts.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) client: Namespace,
    pub(super) gateway: Namespace,
    pub(super) peer: Namespace,
}

impl Site {
    pub(super) fn new() -> Result<Self, LabError> {
        let (client, gateway, peer) =
            (Namespace::new("client")?, Namespace::new("gateway")?, Namespace::new("peer")?);
        gateway.forward()?;

        let client_end = End {
            namespace: &client,
            device: "c0",
            mac: CLIENT_MAC,
            addresses: &["10.1.0.2/16", "2001:db8:1::2/48"],
        };
        let ingress = End {
            namespace: &gateway,
            device: INGRESS,
            mac: INGRESS_MAC,
            addresses: &["10.1.0.1/16", "2001:db8:1::1/48"],
        };
        let egress = End {
            namespace: &gateway,
            device: EGRESS,
            mac: EGRESS_MAC,
            addresses: &["192.0.2.1/24", "2001:db8:f::1/64"],
        };
        let peer_end = End {
            namespace: &peer,
            device: "p0",
            mac: PEER_MAC,
            addresses: &["192.0.2.2/24", "2001:db8:f::2/64"],
        };
        lab::join(client_end, ingress, CLIENT_MTU)?;
        lab::join(egress, peer_end, 1500)?;
        lab::introduce(client_end, ingress)?;
        lab::introduce(egress, peer_end)?;

        for (host, routes) in [
            (&client, ["default via 10.1.0.1", "default via 2001:db8:1::1"]),
            (&peer, ["default via 192.0.2.1", "default via 2001:db8:f::1"]),
        ] {
            for route in routes {
                host.ip(&format!("route add {route}"))?;
            }
        }
        let site = Self { client, gateway, peer };
        for tunnel in TUNNELS {
            site.add(tunnel)?;
        }
        // Better than the tunnel's policy, without a template: what it matches is sent in clear.
        site.gateway.ip("xfrm policy add src 10.1.0.0/24 dst 10.5.0.0/24 dir out priority 50")?;
        Ok(site)
    }

    /// How packets leave the gateway through the fast path. A NIC that does packet offload writes its own
    /// Ethernet header; a veth device does not.
    pub(super) fn next_hop() -> NextHop {
        NextHop::Fixed { source: FAST_MAC, destination: PEER_MAC }
    }

    fn add(&self, tunnel: Tunnel) -> Result<(), LabError> {
        let (gateway, peer) =
            if tunnel.v6 { ("2001:db8:f::1", "2001:db8:f::2") } else { ("192.0.2.1", "192.0.2.2") };
        self.gateway.ip(&format!("route add {} via {peer}", tunnel.destination()))?;
        let length = if tunnel.v6 { 128 } else { 32 };
        self.peer.ip(&format!("address add {}/{length} dev lo", tunnel.host()))?;
        // No device here encrypts: with an optional template, the kernel forwards in clear what has no
        // association. It takes them in transport mode only; `Promote` makes tunnels of them.
        self.gateway.ip(&format!(
            "xfrm policy add {} priority 100 \
             tmpl src {gateway} dst {peer} proto esp reqid 1 mode transport level use",
            tunnel.selector()
        ))?;
        Ok(())
    }

    pub(super) fn delete(&self, tunnel: Tunnel) -> Result<(), LabError> {
        self.gateway.ip(&format!("xfrm policy delete {}", tunnel.selector())).map(drop)
    }
}
