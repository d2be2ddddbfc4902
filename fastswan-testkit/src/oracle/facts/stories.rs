//! Cases from the field that are about the host: a fixed change of it, and what is right.

use std::time::Duration;

use fastswan::policy::MacAddr;
use ipnet::IpNet;

use super::{
    command::{Command, carrier, ip, ip_of, sysctl},
    draw::Change,
    icmp,
    report::KindReport,
    world::Device,
};

/// A case.
#[derive(Clone, Copy, Debug)]
pub(super) struct Story {
    /// Its number or letter.
    pub(super) case: &'static str,
    pub(super) name: &'static str,
    pub(super) change: fn() -> Change,
    /// The least share of eligible packets that are fast.
    least_share: Option<f64>,
    /// The kernel does not tell of it.
    pub(super) is_silent: bool,
}

impl Story {
    /// Whether what became of its packets is right.
    pub(super) fn holds(&self, packets: &KindReport) -> bool {
        packets.wrong == 0
            && packets.refused == 0
            && packets.decisions > 0
            && self.least_share.is_none_or(|least| packets.eligible > 0 && packets.fast_share() >= least)
    }
}

const fn right(case: &'static str, name: &'static str, change: fn() -> Change) -> Story {
    Story { case, name, change, least_share: None, is_silent: false }
}

const fn silent(case: &'static str, name: &'static str, change: fn() -> Change) -> Story {
    Story { is_silent: true, ..right(case, name, change) }
}

const fn fast(case: &'static str, name: &'static str, change: fn() -> Change) -> Story {
    Story { least_share: Some(0.98), ..right(case, name, change) }
}

/// Stories that do not end right so far.
pub(super) const KNOWN_GAPS: &[&str] =
    &["source-specific-routes", "a-route-with-an-mtu", "a-linkdown-route-that-is-skipped"];

