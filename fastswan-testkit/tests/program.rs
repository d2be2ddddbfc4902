//! The XDP program, frame by frame: what it forwards and how, and what it leaves to the kernel untouched.

use std::{collections::BTreeSet, time::Duration};

use fastswan::{
    OffloadTable as _, PassReason,
    forwarder::RunAction,
    policy::{MacAddr, PortMatch},
    table::{
        Cell, Exception, Fact, Forwarding, Forwards, Port, ReversePath, Side, Slot, TableConfig, TableUpdate,
        Verdict,
    },
};
use fastswan_testkit::{
    frames::{Frame, Tag},
    lab::{self, End, Namespace},
    prog_run::{Outcome, ProgRun},
};

const SENDER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
const PORT: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const PEER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xbb]);
/// The loopback device, which every namespace has: frames claim to come in there.
const INGRESS: u32 = 1;
const VLAN: u16 = 5;

/// Slots of the policies below.
const TRANSMIT: Slot = Slot(0);
const REDIRECT: Slot = Slot(1);
const NO_DEVICE: Slot = Slot(2);
const FREE: Slot = Slot(3);

fn config() -> TableConfig {
    TableConfig { cells: 1024, slots: 16 }
}

fn cell(source: &str, destination: &str) -> Cell {
    Cell { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

fn fast(slot: Slot) -> Verdict {
    Verdict::Fast { slot, probe_destination: false, probe_source: false }
}

fn port() -> Port {
    Port {
        ifindex: INGRESS,
        vlan: 0,
        receiver: INGRESS,
        address: PORT,
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    }
}

/// A site-to-site tunnel of each family out of the ingress port, one out of another device, and one of each
/// thing that keeps packets in the kernel.
fn with_policies(egress: u32) -> ProgRun {
    let mut program = ProgRun::new(&config()).unwrap();
    let forwarding = |ifindex| Forwarding { ifindex, max_length: 1400, rewrite: Some((OWN, PEER)) };
    let probing = Verdict::Fast { slot: TRANSMIT, probe_destination: true, probe_source: true };
    let mut cells = vec![
        (cell("10.1.0.0/16", "10.2.0.0/16"), fast(TRANSMIT)),
        (cell("2001:db8:1::/48", "2001:db8:2::/48"), fast(TRANSMIT)),
        (cell("10.1.0.0/16", "10.3.0.0/16"), fast(REDIRECT)),
        (cell("10.1.0.0/16", "10.4.0.0/16"), fast(NO_DEVICE)),
        (cell("10.1.0.0/16", "10.5.0.0/16"), fast(FREE)),
        (cell("10.0.0.0/8", "10.6.0.0/16"), probing),
    ];
    for (third, reason) in CELL_REASONS.iter().enumerate() {
        cells.push((cell("10.1.0.0/16", &format!("10.7.{third}.0/24")), Verdict::Pass(*reason)));
    }
    program
        .table
        .apply(&TableUpdate {
            cells: cells.into_iter().map(|(cell, verdict)| (cell, Some(verdict))).collect(),
            facts: [
                (Side::Destination, "10.6.0.0/16", Fact::Via(INGRESS)),
                (Side::Destination, "10.6.9.0/24", Fact::Denied),
                (Side::Destination, "10.6.8.0/24", Fact::Via(egress)),
                (Side::Source, "10.1.0.0/16", Fact::Via(INGRESS)),
                (Side::Source, "10.1.9.0/24", Fact::Denied),
            ]
            .map(|(side, prefix, fact)| ((side, prefix.parse().unwrap()), Some(fact)))
            .to_vec(),
            forwardings: vec![
                (TRANSMIT, Some(Forwarding { rewrite: None, ..forwarding(INGRESS) })),
                (REDIRECT, Some(forwarding(egress))),
                (NO_DEVICE, Some(forwarding(egress))),
            ],
            exceptions: Some(vec![
                Exception {
                    cell: cell("0.0.0.0/0", "0.0.0.0/0"),
                    protocol: 17,
                    source_port: PortMatch::default(),
                    destination_port: PortMatch::exactly(4500),
                },
                Exception {
                    cell: cell("10.1.0.0/16", "10.2.1.0/24"),
                    protocol: 1,
                    source_port: PortMatch::exactly(8),
                    destination_port: PortMatch::default(),
                },
            ]),
        })
        .unwrap();
    program.table.set_port(&port()).unwrap();
    let vlan = Port { vlan: VLAN, forwards: Forwards { v4: true, v6: false }, ..port() };
    program.table.set_port(&vlan).unwrap();
    program
}

/// The reasons that the compiler gives whole cells.
const CELL_REASONS: [PassReason; 9] = [
    PassReason::NotOffloaded,
    PassReason::Shadowed,
    PassReason::ForwardOrSubPolicy,
    PassReason::Ineligible,
    PassReason::NoSa,
    PassReason::DefaultBlock,
    PassReason::NoPath,
    PassReason::Capacity,
    PassReason::NoPolicy,
];

fn v4() -> Frame {
    Frame::v4("10.1.0.5", "10.2.0.9").macs(SENDER, PORT).udp(1000, 2000).payload(100)
}

fn v6() -> Frame {
    Frame::v6("2001:db8:1::5", "2001:db8:2::9").macs(SENDER, PORT).udp(1000, 2000).payload(100)
}

/// Runs a story in a namespace of its own that has a second device beside loopback.
fn with_program(story: impl FnOnce(&mut ProgRun, &Namespace) + Send) {
    if !lab::require_root("the XDP program") {
        return;
    }
    let namespace = Namespace::new("program").unwrap();
    let end = |device, mac| End { namespace: &namespace, device, mac, addresses: &[] };
    lab::join(end("out0", OWN), end("out1", PEER), 1500).unwrap();
    let egress = namespace.ifindex("out0").unwrap();
    namespace.enter(|| story(&mut with_policies(egress), &namespace));
}

fn run(program: &ProgRun, frame: Frame) -> Outcome {
    program.run(&frame.build(), INGRESS).unwrap()
}

/// Asserts that a frame goes to the kernel for a reason, as it came.
fn passes(program: &ProgRun, frame: Frame, reason: PassReason) {
    let frame = frame.build();
    let outcome = program.run(&frame, INGRESS).unwrap();
    assert_eq!((outcome.action, outcome.reason), (RunAction::Pass, Some(reason)));
    assert_eq!(outcome.frame, frame, "{reason:?} left the frame as it was");
}

#[test]
fn a_packet_of_an_offloaded_policy_leaves_with_its_ttl_down_and_its_checksum_right() {
    with_program(|program, _| {
        let outcome = run(program, v4().ttl(2));
        assert_eq!(outcome.action, RunAction::Transmit);
        assert_eq!(outcome.frame, v4().ttl(1).build());
        let outcome = run(program, v6().ttl(64));
        assert_eq!(outcome.action, RunAction::Transmit);
        assert_eq!(outcome.frame, v6().ttl(63).build());
        for ttl in 2..=255 {
            assert_eq!(run(program, v4().ttl(ttl)).frame, v4().ttl(ttl - 1).build());
        }
    });
}

#[test]
fn the_checksum_is_the_one_that_the_kernel_writes_whatever_it_was() {
    with_program(|program, _| {
        let mut written = BTreeSet::new();
        for (third, fourth) in
            (0..=u8::MAX).flat_map(|third| (0..=u8::MAX).map(move |fourth| (third, fourth)))
        {
            // The last two bytes of the destination take the checksum through all its values.
            let to =
                |ttl| Frame::v4("10.1.0.5", &format!("10.2.{third}.{fourth}")).macs(SENDER, PORT).ttl(ttl);
            let frame = run(program, to(64)).frame;
            assert_eq!(frame, to(63).build());
            written.insert([frame[24], frame[25]]);
        }
        assert!(written.contains(&[0, 0]) && !written.contains(&[0xff, 0xff]), "{}", written.len());
    });
}

#[test]
fn every_protocol_and_every_length_up_to_the_limit_is_forwarded() {
    with_program(|program, _| {
        let to = || Frame::v4("10.1.0.5", "10.2.0.9").macs(SENDER, PORT);
        for frame in [to().tcp(1, 2), to().icmp(0, 0), to().protocol(47), to().protocol(50)] {
            assert_eq!(run(program, frame.payload(8)).action, RunAction::Transmit);
        }
        assert_eq!(run(program, v4().payload(1400 - 28)).action, RunAction::Transmit);
        passes(program, v4().payload(1401 - 28), PassReason::TooLong);
        assert_eq!(run(program, v6().payload(1400 - 48)).action, RunAction::Transmit);
        passes(program, v6().payload(1401 - 48), PassReason::TooLong);
    });
}

#[test]
fn a_packet_for_another_device_is_redirected_with_the_next_hops_addresses() {
    with_program(|program, _| {
        let to = |source, destination| {
            Frame::v4("10.1.0.5", "10.3.0.9").macs(source, destination).udp(1000, 2000).payload(64)
        };
        let outcome = run(program, to(SENDER, PORT).ttl(64));
        assert_eq!(outcome.action, RunAction::Redirect);
        assert_eq!(outcome.frame, to(OWN, PEER).ttl(63).build());
    });
}

#[test]
fn a_device_that_takes_no_redirected_frames_gets_none() {
    with_program(|_, namespace| {
        // Its peer does not poll.
        namespace.ip("link add deaf0 type veth peer name deaf1").unwrap();
        namespace.ip("link set deaf0 up").unwrap();
        let program = with_policies(namespace.ifindex("deaf0").unwrap());
        let to = |destination| Frame::v4("10.1.0.5", destination).macs(SENDER, PORT);
        passes(&program, to("10.3.0.9"), PassReason::EgressUnavailable);
        assert_eq!(run(&program, to("10.2.0.9")).action, RunAction::Transmit);
    });
}

#[test]
fn ethernet_padding_is_never_sent() {
    with_program(|program, _| {
        for padding in [1, 7, 18, 46] {
            assert_eq!(
                run(program, v4().payload(1).ttl(64).padding(padding)).frame,
                v4().payload(1).ttl(63).build()
            );
            assert_eq!(
                run(program, v6().payload(1).ttl(64).padding(padding)).frame,
                v6().payload(1).ttl(63).build()
            );
        }
    });
}

#[test]
fn vlan_tags_are_taken_off() {
    with_program(|program, _| {
        let plain = v4().ttl(63).build();
        for tags in [vec![Tag::vlan(VLAN)], vec![Tag::vlan(0)], vec![Tag::vlan(0), Tag::vlan(VLAN)]] {
            let outcome = run(program, v4().ttl(64).tags(&tags).padding(9));
            assert_eq!((outcome.action, outcome.frame), (RunAction::Transmit, plain.clone()), "{tags:?}");
        }
        for tags in [
            vec![Tag::vlan(6)],
            vec![Tag::service(VLAN)],
            vec![Tag::service(VLAN), Tag::vlan(VLAN)],
            vec![Tag::vlan(VLAN), Tag::vlan(VLAN)],
        ] {
            passes(program, v4().tags(&tags), PassReason::UnknownPort);
        }
        passes(program, v4().tags(&[Tag::vlan(0), Tag::vlan(0), Tag::vlan(VLAN)]), PassReason::NotIp);
    });
}

#[test]
fn packets_and_bytes_are_counted_for_their_policy_only() {
    with_program(|program, _| {
        for _ in 0..3 {
            run(program, v4().payload(72).padding(20));
        }
        run(program, v6().payload(52));
        let traffic = program.traffic(TRANSMIT);
        assert_eq!((traffic.packets, traffic.bytes), (4, 4 * 100));
        assert_eq!(program.traffic(REDIRECT).packets, 0);
    });
}

#[test]
fn a_slot_that_gets_another_policy_counts_from_zero() {
    with_program(|program, _| {
        run(program, v4());
        let forwarding = Forwarding { ifindex: INGRESS, max_length: 1400, rewrite: None };
        for (forwarding, packets) in [(None, 1), (Some(forwarding), 0)] {
            let update = TableUpdate { forwardings: vec![(TRANSMIT, forwarding)], ..TableUpdate::default() };
            program.table.apply(&update).unwrap();
            assert_eq!(program.traffic(TRANSMIT).packets, packets);
        }
    });
}

#[test]
fn exceptions_hit_what_their_policy_matches_and_nothing_else() {
    with_program(|program, _| {
        let to = |destination| Frame::v4("10.1.0.5", destination).macs(SENDER, PORT);
        passes(program, to("10.2.0.9").udp(1, 4500), PassReason::Exception);
        passes(program, to("10.2.1.9").icmp(8, 0), PassReason::Exception);
        for frame in [
            to("10.2.0.9").udp(4500, 1),
            to("10.2.0.9").tcp(1, 4500),
            to("10.2.0.9").icmp(8, 0),
            to("10.2.1.9").icmp(0, 0),
            Frame::v6("2001:db8:1::5", "2001:db8:2::9").macs(SENDER, PORT).udp(1, 4500),
        ] {
            assert_eq!(run(program, frame).action, RunAction::Transmit);
        }
        // Ports that cannot be read may be any.
        passes(program, to("10.2.0.9").protocol(17).payload(3).padding(9), PassReason::Exception);
        passes(program, to("10.2.0.9").protocol(17).payload(3), PassReason::Truncated);
    });
}

#[test]
fn every_reason_is_reached_and_leaves_the_frame_untouched() {
    with_program(|program, namespace| {
        let mut reached = BTreeSet::new();
        let mut check = |program: &ProgRun, frame: Frame, reason| {
            passes(program, frame, reason);
            reached.insert(reason);
        };
        let v4_to =
            |source: &str, destination: &str| Frame::v4(source, destination).macs(SENDER, PORT).udp(1, 2);
        let v6_to =
            |source: &str, destination: &str| Frame::v6(source, destination).macs(SENDER, PORT).udp(1, 2);

        program.table.set_enabled(false);
        check(program, v4(), PassReason::Disabled);
        program.table.set_enabled(true);
        program.table.renew_lease(Duration::ZERO);
        check(program, v4(), PassReason::LeaseExpired);
        program.table.renew_lease(Duration::from_secs(3600));
        program.set_updating(true).unwrap();
        check(program, v4(), PassReason::Updating);
        program.set_updating(false).unwrap();

        check(program, v4().payload(8000), PassReason::MultiBuffer);
        check(program, v4().truncated(33), PassReason::Truncated);
        check(program, v4().truncated(14), PassReason::Truncated);
        check(program, v6().truncated(53), PassReason::Truncated);
        check(program, v4().tags(&[Tag::vlan(VLAN)]).truncated(17), PassReason::Truncated);
        check(program, v4().ether_type(0x0806), PassReason::NotIp);
        check(program, v4().tags(&[Tag::vlan(6)]), PassReason::UnknownPort);
        check(program, v4().macs(SENDER, PEER), PassReason::OtherDestinationMac);
        check(program, v4().macs(SENDER, MacAddr([0xff; 6])), PassReason::OtherDestinationMac);
        check(program, v6().tags(&[Tag::vlan(VLAN)]), PassReason::NotForwarding);
        check(program, v4().ether_type(0x86dd), PassReason::BadHeader);
        check(program, v6().ether_type(0x0800), PassReason::BadHeader);
        check(program, v4().ip_options(&[1, 1, 1, 1]), PassReason::Options);
        check(program, v6().hop_by_hop(), PassReason::ExtensionHeader);
        check(program, v6().destination_options(), PassReason::ExtensionHeader);
        check(program, v6().protocol(59), PassReason::ExtensionHeader);
        check(program, v4().fragment(0, true), PassReason::Fragment);
        check(program, v4().fragment(185, false), PassReason::Fragment);
        check(program, v6().fragment(0, true), PassReason::Fragment);
        check(program, v4().total_length(19), PassReason::BadLength);
        check(program, v4().total_length(500), PassReason::BadLength);
        check(program, v6().total_length(40), PassReason::BadLength);
        check(program, v6().total_length(500), PassReason::BadLength);
        check(program, v4().wrong_checksum(), PassReason::BadChecksum);
        for ttl in [0, 1] {
            check(program, v4().ttl(ttl), PassReason::TtlExpired);
            check(program, v6().ttl(ttl), PassReason::TtlExpired);
        }
        for source in ["0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255"] {
            check(program, v4_to(source, "10.2.0.9"), PassReason::MartianSource);
        }
        for source in ["::", "::1", "::ffff:10.1.0.5", "fe80::1", "ff02::1"] {
            check(program, v6_to(source, "2001:db8:2::9"), PassReason::MartianSource);
        }
        for destination in ["0.1.2.3", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255"] {
            check(program, v4_to("10.1.0.5", destination), PassReason::MartianDestination);
        }
        for destination in ["::1", "::ffff:10.2.0.9", "fe80::1", "ff02::1"] {
            check(program, v6_to("2001:db8:1::5", destination), PassReason::MartianDestination);
        }
        check(program, v4_to("10.1.0.5", "10.2.0.9").udp(1, 4500), PassReason::Exception);
        check(program, v4_to("10.1.0.5", "192.0.2.1"), PassReason::NoPolicy);
        check(program, v4_to("10.8.0.5", "10.2.0.9"), PassReason::NoPolicy);
        for (third, reason) in CELL_REASONS.iter().enumerate() {
            check(program, v4_to("10.1.0.5", &format!("10.7.{third}.1")), *reason);
        }
        check(program, v4_to("10.1.0.5", "10.6.9.1"), PassReason::DeniedDestination);
        check(program, v4_to("10.1.0.5", "10.6.8.1"), PassReason::RouteElsewhere);
        check(program, v4_to("10.1.9.5", "10.6.0.1"), PassReason::DeniedSource);
        for reverse_path in [ReversePath::Strict, ReversePath::Loose] {
            program.table.set_port(&Port { reverse_path, ..port() }).unwrap();
            assert_eq!(run(program, v4()).action, RunAction::Transmit);
            check(program, v4_to("10.8.0.5", "10.6.0.1"), PassReason::ReversePath);
        }
        program.table.set_port(&Port { reverse_path: ReversePath::Strict, receiver: 9, ..port() }).unwrap();
        check(program, v4(), PassReason::ReversePath);
        program.table.set_port(&port()).unwrap();
        check(program, v4().payload(1400), PassReason::TooLong);
        check(program, v4_to("10.1.0.5", "10.5.0.1"), PassReason::EgressUnavailable);
        // The kernel takes a device that goes away out of the device map.
        namespace.ip("link del out0").unwrap();
        check(program, v4_to("10.1.0.5", "10.4.0.1"), PassReason::EgressUnavailable);

        let all: BTreeSet<PassReason> = PassReason::ALL.iter().copied().collect();
        assert_eq!(reached, all);
    });
}
