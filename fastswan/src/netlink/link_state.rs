//! What the kernel says about a link, its sysctls among it: a message about a link carries them (`IFLA_AF_SPEC`).

use super::wire::{CutOff, attributes, ethernet_address, family, i32_at, text, u16_at, u32_at};
use crate::{
    host::Link,
    policy::Family,
    table::{Forwards, ReversePath},
};

const LINK_LENGTH: usize = 16;
const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_WIRELESS: u16 = 11;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_NEW_NETNSID: u16 = 45;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_MACVLAN_MODE: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;
const ETH_P_8021Q: [u8; 2] = [0x81, 0];
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_CONF: u16 = 2;

/// Positions in the array of `net.ipv4.conf.*` (`IPV4_DEVCONF_*` less 1) and of `net.ipv6.conf.*` (`DEVCONF_*`).
const FORWARDING_V4: usize = 0;
const RP_FILTER: usize = 7;
const NOXFRM: usize = 14;
const MTU6: usize = 2;
const DISABLE_IPV6: usize = 26;

/// A netconf message (`linux/netconf.h`): its fixed part with its padding, and attributes.
const NETCONF_LENGTH: usize = 4;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
const NETCONFA_RP_FILTER: u16 = 3;
const NETCONFA_IFINDEX_ALL: i32 = -1;

/// A link as its messages tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkState {
    /// Without what sysctls say.
    link: Link,
    /// The network namespace of the interface below it, if it is another one than its own, as the socket's namespace numbers
    /// it; and the index of that interface there.
    below_elsewhere: Option<(i32, u32)>,
    pub(crate) conf: Conf,
}

/// The sysctls of a link. `None` if there are none, and then they count as the values that make nothing fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Conf {
    v4: Option<ConfV4>,
    v6: Option<ConfV6>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ConfV4 {
    forwarding: bool,
    rp_filter: u32,
    disable_xfrm: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ConfV6 {
    mtu: u32,
    disabled: bool,
}

/// The sysctls of the whole host: `net.*.conf.all`. `None` is one that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Everywhere {
    pub(super) rp_filter: Option<u32>,
    pub(super) disable_xfrm: Option<u32>,
    pub(super) forwarding_v6: Option<u32>,
}

/// What a message about links says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkTold {
    Is(LinkState),
    Gone(LinkState),
    /// It is in another network namespace now.
    Moved(LinkState),
    /// IPv6 has other settings for it.
    Conf6(u32, Conf),
    /// Nothing that matters.
    Nothing,
}

