//! What every [`OffloadTable`] does: one suite of checks that is run on each implementation.
//!
//! [`check`] panics with the story that went wrong.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use fastswan::{
    OffloadTable, PassReason,
    policy::{Family, MacAddr},
    table::{
        Cell, Exception, Fact, Forwarding, Forwards, Port, ReversePath, Side, Slot, TableConfig, TableError,
        TableUpdate, Verdict,
    },
};
use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

/// Runs all checks on tables that `make` makes.
///
/// # Panics
///
/// If a table does something else than what the trait says.
pub fn check<T: OffloadTable>(mut make: impl FnMut(&TableConfig) -> T) {
    the_longest_destination_then_the_longest_source_decides(make(&TableConfig::default()));
    a_removed_cell_uncovers_the_one_behind_it(make(&TableConfig::default()));
    the_longest_fact_decides(make(&TableConfig::default()));
    for family in [Family::V4, Family::V6] {
        lookups_agree_with_a_scan_of_all_cells(make(&TableConfig { cells: 512, slots: 64 }), family);
        as_many_cells_as_were_asked_for_fit(make(&TableConfig { cells: 4096, slots: 64 }), family);
        too_many_cells_are_an_error(make(&TableConfig { cells: 16, slots: 64 }), family);
        too_many_tuples_are_an_error(make(&TableConfig::default()), family);
    }
    too_many_exceptions_are_an_error(make(&TableConfig::default()));
    a_slot_beyond_the_end_is_an_error(make(&TableConfig { cells: 16, slots: 64 }));
    ports_come_and_go(make(&TableConfig::default()));
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn cell(source: &str, destination: &str) -> Cell {
    Cell { source: net(source), destination: net(destination) }
}

fn fast(slot: u32) -> Verdict {
    Verdict::Fast { slot: Slot(slot), probe_destination: false, probe_source: false }
}

fn set(table: &mut impl OffloadTable, cells: Vec<(Cell, Option<Verdict>)>) -> Result<(), TableError> {
    table.apply(&TableUpdate { cells, ..TableUpdate::default() })
}

fn verdict(table: &impl OffloadTable, source: &str, destination: &str) -> Option<Verdict> {
    table.verdict(source.parse().expect("an address"), destination.parse().expect("an address"))
}

fn the_longest_destination_then_the_longest_source_decides(mut table: impl OffloadTable) {
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

fn a_removed_cell_uncovers_the_one_behind_it(mut table: impl OffloadTable) {
    let (wide, narrow) = (cell("0.0.0.0/0", "0.0.0.0/0"), cell("10.1.0.0/16", "10.2.0.0/16"));
    set(&mut table, vec![(wide, Some(fast(1))), (narrow, Some(fast(2)))]).expect("room");
    assert_eq!(verdict(&table, "10.1.0.1", "10.2.0.1"), Some(fast(2)));
    set(&mut table, vec![(narrow, None)]).expect("a removal");
    assert_eq!(verdict(&table, "10.1.0.1", "10.2.0.1"), Some(fast(1)));
    set(&mut table, vec![(narrow, None), (wide, None)]).expect("removing what is not there changes nothing");
    assert_eq!(verdict(&table, "10.1.0.1", "10.2.0.1"), None);
}

fn the_longest_fact_decides(mut table: impl OffloadTable) {
    let facts = vec![
        ((Side::Destination, net("0.0.0.0/0")), Some(Fact::Via(2))),
        ((Side::Destination, net("10.2.0.0/16")), Some(Fact::Denied)),
        ((Side::Destination, net("10.2.0.0/24")), Some(Fact::Via(3))),
        ((Side::Source, net("10.2.0.0/24")), Some(Fact::Denied)),
        ((Side::Source, net("2001:db8::1/128")), Some(Fact::Denied)),
    ];
    table.apply(&TableUpdate { facts, ..TableUpdate::default() }).expect("room");
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
fn lookups_agree_with_a_scan_of_all_cells(mut table: impl OffloadTable, family: Family) {
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

fn as_many_cells_as_were_asked_for_fit(mut table: impl OffloadTable, family: Family) {
    let cells = u32::try_from(table.capacity().cells).expect("a small table");
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

fn too_many_cells_are_an_error(mut table: impl OffloadTable, family: Family) {
    let all = (0..1000).map(|n| (host_cell(family, n), Some(fast(0)))).collect();
    let error = set(&mut table, all).expect_err("1,000 cells do not fit into 16");
    assert!(matches!(error, TableError::Full { .. }), "{error}");
}

fn too_many_tuples_are_an_error(mut table: impl OffloadTable, family: Family) {
    let everything = family.everything();
    let lengths = (0..=31).flat_map(|destination| (0..=31).map(move |source| (destination, source)));
    let cells = lengths.map(|(destination, source)| {
        let prefix = |length| IpNet::new(everything.addr(), length).expect("a short prefix");
        (Cell { destination: prefix(destination), source: prefix(source) }, Some(fast(0)))
    });
    let error = set(&mut table, cells.collect()).expect_err("1,024 pairs of lengths do not fit");
    assert!(matches!(error, TableError::Full { .. }), "{error}");
}

fn too_many_exceptions_are_an_error(mut table: impl OffloadTable) {
    let exception = Exception {
        cell: cell("0.0.0.0/0", "0.0.0.0/0"),
        protocol: 17,
        source_port: fastswan::policy::PortMatch::default(),
        destination_port: fastswan::policy::PortMatch::exactly(500),
    };
    let limit = table.capacity().exceptions;
    let with = |count| TableUpdate { exceptions: Some(vec![exception; count]), ..TableUpdate::default() };
    table.apply(&with(limit)).expect("as many as it says");
    let error = table.apply(&with(limit + 1)).expect_err("one too many");
    assert!(matches!(error, TableError::Full { .. }), "{error}");
}

fn a_slot_beyond_the_end_is_an_error(mut table: impl OffloadTable) {
    let forwarding = Forwarding { ifindex: 1, max_length: 1500, rewrite: None };
    let forwardings = vec![(Slot(64), Some(forwarding))];
    let error = table.apply(&TableUpdate { forwardings, ..TableUpdate::default() }).expect_err("64 slots");
    assert!(matches!(error, TableError::NoSuchSlot { limit: 64, .. }), "{error}");
}

fn ports_come_and_go(mut table: impl OffloadTable) {
    let port = |ifindex| Port {
        ifindex,
        vlan: 0,
        receiver: ifindex,
        address: MacAddr([2, 0, 0, 0, 0, 1]),
        forwards: Forwards { v4: true, v6: true },
        reverse_path: ReversePath::Off,
    };
    // More than fit, if they were not removed in between.
    for round in 0..20 {
        for ifindex in 1..=200 {
            table.set_port(&port(round * 1000 + ifindex)).expect("200 ports");
        }
        for ifindex in 1..=200 {
            table.remove_port(round * 1000 + ifindex, 0);
        }
    }
    let error = (1..=2000).find_map(|ifindex| table.set_port(&port(ifindex)).err()).expect("2,000 ports");
    assert!(matches!(error, TableError::TooManyPorts { .. }), "{error}");
}
