//! The policies whose packets are judged. The kernel does not know them: nothing here encrypts, so that it forwards in
//! clear, and where to is what is judged.

use std::net::IpAddr;

use anyhow::Context as _;
use fastswan::{
    Policy, PolicyId, Selector,
    policy::{Direction, Egress, Family, NextHop, OffloadDev, OffloadKind, Overhead, Template},
};
use ipnet::IpNet;

use super::world::Device;

/// An outbound policy, offloaded to a device, with an assumed association.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tunnel {
    pub(super) source: IpNet,
    pub(super) destination: IpNet,
    pub(super) device: Device,
    pub(super) local: IpAddr,
    pub(super) peer: IpAddr,
    /// Its packets leave with the Ethernet header of the outer next hop.
    pub(super) by_neighbour: bool,
}

impl Tunnel {
    fn new(networks: (&str, &str), device: Device, outer: (&str, &str), by_neighbour: bool) -> Self {
        let net = |text: &str| text.parse().expect("a prefix");
        let address = |text: &str| text.parse().expect("an address");
        Self {
            source: net(networks.0),
            destination: net(networks.1),
            device,
            local: address(outer.0),
            peer: address(outer.1),
            by_neighbour,
        }
    }

    pub(super) fn is_v6(&self) -> bool {
        self.peer.is_ipv6()
    }

    pub(super) fn is_for(&self, source: IpAddr, destination: IpAddr) -> bool {
        self.source.contains(&source) && self.destination.contains(&destination)
    }

    fn overhead(&self) -> Overhead {
        Overhead::aes_gcm_tunnel(Family::from(self.peer), false, 16)
    }

    /// The longest inner packet for an outer path with this MTU.
    pub(super) fn longest(&self, mtu: u32) -> usize {
        self.overhead().longest_inner_packet(u16::try_from(mtu).unwrap_or(u16::MAX)).into()
    }

    /// As a source tells it.
    pub(super) fn policy(&self, reqid: u32, ifindex: u32) -> anyhow::Result<Policy> {
        let selector = Selector::between(self.source, self.destination).context("prefixes of one family")?;
        let next_hop = if self.by_neighbour { NextHop::Neighbour } else { NextHop::Device };
        Ok(Policy {
            templates: [Template::esp_tunnel(self.local, self.peer, reqid)].into(),
            offload: Some(OffloadDev { ifindex, kind: OffloadKind::Packet, inbound: false }),
            egress: Egress { next_hop, max_length: None },
            assumed: Some(self.overhead()),
            ..Policy::new(PolicyId::new(Direction::Out, selector))
        })
    }
}

/// Sites behind their tunnels, no two of which overlap.
pub(super) fn sites() -> Vec<Tunnel> {
    use Device::{Out0, Out1};
    vec![
        Tunnel::new(("10.1.0.0/16", "10.2.0.0/16"), Out0, ("192.0.2.1", "192.0.2.2"), false),
        Tunnel::new(("0.0.0.0/0", "10.3.0.0/16"), Out0, ("192.0.2.1", "192.0.2.3"), true),
        Tunnel::new(("10.1.0.0/16", "10.4.0.0/16"), Out1, ("198.51.100.1", "198.51.100.2"), false),
        Tunnel::new(("2001:db8:1::/48", "2001:db8:2::/48"), Out0, ("2001:db8:f::1", "2001:db8:f::2"), false),
        Tunnel::new(("::/0", "2001:db8:3::/48"), Out0, ("2001:db8:f::1", "2001:db8:f::3"), true),
        Tunnel::new(("2001:db8:1::/48", "2001:db8:4::/48"), Out1, ("2001:db8:e::1", "2001:db8:e::2"), false),
    ]
}

/// Everything of the first network through one tunnel.
pub(super) fn everything() -> Vec<Tunnel> {
    use Device::Out0;
    vec![
        Tunnel::new(("10.1.0.0/16", "0.0.0.0/0"), Out0, ("192.0.2.1", "192.0.2.2"), false),
        Tunnel::new(("2001:db8:1::/48", "::/0"), Out0, ("2001:db8:f::1", "2001:db8:f::2"), true),
    ]
}
