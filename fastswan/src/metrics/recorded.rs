//! What is counted with the feature.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use fastswan_ebpf::PassReason;

use crate::{
    compiler::PolicyState,
    host::{Hook, HookKind},
    mirror::NeighbourCounts,
    table::{Asked, Room, Traffic},
};

/// What a gateway has counted that nobody else remembers.
#[derive(Debug)]
pub(crate) struct Meters {
    /// Traffic of policies that are gone.
    retired: Traffic,
    /// Reasons that policies have had: their gauges go back to zero.
    reasons: BTreeSet<&'static str>,
    /// Kinds of hooks that were skipped: likewise.
    skipped: BTreeSet<HookKind>,
}

/// What is looked at instead of counted.
#[derive(Debug)]
pub(crate) struct Moment {
    /// What became of each packet-offloaded outbound policy, and what it has forwarded.
    pub(crate) policies: Vec<(PolicyState, Traffic)>,
    pub(crate) software_policies: u64,
    /// How full the table is.
    pub(crate) room: BTreeMap<&'static str, Room>,
    pub(crate) passes: Vec<(PassReason, u64)>,
    pub(crate) asked: Asked,
    pub(crate) neighbours: NeighbourCounts,
    pub(crate) solicitations: u64,
    pub(crate) failed_solicitations: u64,
    pub(crate) associations: usize,
    pub(crate) queued: usize,
}

#[expect(clippy::unused_self, reason = "whoever has no meters counts nothing")]
impl Meters {
    pub(crate) fn new() -> Self {
        describe();
        Self { retired: Traffic::default(), reasons: BTreeSet::new(), skipped: BTreeSet::new() }
    }

    pub(crate) fn lost_track(&mut self, input: &'static str, cause: &'static str) {
        counter!("fastswan_stale_total", "input" => input, "cause" => cause).increment(1);
    }

    pub(crate) fn resynchronised(&mut self, input: &'static str, cause: &'static str) {
        counter!("fastswan_resyncs_total", "input" => input, "cause" => cause).increment(1);
    }

    pub(crate) fn repaired(&mut self, repairs: u64) {
        if repairs > 0 {
            counter!("fastswan_audit_repairs_total").increment(repairs);
        }
    }

    pub(crate) fn applied(&mut self, events: usize) {
        counter!("fastswan_events_total").increment(events as u64);
        histogram!("fastswan_batch_events").record(float(events as u64));
    }

    pub(crate) fn compiled(&mut self, took: Duration) {
        histogram!("fastswan_compile_seconds").record(took);
    }

    /// Remembers the traffic of a policy that is gone.
    pub(crate) fn retired(&mut self, traffic: Traffic) {
        self.retired = self.retired + traffic;
    }

    pub(crate) fn written(&mut self, changes: usize) {
        counter!("fastswan_table_writes_total").increment(1);
        counter!("fastswan_table_changes_total").increment(changes as u64);
    }

    pub(crate) fn caught_up(&mut self, lag: Duration) {
        histogram!("fastswan_lag_seconds").record(lag);
    }

    pub(crate) fn opened(&mut self, took: Duration) {
        counter!("fastswan_guard_shut_total").increment(1);
        histogram!("fastswan_guard_open_seconds").record(took);
    }

    pub(crate) fn lease_expired(&mut self, times: u64) {
        if times > 0 {
            counter!("fastswan_lease_expiries_total").increment(times);
        }
    }

    pub(crate) fn switched(&mut self, on: bool) {
        gauge!("fastswan_current").set(if on { 1.0 } else { 0.0 });
    }

    pub(crate) fn skipped(&mut self, hooks: &[Hook]) {
        for kind in HookKind::ALL {
            let there = hooks.iter().filter(|hook| hook.kind == kind).count() as u64;
            // Of the kinds that were never allowed there is nothing to see.
            if there > 0 || self.skipped.contains(&kind) {
                gauge!("fastswan_skipped_hooks", "kind" => kind.name()).set(float(there));
                self.skipped.insert(kind);
            }
        }
    }

