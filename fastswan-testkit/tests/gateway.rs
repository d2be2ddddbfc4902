//! The assembled loop on a real host: what its source says is what the program does, and nothing is fast when
//! the source loses track or the loop stops.

use std::{
    future::{Future, pending},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use fastswan::{
    BpfTable, ChannelSource, Gateway, NetlinkHost, NetlinkSource, PassReason, PolicyEvent, PolicySource,
    SecurityAssociation, Selector, Snapshot, SourceError, StaticSource, XdpForwarder,
    compiler::{Cause, Explanation, Flow, PolicyState},
    forwarder::{AttachConfig, RunAction},
    gateway::{GatewayError, PolicyStatus},
    mirror::InterfaceState,
    policy::{Egress, NextHop},
    source::{StaleCause, fixed::StaticPolicy},
    table::{TableConfig, TableCounters as _},
};
use fastswan_testkit::{
    frames::Frame,
    lab::{self, Namespace},
    promote::Promote,
    site::{CLIENT, LAN, OUT, PEER, Site},
};
use futures::FutureExt as _;
use tokio::{
    task::yield_now,
    time::{sleep, timeout},
};

const POLICY: &str = "src 10.1.0.0/16 dst 10.2.0.0/16 dir out";
const TUNNEL: &str = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel";
/// A destination inside the policy.
const INSIDE: &str = "10.2.0.9";
/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough never to end by itself.
const LEASE: Duration = Duration::from_secs(3600);

/// The gateway of a site, as seen from inside.
struct Host {
    site: Site,
    lan: u32,
    out: u32,
}

/// Runs a story inside the gateway of a site, and inside a runtime.
fn story<F: Future<Output = ()>>(what: &str, tell: impl FnOnce(Host) -> F + Send) {
    if !lab::require_root(what) {
        return;
    }
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            let site = Site::new().unwrap();
            site.route().unwrap();
            site.gateway.join_this_thread().unwrap();
            let index = |device| site.gateway.ifindex(device).unwrap();
            let host = Host { lan: index("lan0"), out: index("out0"), site };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(tell(host));
        });
        told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

impl Host {
    fn namespace(&self) -> &Namespace {
        &self.site.gateway
    }

    /// The kernel's policies, all tunnels of which are promoted to out0.
    fn kernel(&self) -> impl PolicySource + use<> {
        Promote::new(NetlinkSource::open().unwrap(), self.out, NextHop::Neighbour, |_| true)
    }

    /// The same policy as [`POLICY`], for a source without a kernel.
    async fn snapshot(&self) -> Snapshot {
        let prefixes = ["10.1.0.0/16", "10.2.0.0/16"].map(|prefix| prefix.parse().unwrap());
        let mut source = StaticSource::new(&[StaticPolicy::new(
            Selector::between(prefixes[0], prefixes[1]).unwrap(),
            self.out,
            "192.0.2.1".parse().unwrap(),
            "192.0.2.2".parse().unwrap(),
        )
        .priority(100)
        .egress(Egress { next_hop: NextHop::Neighbour, max_length: None })]);
        let Some(PolicyEvent::Snapshot(mut snapshot)) = source.next_event().await.unwrap() else { panic!() };
        for policy in &mut snapshot.policies {
            let overhead = policy.assumed.take();
            let sa = SecurityAssociation::for_template(&policy.templates[0], 0x100);
            snapshot.sas.push(SecurityAssociation { offload: policy.offload, overhead, ..sa });
        }
        snapshot
    }

    /// A gateway that follows this host.
    fn gateway<S: PolicySource>(&self, source: S) -> (Program, Watched<S>) {
        let (forwarder, table) =
            XdpForwarder::load(&TableConfig { cells_v4: 256, cells_v6: 256, exceptions: 64, slots: 16 })
                .unwrap();
        let gateway = Gateway::new(source, NetlinkHost::open().unwrap(), table).with_lease(LEASE);
        let gateway = gateway.with_interface("lan0");
        (Program { forwarder, lan: self.lan }, gateway)
    }
}

type Watched<S> = Gateway<S, NetlinkHost, BpfTable>;

/// The program, which is asked what it would do.
struct Program {
    forwarder: XdpForwarder,
    lan: u32,
}

