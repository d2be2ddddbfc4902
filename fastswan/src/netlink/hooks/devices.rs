//! The devices of a network namespace: their names, and which VLAN devices run an XDP program.

use super::attribute::{Attributes, Body, host_u32, needed, text, undecodable};
use crate::{
    host::{Hook, HookKind, HookPlace},
    netlink::request::{DUMP, RequestError, Requests},
};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
/// Length of `struct ifinfomsg` in bytes.
const HEADER: usize = 16;
const IFF_UP: u32 = 1;
const ARPHRD_ETHER: u16 = 1;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const INFO_KIND: u16 = 1;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_XDP: u16 = 43;
const XDP_ATTACHED: u16 = 2;
/// `RTEXT_FILTER_SKIP_STATS`
const WITHOUT_STATISTICS: u32 = 8;

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Devices(Vec<Device>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    ifindex: u32,
    name: String,
    /// It is switched on and has an Ethernet address, so packets may come in or leave.
    is_of_use: bool,
    /// It is a VLAN device that runs an XDP program: frames that arrive with its tag meet that too.
    runs_xdp: bool,
}

impl Devices {
    pub(super) fn read(kernel: &mut Requests) -> Result<Self, RequestError> {
        let body = Body(vec![0; HEADER]).with(IFLA_EXT_MASK, &WITHOUT_STATISTICS.to_ne_bytes());
        let mut devices = Vec::new();
        kernel.ask((RTM_GETLINK, DUMP, &body.0), |kind, payload| {
            if kind == RTM_NEWLINK {
                devices.push(device(payload)?);
            }
            Ok::<_, RequestError>(())
        })?;
        Ok(Self(devices))
    }

    /// The interface indices of those whose names are wanted.
    pub(super) fn named(&self, wanted: impl Fn(&str) -> bool) -> Vec<u32> {
        self.0.iter().filter(|device| wanted(&device.name)).map(|device| device.ifindex).collect()
    }

    #[cfg(test)]
    pub(super) fn of(names: &[(u32, &str)]) -> Self {
        let device = |(ifindex, name): &(u32, &str)| Device {
            ifindex: *ifindex,
            name: (*name).to_owned(),
            is_of_use: true,
            runs_xdp: false,
        };
        Self(names.iter().map(device).collect())
    }

    /// The name of a device.
    pub(super) fn name(&self, ifindex: u32) -> String {
        let device = self.0.iter().find(|device| device.ifindex == ifindex);
        device.map_or_else(|| format!("#{ifindex}"), |device| device.name.clone())
    }

    /// The interface indices of those that packets may come in on, or leave by.
    pub(super) fn of_use(&self) -> impl Iterator<Item = u32> {
        self.0.iter().filter(|device| device.is_of_use).map(|device| device.ifindex)
    }

    /// XDP programs on VLAN devices. One on a device that ours is attached to there cannot be.
    pub(super) fn xdp(&self) -> Vec<Hook> {
        let running = self.0.iter().filter(|device| device.runs_xdp);
        let hooks = running.map(|device| Hook {
            kind: HookKind::Xdp,
            place: HookPlace::Ingress(device.ifindex),
            name: format!("the XDP program on {}", device.name),
        });
        hooks.collect()
    }
}

fn device(payload: &[u8]) -> Result<Device, RequestError> {
    let header = payload.first_chunk::<HEADER>().ok_or_else(|| undecodable("a link without a header"))?;
    let kind = u16::from_ne_bytes([header[2], header[3]]);
    let (mut name, mut is_vlan, mut runs_xdp) = (None, false, false);
    for attribute in Attributes::behind(payload, HEADER)? {
        match attribute? {
            (IFLA_IFNAME, value) => name = Some(text(value)),
            (IFLA_LINKINFO, value) => {
                for attribute in Attributes::inside(value) {
                    if let (INFO_KIND, kind) = attribute? {
                        is_vlan = text(kind) == "vlan";
                    }
                }
            }
            (IFLA_XDP, value) => {
                for attribute in Attributes::inside(value) {
                    if let (XDP_ATTACHED, mode) = attribute? {
                        runs_xdp = mode != [0];
                    }
                }
            }
            _ => {}
        }
    }
    Ok(Device {
        ifindex: host_u32(&header[4..8])?,
        name: needed(name, "the name of a link")?,
        is_of_use: host_u32(&header[8..12])? & IFF_UP != 0 && kind == ARPHRD_ETHER,
        runs_xdp: is_vlan && runs_xdp,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::hooks::attribute::tests::cuts;

    /// A link, of a kind, that runs an XDP program in this mode.
    fn link(kind: &str, mode: u8) -> Vec<u8> {
        let mut header = vec![0; HEADER];
        header[2] = 1;
        header[4] = 7;
        header[8] = 1;
        let nested = |kind, value: &[u8]| Body::default().with(kind, value).0;
        Body(header)
            .with(IFLA_IFNAME, b"lan0.10\0")
            .with(IFLA_XDP, &nested(XDP_ATTACHED, &[mode]))
            .with(IFLA_LINKINFO, &nested(INFO_KIND, kind.as_bytes()))
            .0
    }

    #[test]
    fn a_program_on_a_vlan_device_is_a_hook() {
        let hooks = |kind, mode| Devices(vec![device(&link(kind, mode)).unwrap()]).xdp();
        assert_eq!(hooks("vlan", 2)[0].place, HookPlace::Ingress(7));
        assert_eq!(hooks("vlan", 2)[0].name, "the XDP program on lan0.10");
        assert_eq!(hooks("vlan", 0), []);
        assert_eq!(hooks("veth", 2), [], "ours, or in the way of ours");
    }

    #[test]
    fn a_message_cut_short_is_an_error_unless_the_cut_is_between_attributes() {
        let payload = link("vlan", 1);
        for length in cuts(&payload, HEADER) {
            device(&payload[..length]).unwrap_err();
        }
        for length in 0..payload.len() {
            let _ = device(&payload[..length]);
            let mut changed = payload.clone();
            changed[length] = 0xff;
            let _ = device(&changed);
        }
    }
}
