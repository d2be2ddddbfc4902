//! The netlink source against the running kernel, in namespaces of their own.

use std::{
    collections::BTreeSet,
    future::Future,
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fastswan::{
    Database, NetlinkSource, Policy, PolicyEvent, PolicyId, PolicySource as _, Selector, Snapshot,
    netlink::decode,
    policy::{Action, DefaultPolicy, Direction},
    source::{NetlinkConfig, StaleCause},
};
use fastswan_testkit::{
    lab::{self, Namespace},
    requests::{Change, make, migration, request, thresholds},
    xfrm::{CAPTURED, Group, ask, captured, inject, inject_at, listeners},
};
use futures::FutureExt as _;
use ipnet::{IpNet, Ipv4Net};
use tokio::time::timeout;

const OUT: &str = "src 10.1.0.0/16 dst 10.2.0.0/16 dir out";
const TUNNEL: &str = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel";
/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the policy of one host of many is about.
fn host(number: u32) -> String {
    format!("src 10.1.{}.{}/32 dst 10.2.0.0/16 dir out", number / 256, number % 256)
}
/// Those that a source listens to, as bits.
const GROUPS: u32 = 0b100_1110;

/// A captured message, offloaded to this device instead.
fn offloaded_to(ifindex: u32, name: &str) -> Vec<u8> {
    let mut message = captured(name).to_vec();
    // XFRMA_OFFLOAD_DEV with the index that was captured.
    let attribute = [12, 0, 28, 0, 2, 0, 0, 0];
    let at = message.windows(attribute.len()).position(|window| window == attribute).unwrap();
    message[at + 4..at + 8].copy_from_slice(&ifindex.to_le_bytes());
    message
}

/// Runs a story in a fresh namespace, inside a runtime.
fn story<F: Future<Output = ()>>(what: &str, tell: impl FnOnce(Namespace) -> F + Send) {
    if !lab::require_root(what) {
        return;
    }
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            let namespace = Namespace::new("netlink").unwrap();
            namespace.join_this_thread().unwrap();
            runtime().block_on(tell(namespace));
        });
        told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Applies what the source says until it has nothing more to say.
async fn follow(source: &mut NetlinkSource, database: &mut Database) -> Vec<StaleCause> {
    let mut causes = Vec::new();
    // A dump takes its time where others use the machine, too.
    let patience =
        |database: &Database| if database.is_current() { Duration::from_millis(200) } else { PATIENCE };
    while let Ok(event) = timeout(patience(database), source.next_event()).await {
        let event = event.unwrap().unwrap();
        if let PolicyEvent::Stale(cause) = event {
            causes.push(cause);
        }
        database.apply(event);
    }
    causes
}

/// Applies what the source says up to the end of its next audit.
async fn follow_to_audit(source: &mut NetlinkSource, database: &mut Database) {
    loop {
        let event = timeout(PATIENCE, source.next_event()).await.expect("an audit").unwrap().unwrap();
        let is_audit = matches!(event, PolicyEvent::Audit(_));
        database.apply(event);
        if is_audit {
            break;
        }
    }
}

/// A file of commands for `ip -batch`.
fn batch(lines: impl Iterator<Item = String>) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(lines.collect::<String>().as_bytes()).unwrap();
    file
}

/// What the kernel has now, asked for afresh.
async fn kernel() -> Snapshot {
    let mut database = Database::default();
    follow(&mut NetlinkSource::open().unwrap(), &mut database).await;
    database.snapshot()
}

/// Ports of sources' sockets that listen to these groups.
fn listening(groups: u32) -> Vec<u32> {
    let listeners = listeners().unwrap().into_iter();
    listeners.filter(|listener| listener.groups == groups).map(|listener| listener.port).collect()
}