impl Program {
    /// The fate of a packet from the client.
    fn fate(&self, destination: &str) -> RunAction {
        self.forwarder.run(&frame(destination).build(), self.lan).unwrap().action
    }

    /// Runs the gateway until a packet has this fate, which it must have soon.
    async fn until<S: PolicySource>(&self, gateway: &mut Watched<S>, destination: &str, fate: RunAction) {
        let reached = async {
            while self.fate(destination) != fate {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let run = timeout(PATIENCE, gateway.run_until(reached)).await;
        run.unwrap_or_else(|_| panic!("{destination}: never {fate:?}")).unwrap();
    }

    /// Why the kernel gets a packet.
    fn reason<S: PolicySource>(&self, gateway: &Watched<S>, destination: &str) -> PassReason {
        let before = gateway.table().passes();
        assert_eq!(self.fate(destination), RunAction::Pass, "{destination}");
        let mut passes = gateway.table().passes();
        passes.retain(|counted| !before.contains(counted));
        let [(reason, _)] = passes[..] else { panic!("counted as {passes:?}") };
        reason
    }
}

fn frame(destination: &str) -> Frame {
    Frame::v4("10.1.0.5", destination).macs(CLIENT, LAN).payload(100).ttl(64)
}

#[test]
fn a_policy_is_fast_from_its_addition_to_its_deletion() {
    story("following the kernel's policies", async |host| {
        let (program, mut gateway) = host.gateway(host.kernel());
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::Disabled);
        for end in [format!("delete {POLICY}"), "flush".to_owned()] {
            host.namespace().ip(&format!("xfrm policy add {POLICY} priority 100 {TUNNEL}")).unwrap();
            program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
            let run = program.forwarder.run(&frame(INSIDE).build(), host.lan).unwrap();
            assert_eq!(run.frame, frame(INSIDE).macs(OUT, PEER).ttl(63).build());
            assert_eq!(program.reason(&gateway, "192.0.2.2"), PassReason::NoPolicy);

            host.namespace().ip(&format!("xfrm policy {end}")).unwrap();
            program.until(&mut gateway, INSIDE, RunAction::Pass).await;
            assert_eq!(program.reason(&gateway, INSIDE), PassReason::NoPolicy, "{end}");
        }
    });
}

/// Where packets come in on another port, that the device is a port too makes none of them fast.
#[test]
fn a_policy_whose_device_takes_no_frames_is_not_said_to_be_fast() {
    story("a device that takes no frames", async |host| {
        let (program, gateway) = host.gateway(host.kernel());
        let mut gateway = gateway.with_interface("out0");
        host.namespace().ip(&format!("xfrm policy add {POLICY} priority 100 {TUNNEL}")).unwrap();
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        assert_eq!(gateway.status().policies[0].state, PolicyState::Fast);
        let flow = Flow::between("10.1.0.5".parse().unwrap(), INSIDE.parse().unwrap());
        assert!(matches!(gateway.explain(&flow), Explanation::Fast { .. }));
        // The device's peer then does not poll.
        host.site.peer.set_feature("eth0", "rx-gro", false).unwrap();
        program.until(&mut gateway, INSIDE, RunAction::Pass).await;
        let passes = PolicyState::Pass(PassReason::EgressUnavailable);
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::EgressUnavailable);
        assert_eq!(gateway.status().policies[0].state, passes);
        for ingress in [None, Some((host.lan, 0))] {
            let Explanation::Pass { reason, cause } = gateway.explain(&Flow { ingress, ..flow }) else {
                panic!()
            };
            assert_eq!((reason, cause), (PassReason::EgressUnavailable, Cause::Egress(host.out)));
        }
        let hairpin = gateway.explain(&Flow { ingress: Some((host.out, 0)), ..flow });
        assert!(matches!(hairpin, Explanation::Fast { .. }), "{hairpin}");
    });
}

#[test]
fn a_policy_that_will_be_deleted_for_its_age_is_switched_off_before() {
    story("a limited life", async |host| {
        let (program, mut gateway) = host.gateway(host.kernel());
        let add = format!("xfrm policy add {POLICY} priority 100 limit time-hard 12 {TUNNEL}");
        host.namespace().ip(&add).unwrap();
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        program.until(&mut gateway, INSIDE, RunAction::Pass).await;
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::Ineligible, "it is still there");
        let deleted = async {
            while host.namespace().ip("xfrm policy").unwrap().contains("10.2.0.0/16") {
                sleep(Duration::from_millis(10)).await;
            }
        };
        gateway.run_until(deleted).await.unwrap();
        gateway.run_until(yield_now()).await.unwrap();
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::NoPolicy);
    });
}

