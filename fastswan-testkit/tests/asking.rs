//! The kernel's own routes are asked about one packet in many: where they lead elsewhere the packet passes, and the gateway
//! has the host read again.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use fastswan::{
    BpfTable, Gateway, HostEvent, HostFacts, HostSource, NetlinkHost, OffloadTable as _, PassReason,
    Selector, StaticSource, XdpForwarder,
    forwarder::{LoadConfig, RunAction},
    gateway::Status,
    host::HostError,
    policy::{Egress, NextHop},
    source::fixed::StaticPolicy,
    table::{
        Asked, Cell, Contents, Forwarding, Forwards, Port, Ports as _, Probes, ReversePath, Slot,
        TableConfig, TableCounters as _, Verdict,
    },
};
use fastswan_testkit::{
    cpu::run_on,
    frames::{Frame, Tag},
    lab,
    prog_run::ProgRun,
    site::{CLIENT, LAN, OUT, PEER, Site},
};
use tokio::time::{sleep, timeout};

const TUNNEL: Slot = Slot(0);
const VLAN: u16 = 5;
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than a change of the host explains a difference.
const QUIET: Duration = Duration::from_millis(80);

fn config(ask_back: u32) -> LoadConfig {
    LoadConfig::new(TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 8 }).ask_back(ask_back)
}

/// Runs a story in the gateway of a site, on one CPU: what was forwarded is counted for each.
fn story(what: &str, tell: impl FnOnce(&Site) + Send) {
    if !lab::require_root(what) {
        return;
    }
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            run_on(&[0]).unwrap();
            let site = Site::new().unwrap();
            site.route().unwrap();
            // It stands for a device of a VLAN, which not every kernel has.
            site.gateway.ip("link add vlan0 type veth peer name vlan1").unwrap();
            site.gateway.ip("link set vlan0 up").unwrap();
            site.gateway.join_this_thread().unwrap();
            tell(&site);
        });
        told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// A table that sends all of both tunnels to out0, whatever the kernel does.
