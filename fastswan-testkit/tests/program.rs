//! The XDP program, frame by frame: what it forwards and how, and what it leaves to the kernel untouched.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use fastswan::{
    OffloadTable as _, PassReason, XdpForwarder,
    forwarder::{LoadConfig, RunAction},
    policy::{MacAddr, PortMatch},
    table::{
        Cell, Change, Contents, Devices as _, Exception, Fact, Forwarding, Forwards, Port, Ports as _,
        Probes, ReadBack as _, ReversePath, Side, Slot, Standing, TableConfig, Verdict,
    },
};
use fastswan_ebpf::{Check, port_position};
use fastswan_testkit::{
    cpu::{self, run_on},
    datapath::without,
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
const NO_ASSOCIATION: Slot = Slot(4);

fn config() -> TableConfig {
    TableConfig { cells_v4: 1024, cells_v6: 1024, exceptions: 64, slots: 16 }
}

fn cell(source: &str, destination: &str) -> Cell {
    Cell { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

fn fast(slot: Slot) -> Verdict {
    Verdict::Fast { slot, probes: Probes::default() }
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
    fill(ProgRun::new(&config()).unwrap(), egress)
}

fn fill(mut program: ProgRun, egress: u32) -> ProgRun {
    let forwarding = |ifindex| Forwarding { ifindex, max_length: 1400, rewrite: Some((OWN, PEER)) };
    let probes = Probes { destination: true, source: true, guards: false };
    let probing = Verdict::Fast { slot: TRANSMIT, probes };
    let guarded = Verdict::Fast { slot: TRANSMIT, probes: Probes { guards: true, ..Probes::default() } };
    let mut cells = vec![
        (cell("10.1.0.0/16", "10.2.0.0/16"), fast(TRANSMIT)),
        (cell("2001:db8:1::/48", "2001:db8:2::/48"), fast(TRANSMIT)),
        (cell("10.1.0.0/16", "10.3.0.0/16"), fast(REDIRECT)),
        (cell("10.1.0.0/16", "10.4.0.0/16"), fast(NO_DEVICE)),
        (cell("10.1.0.0/16", "10.5.0.0/16"), fast(FREE)),
        (cell("10.0.0.0/8", "10.6.0.0/16"), probing),
        (cell("10.0.0.0/8", "10.8.0.0/16"), guarded),
        (cell("2001:db8::/32", "2001:db8:8::/48"), guarded),
        (cell("10.1.0.0/16", "10.9.0.0/16"), fast(NO_ASSOCIATION)),
    ];
    for (third, reason) in CELL_REASONS.iter().enumerate() {
        cells.push((cell("10.1.0.0/16", &format!("10.7.{third}.0/24")), Verdict::Pass(*reason)));
    }
    program
        .table
        .apply(
            &Contents {
                cells: cells.into_iter().collect(),
                facts: [
                    (Side::Destination, "10.6.0.0/16", Fact::Via(INGRESS)),
                    (Side::Destination, "10.6.9.0/24", Fact::Denied),
                    (Side::Destination, "10.6.8.0/24", Fact::Via(egress)),
                    (Side::Source, "10.1.0.0/16", Fact::Via(INGRESS)),
                    (Side::Source, "10.1.9.0/24", Fact::Denied),
                ]
                .map(|(side, prefix, fact)| ((side, prefix.parse().unwrap()), fact))
                .into(),
                guards: ["10.1.7.0/24", "2001:db8:1:7::/64"].map(|guard| guard.parse().unwrap()).into(),
                slots: [
                    (TRANSMIT, Ok(Forwarding { rewrite: None, ..forwarding(INGRESS) })),
                    (REDIRECT, Ok(forwarding(egress))),
                    (NO_DEVICE, Ok(forwarding(egress))),
                    (NO_ASSOCIATION, Err(PassReason::NoSa)),
                ]
                .into(),
                exceptions: [
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
                    Exception {
                        cell: cell("10.1.0.0/16", "10.2.2.0/24"),
                        protocol: 0,
                        source_port: PortMatch { port: 0x1234, mask: 0xff00 },
                        destination_port: PortMatch::default(),
                    },
                    Exception {
                        cell: cell("2001:db8:1::/48", "2001:db8:2::8/128"),
                        protocol: 17,
                        source_port: PortMatch::default(),
                        destination_port: PortMatch::exactly(4500),
                    },
                ]
                .into(),
                ..Contents::default()
            }
            .replacing(&Contents::default()),
        )
        .unwrap();
    program.table.set_port(&port()).unwrap();
    let vlan = Port { vlan: VLAN, forwards: Forwards { v4: true, v6: false }, ..port() };
    program.table.set_port(&vlan).unwrap();
    program
}

/// The reasons that the compiler gives whole cells.
const CELL_REASONS: [PassReason; 10] = [
    PassReason::NotOffloaded,
    PassReason::Shadowed,
    PassReason::ForwardOrSubPolicy,
    PassReason::Ineligible,
    PassReason::NoSa,
    PassReason::DefaultBlock,
    PassReason::NoPath,
    PassReason::Capacity,
    PassReason::NoPolicy,
    PassReason::Hook,
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
fn a_device_is_asked_again_when_the_table_is_told_to() {
    with_program(|program, namespace| {
        let egress = namespace.ifindex("out0").unwrap();
        let to = || Frame::v4("10.1.0.5", "10.3.0.9").macs(SENDER, PORT);
        let poll = |on| lab::set_gro("out1", on).unwrap();
        assert!(program.table.takes_redirects(egress) && !program.table.takes_redirects(999_999));
        poll(false);
        program.table.refresh_devices();
        assert!(!program.table.takes_redirects(egress));
        passes(program, to(), PassReason::EgressUnavailable);
        poll(true);
        program.table.refresh_devices();
        assert!(program.table.takes_redirects(egress));
        assert_eq!(run(program, to()).action, RunAction::Redirect);

        // Off before the first slot comes, and on later.
        poll(false);
        let mut program = with_policies(egress);
        passes(&program, to(), PassReason::EgressUnavailable);
        poll(true);
        program.table.refresh_devices();
        assert_eq!(run(&program, to()).action, RunAction::Redirect);
    });
}

#[test]
fn a_device_that_comes_and_goes_all_the_time_fails_nothing() {
    with_program(|program, namespace| {
        let (index, done) = (77, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let flapping = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let end = |device, mac| End { namespace, device, mac, addresses: &[] };
                    lab::join_with_index(Some(index), end("out8", OWN), end("out9", PEER), 1500).unwrap();
                    namespace.ip("link del out8").unwrap();
                }
            });
            let until = Instant::now() + Duration::from_secs(3);
            let forwarding = Forwarding { ifindex: index, max_length: 1400, rewrite: None };
            while Instant::now() < until && !flapping.is_finished() {
                for standing in [Ok(forwarding), Err(PassReason::NoPath)] {
                    program.table.apply(&Change::Slot(REDIRECT, Some(standing)).into()).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        let forwarding = Forwarding { ifindex: index, max_length: 1400, rewrite: None };
        program.table.apply(&Change::Slot(REDIRECT, Some(Ok(forwarding))).into()).unwrap();
        let to = Frame::v4("10.1.0.5", "10.3.0.9").macs(SENDER, PORT);
        passes(program, to, PassReason::EgressUnavailable);
        assert_eq!(run(program, v4()).action, RunAction::Transmit, "all else goes on");
    });
}

#[test]
fn as_long_as_removals_are_not_acknowledged_only_what_would_be_fast_is_counted_for_them() {
    with_program(|program, _| {
        // The guard has counted none.
        program.table.acknowledge(1);
        passes(program, v4(), PassReason::Removal);
        passes(program, v6(), PassReason::Removal);
        passes(program, v4().ttl(1), PassReason::TtlExpired);
        program.table.acknowledge(0);
        assert_eq!(run(program, v4()).action, RunAction::Transmit);
        assert_eq!(run(program, v6()).action, RunAction::Transmit);
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
            vec![Tag::service(0)],
            vec![Tag::service(VLAN), Tag::vlan(VLAN)],
            vec![Tag::service(0), Tag::vlan(VLAN)],
            vec![Tag::vlan(0), Tag::service(VLAN)],
            vec![Tag::vlan(VLAN), Tag::vlan(VLAN)],
        ] {
            passes(program, v4().tags(&tags), PassReason::UnknownPort);
        }
        passes(program, v4().tags(&[Tag::vlan(0), Tag::vlan(0), Tag::vlan(VLAN)]), PassReason::NotIp);
    });
}

#[test]
fn a_port_is_found_among_thousands() {
    with_program(|program, _| {
        for vlan in 100..=1200 {
            program.table.set_port(&Port { vlan, ..port() }).unwrap();
        }
        for vlan in [VLAN, 100, 777, 1200] {
            assert_eq!(run(program, v4().tags(&[Tag::vlan(vlan)])).action, RunAction::Transmit, "{vlan}");
        }
        program.table.remove_port(INGRESS, 777);
        passes(program, v4().tags(&[Tag::vlan(777)]), PassReason::UnknownPort);
        passes(program, v4().tags(&[Tag::vlan(1201)]), PassReason::UnknownPort);
    });
}

/// With `proxy_ndp` the kernel takes some of them for itself, and answers them.
#[test]
fn ports_that_would_lie_at_the_same_place_are_told_apart() {
    with_program(|program, _| {
        let tagged = Port { vlan: 100, ..port() };
        let position = port_position(tagged.ifindex, tagged.vlan);
        // Other interfaces, whose numbers are those of the place where the first looks.
        let others =
            [position + 4096, position + 2 * 4096].map(|ifindex| Port { ifindex, vlan: 0, ..port() });
        for port in &others {
            program.table.set_port(port).unwrap();
        }
        program.table.set_port(&tagged).unwrap();
        let frame = || v4().tags(&[Tag::vlan(100)]);
        assert_eq!(run(program, frame()).action, RunAction::Transmit);
        program.table.remove_port(others[0].ifindex, 0);
        assert_eq!(run(program, frame()).action, RunAction::Transmit);
        program.table.remove_port(tagged.ifindex, 100);
        passes(program, frame(), PassReason::UnknownPort);
        program.table.set_port(&tagged).unwrap();
        assert_eq!(run(program, frame()).action, RunAction::Transmit);
    });
}

#[test]
fn neighbour_discovery_is_the_kernels() {
    with_program(|program, _| {
        let to = |icmp_type, payload| {
            Frame::v6("2001:db8:1::5", "2001:db8:2::9").macs(SENDER, PORT).icmp(icmp_type, 0).payload(payload)
        };
        for icmp_type in 0..=u8::MAX {
            for payload in [0, 24] {
                if (133..=137).contains(&icmp_type) {
                    passes(program, to(icmp_type, payload), PassReason::NeighbourDiscovery);
                } else {
                    assert_eq!(
                        run(program, to(icmp_type, payload)).action,
                        RunAction::Transmit,
                        "{icmp_type}"
                    );
                }
            }
        }
        // The same numbers mean something else elsewhere.
        let udp = Frame::v6("2001:db8:1::5", "2001:db8:2::9").macs(SENDER, PORT).udp(135 << 8, 136 << 8);
        assert_eq!(run(program, udp).action, RunAction::Transmit);
    });
}

/// Drivers that have a channel for each CPU lose what the others redirect to them.
#[test]
fn what_comes_in_on_a_cpu_without_a_channel_of_the_device_passes() {
    with_program(|program, _| {
        let redirected = || Frame::v4("10.1.0.5", "10.3.0.9").macs(SENDER, PORT).udp(1000, 2000);
        let pin_to = |cpu| run_on(&[cpu]).unwrap();
        let last = std::thread::available_parallelism().unwrap().get() - 1;
        assert!(last > 0, "this takes two processors");
        program.limit_cpus(1).unwrap();
        pin_to(0);
        assert_eq!(run(program, redirected()).action, RunAction::Redirect);
        pin_to(last);
        passes(program, redirected(), PassReason::NoChannel);
        assert_eq!(run(program, v4()).action, RunAction::Transmit, "it leaves where it came in");
        program.limit_cpus(u16::MAX).unwrap();
        assert_eq!(run(program, redirected()).action, RunAction::Redirect);
    });
}

/// What a program for measurements is told to leave out, it leaves out, and the whole program does not.
#[test]
fn a_program_for_measurements_leaves_out_what_it_is_told_to() {
    with_program(|whole, namespace| {
        let egress = namespace.ifindex("out0").unwrap();
        let load = |check| {
            let config = LoadConfig::new(config()).ask_back(0);
            fill(ProgRun::load(without(config, check)).unwrap(), egress)
        };
        let action = |program: &ProgRun, frame: Frame| run(program, frame).action;
        let mut corrupt = v4().build();
        corrupt[14 + 10] ^= 1;
        for (check, frame) in [
            (Check::Address, v4().macs(SENDER, PEER).build()),
            (Check::Checksum, corrupt),
            (Check::Exceptions, v4().udp(1000, 4500).build()),
            (Check::Probes, Frame::v4("10.1.9.9", "10.6.0.1").macs(SENDER, PORT).udp(1000, 2000).build()),
            (Check::Length, v4().payload(1400).build()),
        ] {
            let fate = |program: &ProgRun| program.run(&frame, INGRESS).unwrap().action;
            assert_eq!(fate(whole), RunAction::Pass, "{check:?}");
            assert_eq!(fate(&load(check)), RunAction::Transmit, "{check:?}");
            assert_eq!(fate(&load(Check::Lease)), RunAction::Pass, "without something else than {check:?}");
        }
        let mut switched_off = load(Check::Lease);
        switched_off.table.set_enabled(false);
        assert_eq!(action(&switched_off, v4()), RunAction::Transmit);
        let changing = load(Check::Sequence);
        changing.set_updating(true).unwrap();
        assert_eq!(action(&changing, v4()), RunAction::Transmit);
        let uncounted = load(Check::Counting);
        assert_eq!(action(&uncounted, v4()), RunAction::Transmit);
        assert_eq!(uncounted.traffic(TRANSMIT).packets, 0);
    });
}

/// It may come from half of a change. A program that does not look again for packets that pass counts what it came upon.
#[test]
fn a_reason_that_was_found_while_the_table_changed_is_not_counted() {
    const PACKETS: u32 = 10_000;
    with_program(|whole, namespace| {
        let config = LoadConfig::new(config()).ask_back(0);
        let hasty = ProgRun::load(without(config, Check::Reasons)).unwrap();
        let hasty = fill(hasty, namespace.ifindex("out0").unwrap());
        let cpus = cpu::allowed().unwrap();
        let [here, there, ..] = cpus[..] else { panic!("this takes two processors") };
        run_on(&[here]).unwrap();
        let reasons = |program: &ProgRun, frame: Frame| {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    run_on(&[there]).unwrap();
                    program.change_nothing(&stop).unwrap();
                });
                let frame = frame.build();
                let outcomes: Vec<_> = (0..PACKETS).map(|_| program.run(&frame, INGRESS)).collect();
                stop.store(true, Ordering::Relaxed);
                outcomes.into_iter().filter_map(|outcome| outcome.unwrap().reason).collect::<BTreeSet<_>>()
            })
        };
        let no_policy = || Frame::v4("10.1.0.5", "192.0.2.1").macs(SENDER, PORT).udp(1, 2);
        let mut found = reasons(whole, no_policy());
        assert!(found.remove(&PassReason::Updating), "{found:?}");
        assert!(found.is_subset(&[PassReason::NoPolicy].into()), "{found:?}");
        assert_eq!(reasons(&hasty, no_policy()), [PassReason::NoPolicy].into());
        // What it would forward it looks at again.
        assert_eq!(reasons(&hasty, v4()), [PassReason::Updating].into());
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
        let mut set = |standings: &[Option<Standing>]| {
            let slots = standings.iter().map(|standing| Change::Slot(TRANSMIT, *standing));
            program.table.apply(&slots.collect()).unwrap();
            program.traffic(TRANSMIT).packets
        };
        assert_eq!(set(&[None]), 1);
        assert_eq!(set(&[Some(Ok(forwarding))]), 0);
        run(program, v4());
        let mut set = |standings: &[Option<Standing>]| {
            let slots = standings.iter().map(|standing| Change::Slot(TRANSMIT, *standing));
            program.table.apply(&slots.collect()).unwrap();
            program.traffic(TRANSMIT).packets
        };
        assert_eq!(set(&[Some(Err(PassReason::NoSa))]), 1, "it is still the same policy's");
        assert_eq!(set(&[None, Some(Ok(forwarding))]), 0, "handed over in one update");
        run(program, v4());
        assert_eq!(program.traffic(TRANSMIT).packets, 1);
    });
}