#[test]
fn an_association_that_will_be_deleted_for_its_age_is_switched_off_before() {
    story("an association of a limited life", async |host| {
        let mut snapshot = host.snapshot().await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        snapshot.sas[0].expires = Some(now + 12);
        let (_sender, source) = ChannelSource::new(snapshot, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        // Nobody tells that it is gone.
        program.until(&mut gateway, INSIDE, RunAction::Pass).await;
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::NoSa);
    });
}

#[test]
fn a_shadowing_bypass_policy_keeps_the_packet_in_the_kernel() {
    story("a bypass policy", async |host| {
        host.namespace().ip(&format!("xfrm policy add {POLICY} priority 100 {TUNNEL}")).unwrap();
        let (program, mut gateway) = host.gateway(host.kernel());
        program.until(&mut gateway, "10.2.5.1", RunAction::Redirect).await;

        let bypass = "src 10.1.0.0/16 dst 10.2.5.0/24 dir out";
        host.namespace().ip(&format!("xfrm policy add {bypass} priority 1")).unwrap();
        program.until(&mut gateway, "10.2.5.1", RunAction::Pass).await;
        assert_eq!(program.reason(&gateway, "10.2.5.1"), PassReason::Shadowed);
        assert_eq!(program.fate(INSIDE), RunAction::Redirect, "the rest stays fast");

        host.namespace().ip(&format!("xfrm policy delete {bypass}")).unwrap();
        program.until(&mut gateway, "10.2.5.1", RunAction::Redirect).await;
    });
}

#[test]
fn an_explanation_tells_what_the_program_does() {
    story("explaining packets", async |host| {
        for (policy, priority) in [(POLICY, 100), ("src 10.1.0.0/16 dst 10.2.5.0/24 dir out", 1)] {
            // Of another tunnel each: else it would not matter which one the kernel chooses.
            let tunnel = TUNNEL.replace("reqid 1", &format!("reqid {priority}"));
            let add = format!("xfrm policy add {policy} priority {priority} {tunnel}");
            host.namespace().ip(&add).unwrap();
        }
        let (program, mut gateway) = host.gateway(host.kernel());
        let explain = |gateway: &Watched<_>, destination: &str| {
            let flow = Flow::between("10.1.0.5".parse().unwrap(), destination.parse().unwrap());
            gateway.explain(&Flow { ingress: Some((host.lan, 0)), protocol: 17, ..flow })
        };
        let Explanation::Pass { reason, .. } = explain(&gateway, INSIDE) else {
            panic!("nothing is known yet")
        };
        assert_eq!(reason, program.reason(&gateway, INSIDE));

        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        let Explanation::Fast { policy, sas, forwarding } = explain(&gateway, INSIDE) else { panic!() };
        assert_eq!((policy.to_string(), sas.len()), ("out 10.1.0.0/16 → 10.2.0.0/16".to_owned(), 0));
        assert_eq!(forwarding.ifindex, host.out);
        for destination in ["10.2.5.1", "192.0.2.2", "172.16.0.1", "10.1.0.1", "224.0.0.1"] {
            let Explanation::Pass { reason, .. } = explain(&gateway, destination) else {
                panic!("{destination}")
            };
            assert_eq!(reason, program.reason(&gateway, destination), "{destination}");
        }
        let elsewhere = Flow {
            ingress: Some((host.out, 0)),
            ..Flow::between([10, 1, 0, 5].into(), [10, 2, 0, 9].into())
        };
        let explanation = gateway.explain(&elsewhere).to_string();
        assert!(explanation.starts_with("kernel (unknown_port)"), "{explanation}");
    });
}

#[test]
fn a_blocking_default_policy_keeps_everything_in_the_kernel() {
    story("a blocking default policy", async |host| {
        host.namespace().ip(&format!("xfrm policy add {POLICY} priority 100 {TUNNEL}")).unwrap();
        let (program, mut gateway) = host.gateway(host.kernel());
        for (action, fate) in [("accept", RunAction::Redirect), ("block", RunAction::Pass)] {
            host.namespace().ip(&format!("xfrm policy setdefault fwd {action}")).unwrap();
            program.until(&mut gateway, INSIDE, fate).await;
        }
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::DefaultBlock);
    });
}

