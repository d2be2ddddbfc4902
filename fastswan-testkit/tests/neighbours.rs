//! The kernel finds the neighbours that policies wait for, keeps those that fast packets go to, and notices when one is gone,
//! although it sees no packet for them.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use fastswan::{
    BpfTable, Gateway, HostSource as _, NetlinkHost, Selector, StaticSource, XdpForwarder,
    forwarder::RunAction,
    policy::{Egress, NextHop},
    source::fixed::StaticPolicy,
    table::{TableConfig, TableCounters as _},
};
use fastswan_testkit::{
    frames::Frame,
    lab,
    site::{CLIENT, LAN, OUT, PEER, Site},
};
use tokio::time::{sleep, timeout};

/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(30);

/// Of IPv4, and of IPv6: what is inside a tunnel, its ends, and a packet for it.
struct Family {
    inside: [&'static str; 2],
    ends: [&'static str; 2],
    packet: fn() -> Frame,
    sysctls: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        inside: ["10.1.0.0/16", "10.2.0.0/16"],
        ends: ["192.0.2.1", "192.0.2.2"],
        packet: || Frame::v4("10.1.0.5", "10.2.0.9").macs(CLIENT, LAN).ttl(64).payload(100),
        sysctls: "net/ipv4/neigh/out0",
    },
    Family {
        inside: ["2001:db8:1::/48", "2001:db8:2::/48"],
        ends: ["2001:db8:f::1", "2001:db8:f::2"],
        packet: || Frame::v6("2001:db8:1::5", "2001:db8:2::9").macs(CLIENT, LAN).ttl(64).payload(100),
        sysctls: "net/ipv6/neigh/out0",
    },
];

/// A gateway with a tunnel of each family, whose kernel knows no neighbour at out0, and which nothing is sent through.
struct Host {
    site: Site,
    out: u32,
    lan: u32,
    forwarder: XdpForwarder,
    gateway: Gateway<StaticSource, NetlinkHost, BpfTable>,
}

/// Runs a story inside the gateway, and inside a runtime.
fn story<F: Future<Output = ()>>(what: &str, tell: impl FnOnce(Host) -> F + Send) {
    if !lab::require_root(what) {
        return;
    }
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            let site = Site::new().unwrap();
            site.route().unwrap();
            site.gateway.join_this_thread().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { tell(Host::new(site)).await });
        });
        told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

impl Host {
    fn new(site: Site) -> Self {
        let [lan, out] = ["lan0", "out0"].map(|device| site.gateway.ifindex(device).unwrap());
        let policies = FAMILIES.map(|Family { inside, ends, sysctls, .. }| {
            // An address gets old after 1.5 to 4.5 s, unless the neighbour was used in the second before.
            for (name, value) in [
                ("base_reachable_time_ms", "3000"),
                ("delay_first_probe_time", "1"),
                ("gc_stale_time", "5"),
                ("retrans_time_ms", "200"),
            ] {
                site.gateway.sysctl(&format!("{sysctls}/{name}"), value).unwrap();
            }
            site.gateway.ip(&format!("neighbour del {} dev out0", ends[1])).unwrap();
            let [source, destination] = inside.map(|prefix| prefix.parse().unwrap());
            let [local, remote] = ends.map(|end| end.parse().unwrap());
            StaticPolicy::new(Selector::between(source, destination).unwrap(), out, local, remote)
                .priority(100)
                .egress(Egress { next_hop: NextHop::Neighbour, max_length: Some(1400) })
        });
        let (forwarder, table) =
            XdpForwarder::load(TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 8 }).unwrap();
        let source = StaticSource::new(&policies);
        let gateway = Gateway::new(source, NetlinkHost::open().unwrap(), table).with_interface("lan0");
        Self { site, out, lan, forwarder, gateway }
    }

    async fn run(&mut self, time: Duration) {
        self.gateway.run_until(sleep(time)).await.unwrap();
    }

    /// Goes on until so many policies are fast, and returns how long that took.
    async fn until_fast(&mut self, policies: u64) -> Duration {
        let begin = Instant::now();
        while self.gateway.status().fast_policies() != policies {
            assert!(begin.elapsed() < PATIENCE, "{}", self.gateway.status());
            self.run(Duration::from_millis(20)).await;
        }
        begin.elapsed()
    }

    /// What becomes of a packet that comes in now. Nothing but the program gets it.
    fn fate(&self, family: &Family) -> RunAction {
        self.forwarder.run(&(family.packet)().build(), self.lan).unwrap().action
    }

    /// What the kernel says of a family's neighbour.
    fn state(&self, family: &Family) -> String {
        self.site.gateway.ip(&format!("neighbour show {} dev out0", family.ends[1])).unwrap()
    }
}

#[test]
fn policies_whose_neighbours_are_unknown_are_fast_before_their_first_packet() {
    story("unknown neighbours", async |mut host| {
        let took = host.until_fast(2).await;
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert!(host.gateway.table().passes().iter().all(|(_, packets)| *packets == 0), "there was a packet");
        for family in &FAMILIES {
            let run = host.forwarder.run(&(family.packet)().build(), host.lan).unwrap();
            assert_eq!(run.frame, (family.packet)().macs(OUT, PEER).ttl(63).build());
        }
        let status = host.gateway.status();
        assert_eq!((status.neighbours.resolved, status.neighbours.unresolved), (2, 0));
        assert_eq!((status.statistics.solicitations, status.failed_solicitations), (2, 0), "{status}");
        assert!(
            status.to_string().contains("neighbours: 2 resolved, 0 not, asked for 2 times\n"),
            "{status}"
        );
    });
}

