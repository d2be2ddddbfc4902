//! Taking over: all ports or none, and who is told.

use std::{fs, path::Path, time::Duration};

use fastswan::{
    XdpForwarder,
    forwarder::{AttachConfig, AttachMode, ForwarderError, PortProblem},
    table::{Slot, TableCounters as _},
};
use fastswan_testkit::lab::Namespace;
use tokio::time::timeout;

use super::{assert_detached, forwarder, hairpin, pinned_story, port, running, says, send_ten};

/// All names below a directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            names.extend(self::names(&path));
        }
        names.push(path.to_str().unwrap().to_owned());
    }
    names.sort();
    names
}

/// Something that makes a take-over fail, as it is laid in the way of a successor and taken away again.
struct Obstacle {
    what: &'static str,
    /// How the ports are to be attached.
    configs: fn() -> Vec<AttachConfig>,
    lay: fn(&Namespace, &Path, &XdpForwarder) -> Option<XdpForwarder>,
    clear: fn(&Namespace, &Path, &XdpForwarder),
}

fn three_ports() -> Vec<AttachConfig> {
    vec![port("lan0"), port("lan1"), port("br0")]
}

fn native_bridge() -> Vec<AttachConfig> {
    vec![port("lan0"), port("lan1"), port("br0").mode(AttachMode::Native)]
}

fn other_mode() -> Vec<AttachConfig> {
    vec![port("lan0").mode(AttachMode::Generic), port("lan1"), port("br0").mode(AttachMode::Native)]
}

const OBSTACLES: [Obstacle; 7] = [
    Obstacle {
        what: "the third port is not there",
        configs: three_ports,
        lay: |here, _, _| {
            here.ip("link del br0").unwrap();
            None
        },
        clear: |here, _, _| drop(here.ip("link add br0 type bridge").unwrap()),
    },
    Obstacle {
        what: "the third port is taken by somebody else",
        configs: three_ports,
        lay: |_, _, _| {
            let mut other = forwarder();
            other.attach(&port("br0")).unwrap();
            Some(other)
        },
        clear: |_, _, _| {},
    },
    Obstacle {
        what: "the driver of the third port has no native XDP",
        configs: native_bridge,
        lay: |_, _, _| None,
        clear: |_, _, _| {},
    },
    Obstacle {
        what: "the first port changes its mode before the third fails",
        configs: other_mode,
        lay: |_, _, _| None,
        clear: |_, _, _| {},
    },
    Obstacle {
        what: "the link to the third port cannot be pinned",
        configs: three_ports,
        lay: |here, pins, _| {
            fs::create_dir(pins.join(format!("ports/{}", here.ifindex("br0").unwrap()))).unwrap();
            None
        },
        clear: |here, pins, _| {
            fs::remove_dir(pins.join(format!("ports/{}", here.ifindex("br0").unwrap()))).unwrap();
        },
    },
    Obstacle {
        what: "the counters cannot be pinned",
        configs: three_ports,
        lay: |_, pins, second| {
            fs::create_dir_all(pins.join(format!("{}/SLOTS", second.program_id()))).unwrap();
            None
        },
        clear: |_, pins, second| {
            fs::remove_dir_all(pins.join(second.program_id().to_string())).unwrap();
        },
    },
    Obstacle {
        what: "the successor cannot become the owner",
        configs: three_ports,
        lay: |_, pins, _| {
            fs::create_dir(pins.join("next")).unwrap();
            None
        },
        clear: |_, pins, _| fs::remove_dir(pins.join("next")).unwrap(),
    },
];

#[test]
fn a_take_over_that_fails_at_any_step_changes_nothing_and_may_be_tried_again() {
    pinned_story("failing half-way", |here, pins| {
        here.ip("link add br0 type bridge").unwrap();
        for Obstacle { what, configs, lay, clear } in OBSTACLES {
            println!("{what}");
            let (mut first, table) = hairpin(81, 0);
            first.attach_pinned(pins, &[port("lan0"), port("lan1")]).unwrap();
            let before = names(pins);
            let (mut second, second_table) = hairpin(81, 0);
            let foreign = lay(here, pins, &second);
            let error = second.attach_pinned(pins, &configs()).unwrap_err();
            println!("{error}");
            assert_eq!(running(here, "lan0"), Some(first.program_id()));
            assert_eq!(running(here, "lan1"), Some(first.program_id()));
            assert!(!first.is_superseded() && !second.is_superseded());
            assert_eq!(second.attachments().count(), 0);
            send_ten(|| table.traffic(Slot(0)).packets);
            assert_eq!(second_table.traffic(Slot(0)).packets, 0);
            // Detaching is allowed to one who has nothing.
            second.detach_all().unwrap();
            assert_eq!(first.check_ports().iter().filter(|it| it.problem.is_some()).count(), 0);
            drop(foreign);
            clear(here, pins, &second);
            assert_eq!(names(pins), before);

            let again = second.attach_pinned(pins, &three_ports()).unwrap();
            assert_eq!(again.len(), 3);
            assert!(first.is_superseded() && !second.is_superseded());
            assert_eq!(running(here, "br0"), Some(second.program_id()));
            assert_eq!(second_table.traffic(Slot(0)).packets, 10, "it goes on counting");
            send_ten(|| second_table.traffic(Slot(0)).packets);
            second.detach_all().unwrap();
            for device in ["lan0", "lan1", "br0"] {
                assert_detached(here, device);
            }
        }
    });
}