#[test]
fn a_slot_that_passes_for_a_reason_does_so_for_all_of_its_cells() {
    with_program(|program, _| {
        for reason in PassReason::ALL {
            program.table.apply(&Change::Slot(TRANSMIT, Some(Err(*reason))).into()).unwrap();
            assert_eq!(program.table.standing(TRANSMIT), Some(Err(*reason)));
            passes(program, v4(), *reason);
            passes(program, v6(), *reason);
        }
        let forwarding = Forwarding { ifindex: INGRESS, max_length: 1400, rewrite: Some((OWN, PEER)) };
        program.table.apply(&Change::Slot(TRANSMIT, Some(Ok(forwarding))).into()).unwrap();
        assert_eq!(program.table.standing(TRANSMIT), Some(Ok(forwarding)));
        assert_eq!(run(program, v4()).action, RunAction::Transmit);
    });
}

#[test]
fn packets_from_a_guard_pass_where_a_cell_is_guarded_and_nowhere_else() {
    with_program(|program, _| {
        let v4 = |source, destination| Frame::v4(source, destination).macs(SENDER, PORT);
        let v6 = |source, destination| Frame::v6(source, destination).macs(SENDER, PORT).payload(8);
        passes(program, v4("10.1.7.1", "10.8.0.1"), PassReason::Guarded);
        passes(program, v6("2001:db8:1:7::1", "2001:db8:8::1"), PassReason::Guarded);
        for frame in [
            v4("10.1.6.1", "10.8.0.1"),
            v4("10.1.7.1", "10.2.0.9"),
            v6("2001:db8:1:6::1", "2001:db8:8::1"),
            v6("2001:db8:1:7::1", "2001:db8:2::9"),
        ] {
            assert_eq!(run(program, frame).action, RunAction::Transmit);
        }
        program.table.apply(&Change::Guard("10.1.7.0/24".parse().unwrap(), false).into()).unwrap();
        assert_eq!(run(program, v4("10.1.7.1", "10.8.0.1")).action, RunAction::Transmit);
    });
}

