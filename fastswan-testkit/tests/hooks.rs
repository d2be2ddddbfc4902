//! Firewalls, address translation and filters in the way of forwarded packets: nothing is fast past them, and nothing but
//! what they may concern is kept from being fast.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use fastswan::{
    BpfTable, Gateway, NetlinkHost, NetlinkSource, PassReason, XdpForwarder,
    compiler::{Cause, Explanation, Flow},
    forwarder::{AttachConfig, RunAction},
    gateway::GatewayHandle,
    host::{HookKind, Hooks},
    mirror::InterfaceState,
    policy::NextHop,
    table::TableConfig,
};
use fastswan_testkit::{
    frames::Frame,
    lab::{self, LabError, Namespace},
    promote::Promote,
    site::{CLIENT, LAN, Site},
};
use futures::executor::block_on;
use tokio::sync::oneshot;

/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(20);
/// No packet is fast past a hook later than this after it was there.
const BOUND: Duration = Duration::from_millis(250);
/// How long nothing may be fast after that, and how long nothing may pass for what is harmless.
const WHILE: Duration = Duration::from_millis(150);

const POLICIES: [&str; 2] = [
    "src 10.1.0.0/16 dst 10.2.0.0/16 dir out priority 100 \
     tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode transport level use",
    "src 2001:db8:1::/48 dst 2001:db8:2::/48 dir out priority 100 \
     tmpl src 2001:db8:f::1 dst 2001:db8:f::2 proto esp reqid 2 mode transport level use",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    V4,
    V6,
}

use Of::{V4, V6};

/// A gateway at work.
struct Running<'s> {
    site: &'s Site,
    forwarder: XdpForwarder,
    lan: u32,
    handle: GatewayHandle,
}