#[test]
fn a_first_process_that_fails_leaves_nothing_behind() {
    pinned_story("failing with no predecessor", |here, pins| {
        here.ip("link add br0 type bridge").unwrap();
        let mut first = forwarder();
        let error = first.attach_pinned(pins, &native_bridge()).unwrap_err();
        assert!(matches!(error, ForwarderError::NoNativeXdp { .. }), "{error}");
        for device in ["lan0", "lan1", "br0"] {
            assert_eq!(running(here, device), None);
        }
        assert_eq!(fs::read_dir(pins.join("ports")).unwrap().count(), 0);
        assert!(!pins.join(first.program_id().to_string()).exists());
        first.attach_pinned(pins, &three_ports()).unwrap();
    });
}

#[test]
fn what_a_process_that_ended_while_it_took_over_has_left_is_taken_back_or_cleaned_up() {
    pinned_story("a successor that is killed half-way", |here, pins| {
        let (mut first, table) = hairpin(81, 0);
        first.attach_pinned(pins, &[port("lan0")]).unwrap();
        let counters = pins.join(first.program_id().to_string());
        // As far as it got: its program is at the port, its counters are pinned, and it is not the owner.
        let [owner, kept] = ["owner", "kept"].map(|name| pins.join(name));
        fs::rename(&owner, &kept).unwrap();
        let mut killed = forwarder();
        killed.attach_pinned(pins, &[port("lan0")]).unwrap();
        fs::rename(&kept, &owner).unwrap();
        let left = pins.join(killed.program_id().to_string());
        let program = Some(killed.program_id());
        drop(killed);
        assert!(left.exists());
        // The counters of the first were stale to one who knew no owner.
        fs::create_dir_all(&counters).unwrap();

        assert!(!first.is_superseded());
        let problem = first.check_ports().remove(0).problem;
        assert_eq!(problem, Some(PortProblem::Replaced { interface: "lan0".to_owned(), program }));
        let again = first.reattach().unwrap().remove(0);
        assert_eq!(again.now.unwrap().ifindex, again.before);
        assert_eq!(running(here, "lan0"), Some(first.program_id()));
        assert!(first.reattach().unwrap().is_empty());
        send_ten(|| table.traffic(Slot(0)).packets);

        let mut next = forwarder();
        next.attach_pinned(pins, &[port("lan0")]).unwrap();
        assert!(!left.exists() && !counters.exists());
    });
}

#[test]
fn a_process_that_waits_for_its_successor_is_told_at_once() {
    pinned_story("waiting for a successor", |_, pins| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut first = forwarder();
            let nobody = timeout(Duration::from_millis(50), first.superseded()).await;
            assert!(nobody.is_err(), "nothing is pinned");
            first.attach_pinned(pins, &[port("lan0")]).unwrap();
            let superseded = tokio::spawn(first.superseded());
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!superseded.is_finished());
            let mut second = forwarder();
            second.attach_pinned(pins, &[port("lan0")]).unwrap();
            // Where it looked by itself, it would look five times a second.
            let error = timeout(Duration::from_millis(100), superseded).await.unwrap().unwrap();
            assert!(matches!(error, ForwarderError::Superseded { .. }), "{error}");
            says(&error, &[pins.to_str().unwrap()]);
            // And one that asks afterwards.
            timeout(Duration::from_secs(1), first.superseded()).await.unwrap();
        });
    });
}

#[test]
fn a_directory_of_another_network_namespace_is_refused_while_its_ports_are_there() {
    pinned_story("two namespaces with one directory", |here, pins| {
        let ifindex = here.ifindex("lan0").unwrap();
        let mut first = forwarder();
        first.attach_pinned(pins, &[port("lan0")]).unwrap();
        let elsewhere = Namespace::new("elsewhere").unwrap();
        elsewhere.ip(&format!("link add lan0 index {ifindex} type veth peer name lan1")).unwrap();
        elsewhere.enter(|| {
            let mut second = forwarder();
            let error = second.attach_pinned(pins, &[port("lan0")]).unwrap_err();
            assert!(matches!(error, ForwarderError::OtherNamespace { .. }), "{error}");
            says(&error, &[pins.to_str().unwrap(), "another network namespace", "choose another directory"]);
            assert_eq!(running(&elsewhere, "lan0"), None);
        });
        assert_eq!(running(here, "lan0"), Some(first.program_id()));
        assert!(!first.is_superseded());

        // A container that is started again has another namespace, and its old interfaces are gone.
        here.ip("link del lan0").unwrap();
        drop(first);
        elsewhere.enter(|| {
            let mut second = forwarder();
            second.attach_pinned(pins, &[port("lan0")]).unwrap();
            assert_eq!(running(&elsewhere, "lan0"), Some(second.program_id()));
        });
    });
}

#[test]
fn single_ports_come_and_go_while_all_are_pinned() {
    pinned_story("attaching one more", |here, pins| {
        let mut forwarder = forwarder();
        forwarder.attach_pinned(pins, &[port("lan0")]).unwrap();
        let ifindex = here.ifindex("lan1").unwrap();
        let attachment = forwarder.attach(&port("lan1")).unwrap();
        assert_eq!(attachment.ifindex, ifindex);
        assert!(pins.join(format!("ports/{ifindex}")).exists());
        forwarder.detach(ifindex).unwrap();
        assert_eq!(running(here, "lan1"), None, "at once");
        assert!(!pins.join(format!("ports/{ifindex}")).exists());
        forwarder.attach(&AttachConfig::new(ifindex).complete_frames(true)).unwrap();
        let program = Some(forwarder.program_id());
        drop(forwarder);
        assert_eq!([running(here, "lan0"), running(here, "lan1")], [program; 2]);
    });
}
