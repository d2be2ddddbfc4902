//! One world before the kernel: the host is changed, the mirror follows, and packets are judged.

use std::time::Duration;

use rand::rngs::StdRng;

use super::{
    aims::Aims,
    command::{self, Command},
    draw::Change,
    kernel::{Fate, Header, Kernel, Outer},
    mirror::{Follower, Verdict},
    mutant::HostMutant,
    packet::{ETHERNET, Packet},
    report::KindReport,
    tunnels::Tunnel,
    world::{World, base, is_own},
};
use crate::oracle::packets::is_special;

/// What nobody tells of is to be known so soon.
const POLLED: Duration = Duration::from_millis(260);

/// New devices are quiet then.
const SETTLE: Duration = Duration::from_millis(400);

/// A world, and what follows it. Used on a thread that is on its gateway.
pub(super) struct Trial<'a> {
    world: &'a World,
    tunnels: &'a [Tunnel],
    kernel: Kernel,
    follower: Follower,
    /// What the packets are aimed at.
    aims: Aims,
    /// What was done to the host.
    done: Vec<String>,
}

impl<'a> Trial<'a> {
    pub(super) fn new(
        world: &'a World,
        tunnels: &'a [Tunnel],
        mutant: Option<HostMutant>,
    ) -> anyhow::Result<Self> {
        let mut kernel = Kernel::new(world)?;
        let commands: Vec<Command> = base().map(command::ip).collect();
        command::run(world, &mut kernel.wires, &commands, true)?;
        let mut follower = Follower::new(world, tunnels, mutant)?;
        // Until what the devices' being new leads to is over: it would hide what nobody tells of.
        follower.follow(SETTLE)?;
        Ok(Self { world, tunnels, kernel, follower, aims: Aims::default(), done: Vec::new() })
    }

    /// Changes the host step by step, and judges this many packets after each.
    pub(super) fn change(
        &mut self,
        change: &Change,
        is_silent: bool,
        packets: usize,
        rng: &mut StdRng,
        report: &mut KindReport,
    ) -> anyhow::Result<()> {
        self.aims.add(&change.aims);
        for step in change.steps.iter().filter(|step| !step.is_empty()) {
            self.done.extend(step.iter().map(Command::to_string));
            if let Err(error) = command::run(self.world, &mut self.kernel.wires, step, true) {
                report.refused += 1;
                report.refusal.get_or_insert_with(|| format!("{error:#}"));
                self.done.push(format!("refused: {error:#}"));
                break;
            }
            report.changes += 1;
            self.follow(is_silent, report)?;
            self.judge(packets, rng, report)?;
        }
        if change.steps.concat().is_empty() {
            self.judge(packets, rng, report)?;
        }
        Ok(())
    }

    /// Takes a change back, and judges this many packets.
    pub(super) fn undo(
        &mut self,
        change: &Change,
        is_silent: bool,
        packets: usize,
        rng: &mut StdRng,
        report: &mut KindReport,
    ) -> anyhow::Result<()> {
        if !change.undo.is_empty() {
            self.done.extend(change.undo.iter().map(|command| format!("{command} || true")));
            command::run(self.world, &mut self.kernel.wires, &change.undo, false)?;
            self.follow(is_silent, report)?;
            self.judge(packets, rng, report)?;
        }
        self.aims = Aims::default();
        self.done.clear();
        Ok(())
    }

    fn follow(&mut self, is_silent: bool, report: &mut KindReport) -> anyhow::Result<()> {
        let at_least = if is_silent { POLLED } else { Duration::ZERO };
        report.stuck += u64::from(!self.follower.follow(at_least)?);
        self.kernel.forget()
    }

    /// Judges random packets.
    fn judge(&mut self, packets: usize, rng: &mut StdRng, report: &mut KindReport) -> anyhow::Result<()> {
        let mut packets: Vec<Packet> =
            (0..packets).map(|_| Packet::random(self.tunnels, &self.aims, rng)).collect();
        self.kernel.number(&mut packets);
        // The program first: what packets leave behind in the kernel, it has not seen.
        let mut verdicts = Vec::new();
        for packet in &packets {
            verdicts.push(self.follower.run(packet)?);
        }
        let fates = self.kernel.judge(&packets)?;
        let mut suspects = Vec::new();
        for ((packet, verdict), fate) in packets.into_iter().zip(verdicts).zip(fates) {
            if fate == Fate::Unsent {
                continue;
            }
            report.decisions += 1;
            let eligible = self.is_eligible(&packet, &fate)?;
            report.eligible += u64::from(eligible);
            match verdict {
                Verdict::Fast(frame) => {
                    report.fast += 1;
                    match self.objection(&packet, &frame, &fate)? {
                        Some(objection) => suspects.push((packet, objection)),
                        None => report.eligible_fast += u64::from(eligible),
                    }
                }
                Verdict::Passed(reason) if eligible => {
                    report.slow(reason, || self.describe(&packet, &fate));
                }
                Verdict::Passed(_) => {}
            }
        }
        if !suspects.is_empty() {
            self.judge_again(suspects, report)?;
        }
        Ok(())
    }

