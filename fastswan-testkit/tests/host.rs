//! Host facts as the kernel tells them, in namespaces that were set up for it.

use std::{
    fmt::Write as _,
    fs,
    net::IpAddr,
    time::{Duration, Instant},
};

use fastswan::{
    HostEvent, HostFacts, HostSource as _, NetlinkHost,
    host::{HostStaleCause, Link, Neighbour, RouteKind, Rule},
    policy::{Family, MacAddr},
    table::{Forwards, ReversePath},
};
use fastswan_testkit::{
    lab::{self, Namespace},
    site::{CLIENT, LAN, PEER, Site},
};
use tokio::time::timeout;

/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);
const MAIN: u32 = 254;
const LOCAL: u32 = 255;

fn read(namespace: &Namespace) -> HostFacts {
    namespace.enter(|| HostFacts::read().unwrap())
}

/// The gateway of a site, for a story about what it knows of itself.
fn story(what: &str, tell: impl FnOnce(&Namespace)) {
    if lab::require_root(what) {
        let site = Site::new().unwrap();
        tell(&site.gateway);
    }
}

fn named<'a>(host: &'a HostFacts, name: &str) -> &'a Link {
    host.ifindex(name).and_then(|ifindex| host.link(ifindex)).unwrap_or_else(|| panic!("no {name}"))
}

fn routes_of(host: &HostFacts, prefix: &str) -> usize {
    routes(host, MAIN, prefix).len()
}

/// What the routes of a table for exactly this prefix do.
fn routes(host: &HostFacts, table: u32, prefix: &str) -> Vec<RouteKind> {
    let prefix = prefix.parse().unwrap();
    let here = host.routes.iter().filter(|route| (route.table, route.destination) == (table, prefix));
    here.map(|route| route.kind).collect()
}

#[test]
fn links_are_told_as_they_are() {
    story("reading links", |gateway| {
        gateway.ip("link add br0 type bridge").unwrap();
        gateway.ip("link add member type veth peer name idle").unwrap();
        gateway.ip("link set member master br0 mtu 1400").unwrap();
        gateway.ip("link add link out0 name container type macvlan").unwrap();
        gateway.sysctl("net.ipv6.conf.lan0.mtu", "1300").unwrap();
        let host = read(gateway);

        let lan = named(&host, "lan0");
        assert_eq!((lan.kind.as_str(), lan.address, lan.mtu, lan.mtu_v6), ("veth", Some(LAN), 1500, 1300));
        assert_eq!((lan.up, lan.carrier, lan.vlan, lan.controller), (true, true, None, None));
        assert_eq!(lan.parent, None, "its other end is in another namespace");

        let member = named(&host, "member");
        assert_eq!((member.up, member.carrier, member.mtu), (false, false, 1400));
        assert_eq!(member.controller, host.ifindex("br0"));
        assert_eq!(named(&host, "container").parent, host.ifindex("out0"));

        let has_port = |name| host.port(host.ifindex(name).unwrap(), 0).is_some();
        assert!(has_port("lan0"));
        for name in ["lo", "member", "idle", "out0"] {
            assert!(!has_port(name), "{name}");
        }
    });
}

#[test]
fn a_link_without_carrier_says_so() {
    if !lab::require_root("reading carriers") {
        return;
    }
    let site = Site::new().unwrap();
    site.client.ip("link set eth0 down").unwrap();
    let host = read(&site.gateway);
    assert_eq!((named(&host, "lan0").up, named(&host, "lan0").carrier), (true, false));
    assert_eq!((named(&host, "out0").up, named(&host, "out0").carrier), (true, true));
}

