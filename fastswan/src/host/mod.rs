//! What the host does with addresses: links, routes, rules, neighbours, learnt path MTUs and the sysctls that matter.
//!
//! [`HostFacts`] are plain data. A [`HostSource`](crate::HostSource) tells them, first all, then again after each change:
//! `NetlinkHost` follows the kernel's, [`VouchedHost`](crate::VouchedHost) has those that the embedder states. The
//! [`Compiler`](crate::Compiler) takes from them which addresses inside a policy are not forwarded to the
//! policy's device, and how the policy's packets leave; [`HostFacts::ports`] says from where packets may be
//! fast.

mod broken;
mod error;
mod event;
pub mod hooks;
pub(crate) mod path_mtu;
mod port;
mod route;
pub(crate) mod routing;
mod rule;
mod trie;

use std::net::{IpAddr, Ipv4Addr};

#[cfg(feature = "broken-rules")]
pub use self::broken::BrokenHostRule;
#[cfg(all(feature = "netlink", not(feature = "broken-rules")))]
pub(crate) use self::broken::BrokenHostRule;
pub use self::{
    error::HostError,
    event::{HostChange, HostEvent, HostStaleCause},
    hooks::{Hook, HookKind, HookPlace, Hooks, ParseHookKindError},
    path_mtu::PathMtu,
    port::{Forwards, Port, ReversePath},
    route::{Route, RouteKind},
    rule::{Rule, RuleAction, RuleSelector},
};
use crate::policy::{Family, MacAddr};

/// What is known about the host.
///
/// The default is that nothing is known, and then nothing is fast. An embedder that does not want fastswan to
/// know the host says so with [`HostFacts::vouched`].
///
/// ```
/// use fastswan::HostFacts;
/// use fastswan::host::{Forwards, Link};
///
/// let lan = Link {
///     ifindex: 2,
///     name: "lan0".to_owned(),
///     address: Some("02:00:5e:10:00:01".parse()?),
///     up: true,
///     carrier: true,
///     forwards: Forwards { v4: true, v6: false },
///     ..Link::default()
/// };
/// let host = HostFacts { links: vec![lan], ..HostFacts::vouched() };
/// assert_eq!(host.ifindex("lan0"), Some(2));
/// assert_eq!(host.ports(2).len(), 1, "frames without a VLAN tag");
/// # Ok::<(), fastswan::policy::ParseMacAddrError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Network interfaces.
    pub links: Vec<Link>,
    /// Routes of all tables.
    pub routes: Vec<Route>,
    /// Rules that say which table is looked up. A family without rules is one that nothing is known about.
    pub rules: Vec<Rule>,
    /// Neighbours with a known Ethernet address.
    pub neighbours: Vec<Neighbour>,
    /// Path MTUs that the kernel has learnt, one for each address at most. Packets to an address inside a policy for which there
    /// is one pass, unless it is no less than the MTU of the device; that of a tunnel's outer destination limits how long the
    /// policy's packets may be.
    pub path_mtus: Vec<PathMtu>,
    /// Families of which more path MTUs may have been learnt than are in [`Self::path_mtus`]: of these, only packets are fast
    /// that are no longer than any path MTU can be (68 bytes for IPv4, 1280 for IPv6).
    pub unclear_path_mtus: Vec<Family>,
    /// The host's own IPv4 addresses, each once, on whatever device and whether that is up or not. The kernel drops what comes
    /// from one of them even where no route says that it is the host's (`fib_validate_source`); IPv6 forwards it.
    pub addresses: Vec<Ipv4Addr>,
    /// What may change the fate of packets on their way. What one of them may concern is not fast; [`Self::allow`] takes out
    /// those that may be skipped.
    pub hooks: Vec<Hook>,
    /// The embedder answers for what routes would tell; see [`HostFacts::vouched`].
    pub vouched: bool,
}

impl HostFacts {
    /// Facts of an embedder that answers for them itself.
    ///
    /// It states that the host forwards every packet that a policy matches to the policy's device: that no
    /// destination inside a policy is the host's own, broadcast or unroutable, that no source is the host's
    /// own, and that the outer destination is reached through the device. It states that no path MTU is learnt that
    /// matters, too. Routes and path MTUs are then not looked at. A link
    /// that is not listed is taken to be up, but how long its packets may be is not known, so its policies need
    /// [`Egress::max_length`](crate::policy::Egress::max_length).
    #[must_use]
    pub fn vouched() -> Self {
        Self { vouched: true, ..Self::default() }
    }