    /// What seemed to be wrong is so if it still is when all that is polled must be known.
    fn judge_again(
        &mut self,
        suspects: Vec<(Packet, String)>,
        report: &mut KindReport,
    ) -> anyhow::Result<()> {
        report.stuck += u64::from(!self.follower.follow(POLLED)?);
        self.kernel.forget()?;
        let (mut packets, firsts): (Vec<Packet>, Vec<String>) = suspects.into_iter().unzip();
        self.kernel.number(&mut packets);
        let verdicts: Vec<Verdict> =
            packets.iter().map(|packet| self.follower.run(packet)).collect::<anyhow::Result<_>>()?;
        let fates = self.kernel.judge_again(&packets)?;
        for (((packet, first), verdict), fate) in packets.iter().zip(firsts).zip(verdicts).zip(&fates) {
            let objection = match verdict {
                Verdict::Fast(frame) => self.objection(packet, &frame, fate)?,
                Verdict::Passed(_) => None,
            };
            let (name, objection) = if let Some(objection) = objection {
                report.wrong += 1;
                ("WRONG", objection)
            } else {
                report.late += 1;
                ("late", first)
            };
            report.example(|| format!("{name}: {objection}: {}", self.describe(packet, fate)));
        }
        Ok(())
    }

    fn tunnel(&self, packet: &Packet) -> Option<&'a Tunnel> {
        self.tunnels.iter().find(|tunnel| tunnel.is_for(packet.source, packet.destination))
    }

    /// Why a frame that the program forwards is not what the kernel would have sent.
    fn objection(&mut self, packet: &Packet, frame: &[u8], fate: &Fate) -> anyhow::Result<Option<String>> {
        let Some(tunnel) = self.tunnel(packet) else { return Ok(Some("no policy is about it".to_owned())) };
        let device = tunnel.device.name();
        match fate {
            Fate::Forwarded(by, _) if *by != tunnel.device => {
                return Ok(Some(format!("the kernel sends it by {} instead of {device}", by.name())));
            }
            Fate::Forwarded(_, sent) if frame.get(ETHERNET..) != Some(&sent[..]) => {
                return Ok(Some("the kernel sends other bytes".to_owned()));
            }
            Fate::Forwarded(..) => {}
            Fate::Answered => return Ok(Some("the kernel answers it".to_owned())),
            Fate::Unsent => return Ok(None),
            Fate::Gone => return Ok(Some("the kernel drops or delivers it".to_owned())),
        }
        let outer = self.kernel.outer(tunnel, packet.tos)?;
        if outer.device != Some(tunnel.device) {
            return Ok(Some(format!("the kernel would not send the outer packet by {device}: {outer:?}")));
        }
        if packet.length > tunnel.longest(outer.mtu) {
            return Ok(Some(format!("the outer packet is longer than the path takes: {outer:?}")));
        }
        if !tunnel.is_v6() && Kernel::bypasses_xfrm(tunnel.device) {
            return Ok(Some(format!("{device} bypasses IPsec")));
        }
        match &outer.header {
            Header::Unresolved => {
                Ok(Some("the kernel does not know the outer next hop's address".to_owned()))
            }
            Header::Known(header) if frame.get(..12) != header.get(..12) => {
                Ok(Some(format!("the kernel sends the outer packet to {:02x?}", &header[..6])))
            }
            _ => Ok(None),
        }
    }

    /// Whether nothing keeps a packet from being fast: the kernel sends it where the tunnel is.
    fn is_eligible(&mut self, packet: &Packet, fate: &Fate) -> anyhow::Result<bool> {
        let Some(tunnel) = self.tunnel(packet) else { return Ok(false) };
        let is_odd = !packet.is_plain
            || is_special(packet.source)
            || is_own(packet.source)
            || is_special(packet.destination);
        if is_odd || !matches!(fate, Fate::Forwarded(by, _) if *by == tunnel.device) {
            return Ok(false);
        }
        let Outer { device, mtu, header } = self.kernel.outer(tunnel, packet.tos)?;
        let fits = packet.length <= tunnel.longest(mtu);
        let bypasses = !tunnel.is_v6() && Kernel::bypasses_xfrm(tunnel.device);
        // The address of a neighbour that nobody has told, since the device asks for none, is the device's own.
        let has_next_hop = match header {
            Header::OfNoConcern => true,
            Header::Unresolved => false,
            Header::Known(header) => !header.starts_with(&tunnel.device.mac().0),
        };
        Ok(device == Some(tunnel.device) && fits && !bypasses && has_next_hop)
    }

    fn describe(&self, packet: &Packet, fate: &Fate) -> String {
        let Packet { source, destination, tos, port, length, .. } = packet;
        let fate = match fate {
            Fate::Forwarded(device, _) => format!("sent by {}", device.name()),
            Fate::Answered => "answered".to_owned(),
            Fate::Gone => "gone".to_owned(),
            Fate::Unsent => "unsent".to_owned(),
        };
        let protocol = packet.protocol();
        format!(
            "{source} → {destination} protocol {protocol} tos {tos:#x} length {length} at {}: {fate}, after: {}",
            port.name(),
            self.done.join("; ")
        )
    }
}
