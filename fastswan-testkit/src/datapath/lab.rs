//! The device that frames come in on and leave by.

use fastswan::policy::MacAddr;
use fastswan_testkit_ebpf::{NEXT_HOP, PORT};

use crate::lab::{End, LabError, Namespace, join};

/// Name of the device.
const DEVICE: &str = "port0";
/// The outer source of all tunnels.
pub(super) const LOCAL: &str = "192.0.2.1";
pub(super) const LOCAL_V6: &str = "2001:db8:f::1";

/// The devices of a gateway that packets come in on and leave by: their interface indices, which may be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Devices {
    pub(super) ingress: u32,
    pub(super) egress: u32,
}

/// A gateway with one device, by which its kernel forwards everything: it is asked about some packets.
#[derive(Debug)]
pub struct DatapathLab {
    gateway: Namespace,
    _neighbour: Namespace,
}

impl DatapathLab {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// [`LabError`], for instance without root.
    pub fn new() -> Result<Self, LabError> {
        let (gateway, neighbour) = (Namespace::new("gateway")?, Namespace::new("neighbour")?);
        let (v4, v6) = (format!("{LOCAL}/24"), format!("{LOCAL_V6}/64"));
        let here = End {
            namespace: &gateway,
            device: DEVICE,
            mac: MacAddr(PORT),
            addresses: &[v4.as_str(), v6.as_str()],
        };
        let there = End { namespace: &neighbour, device: "eth0", mac: MacAddr(NEXT_HOP), addresses: &[] };
        join(here, there, 1500)?;
        gateway.forward()?;
        gateway.ip(&format!("route add default dev {DEVICE}"))?;
        gateway.ip(&format!("-6 route add default dev {DEVICE}"))?;
        Ok(Self { gateway, _neighbour: neighbour })
    }

    /// Runs something in the gateway, with the interface index of its device.
    ///
    /// # Errors
    ///
    /// [`LabError`] if there is no such device.
    pub fn enter<T: Send>(&self, story: impl FnOnce(u32) -> T + Send) -> Result<T, LabError> {
        let device = self.gateway.ifindex(DEVICE)?;
        Ok(self.gateway.enter(|| story(device)))
    }
}
