//! What takes a known time, step by step.

use std::{
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Action, Input, Mirror,
    properties::{NIC, policy, sa},
};
use crate::{
    Policy, PolicyEvent, Snapshot,
    host::{HostEvent, HostFacts, HostStaleCause, Link, Route, RouteKind, Rule},
    policy::{Egress, Family, MacAddr, NextHop},
    table::TableConfig,
};

const LEASE: Duration = Duration::from_secs(1);
const LAN: u32 = 3;

/// A mirror that follows a host with one interface, whose table takes its time.
struct Driver {
    mirror: Mirror,
    now: Instant,
    write_takes: Duration,
    solicited: Vec<(u32, IpAddr)>,
}

impl Driver {
    fn new(write_takes: Duration) -> Self {
        Self::with(HostFacts::vouched(), NextHop::Device, write_takes)
    }

    fn with(facts: HostFacts, next_hop: NextHop, write_takes: Duration) -> Self {
        let mut mirror = Mirror::new(TableConfig::default().capacity(), LEASE);
        mirror.follow_interface("lan0", Some(LAN));
        let now = Instant::now();
        let link = |ifindex, name: &str| Link {
            ifindex,
            name: name.to_owned(),
            address: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            mtu: 1500,
            up: true,
            carrier: true,
            ..Link::default()
        };
        let facts = HostFacts { links: vec![link(LAN, "lan0"), link(NIC, "nic0")], ..facts };
        mirror.handle_host_event(HostEvent::Snapshot(facts), now);
        let egress = Egress { next_hop, ..policy(0).egress };
        let policies = vec![Policy { egress, ..policy(0) }];
        let snapshot = Snapshot { policies, sas: vec![sa(0)], ..Snapshot::default() };
        mirror.handle_policy_event(PolicyEvent::Snapshot(snapshot), now);
        Self { mirror, now, write_takes, solicited: Vec::new() }
    }

    /// Asks the sources, which have nothing to tell, does what follows, and returns where the program is attached and how much is
    /// left of the lease then.
    fn turn(&mut self) -> Option<(Vec<u32>, Duration)> {
        self.mirror.handle_time(self.now, SystemTime::UNIX_EPOCH);
        for input in [Input::Policies, Input::Host] {
            self.mirror.handle_caught_up(input, self.now);
        }
        let (mut until, mut attached) = (self.now, None);
        while let Some(action) = self.mirror.poll_action() {
            match action {
                Action::Solicit { neighbours } => self.solicited.extend(neighbours),
                Action::Write(_) => {
                    self.now += self.write_takes;
                    self.mirror.handle_written(true);
                    self.mirror.handle_time(self.now, SystemTime::UNIX_EPOCH);
                }
                Action::Renew { until: renewed } => until = renewed,
                Action::Attach { interfaces } => {
                    attached = Some((interfaces, until.saturating_duration_since(self.now)));
                }
                _ => {}
            }
        }
        attached
    }
}

#[test]
fn the_program_is_attached_at_once_if_the_table_is_written_fast() {
    let mut driver = Driver::new(LEASE / 10);
    let (interfaces, left) = driver.turn().unwrap();
    assert_eq!(interfaces, [LAN]);
    assert!(left >= LEASE / 2, "{left:?}");
}

/// It may replace another one that is fast.
#[test]
fn the_program_is_attached_with_half_a_lease_at_least_after_a_write_that_took_long() {
    for write_takes in [LEASE * 6 / 10, LEASE * 3] {
        let mut driver = Driver::new(write_takes);
        assert_eq!(driver.turn(), None);
        let (interfaces, left) = driver.turn().unwrap();
        assert_eq!(interfaces, [LAN]);
        assert!(left >= LEASE / 2, "{left:?}");
    }
}

#[test]
fn neighbours_are_solicited_only_while_something_may_be_fast() {
    let [source, destination] = [policy(0).templates[0].source, policy(0).templates[0].destination];
    let via = RouteKind::Unicast { ifindex: NIC, gateway: None, mtu: None };
    let routes = vec![
        Route::new(254, "0.0.0.0/0".parse().unwrap(), via),
        Route::new(255, source.into(), RouteKind::Local),
    ];
    let facts = HostFacts { routes, rules: Rule::ordinary(Family::V4).into(), ..HostFacts::default() };
    let driver = |facts| Driver::with(facts, NextHop::Neighbour, Duration::ZERO);
    let mut known = driver(facts.clone());
    known.turn();
    assert_eq!(known.solicited, [(NIC, destination)]);
    assert_eq!(known.mirror.neighbours().unresolved, 1);

    let mut killed = driver(facts.clone());
    killed.mirror.set_kill_switch(true);
    let mut stale = driver(facts);
    stale.mirror.handle_host_event(HostEvent::Stale(HostStaleCause::Overrun), stale.now);
    for mut driver in [killed, stale, driver(HostFacts::vouched())] {
        driver.turn();
        assert_eq!(driver.solicited, []);
    }
}
