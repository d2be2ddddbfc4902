//! A gateway with two devices.

use fastswan::policy::MacAddr;
use fastswan_testkit_ebpf::{NEXT_HOP, PORT};

use crate::lab::{End, LabError, Namespace, join};

/// A gateway with two devices that packets leave by; they come in on the first.
#[derive(Debug)]
pub struct VerdictLab {
    gateway: Namespace,
    _neighbour: Namespace,
}

impl VerdictLab {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// [`LabError`], for instance without root.
    pub fn new() -> Result<Self, LabError> {
        let (gateway, neighbour) = (Namespace::new("gateway")?, Namespace::new("neighbour")?);
        for (here, there) in Self::DEVICES.into_iter().zip(["eth0", "eth1"]) {
            let here = End { namespace: &gateway, device: here, mac: MacAddr(PORT), addresses: &[] };
            let there = End { namespace: &neighbour, device: there, mac: MacAddr(NEXT_HOP), addresses: &[] };
            join(here, there, 1500)?;
        }
        Ok(Self { gateway, _neighbour: neighbour })
    }

    const DEVICES: [&str; 2] = ["port0", "port1"];

    /// Runs something in the gateway, with the interface indices of its devices.
    ///
    /// # Errors
    ///
    /// [`LabError`] if there are none.
    pub fn enter<T: Send>(&self, story: impl FnOnce([u32; 2]) -> T + Send) -> Result<T, LabError> {
        let [first, second] = Self::DEVICES;
        let devices = [self.gateway.ifindex(first)?, self.gateway.ifindex(second)?];
        Ok(self.gateway.enter(|| story(devices)))
    }
}