impl LinkTold {
    /// Reads it.
    pub(crate) fn read(is_gone: bool, payload: &[u8]) -> Result<Self, CutOff> {
        let cut_off = CutOff { object: "a link" };
        let ifindex = u32_at(payload, 4).ok_or(cut_off)?;
        let flags = u32_at(payload, 8).ok_or(cut_off)?;
        if payload.len() < LINK_LENGTH {
            return Err(cut_off);
        }
        match i32::from(payload[0]) {
            libc::AF_UNSPEC => {}
            libc::AF_INET6 if !is_gone => {
                let conf = attributes(payload, LINK_LENGTH).find(|(kind, _)| *kind == IFLA_PROTINFO);
                let v6 = conf.and_then(|(_, value)| ConfV6::read(value));
                return Ok(
                    v6.map_or(Self::Nothing, |v6| Self::Conf6(ifindex, Conf { v4: None, v6: Some(v6) }))
                );
            }
            // Those of other families are about ports of bridges.
            _ => return Ok(Self::Nothing),
        }
        let mut link =
            Link { ifindex, up: flags & IFF_UP != 0, carrier: flags & IFF_LOWER_UP != 0, ..Link::default() };
        let mut conf = Conf::default();
        let (mut parent_namespace, mut has_moved, mut data) = (None, false, None);
        for (kind, value) in attributes(payload, LINK_LENGTH) {
            let number = u32_at(value, 0);
            match kind {
                IFLA_IFNAME => link.name = text(value),
                IFLA_ADDRESS => link.address = ethernet_address(value),
                IFLA_MTU => link.mtu = number.unwrap_or_default(),
                IFLA_LINK => link.parent = number.filter(|parent| *parent != 0),
                // Of an unknown namespace -1, and then it is elsewhere all the same.
                IFLA_LINK_NETNSID => parent_namespace = Some(i32_at(value, 0).unwrap_or(-1)),
                IFLA_NEW_NETNSID => has_moved = true,
                IFLA_MASTER => link.controller = number.filter(|controller| *controller != 0),
                IFLA_LINKINFO => {
                    for (kind, value) in attributes(value, 0) {
                        match kind {
                            IFLA_INFO_KIND => link.kind = text(value),
                            IFLA_INFO_DATA => data = Some(value),
                            _ => {}
                        }
                    }
                }
                IFLA_AF_SPEC => conf = Conf::read(value),
                // An event of a wireless device, with nothing about the link.
                IFLA_WIRELESS if !is_gone => return Ok(Self::Nothing),
                _ => {}
            }
        }
        let mut below_elsewhere = None;
        if let Some(namespace) = parent_namespace {
            below_elsewhere = link.parent.take().map(|parent| (namespace, parent));
        }
        link.vlan = data.filter(|_| link.kind == "vlan").and_then(vlan_id);
        link.takes_frames = match link.kind.as_str() {
            "ipvlan" | "ipvtap" => true,
            "macvlan" | "macvtap" => !data.and_then(macvlan_mode).is_some_and(is_by_address),
            _ => false,
        };
        let state = LinkState { link, below_elsewhere, conf };
        Ok(match (is_gone, has_moved) {
            (false, _) => Self::Is(state),
            (true, false) => Self::Gone(state),
            (true, true) => Self::Moved(state),
        })
    }
}

fn vlan_id(data: &[u8]) -> Option<u16> {
    let id = u16_at(find(data, IFLA_VLAN_ID)?, 0);
    id.filter(|_| find(data, IFLA_VLAN_PROTOCOL) == Some(&ETH_P_8021Q))
}

fn macvlan_mode(data: &[u8]) -> Option<u32> {
    u32_at(find(data, IFLA_MACVLAN_MODE)?, 0)
}

/// Whether a macvlan device takes frames by their destination address alone: `private`, `vepa`, `bridge`.
fn is_by_address(mode: u32) -> bool {
    matches!(mode, 1 | 2 | 4)
}

fn find(data: &[u8], sought: u16) -> Option<&[u8]> {
    attributes(data, 0).find(|(kind, _)| *kind == sought).map(|(_, value)| value)
}

impl Conf {
    fn read(families: &[u8]) -> Self {
        let mut conf = Self::default();
        for (kind, value) in attributes(families, 0) {
            match u8::try_from(kind).ok().and_then(family) {
                Some(Family::V4) => conf.v4 = ConfV4::read(value),
                Some(Family::V6) => conf.v6 = ConfV6::read(value),
                None => {}
            }
        }
        conf
    }
}

impl ConfV4 {
    fn read(attribute: &[u8]) -> Option<Self> {
        let (_, conf) = attributes(attribute, 0).find(|(kind, _)| *kind == IFLA_INET_CONF)?;
        let at = |position: usize| u32_at(conf, position * 4);
        Some(Self {
            forwarding: at(FORWARDING_V4)? != 0,
            rp_filter: at(RP_FILTER)?,
            disable_xfrm: at(NOXFRM)? != 0,
        })
    }
}

impl ConfV6 {
    fn read(attribute: &[u8]) -> Option<Self> {
        let (_, conf) = attributes(attribute, 0).find(|(kind, _)| *kind == IFLA_INET6_CONF)?;
        let at = |position: usize| u32_at(conf, position * 4);
        Some(Self { mtu: at(MTU6)?, disabled: at(DISABLE_IPV6)? != 0 })
    }
}

impl LinkState {
    pub(crate) fn ifindex(&self) -> u32 {
        self.link.ifindex
    }

    /// Of a link in another network namespace whose parent is in ours, as though it were here, by the number that ours has
    /// for itself; `None` if its parent is not.
    pub(crate) fn seen_from(mut self, ours: i32) -> Option<Self> {
        self.link.parent = Some(self.below_elsewhere?).filter(|below| below.0 == ours).map(|below| below.1);
        self.link.parent.is_some().then_some(self)
    }