/// Stories are told one after the other: BPF programs at hooks of netfilter are not told apart by namespace.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a story while a gateway follows a site, whose kernel is prepared before it starts.
fn story(what: &str, allowed: Hooks, prepare: impl FnOnce(&Site), tell: impl FnOnce(&Running<'_>) + Send) {
    if !lab::require_root(what) {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let site = Site::new().unwrap();
    site.route().unwrap();
    for policy in POLICIES {
        site.gateway.ip(&format!("xfrm policy add {policy}")).unwrap();
    }
    prepare(&site);
    let (lan, out) = (site.gateway.ifindex("lan0").unwrap(), site.gateway.ifindex("out0").unwrap());
    let config = TableConfig { cells_v4: 256, cells_v6: 256, exceptions: 64, slots: 16 };
    let (mut forwarder, table) = site.gateway.enter(|| XdpForwarder::load(&config).unwrap());
    site.gateway.enter(|| forwarder.attach(&AttachConfig::new("lan0").complete_frames(true)).unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let (handles, handle) = mpsc::channel();
    scope(|scope| {
        let namespace = &site.gateway;
        let gateway = scope.spawn(move || {
            namespace.join_this_thread().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut gateway = gateway(table, out).with_allowed_hooks(allowed);
                gateway.synchronise().await.unwrap();
                handles.send(gateway.handle()).unwrap();
                gateway.run_until(async { drop(stopped.await) }).await.unwrap();
            });
        });
        let handle = handle.recv_timeout(PATIENCE).unwrap();
        // Dropped when this panics too, so that the gateway ends.
        let stop = stop;
        tell(&Running { site: &site, forwarder, lan, handle });
        drop(stop);
        gateway.join().unwrap();
    });
}

fn gateway(table: BpfTable, out: u32) -> Gateway<impl fastswan::PolicySource, NetlinkHost, BpfTable> {
    let source = Promote::new(NetlinkSource::open().unwrap(), out, NextHop::Neighbour, |_| true);
    Gateway::new(source, NetlinkHost::open().unwrap(), table).with_interface("lan0")
}

fn addresses(of: Of) -> (&'static str, &'static str) {
    match of {
        V4 => ("10.1.0.5", "10.2.0.9"),
        V6 => ("2001:db8:1::5", "2001:db8:2::9"),
    }
}

impl Running<'_> {
    /// Whether a packet from the client to the peer would be fast.
    fn is_fast(&self, of: Of) -> bool {
        let (source, destination) = addresses(of);
        let frame = match of {
            V4 => Frame::v4(source, destination),
            V6 => Frame::v6(source, destination),
        };
        let frame = frame.macs(CLIENT, LAN).payload(100).ttl(64).build();
        // The program asks the kernel in the namespace of whoever runs it.
        let outcome = self.site.gateway.enter(|| self.forwarder.run(&frame, self.lan).unwrap());
        outcome.action == RunAction::Redirect
    }

    /// Waits until packets are fast, or pass.
    #[track_caller]
    fn until(&self, of: Of, fast: bool, what: &str) {
        let begin = Instant::now();
        while self.is_fast(of) != fast {
            assert!(begin.elapsed() < PATIENCE, "{what}: {of:?} never {fast}: {}", self.told());
            sleep(Duration::from_millis(1));
        }
    }

    /// All that is said about the gateway.
    fn told(&self) -> String {
        let explained = [V4, V6].map(|of| self.explain(of).to_string());
        format!("{}\n{explained:?}", block_on(self.handle.status()).unwrap())
    }

    fn explain(&self, of: Of) -> Explanation {
        let (source, destination) = addresses(of);
        let flow = Flow::between(source.parse().unwrap(), destination.parse().unwrap());
        let flow = Flow { ingress: Some((self.lan, 0)), ..flow };
        block_on(self.handle.explain(flow)).unwrap()
    }

    /// The kind of hook that keeps packets from being fast, and its name.
    #[track_caller]
    fn hook(&self, of: Of) -> (HookKind, String) {
        match self.explain(of) {
            Explanation::Pass { cause: Cause::Hook(hook), .. } => (hook.kind, hook.name),
            other => panic!("{of:?}: {other}"),
        }
    }

    /// Within the bound after a change, packets of these families pass, and those of others stay fast.
    #[track_caller]
    fn stops(&self, of: &[Of], what: &str, change: impl FnOnce(&Namespace)) {
        let others = [V4, V6].into_iter().filter(|family| !of.contains(family));
        let others: Vec<Of> = others.collect();
        change(&self.site.gateway);
        let there = Instant::now();
        let mut last = Duration::ZERO;
        while there.elapsed() < BOUND + WHILE {
            let asked = there.elapsed();
            if of.iter().any(|of| self.is_fast(*of)) {
                last = asked;
            }
            sleep(Duration::from_millis(1));
        }
        assert!(last < BOUND, "{what}: fast after {last:?}: {}", self.told());
        println!("{what}: fast for {last:?} more");
        for other in others {
            self.until(other, true, what);
        }
    }

    /// After a change all packets stay fast.
    #[track_caller]
    fn stays_fast(&self, what: &str, change: impl FnOnce(&Namespace)) {
        for of in [V4, V6] {
            self.until(of, true, what);
        }
        change(&self.site.gateway);
        let begin = Instant::now();
        while begin.elapsed() < BOUND + WHILE {
            assert!(self.is_fast(V4) && self.is_fast(V6), "{what}: {}", self.told());
            sleep(Duration::from_millis(1));
        }
    }
}

/// Runs a program in a namespace, with this as input.
#[track_caller]
fn run(namespace: &Namespace, program: &str, arguments: &str, input: &str) {
    let output = namespace.enter(|| {
        let mut child = Command::new(program)
            .args(arguments.split_whitespace())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}; install nftables, iptables and iproute2"));
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    });
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments} {input}: {error}");
}

#[track_caller]
fn nft(namespace: &Namespace, rules: &str) {
    run(namespace, "nft", "-f -", rules);
}