    /// The link with this interface index.
    #[must_use]
    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }

    /// The interface index of the link with this name.
    #[must_use]
    pub fn ifindex(&self, name: &str) -> Option<u32> {
        self.links.iter().find(|link| link.name == name).map(|link| link.ifindex)
    }

    /// The port for frames that arrive on an interface with a VLAN tag, or, for 0, without one.
    ///
    /// `None` if the kernel does not give such frames to its IP layer, or may not: no such interface or VLAN
    /// device, a device that is down, has no carrier or no Ethernet address, a member of a bridge, bond or VRF, one whose
    /// frames go to a [device on it](Link::takes_frames), here or [in another network namespace](Link::taken_elsewhere), or one
    /// with a hook where packets come in.
    #[must_use]
    pub fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        let device = self.link(ifindex)?;
        let is_tagged = |link: &&Link| link.parent == Some(ifindex) && link.vlan == Some(vlan);
        let tagged = self.links.iter().find(is_tagged);
        let receiver = match (vlan, tagged) {
            (0, None) => device,
            // A device for VLAN 0 takes the priority-tagged frames, but not the untagged ones.
            (0, Some(_)) | (_, None) => return None,
            (_, Some(link)) => link,
        };
        let is_on = |link: &Link| link.up && link.carrier;
        if !is_on(device) || !is_on(receiver) {
            return None;
        }
        // A frame with a tag is first the device's, and then that of the VLAN device.
        if self.is_taken(device) || self.is_taken(receiver) {
            return None;
        }
        if self.ingress_hook(device.ifindex, receiver.ifindex).is_some() {
            return None;
        }
        Some(Port {
            ifindex,
            vlan,
            receiver: receiver.ifindex,
            address: receiver.address?,
            forwards: receiver.forwards,
            reverse_path: receiver.reverse_path,
        })
    }

    /// Whether another device takes frames of a link, or may.
    fn is_taken(&self, link: &Link) -> bool {
        let is_taken_by = |other: &Link| other.is_on_and_takes_frames_of(link);
        link.controller.is_some() || link.taken_elsewhere || self.links.iter().any(is_taken_by)
    }

    /// All ports of an interface: without a VLAN tag, and with that of each VLAN device on it.
    #[must_use]
    pub fn ports(&self, ifindex: u32) -> Vec<Port> {
        let mut vlans: Vec<u16> = self
            .links
            .iter()
            .filter(|link| link.parent == Some(ifindex))
            .filter_map(|link| link.vlan)
            .chain([0])
            .collect();
        vlans.sort_unstable();
        vlans.dedup();
        vlans.into_iter().filter_map(|vlan| self.port(ifindex, vlan)).collect()
    }

    /// What may change the fate of frames that arrive on an interface with a VLAN tag, or, for 0, without one, before they
    /// are forwarded.
    #[must_use]
    pub fn hook_at(&self, ifindex: u32, vlan: u16) -> Option<&Hook> {
        let receiver = self.links.iter().find(|link| link.parent == Some(ifindex) && link.vlan == Some(vlan));
        self.ingress_hook(ifindex, receiver.map_or(ifindex, |link| link.ifindex))
    }

    /// Takes out the hooks of kinds that may be skipped, and returns them.
    pub fn allow(&mut self, hooks: Hooks) -> Vec<Hook> {
        self.hooks.extract_if(.., |hook| hooks.allows(hook.kind)).collect()
    }

    /// An XDP program on the device itself is ours, or keeps ours from being attached. What arrives on a bond has come in on
    /// one of its members.
    fn ingress_hook(&self, device: u32, receiver: u32) -> Option<&Hook> {
        let is_member = |ifindex| self.link(ifindex).is_some_and(|link| link.controller == Some(device));
        self.hooks.iter().find(|hook| match hook.place {
            HookPlace::Ingress(ifindex) if ifindex == device => hook.kind != HookKind::Xdp,
            HookPlace::Ingress(ifindex) => ifindex == receiver || is_member(ifindex),
            _ => false,
        })
    }

    /// Takes up a change. Looks at all links, routes, rules, neighbours, path MTUs or addresses, whichever it is about.
    pub fn apply(&mut self, change: HostChange) {
        match change {
            HostChange::Link(link) => {
                match self.links.iter_mut().find(|other| other.ifindex == link.ifindex) {
                    Some(other) => *other = link,
                    None => self.links.push(link),
                }
            }
            HostChange::LinkGone(ifindex) => self.links.retain(|link| link.ifindex != ifindex),
            HostChange::Routes { table, destination, routes } => {
                self.routes.retain(|route| (route.table, route.destination) != (table, destination));
                self.routes.extend(routes);
            }
            HostChange::Rules(family, rules) => {
                self.rules.retain(|rule| rule.family != family);
                self.rules.extend(rules);
            }
            HostChange::Neighbour(neighbour) => {
                self.forget_neighbour(neighbour.ifindex, neighbour.destination);
                self.neighbours.push(neighbour);
            }
            HostChange::NeighbourGone { ifindex, destination } => self.forget_neighbour(ifindex, destination),
            HostChange::PathMtu(learnt) => {
                self.forget_path_mtu(learnt.destination);
                self.path_mtus.push(learnt);
            }
            HostChange::PathMtuGone(destination) => self.forget_path_mtu(destination),
            HostChange::UnclearPathMtus(families) => self.unclear_path_mtus = families,
            HostChange::Address(own) => {
                if !self.addresses.contains(&own) {
                    self.addresses.push(own);
                }
            }
            HostChange::AddressGone(own) => self.addresses.retain(|other| *other != own),
            HostChange::Hooks(hooks) => self.hooks = hooks,
            // What a device can do is not among these facts.
            HostChange::Device { .. } => {}
        }
    }

    fn forget_neighbour(&mut self, ifindex: u32, destination: IpAddr) {
        self.neighbours.retain(|other| (other.ifindex, other.destination) != (ifindex, destination));
    }

    fn forget_path_mtu(&mut self, destination: IpAddr) {
        self.path_mtus.retain(|other| other.destination != destination);
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// What the kernel calls its kind (`IFLA_INFO_KIND`), as in `ip link add type`; empty for hardware.
    pub kind: String,
    /// Ethernet address, if it has one.
    pub address: Option<MacAddr>,
    /// Longest packet in bytes, from the IP header on.
    pub mtu: u32,
    /// The same for IPv6, which may be less (`net.ipv6.conf.*.mtu`).
    pub mtu_v6: u32,
    /// It is switched on.
    pub up: bool,
    /// Its lower layer is up.
    pub carrier: bool,
    /// The interface below it, as a VLAN device has.
    pub parent: Option<u32>,
    /// It takes frames that are for its parent, or may: an ipvlan device, or a macvlan device whose mode is `passthru` or
    /// `source`. In the other modes that takes those for its own address.
    pub takes_frames: bool,
    /// A device of another network namespace takes its frames, or may.
    pub taken_elsewhere: bool,
    /// The VLAN id of an IEEE 802.1Q device on its parent.
    pub vlan: Option<u16>,
    /// The bridge, bond or VRF that it is a member of.
    pub controller: Option<u32>,
    /// Which families are forwarded from it.
    pub forwards: Forwards,
    /// Its reverse path filter for IPv4, the stricter of its own and everyone's.
    pub reverse_path: ReversePath,
    /// IPv4 packets that leave through it bypass IPsec (`net.ipv4.conf.*.disable_xfrm`). IPv6 has no such
    /// switch.
    pub bypasses_xfrm: bool,
}