#[test]
fn a_device_that_went_away_is_reachable_again_when_its_slots_say_so() {
    with_program(|program, namespace| {
        let to = || Frame::v4("10.1.0.5", "10.3.0.9").macs(SENDER, PORT);
        assert_eq!(run(program, to()).action, RunAction::Redirect);
        let index = namespace.ifindex("out0").unwrap();
        namespace.ip("link del out0").unwrap();
        passes(program, to(), PassReason::EgressUnavailable);
        let end = |device, mac| End { namespace, device, mac, addresses: &[] };
        lab::join_with_index(Some(index), end("out0", OWN), end("out1", PEER), 1500).unwrap();
        let mut set = |standing| {
            let slots = [REDIRECT, NO_DEVICE].map(|slot| Change::Slot(slot, Some(standing)));
            program.table.apply(&slots.into_iter().collect()).unwrap();
        };
        set(Err(PassReason::NoPath));
        set(Ok(Forwarding { ifindex: index, max_length: 1400, rewrite: None }));
        assert_eq!(run(program, to()).action, RunAction::Redirect);
    });
}

#[test]
fn exceptions_hit_what_their_policy_matches_and_nothing_else() {
    with_program(|program, _| {
        let to = |destination| Frame::v4("10.1.0.5", destination).macs(SENDER, PORT);
        let v6_to = |destination| Frame::v6("2001:db8:1::5", destination).macs(SENDER, PORT);
        passes(program, to("10.2.0.9").udp(1, 4500), PassReason::Exception);
        passes(program, to("10.2.1.9").icmp(8, 0), PassReason::Exception);
        for frame in [
            to("10.2.0.9").udp(4500, 1),
            to("10.2.0.9").tcp(1, 4500),
            to("10.2.0.9").icmp(8, 0),
            to("10.2.1.9").icmp(0, 0),
            // No ports, not unknown ones.
            to("10.2.2.9").protocol(50).payload(8),
            to("10.2.2.9").tcp(0x1334, 1),
            v6_to("2001:db8:2::9").udp(1, 4500),
            v6_to("2001:db8:2::8").udp(4500, 1),
        ] {
            assert_eq!(run(program, frame).action, RunAction::Transmit);
        }
        passes(program, to("10.2.2.9").tcp(0x1299, 1), PassReason::Exception);
        passes(program, v6_to("2001:db8:2::8").udp(1, 4500), PassReason::Exception);
        // DCCP, GRE and mobility headers have ports where not every kernel looks.
        for protocol in [33, 47, 135] {
            passes(program, to("10.2.2.9").protocol(protocol).payload(8), PassReason::Exception);
            assert_eq!(
                run(program, to("10.2.0.9").protocol(protocol).payload(8)).action,
                RunAction::Transmit
            );
        }
        // Ports that cannot be read may be any.
        passes(program, to("10.2.0.9").protocol(17).payload(3).padding(9), PassReason::Exception);
        passes(program, to("10.2.0.9").protocol(17).payload(3), PassReason::Truncated);
    });
}