#[test]
fn a_source_that_lost_track_stops_everything_until_its_next_snapshot() {
    story("a stale source", async |host| {
        let (sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;

        // A yield is as long as it takes to follow everything that was sent.
        sender.try_send(PolicyEvent::Stale(StaleCause::Overrun)).unwrap();
        gateway.run_until(yield_now()).await.unwrap();
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::Disabled);

        let policy = host.snapshot().await.policies.remove(0);
        sender.try_send(PolicyEvent::Policy(policy)).unwrap();
        gateway.run_until(yield_now()).await.unwrap();
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::Disabled, "one policy is not all");

        sender.try_send(PolicyEvent::Snapshot(host.snapshot().await)).unwrap();
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
    });
}

#[test]
fn a_source_that_fails_stops_everything() {
    story("a failing source", async |host| {
        let (sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        drop(sender);
        let error = gateway.run_until(pending()).await.unwrap_err();
        assert!(matches!(error, GatewayError::Source(SourceError::ChannelClosed)), "{error}");
        assert_eq!(program.reason(&gateway, INSIDE), PassReason::Disabled);
    });
}

#[test]
fn a_dropped_gateway_leaves_everything_to_the_kernel() {
    story("dropping a gateway", async |host| {
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        // The program still runs, and its lease with it.
        drop(gateway);
        assert_eq!(program.fate(INSIDE), RunAction::Pass);
    });
}

#[test]
fn a_lease_that_nobody_renews_ends() {
    story("an ended lease", async |host| {
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, gateway) = host.gateway(source);
        let mut gateway = gateway.with_lease(Duration::from_millis(50));
        for _ in 0..2 {
            program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
            let ended = async {
                while program.fate(INSIDE) != RunAction::Pass {
                    sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(PATIENCE, ended).await.expect("a lease of 50 ms to end");
            assert_eq!(program.reason(&gateway, INSIDE), PassReason::LeaseExpired);
        }
    });
}

/// A source that takes longer than a lease to say that it has nothing to say, as when the process gets no processor.
struct Slow<S>(S);

#[async_trait]
impl<S: PolicySource> PolicySource for Slow<S> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        if let Some(event) = self.0.next_event().now_or_never() {
            return event;
        }
        std::thread::sleep(Duration::from_millis(60));
        pending().await
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        std::thread::sleep(Duration::from_millis(60));
        self.0.caught_up()
    }
}

#[test]
fn a_lease_begins_when_the_source_was_asked() {
    story("a lease that begins late", async |host| {
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, gateway) = host.gateway(Slow(source));
        let mut gateway = gateway.with_lease(Duration::from_millis(50));
        // The snapshot is written, and then the lease is renewed because nothing happens.
        for _ in 0..3 {
            gateway.synchronise().await.unwrap();
            assert_eq!(program.reason(&gateway, INSIDE), PassReason::LeaseExpired);
        }
    });
}

#[test]
fn addresses_of_the_host_and_unroutable_ones_inside_a_policy_pass() {
    story("addresses inside a policy", async |host| {
        host.namespace().ip("address add 10.2.0.1/32 dev lo").unwrap();
        host.namespace().ip("route add blackhole 10.2.66.0/24").unwrap();
        host.namespace().ip("route add 10.2.77.0/24 dev lan0").unwrap();
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        assert_eq!(program.reason(&gateway, "10.2.0.1"), PassReason::DeniedDestination);
        assert_eq!(program.reason(&gateway, "10.2.66.1"), PassReason::DeniedDestination);
        assert_eq!(program.reason(&gateway, "10.2.77.1"), PassReason::RouteElsewhere);
    });
}

#[test]
fn a_link_that_goes_down_takes_the_fast_path_with_it_and_brings_it_back() {
    story("a link that flaps", async |host| {
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        for (change, fate) in [
            ("link set out0 down", RunAction::Pass),
            ("link set out0 up", RunAction::Redirect),
            ("route add blackhole 10.2.0.9/32", RunAction::Pass),
        ] {
            host.namespace().ip(change).unwrap();
            if change.ends_with("up") {
                // What the kernel forgot with the link.
                host.namespace().ip("route add 10.2.0.0/16 via 192.0.2.2").unwrap();
                let peer = format!("neighbour replace 192.0.2.2 lladdr {PEER} dev out0");
                host.namespace().ip(&peer).unwrap();
            }
            program.until(&mut gateway, INSIDE, fate).await;
        }
    });
}

