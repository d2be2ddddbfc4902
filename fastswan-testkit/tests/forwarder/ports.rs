//! Ports: which interface is meant, whether it is suitable, and what becomes of it while it is attached.

use std::{
    fs,
    io::Write as _,
    process::Command,
    thread::yield_now,
    time::{Duration, Instant},
};

use fastswan::{
    OffloadTable as _, XdpForwarder,
    forwarder::{AttachConfig, AttachMode, ForwarderError, HeldBy, PortProblem},
    table::{Slot, TableConfig, TableCounters as _},
};
use fastswan_testkit::{
    frames::{Frame, Tag},
    lab::{self, Namespace},
};

use super::{config, forwarder, hairpin_on, pinned_story, port, running, says, story};

/// The problem of the only port.
fn problem(forwarder: &XdpForwarder) -> Option<PortProblem> {
    let mut ports = forwarder.check_ports();
    assert_eq!(ports.len(), 1);
    ports.remove(0).problem
}

#[test]
fn an_interface_is_found_by_index_and_by_any_of_its_names_but_only_once() {
    story("names of an interface", |namespace| {
        let long = "the-uplink-of-the-gateway";
        namespace.ip(&format!("link property add dev lan0 altname {long}")).unwrap();
        let ifindex = namespace.ifindex("lan0").unwrap();
        let mut forwarder = forwarder();
        for config in [port(long), AttachConfig::new(ifindex).complete_frames(true)] {
            let resolved = forwarder.resolve(std::slice::from_ref(&config)).unwrap().remove(0);
            assert_eq!((resolved.interface.as_str(), resolved.ifindex), ("lan0", ifindex));
            let attachment = forwarder.attach(&config).unwrap();
            assert_eq!((attachment.interface.as_str(), attachment.ifindex), ("lan0", ifindex));

            let error = forwarder.attach(&port("lan0")).unwrap_err();
            assert!(matches!(error, ForwarderError::NamedTwice { .. }), "{error}");
            says(&error, &["lan0", "name it once"]);
            forwarder.detach(long).unwrap();
            assert_eq!(running(namespace, "lan0"), None);
        }
        let error = forwarder.resolve(&[port("lan1"), port("lan0"), port(long)]).unwrap_err();
        assert!(matches!(error, ForwarderError::NamedTwice { .. }), "{error}");
        says(&error, &["lan0", long]);
        let error = forwarder.attach(&port("lan0@lan1")).unwrap_err();
        assert!(matches!(error, ForwarderError::NotAName { .. }), "{error}");
        says(&error, &["lan0@lan1", "give lan0"]);
        let error = forwarder.attach(&AttachConfig::new(4711)).unwrap_err();
        says(&error, &["#4711", "`ip link`"]);
    });
}

#[test]
fn an_interface_that_comes_back_under_its_name_is_attached_again() {
    pinned_story("deleting and adding an interface", |namespace, pins| {
        for pinned in [false, true] {
            let mut forwarder = forwarder();
            if pinned {
                forwarder.attach_pinned(pins, &[port("lan0")]).unwrap();
            } else {
                forwarder.attach(&port("lan0")).unwrap();
            }
            let before = namespace.ifindex("lan0").unwrap();
            assert_eq!(problem(&forwarder), None);
            namespace.ip("link del lan0").unwrap();
            let gone = PortProblem::Gone { interface: "lan0".to_owned() };
            assert_eq!(problem(&forwarder), Some(gone.clone()));
            let tried = forwarder.reattach().unwrap().remove(0);
            assert!(matches!(tried.now, Err(ForwarderError::NoSuchInterface { .. })));
            assert_eq!(problem(&forwarder), Some(gone));

            namespace.ip("link add lan0 type veth peer name lan1").unwrap();
            let tried = forwarder.reattach().unwrap().remove(0);
            assert_eq!((tried.interface.as_str(), tried.before), ("lan0", before));
            let now = tried.now.unwrap().ifindex;
            assert_ne!(now, before);
            assert_eq!(problem(&forwarder), None);
            assert!(forwarder.reattach().unwrap().is_empty());
            assert_eq!(running(namespace, "lan0"), Some(forwarder.program_id()));
            if pinned {
                let ports: Vec<_> =
                    fs::read_dir(pins.join("ports")).unwrap().map(|it| it.unwrap().file_name()).collect();
                assert_eq!(ports, [&*now.to_string()]);
            }
        }
    });
}

