//! All contestants with the same policies.

use std::time::Duration;

use aya::programs::xdp::{XdpLinkId, XdpMode};
use fastswan::{
    forwarder::{AttachConfig, AttachMode},
    policy::Family,
    table::Traffic,
};

use super::{
    super::{
        error::DatapathError,
        flows::{Flow, Temperature},
        mix::Mix,
        subject::Subject,
        tables::Tables,
    },
    contestant::Contestant,
    ends::{BATCH, Ends, Turn},
    error::VethError,
    figures::{Figures, Turns},
    lab::{ETH, LAN, VethLab},
};
use crate::{
    capture::{Capture, Captured},
    requests::{Change, request},
    xfrm::ask,
};

/// Flows whose frames are looked at one by one.
const LOOKED_AT: usize = 4096;
/// A frame does not take longer from end to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// Site-to-site policies of IPv4 in all that may forward, and random flows of all of them.
pub struct VethBench {
    tables: Tables,
    ends: Ends,
    flows: Vec<Flow>,
    labs: Labs,
    frames: u32,
    cpus: Vec<usize>,
}

/// Where contestants forward.
struct Labs {
    /// Its kernel has the policies.
    with_policies: VethLab,
    /// Its kernel has none.
    without: VethLab,
}

impl Labs {
    fn of(&self, contestant: Contestant) -> &VethLab {
        match contestant {
            Contestant::Kernel => &self.without,
            _ => &self.with_policies,
        }
    }
}

/// A program of the testkit's own that is attached.
type Attached = Option<(Subject, XdpLinkId)>;

impl VethBench {
    /// Makes the hosts, loads the programs, and gives them and a kernel this many policies. A turn has as many frames on each
    /// of these CPUs, and as many flows: a power of two from 2,048 to 1,048,576.
    ///
    /// # Errors
    ///
    /// [`VethError`], for instance without root.
    pub fn new(policies: u32, frames: u32, cpus: &[usize]) -> Result<Self, VethError> {
        let labs = Labs { with_policies: VethLab::new(cpus)?, without: VethLab::new(cpus)? };
        let lab = &labs.with_policies;
        let devices = lab.devices()?;
        let (mix, family) = (Mix::SiteToSite, Family::V4);
        let allowances = (0..policies).map(|number| mix.allowance(family, number));
        let requests: Vec<_> = allowances.map(|policy| request(&Change::Add(policy))).collect();
        lab.gateway
            .enter(|| ask(&requests, 1))
            .map_err(VethError::system(format!("giving the kernel {policies} policies")))?;
        let (mut tables, flows) = lab.gateway.enter(|| {
            let mut tables = Tables::new(mix, family, policies, frames, devices, |config| config)?;
            let flows = tables.set_flows(Temperature::Cold, frames)?;
            Ok::<_, DatapathError>((tables, flows))
        })?;
        let ends = Ends::take(&mut tables.programs)?;
        Ok(Self { tables, ends, flows, labs, frames, cpus: cpus.to_vec() })
    }

    /// Takes a policy out of fastswan's table, as if it had never been written.
    ///
    /// # Errors
    ///
    /// [`VethError::Datapath`].
    pub fn remove_from_table(&mut self, number: u32) -> Result<(), VethError> {
        Ok(self.tables.remove_from_table(number)?)
    }

    /// Makes sure that what arrives of up to 4,096 flows is, with each contestant, what should, and then that all frames of
    /// a turn arrive. Attaches the sink: the peer sees no frames any longer.
    ///
    /// # Errors
    ///
    /// [`VethError`], with the contestant that does not forward, or not rightly.
    pub fn verify(&mut self) -> Result<(), VethError> {
        for contestant in Contestant::ALL {
            self.with(contestant, |bench| bench.look(contestant))?;
        }
        for lab in [&self.labs.with_policies, &self.labs.without] {
            Ends::attach_sink(&mut self.tables.programs, lab)?;
        }
        let packet_length = self.tables.programs.packet_length();
        for contestant in Contestant::ALL {
            let turn = self.with(contestant, |bench| bench.turn(contestant, 1))?;
            let Turn { frames, arrived, .. } = turn;
            let expected_bytes = frames * packet_length;
            if (arrived.packets, arrived.bytes) != (frames, expected_bytes) {
                let Traffic { packets: arrived, bytes } = arrived;
                return Err(VethError::Arrived { contestant, arrived, frames, bytes, expected_bytes });
            }
        }
        Ok(())
    }

    /// Lets each contestant have all frames in each round, on one CPU and then on all, beginning with another contestant each
    /// time. Verify before.
    ///
    /// # Errors
    ///
    /// [`VethError`], also if the kernel forwarded something in a program's place.
    pub fn measure(&mut self, rounds: u32) -> Result<Vec<Figures>, VethError> {
        let most = self.cpus.len();
        let numbers_of_cpus = if most == 1 { vec![1] } else { vec![1, most] };
        let mut turns: Vec<Turns> = vec![Turns::default(); numbers_of_cpus.len()];
        for round in 0..rounds.max(1) as usize {
            for place in 0..Contestant::ALL.len() {
                let index = (place + round) % Contestant::ALL.len();
                let contestant = Contestant::ALL[index];
                self.with(contestant, |bench| {
                    for (turns, cpus) in turns.iter_mut().zip(&numbers_of_cpus) {
                        turns[index].push(bench.turn(contestant, *cpus)?);
                    }
                    Ok(())
                })?;
            }
        }
        let figures = numbers_of_cpus.iter().zip(&turns);
        Ok(figures.map(|(cpus, of_cpus)| Figures::of(*cpus, of_cpus, &turns[0])).collect())
    }

