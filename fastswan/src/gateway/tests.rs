//! What the driver adds to the mirror: reading, asking, settling, answering.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use fastswan_ebpf::PassReason;
use tokio::time::{sleep, timeout};

use super::*;
use crate::{
    ChannelSource, MemoryTable, Policy, Selector, Snapshot, StaticSource, VouchedHost,
    compiler::PolicyState,
    event::StaleCause,
    host::Link,
    mirror::{HoldTarget, InterfaceState},
    policy::{Direction, Egress, MacAddr, NextHop, PolicyId, PolicyType},
    source::{channel::PolicySender, fixed::StaticPolicy},
    table::{Capacity, Port, ReadBack as _, Removals, Slot, TableConfig, Verdict},
};

const PATIENCE: Duration = Duration::from_secs(5);

/// What a guard has counted, and what a table was told.
#[derive(Clone, Debug, Default)]
struct Seen {
    begun: Arc<AtomicU64>,
    acknowledged: Arc<AtomicU64>,
    is_on: Arc<AtomicBool>,
    fails: Arc<AtomicBool>,
    /// Milliseconds that it takes to write the table.
    takes: Arc<AtomicU64>,
    takes_no_redirects: Arc<AtomicBool>,
}

impl Seen {
    fn begin_removal(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    fn removals(&self) -> Removals {
        let [begun, acknowledged] =
            [&self.begun, &self.acknowledged].map(|number| number.load(Ordering::Relaxed));
        Removals { begun, acknowledged }
    }

    fn is_shut(&self) -> bool {
        self.removals().begun != self.removals().acknowledged
    }

    fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }
}

/// A kernel that notifies of nothing before it is waited for.
#[derive(Clone, Debug, Default)]
struct Kernel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    told: VecDeque<PolicyEvent>,
    to_tell: Vec<PolicyEvent>,
    /// Removals that begin while it is waited for.
    meanwhile: u64,
    seen: Seen,
    /// It says that it has caught up.
    says_so: bool,
    written: usize,
}

impl Kernel {
    fn tell(&self, event: PolicyEvent) {
        self.0.lock().unwrap().told.push_back(event);
    }
}

#[async_trait]
impl PolicySource for Kernel {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        let told = self.0.lock().unwrap().told.pop_front();
        match told {
            Some(event) => Ok(Some(event)),
            None => pending().await,
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        let state = self.0.lock().unwrap();
        Ok(state.told.is_empty() && state.says_so)
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        let state = self.0.clone();
        async move {
            sleep(Duration::from_millis(3)).await;
            let mut state = state.lock().unwrap();
            let to_tell = std::mem::take(&mut state.to_tell);
            state.told.extend(to_tell);
            for _ in 0..std::mem::take(&mut state.meanwhile) {
                state.seen.begin_removal();
            }
            Ok(())
        }
        .boxed()
    }

    fn written(&mut self) {
        self.0.lock().unwrap().written += 1;
    }
}

/// A table with such a guard.
#[derive(Debug)]
struct Guarded {
    table: MemoryTable,
    seen: Seen,
}

impl OffloadTable for Guarded {
    fn apply(&mut self, update: &TableUpdate) -> Result<(), TableError> {
        if self.seen.fails.load(Ordering::Relaxed) {
            return Err(TableError::NoSuchSlot { slot: Slot(0), limit: 0 });
        }
        std::thread::sleep(Duration::from_millis(self.seen.takes.load(Ordering::Relaxed)));
        self.table.apply(update)
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.seen.is_on.store(enabled, Ordering::Relaxed);
        self.table.set_enabled(enabled);
    }

    fn renew_lease(&mut self, until: Instant) {
        self.table.renew_lease(until);
    }

    fn capacity(&self) -> Capacity {
        self.table.capacity()
    }

    fn removals(&self) -> Removals {
        self.seen.removals()
    }

    fn acknowledge(&mut self, removals: u64) {
        self.seen.acknowledged.store(removals, Ordering::Relaxed);
    }
}

impl Ports for Guarded {
    fn set_port(&mut self, port: &Port) -> Result<(), TableError> {
        self.table.set_port(port)
    }

    fn remove_port(&mut self, ifindex: u32, vlan: u16) {
        self.table.remove_port(ifindex, vlan);
    }

    fn port(&self, ifindex: u32, vlan: u16) -> Option<Port> {
        self.table.port(ifindex, vlan)
    }
}