#[test]
fn an_interface_that_moves_to_another_namespace_does_not_take_the_program_along() {
    story("moving an interface", |namespace| {
        let elsewhere = Namespace::new("elsewhere").unwrap();
        let mut forwarder = forwarder();
        forwarder.attach(&port("lan0")).unwrap();
        namespace.ip(&format!("link set lan0 netns {}", elsewhere.name())).unwrap();
        assert_eq!(running(&elsewhere, "lan0"), Some(forwarder.program_id()), "so far it does");
        // Looking from elsewhere says nothing, and does no harm.
        elsewhere.enter(|| assert!(matches!(problem(&forwarder), Some(PortProblem::Unknown { .. }))));
        assert_eq!(running(&elsewhere, "lan0"), Some(forwarder.program_id()));
        assert_eq!(problem(&forwarder), Some(PortProblem::Gone { interface: "lan0".to_owned() }));
        assert_eq!(running(&elsewhere, "lan0"), None);
        let tried = forwarder.reattach().unwrap().remove(0);
        assert!(matches!(tried.now, Err(ForwarderError::NoSuchInterface { .. })));
    });
}

#[test]
fn offloads_that_are_switched_on_while_it_runs_are_a_problem_until_they_are_off() {
    story("switching offloads on", |namespace| {
        let features = [
            ("lan0", "rx-vlan-hw-parse", "rxvlan off"),
            ("lan0", "rx-vlan-stag-hw-parse", "rx-vlan-stag-hw-parse off"),
            ("lan1", "tx-vlan-hw-insert", "txvlan off"),
            ("lan1", "tx-vlan-stag-hw-insert", "tx-vlan-stag-hw-insert off"),
            ("lan1", "tx-checksum-ip-generic", "tx off"),
        ];
        for (device, feature, _) in features {
            namespace.set_feature(device, feature, false).unwrap();
        }
        let mut forwarder = forwarder();
        forwarder.attach(&port("lan0")).unwrap();
        assert_eq!(problem(&forwarder), None);
        for (device, feature, remedy) in features {
            namespace.set_feature(device, feature, true).unwrap();
            let problem = problem(&forwarder).unwrap_or_else(|| panic!("{feature} of {device}")).to_string();
            for word in [device, feature, &format!("ethtool -K {device} {remedy}")] {
                assert!(problem.contains(word), "{problem:?} says nothing of {word:?}");
            }
            namespace.set_feature(device, feature, false).unwrap();
            assert_eq!(self::problem(&forwarder), None);
        }
    });
}

/// Frames that reach a macvlan or bridge were merged and have lost their tags on the way, below generic XDP.
#[test]
fn generic_mode_on_top_of_another_interface_is_refused() {
    story("generic mode above others", |namespace| {
        namespace.ip("link add mv0 link lan0 type macvlan").unwrap();
        namespace.ip("link add br0 type bridge").unwrap();
        let mut forwarder = forwarder();
        for mode in [AttachMode::Generic, AttachMode::Automatic] {
            let error = forwarder.attach(&port("mv0").mode(mode)).unwrap_err();
            let ForwarderError::Unsuitable(PortProblem::OnTopOfAnother { interface, lower }) = &error else {
                panic!("{error}")
            };
            assert_eq!((interface.as_str(), lower.as_deref()), ("mv0", Some("lan0")));
            says(&error, &["mv0", "lan0", "merged", "VLAN", "attach to"]);
            assert_eq!(running(namespace, "mv0"), None);
        }

        // A bridge without members is on top of none, until one comes.
        forwarder.attach(&port("br0")).unwrap();
        assert_eq!(problem(&forwarder), None);
        namespace.ip("link set lan1 master br0").unwrap();
        let lower = Some("lan1".to_owned());
        assert_eq!(
            problem(&forwarder),
            Some(PortProblem::OnTopOfAnother { interface: "br0".to_owned(), lower })
        );
        namespace.ip("link set lan1 nomaster").unwrap();
        assert_eq!(problem(&forwarder), None);
    });
}

/// Why it is refused: the table knows the macvlan's untagged frames only, and the kernel drops those of a VLAN that it has no
/// device for.
#[test]
fn generic_xdp_on_a_macvlan_takes_a_frame_of_a_vlan_for_an_untagged_one() {
    pinned_story("a frame of a VLAN at a macvlan", |namespace, pins| {
        namespace.ip("link add mv0 link lan0 address 02:00:00:00:00:01 type macvlan").unwrap();
        namespace.ip("link set mv0 up").unwrap();
        let (mut forwarder, table) = hairpin_on("mv0", 81, 0);
        forwarder.attach_pinned(pins, &[]).unwrap();
        namespace
            .ip(&format!("link set dev mv0 xdpgeneric pinned {}", pins.join("owner").display()))
            .unwrap();
        let mut wire = lab::wire("lan1").unwrap();
        let frame = Frame::v4("10.1.0.5", "10.2.0.9").tags(&[Tag::vlan(10)]).build();
        wire.write_all(&frame).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while table.traffic(Slot(0)).packets != 1 {
            assert!(Instant::now() < deadline, "{:?}", table.passes());
            yield_now();
        }
    });
}