/// A command of each line; a program by its name and the rest.
#[track_caller]
fn shell(namespace: &Namespace, commands: &str) {
    for command in commands.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(rules) = command.strip_prefix("nft ") {
            nft(namespace, rules);
        } else {
            let (program, arguments) = command.split_once(' ').unwrap();
            run(namespace, program, arguments, "");
        }
    }
}

/// What comes in the way: its name, which families it concerns, of which kind it is, how it comes, and how it goes.
const HOOKS: [(&str, &[Of], HookKind, &str, &str); 23] = [
    (
        "a drop rule in nftables' forward chain",
        &[V4, V6],
        HookKind::NfTables,
        "nft table inet fw { chain forward { type filter hook forward priority 0; ip daddr 10.2.0.9 drop; }; }",
        "nft delete table inet fw",
    ),
    (
        "the same for one family",
        &[V4],
        HookKind::NfTables,
        "nft table ip fw { chain forward { type filter hook forward priority 0; ip daddr 10.2.0.9 drop; }; }",
        "nft flush chain ip fw forward",
    ),
    (
        "a rule that is added to a chain",
        &[V4],
        HookKind::NfTables,
        "nft add rule ip fw forward meta mark set 7",
        "nft delete chain ip fw forward",
    ),
    (
        "a policy to drop",
        &[V6],
        HookKind::NfTables,
        "nft table ip6 fw { chain forward { type filter hook forward priority 0; policy drop; }; }",
        "nft chain ip6 fw forward { policy accept; }",
    ),
    (
        "a jump to a chain that drops",
        &[V6],
        HookKind::NfTables,
        "nft table ip6 fw { chain more { drop; }; chain between { counter jump more; }; }\n\
         nft add rule ip6 fw forward goto between",
        "nft flush chain ip6 fw more",
    ),
    (
        "a table that wakes up",
        &[V6],
        HookKind::NfTables,
        "nft table ip6 fw { flags dormant; }\n\
         nft add rule ip6 fw more drop\n\
         nft table ip6 fw { }",
        "nft table ip6 fw { flags dormant; }",
    ),
    (
        "a verdict map",
        &[V4, V6],
        HookKind::NfTables,
        "nft table inet vm { chain pre { type filter hook prerouting priority raw; \
         meta l4proto vmap { tcp : drop, udp : accept }; }; }",
        "nft delete table inet vm",
    ),
    (
        "masquerading in postrouting",
        &[V4],
        HookKind::Conntrack,
        "nft table ip nat { chain post { type nat hook postrouting priority 100; oifname out0 masquerade; }; }",
        "nft delete table ip nat",
    ),
    (
        "connection tracking alone",
        &[V4, V6],
        HookKind::Conntrack,
        "nft table inet track { chain out { type filter hook output priority 0; ct state new counter; }; }",
        "nft delete table inet track",
    ),
    (
        "netdev ingress on the port",
        &[V4, V6],
        HookKind::NfTables,
        "nft table netdev dev { chain in { type filter hook ingress device lan0 priority 0; policy drop; }; }",
        "nft delete table netdev dev",
    ),
    (
        "inet ingress on the port",
        &[V4, V6],
        HookKind::NfTables,
        "nft table inet dev { chain in { type filter hook ingress device lan0 priority 0; drop; }; }",
        "nft delete table inet dev",
    ),
    (
        "netdev egress on the egress device",
        &[V4, V6],
        HookKind::NfTables,
        "nft table netdev dev { chain out { type filter hook egress device out0 priority 0; drop; }; }",
        "nft delete table netdev dev",
    ),
    (
        "a drop rule in a legacy table",
        &[V4],
        HookKind::IpTables,
        "iptables-legacy -A FORWARD -d 10.2.0.9 -j DROP",
        "iptables-legacy -D FORWARD -d 10.2.0.9 -j DROP",
    ),
    (
        "a policy of a legacy table",
        &[V6],
        HookKind::IpTables,
        "ip6tables-legacy -P FORWARD DROP",
        "ip6tables-legacy -P FORWARD ACCEPT",
    ),
    (
        "a legacy jump to a chain that drops",
        &[V4],
        HookKind::IpTables,
        "iptables-legacy -t mangle -N more\n\
         iptables-legacy -t mangle -A more -j MARK --set-mark 1\n\
         iptables-legacy -t mangle -A PREROUTING -j more",
        "iptables-legacy -t mangle -F more",
    ),
    (
        "connections that a legacy table has tracked",
        &[V4],
        HookKind::Conntrack,
        "iptables-legacy -A INPUT -m conntrack --ctstate NEW -j ACCEPT",
        "iptables-legacy -F INPUT",
    ),
    (
        "a tc filter on the port",
        &[V4, V6],
        HookKind::Tc,
        "tc qdisc add dev lan0 clsact\n\
         tc filter add dev lan0 ingress protocol ip u32 match u32 0 0 action mirred egress redirect dev lo",
        "tc filter del dev lan0 ingress",
    ),
    (
        "a tc filter on the egress device",
        &[V4, V6],
        HookKind::Tc,
        "tc qdisc add dev out0 clsact\n\
         tc filter add dev out0 egress protocol ip u32 match u32 0 0 action mirred egress redirect dev lo",
        "tc qdisc del dev out0 clsact",
    ),
    (
        "a tc filter of a block that the port shares",
        &[V4, V6],
        HookKind::Tc,
        "tc qdisc del dev lan0 clsact\n\
         tc qdisc add dev lan0 ingress_block 7 clsact\n\
         tc filter add block 7 protocol ip u32 match u32 0 0 action mirred egress redirect dev lo",
        "tc filter del block 7",
    ),
    (
        "a tc filter with an action where packets queue to leave",
        &[V4, V6],
        HookKind::Tc,
        "tc qdisc add dev out0 root handle 1: htb default 1\n\
         tc class add dev out0 parent 1: classid 1:1 htb rate 1gbit\n\
         tc filter add dev out0 parent 1: protocol ip u32 match u32 0 0 action mirred egress redirect dev lo",
        "tc filter del dev out0 parent 1:",
    ),
    (
        "one of a class that a filter leads to",
        &[V4, V6],
        HookKind::Tc,
        "tc filter add dev out0 parent 1: protocol ip u32 match u32 0 0 flowid 1:1\n\
         tc filter add dev out0 parent 1:1 protocol ip u32 match u32 0 0 action mirred egress redirect dev lo\n\
         tc class add dev out0 parent 1:1 classid 1:2 htb rate 1gbit",
        "tc filter del dev out0 parent 1:1",
    ),
    (
        "one of a discipline below a class",
        &[V4, V6],
        HookKind::Tc,
        "tc qdisc add dev out0 parent 1:2 handle 2: htb\n\
         tc filter add dev out0 parent 2: protocol ip u32 match u32 0 0 action mirred egress redirect dev lo",
        "tc qdisc del dev out0 root",
    ),
    (
        "one of a discipline that has not been given a handle",
        &[V4, V6],
        HookKind::Tc,
        "tc qdisc add dev out0 root htb\n\
         tc filter add dev out0 protocol ip u32 match u32 0 0 action mirred egress redirect dev lo",
        "tc qdisc del dev out0 root",
    ),
];

