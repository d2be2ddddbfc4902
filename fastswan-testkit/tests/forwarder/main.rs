//! Attaching and detaching: what each port is refused for, and that nothing stays behind.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread::yield_now,
    time::{Duration, Instant},
};

use fastswan::{
    OffloadTable as _, PassReason, XdpForwarder,
    forwarder::{AttachConfig, AttachMode, ForwarderError, GuardError, HeldBy, PortProblem},
    policy::MacAddr,
    table::{
        BpfTable, Cell, Change, Forwarding, Forwards, Port, Ports as _, Probes, Removals, ReversePath, Slot,
        TableConfig, TableCounters as _, TableUpdate, Traffic, Verdict,
    },
};
use fastswan_testkit::{
    frames::Frame,
    lab::{self, BpfFileSystem, Namespace},
};

mod ports;
mod takeover;

/// Set for the copy of this program that gives up its privileges.
const UNPRIVILEGED: &str = "FASTSWAN_TEST_UNPRIVILEGED";

fn forwarder() -> XdpForwarder {
    XdpForwarder::load(config()).unwrap().0
}

fn config() -> TableConfig {
    TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 64, slots: 4 }
}

/// A veth port whose sender is said to complete its frames.
fn port(name: &str) -> AttachConfig {
    AttachConfig::new(name).complete_frames(true)
}

/// Runs a story in a namespace that has the veth pair lan0 and lan1.
fn story(what: &str, tell: impl FnOnce(&Namespace) + Send) {
    if !lab::require_root(what) {
        return;
    }
    let namespace = Namespace::new("forwarder").unwrap();
    namespace.ip("link add lan0 type veth peer name lan1").unwrap();
    namespace.enter(|| tell(&namespace));
}

/// The number of the program that an interface runs, as `ip link` shows it.
fn running(namespace: &Namespace, interface: &str) -> Option<u32> {
    let shown = namespace.ip(&format!("link show dev {interface}")).unwrap();
    let mut words = shown.split_whitespace().skip_while(|word| *word != "prog/xdp");
    words.nth(2).map(|id| id.parse().unwrap())
}

/// Asserts that a message names its object and what to do about it.
fn says(error: &ForwarderError, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} says nothing of {word:?}");
    }
}

#[test]
fn an_interface_that_is_not_in_this_namespace_is_refused_by_name() {
    story("a missing interface", |here| {
        let elsewhere = Namespace::new("elsewhere").unwrap();
        elsewhere.ip("link add wan0 type veth peer name wan1").unwrap();
        let mut forwarder = forwarder();
        for name in ["wan0", "a-name-longer-than-any-interface-has", ""] {
            let error = forwarder.attach(&port(name)).unwrap_err();
            assert!(matches!(&error, ForwarderError::NoSuchInterface { interface } if interface == name));
            says(&error, &[&format!("{name:?}"), "namespace", "`ip link`"]);
        }
        assert_eq!(running(here, "lan0"), None);
        assert_eq!(forwarder.attachments().count(), 0);
    });
}

#[test]
fn a_second_forwarder_is_told_whose_program_runs_and_the_first_stays() {
    for mode in [AttachMode::Native, AttachMode::Generic] {
        story("two forwarders", |namespace| {
            let mut first = forwarder();
            let attachment = first.attach(&port("lan0").mode(mode)).unwrap();
            assert_eq!((attachment.mode, attachment.fallback), (mode, None));
            let owner = first.program_id();
            assert_eq!(running(namespace, "lan0"), Some(owner));

            let mut second = forwarder();
            for mode in [AttachMode::Automatic, AttachMode::Native, AttachMode::Generic] {
                let error = second.attach(&port("lan0").mode(mode)).unwrap_err();
                let ForwarderError::AlreadyAttached { interface, program, held: HeldBy::Link, .. } = &error
                else {
                    panic!("{error}")
                };
                assert_eq!((interface.as_str(), *program), ("lan0", Some(owner)));
                says(&error, &["lan0", &owner.to_string(), "`bpftool link`", "stop it"]);
            }
            drop(second);
            assert_eq!(running(namespace, "lan0"), Some(owner));
            let error = first.attach(&port("lan0")).unwrap_err();
            assert!(matches!(error, ForwarderError::NamedTwice { .. }), "{error}");
        });
    }
}

