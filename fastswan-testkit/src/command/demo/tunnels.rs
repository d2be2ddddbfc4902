//! The policies of the gateway's kernel, and the networks that they lead to.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use fastswan::policy::{MacAddr, NextHop};
use fastswan_testkit::{
    lab::LabError,
    site::{PEER, Site},
};

/// Where packets enter and leave the gateway.
pub(super) const INGRESS: &str = "lan0";
pub(super) const EGRESS: &str = "out0";

/// The XDP program writes this source address and the kernel writes the device's own: so the peer can tell
/// which of them forwarded a frame.
pub(super) const FAST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0xfa, 0x57]);

/// The client's addresses.
pub(super) const CLIENT: (IpAddr, IpAddr) =
    (IpAddr::V4(Ipv4Addr::new(10, 1, 0, 5)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 5)));

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
            Ipv6Addr::new(0x2001, 0xdb8, self.network, 0, 0, 0, 0, 9).into()
        } else {
            Ipv4Addr::new(10, u8::try_from(self.network).unwrap_or(0), 0, 9).into()
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

/// The hosts, with the tunnels' networks behind the peer and their policies in the gateway's kernel.
#[derive(Debug)]
pub(super) struct Tunnels(pub(super) Site);

impl Tunnels {
    pub(super) fn new() -> Result<Self, LabError> {
        let site = Site::new()?;
        site.gateway.forward()?;
        site.client.ip(&format!("link set eth0 mtu {CLIENT_MTU}"))?;
        let tunnels = Self(site);
        for tunnel in TUNNELS {
            tunnels.add(tunnel)?;
        }
        // Better than the tunnel's policy, without a template: what it matches is sent in clear.
        tunnels.0.gateway.ip("xfrm policy add src 10.1.0.0/24 dst 10.5.0.0/24 dir out priority 50")?;
        Ok(tunnels)
    }

    /// How packets leave the gateway through the fast path. A NIC that does packet offload writes its own
    /// Ethernet header; a veth device does not.
    pub(super) fn next_hop() -> NextHop {
        NextHop::Fixed { source: FAST_MAC, destination: PEER }
    }

    fn add(&self, tunnel: Tunnel) -> Result<(), LabError> {
        let (gateway, peer) =
            if tunnel.v6 { ("2001:db8:f::1", "2001:db8:f::2") } else { ("192.0.2.1", "192.0.2.2") };
        self.0.gateway.ip(&format!("route add {} via {peer}", tunnel.destination()))?;
        let length = if tunnel.v6 { 128 } else { 32 };
        self.0.peer.ip(&format!("address replace {}/{length} dev lo", tunnel.host()))?;
        // No device here encrypts: with an optional template, the kernel forwards in clear what has no
        // association. It takes them in transport mode only; `Promote` makes tunnels of them.
        self.0.gateway.ip(&format!(
            "xfrm policy add {} priority 100 \
             tmpl src {gateway} dst {peer} proto esp reqid 1 mode transport level use",
            tunnel.selector()
        ))?;
        Ok(())
    }

    pub(super) fn delete(&self, tunnel: Tunnel) -> Result<(), LabError> {
        self.0.gateway.ip(&format!("xfrm policy delete {}", tunnel.selector())).map(drop)
    }
}