/// All of them. Cases 39 and 15b need hooks and a million routes, and are told elsewhere.
pub(super) const STORIES: &[Story] = &[
    right("1", "a-nexthop-object-goes", || {
        Change::once([
            ip("nexthop add id 1 via 192.0.2.2 dev out0"),
            ip("route add 10.2.9.0/24 nhid 1"),
            ip("route add blackhole 10.2.8.0/22"),
        ])
        .then([ip("nexthop del id 1")])
        .to(nets(&["10.2.9.0/24", "10.2.8.0/22"]))
    }),
    right("1", "a-nexthop-group-goes", || {
        Change::once([
            ip("nexthop add id 1 via 192.0.2.2 dev out0"),
            ip("nexthop add id 2 via 192.0.2.3 dev out0"),
            ip("nexthop add id 3 group 1/2"),
            ip("route add 10.2.9.0/24 nhid 3"),
            ip("route add blackhole 10.2.8.0/22"),
        ])
        .then([ip("nexthop del id 3")])
        .to(nets(&["10.2.9.0/24", "10.2.8.0/22"]))
    }),
    right("1", "the-nexthop-object-of-the-outer-route-goes", || {
        Change::once([
            ip("route add blackhole 192.0.2.2/32 metric 5"),
            ip("nexthop add id 1 dev out0"),
            ip("route add 192.0.2.2/32 nhid 1"),
        ])
        .then([ip("nexthop del id 1")])
        .to(nets(&["10.2.0.0/16"]))
    }),
    right("2", "an-ipv6-route-expires", || {
        Change::once([
            ip("route add unreachable 2001:db8:2:8::/62"),
            ip("route add 2001:db8:2:9::/64 via 2001:db8:f::2 expires 1"),
        ])
        .then([Command::Wait(Duration::from_millis(1100))])
        .to(nets(&["2001:db8:2:9::/64"]))
    }),
    right("4", "a-route-for-a-type-of-service-is-unreachable", || {
        Change::once([ip("route add unreachable 10.2.0.0/16 tos 0x10 metric 500")])
            .to(nets(&["10.2.0.0/16"]))
            .tos(0x10)
    }),
    right("4", "a-route-for-a-type-of-service-leads-elsewhere", || {
        Change::once([ip("route add 10.2.0.0/16 tos 0x10 via 10.1.0.5 dev lan0 metric 500")])
            .to(nets(&["10.2.0.0/16"]))
            .tos(0x10)
    }),
    right("4", "an-outer-route-for-a-type-of-service-is-prohibited", || {
        Change::once([ip("route add prohibit 192.0.2.2/32 tos 0x10 metric 500")])
            .to(nets(&["10.2.0.0/16"]))
            .tos(0x10)
    }),
    silent("9", "forwarding-is-off", || {
        Change::once([sysctl("ipv4/ip_forward", "0")]).then([sysctl("ipv4/ip_forward", "1")])
    }),
    silent("9", "a-reverse-path-filter-and-a-source-that-is-routed-elsewhere", || {
        Change::once([ip("route add 10.1.9.0/24 via 198.51.100.2")])
            .then([sysctl("ipv4/conf/lan0/rp_filter", "1")])
            .from(nets(&["10.1.9.0/24"]))
    }),
    silent("9", "disable-xfrm", || Change::once([sysctl("ipv4/conf/out0/disable_xfrm", "1")])),
    silent("9", "a-smaller-mtu-for-ipv6", || {
        Change::once([sysctl("ipv6/conf/out0/mtu", "1280")]).lengths(1280).lengths(1206)
    }),
    right("L", "a-throw-in-the-table-local", || {
        Change::once([ip("route add throw 10.2.5.0/24 table local")]).to(nets(&["10.2.5.0/24"]))
    }),
    right("L", "a-route-in-the-table-local-with-a-hole-in-the-main-one", || {
        Change::once([
            ip("route add 10.2.0.0/16 via 192.0.2.2 table local"),
            ip("route add blackhole 10.2.5.0/24"),
        ])
        .to(nets(&["10.2.5.0/24"]))
    }),
    right("R", "the-rule-for-own-ipv6-addresses-goes", || {
        Change::once([ip("address add 2001:db8:2::9/64 dev out0 nodad")])
            .then([ip_of(true, "rule del pref 0")])
            .to(nets(&["2001:db8:2::9/128", "2001:db8:2::/64"]))
    }),
    right("A", "a-router-tells-an-mtu", || {
        let frame = icmp::advertisement(router(), OUT, Some(1300), None, 0);
        advertised(frame, "a router advertisement with MTU 1300").lengths(1300).lengths(1226)
    }),
    right("A", "what-a-router-told-ends", || {
        let prefix = "2001:db8:2:9::/64".parse().ok();
        let frame = icmp::advertisement(router(), OUT, None, prefix, 1);
        let change = advertised(frame, "a router advertisement, prefix and default route for 1 s");
        change.then([Command::Wait(Duration::from_millis(1200))]).to(nets(&["2001:db8:2:9::/64"]))
    }),
    right("F", "a-loose-filter-at-a-port-without-an-ipv4-address", || {
        Change::once([
            ip("route add 10.1.9.0/24 via 198.51.100.2"),
            sysctl("ipv4/conf/lan0/rp_filter", "2"),
            ip("address del 10.1.0.1/16 dev lan0"),
        ])
        .then([ip("route add 10.1.0.0/16 dev lan0")])
        .from(nets(&["10.1.9.0/24"]))
    }),
    right("P", "a-path-mtu-is-learnt", || {
        let own = "2001:db8:f::1".parse().expect("an address");
        let to = "2001:db8:2::9".parse().expect("an address");
        let frame = icmp::too_big(to, own, OUT, 1300);
        Change::once([Command::Frame(Device::Out0, frame, "too big: 1300 for 2001:db8:2::9".to_owned())])
            .to(nets(&["2001:db8:2::9/128"]))
            .lengths(1300)
    }),
    right("P", "a-path-mtu-is-learnt-and-forwarding-uses-it", || {
        let own = "192.0.2.1".parse().expect("an address");
        let to = "10.2.0.9".parse().expect("an address");
        let frame = icmp::too_big(to, own, OUT, 1300);
        Change::once([
            sysctl("ipv4/ip_forward_use_pmtu", "1"),
            Command::Frame(Device::Out0, frame, "too big: 1300 for 10.2.0.9".to_owned()),
        ])
        .to(nets(&["10.2.0.9/32"]))
        .lengths(1300)
    }),
    fast("14", "routes-in-a-table-that-no-rule-asks", || {
        let routes = (0..50).map(|at| ip(format!("route add blackhole 10.2.{at}.0/24 table 77")));
        Change::once(routes).to(nets(&["10.2.0.0/18"]))
    }),
    fast("14", "made-up-neighbours", || {
        let add = (1..100).map(|at| {
            ip(format!("neighbour replace 10.1.66.{at} lladdr 02:00:00:00:06:01 dev lan0 nud stale"))
        });
        Change::once(add)
    }),
    fast("14", "addresses-on-lo", || {
        let add = (1..50).map(|at| ip(format!("address add 198.18.0.{at}/32 dev lo")));
        Change::once(add)
    }),
    fast("15", "routes-elsewhere", || {
        let add = (0..250).map(|at| ip(format!("route add 198.18.{at}.0/24 via 192.0.2.2")));
        let del = (0..250).step_by(3).map(|at| ip(format!("route del 198.18.{at}.0/24 via 192.0.2.2")));
        Change::once(add).then(del)
    }),
    fast("18", "libreswan", || both("priority 100 fwmark 1/0xffffffff lookup 50")),
    fast("18", "strongswan", || both("priority 220 lookup 220")),
    fast("18", "strongswan-mark", || {
        both("priority 220 not fwmark 0x42 lookup 220").then([
            ip("route add 10.2.0.0/16 via 192.0.2.2 dev out0 table 220"),
            ip("route add 2001:db8:2::/48 via 2001:db8:f::2 dev out0 table 220"),
        ])
    }),
    fast("18", "tailscale", || {
        both("priority 5210 fwmark 0x80000/0xff0000 lookup main")
            .then(both("priority 5250 fwmark 0x80000/0xff0000 unreachable").steps.concat())
            .then(both("priority 5270 lookup 52").steps.concat())
    }),
    fast("18", "wg-quick", || {
        both("priority 32764 lookup main suppress_prefixlength 0")
            .then(both("priority 32765 not fwmark 0xca6c lookup 51820").steps.concat())
            .to(nets(&["10.2.0.0/16", "2001:db8:2::/48"]))
    }),
    fast("18", "vrf", || both("priority 1000 l3mdev unreachable")),
    fast("18", "iif", || both("priority 90 iif lan0 lookup 90")),
    fast("18", "ports", || both("priority 91 ipproto udp dport 53 lookup 91")),
    right("18", "ports-with-a-table", || {
        both("priority 91 ipproto udp dport 53 lookup 91")
            .then([ip("route add unreachable 10.2.0.0/16 table 91")])
            .ports(53)
            .to(nets(&["10.2.0.0/16"]))
    }),
    fast("18", "from", || {
        Change::once([ip("rule add priority 92 from 10.1.9.0/24 prohibit")]).from(nets(&["10.1.9.0/24"]))
    }),
    fast("18", "to", || Change::once([ip("rule add priority 93 to 172.16.0.0/12 lookup 100")])),
    fast("33", "an-unreachable-default-of-a-high-metric", || {
        Change::once([ip_of(true, "route add unreachable default metric 4278198272")])
    }),
    fast("33", "source-specific-routes", || {
        Change::once([ip("route add 2001:db8:2:5::/64 from 2001:db8:7::/48 via 2001:db8:e::2 dev out1")])
            .to(nets(&["2001:db8:2:5::/64"]))
    }),
    fast("D", "a-route-with-an-mtu", || {
        Change::once([ip("route replace 10.2.0.0/16 via 192.0.2.2 mtu 1400")]).lengths(1400)
    }),
    fast("D", "two-ipv6-metrics", || {
        Change::once([ip("route add 2001:db8:2::/48 via 2001:db8:f::3 dev out0 metric 2000")])
    }),
    fast("D", "two-next-hops-behind-one-device", || {
        Change::once([ip(
            "route replace 10.2.0.0/16 nexthop via 192.0.2.2 dev out0 nexthop via 192.0.2.3 dev out0",
        )])
    }),
    fast("D", "a-linkdown-route-that-is-skipped", || {
        Change::once([
            sysctl("ipv4/conf/all/ignore_routes_with_linkdown", "1"),
            sysctl("ipv4/conf/out1/ignore_routes_with_linkdown", "1"),
            ip("route add 10.2.5.0/24 via 198.51.100.2 dev out1 metric 1"),
        ])
        .then(carrier(Device::Out1, false))
        .to(nets(&["10.2.5.0/24"]))
    }),
    fast("D", "blackholed-sources-without-a-filter", || {
        Change::once([ip("route add blackhole 10.1.9.0/24")]).from(nets(&["10.1.9.0/24"]))
    }),
    fast("D", "a-macvlan-on-the-port", || {
        Change::once([ip("link add mac0 link lan0 type macvlan mode bridge"), ip("link set mac0 up")])
    }),
];

const OUT: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

fn router() -> std::net::Ipv6Addr {
    "fe80::b5".parse().expect("an address")
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a prefix")).collect()
}

/// A rule of both families.
fn both(rule: &str) -> Change {
    Change::once([false, true].map(|v6| ip_of(v6, format!("rule add {rule}"))))
}

/// The gateway listens to routers, and one tells it something.
fn advertised(frame: Vec<u8>, what: &str) -> Change {
    Change::once([
        ip("address add fe80::2/64 dev out0 nodad"),
        sysctl("ipv6/conf/out0/accept_ra", "2"),
        sysctl("ipv6/conf/out0/autoconf", "0"),
    ])
    .then([Command::Frame(Device::Out0, frame, what.to_owned())])
}