/// A captured datagram whose messages have this sequence number, or the one they were sent with.
fn with_sequence(datagram: &[u8], sequence: Option<u32>) -> Vec<u8> {
    let mut datagram = datagram.to_vec();
    let mut at = 0;
    while let (Some(sequence), Some(header)) = (sequence, datagram.get_mut(at..at + 12)) {
        header[8..].copy_from_slice(&sequence.to_ne_bytes());
        at += u32::from_ne_bytes(*header.first_chunk().unwrap()).next_multiple_of(4) as usize;
    }
    datagram
}

/// One of many policies that differ in their destination.
fn numbered(number: u32) -> Policy {
    let destination = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(0x0a02_0000 + number), 32));
    let selector = Selector::between("10.1.0.0/16".parse().unwrap(), destination).unwrap();
    Policy { priority: 100, ..Policy::new(PolicyId::new(Direction::Out, selector)) }
}

#[test]
fn what_ip_xfrm_does_is_mirrored_step_by_step() {
    story("mirroring ip xfrm", async |ns| {
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        let fwd = "src 10.2.0.0/16 dst 10.1.0.0/16 dir fwd";
        let v6 = "src 2001:db8:1::/48 dst 2001:db8:2::/48 dir out";
        for (step, policies, sas) in [
            ("", 1, 0),
            (&*format!("xfrm policy update {OUT} priority 7 {TUNNEL}"), 1, 0),
            (&format!("xfrm policy add {fwd} action block"), 2, 0),
            (&format!("xfrm policy add {v6} priority 3 {TUNNEL}"), 3, 0),
            (&format!("xfrm policy add {OUT} mark 1 mask 255 if_id 5 priority 9"), 4, 0),
            (&format!("xfrm policy delete {fwd}"), 3, 0),
            ("xfrm policy setdefault fwd block", 3, 0),
            ("xfrm policy flush", 0, 0),
        ] {
            if !step.is_empty() {
                ns.ip(step).unwrap();
            }
            assert_eq!(follow(&mut source, &mut database).await, [], "{step}");
            let snapshot = database.snapshot();
            assert_eq!((snapshot.policies.len(), snapshot.sas.len()), (policies, sas), "{step}");
            assert_eq!(snapshot, kernel().await, "{step}");
        }
        let blocks = DefaultPolicy { forward: Action::Block, ..DefaultPolicy::default() };
        assert_eq!(database.default_policy(), blocks);
        assert_eq!(source.statistics().dumps, 1);
    });
}

#[test]
fn when_the_source_has_settled_what_was_removed_is_to_be_read_at_once() {
    story("settling", async |ns| {
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        ns.ip(&format!("xfrm policy delete {OUT}")).unwrap();
        assert!(!source.caught_up().unwrap(), "the removal was read, and is to be yielded");
        source.settle().await.unwrap();
        let event = source.next_event().now_or_never().unwrap().unwrap();
        assert!(matches!(event, Some(PolicyEvent::PolicyRemoved(_))), "{event:?}");
        assert!(source.caught_up().unwrap());
        assert!(source.next_event().now_or_never().is_none());
    });
}

#[test]
fn a_policy_deleted_by_its_index_is_removed() {
    story("deleting by index", async |ns| {
        ns.ip(&format!("xfrm policy add {OUT} priority 100 index 9 {TUNNEL}")).unwrap();
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        assert_eq!(database.policies().next().unwrap().id.direction, Direction::Out);
        ns.ip("xfrm policy delete index 9 dir out").unwrap();
        follow(&mut source, &mut database).await;
        assert_eq!(database.snapshot(), Snapshot::default());
    });
}