impl TableCounters for Guarded {
    fn traffic(&self, slot: Slot) -> Traffic {
        self.table.traffic(slot)
    }

    fn passes(&self) -> Vec<(PassReason, u64)> {
        self.table.passes()
    }
}

impl Devices for Guarded {
    fn takes_redirects(&self, _: u32) -> bool {
        !self.seen.takes_no_redirects.load(Ordering::Relaxed)
    }
}

fn tunnel(number: u8) -> StaticPolicy {
    let net = |side: u8| format!("10.{side}.{number}.0/24").parse().unwrap();
    let egress = Egress { next_hop: NextHop::Device, max_length: Some(1400) };
    let selector = Selector::between(net(1), net(2)).unwrap();
    StaticPolicy::new(selector, 7, "192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap())
        .priority(100)
        .egress(egress)
}

async fn snapshot(tunnels: u8) -> PolicyEvent {
    let policies: Vec<_> = (0..tunnels).map(tunnel).collect();
    StaticSource::new(&policies).next_event().await.unwrap().unwrap()
}

/// A gateway of a few tunnels with a guard that has just been attached.
async fn gateway(tunnels: u8) -> (Gateway<Kernel, VouchedHost, Guarded>, Kernel, Seen) {
    let seen = Seen::default();
    seen.begin_removal();
    let state = State {
        told: [snapshot(tunnels).await].into(),
        seen: seen.clone(),
        says_so: true,
        ..State::default()
    };
    let kernel = Kernel(Arc::new(Mutex::new(state)));
    let config = TableConfig { cells_v4: 1024, cells_v6: 64, exceptions: 16, slots: 256 };
    let table = Guarded { table: MemoryTable::new(&config), seen: seen.clone() };
    (Gateway::new(kernel.clone(), VouchedHost::new(), table), kernel, seen)
}

fn is_fast(gateway: &Gateway<Kernel, VouchedHost, Guarded>, number: u8) -> bool {
    let [source, destination] = [1, 2].map(|side| [10, side, number, 9].into());
    match gateway.table().table.verdict(source, destination) {
        Some(Verdict::Fast { slot, .. }) => matches!(gateway.table().table.standing(slot), Some(Ok(_))),
        _ => false,
    }
}

fn id(number: u8) -> PolicyId {
    PolicyId::new(Direction::Out, tunnel(number).selector)
}

async fn run(gateway: &mut Gateway<Kernel, VouchedHost, Guarded>) {
    gateway.run_until(sleep(LOOK_FOR_REMOVALS * 4)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn after_a_removal_the_fast_path_opens_when_the_table_holds_what_follows_from_it() {
    let (mut gateway, kernel, seen) = gateway(1).await;
    run(&mut gateway).await;
    assert!(is_fast(&gateway, 0) && !seen.is_shut(), "what began before is caught up with");

    seen.begin_removal();
    kernel.0.lock().unwrap().to_tell.push(PolicyEvent::PoliciesFlushed(PolicyType::Main));
    run(&mut gateway).await;
    assert!(!is_fast(&gateway, 0) && !seen.is_shut());
    assert_eq!(gateway.mirror().statistics().times_shut, 2);
}

#[tokio::test(start_paused = true)]
async fn what_begins_while_the_kernel_settles_is_settled_again() {
    let (mut gateway, kernel, seen) = gateway(1).await;
    run(&mut gateway).await;
    seen.begin_removal();
    kernel.0.lock().unwrap().meanwhile = 1;
    run(&mut gateway).await;
    assert_eq!(seen.removals(), Removals { begun: 3, acknowledged: 3 });
    assert_eq!(gateway.mirror().statistics().times_shut, 3);
}

#[tokio::test(start_paused = true)]
async fn it_stays_shut_while_the_source_has_lost_track() {
    let (mut gateway, kernel, seen) = gateway(1).await;
    run(&mut gateway).await;
    seen.begin_removal();
    kernel.0.lock().unwrap().to_tell.push(PolicyEvent::Stale(StaleCause::DeviceLost(7)));
    run(&mut gateway).await;
    assert!(seen.is_shut() && !seen.is_on());
    kernel.tell(snapshot(1).await);
    run(&mut gateway).await;
    assert!(is_fast(&gateway, 0) && !seen.is_shut() && seen.is_on());
}

/// What could not be written is not in the table, whatever is written afterwards.
#[tokio::test(start_paused = true)]
async fn after_a_table_has_failed_everything_passes_and_the_parts_come_back() {
    let (mut gateway, kernel, seen) = gateway(1).await;
    run(&mut gateway).await;
    let mut states = gateway.handle().watch();
    assert!(seen.is_on() && states.state().is_on);
    seen.fails.store(true, Ordering::Relaxed);
    kernel.tell(PolicyEvent::PoliciesFlushed(PolicyType::Main));
    let error = gateway.run_until(pending()).await.unwrap_err();
    assert!(matches!(error, GatewayError::Table(_)), "{error}");
    assert!(!seen.is_on() && states.state().has_ended);

    seen.fails.store(false, Ordering::Relaxed);
    let again = gateway.run_until(sleep(PATIENCE)).await.unwrap_err();
    assert!(matches!(again, GatewayError::Failed), "{again}");
    let Parts { table, .. } = gateway.into_parts().unwrap();
    assert!(
        matches!(table.table.standing(Slot(0)), Some(Ok(_))),
        "the slot is as it was, and nobody reads it"
    );
    assert!(!seen.is_on());
}

/// The future of a plain channel is pending once the runtime has had enough, whatever the channel holds.
#[tokio::test(start_paused = true)]
async fn nothing_is_fast_before_a_source_says_that_it_has_told_everything() {
    let (mut gateway, kernel, seen) = gateway(1).await;
    kernel.0.lock().unwrap().says_so = false;
    gateway.run_until(sleep(PATIENCE)).await.unwrap();
    assert!(is_fast(&gateway, 0) && !seen.is_on(), "it is in the table, and the table is off");
    kernel.0.lock().unwrap().says_so = true;
    gateway.run_until(sleep(PATIENCE)).await.unwrap();
    assert!(seen.is_on());
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_begins_with_its_kill_switch_on_is_off_until_it_is_told_otherwise() {
    let (gateway, _kernel, seen) = gateway(1).await;
    let mut gateway = gateway.with_kill_switch(true);
    gateway.synchronise().await.unwrap();
    assert!(is_fast(&gateway, 0) && !seen.is_on(), "it is in the table, and the table is off");
    let handle = gateway.handle();
    gateway.run_until(async { handle.set_kill_switch(false).await.unwrap() }).await.unwrap();
    assert!(seen.is_on());
}

#[tokio::test(start_paused = true)]
async fn a_source_is_told_when_all_that_it_said_is_in_the_table() {
    let (mut gateway, kernel, _) = gateway(1).await;
    gateway.synchronise().await.unwrap();
    assert!(kernel.0.lock().unwrap().written > 0);
}

#[tokio::test(start_paused = true)]
async fn a_handle_tells_what_became_of_each_policy_and_of_those_that_are_gone() {
    let (mut gateway, kernel, seen) = gateway(3).await;
    let handle = gateway.handle();
    gateway
        .run_until(async {
            sleep(PATIENCE).await;
            let status = handle.status().await.unwrap();
            assert_eq!((status.policies.len(), status.fast_policies()), (3, 3), "{status}");
            assert!(status.state.is_on && status.removed.is_empty());

            kernel.tell(PolicyEvent::PolicyRemoved(id(1)));
            sleep(PATIENCE).await;
            let status = handle.status().await.unwrap();
            assert_eq!(status.policies.iter().map(|policy| &policy.id).collect::<Vec<_>>(), [&id(0), &id(2)]);
            assert_eq!(status.removed, [RemovedPolicy { id: id(1), traffic: Traffic::default() }]);
            assert_eq!(handle.status().await.unwrap().removed, [], "only once");

            handle.set_kill_switch(true).await.unwrap();
            assert!(!seen.is_on());
            let status = handle.status().await.unwrap();
            assert_eq!(status.totals.into_iter().collect::<Vec<_>>(), [(PassReason::Disabled.name(), 2)]);
            handle.set_kill_switch(false).await.unwrap();
            assert!(seen.is_on());

            seen.takes_no_redirects.store(true, Ordering::Relaxed);
            let status = handle.status().await.unwrap();
            let state = PolicyState::Pass(PassReason::EgressUnavailable);
            assert!(status.policies.iter().all(|policy| policy.state == state), "{status}");
        })
        .await
        .unwrap();
    drop(gateway);
    assert!(matches!(handle.status().await, Err(HandleError::Ended)));
}

#[tokio::test(start_paused = true)]
async fn a_status_tells_what_is_not_offloaded_how_full_the_table_is_and_that_nothing_comes_in() {
    let (gateway, kernel, _) = gateway(3).await;
    let mut gateway = gateway.with_interface("lan0");
    let bypass = Selector::between("10.9.0.0/24".parse().unwrap(), "10.8.0.0/24".parse().unwrap()).unwrap();
    kernel.tell(PolicyEvent::Policy(Policy::new(PolicyId::new(Direction::Out, bypass))));
    gateway.synchronise().await.unwrap();
    let status = gateway.status();
    assert_eq!((status.policies.len(), status.software_policies), (3, 1), "{status}");
    let used = |what| (status.room[what].used, status.room[what].limit);
    assert_eq!([used("slots"), used("cells_v4"), used("cells_v6")], [(3, 256), (4, 1024), (0, 64)]);
    let unattached = "no interface is attached: all packets pass";
    assert_eq!(status.state.obstacles, [unattached]);
    assert_eq!(gateway.handle().watch().state().obstacles, [unattached]);
    assert_eq!(status.totals.into_iter().collect::<Vec<_>>(), [(PassReason::UnknownPort.name(), 3)]);
}

#[tokio::test(start_paused = true)]
async fn a_hold_is_in_effect_when_it_returns_and_ends_with_its_release() {
    let (mut gateway, kernel, seen) = gateway(2).await;
    gateway.synchronise().await.unwrap();
    let handle = gateway.handle();
    let mut held = None;
    gateway
        .run_until(async { held = timeout(PATIENCE, handle.hold(HoldTarget::Policy(id(1)))).await.ok() })
        .await
        .unwrap();
    let held = held.unwrap().unwrap();
    assert!(is_fast(&gateway, 0) && !is_fast(&gateway, 1) && seen.is_on());

    // Whatever the source says of it.
    kernel.tell(snapshot(2).await);
    gateway.run_until(sleep(PATIENCE)).await.unwrap();
    assert!(is_fast(&gateway, 0) && !is_fast(&gateway, 1));

    gateway.run_until(async { assert!(handle.release(held).await.unwrap()) }).await.unwrap();
    gateway.synchronise().await.unwrap();
    assert!(is_fast(&gateway, 1));
    gateway.run_until(async { assert!(!handle.release(held).await.unwrap()) }).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hold_of_addresses_keeps_all_policies_that_overlap_from_being_fast_also_later_ones() {
    let (mut gateway, kernel, _) = gateway(2).await;
    gateway.synchronise().await.unwrap();
    let handle = gateway.handle();
    let target = Selector::between("10.1.1.0/24".parse().unwrap(), "10.2.0.0/16".parse().unwrap()).unwrap();
    gateway
        .run_until(async { assert!(handle.hold(HoldTarget::Selector(target)).await.is_ok()) })
        .await
        .unwrap();
    assert!(is_fast(&gateway, 0) && !is_fast(&gateway, 1));
    kernel.tell(snapshot(0).await);
    kernel.tell(snapshot(2).await);
    gateway.run_until(sleep(PATIENCE)).await.unwrap();
    assert!(is_fast(&gateway, 0) && !is_fast(&gateway, 1));
}

/// Host facts are asked for, and what is not known of the host makes nothing fast.
#[tokio::test(start_paused = true)]
async fn nothing_is_fast_while_the_host_is_not_known() {
    #[derive(Debug)]
    struct Host(Arc<Mutex<VecDeque<HostEvent>>>);

    #[async_trait]
    impl HostSource for Host {
        async fn next_event(&mut self) -> Result<Option<HostEvent>, crate::host::HostError> {
            let told = self.0.lock().unwrap().pop_front();
            match told {
                Some(event) => Ok(Some(event)),
                None => pending().await,
            }
        }

        fn caught_up(&mut self) -> Result<bool, crate::host::HostError> {
            Ok(self.0.lock().unwrap().is_empty())
        }
    }

    let seen = Seen::default();
    let config = TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 16 };
    let table = Guarded { table: MemoryTable::new(&config), seen: seen.clone() };
    let told = Arc::new(Mutex::new(VecDeque::new()));
    let mut gateway = Gateway::new(StaticSource::new(&[tunnel(0)]), Host(told.clone()), table);
    let tell = |event| told.lock().unwrap().push_back(event);
    let facts = crate::HostFacts::vouched;
    for (event, is_on) in [
        (None, false),
        (Some(HostEvent::Snapshot(facts())), true),
        (Some(HostEvent::Stale(crate::host::HostStaleCause::Changed)), false),
        (Some(HostEvent::Snapshot(facts())), true),
    ] {
        event.into_iter().for_each(tell);
        gateway.run_until(sleep(PATIENCE)).await.unwrap();
        assert_eq!(seen.is_on(), is_on);
    }
    assert_eq!(gateway.mirror().statistics().host_resyncs.len(), 2);
}

/// A policy source whose embedder has gone.
fn gateway_that_will_fail() -> (Gateway<ChannelSource, VouchedHost, MemoryTable>, PolicySender) {
    let (sender, source) = ChannelSource::new(Snapshot::default(), 8);
    (Gateway::new(source, VouchedHost::new(), MemoryTable::new(&TableConfig::default())), sender)
}

#[tokio::test(start_paused = true)]
async fn a_handle_of_a_gateway_that_has_failed_is_told_so() {
    let (mut gateway, sender) = gateway_that_will_fail();
    let handle = gateway.handle();
    // Those that wait: what was asked before, and more than the queue has room for.
    let mut waiting: FuturesUnordered<_> = (0..200).map(|_| handle.status()).collect();
    assert!(waiting.next().now_or_never().is_none());
    drop(sender);
    gateway.run_until(pending()).await.unwrap_err();
    let refused = timeout(PATIENCE, waiting.by_ref().collect::<Vec<_>>()).await.unwrap();
    assert!(refused.iter().all(|answer| matches!(answer, Err(HandleError::Failed))), "{refused:?}");

    let hold = timeout(PATIENCE, handle.hold(HoldTarget::Policy(id(0)))).await.unwrap();
    assert!(matches!(hold, Err(HandleError::Failed)), "{hold:?}");
    gateway.run_until(pending()).await.unwrap_err();
    drop(gateway);
    assert!(matches!(handle.status().await, Err(HandleError::Failed)), "that it was dropped then is no news");
}

/// As an embedder writes it: the loop, a daemon that holds before it removes, and one that watches.
#[tokio::test(start_paused = true)]
async fn those_who_run_beside_a_gateway_that_fails_end_too() {
    let (mut gateway, sender) = gateway_that_will_fail();
    let (handle, mut watch) = (gateway.handle(), gateway.handle().watch());
    let daemon = async {
        sleep(Duration::from_millis(50)).await;
        drop(sender);
        sleep(Duration::from_millis(50)).await;
        handle.hold(HoldTarget::Policy(id(0))).await
    };
    let watching = async {
        let mut last = watch.state();
        while let Some(state) = watch.changed().await {
            last = state;
        }
        last
    };
    let all = async { tokio::join!(gateway.run_until(pending()), daemon, watching) };
    let (ran, held, last) = timeout(PATIENCE, all).await.expect("they wait for ever");
    assert!(matches!(ran, Err(GatewayError::Source(_))));
    assert!(matches!(held, Err(HandleError::Failed)));
    assert!(last.has_ended && !last.is_on);
}

/// A program that it takes over from would be fast meanwhile.
#[tokio::test]
async fn a_program_is_not_attached_while_the_lease_is_over_since_writing_the_table_took_longer() {
    let (gateway, _, seen) = gateway(1).await;
    seen.takes.store(200, Ordering::Relaxed);
    let Parts { source, table, .. } = gateway.into_parts().unwrap();
    let link = Link {
        ifindex: 3,
        name: "lan0".to_owned(),
        address: Some(MacAddr([2, 0, 0, 0, 0, 1])),
        mtu: 1500,
        up: true,
        carrier: true,
        ..Link::default()
    };
    let mut gateway = Gateway::new(source, VouchedHost::with_links(vec![link]), table)
        .with_lease(Duration::from_millis(100))
        .with_interface("lan0");
    let state = |gateway: &mut Gateway<_, _, _>| gateway.status().interfaces[0].state.clone();
    gateway.synchronise().await.unwrap();
    assert_eq!(state(&mut gateway), InterfaceState::Waiting);
    while state(&mut gateway) == InterfaceState::Waiting {
        gateway.run_until(sleep(Duration::from_millis(10))).await.unwrap();
    }
    assert_eq!(state(&mut gateway), InterfaceState::Attached { vlans: vec![0] });
}