#[test]
fn routes_of_every_kind_are_told() {
    story("reading routes", |gateway| {
        for route in [
            "blackhole 10.60.0.0/16",
            "unreachable 10.61.0.0/16",
            "prohibit 10.62.0.0/16",
            "throw 10.63.0.0/16 table 100",
            "10.64.0.0/16 via 192.0.2.2 mtu 1400",
            "10.65.0.0/16 nexthop via 192.0.2.2 nexthop via 10.1.0.5",
            "10.66.0.0/16 dev out0 metric 7",
            "10.67.0.0/16 via 192.0.2.2 tos 0x10",
            "10.68.0.0/16 via inet6 2001:db8:f::2 dev out0",
            "blackhole 2001:db8:60::/48",
            "2001:db8:64::/48 via 2001:db8:f::2",
            "2001:db8:65::/48 via 2001:db8:f::2 from 2001:db8:1::/48",
            "default via 192.0.2.2",
        ] {
            gateway.ip(&format!("route add {route}")).unwrap();
        }
        let host = read(gateway);
        let (lan, out) = (host.ifindex("lan0").unwrap(), host.ifindex("out0").unwrap());
        let v4: IpAddr = "192.0.2.2".parse().unwrap();
        let v6: IpAddr = "2001:db8:f::2".parse().unwrap();
        let via = |ifindex, gateway, mtu| RouteKind::Unicast { ifindex, gateway, mtu };
        for (table, prefix, kind) in [
            (LOCAL, "127.0.0.0/8", RouteKind::Local),
            (LOCAL, "10.1.0.1/32", RouteKind::Local),
            (LOCAL, "10.1.255.255/32", RouteKind::Broadcast),
            (LOCAL, "192.0.2.255/32", RouteKind::Broadcast),
            (LOCAL, "2001:db8:1::1/128", RouteKind::Local),
            (MAIN, "10.1.0.0/16", via(lan, None, None)),
            (MAIN, "192.0.2.0/24", via(out, None, None)),
            (MAIN, "2001:db8:1::/48", via(lan, None, None)),
            (MAIN, "10.60.0.0/16", RouteKind::Blackhole),
            (MAIN, "10.61.0.0/16", RouteKind::Unreachable),
            (MAIN, "10.62.0.0/16", RouteKind::Prohibit),
            (100, "10.63.0.0/16", RouteKind::Throw),
            (MAIN, "10.64.0.0/16", via(out, Some(v4), Some(1400))),
            (MAIN, "10.65.0.0/16", RouteKind::Unclear),
            (MAIN, "10.66.0.0/16", via(out, None, None)),
            (MAIN, "10.67.0.0/16", RouteKind::Unclear),
            (MAIN, "10.68.0.0/16", via(out, Some(v6), None)),
            (MAIN, "2001:db8:60::/48", RouteKind::Blackhole),
            (MAIN, "2001:db8:64::/48", via(out, Some(v6), None)),
            (MAIN, "2001:db8:65::/48", RouteKind::Unclear),
            (MAIN, "0.0.0.0/0", via(out, Some(v4), None)),
        ] {
            assert_eq!(routes(&host, table, prefix), [kind], "{prefix}");
        }
        let metric = |prefix: &str| {
            let prefix = prefix.parse().unwrap();
            host.routes.iter().find(|route| route.destination == prefix).unwrap().metric
        };
        assert_eq!((metric("10.66.0.0/16"), metric("10.64.0.0/16")), (7, 0));
    });
}

#[test]
fn a_rule_for_some_packets_names_no_table() {
    story("reading rules", |gateway| {
        let before = read(gateway);
        // IPv6 has no default table.
        let ordinary = [&Rule::ordinary(Family::V4)[..], &Rule::ordinary(Family::V6)[..2]].concat();
        assert_eq!(before.rules, ordinary);
        for rule in [
            "priority 100 fwmark 1 table 100",
            "priority 101 from 10.9.0.0/16 table 100",
            "priority 102 iif lan0 table 100",
            "priority 103 table 100",
            "priority 104 prohibit",
            "priority 105 table main suppress_prefixlength 0",
        ] {
            gateway.ip(&format!("rule add {rule}")).unwrap();
        }
        let added: Vec<_> = read(gateway)
            .rules
            .iter()
            .filter(|rule| rule.family == Family::V4 && (100..200).contains(&rule.priority))
            .map(|rule| (rule.priority, rule.table))
            .collect();
        assert_eq!(
            added,
            [(100, None), (101, None), (102, None), (103, Some(100)), (104, None), (105, None)]
        );
    });
}

#[test]
fn only_neighbours_with_an_address_are_told() {
    story("reading neighbours", |gateway| {
        gateway.ip("neighbour add 192.0.2.7 dev out0 nud failed").unwrap();
        gateway.ip("neighbour add 192.0.2.8 dev out0 lladdr 02:00:00:00:00:08 nud stale").unwrap();
        let host = read(gateway);
        let (lan, out) = (host.ifindex("lan0").unwrap(), host.ifindex("out0").unwrap());
        let knows = |ifindex, destination: &str, address| {
            let destination = destination.parse().unwrap();
            host.neighbours.contains(&Neighbour { ifindex, destination, address })
        };
        assert!(knows(lan, "10.1.0.5", CLIENT));
        assert!(knows(lan, "2001:db8:1::5", CLIENT));
        assert!(knows(out, "192.0.2.2", PEER));
        assert!(knows(out, "192.0.2.8", MacAddr([2, 0, 0, 0, 0, 8])));
        let failed: IpAddr = "192.0.2.7".parse().unwrap();
        assert!(host.neighbours.iter().all(|neighbour| neighbour.destination != failed));
    });
}