/// Every message in every way that another process can send it, whatever its sequence number, is counted and changes
/// nothing.
#[test]
fn messages_that_the_kernel_did_not_send_change_nothing() {
    story("foreign messages", async |ns| {
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        let before = database.snapshot();
        let [port] = listening(GROUPS)[..] else { panic!("one socket listens") };
        let mut sent = 0;
        for (name, message) in CAPTURED {
            for sequence in [None, Some(0), Some(1), Some(2), Some(3)] {
                let message = with_sequence(message, sequence);
                inject_at(port, &message).unwrap();
                for group in [Group::Expire, Group::Sa, Group::Policy] {
                    inject(group, &message).unwrap();
                }
                sent += 4;
            }
            assert!(source.next_event().now_or_never().is_none(), "{name} is an event");
            let statistics = source.statistics();
            assert_eq!((statistics.foreign, statistics.datagrams), (sent, sent), "{name}");
        }
        assert_eq!((source.statistics().dumps, source.statistics().failed_dumps), (1, 0));
        assert_eq!((before, database.is_current()), (kernel().await, true));
    });
}

/// Whatever the kernel notifies of with a running dump's sequence number neither ends the dump nor answers it.
#[test]
fn a_notification_with_the_sequence_number_of_the_dump_is_none_of_its_answers() {
    story("notifications during a dump", async |_ns| {
        let passing: Vec<Policy> = (0..50).map(numbered).collect();
        // The kernel's notifications carry the number of the request that caused them.
        let change = move || {
            for policy in &passing {
                for sequence in 1..=3 {
                    ask(&[request(&Change::Add(policy.clone()))], sequence).unwrap();
                    ask(&[request(&Change::Delete { id: policy.id.clone(), index: None })], sequence)
                        .unwrap();
                }
            }
        };
        let mut notified = 0;
        dump_while(change, |source| {
            // Those that come before the dump are not counted as events.
            notified += source.statistics().events;
            notified >= 1000
        })
        .await;
    });
}

/// Whatever another process sends to a running dump, with its sequence number, neither ends it nor answers it.
#[test]
fn a_dump_that_another_process_answers_is_the_kernels() {
    story("foreign answers to a dump", async |_ns| {
        let answered = Arc::new(AtomicU64::new(0));
        let answers = Arc::clone(&answered);
        let answer = move || {
            for port in listening(0) {
                for (_, message) in CAPTURED {
                    for sequence in 1..=3 {
                        // The dump may be over by now.
                        let sent = inject_at(port, &with_sequence(message, Some(sequence)));
                        answers.fetch_add(u64::from(sent.is_ok()), Ordering::Relaxed);
                    }
                }
            }
        };
        dump_while(answer, |_| answered.load(Ordering::Relaxed) >= 1000).await;
    });
}

/// Dumps again and again while another thread does something again and again, until that is enough. What the kernel
/// has all the time must be in every dump, and at most one policy more.
async fn dump_while(disturb: impl Fn() + Send + 'static, mut is_enough: impl FnMut(&NetlinkSource) -> bool) {
    struct Disturbance {
        over: Arc<AtomicBool>,
        thread: Option<JoinHandle<()>>,
    }
    impl Drop for Disturbance {
        fn drop(&mut self) {
            self.over.store(true, Ordering::Relaxed);
            let ended = self.thread.take().map(JoinHandle::join);
            assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the disturbance failed");
        }
    }
    let lasting: Vec<Policy> = (100..2000).map(numbered).collect();
    ask(&lasting.iter().cloned().map(Change::Add).map(|change| request(&change)).collect::<Vec<_>>(), 9)
        .unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    let disturb = move || {
        while !is_over.load(Ordering::Relaxed) {
            disturb();
        }
    };
    // The thread is in this one's namespace.
    let _disturbance = Disturbance { over, thread: Some(std::thread::spawn(disturb)) };
    // On a busy machine few dumps are disturbed.
    for _ in 0..5000 {
        let mut source = NetlinkSource::open().unwrap();
        let event = source.next_event().await.unwrap().unwrap();
        let PolicyEvent::Snapshot(snapshot) = event else { panic!("{event:?}") };
        assert_eq!(source.statistics().failed_dumps, 0);
        let all: BTreeSet<&PolicyId> = snapshot.policies.iter().map(|policy| &policy.id).collect();
        assert!(lasting.iter().all(|policy| all.contains(&policy.id)), "{} policies", all.len());
        assert!(all.len() <= lasting.len() + 1, "{} policies", all.len());
        assert_eq!((snapshot.sas, snapshot.default_policy), (Vec::new(), DefaultPolicy::default()));
        if is_enough(&source) {
            return;
        }
    }
    panic!("no dump was disturbed");
}