fn table(site: &Site, ask_back: u32) -> ProgRun {
    let index = |device: &str| site.gateway.ifindex(device).unwrap();
    let mut program = ProgRun::load(config(ask_back)).unwrap();
    let cell = |source: &str, destination: &str| Cell {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    let fast = Verdict::Fast { slot: TUNNEL, probes: Probes::default() };
    let forwarding = Forwarding { ifindex: index("out0"), max_length: 1400, rewrite: Some((OUT, PEER)) };
    let contents = Contents {
        cells: [
            (cell("10.1.0.0/16", "10.2.0.0/16"), fast),
            (cell("2001:db8:1::/48", "2001:db8:2::/48"), fast),
        ]
        .into(),
        slots: [(TUNNEL, Ok(forwarding))].into(),
        ..Contents::default()
    };
    program.table.apply(&contents.replacing(&Contents::default())).unwrap();
    let port = Port {
        ifindex: index("lan0"),
        vlan: 0,
        receiver: index("lan0"),
        address: LAN,
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    };
    program.table.set_port(&port).unwrap();
    let receiver = index("vlan0");
    program.table.set_port(&Port { vlan: VLAN, receiver, ..port }).unwrap();
    program
}

fn v4(destination: &str) -> Frame {
    Frame::v4("10.1.0.5", destination).macs(CLIENT, LAN).udp(1000, 2000).payload(100)
}

fn v6(destination: &str) -> Frame {
    Frame::v6("2001:db8:1::5", destination).macs(CLIENT, LAN).udp(1000, 2000).payload(100)
}

fn asked(program: &ProgRun) -> (u64, u64) {
    let Asked { asked, differs, .. } = program.table.asked();
    (asked, differs)
}

/// What the program does with a frame from the client; what it passes is as it was.
fn fate(site: &Site, program: &ProgRun, frame: &Frame) -> (RunAction, Option<PassReason>) {
    let frame = frame.clone().build();
    let outcome = program.run(&frame, site.gateway.ifindex("lan0").unwrap()).unwrap();
    assert!(outcome.action != RunAction::Pass || outcome.frame == frame, "left as it was");
    (outcome.action, outcome.reason)
}

const FAST: (RunAction, Option<PassReason>) = (RunAction::Redirect, None);
const DIFFERS: (RunAction, Option<PassReason>) = (RunAction::Pass, Some(PassReason::FibDiffers));

#[test]
fn packets_that_the_kernel_routes_to_the_same_device_stay_fast() {
    story("agreeing with the kernel", |site| {
        let program = table(site, 1);
        let tagged = [Tag::vlan(VLAN)];
        let frames = [
            v4("10.2.0.9"),
            v4("10.2.9.9").payload(1400 - 28),
            v4("10.2.0.9").tags(&tagged),
            v6("2001:db8:2::9"),
            v6("2001:db8:2::77").payload(1400 - 48).tags(&tagged),
        ];
        for frame in &frames {
            assert_eq!(fate(site, &program, frame), FAST);
        }
        // The neighbour is not known: that is not for routes to say.
        site.gateway.ip("neighbour flush dev out0").unwrap();
        for frame in &frames {
            assert_eq!(fate(site, &program, frame), FAST);
        }
        assert_eq!(asked(&program), (10, 0));
    });
}

#[test]
fn what_the_kernel_does_otherwise_and_the_table_does_not_know_passes() {
    story("contradicting the table", |site| {
        let program = table(site, 1);
        let unasked = table(site, 0);
        let tagged = || v4("10.2.0.9").tags(&[Tag::vlan(VLAN)]);
        site.gateway.ip("route add blackhole default table 100").unwrap();
        site.gateway.ip("-6 route add blackhole default table 100").unwrap();
        let by_port = "rule add ipproto udp dport 2000 lookup 100 priority 50";
        let iif = "rule add iif vlan0 lookup 100 priority 50";
        let cases: Vec<(&str, &str, Frame)> = vec![
            ("route add blackhole 10.2.7.0/24", "route del blackhole 10.2.7.0/24", v4("10.2.7.1")),
            ("route add unreachable 10.2.7.0/24", "route del unreachable 10.2.7.0/24", v4("10.2.7.1")),
            ("route add prohibit 10.2.7.0/24", "route del prohibit 10.2.7.0/24", v4("10.2.7.1")),
            ("route add 10.2.7.0/24 dev lan0", "route del 10.2.7.0/24 dev lan0", v4("10.2.7.1")),
            ("address add 10.2.7.1/32 dev lo", "address del 10.2.7.1/32 dev lo", v4("10.2.7.1")),
            (
                "route add 10.2.7.0/24 via 192.0.2.2 mtu lock 600",
                "route del 10.2.7.0/24",
                v4("10.2.7.1").payload(601 - 28),
            ),
            ("rule add tos 0x10 lookup 100 priority 50", "rule del priority 50", v4("10.2.0.9").tos(0x10)),
            (by_port, "rule del priority 50", v4("10.2.0.9")),
            (iif, "rule del priority 50", tagged()),
            (
                "-6 route add blackhole 2001:db8:2:7::/64",
                "-6 route del 2001:db8:2:7::/64",
                v6("2001:db8:2:7::1"),
            ),
            (
                "-6 route add 2001:db8:2:7::/64 dev lan0",
                "-6 route del 2001:db8:2:7::/64",
                v6("2001:db8:2:7::1"),
            ),
            (
                "address add 2001:db8:2:7::1/128 dev lo nodad",
                "address del 2001:db8:2:7::1/128 dev lo",
                v6("2001:db8:2:7::1"),
            ),
            (
                "-6 rule add ipproto udp dport 2000 lookup 100 priority 50",
                "-6 rule del priority 50",
                v6("2001:db8:2::9"),
            ),
        ];
        let mut differs = 0;
        for (change, undo, frame) in &cases {
            assert_eq!(fate(site, &program, frame), FAST, "before: {change}");
            site.gateway.ip(change).unwrap();
            assert_eq!(fate(site, &program, frame), DIFFERS, "{change}");
            differs += 1;
            assert_eq!(fate(site, &unasked, frame), FAST, "{change}: the table does not know");
            for other in [v4("10.2.0.9").udp(1, 2), v6("2001:db8:2::9").udp(1, 2)] {
                assert_eq!(fate(site, &program, &other), FAST, "{change}: others stay fast");
            }
            site.gateway.ip(undo).unwrap();
            assert_eq!(fate(site, &program, frame), FAST, "after: {undo}");
        }
        site.gateway.sysctl("net.ipv4.conf.lan0.forwarding", "0").unwrap();
        assert_eq!(fate(site, &program, &v4("10.2.0.9")), DIFFERS);
        assert_eq!(program.table.asked().differs, differs + 1);
        assert_eq!(asked(&unasked), (0, 0));
    });
}

#[test]
fn the_first_packet_and_then_one_in_many_is_asked_about_until_the_kernel_agrees() {
    story("asking about one in four", |site| {
        let mut program = table(site, 4);
        for number in 0..9 {
            assert_eq!(fate(site, &program, &v4("10.2.7.1")), FAST);
            assert_eq!(asked(&program), (number / 4 + 1, 0), "packet {number}");
        }
        site.gateway.ip("route add blackhole 10.2.7.0/24").unwrap();
        for _ in 9..12 {
            assert_eq!(fate(site, &program, &v4("10.2.7.1")), FAST, "not asked");
        }
        for differs in 1..4 {
            assert_eq!(fate(site, &program, &v4("10.2.7.1")), DIFFERS);
            assert_eq!(asked(&program), (3 + differs, differs), "until it agrees");
        }
        assert_eq!(fate(site, &program, &v4("10.2.0.9")), FAST, "it does");
        assert_eq!(fate(site, &program, &v4("10.2.7.1")), FAST, "one in four");

        program.table.set_asking(false);
        let before = asked(&program);
        for _ in 0..9 {
            assert_eq!(fate(site, &program, &v4("10.2.7.1")), FAST);
        }
        assert_eq!(asked(&program), before);
    });
}

/// What a host source tells when it is asked for everything.
enum Answer {
    Truth,
    Same(HostFacts),
    Nothing,
}

/// Tells what it is given, and nothing else until it is asked.
struct Deaf {
    told: VecDeque<HostEvent>,
    answer: Answer,
    asked: Arc<Mutex<Vec<Instant>>>,
}

#[async_trait]
impl HostSource for Deaf {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        match self.told.pop_front() {
            Some(event) => Ok(Some(event)),
            None => std::future::pending().await,
        }
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        Ok(self.told.is_empty())
    }

    fn resync(&mut self) {
        self.asked.lock().unwrap().push(Instant::now());
        let facts = match &self.answer {
            Answer::Truth => NetlinkHost::read_once().unwrap(),
            Answer::Same(facts) => facts.clone(),
            Answer::Nothing => return,
        };
        self.told.push_back(HostEvent::Snapshot(facts));
    }
}