#[test]
fn nothing_is_fast_past_a_hook_that_comes_while_it_is_running() {
    story(
        "hooks that come and go",
        Hooks::none(),
        |_| {},
        |running| {
            for (what, of, kind, add, remove) in HOOKS {
                for of in [V4, V6] {
                    running.until(of, true, what);
                }
                running.stops(of, what, |gateway| shell(gateway, add));
                for of in of {
                    let (found, name) = running.hook(*of);
                    println!("{what}: {found:?}: {name}");
                    assert!(found == kind || kind == HookKind::Conntrack, "{what}: {found:?}");
                }
                let (before, begin) = (running.told(), Instant::now());
                shell(&running.site.gateway, remove);
                for of in [V4, V6] {
                    running.until(of, true, &before);
                }
                println!("{what}: fast again after {:?}", begin.elapsed());
            }
        },
    );
}

/// Attaches a program until its link is closed.
type Attach = fn() -> Result<OwnedFd, LabError>;

#[test]
fn nothing_is_fast_past_a_program_that_is_polled_for() {
    story(
        "BPF programs that come and go",
        Hooks::none(),
        |_| {},
        |running| {
            let attach: [(&str, &[Of], HookKind, Attach); 3] = [
                ("tcx on the port", &[V4, V6], HookKind::Tc, || lab::drop_at_tcx("lan0", false)),
                ("tcx on the egress device", &[V4, V6], HookKind::Tc, || lab::drop_at_tcx("out0", true)),
                ("a program at the forward hook", &[V4], HookKind::Netfilter, lab::drop_at_forward_hook),
            ];
            for (what, of, kind, attach) in attach {
                for of in [V4, V6] {
                    running.until(of, true, what);
                }
                let mut link = None;
                running.stops(of, what, |gateway| link = Some(gateway.enter(attach).unwrap()));
                for of in of {
                    let (found, name) = running.hook(*of);
                    println!("{what}: {found:?}: {name}");
                    assert_eq!(found, kind);
                }
                drop(link);
                for of in [V4, V6] {
                    running.until(of, true, what);
                }
            }
            running.stays_fast("tcx programs elsewhere", |gateway| {
                let links = gateway.enter(|| {
                    [("lan0", true), ("out0", false)]
                        .map(|(device, egress)| lab::drop_at_tcx(device, egress).unwrap())
                });
                sleep(BOUND);
                drop(links);
            });
        },
    );
}

