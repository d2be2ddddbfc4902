//! Host facts as the kernel tells them, in namespaces that were set up for it.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    net::{IpAddr, UdpSocket},
    time::{Duration, Instant},
};

use fastswan::{
    HostEvent, HostFacts, HostSource as _, NetlinkHost,
    host::{BrokenHostRule, HostChange, Link, Neighbour, PathMtu, RouteKind, Rule},
    policy::{Family, MacAddr},
    table::{Forwards, ReversePath},
};
use fastswan_testkit::{
    host_facts::{difference, sorted},
    lab::{self, Namespace},
    site::{CLIENT, LAN, PEER, Site},
};
use futures::FutureExt as _;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::{task::unconstrained, time::timeout};

/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);
const MAIN: u32 = 254;
const LOCAL: u32 = 255;

fn read(namespace: &Namespace) -> HostFacts {
    sorted(namespace.enter(|| NetlinkHost::read_once().unwrap()))
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
        gateway.ip("link add link out0 name container type macvlan mode bridge").unwrap();
        gateway.ip("link add link idle name greedy type macvlan mode source").unwrap();
        gateway.sysctl("net.ipv6.conf.lan0.mtu", "1300").unwrap();
        let host = read(gateway);

        let lan = named(&host, "lan0");
        assert_eq!((lan.kind.as_str(), lan.address, lan.mtu, lan.mtu_v6), ("veth", Some(LAN), 1500, 1300));
        assert_eq!((lan.up, lan.carrier, lan.vlan, lan.controller), (true, true, None, None));
        assert_eq!(lan.parent, None, "its other end is in another namespace");

        let member = named(&host, "member");
        assert_eq!((member.up, member.carrier, member.mtu), (false, false, 1400));
        assert_eq!(member.controller, host.ifindex("br0"));
        let container = named(&host, "container");
        assert_eq!((container.parent, container.takes_frames), (host.ifindex("out0"), false));
        assert!(named(&host, "greedy").takes_frames);

        let has_port = |name| host.port(host.ifindex(name).unwrap(), 0).is_some();
        assert!(has_port("lan0") && has_port("out0"));
        for name in ["lo", "member", "idle"] {
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
            (MAIN, "10.67.0.0/16", via(out, Some(v4), None)),
            (MAIN, "10.68.0.0/16", via(out, Some(v6), None)),
            (MAIN, "2001:db8:60::/48", RouteKind::Blackhole),
            (MAIN, "2001:db8:64::/48", via(out, Some(v6), None)),
            (MAIN, "2001:db8:65::/48", via(out, Some(v6), None)),
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
            .cloned()
            .collect();
        let is_plain: Vec<_> =
            added.iter().map(|rule| (rule.priority, rule.selector.is_everything())).collect();
        assert_eq!(
            is_plain,
            [(100, false), (101, false), (102, false), (103, true), (104, true), (105, true)]
        );
        assert_eq!(added[3], Rule::lookup(Family::V4, 103, 100));
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

/// A host source, and what has become of the facts that it told.
struct Followed {
    host: NetlinkHost,
    facts: HostFacts,
    /// How often it has lost track.
    stale: usize,
    /// What it has told since they were looked at last.
    changes: Vec<HostChange>,
}

impl Followed {
    /// In the network namespace of this thread, with everything told.
    async fn open() -> Self {
        Self::with(NetlinkHost::open().unwrap()).await
    }

    async fn with(host: NetlinkHost) -> Self {
        let facts = HostFacts::default();
        let mut followed = Self { host, facts, stale: 0, changes: Vec::new() };
        followed.catch_up().await;
        followed
    }

    fn take(&mut self, event: HostEvent) {
        match event {
            HostEvent::Snapshot(facts) => self.facts = facts,
            HostEvent::Changes(changes) => {
                for change in &changes {
                    self.facts.apply(change.clone());
                }
                self.changes.extend(changes);
            }
            HostEvent::Stale(_) => {
                self.stale += 1;
                self.facts = HostFacts::default();
            }
            other => panic!("{other:?}"),
        }
    }

    /// Takes up what there is to tell. True if the source is caught up then, or soon: the thread that follows hooks may have
    /// got no processor for a while.
    fn look(&mut self) -> bool {
        let began = Instant::now();
        loop {
            while let Some(event) = unconstrained(self.host.next_event()).now_or_never() {
                self.take(event.unwrap().unwrap());
            }
            let is_caught_up = self.host.caught_up().unwrap();
            if is_caught_up || began.elapsed() > Duration::from_millis(300) {
                return is_caught_up;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    async fn catch_up(&mut self) {
        let caught_up = async {
            while self.facts == HostFacts::default() || !self.look() {
                let event = self.host.next_event().await.unwrap().unwrap();
                self.take(event);
            }
        };
        timeout(PATIENCE, caught_up).await.expect("the host changes without end");
    }

    /// Lets the source work for some time.
    async fn follow_for(&mut self, time: Duration) {
        let _ = timeout(time, async {
            loop {
                let event = self.host.next_event().await.unwrap().unwrap();
                self.take(event);
            }
        })
        .await;
        self.catch_up().await;
    }

    /// Follows until the facts are as they should be, for so long at most.
    async fn until(
        &mut self,
        limit: Duration,
        what: &str,
        is_right: impl Fn(&HostFacts) -> bool,
    ) -> Duration {
        let began = Instant::now();
        self.catch_up().await;
        while !is_right(&self.facts) {
            let left = limit.checked_sub(began.elapsed()).unwrap_or_else(|| panic!("not in time: {what}"));
            if let Ok(event) = timeout(left, self.host.next_event()).await {
                self.take(event.unwrap().unwrap());
                self.catch_up().await;
            }
        }
        began.elapsed()
    }

    /// Follows until the facts are those that are read, which they must be soon.
    async fn until_as_read(&mut self, namespace: &Namespace, what: &str) {
        let began = Instant::now();
        loop {
            self.follow_for(Duration::from_millis(20)).await;
            let (told, read) = (sorted(self.facts.clone()), read(namespace));
            if told == read {
                return;
            }
            assert!(began.elapsed() < SOON, "{what}: {}", difference(&told, &read));
        }
    }

    fn kinds(&self, table: u32, prefix: &str) -> Vec<RouteKind> {
        routes(&self.facts, table, prefix)
    }
}

/// Until a follower knows again what was doubtful.
const SOON: Duration = Duration::from_secs(5);

/// Within a runtime, with a host source that was opened in the gateway's namespace and has told everything.
fn following(what: &str, tell: impl AsyncFnOnce(&Namespace, Followed) + Send) {
    story(what, |gateway| {
        gateway.enter(|| {
            runtime().block_on(async {
                let followed = Followed::open().await;
                tell(gateway, followed).await;
            });
        });
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A device that takes frames of its parent goes on doing so from another namespace, and the kernel does not tell when it stops.
#[test]
fn a_port_whose_frames_a_device_takes_in_another_namespace_is_none() {
    following("macvlan devices that move", async |gateway, mut followed| {
        let container = Namespace::new("container").unwrap();
        let has_port = |facts: &HostFacts, name| facts.port(facts.ifindex(name).unwrap(), 0).is_some();
        gateway.ip("link add mac0 link lan0 type macvlan mode bridge").unwrap();
        gateway.ip(&format!("link set mac0 netns {}", container.name())).unwrap();
        followed.catch_up().await;
        assert!(has_port(&followed.facts, "lan0"), "it takes frames for its own address only");

        gateway.ip("link add mac1 link out0 type macvlan mode passthru").unwrap();
        followed.catch_up().await;
        assert!(!has_port(&followed.facts, "out0"));
        gateway.ip(&format!("link set mac1 netns {}", container.name())).unwrap();
        followed.catch_up().await;
        assert!(followed.facts.ifindex("mac1").is_none() && !has_port(&followed.facts, "out0"));

        // Made there, where nothing tells of it.
        let made = format!("link add mac2 link lan0 netns {} type macvlan mode source", container.name());
        gateway.ip(&made).unwrap();
        let taken = |facts: &HostFacts| !has_port(facts, "lan0");
        followed.until(Duration::from_secs(2), "made elsewhere", taken).await;

        // Read anew: by this source, which was there, and by one that was not.
        let as_read = read(gateway);
        assert!(!has_port(&as_read, "lan0") && !has_port(&as_read, "out0"));
        drop(container);
        let begins = followed.stale;
        followed.host.resync();
        followed.until(PATIENCE, "read again", |facts| facts.ifindex("lan0").is_some()).await;
        assert!(followed.stale > begins);
        assert!(!has_port(&followed.facts, "lan0") && !has_port(&followed.facts, "out0"), "remembered");
        assert!(
            NetlinkHost::read_once().is_ok_and(|facts| has_port(&facts, "lan0")),
            "nothing takes them now"
        );

        // Of another one with the index, nothing was said.
        let index = gateway.ifindex("lan0").unwrap();
        gateway.ip("link del lan0").unwrap();
        gateway.ip(&format!("link add lan0 index {index} type veth peer name lan9")).unwrap();
        gateway.ip("link set lan0 up").unwrap();
        gateway.ip("link set lan9 up").unwrap();
        let is_free = |facts: &HostFacts| facts.ifindex("lan0").is_some() && has_port(facts, "lan0");
        followed.until(PATIENCE, "another device", is_free).await;
    });
}

/// Another device may have taken over the index, the name and all else, and yet the program is not on it.
#[test]
fn a_link_that_is_replaced_is_gone_before_the_other_one_is_there() {
    following("a link that is replaced", async |gateway, mut followed| {
        let make = "link add twin0 index 4711 address 02:00:00:00:47:11 type veth peer name twin1";
        gateway.ip(make).unwrap();
        followed.follow_for(Duration::from_millis(200)).await;
        followed.changes.clear();
        gateway.ip("link del twin0").unwrap();
        gateway.ip(make).unwrap();
        followed.catch_up().await;
        let about_it = followed.changes.iter().filter_map(|change| match change {
            HostChange::LinkGone(4711) => Some(None),
            HostChange::Link(link) if link.ifindex == 4711 => Some(Some(link.name.as_str())),
            _ => None,
        });
        assert_eq!(about_it.collect::<Vec<_>>()[..2], [None, Some("twin0")], "{:?}", followed.changes);
    });
}

/// Each of these leads to what would be read then, at once, and nothing is lost for it.
#[test]
fn what_changes_is_told_at_once_and_nothing_else() {
    following("following changes", async |gateway, mut followed| {
        for (what, changes) in [
            ("neighbour replace 192.0.2.2 lladdr 02:00:00:00:00:bb dev out0 nud stale", 0),
            ("neighbour replace 192.0.2.2 lladdr 02:00:00:00:00:cc dev out0 nud stale", 1),
            ("neighbour replace 192.0.2.7 dev out0 nud failed", 0),
            ("neighbour delete 192.0.2.7 dev out0", 0),
            ("neighbour replace 192.0.2.2 dev out0 nud failed", 1),
            ("neighbour replace 192.0.2.8 lladdr 02:00:00:00:00:08 dev out0", 1),
            ("neighbour delete 192.0.2.8 dev out0", 1),
            ("route add 10.9.0.0/16 via 192.0.2.2", 1),
            ("route replace 10.9.0.0/16 via 192.0.2.3", 1),
            ("route append 10.9.0.0/16 via 192.0.2.4", 1),
            ("route prepend 10.9.0.0/16 via 192.0.2.5 mtu 1400", 1),
            ("route add 10.9.0.0/16 via 192.0.2.5 metric 9", 1),
            ("route add 10.9.0.0/16 via 192.0.2.5 tos 0x10", 1),
            ("route del 10.9.0.0/16 via 192.0.2.4", 1),
            ("-6 route add 2001:db8:9::/48 via 2001:db8:f::2", 1),
            ("-6 route append 2001:db8:9::/48 via 2001:db8:f::3", 1),
            ("rule add priority 100 from 10.9.0.0/16 table 100", 1),
            ("rule add priority 100 from 10.8.0.0/16 table 100", 1),
            ("rule del priority 100 from 10.9.0.0/16 table 100", 1),
            // The neighbours on it are forgotten.
            ("link set lan0 address 02:00:00:00:00:11", 3),
            ("link set lan0 alias something", 0),
        ] {
            let before = sorted(followed.facts.clone());
            followed.changes.clear();
            gateway.ip(what).unwrap();
            assert!(followed.look(), "{what}");
            let now = sorted(followed.facts.clone());
            assert_eq!(now, read(gateway), "{what}");
            assert_eq!(now != before, changes > 0, "{what}");
            assert_eq!(followed.changes.len(), changes, "{what}: {:?}", followed.changes);
        }
        assert_eq!(followed.stale, 0);
    });
}

/// Each of these is told to a group of its own, or changes what is told of a device.
#[test]
fn sysctls_and_devices_are_followed() {
    following("watching sysctls and devices", async |gateway, mut followed| {
        let ip = |what: &str| drop(gateway.ip(what).unwrap());
        let sysctl = |key: &str, value: &str| gateway.sysctl(key, value).unwrap();
        let peer = Namespace::new("program").unwrap();
        ip(&format!("link add veth7 type veth peer name veth8 netns {}", peer.name()));
        ip("link set veth7 up");
        peer.ip("link set veth8 up").unwrap();
        followed.until_as_read(gateway, "the beginning").await;

        for (key, value) in [
            ("net.ipv4.conf.lan0.forwarding", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv4.conf.lan0.rp_filter", "1"),
            ("net.ipv4.conf.all.rp_filter", "2"),
            ("net.ipv4.ip_forward", "1"),
        ] {
            let before = followed.facts.clone();
            sysctl(key, value);
            assert!(followed.look(), "{key}");
            assert_ne!(followed.facts, before, "{key}");
            assert_eq!(sorted(followed.facts.clone()), read(gateway), "{key}");
        }
        // The kernel does not tell of these.
        for (key, value) in [
            ("net.ipv4.conf.lan0.disable_xfrm", "1"),
            ("net.ipv4.conf.all.disable_xfrm", "1"),
            ("net.ipv6.conf.lan0.mtu", "1300"),
            ("net.ipv6.conf.lan0.disable_ipv6", "1"),
        ] {
            let before = sorted(followed.facts.clone());
            sysctl(key, value);
            let expected = read(gateway);
            assert_ne!(before, expected, "{key}");
            let took = followed.until(PATIENCE, key, |facts| sorted(facts.clone()) == expected).await;
            assert!(took < Duration::from_millis(500), "{key}: {took:?}");
        }

        followed.changes.clear();
        // A veth device takes redirected frames as long as its peer has generic receive offload.
        peer.set_feature("veth8", "rx-gro", true).unwrap();
        assert!(followed.look());
        let veth7 = followed.facts.ifindex("veth7");
        assert!(followed.changes.contains(&HostChange::Device { ifindex: veth7 }), "{:?}", followed.changes);
        assert_eq!(followed.stale, 0);
    });
}

/// A container's device that comes and goes is told of once each, and nothing is read again for it.
#[test]
fn a_device_that_comes_and_goes_disturbs_nothing() {
    following("a container that comes and goes", async |gateway, mut followed| {
        let peer = Namespace::new("container").unwrap();
        gateway.ip("route add 10.9.0.0/16 via 192.0.2.2").unwrap();
        followed.catch_up().await;
        for _ in 0..3 {
            followed.changes.clear();
            gateway.ip(&format!("link add veth7 type veth peer name eth0 netns {}", peer.name())).unwrap();
            gateway.ip("link set veth7 up").unwrap();
            peer.ip("link set eth0 up").unwrap();
            followed.follow_for(Duration::from_millis(300)).await;
            assert_eq!(sorted(followed.facts.clone()), read(gateway));
            gateway.ip("link del veth7").unwrap();
            followed.follow_for(Duration::from_millis(300)).await;
            assert_eq!(sorted(followed.facts.clone()), read(gateway));
            let is_v4 = |change: &HostChange| matches!(change, HostChange::Routes { destination, .. } if destination.addr().is_ipv4());
            assert!(!followed.changes.iter().any(is_v4), "{:?}", followed.changes);
        }
        assert_eq!(followed.stale, 0);
    });
}

fn unicast(kinds: &[RouteKind]) -> bool {
    matches!(kinds, [RouteKind::Unicast { .. }])
}

/// Case 1: a next hop object that goes takes its IPv4 routes along, and nothing is told of them.
#[test]
fn routes_go_with_their_next_hop_object() {
    following("next hop objects", async |gateway, mut followed| {
        let ip = |what: &str| drop(gateway.ip(what).unwrap());
        for (remove, prefix) in [("nexthop del id 1", "10.2.9.0/24"), ("nexthop del id 2", "10.2.10.0/24")] {
            ip("nexthop add id 1 via 192.0.2.2 dev out0");
            ip("nexthop add id 2 via 192.0.2.3 dev out0");
            ip("nexthop add id 10 group 2");
            ip("route add 10.2.9.0/24 nhid 1");
            ip("route add 10.2.10.0/24 nhid 10");
            ip("-6 nexthop add id 3 via 2001:db8:f::2 dev out0");
            ip("-6 route add 2001:db8:9::/48 nhid 3");
            assert!(followed.look());
            assert!(unicast(&followed.kinds(MAIN, "10.2.9.0/24")));
            assert!(unicast(&followed.kinds(MAIN, "2001:db8:9::/48")));
            ip(remove);
            assert!(followed.look());
            assert!(!unicast(&followed.kinds(MAIN, prefix)), "{remove}");
            followed.until_as_read(gateway, remove).await;
            assert_eq!(followed.kinds(MAIN, prefix), []);
            ip("nexthop flush");
            followed.until_as_read(gateway, "nexthop flush").await;
        }
        // A next hop object that is replaced changes the routes that use it.
        ip("nexthop add id 1 via 192.0.2.2 dev out0");
        ip("route add 10.2.9.0/24 nhid 1");
        ip("nexthop replace id 1 via 10.1.0.5 dev lan0");
        assert!(followed.look());
        followed.until_as_read(gateway, "nexthop replace").await;
        assert!(unicast(&followed.kinds(MAIN, "10.2.9.0/24")));
        gateway.sysctl("net.ipv4.nexthop_compat_mode", "0").unwrap();
        ip("route add 10.2.11.0/24 nhid 1");
        followed.look();
        assert_eq!(followed.kinds(MAIN, "10.2.11.0/24"), [RouteKind::Unclear]);
        ip("nexthop del id 1");
        followed.until_as_read(gateway, "without compatibility").await;
        assert_eq!(followed.kinds(MAIN, "10.2.11.0/24"), []);
        assert_eq!(followed.stale, 0);
    });
}

/// Case 2: a route with a lifetime stops working when it ends, and the kernel tells of it up to half a minute later.
#[test]
fn a_route_does_not_outlive_its_lifetime() {
    following("lifetimes", async |gateway, mut followed| {
        gateway.ip("-6 route add 2001:db8:2::/48 via 2001:db8:f::2 expires 2").unwrap();
        let began = Instant::now();
        assert!(followed.look() && unicast(&followed.kinds(MAIN, "2001:db8:2::/48")));
        let has_ended = |facts: &HostFacts| !unicast(&routes(facts, MAIN, "2001:db8:2::/48"));
        followed.until(PATIENCE, "an end", has_ended).await;
        let after = began.elapsed();
        assert!(after > Duration::from_millis(1500) && after < Duration::from_secs(2), "{after:?}");
        assert_eq!(followed.stale, 0);

        // Prolonged, and cut short, which is not told.
        for (route, expires, least, most) in [("4", "30", 100, 100), ("5", "1", 0, 1300)] {
            let prefix = format!("2001:db8:{route}::/48");
            let via = format!("{prefix} via 2001:db8:f::2");
            gateway.ip(&format!("-6 route add {via} expires {route}")).unwrap();
            let _ = gateway.ip(&format!("-6 route append {via} expires {expires}"));
            assert!(followed.look() && unicast(&followed.kinds(MAIN, &prefix)));
            let began = Instant::now();
            if most == 100 {
                followed.follow_for(Duration::from_millis(4500)).await;
                assert!(unicast(&followed.kinds(MAIN, &prefix)), "it was prolonged");
            } else {
                let has_ended = |facts: &HostFacts| !unicast(&routes(facts, MAIN, &prefix));
                followed.until(PATIENCE, "an end", has_ended).await;
                assert!((least..most).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
            }
        }
    });
}

/// Case 16: an IPv4 route goes with its preferred source address, and with the last address of its device.
#[test]
fn routes_go_with_their_address() {
    following("addresses", async |gateway, mut followed| {
        let ip = |what: &str| drop(gateway.ip(what).unwrap());
        ip("address add 192.0.2.9/24 dev out0");
        ip("route add 10.2.9.0/24 via 192.0.2.2 src 192.0.2.9");
        ip("route add 10.2.10.0/24 via 192.0.2.2");
        assert!(followed.look() && unicast(&followed.kinds(MAIN, "10.2.9.0/24")));
        ip("address del 192.0.2.9/24 dev out0");
        assert!(followed.look());
        assert!(!unicast(&followed.kinds(MAIN, "10.2.9.0/24")));
        assert!(unicast(&followed.kinds(MAIN, "10.2.10.0/24")), "it has nothing to do with that");
        followed.until_as_read(gateway, "an address goes").await;
        assert_eq!(followed.kinds(MAIN, "10.2.9.0/24"), []);
        ip("address del 192.0.2.1/24 dev out0");
        assert!(followed.look());
        assert!(!unicast(&followed.kinds(MAIN, "10.2.10.0/24")));
        followed.until_as_read(gateway, "the last address goes").await;
        assert_eq!(followed.kinds(MAIN, "10.2.10.0/24"), []);

        // The secondary one becomes the first.
        gateway.sysctl("net.ipv4.conf.all.promote_secondaries", "1").unwrap();
        ip("address add 192.0.2.1/24 dev out0");
        ip("address add 192.0.2.9/24 dev out0");
        ip("route add 10.2.9.0/24 via 192.0.2.2");
        followed.catch_up().await;
        ip("address del 192.0.2.1/24 dev out0");
        followed.until_as_read(gateway, "the other one is promoted").await;
        assert_eq!(followed.stale, 0);
    });
}

/// An IPv4 route goes with its device, of which the kernel tells first.
#[test]
fn routes_go_with_their_device() {
    following("devices that go down", async |gateway, mut followed| {
        let ip = |what: &str| drop(gateway.ip(what).unwrap());
        let peer = Namespace::new("away").unwrap();
        for (what, undo) in [
            ("link set out0 down", "link set out0 up"),
            ("link set veth7 down", "link set veth7 up"),
            ("link set veth7 netns AWAY", ""),
            ("link del veth9", ""),
        ] {
            let _ = gateway.ip("link add veth7 type veth peer name veth8");
            let _ = gateway.ip("link add veth9 type veth peer name veth10");
            for (device, address) in [("veth7", "198.51.100.1/24"), ("veth9", "203.0.113.1/24")] {
                let _ = gateway.ip(&format!("address add {address} dev {device}"));
                ip(&format!("link set {device} up"));
            }
            ip("link set veth8 up");
            ip("link set veth10 up");
            for route in [
                "10.2.7.0/24 via 198.51.100.2",
                "10.2.9.0/24 via 203.0.113.2",
                "10.2.10.0/24 via 192.0.2.2",
                "10.2.11.0/24 nexthop via 198.51.100.2 nexthop via 203.0.113.2",
            ] {
                ip(&format!("route replace {route}"));
            }
            ip("address replace 2001:db8:f::1/48 dev out0 nodad");
            ip("-6 route replace 2001:db8:9::/48 via 2001:db8:f::2");
            followed.until_as_read(gateway, "before").await;
            let what = what.replace("AWAY", peer.name());
            ip(&what);
            assert!(followed.look());
            let device = what.split(' ').nth(2).unwrap();
            let gone = match device {
                "out0" => "10.2.10.0/24",
                "veth7" => "10.2.7.0/24",
                _ => "10.2.9.0/24",
            };
            assert!(!unicast(&followed.kinds(MAIN, gone)), "{what}");
            followed.until_as_read(gateway, &what).await;
            assert_eq!(followed.kinds(MAIN, gone), [], "{what}");
            if !undo.is_empty() {
                ip(undo);
            }
            for device in ["veth7", "veth8", "veth9"] {
                let _ = gateway.ip(&format!("link del {device}"));
            }
            followed.until_as_read(gateway, undo).await;
        }
        // Down and up again before it is looked at.
        ip("address replace 192.0.2.1/24 dev out0");
        ip("route replace 10.2.10.0/24 via 192.0.2.2");
        followed.until_as_read(gateway, "before a flap").await;
        ip("link set out0 down");
        ip("link set out0 up");
        assert!(followed.look() && !unicast(&followed.kinds(MAIN, "10.2.10.0/24")));
        followed.until_as_read(gateway, "a flap").await;
        assert_eq!((followed.kinds(MAIN, "10.2.10.0/24"), followed.stale), (Vec::new(), 0));
    });
}

#[test]
fn a_device_without_carrier_makes_its_routes_unclear() {
    if !lab::require_root("carriers") {
        return;
    }
    let site = Site::new().unwrap();
    site.gateway.enter(|| {
        runtime().block_on(async {
            let mut followed = Followed::open().await;
            site.gateway.ip("route add 10.2.0.0/16 via 192.0.2.2").unwrap();
            site.gateway.ip("-6 route add 2001:db8:2::/48 via 2001:db8:f::2").unwrap();
            let both = ["10.2.0.0/16", "2001:db8:2::/48"];
            for (switch, is_clear) in [("down", false), ("up", true), ("down", false), ("up", true)] {
                site.peer.ip(&format!("link set eth0 {switch}")).unwrap();
                for prefix in both {
                    let is_right = |facts: &HostFacts| unicast(&routes(facts, MAIN, prefix)) == is_clear;
                    followed.until(SOON, switch, is_right).await;
                }
                followed.until_as_read(&site.gateway, switch).await;
            }
            assert_eq!(followed.stale, 0);
        });
    });
}

/// Case 14: whoever is on the LAN can have the kernel tell of neighbours.
#[test]
fn made_up_neighbours_disturb_nothing() {
    following("a flood of neighbours", async |gateway, followed| {
        // Room for some 30 notifications about neighbours.
        let flooded = Followed::with(NetlinkHost::with_receive_buffers(8 << 20, 1 << 14).unwrap()).await;
        let batch = tempfile::NamedTempFile::new().unwrap();
        let neighbours = (0..2000).fold(String::new(), |mut all, number| {
            let (high, low) = (number / 250 + 1, number % 250 + 1);
            let _ = writeln!(
                all,
                "neighbour add 10.1.{high}.{low} lladdr 02:00:00:00:{high:02x}:{low:02x} dev lan0"
            );
            all
        });
        fs::write(batch.path(), neighbours).unwrap();
        let known = followed.facts.neighbours.len();
        gateway.ip(&format!("-batch {}", batch.path().display())).unwrap();
        for (mut followed, is_flooded) in [(followed, false), (flooded, true)] {
            assert!(followed.look());
            assert_eq!(followed.facts.neighbours.is_empty(), is_flooded);
            followed.until_as_read(gateway, "a flood").await;
            assert!(followed.facts.neighbours.len() > known);
            assert_eq!(followed.stale, 0);
        }
    });
}

#[test]
fn more_changes_than_a_socket_holds_are_read_again() {
    following("a host source that overruns", async |gateway, large| {
        let small = Followed::with(NetlinkHost::with_receive_buffers(1 << 16, 1 << 16).unwrap()).await;
        let batch = tempfile::NamedTempFile::new().unwrap();
        let routes = (0..5000).fold(String::new(), |mut routes, number| {
            let _ = writeln!(routes, "route add 10.9.{}.{}/32 dev lan0", number / 256, number % 256);
            routes
        });
        fs::write(batch.path(), routes).unwrap();
        gateway.ip(&format!("-batch {}", batch.path().display())).unwrap();
        for (mut followed, overruns) in [(large, 0), (small, 1)] {
            followed.until_as_read(gateway, "an overrun").await;
            assert_eq!(followed.stale, overruns);
        }
    });
}

/// Any process may send to a group if it has `CAP_NET_ADMIN`.
#[test]
fn what_others_say_counts_for_nothing() {
    following("a forged notification", async |_, mut followed| {
        let before = followed.facts.clone();
        let mut forger = Socket::new(NETLINK_ROUTE).unwrap();
        forger.bind_auto().unwrap();
        // RTM_DELLINK of lan0 and RTM_DELROUTE of the default route, to the groups of links, and of routes.
        let lan = followed.facts.ifindex("lan0").unwrap();
        let mut link = vec![0; 16];
        link[4..8].copy_from_slice(&lan.to_ne_bytes());
        let mut route = vec![0; 12];
        route[0] = 2;
        for (kind, group, body) in [(17_u16, 1_u32, link), (25, 7, route)] {
            let mut message = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
            message.extend(kind.to_ne_bytes());
            message.extend([0; 10]);
            message.extend(body);
            forger.send_to(&message, &SocketAddr::new(0, 1 << (group - 1)), 0).unwrap();
        }
        assert!(followed.look());
        assert_eq!((followed.facts, followed.stale, followed.changes.len()), (before, 0, 0));
    });
}

/// Bytes that this process has in memory.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// And prints what it costs: `FASTSWAN_ROUTES=1000000 cargo test --release … -- --nocapture large_table`.
#[test]
fn a_large_table_is_followed_while_it_is_read_again() {
    let count: u32 = std::env::var("FASTSWAN_ROUTES").map_or(5000, |count| count.parse().unwrap());
    following("a large table", async |gateway, followed| {
        drop(followed);
        let batch = |verb: &str, shift: u32, numbers: std::ops::Range<u32>| {
            let batch = tempfile::NamedTempFile::new().unwrap();
            let lines = numbers.fold(String::new(), |mut lines, number| {
                let address = std::net::Ipv4Addr::from(0x2000_0000 + (number << 8));
                let _ =
                    writeln!(lines, "route {verb} {address}/24 via 192.0.2.{}", (number + shift) % 200 + 2);
                lines
            });
            fs::write(batch.path(), lines).unwrap();
            gateway.ip(&format!("-batch {}", batch.path().display())).unwrap();
        };
        batch("add", 0, 0..count);
        let (before, began) = (resident(), Instant::now());
        let mut host = NetlinkHost::open().unwrap();
        let Some(HostEvent::Snapshot(facts)) = host.next_event().await.unwrap() else { panic!() };
        let (read, with_facts) = (began.elapsed(), resident().saturating_sub(before));
        let routes = facts.routes.len();
        drop(facts);
        let store = resident().saturating_sub(before);
        println!(
            "{routes} routes read in {read:?}; {} bytes each, {} with the facts",
            store / routes as u64,
            with_facts / routes as u64
        );

        let changes = 10_000.min(count);
        batch("replace", 1, 0..changes);
        let began = Instant::now();
        let mut told = 0;
        while told < changes as usize {
            match host.next_event().await.unwrap() {
                Some(HostEvent::Changes(changes)) => told += changes.len(),
                other => panic!("{other:?}"),
            }
        }
        println!("{told} changes in {:?}: {:?} each", began.elapsed(), began.elapsed() / changes);
        // An address goes: everything is read again beside the loop.
        gateway.ip("address add 192.0.2.9/24 dev out0").unwrap();
        gateway.ip("route add 10.9.0.0/16 via 192.0.2.2 src 192.0.2.9").unwrap();
        let mut followed = Followed { host, facts: HostFacts::vouched(), stale: 0, changes: Vec::new() };
        followed.look();
        gateway.ip("address del 192.0.2.9/24 dev out0").unwrap();
        let (began, mut longest) = (Instant::now(), Duration::ZERO);
        while began.elapsed() < Duration::from_secs(3) {
            let turn = Instant::now();
            followed.look();
            longest = longest.max(turn.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        println!(
            "the longest turn while everything is read again: {longest:?}; {} changes",
            followed.changes.len()
        );
        assert_eq!(followed.stale, 0);
    });
}

fn pick(random: &mut StdRng, words: &[&str]) -> String {
    (*words.choose(random).unwrap()).to_owned()
}

/// What a route without a next hop does.
fn kind_of(random: &mut StdRng, target: &str) -> String {
    if target.is_empty() {
        pick(random, &["blackhole", "unreachable", "prohibit", "throw"])
    } else {
        String::new()
    }
}

/// A command for `ip`, made up; many are refused, and some fit.
fn command(random: &mut StdRng) -> String {
    let verb =
        pick(random, &["add", "add", "append", "prepend", "replace", "replace", "del", "del", "change"]);
    let rest = match random.random_range(0..20) {
        0..=6 => {
            let prefix = pick(random, &["10.9.0.0/16", "10.9.1.0/24", "default", "10.9.1.1"]);
            let target = pick(
                random,
                &[
                    "via 192.0.2.2",
                    "via 192.0.2.3",
                    "via 10.1.0.5",
                    "via 192.0.2.2 mtu 1400",
                    "via 192.0.2.2 src 192.0.2.9",
                    "dev out0",
                    "via 198.51.100.2",
                    "dev veth7",
                    "nexthop via 192.0.2.2 nexthop via 10.1.0.5",
                    "nexthop via 192.0.2.2 nexthop via 198.51.100.2",
                    "nexthop via 192.0.2.2 nexthop via 192.0.2.3",
                    "nhid 1",
                    "nhid 2",
                    "nhid 10",
                    "",
                ],
            );
            let kind = kind_of(random, &target);
            let more = pick(
                random,
                &[
                    "",
                    "",
                    "",
                    "metric 5",
                    "metric 9",
                    "tos 0x10",
                    "tos 0x10 metric 5",
                    "table 100",
                    "proto static",
                ],
            );
            format!("route {verb} {kind} {prefix} {target} {more}")
        }
        7..=12 => {
            let prefix = pick(random, &["2001:db8:9::/48", "2001:db8:9:1::/64", "default", "2001:db8:9::1"]);
            let target = pick(
                random,
                &[
                    "via 2001:db8:f::2",
                    "via 2001:db8:f::3",
                    "via 2001:db8:f::4",
                    "via 2001:db8:1::5",
                    "via 2001:db8:f::2 mtu 1400",
                    "dev out0",
                    "dev veth7",
                    "nexthop via 2001:db8:f::2 nexthop via 2001:db8:1::5",
                    "nexthop via 2001:db8:f::2 nexthop via 2001:db8:f::3",
                    "nhid 3",
                    "nhid 4",
                    "",
                ],
            );
            let kind = kind_of(random, &target);
            let more = pick(
                random,
                &[
                    "",
                    "",
                    "",
                    "metric 5",
                    "metric 9",
                    "from 2001:db8:1::/48",
                    "table 100",
                    "expires 100",
                    "proto ra",
                ],
            );
            format!("-6 route {verb} {kind} {prefix} {target} {more}")
        }
        13 => {
            let verb = pick(random, &["add", "del"]);
            let family = pick(random, &["", "-6"]);
            let what = pick(
                random,
                &["table 100", "table 101", "iif lan0 table 100", "fwmark 1 table 100", "prohibit"],
            );
            let priority = pick(random, &["100", "100", "101", "40000"]);
            format!("{family} rule {verb} priority {priority} {what}")
        }
        14 => {
            let verb = pick(random, &["add", "del", "del"]);
            let address = pick(
                random,
                &[
                    "192.0.2.9/24",
                    "192.0.2.1/24",
                    "198.51.100.1/24",
                    "198.51.100.7/32",
                    "2001:db8:7::1/64 nodad",
                ],
            );
            let device = if address.starts_with("192") { "out0" } else { "veth7" };
            format!(
                "address {verb} {} dev {device}",
                if verb == "del" { address.trim_end_matches(" nodad") } else { &address }
            )
        }
        15 => {
            let device = pick(random, &["out0", "veth7", "veth7", "veth8"]);
            let what = pick(random, &["down", "up", "up", "mtu 1400", "mtu 1500"]);
            format!("link set {device} {what}")
        }
        16 => pick(random, &["link del veth7", "link add veth7 type veth peer name veth8"]),
        17 => {
            let verb = pick(random, &["add", "replace", "del"]);
            let id = pick(random, &["id 1", "id 2", "id 3", "id 4", "id 10"]);
            let what = match id.as_str() {
                _ if verb == "del" => "",
                "id 10" => "group 1/2",
                "id 1" => "via 192.0.2.2 dev out0",
                "id 2" => "via 10.1.0.5 dev lan0",
                "id 3" => "via 2001:db8:f::2 dev out0",
                _ => "via 2001:db8:1::5 dev lan0",
            };
            format!("nexthop {verb} {id} {what}")
        }
        _ => {
            let destination = pick(random, &["192.0.2.2", "192.0.2.3", "2001:db8:f::3"]);
            let what = pick(
                random,
                &[
                    "nud failed",
                    "nud stale lladdr 02:00:00:00:00:cc",
                    "nud permanent lladdr 02:00:00:00:00:dd",
                ],
            );
            format!("neighbour replace {destination} dev out0 {what}")
        }
    };
    rest.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether what is told is what is read, or unclear where a reading is to come.
fn is_safe(told: &HostFacts, read: &HostFacts) -> Result<(), String> {
    type Key = (u32, ipnet::IpNet);
    let prefixes: BTreeSet<Key> =
        told.routes.iter().chain(&read.routes).map(|route| (route.table, route.destination)).collect();
    for (table, prefix) in prefixes {
        let of = |facts: &HostFacts| -> Vec<_> {
            facts
                .routes
                .iter()
                .filter(|route| (route.table, route.destination) == (table, prefix))
                .copied()
                .collect()
        };
        let (told, read) = (of(told), of(read));
        if told != read && !told.iter().any(|route| route.kind == RouteKind::Unclear) {
            return Err(format!("{prefix} of table {table}: told {told:#?}, read {read:#?}"));
        }
    }
    // A link's peer and its MTU for IPv6 are looked at, not told.
    let known = |link: &Link| Link { parent: None, mtu_v6: 0, ..link.clone() };
    let without_routes = |facts: &HostFacts| HostFacts {
        routes: Vec::new(),
        links: facts.links.iter().map(known).collect(),
        ..facts.clone()
    };
    if without_routes(told) == without_routes(read) { Ok(()) } else { Err(difference(told, read)) }
}

/// Follows made-up commands, and compares what is told with what is read: after each, when it must be safe, and now and
/// then when all has been read, when it must be the same.
fn follow_commands(seed: u64, commands: usize, broken: Option<BrokenHostRule>) -> Result<(), String> {
    let site = Site::new().unwrap();
    let gateway = &site.gateway;
    gateway.enter(|| {
        runtime().block_on(async {
            let mut host = NetlinkHost::open().unwrap();
            if let Some(rule) = broken {
                host = host.with_broken_rule(rule);
            }
            let mut followed = Followed::with(host).await;
            let mut random = StdRng::seed_from_u64(seed);
            let mut done: Vec<String> = Vec::new();
            let soon = if broken.is_some() { Duration::from_millis(500) } else { SOON };
            for number in 1..=commands {
                let command = command(&mut random);
                if gateway.ip(&command).is_ok() {
                    done.push(command);
                }
                let story = |error: String| format!("seed {seed}: {error}\nafter:\n{}", done.join("\n"));
                if random.random_bool(0.5) {
                    // What goes in silence may go a moment after its cause has been told.
                    let mut safe = Ok(());
                    for _ in 0..3 {
                        followed.catch_up().await;
                        safe = is_safe(&sorted(followed.facts.clone()), &read(gateway));
                        if safe.is_ok() {
                            break;
                        }
                    }
                    safe.map_err(story)?;
                }
                if number % 25 == 0 {
                    let began = Instant::now();
                    loop {
                        followed.follow_for(Duration::from_millis(50)).await;
                        let (told, read) = (sorted(followed.facts.clone()), read(gateway));
                        if told == read {
                            break;
                        }
                        if began.elapsed() > soon {
                            return Err(story(difference(&told, &read)));
                        }
                    }
                }
            }
            if followed.stale > 0 { Err(format!("seed {seed}: lost track")) } else { Ok(()) }
        })
    })
}

#[test]
fn to_follow_is_to_read_again() {
    if lab::require_root("following made-up commands") {
        let seed = std::env::var("FASTSWAN_SEED").ok().and_then(|seed| seed.parse().ok());
        for seed in seed.map_or(1..=4, |seed: u64| seed..=seed) {
            follow_commands(seed, 300, None).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

#[test]
fn a_broken_rule_of_following_is_noticed() {
    if lab::require_root("following with a broken rule") {
        for broken in [BrokenHostRule::IgnoresReplacement, BrokenHostRule::IgnoresLinksThatGoDown] {
            let convicted = (1..=4).any(|seed| follow_commands(seed, 300, Some(broken)).is_err());
            assert!(convicted, "{broken:?}");
        }
    }
}

/// A site whose peer forwards to networks behind a link that takes packets up to 1300 bytes, and tells so who sends longer ones.
fn narrow_site() -> Site {
    let site = Site::new().unwrap();
    site.route().unwrap();
    site.peer.forward().unwrap();
    site.peer.ip("link add far0 mtu 1300 type veth peer name far1").unwrap();
    for (network, via) in [("10.3.0.0/16", "192.0.2.2"), ("2001:db8:3::/48", "2001:db8:f::2")] {
        for device in ["far0", "far1"] {
            site.peer.ip(&format!("link set {device} up")).unwrap();
        }
        site.peer.ip(&format!("route add {network} dev far0")).unwrap();
        site.gateway.ip(&format!("route add {network} via {via}")).unwrap();
    }
    site
}

/// A socket that sends packets of 1400 bytes and more, which must not be fragmented, from this thread's namespace. It must be there
/// when the kernel is told that they are too long.
fn long_packets(v6: bool) -> impl Fn(IpAddr) {
    let socket = UdpSocket::bind(if v6 { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
    move |destination| {
        // The kernel refuses to send one if it knows that it is too long.
        let _ = socket.send_to(&[0; 1400], (destination, 9));
    }
}

fn learnt(destination: IpAddr) -> PathMtu {
    PathMtu { destination, mtu: 1300 }
}

const FAR: [&str; 2] = ["10.3.0.9", "2001:db8:3::9"];

#[test]
fn path_mtus_are_followed_from_when_the_kernel_learns_them_until_they_are_flushed() {
    if !lab::require_root("learning path MTUs") {
        return;
    }
    let site = narrow_site();
    site.gateway.enter(|| {
        runtime().block_on(async {
            let mut followed = Followed::open().await;
            for destination in FAR.map(|address| address.parse::<IpAddr>().unwrap()) {
                let send = long_packets(destination.is_ipv6());
                send(destination);
                let is_known = |facts: &HostFacts| facts.path_mtus.contains(&learnt(destination));
                let took = followed.until(PATIENCE, "a path MTU", is_known).await;
                assert!(took < Duration::from_millis(500), "{destination}: {took:?}");
            }
            // One that begins now reads them, and so does this one again.
            let all: Vec<_> = FAR.iter().map(|address| learnt(address.parse().unwrap())).collect();
            assert_eq!(read(&site.gateway).path_mtus, all);
            followed.follow_for(Duration::from_secs(6)).await;
            assert_eq!(sorted(followed.facts.clone()).path_mtus, all);

            for family in ["-4", "-6"] {
                site.gateway.ip(&format!("{family} route flush cache")).unwrap();
            }
            followed.until(PATIENCE, "flushed", |facts| facts.path_mtus.is_empty()).await;
            assert_eq!((followed.stale, followed.facts.unclear_path_mtus.len()), (0, 0));
        });
    });
}

/// Each message is about another address, and there are far more than are asked about: what the kernel has learnt is read again,
/// nothing else is, and the source goes on.
#[test]
fn more_messages_than_are_asked_about_make_path_mtus_unclear_for_a_while() {
    if !lab::require_root("a flood of ICMP messages") {
        return;
    }
    let site = narrow_site();
    site.gateway.enter(|| {
        runtime().block_on(async {
            let mut followed = Followed::open().await;
            let send = long_packets(false);
            let addresses = (0..12_u8).flat_map(|third| (0..250_u8).map(move |last| [10, 3, third, last]));
            addresses.for_each(|address| send(address.into()));
            followed.until(PATIENCE, "unclear", |facts| facts.unclear_path_mtus == [Family::V4]).await;
            followed.until(PATIENCE, "clear again", |facts| facts.unclear_path_mtus.is_empty()).await;
            assert_eq!(followed.stale, 0);
            let last = [10, 3, 200, 1].into();
            send(last);
            followed.until(PATIENCE, "the next", |facts| facts.path_mtus.contains(&learnt(last))).await;
        });
    });
}

/// Messages that an inbound policy asks IPsec of come to nobody: the kernel learns nothing, and nothing is unclear.
#[test]
fn messages_that_a_policy_keeps_from_the_host_are_no_loss() {
    if !lab::require_root("ICMP messages without IPsec") {
        return;
    }
    let site = narrow_site();
    let selector = "src 192.0.2.2/32 dst 192.0.2.1/32 proto icmp";
    let template = "tmpl src 192.0.2.2 dst 192.0.2.1 proto esp mode tunnel";
    site.gateway.ip(&format!("xfrm policy add dir in {selector} {template}")).unwrap();
    site.gateway.enter(|| {
        runtime().block_on(async {
            let mut followed = Followed::open().await;
            let send = long_packets(false);
            for last in 0..20 {
                send([10, 3, 0, last].into());
                followed.follow_for(Duration::from_millis(50)).await;
            }
            let sockets = fs::read_to_string("/proc/thread-self/net/raw").unwrap();
            let dropped = |socket: &str| socket.split_whitespace().last()?.parse::<u64>().ok();
            assert!(sockets.lines().filter_map(dropped).sum::<u64>() > 0, "{sockets}");
            assert!(
                !followed.changes.iter().any(|change| matches!(change, HostChange::UnclearPathMtus(_))),
                "path MTUs were unclear"
            );
            assert_eq!(followed.facts.path_mtus, []);
        });
    });
}

/// Sysctls are those of the thread that reads them, and sockets belong where they were opened.
#[test]
fn a_host_source_stays_in_the_namespace_that_it_was_opened_in() {
    if !lab::require_root("two namespaces") {
        return;
    }
    let (here, elsewhere) = (Site::new().unwrap(), Namespace::new("elsewhere").unwrap());
    let runtime = runtime();
    let host = here.gateway.enter(|| runtime.block_on(async { NetlinkHost::open().unwrap() }));
    elsewhere.enter(|| {
        runtime.block_on(async {
            let mut followed = Followed::with(host).await;
            assert_eq!(sorted(followed.facts.clone()), read(&here.gateway));
            for (key, value) in
                [("net.ipv4.conf.lan0.forwarding", "1"), ("net.ipv4.conf.all.disable_xfrm", "1")]
            {
                here.gateway.sysctl(key, value).unwrap();
                followed.until_as_read(&here.gateway, key).await;
            }
            let lan = named(&followed.facts, "lan0");
            assert!(lan.forwards.v4 && lan.bypasses_xfrm);
        });
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