#[test]
fn a_life_of_an_offloaded_tunnel_is_mirrored() {
    story("an offloaded tunnel", async |_| {
        // Its messages are injected, since no device here offloads.
        let config = NetlinkConfig::default().believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        for (group, name, policies, sas) in [
            (Group::Sa, "newsa-out-offload", 0, 1),
            (Group::Policy, "newpolicy-out-offload", 1, 1),
            (Group::Policy, "newpolicy-fwd-not-offloaded", 2, 1),
            (Group::Policy, "updpolicy-offload-new-prio", 2, 1),
            (Group::Expire, "expire-sa-soft", 2, 1),
            (Group::Policy, "flushpolicy", 0, 1),
            (Group::Sa, "flushsa", 0, 0),
        ] {
            inject(group, captured(name)).unwrap();
            follow(&mut source, &mut database).await;
            let snapshot = database.snapshot();
            assert_eq!((snapshot.policies.len(), snapshot.sas.len()), (policies, sas), "{name}");
        }
    });
}

#[test]
fn an_undecodable_message_makes_the_source_ask_for_everything_again() {
    story("an undecodable message", async |ns| {
        let config = NetlinkConfig::default().believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        inject(Group::Policy, &captured("newpolicy-out-offload")[..100]).unwrap();
        assert_eq!(follow(&mut source, &mut database).await, [StaleCause::Undecodable]);
        assert!(database.is_current());
        assert_eq!(database.snapshot(), kernel().await);
        assert_eq!(database.policies().count(), 1);
    });
}

/// A notification that is cut short anywhere, as a datagram or by its own account, is seen to be, and the database is
/// then what the kernel has.
#[test]
fn a_message_cut_short_anywhere_ends_in_what_the_kernel_has() {
    story("messages cut short", async |ns| {
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        let config = NetlinkConfig::default().believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        let kernel = kernel().await;
        // The source waits between two losses, which are thousands.
        tokio::time::pause();
        let mut cut = 0;
        for (name, message) in CAPTURED {
            // The kernel sends no empty datagram, nor lets others do so.
            for length in 1..message.len() {
                for of_itself in [false, true] {
                    let mut message = message[..length].to_vec();
                    if of_itself && let Some(field) = message.first_chunk_mut() {
                        *field = u32::try_from(length).unwrap().to_ne_bytes();
                    }
                    // Some are whole without their last attributes or messages.
                    if decode(&Bytes::copy_from_slice(&message)).is_ok() {
                        continue;
                    }
                    inject(Group::Policy, &message).unwrap();
                    cut += 1;
                    let event = source.next_event().await.unwrap().unwrap();
                    assert_eq!(event, PolicyEvent::Stale(StaleCause::Undecodable), "{name}: {length}");
                    database.apply(event);
                    database.apply(source.next_event().await.unwrap().unwrap());
                    assert_eq!(source.statistics().undecodable, cut, "{name}: {length}");
                    assert!(database.is_current(), "{name}: {length}");
                    assert_eq!(database.snapshot(), kernel, "{name}: {length}");
                }
            }
        }
        assert_eq!(source.statistics().dumps, cut + 1);
    });
}

#[test]
fn whoever_loses_track_again_and_again_waits_in_between() {
    story("a storm of resynchronisations", async |_| {
        let config = NetlinkConfig::default().believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut events = Vec::new();
        let began = Instant::now();
        while events.len() < 15 {
            let event = timeout(PATIENCE, source.next_event()).await.unwrap().unwrap().unwrap();
            if matches!(event, PolicyEvent::Snapshot(_)) {
                inject(Group::Policy, &captured("newpolicy-out-offload")[..100]).unwrap();
            }
            events.push(event);
        }
        // Never a change, and nothing is told to be true before the pause is over.
        for pair in events.chunks_exact(2) {
            let [PolicyEvent::Snapshot(_), PolicyEvent::Stale(StaleCause::Undecodable)] = pair else {
                panic!("{pair:?}")
            };
        }
        let pauses = 6 * 10;
        assert!(began.elapsed() >= Duration::from_millis(pauses), "seven losses, the first without a pause");
    });
}