    /// Whether it takes frames that are for another link, or may.
    pub(crate) fn takes_frames_of(&self, below: &Self) -> bool {
        self.link.is_on_and_takes_frames_of(&below.link)
    }

    /// Whether what is sent to it may leave.
    pub(crate) fn is_usable(&self) -> bool {
        self.link.up && self.link.carrier
    }

    pub(crate) fn is_up(&self) -> bool {
        self.link.up
    }

    pub(crate) fn mtus(&self) -> (u32, Option<u32>) {
        (self.link.mtu, self.conf.v6.map(|v6| v6.mtu))
    }

    /// With what its sysctls and those of the whole host say together.
    pub(crate) fn link(&self, everywhere: &Everywhere, has_address_v4: bool) -> Link {
        let Conf { v4, v6 } = self.conf;
        // IN_DEV_RPFILTER: the greater of both counts.
        let filters = [everywhere.rp_filter, v4.map(|v4| v4.rp_filter)].map(|filter| filter.unwrap_or(1));
        Link {
            mtu_v6: v6.map_or(0, |v6| v6.mtu),
            // Forwarding is a property of each device for IPv4, but of the host for IPv6 (`ip6_forward`). A device can be made
            // to forward although the host does not (Linux 6.17), but then it is the neighbours who decide between routes.
            forwards: Forwards {
                v4: v4.is_some_and(|v4| v4.forwarding),
                v6: v6.is_some_and(|v6| !v6.disabled) && everywhere.forwarding_v6.unwrap_or(0) != 0,
            },
            reverse_path: match filters.into_iter().max() {
                Some(0) => ReversePath::Off,
                // Loose is strict on a device without an address (`__fib_validate_source`).
                Some(2) if has_address_v4 => ReversePath::Loose,
                _ => ReversePath::Strict,
            },
            // IN_DEV_NOXFRM: either counts.
            bypasses_xfrm: everywhere.disable_xfrm != Some(0) || v4.is_none_or(|v4| v4.disable_xfrm),
            ..self.link.clone()
        }
    }

    /// Takes up the sysctls of IPv6.
    pub(crate) fn set_conf6(&mut self, conf: Conf) {
        self.conf.v6 = conf.v6;
    }
}

/// What a message about sysctls says (`RTM_NEWNETCONF`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConfTold {
    family: Family,
    /// `None` is the whole host.
    pub(crate) ifindex: Option<u32>,
    forwarding: Option<u32>,
    rp_filter: Option<u32>,
}

impl ConfTold {
    /// Reads it; `None` if it is about neither a link nor the host.
    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let find = |sought| attributes(payload, NETCONF_LENGTH).find(|(kind, _)| *kind == sought);
        let number = |sought| find(sought).and_then(|(_, value)| u32_at(value, 0));
        let ifindex = match i32_at(find(NETCONFA_IFINDEX)?.1, 0)? {
            NETCONFA_IFINDEX_ALL => None,
            ifindex => Some(u32::try_from(ifindex).ok()?),
        };
        Some(Self {
            family: family(*payload.first()?)?,
            ifindex,
            forwarding: number(NETCONFA_FORWARDING),
            rp_filter: number(NETCONFA_RP_FILTER),
        })
    }

    pub(crate) fn change_link(&self, state: &mut LinkState) {
        match self.family {
            Family::V4 => {
                if let Some(v4) = &mut state.conf.v4 {
                    v4.forwarding = self.forwarding.map_or(v4.forwarding, |value| value != 0);
                    v4.rp_filter = self.rp_filter.unwrap_or(v4.rp_filter);
                }
            }
            Family::V6 => {}
        }
    }

    pub(crate) fn change_host(&self, everywhere: &mut Everywhere) {
        match self.family {
            Family::V4 => everywhere.rp_filter = self.rp_filter.or(everywhere.rp_filter),
            Family::V6 => everywhere.forwarding_v6 = self.forwarding.or(everywhere.forwarding_v6),
        }
    }
}