/// So that there is room on other kernels, whose verifiers take other ways.
#[test]
fn the_verifier_walks_through_half_of_what_it_would_at_most() {
    if !lab::require_root("the verifier") {
        return;
    }
    let (forwarder, _) = XdpForwarder::load(config()).unwrap();
    let verified = forwarder.cost().unwrap().verified_instructions;
    assert!((1..=500_000).contains(&verified), "{verified} instructions");
}

/// A program reads the flag where the kernel describes its types, and else calls a helper.
#[test]
fn a_frame_in_several_buffers_passes_however_the_program_learns_of_them() {
    with_program(|program, namespace| {
        let egress = namespace.ifindex("out0").unwrap();
        let config = LoadConfig::new(config()).ask_back(0);
        let calling = fill(ProgRun::load(config.clone().without_record()).unwrap(), egress);
        let blind = fill(ProgRun::load(without(config, Check::Buffers)).unwrap(), egress);
        for program in [program, &calling] {
            passes(program, v4().payload(8000), PassReason::MultiBuffer);
            assert_eq!(run(program, v4().payload(1000)).action, RunAction::Transmit);
        }
        // What it sees of the packet is not all of it.
        passes(&blind, v4().payload(8000), PassReason::BadLength);
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
        program.table.renew_lease(Instant::now());
        check(program, v4(), PassReason::LeaseExpired);
        program.table.renew_lease(Instant::now() + Duration::from_secs(3600));
        program.set_updating(true).unwrap();
        check(program, v4(), PassReason::Updating);
        program.set_updating(false).unwrap();
        program.table.acknowledge(1);
        check(program, v4(), PassReason::Removal);
        program.table.acknowledge(0);

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
        check(program, v4_to("10.1.7.5", "10.8.0.1"), PassReason::Guarded);
        check(program, v4_to("10.1.0.5", "10.9.0.1"), PassReason::NoSa);
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
        check(program, v6().icmp(135, 0).payload(24), PassReason::NeighbourDiscovery);
        program.limit_cpus(0).unwrap();
        check(program, v4_to("10.1.0.5", "10.3.0.1"), PassReason::NoChannel);
        program.limit_cpus(u16::MAX).unwrap();
        program.table.apply(&Change::Slot(TRANSMIT, Some(Err(PassReason::Held))).into()).unwrap();
        check(program, v4(), PassReason::Held);
        // It would not forward to loopback.
        let asking = ProgRun::load(LoadConfig::new(config()).ask_back(1)).unwrap();
        check(&fill(asking, namespace.ifindex("out0").unwrap()), v4(), PassReason::FibDiffers);
        // The kernel takes a device that goes away out of the device map.
        namespace.ip("link del out0").unwrap();
        check(program, v4_to("10.1.0.5", "10.4.0.1"), PassReason::EgressUnavailable);

        let all: BTreeSet<PassReason> = PassReason::ALL.iter().copied().collect();
        assert_eq!(reached, all);
    });
}