#[test]
fn a_receive_buffer_that_overruns_ends_in_what_the_kernel_has() {
    story("an overrun", async |ns| {
        let config = NetlinkConfig::default().receive_buffer(4096);
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        let file = batch((0..2000).map(|n| format!("xfrm policy add {} priority 1 {TUNNEL}\n", host(n))));
        ns.ip(&format!("-batch {}", file.path().display())).unwrap();
        let causes = follow(&mut source, &mut database).await;
        assert!(causes.contains(&StaleCause::Overrun), "{causes:?}");
        assert_eq!(database.policies().count(), 2000);
        assert_eq!(database.snapshot(), kernel().await);
    });
}

#[test]
fn a_receive_buffer_for_links_that_overruns_ends_in_what_the_kernel_has() {
    story("an overrun of links", async |ns| {
        let config = NetlinkConfig::default().receive_buffer(4096).believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        // The kernel never had it: the next dump is without it.
        inject(Group::Policy, captured("newpolicy-out-offload")).unwrap();
        follow(&mut source, &mut database).await;
        assert_eq!(database.policies().count(), 1);
        for _ in 0..20 {
            ns.ip("link set lo down").unwrap();
            ns.ip("link set lo up").unwrap();
        }
        assert_eq!(follow(&mut source, &mut database).await, [StaleCause::Overrun]);
        assert_eq!(source.statistics().lost_devices, 0);
        assert_eq!(database.snapshot(), kernel().await);
    });
}

#[test]
fn a_link_that_goes_down_leaves_or_vanishes_takes_what_was_offloaded_to_it_along() {
    story("lost links", async |ns| {
        let elsewhere = Namespace::new("elsewhere").unwrap();
        let config = NetlinkConfig::default().believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        for end in
            ["link set nic0 down", "link delete nic0", &format!("link set nic0 netns {}", elsewhere.name())]
        {
            ns.ip("link add nic0 type veth peer name wire0").unwrap();
            let nic = ns.ifindex("nic0").unwrap();
            for step in ["link set nic0 up", "link add other type veth peer name wire1", "link delete other"]
            {
                ns.ip(step).unwrap();
            }
            follow(&mut source, &mut database).await;
            // The kernel never had it, so the next dump is without it as after a real loss.
            inject(Group::Sa, &offloaded_to(nic, "newsa-out-offload")).unwrap();
            follow(&mut source, &mut database).await;
            assert_eq!(database.sas().count(), 1);
            ns.ip("link add other type veth peer name wire1").unwrap();
            ns.ip("link delete other").unwrap();
            assert_eq!(follow(&mut source, &mut database).await, [], "nothing is offloaded to it");

            // Not read yet when the link is lost.
            inject(Group::Policy, &offloaded_to(nic, "newpolicy-out-offload")).unwrap();
            ns.ip(end).unwrap();
            assert_eq!(follow(&mut source, &mut database).await, [StaleCause::DeviceLost(nic)], "{end}");
            assert_eq!(database.snapshot(), Snapshot::default(), "{end}");
            assert!(database.is_current());
            let _ = ns.ip("link delete nic0");
            follow(&mut source, &mut database).await;
        }
        assert_eq!(source.statistics().lost_devices, 3);
    });
}

