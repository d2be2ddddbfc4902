//! Kinds of configuration: what is changed about a host, at random, and back.

mod devices;
mod hooks;
mod routes;
mod rules;

use super::draw::{Change, Draw};

/// One of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// How the host is changed.
    pub(super) change: fn(&mut Draw<'_>) -> Change,
    /// The kernel does not tell of it: it is to be known within the bound on what is polled.
    pub(super) is_silent: bool,
    /// It is about what can change a packet's fate behind routing.
    pub(super) is_hook: bool,
    /// The world is not used again, since what was done cannot be undone.
    pub(super) is_final: bool,
}

const fn kind(name: &'static str, change: fn(&mut Draw<'_>) -> Change) -> Kind {
    Kind { name, change, is_silent: false, is_hook: false, is_final: false }
}

impl Kind {
    const fn silent(mut self) -> Self {
        self.is_silent = true;
        self
    }

    const fn hook(mut self) -> Self {
        (self.is_hook, self.is_silent) = (true, true);
        self
    }

    const fn at_last(mut self) -> Self {
        self.is_final = true;
        self
    }
}

/// All of them.
pub(super) const KINDS: &[Kind] = &[
    kind("nothing", |_| Change::once([])),
    kind("route-denied", routes::denied),
    kind("route-elsewhere", routes::elsewhere),
    kind("route-same-device", routes::same_device),
    kind("route-throw", routes::throw),
    kind("route-tos", routes::tos),
    kind("route-tos-outer", routes::tos_outer),
    kind("route-outer", routes::outer),
    kind("route-metrics", routes::metrics),
    kind("route-mtu", routes::mtu),
    kind("route-replaced", routes::replaced),
    kind("route-local", routes::local),
    kind("route-linkdown", routes::linkdown).at_last(),
    kind("route-churn", routes::churn),
    kind("route-encap", routes::encap),
    kind("route-default", routes::default),
    kind("route-halves", routes::halves),
    kind("route-harmless", routes::harmless),
    kind("route-via-v6", routes::via_v6),
    kind("route-flush", routes::flush).at_last(),
    kind("nexthop-resilient", routes::nexthop_resilient),
    kind("nexthop-compat", routes::nexthop_compat),
    kind("v6-preference", routes::preference),
    kind("multipath-same-device", routes::multipath_same_device),
    kind("multipath", routes::multipath),
    kind("nexthop", routes::nexthop),
    kind("nexthop-replaced", routes::nexthop_replaced),
    kind("nexthop-group", routes::nexthop_group),
    kind("prefsrc-gone", routes::prefsrc_gone),
    kind("table-local", routes::table_local).at_last(),
    kind("table-unasked", routes::table_unasked),
    kind("v6-expires", routes::expires),
    kind("v6-source-specific", routes::source_specific),
    kind("v6-metrics", routes::metrics_v6),
    kind("v6-unreachable-default", routes::unreachable_default),
    kind("v6-router-fails", routes::router_fails),
    kind("source-denied", routes::source_denied),
    kind("rule-to", rules::to),
    kind("rule-from", rules::from),
    kind("rule-iif", rules::iif),
    kind("rule-oif", rules::oif),
    kind("rule-fwmark", rules::fwmark),
    kind("rule-tos", rules::tos),
    kind("rule-ports", rules::ports),
    kind("rule-goto", rules::goto),
    kind("rule-suppress", rules::suppress),
    kind("rule-denies", rules::denies),
    kind("rule-table", rules::table),
    kind("rule-order", rules::order),
    kind("rule-vpn", rules::vpn),
    kind("rule-local", rules::local).at_last(),
    kind("rule-l3mdev", rules::l3mdev),
    kind("rule-uid", rules::uid),
    kind("rule-group", rules::group),
    kind("rule-tunnel", rules::tunnel),
    kind("rule-flush", rules::flush).at_last(),
    kind("address-lifetime", devices::address_lifetime),
    kind("address-peer", devices::address_peer),
    kind("address-broadcast", devices::address_broadcast),
    kind("address-secondaries", devices::address_secondaries),
    kind("address-tentative", devices::address_tentative),
    kind("address-own", devices::address_own),
    kind("address-without-route", devices::address_without_route),
    kind("address-down", devices::address_down),
    kind("address-subnet", devices::address_subnet),
    kind("address-outer-lost", devices::address_outer_lost).at_last(),
    kind("address-promoted", devices::address_promoted).at_last(),
    kind("address-anycast", devices::anycast),
    kind("neighbour", devices::neighbour).at_last(),
    kind("neighbours-elsewhere", devices::neighbours_elsewhere),
    kind("link-flap", devices::flap).at_last(),
    kind("link-flap-unsaid", devices::flap_unsaid).at_last(),
    kind("link-renamed", devices::renamed).at_last(),
    kind("link-replaced", devices::replaced).at_last(),
    kind("link-carrier", devices::carrier).at_last(),
    kind("link-mtu", devices::mtu),
    kind("links-elsewhere", devices::links_elsewhere),
    kind("link-address", devices::link_address).at_last(),
    kind("forwarding-v4", devices::forwarding_v4),
    kind("forwarding-v6", devices::forwarding_v6),
    kind("force-forwarding", devices::force_forwarding).silent(),
    kind("rp-filter", devices::rp_filter),
    kind("rp-filter-loose-bare", devices::rp_filter_bare).at_last(),
    kind("disable-xfrm", devices::disable_xfrm).silent(),
    kind("sysctls-harmless", devices::harmless).silent(),
    kind("disable-policy", devices::disable_policy).silent(),
    kind("v6-mtu", devices::mtu_v6).silent(),
    kind("v6-disabled", devices::disable_ipv6).silent().at_last(),
    kind("macvlan", devices::macvlan),
    kind("macvlan-moved", devices::macvlan_moved).at_last(),
    kind("macvlan-elsewhere", devices::macvlan_elsewhere).silent().at_last(),
    kind("macvlan-tagged", devices::macvlan_tagged),
    kind("bridge", devices::bridge).at_last(),
    kind("proxy-ndp", devices::proxy_ndp).silent(),
    kind("proxy-arp", devices::proxy_arp).silent(),
    kind("router-advertisement", devices::advertisement).at_last(),
    kind("path-mtu", devices::path_mtu).at_last(),
    kind("vlan", devices::vlan),
    kind("vrf", devices::vrf).at_last(),
    kind("bond", devices::bond).at_last(),
    kind("ipvlan", devices::ipvlan),
    kind("dummy", devices::dummy),
    kind("xfrm-interface", devices::xfrm_interface),
    kind("tc", hooks::tc).hook(),
    kind("tc-queue", hooks::tc_queue).hook(),
    kind("tc-classes", hooks::tc_classes).hook(),
    kind("tc-flower", hooks::flower).hook(),
    kind("nft-filter", hooks::nft_filter).hook(),
    kind("nft-policy", hooks::nft_policy).hook(),
    kind("nft-netdev", hooks::nft_netdev).hook(),
    kind("nft-translation", hooks::nft_translation).hook(),
    kind("nft-elsewhere", hooks::nft_elsewhere).hook(),
    kind("nft-flowtable", hooks::nft_flowtable).hook(),
    kind("iptables", hooks::iptables).hook(),
    kind("ipvs", hooks::ipvs).hook(),
];