impl Link {
    /// Longest packet of a family in bytes, from the IP header on.
    #[must_use]
    pub fn mtu(&self, family: Family) -> u32 {
        match family {
            Family::V4 => self.mtu,
            Family::V6 => self.mtu.min(self.mtu_v6),
        }
    }

    /// Whether it is on another link and takes frames that are for that one, or may. The kernel looks for a macvlan device with
    /// the address first.
    pub(crate) fn is_on_and_takes_frames_of(&self, below: &Self) -> bool {
        let is_macvlan = matches!(self.kind.as_str(), "macvlan" | "macvtap");
        let takes_frames = self.takes_frames || is_macvlan && self.address == below.address;
        takes_frames && self.parent == Some(below.ifindex)
    }
}

/// A neighbour whose Ethernet address is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Interface index of the device it is reached through.
    pub ifindex: u32,
    /// Its address.
    pub destination: IpAddr,
    /// Its Ethernet address.
    pub address: MacAddr,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, name: &str) -> Link {
        Link {
            ifindex,
            name: name.to_owned(),
            address: Some(MacAddr([2, 0, 0, 0, 0, u8::try_from(ifindex).unwrap()])),
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            carrier: true,
            ..Link::default()
        }
    }

    fn vlan(ifindex: u32, id: u16) -> Link {
        Link { kind: "vlan".to_owned(), parent: Some(1), vlan: Some(id), ..link(ifindex, "vlan") }
    }

    fn receivers(links: &[Link]) -> Vec<(u16, u32)> {
        let host = HostFacts { links: links.to_vec(), ..HostFacts::default() };
        host.ports(1).iter().map(|port| (port.vlan, port.receiver)).collect()
    }

    #[test]
    fn an_interface_has_a_port_for_untagged_frames_and_one_for_each_vlan_device() {
        let links = [link(1, "lan"), vlan(3, 20), vlan(4, 10), Link { parent: Some(9), ..vlan(5, 30) }];
        assert_eq!(receivers(&links), [(0, 1), (10, 4), (20, 3)]);
        let host = HostFacts { links: links.to_vec(), ..HostFacts::default() };
        assert_eq!(host.ifindex("lan"), Some(1));
        assert_eq!(host.ifindex("wan"), None);
        assert_eq!(host.port(1, 30), None, "that VLAN is on another interface");
        assert_eq!(host.port(1, 10).map(|port| port.address), links[2].address);
    }

    #[test]
    fn frames_that_go_to_a_bridge_or_may_be_another_devices_have_no_port() {
        assert_eq!(receivers(&[Link { controller: Some(8), ..link(1, "lan") }, vlan(3, 20)]), []);
        assert_eq!(receivers(&[link(1, "lan"), Link { controller: Some(8), ..vlan(3, 20) }]), [(0, 1)]);
        let container = Link { parent: Some(1), ..link(3, "container") };
        let ipvlan = Link { kind: "ipvlan".to_owned(), takes_frames: true, ..container.clone() };
        assert_eq!(receivers(&[link(1, "lan"), ipvlan]), []);
        let macvlan = Link { kind: "macvlan".to_owned(), ..container };
        assert_eq!(
            receivers(&[link(1, "lan"), macvlan.clone()]),
            [(0, 1)],
            "it takes those for its own address"
        );
        let address = link(1, "lan").address;
        assert_eq!(receivers(&[link(1, "lan"), Link { address, ..macvlan }]), [], "that is the port's");
        assert_eq!(receivers(&[link(1, "lan"), vlan(3, 0)]), [], "who takes which frame is not clear");
    }

    #[test]
    fn frames_that_a_device_on_the_vlan_device_or_one_of_another_namespace_takes_have_no_port() {
        let passthru = |parent| Link {
            kind: "macvlan".to_owned(),
            takes_frames: true,
            parent: Some(parent),
            ..link(4, "mac")
        };
        assert_eq!(receivers(&[link(1, "lan"), vlan(3, 20), passthru(3)]), [(0, 1)]);
        assert_eq!(receivers(&[link(1, "lan"), vlan(3, 20), passthru(1)]), [], "with their tags");
        let taken = |link| Link { taken_elsewhere: true, ..link };
        assert_eq!(receivers(&[link(1, "lan"), taken(vlan(3, 20))]), [(0, 1)]);
        assert_eq!(receivers(&[taken(link(1, "lan")), vlan(3, 20)]), []);
    }

    #[test]
    fn a_device_with_a_hook_has_no_port() {
        let hook = |kind, place| Hook { kind, place, name: "drop".to_owned() };
        let links = [link(1, "lan"), vlan(3, 20)];
        let with = |kind, place| {
            let hooks = vec![hook(kind, place)];
            let mut host = HostFacts { links: links.to_vec(), hooks, ..HostFacts::default() };
            let ports: Vec<_> = host.ports(1).iter().map(|port| port.vlan).collect();
            assert!([0, 20].iter().all(|vlan| host.hook_at(1, *vlan).is_some() != ports.contains(vlan)));
            assert_eq!(host.allow(Hooks::none()), []);
            assert_eq!(host.allow(Hooks::none().allow(kind)).len(), 1);
            assert_eq!(host.ports(1).len(), 2, "allowed");
            ports
        };
        assert_eq!(with(HookKind::Tc, HookPlace::Ingress(1)), [0; 0]);
        assert_eq!(with(HookKind::Tc, HookPlace::Ingress(3)), [0]);
        assert_eq!(with(HookKind::Xdp, HookPlace::Ingress(1)), [0, 20], "ours");
        assert_eq!(with(HookKind::Xdp, HookPlace::Ingress(3)), [0]);
        assert_eq!(with(HookKind::Tc, HookPlace::Egress(1)), [0, 20]);
        assert_eq!(with(HookKind::NfTables, HookPlace::Forwarding(None)), [0, 20], "not its business");

        let hooks = vec![hook(HookKind::Tc, HookPlace::Ingress(4))];
        let links = vec![link(1, "bond"), Link { controller: Some(1), ..link(4, "member") }];
        let host = HostFacts { links, hooks, ..HostFacts::default() };
        assert_eq!(host.port(1, 0), None, "frames come in on the member");
    }

    #[test]
    fn a_device_that_is_down_or_without_an_address_has_no_port() {
        assert_eq!(receivers(&[Link { up: false, ..link(1, "lan") }, vlan(3, 20)]), []);
        assert_eq!(receivers(&[link(1, "lan"), Link { up: false, ..vlan(3, 20) }]), [(0, 1)]);
        assert_eq!(receivers(&[Link { address: None, ..link(1, "tun") }]), []);
        assert_eq!(receivers(&[]), []);
    }
}
