//! What takes a known time, step by step.

use std::time::{Duration, Instant, SystemTime};

use super::{
    Action, Input, Mirror,
    properties::{NIC, policy, sa},
};
use crate::{
    PolicyEvent, Snapshot,
    host::{HostEvent, HostFacts, Link},
    policy::MacAddr,
    table::TableConfig,
};

const LEASE: Duration = Duration::from_secs(1);
const LAN: u32 = 3;

/// A mirror that follows a host with one interface, whose table takes its time.
struct Driver {
    mirror: Mirror,
    now: Instant,
    write_takes: Duration,
}

impl Driver {
    fn new(write_takes: Duration) -> Self {
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
        let facts = HostFacts { links: vec![link(LAN, "lan0"), link(NIC, "nic0")], ..HostFacts::vouched() };
        mirror.handle_host_event(HostEvent::Snapshot(facts), now);
        let snapshot = Snapshot { policies: vec![policy(0)], sas: vec![sa(0)], ..Snapshot::default() };
        mirror.handle_policy_event(PolicyEvent::Snapshot(snapshot), now);
        Self { mirror, now, write_takes }
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