#[test]
fn a_software_port_is_refused_until_someone_says_that_its_frames_are_complete() {
    story("software ports", |namespace| {
        // `ip tuntap` ignores `-n`, but it is started from this thread, in this namespace.
        assert!(
            Command::new("ip").args(["tuntap", "add", "tap0", "mode", "tap"]).status().unwrap().success()
        );
        let mut forwarder = forwarder();
        namespace.ip("link add br0 type bridge").unwrap();
        for (name, kind) in [("lan0", "veth"), ("tap0", "tun"), ("br0", "bridge")] {
            let error = forwarder.attach(&AttachConfig::new(name)).unwrap_err();
            assert!(
                matches!(&error, ForwarderError::Unsuitable(PortProblem::IncompleteFrames { .. })),
                "{error}"
            );
            says(&error, &[name, kind, "ethtool -K", "complete_frames(true)"]);
            assert_eq!(running(namespace, name), None);
            forwarder.attach(&port(name)).unwrap();
            assert_eq!(running(namespace, name), Some(forwarder.program_id()));
        }
        let error = forwarder.attach(&port("lo")).unwrap_err();
        assert!(
            matches!(&error, ForwarderError::Unsuitable(PortProblem::Loopback { .. })),
            "whatever is said of its frames: {error}"
        );
        says(&error, &["lo is the loopback interface", "name the interface"]);
    });
}

#[test]
fn a_driver_without_native_xdp_is_refused_or_replaced_by_the_generic_way() {
    story("a driver without native XDP", |namespace| {
        let mut forwarder = forwarder();
        namespace.ip("link add br0 type bridge").unwrap();
        let name = "br0";
        let error = forwarder.attach(&port(name).mode(AttachMode::Native)).unwrap_err();
        assert!(matches!(&error, ForwarderError::NoNativeXdp { .. }), "{error}");
        says(&error, &[name, "native", "AttachMode::Generic"]);
        assert_eq!(running(namespace, name), None);

        let attachment = forwarder.attach(&port(name)).unwrap();
        assert_eq!(attachment.mode, AttachMode::Generic);
        assert_eq!(attachment.fallback, Some(error.to_string()));
        assert_eq!(running(namespace, name), Some(forwarder.program_id()));
    });
}

#[test]
fn a_process_without_privileges_is_told_which_ones_it_lacks() {
    if std::env::var_os(UNPRIVILEGED).is_some() {
        nix::unistd::setuid(65534.into()).unwrap();
        let error = XdpForwarder::load(&TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 64, slots: 4 })
            .unwrap_err();
        assert!(matches!(error, ForwarderError::NotPermitted { .. }), "{error}");
        says(&error, &["BPF", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "root"]);
        return;
    }
    if !lab::require_root("giving up privileges") {
        return;
    }
    let name = "a_process_without_privileges_is_told_which_ones_it_lacks";
    let unprivileged = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(UNPRIVILEGED, "1")
        .output()
        .unwrap();
    let [told, errors] =
        [unprivileged.stdout, unprivileged.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(told.contains("1 passed"), "{told}{errors}");
}

#[test]
fn a_dropped_forwarder_leaves_no_program_behind() {
    story("dropping a forwarder", |namespace| {
        let mut forwarder = forwarder();
        namespace.ip("link add br0 type bridge").unwrap();
        for name in ["lan0", "lan1", "br0"] {
            forwarder.attach(&port(name)).unwrap();
        }
        let attached: Vec<String> = forwarder.attachments().map(|at| at.interface.clone()).collect();
        assert_eq!(attached, ["lan0", "lan1", "br0"]);
        let program = Some(forwarder.program_id());
        let running = || ["lan0", "lan1", "br0"].map(|name| running(namespace, name));
        assert_eq!(running(), [program; 3]);
        drop(forwarder);
        assert_eq!(running(), [None; 3]);
    });
}

