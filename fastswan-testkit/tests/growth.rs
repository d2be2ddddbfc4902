//! A table that is full is replaced by a larger one, under traffic.

use std::time::Duration;

use fastswan_testkit::{
    growth::{Growth, Report},
    lab,
};

/// Outlasts whatever else a machine is busy with.
const LEASE: Duration = Duration::from_secs(30);

#[test]
fn a_full_table_is_grown_under_traffic_and_no_frame_is_lost_or_slow_that_was_fast() {
    if !lab::require_root("growth") {
        return;
    }
    let (policies, room) = (400, 100);
    let report = Growth::new(policies, room).with_lease(LEASE).run().unwrap();
    let json = report.json();
    eprintln!("{json:#}");
    assert_eq!(report.wrongs(), Vec::<String>::new(), "{json:#}");
    let Report { small, large, slow_meanwhile, slow_afterwards, lost, .. } = report;
    assert_eq!(small, [u64::from(room), u64::from(policies - room)], "the first table is full");
    assert_eq!(large, [u64::from(policies), 0]);
    assert_eq!(lost, 0);
    assert_eq!((slow_meanwhile, slow_afterwards), (0, 0), "there is no gap: {json:#}");
}