#[test]
fn nothing_is_fast_past_a_hook_that_was_there_before() {
    for (number, (what, of, _, add, remove)) in HOOKS.into_iter().enumerate() {
        // Some need what those before them have left.
        let before = || HOOKS[..number].iter();
        let prepare = |site: &Site| {
            before().for_each(|(_, _, _, add, remove)| shell(&site.gateway, &format!("{add}\n{remove}")));
            shell(&site.gateway, add);
        };
        // One of each kind will do.
        if !matches!(number, 0 | 3 | 7 | 8 | 9 | 12 | 16 | 17) {
            continue;
        }
        story(what, Hooks::none(), prepare, |running| {
            let begin = Instant::now();
            while begin.elapsed() < WHILE {
                assert!(of.iter().all(|of| !running.is_fast(*of)), "{what}: {}", running.told());
                sleep(Duration::from_millis(1));
            }
            for of in of {
                running.hook(*of);
            }
            shell(&running.site.gateway, remove);
            for of in [V4, V6] {
                running.until(of, true, what);
            }
        });
    }
}

#[test]
fn what_cannot_change_the_fate_of_forwarded_packets_is_no_hook() {
    story(
        "harmless rules",
        Hooks::none(),
        |_| {},
        |running| {
            for (what, add) in [
                (
                    "input and output",
                    "nft table inet host { \
              chain in { type filter hook input priority 0; policy drop; }; \
              chain out { type filter hook output priority 0; udp dport 9 drop; }; }",
                ),
                (
                    "empty chains",
                    "nft table inet empty { \
              chain pre { type filter hook prerouting priority 0; }; \
              chain forward { type filter hook forward priority 0; policy accept; }; \
              chain nat { type nat hook prerouting priority -100; }; \
              chain post { type nat hook postrouting priority 100; }; }",
                ),
                (
                    "counters and accepts",
                    "nft table inet count { counter c { }; \
              chain calm { counter; return; }; chain unused { drop; }; \
              chain forward { type filter hook forward priority 1; \
                counter; ip saddr 10.1.0.0/16 tcp dport { 1, 2 } counter name c accept; jump calm; accept; }; \
              chain raw { type filter hook prerouting priority raw; notrack; \
                ip daddr 10.2.0.0/16 limit rate 5/second notrack accept; }; }",
                ),
                (
                    "elements of a set",
                    "nft add set inet count s { type ipv4_addr; }\n\
              nft add element inet count s { 192.0.2.7 }",
                ),
                (
                    "other devices",
                    "nft table netdev dev { \
              chain in { type filter hook ingress device out0 priority 0; policy drop; }; \
              chain out { type filter hook egress device lan0 priority 0; drop; }; }",
                ),
                (
                    "ARP",
                    "nft table arp filter { chain in { type filter hook input priority 0; arp htype 2 drop; }; }",
                ),
                (
                    "bridges",
                    "nft table bridge filter { chain f { type filter hook forward priority 0; policy drop; }; }",
                ),
                (
                    "a table that sleeps",
                    "nft table ip asleep { flags dormant; chain forward { \
              type filter hook forward priority 0; policy drop; }; }",
                ),
                (
                    "legacy tables that accept",
                    "iptables-legacy -t mangle -L\n\
              iptables-legacy -A FORWARD -s 10.9.0.0/16 -j ACCEPT\n\
              iptables-legacy -A FORWARD -s 10.9.0.0/16\n\
              iptables-legacy -A INPUT -p udp --dport 9 -j DROP\n\
              ip6tables-legacy -t nat -L",
                ),
                (
                    "filters elsewhere",
                    "tc qdisc add dev out0 clsact\n\
              tc qdisc add dev lan0 clsact\n\
              tc filter add dev out0 ingress protocol ip u32 match u32 0 0 flowid 1:1\n\
              tc filter add dev lan0 egress protocol ip u32 match u32 0 0 flowid 1:1",
                ),
                (
                    "shaping",
                    "tc qdisc add dev out0 root handle 1: htb default 1\n\
              tc class add dev out0 parent 1: classid 1:1 htb rate 1gbit\n\
              tc filter add dev out0 parent 1: protocol ip u32 match u32 0 0 flowid 1:1\n\
              tc class add dev out0 parent 1:1 classid 1:2 htb rate 1gbit\n\
              tc filter add dev out0 parent 1:1 protocol ip u32 match u32 0 0 flowid 1:2",
                ),
            ] {
                running.stays_fast(what, |gateway| shell(gateway, add));
            }
            let facts = running.site.gateway.enter(|| NetlinkHost::read_once().unwrap());
            println!("{:#?}", facts.hooks);
        },
    );
}