/// Kinds that need devices and hooks that most test hosts do not have.
pub(super) const OF_GUESTS: &[&str] =
    &["vlan", "vrf", "bond", "ipvlan", "dummy", "xfrm-interface", "tc-flower", "nft-flowtable", "ipvs"];

/// Kinds that packets are wrong in so far, from known causes.
pub(super) const KNOWN_WRONG: &[&str] = &[];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{SeedableRng as _, rngs::StdRng};

    use super::{
        super::tunnels::{everything, sites},
        *,
    };

    #[test]
    fn every_kind_has_a_name_of_its_own_and_what_it_does_can_be_repeated() {
        let names: BTreeSet<_> = KINDS.iter().map(|kind| kind.name).collect();
        assert_eq!(names.len(), KINDS.len());
        let lists = OF_GUESTS.iter().chain(KNOWN_WRONG);
        assert!(lists.clone().all(|name| *name == "mixed" || names.contains(name)));
        for tunnels in [sites(), everything()] {
            for kind in KINDS {
                let draw = |seed| {
                    let mut rng = StdRng::seed_from_u64(seed);
                    (kind.change)(&mut Draw { rng: &mut rng, tunnels: &tunnels })
                };
                for seed in 0..50 {
                    let change = draw(seed);
                    assert!(!change.steps.is_empty(), "{}", kind.name);
                    assert_eq!(change.steps, draw(seed).steps, "{}", kind.name);
                }
            }
        }
    }

    /// What is changed is changed back, or the world is not used again.
    #[test]
    fn every_kind_ends() {
        let tunnels = sites();
        for kind in KINDS {
            let mut rng = StdRng::seed_from_u64(7);
            let change = (kind.change)(&mut Draw { rng: &mut rng, tunnels: &tunnels });
            let changes = !change.steps.concat().is_empty();
            assert!(!changes || kind.is_final || !change.undo.is_empty(), "{}", kind.name);
        }
    }

    #[test]
    fn prefixes_lie_inside_what_tunnels_lead_to() {
        let tunnels = sites();
        let mut rng = StdRng::seed_from_u64(1);
        let mut draw = Draw { rng: &mut rng, tunnels: &tunnels };
        for number in 0..1000 {
            let prefix = draw.destination(number % 2 == 0);
            assert!(tunnels.iter().any(|tunnel| tunnel.destination.contains(&prefix)), "{prefix}");
        }
    }
}