#[test]
fn the_kernel_keeps_an_ipv4_neighbour_that_fast_packets_go_to_and_throws_others_away() {
    let [used, idle] = &FAMILIES;
    keep(used, idle);
}

#[test]
fn the_kernel_keeps_an_ipv6_neighbour_that_fast_packets_go_to_and_throws_others_away() {
    let [idle, used] = &FAMILIES;
    keep(used, idle);
}

fn keep(used: &'static Family, idle: &'static Family) {
    story("a neighbour in use", async |mut host| {
        // With fewer entries (`gc_thresh1`) the kernel throws none away.
        for number in 1..=130 {
            for address in [format!("10.1.9.{number}"), format!("2001:db8:1::9:{number}")] {
                let entry = format!("{address} lladdr 02:00:00:00:00:77 dev lan0");
                host.site.gateway.ip(&format!("neighbour add {entry}")).unwrap();
            }
        }
        host.until_fast(2).await;
        let begin = Instant::now();
        let (mut young, mut was_old, mut has_gone) = (begin, false, false);
        // The kernel looks for old ones every 15 s.
        while begin.elapsed() < Duration::from_secs(32) {
            assert_eq!(host.fate(used), RunAction::Redirect, "{}", host.state(used));
            host.run(Duration::from_millis(50)).await;
            let state = host.state(used);
            if !state.contains("STALE") {
                young = Instant::now();
            }
            assert!(young.elapsed() < Duration::from_secs(3), "{state}");
            // Nothing is asked of it while it is known.
            let is_old = host.state(idle).contains("STALE");
            has_gone |= was_old && !is_old;
            was_old = is_old;
        }
        assert!(has_gone, "{}", host.state(idle));
    });
}

#[test]
fn a_neighbour_that_is_gone_is_noticed_although_all_packets_are_fast_and_found_when_it_is_back() {
    for family in &FAMILIES {
        story("a neighbour that goes", async |mut host| {
            host.until_fast(2).await;
            let prefix = if family.ends[1].contains(':') { "48 nodad" } else { "24" };
            let address = format!("{}/{prefix} dev eth0", family.ends[1]);
            host.site.peer.ip(&format!("address del {}", address.replace("nodad", ""))).unwrap();
            let begin = Instant::now();
            while host.fate(family) == RunAction::Redirect {
                assert!(begin.elapsed() < PATIENCE, "{}", host.state(family));
                host.run(Duration::from_millis(50)).await;
            }
            host.site.peer.ip(&format!("address add {address}")).unwrap();
            host.until_fast(2).await;
        });
    }
}

/// It would lose them if it were asked as it is about others.
#[test]
fn what_somebody_has_entered_is_left_alone_and_requests_that_fail_are_counted() {
    story("neighbours that somebody has entered", async |host| {
        let Host { site, out, .. } = host;
        let mut source = NetlinkHost::open().unwrap();
        let entries = ["nud permanent", "nud noarp", "nud stale extern_learn", "managed", "nud stale router"];
        let addresses = ["192.0.2", "2001:db8:f:"].map(|net| {
            let separator = if net.contains(':') { ':' } else { '.' };
            (0..entries.len()).map(|host| format!("{net}{separator}{}", 50 + host)).collect::<Vec<_>>()
        });
        let mut before = Vec::new();
        for family in &addresses {
            for (address, entry) in family.iter().zip(entries) {
                let known = if entry == "managed" { "" } else { "lladdr 02:00:00:00:00:77" };
                site.gateway.ip(&format!("neighbour add {address} dev out0 {known} {entry}")).unwrap();
                before.push(site.gateway.ip(&format!("neighbour show {address} dev out0")).unwrap());
            }
        }
        let all: Vec<_> = addresses.concat().iter().map(|address| (out, address.parse().unwrap())).collect();
        source.solicit(&all);
        let _ = timeout(Duration::from_millis(500), async {
            loop {
                source.next_event().await.unwrap();
            }
        })
        .await;
        for (address, before) in addresses.concat().iter().zip(before) {
            let after = site.gateway.ip(&format!("neighbour show {address} dev out0")).unwrap();
            if before.contains("router") {
                assert!(after.contains("router") && after.contains("DELAY"), "{before} became {after}");
            } else if before.contains("managed") {
                assert!(after.contains("managed"), "{before} became {after}");
            } else {
                assert_eq!(after, before);
            }
        }
        assert_eq!(source.failed_solicitations(), 0);
        source.solicit(&[(i32::MAX as u32, [192, 0, 2, 2].into())]);
        let failed = async {
            while source.failed_solicitations() == 0 {
                let _ = timeout(Duration::from_millis(20), source.next_event()).await;
            }
        };
        timeout(PATIENCE, failed).await.unwrap();
    });
}
