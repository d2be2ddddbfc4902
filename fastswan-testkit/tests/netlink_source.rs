//! The netlink source against the running kernel, in namespaces of their own.

use std::{future::Future, time::Duration};

use fastswan::{
    Database, NetlinkSource, PolicyEvent, PolicySource as _, Snapshot,
    policy::{Action, DefaultPolicy, Direction},
    source::{StaleCause, netlink::NetlinkConfig},
};
use fastswan_testkit::{
    lab::{self, Namespace},
    xfrm::{Group, captured, inject},
};
use futures::FutureExt as _;
use tokio::time::timeout;

const OUT: &str = "src 10.1.0.0/16 dst 10.2.0.0/16 dir out";
const TUNNEL: &str = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel";
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
    while let Ok(event) = timeout(Duration::from_millis(200), source.next_event()).await {
        let event = event.unwrap().unwrap();
        if let PolicyEvent::Stale(cause) = event {
            causes.push(cause);
        }
        database.apply(event);
    }
    causes
}

/// What the kernel has now, asked for afresh.
async fn kernel() -> Snapshot {
    let mut database = Database::default();
    follow(&mut NetlinkSource::open().unwrap(), &mut database).await;
    database.snapshot()
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
        source.settle().unwrap();
        let event = source.next_event().now_or_never().unwrap().unwrap();
        assert!(matches!(event, Some(PolicyEvent::PolicyRemoved(_))), "{event:?}");
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

#[test]
fn messages_that_the_kernel_did_not_send_change_nothing() {
    story("foreign messages", async |_| {
        let mut source = NetlinkSource::open().unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        inject(Group::Policy, captured("newpolicy-out-offload")).unwrap();
        inject(Group::Sa, captured("newsa-out-offload")).unwrap();
        assert_eq!(follow(&mut source, &mut database).await, []);
        assert_eq!(database.snapshot(), Snapshot::default());
        assert_eq!(source.statistics().foreign, 2);
    });
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

#[test]
fn a_receive_buffer_that_overruns_ends_in_what_the_kernel_has() {
    story("an overrun", async |ns| {
        let config = NetlinkConfig::default().receive_buffer(4096);
        let mut source = NetlinkSource::with_config(config).unwrap();
        let mut database = Database::default();
        follow(&mut source, &mut database).await;
        let line = |n: u32| {
            format!(
                "xfrm policy add src 10.1.{}.{}/32 dst 10.2.0.0/16 dir out priority 1 {TUNNEL}\n",
                n / 256,
                n % 256
            )
        };
        let batch: String = (0..2000).map(line).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, batch.as_bytes()).unwrap();
        ns.ip(&format!("-batch {}", file.path().display())).unwrap();
        let causes = follow(&mut source, &mut database).await;
        assert!(causes.contains(&StaleCause::Overrun), "{causes:?}");
        assert_eq!(database.policies().count(), 2000);
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
fn the_source_says_so_outside_a_runtime() {
    let error = NetlinkSource::open().unwrap_err().to_string();
    assert!(error.contains("runtime"), "{error}");
}
