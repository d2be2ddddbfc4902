//! A small table of routes that changes all the time is followed.

use std::time::Duration;

use fastswan_testkit::{
    churn::{Churn, Report},
    lab,
};

#[test]
fn what_concerns_a_policy_is_followed_while_other_routes_change_all_the_time() {
    if !lab::require_root("churn") {
        return;
    }
    let (routes, policies) = (20_000, Churn::FEWEST_POLICIES);
    let report = Churn::new(rand::random(), routes, policies, Duration::from_secs(2)).run().unwrap();
    let Report { looks, fast, followed, flap_away, late, route_changes, neighbour_changes, .. } = &report;
    let json = report.json();
    eprintln!("{json:#}");
    assert_eq!(*late, 0, "followed later than the lease: {json:#}");
    assert!(followed.count > 0 && flap_away.count > 0, "{json:#}");
    assert!(*route_changes > 0 && *neighbour_changes > 0, "{json:#}");
    assert!(*looks > 0 && *fast > 0, "{json:#}");
    // Neither was the host misunderstood, nor did the kernel's own routes contradict.
    assert_eq!(report.host_resyncs.keys().collect::<Vec<_>>(), [&"start"], "{json:#}");
}