/// Within a runtime, with a host source that was opened in the gateway's namespace and has told everything.
fn following(what: &str, tell: impl AsyncFnOnce(&Namespace, NetlinkHost, HostFacts) + Send) {
    story(what, |gateway| {
        gateway.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut host = NetlinkHost::open().unwrap();
                let facts = snapshot(&mut host).await;
                tell(gateway, host, facts).await;
            });
        });
    });
}

/// What it tells next that is worth relying on.
async fn snapshot(host: &mut NetlinkHost) -> HostFacts {
    let facts = async {
        loop {
            match host.next_event().await.unwrap().unwrap() {
                HostEvent::Snapshot(facts) if host.caught_up().unwrap() => break facts,
                _ => {}
            }
        }
    };
    timeout(PATIENCE, facts).await.expect("the host changes without end")
}

#[test]
fn a_neighbour_that_is_heard_from_again_is_no_change() {
    following("watching neighbours", async |gateway, mut host, mut before| {
        for (what, changed) in [
            ("neighbour replace 192.0.2.2 lladdr 02:00:00:00:00:bb dev out0 nud stale", false),
            ("neighbour replace 192.0.2.2 lladdr 02:00:00:00:00:cc dev out0 nud stale", true),
            ("neighbour replace 192.0.2.7 dev out0 nud failed", false),
            ("neighbour delete 192.0.2.7 dev out0", false),
            ("neighbour replace 192.0.2.2 dev out0 nud failed", true),
            ("neighbour replace 192.0.2.8 lladdr 02:00:00:00:00:08 dev out0", true),
            ("neighbour delete 192.0.2.8 dev out0", true),
            ("route add 10.9.0.0/16 via 192.0.2.2", true),
            ("link set lan0 mtu 1400", true),
        ] {
            gateway.ip(what).unwrap();
            assert_eq!(host.caught_up().unwrap(), !changed, "{what}");
            if changed {
                let stale = host.next_event().await.unwrap();
                assert_eq!(stale, Some(HostEvent::Stale(HostStaleCause::Changed)), "{what}");
                let now = snapshot(&mut host).await;
                assert_ne!(now, before, "{what}");
                before = now;
            }
        }
    });
}

/// Each of these is told to a group of its own, or changes what is told of a device.
#[test]
fn what_is_no_route_but_decides_over_packets_is_a_change() {
    following("watching next hops, sysctls and devices", async |gateway, mut host, _| {
        let ip = |what: &str| drop(gateway.ip(what).unwrap());
        let sysctl = |key: &str, value: &str| gateway.sysctl(key, value).unwrap();
        ip("nexthop add id 1 via 192.0.2.2 dev out0");
        ip("route add 10.2.9.0/24 nhid 1");
        let before = snapshot(&mut host).await;
        assert_eq!(routes(&before, MAIN, "10.2.9.0/24").len(), 1);
        let peer = Namespace::new("program").unwrap();
        ip(&format!("link add veth7 type veth peer name veth8 netns {}", peer.name()));
        ip("link set veth7 up");
        peer.ip("link set veth8 up").unwrap();
        snapshot(&mut host).await;

        let changes: [(&str, &(dyn Fn() + Sync)); 5] = [
            ("a next hop goes", &|| ip("nexthop del id 1")),
            ("forwarding of IPv4", &|| sysctl("net.ipv4.conf.lan0.forwarding", "1")),
            ("forwarding of IPv6", &|| sysctl("net.ipv6.conf.all.forwarding", "1")),
            ("a reverse path filter", &|| sysctl("net.ipv4.conf.lan0.rp_filter", "1")),
            // A veth device takes redirected frames as long as its peer has generic receive offload.
            ("what a device can do", &|| peer.set_feature("veth8", "rx-gro", true).unwrap()),
        ];
        for (what, change) in changes {
            assert!(host.caught_up().unwrap(), "before: {what}");
            change();
            let stale = timeout(PATIENCE, host.next_event()).await.expect(what).unwrap();
            assert_eq!(stale, Some(HostEvent::Stale(HostStaleCause::Changed)), "{what}");
            let now = snapshot(&mut host).await;
            assert_eq!(routes(&now, MAIN, "10.2.9.0/24"), [], "{what}");
        }
        let lan = named(&snapshot_after(&mut host, || ip("link set lan0 mtu 1400")).await, "lan0").clone();
        assert_eq!((lan.forwards, lan.reverse_path), (Forwards { v4: true, v6: true }, ReversePath::Strict));
    });
}

