//! The kernel that is changed, and that the mirror is compared with.

use std::{
    sync::mpsc::{Receiver, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use fastswan::{HostFacts, NetlinkHost, Policy, Snapshot, XdpForwarder, forwarder::RunAction};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use super::{
    changes::{Happening, Step},
    hindrance::Hindrance,
    host::{ADDRESS, ADDRESS_V6, Host, MOVED, MOVED_V6},
    judge::{Expected, Packet, difference, expected, sorted},
    lag::{Lags, Note, Subject},
    mirror::Question,
    offload::pretend_snapshot,
    report::Report,
    witness::Ended,
};
use crate::{
    host_facts,
    prog_run::lease_tick,
    promote::named,
    requests::{self, BATCH, Change, Message, Requests, request},
    xfrm::{Group, inject},
};

/// How long a mirror that says that it knows everything may take to be what the kernel has when nothing changes.
const PATIENCE: Duration = Duration::from_secs(3);
/// Nothing else takes longer, unless it never happens.
const LIMIT: Duration = Duration::from_secs(20);
/// Packets that are judged at a quiet point.
const PACKETS: usize = 200;

/// Makes changes and judges. Used on a thread that is on the host.
pub(super) struct Kernel<'r> {
    host: &'r Host,
    forwarder: &'r XdpForwarder,
    requests: Requests,
    asking: UnboundedSender<Question>,
    ending: Sender<Ended>,
    notes: Receiver<Note>,
    lags: Lags,
    /// Of the packets that are judged.
    rng: StdRng,
    /// What is in the way of packets, and since when.
    hindrance: Option<(Hindrance, Instant)>,
}

/// What the mirror is, when nothing changes.
enum State {
    Right,
    /// It knows that it does not know everything.
    Stale,
    /// Its database may be about to become right.
    Behind(String),
    /// Packets pass that must be fast, which they may do for a while.
    Slow(String),
    Wrong(String),
}

impl<'r> Kernel<'r> {
    pub(super) fn new(
        host: &'r Host,
        forwarder: &'r XdpForwarder,
        asking: UnboundedSender<Question>,
        ending: Sender<Ended>,
        notes: Receiver<Note>,
    ) -> anyhow::Result<Self> {
        let (requests, rng) = (Requests::open()?, StdRng::seed_from_u64(0));
        let lags = Lags::default();
        Ok(Self { host, forwarder, requests, asking, ending, notes, lags, rng, hindrance: None })
    }

    pub(super) fn into_lags(self) -> Lags {
        self.lags
    }

    /// Makes something happen, and tells whoever looks what is over when the kernel has acknowledged it.
    pub(super) fn make(&mut self, happening: Happening, report: &mut Report) -> anyhow::Result<()> {
        let Happening { step, ended } = happening;
        report.changes += 1;
        match step {
            Step::Change(change) => self.change(&[change])?,
            Step::Burst(changes) => {
                report.changes += changes.len() as u64 - 1;
                changes.chunks(BATCH).try_for_each(|batch| self.change(batch))?;
            }
            Step::Temporary(policy, seconds) => {
                self.request(requests::temporary(&policy, seconds))?
                    .with_context(|| policy.id.to_string())?;
                self.acknowledged(Some(Subject::Policy(policy.id)));
            }
            Step::Allocate(sa) => {
                let answer = self.requests.ask(&requests::allocation(&sa)).context("allocating a SPI")?;
                // The kernel tells only whoever asked for it.
                inject(Group::Sa, &answer)?;
            }
            Step::DeleteAssociation(id) => match self.request(requests::deleted_association(&id))? {
                Ok(()) => self.acknowledged(Some(Subject::SaRemoved(id))),
                // It has expired.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| id.to_string()),
            },
            Step::FlushAssociations => {
                self.request(requests::flushed_associations())?.context("flushing associations")?;
                self.acknowledged(Some(Subject::SasFlushed));
            }
            Step::Offload(sa, policies) => {
                inject(Group::Sa, &requests::told_association(&sa).bytes(0, 0))?;
                for policy in policies {
                    inject(Group::Policy, &request(&Change::Add(policy)).bytes(0, 0))?;
                }
            }
            Step::Unload(policy) => {
                inject(Group::Policy, &requests::told_deletion(&policy).bytes(0, 0))?;
                self.acknowledged(Some(Subject::PolicyRemoved(policy.id)));
            }
            Step::Wait => thread::sleep(Duration::from_millis(1)),
            Step::LoseDevice => {
                self.host.set_loose(false)?;
                self.end(&ended);
                self.host.set_loose(true)?;
                report.lost_devices += 1;
                return Ok(());
            }
            Step::Migrate(id, template) => {
                let new = if template.source.is_ipv4() { (ADDRESS, MOVED) } else { (ADDRESS_V6, MOVED_V6) };
                // It fails where there is an association that lacks a key, or if the policy was moved before.
                let moved = self.request(requests::migration(&id, &template, new, None))?;
                report.migrations += u64::from(moved.is_ok());
            }
            Step::Thresholds(bits) => {
                let bits = [[bits; 2], [bits.saturating_mul(4); 2]];
                self.request(requests::thresholds(bits))?.context("setting thresholds")?;
                report.host_changes += 1;
            }
            Step::Port(kind) => {
                self.host.change_port(kind)?;
                report.host_changes += 1;
            }
            Step::Device => {
                self.host.change_devices()?;
                report.host_changes += 1;
            }
            Step::Hinder(hindrance) => {
                self.host.run(&hindrance.comes)?;
                self.hindrance = Some((hindrance, Instant::now()));
                report.host_changes += 1;
            }
            Step::Relent(packets) => self.relent(&packets, report)?,
            Step::Noise(lines) => {
                self.host.batch(&lines)?;
                report.host_changes += 1;
            }
        }
        self.end(&ended);
        Ok(())
    }

    /// Looks at packets, once they may not be fast any longer, and takes away what is in their way.
    pub(super) fn relent(&mut self, packets: &[Packet], report: &mut Report) -> anyhow::Result<()> {
        let Some((hindrance, since)) = self.hindrance.take() else { return Ok(()) };
        let allowed = hindrance.within + lease_tick()?;
        if !packets.is_empty() {
            thread::sleep(allowed.saturating_sub(since.elapsed()));
        }
        for packet in packets {
            let after = since.elapsed();
            let run = self.forwarder.run(&packet.frame(), self.host.ingress)?;
            report.host_looks += 1;
            if after > allowed && run.action != RunAction::Pass {
                let Packet { source, destination } = packet;
                let what = hindrance.comes.join("; ");
                report.diverged(format!("{source} → {destination} is still fast {after:?} after `{what}`"));
            }
        }
        self.host.run(&hindrance.goes)?;
        Ok(())
    }

    fn change(&mut self, changes: &[Change]) -> anyhow::Result<()> {
        let results = self.requests.make(changes.iter().map(request))?;
        for (result, change) in results.into_iter().zip(changes) {
            result.with_context(|| format!("{change:?}"))?;
            self.acknowledged(Subject::made(change));
        }
        Ok(())
    }

    fn request(&mut self, message: Message) -> anyhow::Result<std::io::Result<()>> {
        self.requests.make([message])?.pop().context("a request without an acknowledgement")
    }

    fn acknowledged(&mut self, subject: Option<Subject>) {
        if let Some(subject) = subject {
            self.lags.acknowledged(subject, Instant::now());
        }
    }

    fn end(&self, ended: &[Policy]) {
        let at = Instant::now();
        for policy in ended {
            let Policy { index, id, .. } = policy;
            // Whoever looks has failed if it is gone, and says so.
            let _ = self.ending.send(Ended { index: *index, selector: id.selector, at });
        }
    }

    /// Waits until the mirror has caught up, and judges it.
    pub(super) fn be_quiet(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let begin = Instant::now();
        // Since when the mirror says that it knows everything, and does not.
        let mut behind: Option<Instant> = None;
        loop {
            match self.judge(report)? {
                State::Right => break,
                State::Wrong(why) => {
                    report.diverged(why);
                    break;
                }
                State::Behind(why) if behind.is_some_and(|since| since.elapsed() > PATIENCE) => {
                    report.diverged(why);
                    break;
                }
                State::Slow(why) if begin.elapsed() > LIMIT => {
                    report.diverged(why);
                    break;
                }
                State::Stale if begin.elapsed() > LIMIT => {
                    bail!("the mirror does not get to know what the kernel has")
                }
                State::Stale | State::Slow(_) => behind = None,

                State::Behind(_) => behind = behind.or_else(|| Some(Instant::now())),
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.lags.take(self.notes.try_iter());
        report.quiet_points += 1;
        Ok(())
    }

    fn judge(&mut self, report: &mut Report) -> anyhow::Result<State> {
        let kernel = self.dump()?;
        let read = host_facts::sorted(NetlinkHost::read_once()?);
        let Some((mirror, told)) = self.ask()? else { return Ok(State::Stale) };
        if kernel != mirror {
            return Ok(State::Behind(difference(&kernel, &mirror)));
        }
        let told = host_facts::sorted(told);
        if read != told {
            return Ok(State::Behind(host_facts::difference(&told, &read)));
        }
        let (mut fast, mut wrong, mut slow) = (0, None, None);
        for _ in 0..PACKETS {
            let packet = Packet::near(&kernel.policies, &mut self.rng);
            let run = self.forwarder.run(&packet.frame(), self.host.ingress)?;
            let chosen = (run.action != RunAction::Pass).then(|| named(&run.frame));
            let expected = expected(&kernel, &packet, self.host.egress);
            let Packet { source, destination } = packet;
            let describe = || format!("{source} → {destination}: {chosen:?} instead of {expected:?}");
            match (chosen, expected) {
                (None, Expected::Pass | Expected::FastOrPass(_)) => {}
                (Some(Some(index)), Expected::Fast(expected) | Expected::FastOrPass(expected))
                    if index == expected =>
                {
                    fast += 1;
                }
                // The kill switch may be on, or the lease out.
                (None, Expected::Fast(_)) => slow = Some(describe()),
                (Some(_), _) => wrong = Some(describe()),
            }
        }
        if let Some(wrong) = wrong {
            // Unless something has expired meanwhile.
            let same = self.dump()? == kernel;
            return Ok(if same { State::Wrong(wrong) } else { State::Behind(wrong) });
        }
        if let Some(slow) = slow {
            return Ok(State::Slow(slow));
        }
        report.packets += PACKETS as u64;
        report.fast_packets += fast;
        Ok(State::Right)
    }

    /// What the kernel has now, as the mirror should have it.
    fn dump(&mut self) -> anyhow::Result<Snapshot> {
        let mut snapshot = self.requests.dump()?;
        pretend_snapshot(&mut snapshot, self.host.egress);
        Ok(sorted(snapshot))
    }

    /// What the mirror has, if it knows everything.
    fn ask(&self) -> anyhow::Result<Option<(Snapshot, HostFacts)>> {
        let (question, answer) = oneshot::channel();
        let gone = "the mirror has ended";
        self.asking.send(question).ok().context(gone)?;
        answer.blocking_recv().context(gone)
    }
}
