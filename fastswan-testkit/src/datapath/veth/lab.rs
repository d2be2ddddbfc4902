//! A client, a gateway and a peer, in a row.

use fastswan::policy::MacAddr;
use fastswan_testkit_ebpf::{NEXT_HOP, PORT, SENDER};

use super::super::lab::{Devices, LOCAL};
use crate::lab::{End, LabError, Namespace, introduce, ip, join_with_queues};

/// The gateway's device that faces the client.
pub(super) const LAN: &str = "lan0";
/// The gateway's device that faces the peer.
const OUT: &str = "out0";
/// The device of client and peer.
pub(super) const ETH: &str = "eth0";
const PEER: &str = "192.0.2.2";

/// The three hosts. The gateway's kernel forwards all packets to the peer.
#[derive(Debug)]
pub(super) struct VethLab {
    pub(super) client: Namespace,
    pub(super) gateway: Namespace,
    pub(super) peer: Namespace,
}

impl VethLab {
    /// Makes them, with a queue of each device for each of these CPUs.
    pub(super) fn new(cpus: &[usize]) -> Result<Self, LabError> {
        // What XDP sends goes to the queue with the number of the CPU.
        let queues = cpus.iter().max().map_or(1, |cpu| u32::try_from(cpu + 1).unwrap_or(u32::MAX));
        let lab = Self {
            client: Namespace::new("client")?,
            gateway: Namespace::new("gateway")?,
            peer: Namespace::new("peer")?,
        };
        let (out_address, peer_address) = (format!("{LOCAL}/24"), format!("{PEER}/24"));
        let (out_addresses, peer_addresses) = ([out_address.as_str()], [peer_address.as_str()]);
        let end = |namespace, device, mac| End { namespace, device, mac: MacAddr(mac), addresses: &[] };
        let client = end(&lab.client, ETH, SENDER);
        // Programs write the Ethernet address of the port that they know, and it is both.
        let lan = end(&lab.gateway, LAN, PORT);
        let out = End { addresses: &out_addresses, ..end(&lab.gateway, OUT, PORT) };
        let peer = End { addresses: &peer_addresses, ..end(&lab.peer, ETH, NEXT_HOP) };
        for (one, other) in [(client, lan), (out, peer)] {
            join_with_queues(queues, one, other, 1500)?;
            introduce(one, other)?;
        }
        if queues > 1 {
            cpus.iter().try_for_each(|cpu| lab.send_from_own_queue(*cpu))?;
        }
        lab.gateway.forward()?;
        lab.gateway.ip(&format!("route add default via {PEER}"))?;
        Ok(lab)
    }

    /// Has the gateway's kernel, too, send from the queue with the number of the CPU, and not from one that it chooses by a
    /// hash of the packet.
    fn send_from_own_queue(&self, cpu: usize) -> Result<(), LabError> {
        let mask = format!("{:x}{}", 1_u32 << (cpu % 32), ",00000000".repeat(cpu / 32));
        let script = format!("echo {mask} > /sys/class/net/{OUT}/queues/tx-{cpu}/xps_cpus");
        // It mounts the sysfs of the namespace.
        ip(&["netns", "exec", self.gateway.name(), "sh", "-c", &script]).map(drop)
    }

    /// The gateway's devices.
    pub(super) fn devices(&self) -> Result<Devices, LabError> {
        Ok(Devices { ingress: self.gateway.ifindex(LAN)?, egress: self.gateway.ifindex(OUT)? })
    }
}