/// Without group 7, nothing tells of it.
#[test]
fn a_policy_that_is_migrated_makes_everything_stale_and_comes_back_with_its_new_far_end() {
    story("migrating a policy", async |ns| {
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        follow(&mut source, &mut database).await;
        let policy = database.policies().next().unwrap().clone();
        assert!(source.caught_up().unwrap());

        let new: (IpAddr, IpAddr) = ("198.51.100.1".parse().unwrap(), "198.51.100.2".parse().unwrap());
        make(&migration(&policy.id, &policy.templates[0], new, None)).unwrap();
        assert!(!source.caught_up().unwrap(), "it was told before it was acknowledged");
        assert_eq!(follow(&mut source, &mut database).await, [StaleCause::Migrated]);
        let now = database.policies().next().unwrap();
        assert_eq!((now.templates[0].source, now.templates[0].destination), new);
        assert_eq!(database.snapshot(), kernel().await);
        assert_eq!(source.statistics().migrations, 1);
    });
}

/// Nobody is told that the kernel sorts its policies anew.
#[test]
fn thresholds_that_change_are_noticed_within_250_ms() {
    story("setting thresholds", async |ns| {
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        follow(&mut source, &mut database).await;
        for bits in [[[16, 16], [128, 128]], [[16, 16], [48, 64]], [[32, 32], [128, 128]]] {
            let begin = Instant::now();
            make(&thresholds(bits)).unwrap();
            let event = timeout(PATIENCE, source.next_event()).await.expect("an event").unwrap();
            assert_eq!(event, Some(PolicyEvent::Stale(StaleCause::Rehashed)), "{bits:?}");
            assert!(begin.elapsed() < Duration::from_millis(250), "{:?}", begin.elapsed());
            assert_eq!(follow(&mut source, &mut database).await, [], "once");
            assert_eq!(database.snapshot(), kernel().await);
        }
    });
}

#[test]
fn a_source_stays_in_the_namespace_that_it_was_opened_in() {
    story("two namespaces", async |ns| {
        let mut source =
            NetlinkSource::with_config(NetlinkConfig::default().audit(Some(Duration::ZERO))).unwrap();
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        let elsewhere = Namespace::new("elsewhere").unwrap();
        elsewhere.join_this_thread().unwrap();
        let mut database = Database::default();
        follow_to_audit(&mut source, &mut database).await;
        source.settle().await.unwrap();
        assert_eq!(database.policies().count(), 1);
        assert_eq!(database.audit_repairs(), 0);
        assert_eq!(kernel().await, Snapshot::default(), "there is none here");
        ns.ip(&format!("xfrm policy delete {OUT}")).unwrap();
        // Among audits, which never end.
        while database.policies().count() > 0 {
            let event = timeout(Duration::from_secs(20), source.next_event()).await;
            database.apply(event.unwrap().unwrap().unwrap());
        }
        assert_eq!(database.audit_repairs(), 0);
    });
}

#[test]
fn a_policy_whose_device_is_lost_before_it_was_read_is_lost_too() {
    story("a link lost early", async |ns| {
        let config = NetlinkConfig::default().believe_anyone();
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        ns.ip("link add nic0 type veth peer name wire0").unwrap();
        let nic = ns.ifindex("nic0").unwrap();
        ns.ip("link set nic0 up").unwrap();
        follow(&mut source, &mut database).await;
        inject(Group::Policy, &offloaded_to(nic, "newpolicy-out-offload")).unwrap();
        ns.ip("link set nic0 down").unwrap();
        assert_eq!(follow(&mut source, &mut database).await, [StaleCause::DeviceLost(nic)]);
        assert_eq!(database.snapshot(), Snapshot::default());
    });
}