#[test]
fn an_interface_that_was_detached_can_be_attached_again() {
    story("detaching", |namespace| {
        let mut forwarder = forwarder();
        let program = Some(forwarder.program_id());
        forwarder.attach(&port("lan1")).unwrap();
        for mode in [AttachMode::Native, AttachMode::Generic] {
            let attachment = forwarder.attach(&port("lan0").mode(mode)).unwrap();
            assert_eq!(attachment.ifindex, namespace.ifindex("lan0").unwrap());
            assert_eq!(running(namespace, "lan0"), program);
            forwarder.detach("lan0").unwrap();
            assert_eq!(running(namespace, "lan0"), None);
            let error = forwarder.detach("lan0").unwrap_err();
            assert!(matches!(error, ForwarderError::NotAttached { .. }));
            says(&error, &["lan0", "attach it first"]);
        }
        assert_eq!(running(namespace, "lan1"), program, "it was not asked to go");
    });
}

#[test]
fn an_interface_that_was_replaced_by_another_of_its_name_is_attached_and_detached_like_any() {
    story("replacing an interface", |namespace| {
        let mut forwarder = forwarder();
        forwarder.attach(&port("lan0")).unwrap();
        namespace.ip("link del lan0").unwrap();
        namespace.ip("link add lan0 type veth peer name lan1").unwrap();
        forwarder.attach(&port("lan0")).unwrap();
        assert_eq!(running(namespace, "lan0"), Some(forwarder.program_id()));
        forwarder.detach("lan0").unwrap();
        assert_eq!(running(namespace, "lan0"), None);
    });
}

/// Where a forwarder's table sends what comes to lan0: back, for the policy with this index, in this slot.
fn hairpin(index: u32, slot: u32) -> (XdpForwarder, BpfTable) {
    hairpin_on("lan0", index, slot)
}

/// The same for what comes to another device.
fn hairpin_on(device: &str, index: u32, slot: u32) -> (XdpForwarder, BpfTable) {
    let config = TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 64, slots: 4 };
    let (forwarder, mut table) = XdpForwarder::load(&config).unwrap();
    let ifindex = nix::net::if_::if_nametoindex(device).unwrap();
    let port = Port {
        ifindex,
        vlan: 0,
        receiver: ifindex,
        // The address that frames are sent to unless they say otherwise.
        address: MacAddr([2, 0, 0, 0, 0, 1]),
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    };
    table.set_port(&port).unwrap();
    let (all, slot) = ("0.0.0.0/0".parse().unwrap(), Slot(slot));
    let cell = Cell { destination: all, source: all };
    let forwarding = Forwarding { ifindex, max_length: 1500, rewrite: None };
    table
        .apply(&TableUpdate::from_iter([
            Change::Cell(cell, Some(Verdict::Fast { slot, probes: Probes::default() })),
            Change::Slot(slot, Some(Ok(forwarding))),
            Change::Owner(slot, index),
        ]))
        .unwrap();
    table.renew_lease(Instant::now() + Duration::from_secs(60));
    table.set_enabled(true);
    (forwarder, table)
}

fn passed(table: &BpfTable, reason: PassReason) -> u64 {
    table.passes().into_iter().filter(|(other, _)| *other == reason).map(|(_, packets)| packets).sum()
}

/// Sends ten frames to lan0, and waits until they are counted.
fn send_ten(count: impl Fn() -> u64) {
    let mut wire = lab::wire("lan1").unwrap();
    let before = count();
    for _ in 0..10 {
        wire.write_all(&Frame::v4("10.1.0.5", "10.2.0.9").payload(72).build()).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while count() != before + 10 {
        assert!(Instant::now() < deadline, "{before} frames were counted before and {} after", count());
        yield_now();
    }
}

/// Waits until an interface runs no program: the kernel lets go of a link a moment after its pin is removed.
fn assert_detached(namespace: &Namespace, interface: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while running(namespace, interface).is_some() {
        assert!(Instant::now() < deadline, "{interface} still runs a program");
        yield_now();
    }
}

/// A story with two ports that are up.
fn pinned_story(what: &str, tell: impl FnOnce(&Namespace, &Path) + Send) {
    story(what, |namespace| {
        for device in ["lan0", "lan1"] {
            // Nothing is sent that the story does not tell.
            namespace.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "1").unwrap();
            namespace.ip(&format!("link set {device} up")).unwrap();
        }
        let file_system = BpfFileSystem::mount().unwrap();
        tell(namespace, &file_system.path().join("pins"));
    });
}