async fn snapshot_after(host: &mut NetlinkHost, change: impl FnOnce()) -> HostFacts {
    change();
    snapshot(host).await
}

/// Sysctls are those of the thread that reads them, and sockets belong where they were opened.
#[test]
fn a_host_source_stays_in_the_namespace_that_it_was_opened_in() {
    if !lab::require_root("two namespaces") {
        return;
    }
    let (here, elsewhere) = (Site::new().unwrap(), Namespace::new("elsewhere").unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut host = here.gateway.enter(|| runtime.block_on(async { NetlinkHost::open().unwrap() }));
    elsewhere.enter(|| {
        runtime.block_on(async {
            let before = snapshot(&mut host).await;
            assert_eq!(before, read(&here.gateway));
            here.gateway.sysctl("net.ipv4.conf.lan0.forwarding", "1").unwrap();
            let now = snapshot(&mut host).await;
            assert!(named(&now, "lan0").forwards.v4 && !named(&before, "lan0").forwards.v4);
        });
    });
}

#[test]
fn a_host_that_changes_all_the_time_is_read_ten_times_a_second() {
    following("a host that changes all the time", async |gateway, mut host, _| {
        let begin = Instant::now();
        let (mut snapshots, mut number) = (0, 0);
        while begin.elapsed() < Duration::from_secs(2) {
            gateway.ip(&format!("address replace 10.77.0.{number}/32 dev lo")).unwrap();
            number = (number + 1) % 250;
            let event = timeout(Duration::from_millis(1), host.next_event()).await;
            snapshots += u32::from(matches!(event, Ok(Ok(Some(HostEvent::Snapshot(_))))));
        }
        assert!((3..=20).contains(&snapshots), "{snapshots}");
    });
}

#[test]
fn sysctls_are_those_of_the_namespace() {
    story("reading sysctls", |gateway| {
        let both = Forwards { v4: true, v6: true };
        let lan = || named(&read(gateway), "lan0").clone();
        assert_eq!((lan().forwards, lan().bypasses_xfrm), (Forwards::default(), false));
        gateway.forward().unwrap();
        assert_eq!(lan().forwards, both);
        gateway.sysctl("net.ipv4.conf.lan0.forwarding", "0").unwrap();
        assert_eq!(lan().forwards, Forwards { v4: false, v6: true });
        assert_eq!(named(&read(gateway), "out0").forwards, both);
        gateway.sysctl("net.ipv6.conf.lan0.disable_ipv6", "1").unwrap();
        assert_eq!(lan().forwards, Forwards::default());

        // The greater of everyone's and its own counts.
        for (all, own, filter) in [
            ("0", "0", ReversePath::Off),
            ("0", "1", ReversePath::Strict),
            ("0", "2", ReversePath::Loose),
            ("1", "0", ReversePath::Strict),
            ("2", "1", ReversePath::Loose),
        ] {
            gateway.sysctl("net.ipv4.conf.all.rp_filter", all).unwrap();
            gateway.sysctl("net.ipv4.conf.lan0.rp_filter", own).unwrap();
            assert_eq!(lan().reverse_path, filter, "{all} and {own}");
        }
        for device in ["lan0", "all"] {
            gateway.sysctl(&format!("net.ipv4.conf.{device}.disable_xfrm"), "1").unwrap();
            assert!(lan().bypasses_xfrm, "{device}");
            gateway.sysctl(&format!("net.ipv4.conf.{device}.disable_xfrm"), "0").unwrap();
            assert!(!lan().bypasses_xfrm);
        }
    });
}

#[test]
fn more_changes_than_a_socket_holds_are_one_change() {
    following("a host source that overruns", async |gateway, mut host, _| {
        let batch = tempfile::NamedTempFile::new().unwrap();
        // Some 4 MiB of notifications, where 2 fit.
        let routes = (0..5000).fold(String::new(), |mut routes, number| {
            let _ = writeln!(routes, "route add 10.9.{}.{}/32 dev lan0", number / 256, number % 256);
            routes
        });
        fs::write(batch.path(), routes).unwrap();
        gateway.ip(&format!("-batch {}", batch.path().display())).unwrap();
        let stale = host.next_event().await.unwrap();
        assert!(matches!(stale, Some(HostEvent::Stale(_))), "{stale:?}");
        let facts = snapshot(&mut host).await;
        let added = |number: u32| format!("10.9.{}.{}/32", number / 256, number % 256);
        assert!((0..5000).step_by(999).all(|number| routes_of(&facts, &added(number)) == 1));
    });
}