#[test]
fn an_audit_finds_nothing_while_policies_change_all_the_time() {
    story("audits amid changes", async |ns| {
        let config = NetlinkConfig::default().audit(Some(Duration::ZERO));
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        let reserved = "xfrm state allocspi src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel";
        let changes = batch((0..1000).map(|n| {
            let (host, other) = (host(n % 300), host((n + 150) % 300));
            match n % 10 {
                0 => "xfrm policy flush\n".to_owned(),
                1 => format!("xfrm policy setdefault fwd {}\n", if n % 20 == 1 { "block" } else { "accept" }),
                2 => format!("xfrm policy add {host} priority 1 limit time-hard 1 {TUNNEL}\n"),
                3 => format!("{reserved} min {} max {}\n", 0x1000 + n, 0x1000 + n),
                4 => format!("xfrm policy update {other} priority 2 limit packet-hard 9 {TUNNEL}\n"),
                5 => format!("xfrm policy delete {other}\n"),
                _ => format!("xfrm policy add {host} priority {n} {TUNNEL}\n"),
            }
        }));
        let change = || {
            let mut ip = Command::new("ip");
            // What is there already, or no longer, is no matter.
            ip.args(["-n", ns.name(), "-force", "-batch"]).arg(changes.path());
            ip.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        };
        let mut changing = change();
        let (mut audits, mut batches) = (0, 0);
        while audits < 3 || batches < 1 {
            follow_to_audit(&mut source, &mut database).await;
            assert_eq!(database.audit_repairs(), 0);
            audits += 1;
            if changing.try_wait().unwrap().is_some() {
                batches += 1;
                changing = change();
            }
        }
        changing.wait().unwrap();
        // The last one begins when nothing changes any longer but what expires.
        for _ in 0..20 {
            follow_to_audit(&mut source, &mut database).await;
        }
        assert_eq!(database.snapshot(), kernel().await);
        assert_eq!((database.audit_repairs(), source.statistics().dumps), (0, 1));
        assert!(source.statistics().audits >= audits && source.statistics().failed_audits == 0);
    });
}

#[test]
fn an_audit_repairs_what_was_withheld_and_what_the_kernel_never_had() {
    story("repairing audits", async |ns| {
        let config = NetlinkConfig::default().believe_anyone().audit(Some(Duration::from_millis(300)));
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        ns.ip(&format!("xfrm policy add {OUT} priority 100 {TUNNEL}")).unwrap();
        follow(&mut source, &mut database).await;

        ns.ip(&format!("xfrm policy delete {OUT}")).unwrap();
        ns.ip(&format!("xfrm policy add {} priority 5 {TUNNEL}", host(1))).unwrap();
        for _ in 0..2 {
            let withheld = timeout(PATIENCE, source.next_event()).await.unwrap().unwrap();
            assert!(matches!(withheld, Some(PolicyEvent::PolicyRemoved(_) | PolicyEvent::Policy(_))));
        }
        inject(Group::Sa, captured("newsa-out-offload")).unwrap();
        follow_to_audit(&mut source, &mut database).await;
        assert_eq!(database.audit_repairs(), 3);
        assert_eq!(database.snapshot(), kernel().await);
        follow_to_audit(&mut source, &mut database).await;
        assert_eq!(database.audit_repairs(), 3, "nothing is repaired twice");
    });
}

#[test]
fn without_a_period_there_are_no_audits() {
    story("no audits", async |ns| {
        for period in [None, Some(Duration::MAX)] {
            let mut source = NetlinkSource::with_config(NetlinkConfig::default().audit(period)).unwrap();
            let mut database = Database::default();
            ns.ip(&format!("xfrm policy update {OUT} priority 100 {TUNNEL}")).unwrap();
            follow(&mut source, &mut database).await;
            assert_eq!((database.policies().count(), source.statistics().audits), (1, 0));
        }
    });
}

#[test]
fn an_association_that_only_has_its_spi_is_not_told() {
    story("a reserved SPI", async |ns| {
        let reserve = "xfrm state allocspi src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel";
        ns.ip(&format!("{reserve} min 256 max 512")).unwrap();
        assert!(ns.ip("xfrm state").unwrap().contains("spi"));
        assert_eq!(kernel().await, Snapshot::default());
    });
}

#[test]
fn the_source_says_so_outside_a_runtime() {
    let error = NetlinkSource::open().unwrap_err().to_string();
    assert!(error.contains("runtime"), "{error}");
}
