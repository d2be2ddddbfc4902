//! Attaching and detaching: what each port is refused for, and that nothing stays behind.

use std::process::Command;

use fastswan::{
    XdpForwarder,
    forwarder::{AttachConfig, AttachMode, ForwarderError},
    table::TableConfig,
};
use fastswan_testkit::lab::{self, Namespace};

/// Set for the copy of this program that gives up its privileges.
const UNPRIVILEGED: &str = "FASTSWAN_TEST_UNPRIVILEGED";

fn forwarder() -> XdpForwarder {
    XdpForwarder::load(&TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 64, slots: 4 }).unwrap().0
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
            says(&error, &[name, "namespace", "`ip link`"]);
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
            let owner = first.program_id().unwrap();
            assert_eq!(running(namespace, "lan0"), Some(owner));

            let mut second = forwarder();
            for mode in [AttachMode::Automatic, AttachMode::Native, AttachMode::Generic] {
                let error = second.attach(&port("lan0").mode(mode)).unwrap_err();
                let ForwarderError::AlreadyAttached { interface, program } = &error else {
                    panic!("{error}")
                };
                assert_eq!((interface.as_str(), *program), ("lan0", Some(owner)));
                says(&error, &["lan0", &owner.to_string(), "`bpftool link`", "stop it"]);
            }
            drop(second);
            assert_eq!(running(namespace, "lan0"), Some(owner));
            assert!(matches!(first.attach(&port("lan0")), Err(ForwarderError::AlreadyAttached { .. })));
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
        for (name, kind) in [("lan0", "veth"), ("tap0", "tun"), ("br0", "bridge"), ("lo", "")] {
            let error = forwarder.attach(&AttachConfig::new(name)).unwrap_err();
            assert!(matches!(&error, ForwarderError::IncompleteFrames { .. }), "{error}");
            says(&error, &[name, kind, "ethtool -K", "complete_frames(true)"]);
            assert_eq!(running(namespace, name), None);
            forwarder.attach(&port(name)).unwrap();
            assert_eq!(running(namespace, name), Some(forwarder.program_id().unwrap()));
        }
    });
}

#[test]
fn a_driver_without_native_xdp_is_refused_or_replaced_by_the_generic_way() {
    story("a driver without native XDP", |namespace| {
        namespace.ip("link add ifb0 type ifb").unwrap();
        let mut forwarder = forwarder();
        namespace.ip("link add br0 type bridge").unwrap();
        for name in ["ifb0", "br0"] {
            let error = forwarder.attach(&port(name).mode(AttachMode::Native)).unwrap_err();
            assert!(matches!(&error, ForwarderError::NoNativeXdp { .. }), "{error}");
            says(&error, &[name, "native", "AttachMode::Generic"]);
            assert_eq!(running(namespace, name), None);

            let attachment = forwarder.attach(&port(name)).unwrap();
            assert_eq!(attachment.mode, AttachMode::Generic);
            assert_eq!(attachment.fallback, Some(error.to_string()));
            assert_eq!(running(namespace, name), Some(forwarder.program_id().unwrap()));
        }
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
        namespace.ip("link add ifb0 type ifb").unwrap();
        for name in ["lan0", "lan1", "ifb0"] {
            forwarder.attach(&port(name)).unwrap();
        }
        let attached: Vec<String> = forwarder.attachments().map(|at| at.interface.clone()).collect();
        assert_eq!(attached, ["lan0", "lan1", "ifb0"]);
        let program = Some(forwarder.program_id().unwrap());
        let running = || ["lan0", "lan1", "ifb0"].map(|name| running(namespace, name));
        assert_eq!(running(), [program; 3]);
        drop(forwarder);
        assert_eq!(running(), [None; 3]);
    });
}

#[test]
fn an_interface_that_was_detached_can_be_attached_again() {
    story("detaching", |namespace| {
        let mut forwarder = forwarder();
        let program = Some(forwarder.program_id().unwrap());
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
        assert_eq!(running(namespace, "lan0"), Some(forwarder.program_id().unwrap()));
        forwarder.detach("lan0").unwrap();
        assert_eq!(running(namespace, "lan0"), None);
    });
}
