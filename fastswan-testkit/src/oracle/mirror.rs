//! What is judged: the whole mirror, from a source to the XDP program. The only place that knows the compiler.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, bail, ensure};
use fastswan::{
    Compiler, Database, NetlinkHost, OffloadTable as _, PassReason, Policy, PolicyEvent, PolicySource,
    PolicySourceExt as _,
    compiler::BrokenRule,
    forwarder::RunAction,
    policy::{Direction, Egress, NextHop},
    source::StaleCause,
    table::{Ports as _, TableConfig},
};
use tokio::{
    runtime::Runtime,
    time::{Instant, timeout, timeout_at},
};

use super::{judge::Lab, nest::Nest, packets::Packet, sets::is_promoted};
use crate::{
    prog_run::ProgRun,
    promote::{Promote, named, naming},
};

/// Few slots, so that they are used again.
const TABLE: TableConfig = TableConfig { cells_v4: 16_384, cells_v6: 16_384, exceptions: 1024, slots: 256 };
/// Nothing takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an event is waited for before the source is asked again whether it has caught up.
const LOOK: Duration = Duration::from_millis(2);

/// A mirror of a judge's policies.
pub(super) struct Mirror {
    runtime: Runtime,
    open: Box<dyn FnMut() -> anyhow::Result<Box<dyn PolicySource>>>,
    source: Box<dyn PolicySource>,
    /// What the judge tells once comes in another number of events.
    is_adapted: bool,
    database: Database,
    compiler: Compiler,
    program: ProgRun,
    ingress: u32,
    /// The policies by the index that the judge gave them.
    by_index: HashMap<u32, Policy>,
}

/// What the program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It leaves by the outer device, for a policy whose tunnel has this reqid.
    Fast(u32),
    /// It leaves in a way that no policy asked for.
    Strange,
    /// It goes to the kernel.
    Passed(PassReason),
}

impl Mirror {
    /// Reads the host, and mirrors what a source, opened inside a runtime, says. Takes a thread that is on the
    /// gateway.
    ///
    /// Where policies are really offloaded, the kernel says which, and only their associations are assumed.
    pub(super) fn new<S: PolicySource + 'static>(
        lab: &Lab,
        mut open: impl FnMut() -> anyhow::Result<S> + 'static,
        nest: &Nest,
        broken: Option<BrokenRule>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let egress = lab.egress;
        let choose = if lab.offloads() { Policy::is_packet_offloaded } else { is_promoted };
        let is_adapted = !matches!(nest, Nest::Plain);
        let nest = nest.clone();
        let mut open = move || -> anyhow::Result<Box<dyn PolicySource>> {
            let source = nest.build(&mut || -> anyhow::Result<Box<dyn PolicySource>> {
                Ok(Box::new(Promote::new(open()?, egress, NextHop::Device, choose)))
            })?;
            Ok(Box::new(source.with_egress(|policy| match policy.templates[..] {
                // Of a frame that was forwarded, the address tells which tunnel it was for.
                [template] => Egress { next_hop: naming(template.reqid), ..policy.egress },
                _ => policy.egress,
            })))
        };
        let source = {
            let _inside = runtime.enter();
            open()?
        };
        let host = NetlinkHost::read_once()?;
        let mut program = ProgRun::new(&TABLE)?;
        let port = host.port(lab.ingress, 0).context("packets have no port to enter by")?;
        program.table.set_port(&port)?;
        let mut compiler = Compiler::new(program.table.capacity());
        compiler.set_host(&host);
        Ok(Self {
            runtime,
            open: Box::new(open),
            source,
            is_adapted,
            database: Database::default(),
            compiler: match broken {
                Some(rule) => compiler.with_broken_rule(rule),
                None => compiler,
            },
            program,
            ingress: lab.ingress,
            by_index: HashMap::new(),
        })
    }

    /// Loses track of the source, opens it once more, and goes by its snapshot.
    pub(super) fn start_over(&mut self) -> anyhow::Result<()> {
        self.database.apply(PolicyEvent::Stale(StaleCause::Overrun));
        {
            let _inside = self.runtime.enter();
            self.source = (self.open)()?;
        }
        self.follow(0)
    }

    /// Waits until the source has told so many changes, after its snapshot, and brings the program up to date.
    pub(super) fn follow(&mut self, changes: usize) -> anyhow::Result<()> {
        let Self { runtime, source, database, is_adapted, .. } = self;
        runtime.block_on(async {
            let deadline = Instant::now() + PATIENCE;
            if *is_adapted {
                return catch_up(source.as_mut(), database, deadline).await;
            }
            let mut told = 0;
            while told < changes || !database.is_current() {
                let event = timeout_at(deadline, source.next_event());
                let event = event.await.context("the source does not tell all changes")??;
                match event.context("the source has ended")? {
                    PolicyEvent::Stale(cause) => bail!("the source lost track: {cause:?}"),
                    event => {
                        let is_change = match event {
                            PolicyEvent::Snapshot(_) => database.is_current(),
                            PolicyEvent::Audit(_) | PolicyEvent::Sa(_) => false,
                            _ => true,
                        };
                        told += usize::from(is_change);
                        database.apply(event);
                    }
                }
            }
            ensure!(told == changes, "{told} changes were told instead of {changes}");
            Ok(())
        })?;
        let update = self.compiler.compile(&self.database);
        self.program.table.apply(&update)?;
        self.by_index = self.database.policies().map(|policy| (policy.index, policy.clone())).collect();
        Ok(())
    }

    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    /// The policy that the judge gave this index.
    pub(super) fn policy(&self, index: u32) -> Option<&Policy> {
        self.by_index.get(&index)
    }

    /// A policy whose tunnel has this reqid.
    pub(super) fn policy_of(&self, reqid: u32) -> Option<&Policy> {
        self.by_index.values().find(|policy| is_of(policy, reqid))
    }

    /// Runs the program on a packet.
    pub(super) fn run(&self, packet: &Packet) -> anyhow::Result<Fate> {
        let outcome = self.program.run(&packet.frame, self.ingress)?;
        Ok(match (outcome.action, outcome.reason, named(&outcome.frame)) {
            (RunAction::Pass, Some(reason), _) => Fate::Passed(reason),
            (RunAction::Redirect, None, Some(reqid)) => Fate::Fast(reqid),
            _ => Fate::Strange,
        })
    }
}

/// Applies all that a source has to tell. The kernel notifies before it answers, so that is all that the judge did.
async fn catch_up(
    source: &mut dyn PolicySource,
    database: &mut Database,
    deadline: Instant,
) -> anyhow::Result<()> {
    while !(source.caught_up()? && database.is_current()) {
        ensure!(Instant::now() < deadline, "the source does not catch up");
        // What is read need not lead to an event.
        let Ok(event) = timeout(LOOK, source.next_event()).await else { continue };
        match event?.context("the source has ended")? {
            PolicyEvent::Stale(cause) => bail!("the source lost track: {cause:?}"),
            event => database.apply(event),
        }
    }
    Ok(())
}

/// Whether packets of an outbound policy take the tunnel with this reqid.
pub(super) fn is_of(policy: &Policy, reqid: u32) -> bool {
    policy.id.direction == Direction::Out
        && matches!(policy.templates[..], [template] if template.reqid == reqid)
}