    /// Does something while a contestant forwards.
    fn with<T>(
        &mut self,
        contestant: Contestant,
        story: impl FnOnce(&mut Self) -> Result<T, VethError>,
    ) -> Result<T, VethError> {
        let attached = self.attach(contestant)?;
        let result = story(self);
        self.detach(attached)?;
        result
    }

    fn attach(&mut self, contestant: Contestant) -> Result<Attached, VethError> {
        let Some(subject) = contestant.program() else { return Ok(None) };
        let gateway = &self.labs.of(contestant).gateway;
        if subject == Subject::Ours {
            let config = AttachConfig::new(LAN).mode(AttachMode::Native).complete_frames(true);
            let ours = &mut self.tables.ours;
            gateway.enter(|| ours.attach(&config))?;
            return Ok(None);
        }
        let device = gateway.ifindex(LAN)?;
        let program = self.tables.programs.program_mut(&subject.to_string())?;
        let link = gateway.enter(|| program.attach_to_if_index(device, XdpMode::Driver));
        Ok(Some((subject, link.map_err(DatapathError::bpf(format!("attaching {subject}")))?)))
    }

    fn detach(&mut self, attached: Attached) -> Result<(), VethError> {
        self.tables.ours.detach_all()?;
        if let Some((subject, link)) = attached {
            let program = self.tables.programs.program_mut(&subject.to_string())?;
            program.detach(link).map_err(DatapathError::bpf(format!("detaching {subject}")))?;
        }
        Ok(())
    }

    /// Looks at frames that arrive, one by one.
    fn look(&mut self, contestant: Contestant) -> Result<(), VethError> {
        let mut capture = Capture::at(&self.labs.of(contestant).peer, ETH)
            .map_err(VethError::system("listening to the peer's device"))?;
        for batch in (0..LOOKED_AT.min(self.flows.len())).step_by(BATCH as usize) {
            let starts = [(self.cpus[0], batch)];
            let Self { ends, tables, flows, labs, .. } = self;
            ends.generate(&tables.programs, labs.of(contestant), contestant, &starts, flows.len(), BATCH)?;
            let batch = &flows[batch..batch + BATCH as usize];
            let mut frames = Vec::new();
            for _ in batch {
                frames.extend(next_ipv4(&mut capture)?);
            }
            for flow in batch {
                let mut expected = tables.programs.headers(*flow, true);
                expected.resize(tables.programs.frame_length(), 0);
                // In any order: a frame that a program leaves to the kernel is overtaken by others, and a turn tells of it.
                let Some(place) = frames.iter().position(|frame| *frame == expected) else {
                    let (flow, frame) = (flow.to_string(), frames.pop().unwrap_or_default());
                    return Err(VethError::WrongFrame { contestant, flow, frame, expected });
                };
                frames.swap_remove(place);
            }
        }
        Ok(())
    }

    /// Sends all frames on the first of the CPUs. Makes sure that what arrives was forwarded by the contestant's program, if
    /// that counts.
    fn turn(&mut self, contestant: Contestant, cpus: usize) -> Result<Turn, VethError> {
        let counts = contestant.program().filter(|subject| matches!(subject, Subject::Lpm | Subject::Ours));
        let counted =
            |tables: &Tables| counts.map_or(Ok(Traffic::default()), |subject| tables.counted(subject));
        let (before, passed_before) = (counted(&self.tables)?, self.tables.passed());
        let starts: Vec<_> = self.cpus[..cpus]
            .iter()
            .enumerate()
            .map(|(index, cpu)| (*cpu, index * (self.flows.len() / cpus)))
            .collect();
        let Self { ends, tables, flows, labs, frames, .. } = self;
        let turn =
            ends.send(&tables.programs, labs.of(contestant), contestant, &starts, flows.len(), *frames)?;
        let forwarded = counted(tables)?.packets - before.packets;
        let (arrived, passed) = (turn.arrived.packets, tables.passed());
        if counts.is_some() && (forwarded < arrived || passed != passed_before) {
            return Err(VethError::NotByProgram { contestant, forwarded, arrived, passed });
        }
        Ok(turn)
    }
}

/// The next frame with an IPv4 packet that a device has received, if one comes.
fn next_ipv4(capture: &mut Capture) -> Result<Option<Vec<u8>>, VethError> {
    const ETHERTYPE_IPV4: [u8; 2] = [8, 0];
    loop {
        match capture.next(PATIENCE).map_err(VethError::system("listening to the peer's device"))? {
            None => return Ok(None),
            Some(Captured { received: true, frame, .. }) if frame.get(12..14) == Some(&ETHERTYPE_IPV4) => {
                return Ok(Some(frame.to_vec()));
            }
            Some(_) => {}
        }
    }
}