    pub(crate) fn look(&mut self, moment: &Moment) {
        let mut fast = 0;
        let mut in_kernel: BTreeMap<&'static str, u64> =
            self.reasons.iter().map(|reason| (*reason, 0)).collect();
        let mut total = self.retired;
        for (state, traffic) in &moment.policies {
            match state {
                PolicyState::Fast => fast += 1,
                PolicyState::Pass(reason) => *in_kernel.entry(reason.name()).or_default() += 1,
            }
            total.packets += traffic.packets;
            total.bytes += traffic.bytes;
        }
        gauge!("fastswan_policies", "state" => "fast", "reason" => "").set(float(fast));
        for (reason, policies) in in_kernel {
            gauge!("fastswan_policies", "state" => "kernel", "reason" => reason).set(float(policies));
            self.reasons.insert(reason);
        }
        gauge!("fastswan_software_policies").set(float(moment.software_policies));
        for (what, Room { used, limit }) in &moment.room {
            gauge!("fastswan_table_used", "what" => *what).set(float(*used as u64));
            gauge!("fastswan_table_limit", "what" => *what).set(float(*limit as u64));
        }
        gauge!("fastswan_associations").set(float(moment.associations as u64));
        gauge!("fastswan_queued_events").set(float(moment.queued as u64));
        counter!("fastswan_fast_packets_total").absolute(total.packets);
        counter!("fastswan_fast_bytes_total").absolute(total.bytes);
        counter!("fastswan_fib_asked_total").absolute(moment.asked.asked);
        counter!("fastswan_fib_differs_total").absolute(moment.asked.differs);
        let NeighbourCounts { resolved, unresolved } = moment.neighbours;
        for (state, neighbours) in [("resolved", resolved), ("unresolved", unresolved)] {
            gauge!("fastswan_neighbours", "state" => state).set(float(neighbours as u64));
        }
        counter!("fastswan_solicitations_total").absolute(moment.solicitations);
        counter!("fastswan_failed_solicitations_total").absolute(moment.failed_solicitations);
        for (reason, packets) in &moment.passes {
            counter!("fastswan_passed_packets_total", "reason" => reason.name()).absolute(*packets);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
fn float(number: u64) -> f64 {
    number as f64
}

fn describe() {
    describe_gauge!("fastswan_policies", "packet-offloaded outbound policies by state and reason");
    describe_gauge!("fastswan_software_policies", "outbound policies that are not packet-offloaded");
    describe_gauge!(
        "fastswan_table_used",
        "what the table holds: slots, and cells and exceptions of each family"
    );
    describe_gauge!("fastswan_table_limit", "what the table has room for, likewise");
    describe_gauge!("fastswan_associations", "security associations");
    describe_gauge!(
        "fastswan_current",
        "1 while the fast path is on: every input is current, and no kill switch is on"
    );
    describe_gauge!(
        "fastswan_skipped_hooks",
        "hooks that fast packets skip, as the embedder allows, by kind"
    );
    describe_gauge!("fastswan_queued_events", "events that the source holds and the loop has not read");
    describe_counter!("fastswan_fast_packets_total", "packets forwarded at XDP");
    describe_counter!(
        "fastswan_fast_bytes_total",
        Unit::Bytes,
        "bytes forwarded at XDP, from the IP header on"
    );
    describe_counter!("fastswan_passed_packets_total", "packets passed to the kernel by reason");
    describe_counter!("fastswan_fib_asked_total", "packets that the kernel's own routes were asked about");
    describe_counter!("fastswan_fib_differs_total", "packets that the kernel's own routes disagreed about");
    describe_gauge!("fastswan_neighbours", "neighbours that policies depend on by whether they are resolved");
    describe_counter!("fastswan_solicitations_total", "times that a neighbour was to be found or kept");
    describe_counter!(
        "fastswan_failed_solicitations_total",
        "requests to find or to keep a neighbour that failed"
    );
    describe_counter!("fastswan_events_total", "events applied");
    describe_counter!("fastswan_stale_total", "times that a source lost track by input and cause");
    describe_counter!("fastswan_resyncs_total", "snapshots applied by input and what made them necessary");
    describe_counter!("fastswan_audit_repairs_total", "policies and associations that an audit repaired");
    describe_counter!("fastswan_lease_expiries_total", "renewals of the lease that came too late");
    describe_counter!("fastswan_guard_shut_total", "times that the guard has shut the fast path");
    describe_histogram!(
        "fastswan_guard_open_seconds",
        Unit::Seconds,
        "from noticing that the guard has shut the fast path to opening it"
    );
    describe_counter!("fastswan_table_writes_total", "updates written to the table");
    describe_counter!("fastswan_table_changes_total", "changes in the updates written to the table");
    describe_histogram!("fastswan_batch_events", "events applied before the table was written");
    describe_histogram!(
        "fastswan_compile_seconds",
        Unit::Seconds,
        "from a batch applied to its table update"
    );
    describe_histogram!(
        "fastswan_lag_seconds",
        Unit::Seconds,
        "from the first event of a batch out of the source to all of it in the table"
    );
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use metrics_util::debugging::{DebugValue, DebuggingRecorder};
    use tokio::time::{advance, sleep};

    use super::*;
    use crate::{
        ChannelSource, Gateway, MemoryTable, PolicyEvent, PolicySource as _, SecurityAssociation, Selector,
        StaticSource, VouchedHost,
        policy::{Egress, NextHop},
        source::{Snapshot, StaleCause, channel::PolicySender, fixed::StaticPolicy},
        table::TableConfig,
    };

    const LEASE: Duration = Duration::from_secs(1);

    /// What a recorder has been told since the last look: histograms as the number of values.
    struct Scrape(BTreeMap<String, f64>);

    impl Scrape {
        /// Counters and gauges begin at zero again.
        fn take(recorder: &DebuggingRecorder) -> Self {
            let all = recorder.snapshotter().snapshot().into_vec().into_iter().map(|(key, _, _, value)| {
                let labels = key.key().labels().map(|label| format!(" {}={}", label.key(), label.value()));
                let value = match value {
                    DebugValue::Counter(count) => float(count),
                    DebugValue::Gauge(value) => value.into_inner(),
                    DebugValue::Histogram(values) => float(values.len() as u64),
                };
                (key.key().name().to_owned() + &labels.collect::<String>(), value)
            });
            Self(all.collect())
        }

        #[track_caller]
        fn expect(&self, expected: &[(&str, u64)]) {
            for (name, value) in expected {
                let found = self.0.get(&format!("fastswan_{name}"));
                assert_eq!(found, Some(&float(*value)), "{name} in {:#?}", self.0);
            }
        }
    }

    /// A gateway of one tunnel.
    struct Host {
        gateway: Gateway<ChannelSource, VouchedHost, MemoryTable>,
        sender: PolicySender,
        snapshot: Snapshot,
    }

    impl Host {
        /// Follows all that was sent.
        async fn follow(&mut self) {
            self.gateway.run_until(sleep(Duration::from_millis(10))).await.unwrap();
        }

        async fn hear(&mut self, event: PolicyEvent) {
            self.sender.send(event).await.unwrap();
            self.follow().await;
        }
    }

    fn story<F: Future<Output = ()>>(recorder: &DebuggingRecorder, tell: impl FnOnce(Host) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        metrics::with_local_recorder(recorder, || {
            runtime.unwrap().block_on(async {
                let mut source = StaticSource::new(&[StaticPolicy::new(
                    selector(),
                    7,
                    "192.0.2.1".parse().unwrap(),
                    "192.0.2.2".parse().unwrap(),
                )
                .priority(100)
                .egress(Egress { next_hop: NextHop::Device, max_length: Some(1400) })]);
                let Some(PolicyEvent::Snapshot(mut snapshot)) = source.next_event().await.unwrap() else {
                    panic!()
                };
                for policy in &mut snapshot.policies {
                    let overhead = policy.assumed.take();
                    let sa = SecurityAssociation::for_template(&policy.templates[0], 0x100);
                    snapshot.sas.push(SecurityAssociation { offload: policy.offload, overhead, ..sa });
                }
                let (sender, source) = ChannelSource::new(snapshot.clone(), 8);
                let config = TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 8 };
                let gateway = Gateway::new(source, VouchedHost::new(), MemoryTable::new(&config));
                tell(Host { gateway: gateway.with_lease(LEASE), sender, snapshot }).await;
            });
        });
    }

    fn selector() -> Selector {
        Selector::between("10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()).unwrap()
    }

    #[test]
    fn what_a_gateway_does_is_counted() {
        let recorder = DebuggingRecorder::new();
        story(&recorder, async |mut host| {
            host.gateway.record_now();
            let before = Scrape::take(&recorder);
            before.expect(&[("current", 0), ("queued_events", 1), ("associations", 0)]);

            host.follow().await;
            host.gateway.record_now();
            let first = Scrape::take(&recorder);
            first.expect(&[
                ("resyncs_total input=policies cause=start", 1),
                ("events_total", 1),
                ("table_writes_total", 1),
            ]);
            first.expect(&[("batch_events", 1), ("compile_seconds", 1), ("lag_seconds", 1)]);
            first.expect(&[("current", 1), ("queued_events", 0), ("associations", 1)]);
            first.expect(&[("policies state=fast reason=", 1)]);
            assert!(first.0["fastswan_table_changes_total"] >= 2.0, "a cell and a slot");

            let sa = host.snapshot.sas[0].clone();
            host.hear(PolicyEvent::SaRemoved(sa.id)).await;
            host.gateway.record_now();
            let without = Scrape::take(&recorder);
            without.expect(&[("policies state=fast reason=", 0), ("policies state=kernel reason=no_sa", 1)]);
            without.expect(&[
                ("associations", 0),
                ("resyncs_total input=policies cause=start", 0),
                ("lag_seconds", 1),
            ]);

            host.hear(PolicyEvent::Sa(sa)).await;
            // The recorder forgets gauges when it is looked at; a real one would still say so.
            gauge!("fastswan_policies", "state" => "kernel", "reason" => "no_sa").set(1.0);
            host.gateway.record_now();
            let again = Scrape::take(&recorder);
            again.expect(&[("policies state=fast reason=", 1), ("policies state=kernel reason=no_sa", 0)]);
        });
    }

    #[test]
    fn losing_track_and_finding_it_again_is_counted_by_cause() {
        let recorder = DebuggingRecorder::new();
        story(&recorder, async |mut host| {
            host.follow().await;
            host.hear(PolicyEvent::Stale(StaleCause::Overrun)).await;
            host.gateway.record_now();
            let lost = Scrape::take(&recorder);
            lost.expect(&[("stale_total input=policies cause=overrun", 1), ("current", 0)]);
            lost.expect(&[("policies state=kernel reason=disabled", 1)]);

            let snapshot = PolicyEvent::Snapshot(host.snapshot.clone());
            host.hear(snapshot.clone()).await;
            host.hear(snapshot).await;
            host.gateway.record_now();
            let found = Scrape::take(&recorder);
            found.expect(&[
                ("resyncs_total input=policies cause=overrun", 1),
                ("resyncs_total input=policies cause=snapshot", 1),
            ]);
            found.expect(&[("stale_total input=policies cause=overrun", 0), ("current", 1)]);
            let status = host.gateway.status();
            assert_eq!(status.statistics.resyncs, [("overrun", 1), ("snapshot", 1), ("start", 1)].into());
            assert!(status.to_string().contains("policies read, overrun: 1\n"), "{status}");
        });
    }

    #[test]
    fn a_gateway_that_has_failed_is_not_current() {
        let recorder = DebuggingRecorder::new();
        story(&recorder, async |mut host| {
            // Not looked at: the recorder forgets gauges then.
            host.follow().await;
            drop(host.sender);
            host.gateway.run_until(sleep(Duration::from_millis(10))).await.unwrap_err();
            Scrape::take(&recorder).expect(&[("current", 0)]);
        });
    }

    #[test]
    fn what_an_audit_repaired_is_counted() {
        let recorder = DebuggingRecorder::new();
        story(&recorder, async |mut host| {
            host.follow().await;
            host.hear(PolicyEvent::Audit(host.snapshot.clone())).await;
            assert_eq!(Scrape::take(&recorder).0.get("fastswan_audit_repairs_total"), None);
            host.hear(PolicyEvent::Audit(Snapshot::default())).await;
            host.gateway.record_now();
            let repaired = Scrape::take(&recorder);
            repaired.expect(&[("audit_repairs_total", 2), ("resyncs_total input=policies cause=start", 0)]);
            repaired.expect(&[("associations", 0), ("policies state=fast reason=", 0)]);
            let status = host.gateway.status();
            assert_eq!(status.statistics.audit_repairs, 2);
            assert!(status.to_string().contains("repaired by audits: 2\n"), "{status}");
        });
    }

    #[test]
    fn a_lease_that_ran_out_is_counted_unless_everything_passed_anyway() {
        let recorder = DebuggingRecorder::new();
        let expiries = || Scrape::take(&recorder).0.get("fastswan_lease_expiries_total").copied();
        story(&recorder, async |mut host| {
            host.follow().await;
            for _ in 0..8 {
                host.gateway.run_until(sleep(LEASE / 4)).await.unwrap();
            }
            assert_eq!(expiries(), None, "renewed in time");
            advance(LEASE * 2).await;
            host.follow().await;
            assert_eq!(expiries(), Some(1.0));
            let status = host.gateway.status();
            assert_eq!(status.statistics.lease_expiries, 1);
            assert!(status.to_string().contains("lease expired: 1\n"), "{status}");

            host.hear(PolicyEvent::Stale(StaleCause::Requested)).await;
            advance(LEASE * 2).await;
            let snapshot = host.snapshot.clone();
            host.hear(PolicyEvent::Snapshot(snapshot)).await;
            assert_eq!(expiries(), Some(0.0));
        });
    }

    #[test]
    fn fast_traffic_goes_on_counting_when_a_policy_is_gone() {
        let recorder = DebuggingRecorder::new();
        let traffic = Traffic { packets: 5, bytes: 700 };
        let moment = |policies| Moment {
            policies,
            software_policies: 0,
            room: BTreeMap::new(),
            passes: vec![(PassReason::Fragment, 9)],
            asked: Asked { asked: 4, differs: 1 },
            neighbours: NeighbourCounts { resolved: 2, unresolved: 1 },
            solicitations: 12,
            failed_solicitations: 3,
            associations: 0,
            queued: 0,
        };
        metrics::with_local_recorder(&recorder, || {
            let mut meters = Meters::new();
            meters.retired(traffic);
            meters.look(&moment(vec![(PolicyState::Fast, Traffic { packets: 2, bytes: 300 })]));
        });
        let scrape = Scrape::take(&recorder);
        scrape.expect(&[("fast_packets_total", 7), ("fast_bytes_total", 1000)]);
        scrape.expect(&[("passed_packets_total reason=fragment", 9)]);
        scrape.expect(&[("fib_asked_total", 4), ("fib_differs_total", 1)]);
        scrape.expect(&[("neighbours state=resolved", 2), ("neighbours state=unresolved", 1)]);
        scrape.expect(&[("solicitations_total", 12), ("failed_solicitations_total", 3)]);
    }

    #[test]
    fn each_metric_in_the_table_is_described_and_the_other_way_round() {
        let table = include_str!("mod.rs").lines().filter_map(|line| line.strip_prefix("//! | `"));
        let in_table: BTreeSet<_> = table.filter_map(|row| row.split('`').next()).collect();
        let described = include_str!("recorded.rs").split("fn describe() {").nth(1).unwrap();
        let described = described.split("#[cfg(test)]").next().unwrap().split('"');
        let described: BTreeSet<_> = described.filter(|text| text.starts_with("fastswan_")).collect();
        assert_eq!(in_table, described);
        assert!(in_table.len() > 10);
    }

    #[test]
    fn hooks_that_are_skipped_are_counted_by_kind_until_they_are_gone() {
        let recorder = DebuggingRecorder::new();
        metrics::with_local_recorder(&recorder, || {
            let hook =
                |kind| Hook { kind, place: crate::host::HookPlace::Forwarding(None), name: String::new() };
            let mut meters = Meters::new();
            meters.skipped(&[HookKind::NfTables, HookKind::NfTables, HookKind::Conntrack].map(hook));
            let scrape = Scrape::take(&recorder);
            scrape.expect(&[("skipped_hooks kind=nf_tables", 2), ("skipped_hooks kind=conntrack", 1)]);
            assert!(!scrape.0.contains_key("fastswan_skipped_hooks kind=tc"), "never there");
            meters.skipped(&[]);
            Scrape::take(&recorder).expect(&[("skipped_hooks kind=nf_tables", 0)]);
        });
    }
}