#[test]
fn a_port_that_goes_and_comes_back_under_its_name_is_a_port_again() {
    story("a port that comes back", async |host| {
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        host.namespace().ip("link set lan0 down").unwrap();
        program.until(&mut gateway, INSIDE, RunAction::Pass).await;
        host.namespace().ip("link set lan0 name lan9").unwrap();
        host.namespace().ip("link set lan9 up").unwrap();
        program.until(&mut gateway, INSIDE, RunAction::Redirect).await;
        let interfaces = gateway.status().interfaces;
        assert!(matches!(interfaces[0].state, InterfaceState::Attached { .. }), "{interfaces:?}");
    });
}

/// While the loop does not run, so that all that is told of it comes at once, or is lost.
#[test]
fn the_program_is_attached_to_an_interface_that_was_replaced_by_one_of_its_name_and_index() {
    story("an interface that is replaced", async |host| {
        let capacity = TableConfig { cells_v4: 256, cells_v6: 256, exceptions: 64, slots: 16 };
        let (forwarder, table) = XdpForwarder::load(&capacity).unwrap();
        let source = NetlinkHost::with_receive_buffers(1 << 16, 1 << 16).unwrap();
        let mut gateway = Gateway::new(StaticSource::new(&[]), source, table)
            .with_forwarder(forwarder, [AttachConfig::new("lan0").complete_frames(true)])
            .unwrap();
        let namespace = host.namespace();
        let runs = || namespace.ip("-d link show dev lan0").unwrap().contains("prog/xdp");
        for round in 0..4 {
            let attached = async {
                while !runs() {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            let run = timeout(PATIENCE, gateway.run_until(attached)).await;
            run.unwrap_or_else(|_| panic!("round {round}: never attached")).unwrap();
            gateway.run_until(sleep(Duration::from_millis(100))).await.unwrap();
            let interfaces = gateway.status().interfaces;
            let InterfaceState::Attached { vlans } = &interfaces[0].state else { panic!("{interfaces:?}") };
            assert_eq!((vlans.as_slice(), interfaces[0].ifindex), (&[0][..], Some(host.lan)));
            namespace.ip("link del lan0").unwrap();
            // Mostly in every respect.
            let address = if round == 1 { "02:00:00:00:00:33".to_owned() } else { LAN.to_string() };
            let add = format!("link add lan0 index {} address {address} type veth peer name lan9", host.lan);
            namespace.ip(&add).unwrap();
            namespace.ip("link set lan0 up").unwrap();
            namespace.ip("link set lan9 up").unwrap();
            if round == 2 {
                let noise = tempfile::NamedTempFile::new().unwrap();
                let lines = "link set lan9 mtu 1400\nlink set lan9 mtu 1401\n".repeat(200);
                std::fs::write(noise.path(), lines).unwrap();
                namespace.ip(&format!("-batch {}", noise.path().display())).unwrap();
            }
        }
        let causes = &gateway.mirror().statistics().host_resyncs;
        assert!(causes.contains_key("overrun"), "{causes:?}");
    });
}

#[test]
fn a_status_tells_what_each_policy_has_forwarded() {
    story("a status", async |host| {
        let (_sender, source) = ChannelSource::new(host.snapshot().await, 8);
        let (program, mut gateway) = host.gateway(source);
        gateway.synchronise().await.unwrap();
        for _ in 0..3 {
            assert_eq!(program.fate(INSIDE), RunAction::Redirect);
        }
        let status = gateway.status();
        let [policy] = &status.policies[..] else { panic!("{status}") };
        let PolicyStatus { state, traffic, .. } = policy;
        assert_eq!((*state, traffic.packets, traffic.bytes), (PolicyState::Fast, 3, 3 * 128));
        let line = "fast: out 10.1.0.0/16 → 10.2.0.0/16: 3 packets, 384 bytes";
        assert!(status.to_string().contains(line), "{status}");
    });
}
