//! The host that everything happens on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use fastswan::policy::MacAddr;
use ipnet::IpNet;

use crate::lab::{self, End, LabError, Namespace, join};

/// Where packets come from, and the port that they enter by.
pub(super) const SENDER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
pub(super) const PORT: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
/// The name of that port.
pub(super) const INGRESS: &str = "in0";
/// The outer addresses of tunnels through the device that stays.
pub(super) const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub(super) const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
pub(super) const ADDRESS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 1));
pub(super) const PEER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 2));
/// Far ends that tunnels are moved to, by the same way.
pub(super) const MOVED: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9));
pub(super) const MOVED_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 9));
/// Those of tunnels through the device that is lost from time to time.
pub(super) const LOOSE_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
pub(super) const LOOSE_PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));

/// 10.`zone`.`net`.`host`/`length`
pub(super) fn v4(zone: u8, net: u8, host: u8, length: u8) -> IpNet {
    IpNet::new(Ipv4Addr::new(10, zone, net, host).into(), length).expect("a length of the family").trunc()
}

/// A gateway in a namespace of its own: packets come in by one device and leave by another. Those to 10.3.0.0/16
/// leave by a third one, which is lost from time to time.
#[derive(Debug)]
pub(super) struct Host {
    gateway: Namespace,
    _others: Namespace,
    /// Interface indices of the three.
    pub(super) ingress: u32,
    pub(super) egress: u32,
    pub(super) loose: u32,
}

impl Host {
    pub(super) fn new() -> Result<Self, LabError> {
        let (gateway, others) = (Namespace::new("chaos")?, Namespace::new("others")?);
        others.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        let other = MacAddr([2, 0, 0, 0, 0, 3]);
        for (device, there, mac, remote, addresses) in [
            (INGRESS, "wire0", PORT, SENDER, &["10.1.0.1/16", "2001:db8:1::1/48"][..]),
            ("out0", "exit0", MacAddr([2, 0, 0, 0, 0, 2]), other, &["192.0.2.1/24", "2001:db8:f::1/48"]),
            // Its routes come back with it, since they are those of its addresses.
            ("nic0", "exit1", MacAddr([2, 0, 0, 0, 0, 4]), other, &["198.51.100.1/24", "10.3.0.1/16"]),
        ] {
            let end = |namespace, device, mac, addresses| End { namespace, device, mac, addresses };
            join(end(&gateway, device, mac, addresses), end(&others, there, remote, &[]), 1500)?;
        }
        gateway.forward()?;
        for neighbour in ["192.0.2.2", "2001:db8:f::2"] {
            gateway.ip(&format!("neighbour replace {neighbour} lladdr {other} dev out0"))?;
        }
        for moved in [MOVED, MOVED_V6] {
            gateway.ip(&format!("neighbour replace {moved} lladdr {other} dev out0"))?;
        }
        gateway.ip("route add default via 192.0.2.2")?;
        gateway.ip("route add default via 2001:db8:f::2")?;
        let index = |device| gateway.ifindex(device);
        let (ingress, egress, loose) = (index("in0")?, index("out0")?, index("nic0")?);
        // Seconds until an association expires that nobody completes.
        gateway.sysctl("net.core.xfrm_acq_expires", "2")?;
        Ok(Self { gateway, _others: others, ingress, egress, loose })
    }

    /// Moves the calling thread into the namespace, for good.
    pub(super) fn join_this_thread(&self) -> Result<(), LabError> {
        self.gateway.join_this_thread()
    }

    /// Changes the port's link, and takes the change back.
    pub(super) fn change_port(&self, kind: u8) -> Result<(), LabError> {
        let changes = match kind {
            0 => ["link set in0 mtu 1400", "link set in0 mtu 1500"],
            _ => ["address add 10.77.0.1/32 dev in0", "address delete 10.77.0.1/32 dev in0"],
        };
        changes.iter().try_for_each(|change| self.gateway.ip(change).map(drop))
    }

    /// Adds a device and removes it.
    pub(super) fn change_devices(&self) -> Result<(), LabError> {
        self.gateway.ip("link add idle0 type veth peer name idle1")?;
        self.gateway.ip("link delete idle0").map(drop)
    }

    /// Runs command lines of `ip`, `nft` and `sysctl` on it.
    pub(super) fn run(&self, lines: &[String]) -> anyhow::Result<()> {
        lines.iter().try_for_each(|line| match line.strip_prefix("sysctl ") {
            Some(setting) => {
                let (key, value) = setting.split_once('=').context("a sysctl and its value")?;
                Ok(self.gateway.sysctl(key, value)?)
            }
            None => Ok(self.gateway.run(line)?),
        })
    }

    /// Gives lines to `ip -batch`.
    pub(super) fn batch(&self, lines: &str) -> Result<(), LabError> {
        lab::batch(&["-n", self.gateway.name()], lines)
    }

    /// Takes the device down, or brings it back. Returns when the kernel has done so.
    pub(super) fn set_loose(&self, up: bool) -> Result<(), LabError> {
        self.gateway.ip(if up { "link set nic0 up" } else { "link set nic0 down" }).map(drop)
    }
}