#[test]
fn a_pinned_program_stays_when_its_process_ends_and_the_next_one_goes_on_counting() {
    pinned_story("taking over from a process that is gone", |here, pins| {
        let (mut first, mut table) = hairpin(81, 0);
        let attached = first.attach_pinned(pins, &[port("lan0")]).unwrap();
        assert_eq!(first.attachments().cloned().collect::<Vec<_>>(), attached);
        send_ten(|| table.traffic(Slot(0)).packets);
        table.set_enabled(false);
        send_ten(|| passed(&table, PassReason::Disabled));
        let program = first.program_id();
        drop((first, table));
        assert_eq!(running(here, "lan0"), Some(program), "it is still attached");

        let (mut second, table) = hairpin(81, 3);
        assert_eq!(second.attach_pinned(pins, &[port("lan0")]).unwrap(), attached);
        assert_eq!(running(here, "lan0"), Some(second.program_id()));
        assert_eq!(table.traffic(Slot(3)), Traffic { packets: 10, bytes: 1000 });
        assert_eq!(passed(&table, PassReason::Disabled), 10);
        send_ten(|| table.traffic(Slot(3)).packets);

        // And once more: what was inherited is handed on, but not to another policy.
        let (mut third, third_table) = hairpin(81, 1);
        third.attach_pinned(pins, &[port("lan0")]).unwrap();
        assert_eq!(third_table.traffic(Slot(1)), Traffic { packets: 20, bytes: 2000 });
        let (mut fourth, fourth_table) = hairpin(89, 1);
        fourth.attach_pinned(pins, &[port("lan0")]).unwrap();
        assert_eq!(fourth_table.traffic(Slot(1)), Traffic::default());
        assert_eq!(passed(&fourth_table, PassReason::Disabled), 10);
        assert_eq!(fs::read_dir(pins).unwrap().count(), 4, "an owner, its ports, counters and namespace");
    });
}

#[test]
fn a_process_that_was_superseded_changes_nothing_and_is_told() {
    pinned_story("waking up after a successor has taken over", |here, pins| {
        let (mut old, mut old_table) = hairpin(81, 0);
        old.attach_pinned(pins, &[port("lan0")]).unwrap();
        let (mut new, table) = hairpin(81, 0);
        assert!(!old.is_superseded());
        new.attach_pinned(pins, &[port("lan0")]).unwrap();
        assert!(old.is_superseded() && !new.is_superseded());

        old_table.set_enabled(false);
        old_table.remove_port(here.ifindex("lan0").unwrap(), 0);
        send_ten(|| table.traffic(Slot(0)).packets);
        assert_eq!(old_table.traffic(Slot(0)).packets, 0);

        let again =
            [old.attach_pinned(pins, &[port("lan0")]).map(drop), old.detach("lan0"), old.detach_all()];
        for result in again {
            let error = result.unwrap_err();
            assert!(matches!(error, ForwarderError::Superseded { .. }), "{error}");
            says(&error, &[pins.to_str().unwrap(), "another process"]);
        }
        drop(old);
        send_ten(|| table.traffic(Slot(0)).packets);
        assert_eq!(running(here, "lan0"), Some(new.program_id()));
    });
}

#[test]
fn no_frame_misses_both_programs_while_one_takes_over_from_the_other() {
    pinned_story("taking over under traffic", |_, pins| {
        let (mut forwarder, mut table) = hairpin(81, 0);
        forwarder.attach_pinned(pins, &[port("lan0")]).unwrap();
        let stop = AtomicBool::new(false);
        let mut wire = lab::wire("lan1").unwrap();
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let frame = Frame::v4("10.1.0.5", "10.2.0.9").build();
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    wire.write_all(&frame).unwrap();
                    sent += 1;
                }
                sent
            });
            let mut last = 0;
            for _ in 0..20 {
                let (mut next, next_table) = hairpin(81, 0);
                next.attach_pinned(pins, &[port("lan0")]).unwrap();
                (forwarder, table) = (next, next_table);
                let now = table.traffic(Slot(0)).packets;
                assert!(now >= last, "{now} after {last}");
                last = now;
            }
            stop.store(true, Ordering::Relaxed);
            sender.join().unwrap()
        });
        let deadline = Instant::now() + Duration::from_secs(10);
        while table.traffic(Slot(0)).packets != sent {
            let counted = table.traffic(Slot(0)).packets;
            assert!(Instant::now() < deadline, "{counted} of {sent} frames were counted");
            yield_now();
        }
        drop(forwarder);
    });
}