/// A gateway whose host source has read the host once, and never hears of anything.
struct Host {
    forwarder: XdpForwarder,
    gateway: Gateway<StaticSource, Deaf, BpfTable>,
    asked: Arc<Mutex<Vec<Instant>>>,
    lan: u32,
}

impl Host {
    fn new(site: &Site, facts: HostFacts, answer: Answer) -> Self {
        let index = |device: &str| site.gateway.ifindex(device).unwrap();
        let (forwarder, table) = XdpForwarder::load(config(1)).unwrap();
        let selector = Selector::between("10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap());
        let outer = ["192.0.2.1", "192.0.2.2"].map(|address| address.parse().unwrap());
        let egress = Egress { next_hop: NextHop::Device, max_length: Some(1400) };
        let policy = StaticPolicy::new(selector.unwrap(), index("out0"), outer[0], outer[1])
            .priority(100)
            .egress(egress);
        let asked = Arc::default();
        let host = Deaf { told: [HostEvent::Snapshot(facts)].into(), answer, asked: Arc::clone(&asked) };
        let gateway = Gateway::new(StaticSource::new(&[policy]), host, table).with_interface("lan0");
        Self { forwarder, gateway, asked, lan: index("lan0") }
    }

    fn fate(forwarder: &XdpForwarder, lan: u32, destination: &str) -> RunAction {
        forwarder.run(&v4(destination).build(), lan).unwrap().action
    }

    /// Goes on until a packet has this fate.
    async fn until(&mut self, destination: &str, expected: RunAction) {
        let Self { forwarder, gateway, lan, .. } = self;
        let reached = async {
            while Self::fate(forwarder, *lan, destination) != expected {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let run = timeout(PATIENCE, gateway.run_until(reached)).await;
        run.unwrap_or_else(|_| panic!("{destination}: never {expected:?}")).unwrap();
    }

    async fn run(&mut self, time: Duration) {
        self.gateway.run_until(sleep(time)).await.unwrap();
    }

    fn now(&self, destination: &str) -> RunAction {
        Self::fate(&self.forwarder, self.lan, destination)
    }

    fn resyncs(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    fn status(&mut self) -> Status {
        self.gateway.status()
    }
}

fn facts() -> HostFacts {
    NetlinkHost::read_once().unwrap()
}

fn in_runtime(tell: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(tell());
}

#[test]
fn a_route_that_the_host_source_has_missed_is_found_by_the_first_packet_that_is_asked_about() {
    story("a host source that has missed a route", |site| {
        in_runtime(async || {
            let mut host = Host::new(site, facts(), Answer::Truth);
            host.until("10.2.7.1", RunAction::Redirect).await;
            host.run(QUIET).await;
            assert_eq!((host.status().asked.differs, host.resyncs()), (0, 0));

            site.gateway.ip("route add blackhole 10.2.7.0/24").unwrap();
            host.run(QUIET).await;
            assert_eq!(host.now("10.2.0.9"), RunAction::Redirect, "nothing has told");
            assert_eq!(host.now("10.2.7.1"), RunAction::Pass);
            let differed = Instant::now();
            host.run(QUIET).await;
            assert_eq!(host.resyncs(), 1);
            let noticed = host.asked.lock().unwrap()[0] - differed;
            assert!(noticed < Duration::from_millis(50), "the loop is woken, after {noticed:?}");

            // It knows now.
            host.until("10.2.0.9", RunAction::Redirect).await;
            assert_eq!(host.now("10.2.7.1"), RunAction::Pass);
            let status = host.status();
            assert_eq!(status.asked.differs, 1, "the table says so itself: {status}");
            assert_eq!(status.statistics.host_resyncs["asked_back"], 1);
            assert!(
                status.passes["fib_differs"] == 1 && status.passes["denied_destination"] == 1,
                "{status}"
            );
        });
    });
}

#[test]
fn a_source_that_cannot_be_asked_ends_all_fast_forwarding() {
    story("a host source that never learns", |site| {
        in_runtime(async || {
            let mut host = Host::new(site, facts(), Answer::Nothing);
            host.until("10.2.7.1", RunAction::Redirect).await;
            site.gateway.ip("address add 10.2.7.1/32 dev lo").unwrap();
            host.run(QUIET).await;
            assert_eq!(host.now("10.2.7.1"), RunAction::Pass);
            host.run(QUIET).await;
            assert_eq!(host.now("10.2.0.9"), RunAction::Pass);
            let status = host.status();
            assert!(status.to_string().contains("host: read again (asked_back)"), "{status}");
        });
    });
}

#[test]
fn the_host_is_read_again_for_differences_at_most_once_a_second() {
    story("a difference that stays", |site| {
        in_runtime(async || {
            let facts = facts();
            site.gateway.ip("route add blackhole 10.2.7.0/24").unwrap();
            let mut host = Host::new(site, facts.clone(), Answer::Same(facts));
            let from = Instant::now();
            while from.elapsed() < Duration::from_millis(2500) {
                host.now("10.2.7.1");
                host.run(Duration::from_millis(1)).await;
            }
            let requests = host.asked.lock().unwrap().clone();
            assert!((2..=3).contains(&requests.len()), "{requests:?} from {from:?}");
            // The mirror counts from when it looked.
            assert!(requests.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_millis(950)));
            assert_eq!(host.now("10.2.7.1"), RunAction::Pass, "asked about until it agrees");
        });
    });
}

#[test]
fn a_host_that_the_embedder_vouches_for_is_never_asked_about() {
    story("a vouched host", |site| {
        in_runtime(async || {
            let vouched = HostFacts { links: facts().links, ..HostFacts::vouched() };
            let mut host = Host::new(site, vouched, Answer::Truth);
            site.gateway.ip("route add blackhole 10.2.7.0/24").unwrap();
            host.until("10.2.7.1", RunAction::Redirect).await;
            host.run(QUIET).await;
            assert_eq!(host.now("10.2.7.1"), RunAction::Redirect);
            assert_eq!((host.status().asked, host.resyncs()), (Asked::default(), 0));
        });
    });
}
