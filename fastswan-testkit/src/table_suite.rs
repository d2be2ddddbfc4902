//! What every [`OffloadTable`] does: one suite of checks that is run on each implementation.
//!
//! [`check`] panics with the story that went wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use fastswan::{
    OffloadTable, PassReason,
    policy::{Family, MacAddr, PortMatch},
    table::{
        Cell, Change, Exception, Fact, Forwarding, Forwards, Port, Ports, Probes, ReadBack, ReversePath,
        Side, Slot, TableConfig, TableError, TableUpdate, Verdict,
    },
};
use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

/// Runs all checks on tables that `make` makes.
///
/// # Panics
///
/// If a table does something else than what the trait says.
pub fn check<T: OffloadTable + Ports + ReadBack>(mut make: impl FnMut(&TableConfig) -> T) {
    the_longest_destination_then_the_longest_source_decides(make(&TableConfig::default()));
    a_removed_cell_uncovers_the_one_behind_it(make(&TableConfig::default()));
    the_longest_fact_decides(make(&TableConfig::default()));
    a_guard_is_about_all_sources_inside_it(make(&TableConfig::default()));
    a_slot_tells_how_its_packets_leave_or_why_not(make(&TableConfig::default()));
    an_exception_stays_while_another_one_needs_its_entry(make(&TableConfig::default()));
    let small = |cells| TableConfig { cells_v4: cells, cells_v6: cells, exceptions: 64, slots: 64 };
    for family in [Family::V4, Family::V6] {
        lookups_agree_with_a_scan_of_all_cells(make(&small(512)), family);
        exceptions_agree_with_a_scan_of_all(make(&small(512)), family);
        as_many_cells_as_were_asked_for_fit(make(&small(4096)), family);
        too_many_cells_are_an_error(make(&small(16)), family);
        a_full_table_keeps_what_it_has(make(&small(64)), family);
        too_many_tuples_are_an_error(make(&TableConfig::default()), family);
        too_many_exceptions_are_an_error(make(&small(16)), family);
        too_many_tuples_of_exceptions_are_an_error(make(&TableConfig::default()), family);
    }
    a_slot_beyond_the_end_is_an_error(make(&small(16)));
    ports_come_and_go(make(&TableConfig::default()));
    ports_fit_whatever_their_interfaces_and_vlans(make(&TableConfig::default()));
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn cell(source: &str, destination: &str) -> Cell {
    Cell { source: net(source), destination: net(destination) }
}

fn fast(slot: u32) -> Verdict {
    Verdict::Fast { slot: Slot(slot), probes: Probes::default() }
}

fn set(table: &mut impl OffloadTable, cells: Vec<(Cell, Option<Verdict>)>) -> Result<(), TableError> {
    table.apply(&cells.into_iter().map(|(cell, verdict)| Change::Cell(cell, verdict)).collect())
}

fn verdict(table: &impl ReadBack, source: &str, destination: &str) -> Option<Verdict> {
    table.verdict(source.parse().expect("an address"), destination.parse().expect("an address"))
}

fn the_longest_destination_then_the_longest_source_decides(mut table: impl OffloadTable + ReadBack) {
    let shadowed = Verdict::Pass(PassReason::Shadowed);
    set(
        &mut table,
        vec![
            (cell("0.0.0.0/0", "10.2.0.0/16"), Some(fast(1))),
            (cell("10.1.0.0/16", "10.2.3.0/24"), Some(shadowed)),
            (cell("10.1.1.0/24", "10.2.3.0/24"), Some(fast(2))),
            (cell("2001:db8:1::/48", "2001:db8:2::/48"), Some(fast(3))),
        ],
    )
    .expect("room");
    assert_eq!(verdict(&table, "10.1.1.1", "10.2.3.4"), Some(fast(2)));
    assert_eq!(verdict(&table, "10.1.2.1", "10.2.3.4"), Some(shadowed));
    assert_eq!(
        verdict(&table, "10.9.9.9", "10.2.3.4"),
        Some(fast(1)),
        "no source fits the longer destination"
    );
    assert_eq!(verdict(&table, "10.1.1.1", "10.3.0.1"), None);
    assert_eq!(verdict(&table, "2001:db8:1::1", "2001:db8:2::1"), Some(fast(3)));
    assert_eq!(verdict(&table, "2001:db8:3::1", "2001:db8:2::1"), None);
}

fn a_removed_cell_uncovers_the_one_behind_it(mut table: impl OffloadTable + ReadBack) {
    let (wide, narrow) = (cell("0.0.0.0/0", "0.0.0.0/0"), cell("10.1.0.0/16", "10.2.0.0/16"));
    set(&mut table, vec![(wide, Some(fast(1))), (narrow, Some(fast(2)))]).expect("room");
    assert_eq!(verdict(&table, "10.1.0.1", "10.2.0.1"), Some(fast(2)));
    set(&mut table, vec![(narrow, None)]).expect("a removal");
    assert_eq!(verdict(&table, "10.1.0.1", "10.2.0.1"), Some(fast(1)));
    set(&mut table, vec![(narrow, None), (wide, None)]).expect("removing what is not there changes nothing");
    assert_eq!(verdict(&table, "10.1.0.1", "10.2.0.1"), None);
}

fn the_longest_fact_decides(mut table: impl OffloadTable + ReadBack) {
    let facts = [
        ((Side::Destination, net("0.0.0.0/0")), Some(Fact::Via(2))),
        ((Side::Destination, net("10.2.0.0/16")), Some(Fact::Denied)),
        ((Side::Destination, net("10.2.0.0/24")), Some(Fact::Via(3))),
        ((Side::Source, net("10.2.0.0/24")), Some(Fact::Denied)),
        ((Side::Source, net("2001:db8::1/128")), Some(Fact::Denied)),
    ];
    let facts = facts.map(|((side, prefix), fact)| Change::Fact(side, prefix, fact));
    table.apply(&facts.into_iter().collect()).expect("room");
    let fact = |side, address: &str| table.fact(side, address.parse().expect("an address"));
    assert_eq!(fact(Side::Destination, "10.2.0.9"), Some(Fact::Via(3)));
    assert_eq!(fact(Side::Destination, "10.2.9.9"), Some(Fact::Denied));
    assert_eq!(fact(Side::Destination, "192.0.2.1"), Some(Fact::Via(2)));
    assert_eq!(fact(Side::Source, "10.2.0.9"), Some(Fact::Denied), "sources are apart from destinations");
    assert_eq!(fact(Side::Source, "10.2.9.9"), None);
    assert_eq!(fact(Side::Source, "2001:db8::1"), Some(Fact::Denied));
    assert_eq!(fact(Side::Destination, "2001:db8::1"), None);
    assert_eq!(verdict(&table, "10.2.0.9", "10.2.0.9"), None, "facts are not cells");
}

/// A prefix of a small part of the address space, so that random ones nest and meet.
fn random_prefix(random: &mut SmallRng, family: Family) -> IpNet {
    let length = *[0, 2, 4, 6, 8].get(random.random_range(0..5)).expect("in range");
    let octet = random.random::<u8>();
    let prefix = match family {
        Family::V4 => IpNet::new(Ipv4Addr::new(octet, 0, 0, 0).into(), length),
        Family::V6 => IpNet::new(Ipv6Addr::new(u16::from(octet) << 8, 0, 0, 0, 0, 0, 0, 0).into(), length),
    };
    prefix.expect("a short prefix").trunc()
}

fn random_address(random: &mut SmallRng, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(random.random(), 1, 2, 3).into(),
        Family::V6 => Ipv6Addr::new(random.random(), 0, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// After any sequence of changes a lookup gives what the best of all cells that contain the packet says.
fn lookups_agree_with_a_scan_of_all_cells(mut table: impl OffloadTable + ReadBack, family: Family) {
    let mut random = SmallRng::seed_from_u64(7);
    let mut model: BTreeMap<Cell, Verdict> = BTreeMap::new();
    for round in 0..400 {
        let key = Cell {
            destination: random_prefix(&mut random, family),
            source: random_prefix(&mut random, family),
        };
        if random.random_ratio(1, 3) {
            let gone = model.keys().nth(random.random_range(0..=model.len())).copied().unwrap_or(key);
            model.remove(&gone);
            set(&mut table, vec![(gone, None)]).expect("a removal");
        } else {
            model.insert(key, fast(round % 64));
            set(&mut table, vec![(key, Some(fast(round % 64)))]).expect("room");
        }
        for _ in 0..50 {
            let source = random_address(&mut random, family);
            let destination = random_address(&mut random, family);
            let best = model
                .iter()
                .filter(|(cell, _)| cell.destination.contains(&destination) && cell.source.contains(&source))
                .max_by_key(|(cell, _)| (cell.destination.prefix_len(), cell.source.prefix_len()));
            let expected = best.map(|(_, verdict)| *verdict);
            assert_eq!(
                table.verdict(source, destination),
                expected,
                "{source} → {destination}, round {round}"
            );
        }
    }
}

fn host_cell(family: Family, number: u32) -> Cell {
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::from(0x0a00_0000 + number).into(),
        Family::V6 => Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(number)).into(),
    };
    Cell { destination: address.into(), source: family.everything() }
}

fn as_many_cells_as_were_asked_for_fit(mut table: impl OffloadTable + ReadBack, family: Family) {
    let cells = u32::try_from(table.capacity().cells_v4).expect("a small table");
    let all = (0..cells).map(|n| (host_cell(family, n), Some(fast(n % 64)))).collect();
    set(&mut table, all).expect("as many as were asked for");
    for n in 0..cells {
        let Cell { destination, .. } = host_cell(family, n);
        assert_eq!(
            table.verdict(destination.addr(), destination.addr()),
            Some(fast(n % 64)),
            "{destination}"
        );
    }
}

fn too_many_cells_are_an_error(mut table: impl OffloadTable + ReadBack, family: Family) {
    let all = (0..1000).map(|n| (host_cell(family, n), Some(fast(0)))).collect();
    let error = set(&mut table, all).expect_err("1,000 cells do not fit into 16");
    assert!(matches!(error, TableError::Full { .. }), "{error}");
}

fn too_many_tuples_are_an_error(mut table: impl OffloadTable + ReadBack, family: Family) {
    let everything = family.everything();
    let lengths = (0..=31).flat_map(|destination| (0..=31).map(move |source| (destination, source)));
    let cells = lengths.map(|(destination, source)| {
        let prefix = |length| IpNet::new(everything.addr(), length).expect("a short prefix");
        (Cell { destination: prefix(destination), source: prefix(source) }, Some(fast(0)))
    });
    let error = set(&mut table, cells.collect()).expect_err("1,024 pairs of lengths do not fit");
    assert!(matches!(error, TableError::Full { .. }), "{error}");
}

fn too_many_exceptions_are_an_error(mut table: impl OffloadTable + ReadBack, family: Family) {
    let exception = |number| Change::Exception(exception(host_cell(family, number), 17, 0, 500), true);
    let with = |numbers: std::ops::Range<u32>| numbers.map(exception).collect::<TableUpdate>();
    let limit = u32::try_from(table.capacity().exceptions).expect("a small table");
    table.apply(&with(0..limit)).expect("as many as it says");
    for Cell { destination, .. } in (0..limit).map(|number| host_cell(family, number)) {
        let address = destination.addr();
        assert!(table.is_exception(address, address, 17, Some((1, 500))), "{destination}");
        assert!(table.is_exception(address, address, 17, None), "{destination}");
    }
    let error = table.apply(&with(limit..100 * limit)).expect_err("a hundred times as many");
    assert!(matches!(error, TableError::Full { .. }), "{error}");
}

fn too_many_tuples_of_exceptions_are_an_error(mut table: impl OffloadTable + ReadBack, family: Family) {
    let everything = Cell { source: family.everything(), destination: family.everything() };
    let with = |shifts: std::ops::Range<u32>| {
        let exceptions = shifts.map(|shift| {
            let destination_port = PortMatch { port: 0, mask: u16::MAX << (shift % 16) };
            let source_port = PortMatch { port: 0, mask: u16::MAX << (shift / 16) };
            let protocol = 17;
            Change::Exception(Exception { cell: everything, protocol, source_port, destination_port }, true)
        });
        exceptions.collect::<TableUpdate>()
    };
    let limit = u32::try_from(table.capacity().exception_tuples).expect("not many");
    table.apply(&with(0..limit)).expect("as many as it says");
    let error = table.apply(&with(limit..limit + 1)).expect_err("one more");
    assert!(matches!(error, TableError::Full { limit: 64, .. }), "{error}");
}

fn exception(cell: Cell, protocol: u8, source_port: u16, destination_port: u16) -> Exception {
    let port = |port| if port == 0 { PortMatch::default() } else { PortMatch::exactly(port) };
    Exception { cell, protocol, source_port: port(source_port), destination_port: port(destination_port) }
}

/// Different exceptions may share an entry: by bits of ports that do not count, or, for packets whose ports
/// cannot be read, by everything but ports.
fn an_exception_stays_while_another_one_needs_its_entry(mut table: impl OffloadTable + ReadBack) {
    let (source, destination) = ("10.1.0.1".parse().expect("v4"), "10.2.0.1".parse().expect("v4"));
    let like = |port, mask| Exception {
        source_port: PortMatch { port, mask },
        ..exception(cell("10.1.0.0/16", "10.2.0.0/16"), 6, 0, 0)
    };
    let all = [like(0x1201, 0xff00), like(0x1202, 0xff00), like(0x1300, 0xff00)];
    let mut apply = |changes: &[(Exception, bool)]| {
        let changes = changes.iter().map(|(exception, there)| Change::Exception(*exception, *there));
        table.apply(&changes.collect()).expect("room");
        let is = |protocol, ports| table.is_exception(source, destination, protocol, ports);
        assert!(
            !is(17, None) && !is(6, Some((0x1400, 1))) && !table.is_exception(destination, source, 6, None)
        );
        (is(6, Some((0x1234, 1))), is(6, Some((0x1334, 1))), is(6, None))
    };
    assert_eq!(apply(&[]), (false, false, false));
    assert_eq!(apply(&all.map(|exception| (exception, true))), (true, true, true));
    assert_eq!(apply(&all.map(|exception| (exception, true))), (true, true, true), "they were there");
    assert_eq!(apply(&[(all[0], false)]), (true, true, true));
    assert_eq!(apply(&[(all[0], false)]), (true, true, true), "it was gone");
    assert_eq!(apply(&[(all[1], false)]), (false, true, true));
    assert_eq!(apply(&[(all[2], false)]), (false, false, false));
}

/// After any sequence of changes a packet is an exception if and only if one of them matches it.
fn exceptions_agree_with_a_scan_of_all(mut table: impl OffloadTable + ReadBack, family: Family) {
    let mut random = SmallRng::seed_from_u64(11);
    let mut model: BTreeSet<Exception> = BTreeSet::new();
    let protocols = [0, 6, 17, 50];
    for round in 0..400 {
        let mut port = || PortMatch {
            port: random.random_range(0..4) << 8 | 1,
            mask: *[0, 0xff00].get(random.random_range(0..2)).expect("in range"),
        };
        let (source_port, destination_port) = (port(), port());
        let exception = Exception {
            cell: Cell {
                destination: random_prefix(&mut random, family),
                source: random_prefix(&mut random, family),
            },
            protocol: protocols[random.random_range(0..4)],
            source_port,
            destination_port,
        };
        // Few enough that most packets are none.
        let change = if model.len() < 4 || model.len() < 24 && random.random() {
            model.insert(exception);
            Change::Exception(exception, true)
        } else {
            let gone = *model.iter().nth(random.random_range(0..model.len())).expect("in range");
            model.remove(&gone);
            Change::Exception(gone, false)
        };
        table.apply(&change.into()).expect("room");
        for _ in 0..50 {
            let source = random_address(&mut random, family);
            let destination = random_address(&mut random, family);
            let protocol = protocols[random.random_range(1..4)];
            let ports = (random.random_range(0..4_u16) << 8, random.random_range(0..4_u16) << 8);
            let about = |exception: &&Exception| {
                exception.cell.destination.contains(&destination)
                    && exception.cell.source.contains(&source)
                    && (exception.protocol == 0 || exception.protocol == protocol)
            };
            let matches = |exception: &Exception| {
                exception.source_port.matches(ports.0) && exception.destination_port.matches(ports.1)
            };
            let context = || format!("{source} → {destination}, {protocol}, {ports:?}, round {round}");
            assert_eq!(
                table.is_exception(source, destination, protocol, Some(ports)),
                model.iter().filter(about).any(matches),
                "{}",
                context()
            );
            assert_eq!(
                table.is_exception(source, destination, protocol, None),
                model.iter().any(|exception| about(&exception)),
                "{}",
                context()
            );
        }
    }
}

fn a_guard_is_about_all_sources_inside_it(mut table: impl OffloadTable + ReadBack) {
    let guards = ["10.1.0.0/16", "10.1.2.0/24", "2001:db8:1::/48"];
    let mut apply = |changes: &[(&str, bool)]| {
        let guards = changes.iter().map(|(guard, there)| Change::Guard(net(guard), *there));
        table.apply(&guards.collect()).expect("room");
        ["10.1.2.1", "10.1.3.1", "10.2.0.1", "2001:db8:1::1", "2001:db8:2::1"]
            .map(|source| table.is_guarded(source.parse().expect("an address")))
    };
    assert_eq!(apply(&[]), [false; 5]);
    assert_eq!(apply(&guards.map(|guard| (guard, true))), [true, true, false, true, false]);
    assert_eq!(apply(&[(guards[0], true)]), [true, true, false, true, false], "it was there");
    assert_eq!(apply(&[(guards[0], false)]), [true, false, false, true, false]);
    assert_eq!(apply(&[(guards[1], false)]), [false, false, false, true, false]);
}

fn a_slot_tells_how_its_packets_leave_or_why_not(mut table: impl OffloadTable + ReadBack) {
    let mut set = |standing| {
        table.apply(&Change::Slot(Slot(5), standing).into()).expect("room");
        assert_eq!(table.standing(Slot(5)), standing);
        assert_eq!(table.standing(Slot(6)), None);
    };
    let rewrite = Some((MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([0, 0, 0, 0, 0, 2])));
    set(None);
    set(Some(Ok(Forwarding { ifindex: 1, max_length: u16::MAX, rewrite })));
    set(Some(Ok(Forwarding { ifindex: 1, max_length: 1, rewrite: None })));
    for reason in PassReason::ALL {
        set(Some(Err(*reason)));
    }
    set(None);
    assert_eq!(table.standing(Slot(u32::MAX)), None);
}

/// What does not fit costs nothing that was there before.
fn a_full_table_keeps_what_it_has(mut table: impl OffloadTable + ReadBack, family: Family) {
    let verdict = |number| fast(number % 64);
    let mut fitted = 0;
    let error = loop {
        match set(&mut table, vec![(host_cell(family, fitted), Some(verdict(fitted)))]) {
            Ok(()) => fitted += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, TableError::Full { .. }), "{error}");
    assert!(fitted as usize >= table.capacity().cells_v4);
    for number in 0..fitted {
        let address = host_cell(family, number).destination.addr();
        assert_eq!(table.verdict(address, address), Some(verdict(number)), "{number} of {fitted}");
    }
}

fn a_slot_beyond_the_end_is_an_error(mut table: impl OffloadTable + ReadBack) {
    let forwarding = Forwarding { ifindex: 1, max_length: 1500, rewrite: None };
    let error = table.apply(&Change::Slot(Slot(64), Some(Ok(forwarding))).into()).expect_err("64 slots");
    assert!(matches!(error, TableError::NoSuchSlot { limit: 64, .. }), "{error}");
}

fn ports_come_and_go(mut table: impl Ports) {
    let port = |ifindex| port(ifindex, 0);
    // More than fit, if they were not removed in between.
    for round in 0..20 {
        for ifindex in 1..=500 {
            table.set_port(&port(round * 1000 + ifindex)).expect("500 ports");
        }
        for ifindex in 1..=500 {
            table.remove_port(round * 1000 + ifindex, 0);
            table.remove_port(round * 1000 + ifindex, 0);
        }
    }
    assert_eq!(table.port(1, 0), None);
    for ifindex in 1..=4096 {
        table.set_port(&port(ifindex)).expect("4,096 ports");
    }
    let error = table.set_port(&port(5000)).expect_err("one more");
    assert!(matches!(error, TableError::TooManyPorts { ifindex: 5000, vlan: 0, limit: 4096 }), "{error}");
    table.set_port(&Port { receiver: 7, ..port(1) }).expect("one that is there");
    assert_eq!(table.port(1, 0), Some(Port { receiver: 7, ..port(1) }));
    assert!((2..=4096).all(|ifindex| table.port(ifindex, 0) == Some(port(ifindex))), "the others stay");
    assert_eq!(table.port(5000, 0), None);
    table.remove_port(9, 0);
    table.set_port(&port(5000)).expect("room for one");
}

fn ports_fit_whatever_their_interfaces_and_vlans(mut table: impl Ports) {
    let trunks = (4..=8).flat_map(|ifindex| [port(ifindex, 0), port(ifindex, 28)]);
    let congruent = (0..9).map(|n| port(40 + 1024 * n, 0));
    let vlans = (1..=1100).map(|vlan| port(9, vlan));
    let far_apart = (1..=900).map(|n| port(n << 21, 4094));
    let ports: Vec<Port> = trunks.chain(congruent).chain(vlans).chain(far_apart).collect();
    for port in &ports {
        table.set_port(port).expect("as many as fit");
    }
    assert!(ports.iter().all(|port| table.port(port.ifindex, port.vlan) == Some(*port)));
}

fn port(ifindex: u32, vlan: u16) -> Port {
    Port {
        ifindex,
        vlan,
        receiver: ifindex,
        address: MacAddr([2, 0, 0, 0, 0, 1]),
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    }
}
