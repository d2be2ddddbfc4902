//! What is judged: a mirror of fixed policies that follows the host, and the program that it writes for.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use fastswan::{
    HostEvent, HostSource, NetlinkHost, OffloadTable as _, PassReason, Policy, PolicyEvent, Snapshot,
    forwarder::RunAction,
    mirror::{Action, Input, InputState, Mirror},
    table::{Devices as _, Ports as _, TableConfig},
};
use tokio::{runtime::Runtime, time::timeout};

use super::{
    mutant::{HostMutant, Lying},
    packet::Packet,
    tunnels::Tunnel,
    world::{Device, World},
};
use crate::prog_run::ProgRun;

const TABLE: TableConfig = TableConfig { cells_v4: 16_384, cells_v6: 16_384, exceptions: 1024, slots: 256 };
/// Of the mirror and of the table, so that none runs out.
const LEASE: Duration = Duration::from_secs(3600);
/// Nothing takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long an event is waited for before the source is asked again whether it has caught up.
const LOOK: Duration = Duration::from_millis(1);

/// What the program does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It forwards this frame.
    Fast(Vec<u8>),
    /// It leaves the packet to the kernel.
    Passed(PassReason),
}

/// A mirror that follows a world's gateway.
pub(super) struct Follower {
    runtime: Runtime,
    host: Box<dyn HostSource>,
    mirror: Mirror,
    program: ProgRun,
    lan: [u32; 2],
}

impl Follower {
    /// Begins to follow. Takes a thread that is on the gateway.
    pub(super) fn new(world: &World, tunnels: &[Tunnel], mutant: Option<HostMutant>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let host: Box<dyn HostSource> = {
            let _inside = runtime.enter();
            let host = NetlinkHost::open()?;
            match mutant {
                Some(how) => Box::new(Lying::new(host, how)),
                None => Box::new(host),
            }
        };
        let program = ProgRun::new(&TABLE)?;
        let mut mirror = Mirror::new(program.table.capacity(), LEASE);
        let policies = (1..)
            .zip(tunnels)
            .map(|(reqid, tunnel)| tunnel.policy(reqid, world.gateway.ifindex(tunnel.device.name())?));
        let policies: Vec<Policy> = policies.collect::<Result<_, _>>()?;
        let snapshot = Snapshot { policies, ..Snapshot::default() };
        mirror.handle_policy_event(PolicyEvent::Snapshot(snapshot), Instant::now());
        for port in Device::PORTS {
            mirror.follow_interface(port.name(), None);
        }
        let [lan0, lan1] = Device::PORTS.map(|port| world.gateway.ifindex(port.name()));
        Ok(Self { runtime, host, mirror, program, lan: [lan0?, lan1?] })
    }

    /// Follows the host for so long, and until the source has nothing more to tell and all of it is written. Returns
    /// whether that comes to pass; if not, the fast path is off.
    pub(super) fn follow(&mut self, at_least: Duration) -> anyhow::Result<bool> {
        let Self { runtime, host, mirror, program, .. } = self;
        let begin = Instant::now();
        runtime.block_on(async {
            loop {
                while let Ok(event) = timeout(LOOK, host.next_event()).await {
                    let event = event?.context("the host source has ended")?;
                    let is_fresh = !matches!(event, HostEvent::Stale(_));
                    mirror.handle_host_event(event, Instant::now());
                    act(mirror, program)?;
                    if is_fresh {
                        program.table.refresh_devices();
                    }
                }
                let asked = Instant::now();
                let has_caught_up = host.caught_up()?;
                if has_caught_up {
                    mirror.handle_caught_up(Input::Host, asked);
                    mirror.handle_caught_up(Input::Policies, asked);
                }
                mirror.handle_time(Instant::now(), SystemTime::now());
                act(mirror, program)?;
                let is_done = has_caught_up && mirror.is_written() && mirror.is_enabled();
                if is_done && begin.elapsed() >= at_least {
                    return Ok(true);
                }
                if begin.elapsed() > PATIENCE + at_least {
                    return Ok(false);
                }
            }
        })
    }

    /// How fresh what the host source has told is.
    pub(super) fn state(&self) -> InputState {
        self.mirror.input(Input::Host)
    }

    /// Runs the program on a packet.
    pub(super) fn run(&self, packet: &Packet) -> anyhow::Result<Verdict> {
        // The kernel runs no program for a device that is down, and nothing arrives there.
        let Ok(outcome) = self.program.run(&packet.frame(), self.lan[packet.port as usize]) else {
            return Ok(Verdict::Passed(PassReason::UnknownPort));
        };
        match (outcome.action, outcome.reason) {
            (RunAction::Pass, Some(reason)) => Ok(Verdict::Passed(reason)),
            (RunAction::Redirect, None) => Ok(Verdict::Fast(outcome.frame)),
            (action, reason) => bail!("the program does {action:?}, and counts {reason:?}"),
        }
    }
}

/// Does what the mirror wants done.
fn act(mirror: &mut Mirror, program: &mut ProgRun) -> anyhow::Result<()> {
    let table = &mut program.table;
    while let Some(action) = mirror.poll_action() {
        match action {
            Action::Disable => table.set_enabled(false),
            Action::Enable => table.set_enabled(true),
            Action::Write(update) => {
                table.apply(&update)?;
                mirror.handle_written(true);
            }
            Action::RemovePort { ifindex, vlan } => table.remove_port(ifindex, vlan),
            Action::SetPort(port) => table.set_port(&port)?,
            Action::Renew { until } => table.renew_lease(until),
            // Its frames are given to the program by hand.
            Action::Attach { interfaces } => {
                for ifindex in interfaces {
                    mirror.handle_attached(ifindex, Ok(()), Instant::now());
                }
            }
            _ => {}
        }
    }
    Ok(())
}