#[test]
fn what_passes_says_which_hook_is_in_the_way() {
    story(
        "explaining hooks",
        Hooks::none(),
        |_| {},
        |running| {
            let gateway = &running.site.gateway;
            nft(
                gateway,
                "table inet fw { chain forward { type filter hook forward priority 0; policy drop; }; }",
            );
            running.until(V4, false, "a firewall");
            let status = block_on(running.handle.status()).unwrap();
            assert!(
                status.to_string().contains("nf_tables: chain inet fw forward (hook forward)"),
                "{status}"
            );
            assert_eq!(status.totals.get("hook"), Some(&2), "{status}");
            assert_eq!(
                running.hook(V4),
                (HookKind::NfTables, "chain inet fw forward (hook forward)".to_owned())
            );
            assert!(matches!(running.explain(V6), Explanation::Pass { reason: PassReason::Hook, .. }));

            nft(gateway, "delete table inet fw");
            nft(
                gateway,
                "table netdev d { chain in { type filter hook ingress device lan0 priority 0; drop; }; }",
            );
            running.until(V4, false, "a filter");
            let interface = || block_on(running.handle.status()).unwrap().interfaces[0].state.clone();
            let begin = Instant::now();
            while !matches!(interface(), InterfaceState::Hooked { .. }) {
                assert!(begin.elapsed() < PATIENCE, "{}", running.told());
            }
            assert!(interface().to_string().contains("chain netdev d in (hook ingress)"), "{}", interface());
            let reason = PassReason::UnknownPort;
            assert!(
                matches!(running.explain(V6), Explanation::Pass { reason: other, .. } if other == reason)
            );
            nft(gateway, "delete table netdev d");
            running.until(V6, true, "no filter any longer");
        },
    );
}