#[test]
fn ports_that_a_successor_does_not_name_are_given_up_and_others_are_attached() {
    pinned_story("other ports than before", |here, pins| {
        let mut first = forwarder();
        first.attach_pinned(pins, &[port("lan0")]).unwrap();
        let mut second = forwarder();
        second.attach_pinned(pins, &[port("lan1")]).unwrap();
        drop(first);
        assert_detached(here, "lan0");
        assert_eq!(running(here, "lan1"), Some(second.program_id()));
        second.attach_pinned(pins, &[port("lan0"), port("lan1")]).unwrap();
        assert_eq!(running(here, "lan0"), running(here, "lan1"));
        second.detach("lan0").unwrap();
        assert_detached(here, "lan0");
        second.detach_all().unwrap();
        assert_detached(here, "lan1");
        assert_eq!(fs::read_dir(pins.join("ports")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(pins).unwrap().count(), 1);
    });
}

#[test]
fn a_pinned_port_in_another_mode_is_attached_anew_and_one_that_is_gone_does_no_harm() {
    pinned_story("another mode", |here, pins| {
        let mut first = forwarder();
        first.attach_pinned(pins, &[port("lan0").mode(AttachMode::Generic)]).unwrap();
        let mut second = forwarder();
        // The first one's link must be closed, too, before the kernel lets another mode in.
        drop(first);
        let attached = second.attach_pinned(pins, &[port("lan0").mode(AttachMode::Native)]).unwrap();
        assert_eq!(attached[0].mode, AttachMode::Native);
        here.ip("link del lan0").unwrap();
        here.ip("link add lan0 type veth peer name lan1").unwrap();
        let mut third = forwarder();
        third.attach_pinned(pins, &[port("lan0")]).unwrap();
        assert_eq!(running(here, "lan0"), Some(third.program_id()));
    });
}

#[test]
fn a_directory_elsewhere_is_refused_with_a_place_to_choose() {
    pinned_story("pinning elsewhere", |here, _| {
        let elsewhere = tempfile::tempdir().unwrap();
        let error = forwarder().attach_pinned(elsewhere.path().join("pins"), &[port("lan0")]).unwrap_err();
        assert!(matches!(error, ForwarderError::NotABpfFileSystem { .. }), "{error}");
        says(&error, &["pins", "/sys/fs/bpf", "mount -t bpf"]);
        assert_eq!(running(here, "lan0"), None);
    });
}

#[test]
fn the_guard_counts_removals_or_says_why_it_cannot() {
    story("the guard", |namespace| {
        let (mut forwarder, table) = XdpForwarder::load(config()).unwrap();
        match forwarder.attach_guard() {
            Ok(guard) => {
                let begun = || table.removals().begun;
                assert_eq!((begun(), table.removals().acknowledged), (1, 0), "it is shut at first");
                let policy = "src 10.1.0.0/16 dst 10.2.0.0/16 dir out";
                let cycle = || {
                    namespace.ip(&format!("xfrm policy add {policy}")).unwrap();
                    namespace.ip(&format!("xfrm policy delete {policy}")).unwrap();
                };
                cycle();
                assert!(begun() > 1);
                drop(guard);
                let before = begun();
                cycle();
                assert_eq!(begun(), before);
                let _again = forwarder.attach_guard().unwrap();
                assert!(begun() > before);
            }
            Err(error) => {
                println!("{error}");
                match error {
                    GuardError::NoBtf { .. } => assert!(!Path::new("/sys/kernel/btf/vmlinux").exists()),
                    GuardError::Refused { function: "__xfrm_policy_unlink", error } => {
                        assert!(error.raw_os_error().is_some());
                    }
                    other => panic!("{other:?}"),
                }
                assert_eq!(table.removals(), Removals::default());
                forwarder.attach(&port("lan0")).unwrap();
            }
        }
    });
}