#[test]
fn a_program_that_nothing_holds_is_said_to_be_attached_for_good() {
    pinned_story("a program attached by `ip link`", |namespace, pins| {
        let mut other = forwarder();
        other.attach_pinned(pins, &[]).unwrap();
        let owner = pins.join("owner");
        for (mode, remedy) in [("xdp", "xdp off"), ("xdpgeneric", "xdpgeneric off")] {
            namespace.ip(&format!("link set dev lan0 {mode} pinned {}", owner.display())).unwrap();
            let error = forwarder().attach(&port("lan0")).unwrap_err();
            assert!(
                matches!(error, ForwarderError::AlreadyAttached { held: HeldBy::Nothing, .. }),
                "{error}"
            );
            let command = format!("link set dev lan0 {remedy}");
            says(&error, &[&other.program_id().to_string(), &format!("`ip {command}`")]);
            // What it says helps.
            namespace.ip(&command).unwrap();
            assert_eq!(running(namespace, "lan0"), None);
        }
    });
}

#[test]
fn a_directory_with_a_dot_is_refused_by_what_is_wrong_with_it() {
    pinned_story("a dot in a name", |_, pins| {
        let directory = pins.join("gateway.example/ports");
        let error = forwarder().attach_pinned(&directory, &[port("lan0")]).unwrap_err();
        assert!(matches!(error, ForwarderError::DotInName { .. }), "{error}");
        says(&error, &[directory.to_str().unwrap(), "no dots"]);
    });
}

#[test]
fn a_table_without_room_is_refused_by_the_field_that_says_so() {
    if !lab::require_root("a table of no size") {
        return;
    }
    let error = XdpForwarder::load(&TableConfig { slots: 0, ..config() }).unwrap_err();
    assert!(matches!(error, ForwarderError::TableSize { field: "slots", value: 0, .. }), "{error}");
}

/// Set for the copy of this program that has only the capabilities that the documentation asks for.
const CONFINED: &str = "FASTSWAN_TEST_CONFINED";

#[test]
fn a_process_with_the_documented_capabilities_only_loads_and_attaches() {
    if std::env::var_os(CONFINED).is_some() {
        let (mut forwarder, mut table) = XdpForwarder::load(config()).unwrap();
        forwarder.attach(&port("lan0")).unwrap();
        table.renew_lease(Instant::now() + Duration::from_secs(1));
        return;
    }
    story("few capabilities", |_| {
        let name = "ports::a_process_with_the_documented_capabilities_only_loads_and_attaches";
        let copy = Command::new("setpriv")
            .args(["--bounding-set=-all,+bpf,+net_admin,+perfmon", "--inh-caps=-all"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CONFINED, "1")
            .output()
            .unwrap();
        let [told, errors] = [copy.stdout, copy.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(told.contains("1 passed"), "{told}{errors}");
    });
}

/// Set for the copies of this program that lack a capability.
const LACKING: &str = "FASTSWAN_TEST_LACKING";

#[test]
fn a_process_that_lacks_one_capability_is_told_which() {
    if let Some(lacking) = std::env::var_os(LACKING) {
        let lacking = lacking.into_string().unwrap();
        let error = XdpForwarder::load(config()).unwrap_err();
        let ForwarderError::NotPermitted { lacks, .. } = &error else { panic!("{error}") };
        assert_eq!(lacks[..], [&*lacking]);
        says(&error, &[&format!("lacks {lacking}"), "run it with"]);
        return;
    }
    if !lab::require_root("lacking a capability") {
        return;
    }
    let name = "ports::a_process_that_lacks_one_capability_is_told_which";
    // CAP_SYS_ADMIN would stand for the other two.
    for (lacking, set) in [
        ("CAP_NET_ADMIN", "-sys_admin,-net_admin"),
        ("CAP_PERFMON", "-sys_admin,-perfmon"),
        ("CAP_BPF", "-sys_admin,-bpf"),
    ] {
        let copy = Command::new("setpriv")
            .arg(format!("--bounding-set={set}"))
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(LACKING, lacking)
            .output()
            .unwrap();
        let [told, errors] = [copy.stdout, copy.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(told.contains("1 passed"), "{lacking}: {told}{errors}");
    }
}