/// Tracks connections, and drops what is not part of one, unless it is new and comes from the client.
const STATEFUL: &str = "table inet fw { chain forward { type filter hook forward priority 0; policy drop; \
    ct state invalid drop; ct state established accept; iifname lan0 ct state new accept; }; }";
/// Lets tunnels alone.
const TUNNELS: &str = "table inet tunnels { \
    chain untracked { type filter hook prerouting priority raw; \
        ip saddr 10.1.0.0/16 ip daddr 10.2.0.0/16 notrack; ip saddr 10.2.0.0/16 ip daddr 10.1.0.0/16 notrack; }; }\n\
    insert rule inet fw forward ip saddr 10.1.0.0/16 ip daddr 10.2.0.0/16 accept\n\
    insert rule inet fw forward ip saddr 10.2.0.0/16 ip daddr 10.1.0.0/16 accept";

/// A conversation between client and peer, one direction of which may be fast; whether it comes about.
fn converse(site: &Site) -> bool {
    let listener = site.peer.enter(|| TcpListener::bind("10.2.0.9:2000").unwrap());
    scope(|scope| {
        let answer = scope.spawn(|| {
            listener.set_nonblocking(true).unwrap();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(3) {
                if let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                    let mut said = [0; 5];
                    return stream.read_exact(&mut said).is_ok() && stream.write_all(&said).is_ok();
                }
                sleep(Duration::from_millis(1));
            }
            false
        });
        let said = site.client.enter(|| {
            let address = "10.2.0.9:2000".parse().unwrap();
            let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(2)) else {
                return false;
            };
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut heard = [0; 5];
            stream.write_all(b"hello").is_ok() && stream.read_exact(&mut heard).is_ok() && heard == *b"hello"
        });
        said & answer.join().unwrap()
    })
}

#[test]
fn hooks_that_are_allowed_are_skipped_and_named_which_is_right_if_tunnels_are_let_alone() {
    let allowed = Hooks::none().allow(HookKind::NfTables).allow(HookKind::Conntrack);
    let prepare = |site: &Site| nft(&site.gateway, &format!("{STATEFUL}\n{TUNNELS}"));
    story("allowed hooks", allowed, prepare, |running| {
        let site = running.site;
        running.until(V4, true, "allowed");
        let status = block_on(running.handle.status()).unwrap();
        let skipped = &status.state.skipped_hooks;
        assert!(
            skipped.contains(&"nf_tables: chain inet fw forward (hook forward)".to_owned()),
            "{skipped:?}"
        );
        assert!(skipped.iter().any(|hook| hook.starts_with("conntrack: ")), "{skipped:?}");
        assert!(status.to_string().contains("skipped, as allowed: nf_tables: chain inet fw"), "{status}");

        let fast = || block_on(running.handle.status()).unwrap().traffic().packets;
        let before = fast();
        assert!(converse(site), "client and peer, one direction fast");
        assert!(fast() > before, "{}", running.told());
        block_on(running.handle.set_kill_switch(true)).unwrap();
        let before = fast();
        assert!(converse(site), "client and peer, both directions by the kernel");
        assert_eq!(fast(), before);

        // Where tunnels are not let alone, the kernel sees one direction only.
        nft(&site.gateway, &format!("delete table inet tunnels\nflush chain inet fw forward\n{STATEFUL}"));
        assert!(converse(site), "by the kernel");
        block_on(running.handle.set_kill_switch(false)).unwrap();
        running.until(V4, true, "allowed");
        assert!(!converse(site), "so that is no ruleset to allow");

        // What is not allowed is still in the way.
        shell(&site.gateway, "iptables-legacy -A FORWARD -j DROP");
        running.until(V4, false, "not allowed");
        assert_eq!(running.hook(V4).0, HookKind::IpTables);
    });
}
