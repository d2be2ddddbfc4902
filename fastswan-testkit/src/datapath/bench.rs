//! All programs with the same policies.

use fastswan::{
    Compiler, Database, OffloadTable as _, PolicyEvent, Snapshot,
    compiler::PolicyState,
    forwarder::LoadConfig,
    policy::{Family, MacAddr},
    table::{Forwards, Port, Ports as _, ReversePath, Slot, TableConfig, TableCounters as _, Traffic},
};

use fastswan_testkit_ebpf::PORT;

use super::{
    error::DatapathError,
    flows::{Flow, Temperature},
    mix::Mix,
    programs::{ASK_BACK, Fate, Programs},
    subject::Subject,
    timing::{Figures, Spread, intervals, median},
    tries::Tries,
};
use crate::prog_run::ProgRun;

const XDP_TX: u32 = 3;
/// Flows whose frames are looked at one by one.
const LOOKED_AT: u32 = 4096;

/// The policies of a mix in the table of fastswan's program and in the tries of `lpm`, and flows to measure with.
pub struct Bench {
    mix: Mix,
    family: Family,
    policies: u32,
    device: u32,
    ours: ProgRun,
    database: Database,
    compiler: Compiler,
    programs: Programs,
    tries: Tries,
    /// Packets of a run.
    packets: u32,
    flows: Vec<Flow>,
}

impl Bench {
    /// Loads all programs and writes the first policies of a mix, with frames coming in on a device of this thread's network
    /// namespace and leaving there. A run has as many packets, and at most as many flows: a power of two from 2,048 to
    /// 1,048,576.
    ///
    /// # Errors
    ///
    /// [`DatapathError`], for instance without root.
    pub fn new(
        mix: Mix,
        family: Family,
        policies: u32,
        packets: u32,
        device: u32,
    ) -> Result<Self, DatapathError> {
        let cells = policies + mix.other_cells();
        let (cells_v4, cells_v6) = match family {
            Family::V4 => (cells, 1),
            Family::V6 => (1, cells),
        };
        let config = TableConfig { cells_v4, cells_v6, exceptions: 64, slots: policies };
        let ours = ProgRun::load(LoadConfig::from(&config).ask_back(ASK_BACK))?;
        let (programs, tries) = Programs::load(family, device, policies, packets, ours.program_id())?;
        let mut compiler = Compiler::new(config.capacity());
        compiler.set_host(&mix.host(device));
        let database = Database::default();
        let flows = Vec::new();
        let mut bench =
            Self { mix, family, policies, device, ours, database, compiler, programs, tries, packets, flows };
        bench.fill()?;
        Ok(bench)
    }

    fn fill(&mut self) -> Result<(), DatapathError> {
        let Self { mix, family, policies, device, .. } = *self;
        let own = (0..policies).map(|number| mix.policy(family, number, device));
        let policies_of_gateway = own.chain(mix.others()).collect();
        let snapshot = Snapshot { policies: policies_of_gateway, ..Snapshot::default() };
        self.database.apply(PolicyEvent::Snapshot(snapshot));
        self.write()?;
        self.ours.table.set_port(&Port {
            ifindex: device,
            vlan: 0,
            receiver: device,
            address: MacAddr(PORT),
            forwards: Forwards { v4: true, v6: true },
            reverse_path: ReversePath::Off,
        })?;
        let fast = self.compiler.fast_policies(&self.database);
        if fast != policies as usize {
            let mut reports = self.compiler.policies(&self.database).into_iter();
            let reason = reports.find_map(|report| match report.state {
                PolicyState::Pass(reason) => Some(reason.name()),
                PolicyState::Fast => None,
            });
            let reason = reason.unwrap_or("unknown");
            return Err(DatapathError::NotFast { mix: mix.name(), fast, policies, reason });
        }
        self.tries.fill((0..policies).map(|number| mix.networks(family, number)))
    }

    /// Takes a policy out of fastswan's table, as if it had never been written.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Table`].
    pub fn remove_from_table(&mut self, number: u32) -> Result<(), DatapathError> {
        let policy = self.mix.policy(self.family, number, self.device);
        self.database.apply(PolicyEvent::PolicyRemoved(policy.id));
        self.write()
    }

    /// Takes a policy, and all others for its destination, out of the tries of `lpm`.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Bpf`].
    pub fn remove_from_tries(&mut self, number: u32) -> Result<(), DatapathError> {
        self.tries.remove(self.mix.networks(self.family, number).1)
    }

    fn write(&mut self) -> Result<(), DatapathError> {
        let update = self.compiler.compile(&self.database);
        Ok(self.ours.table.apply(&update)?)
    }

    /// Chooses the flows of the runs from now on.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Bpf`].
    pub fn set_temperature(&mut self, temperature: Temperature) -> Result<(), DatapathError> {
        self.flows = temperature.flows(self.mix, self.family, self.policies, self.packets);
        self.programs.set_flows(&self.flows)
    }

    /// Makes sure that the programs that count forward and count all packets, and looks at what each program makes of the
    /// headers of up to 4,096 flows, one by one.
    ///
    /// # Errors
    ///
    /// [`DatapathError`], with the program that does not, and why if it says so.
    pub fn verify(&mut self) -> Result<(), DatapathError> {
        for subject in Subject::ALL {
            self.verify_all(subject)?;
            for (index, flow) in (0..LOOKED_AT).zip(&self.flows) {
                let fate = self.programs.run(subject, self.flows.len(), index..index + 1)?;
                let expected = self.programs.headers(*flow, subject.forwards());
                if (fate.answer, &fate.headers) != (XDP_TX, &expected) {
                    let Fate { answer, headers: frame } = fate;
                    let flow = flow.to_string();
                    return Err(DatapathError::WrongFrame {
                        program: subject,
                        flow,
                        answer,
                        frame,
                        expected,
                    });
                }
            }
        }
        Ok(())
    }

    fn verify_all(&mut self, subject: Subject) -> Result<(), DatapathError> {
        let before = self.counted(subject)?;
        let passed_before = self.passed();
        self.programs.run(subject, self.flows.len(), 0..self.packets)?;
        let after = self.counted(subject)?;
        let (forwarded, counted) = (after.packets - before.packets, after.bytes - before.bytes);
        let packets = u64::from(self.packets);
        if matches!(subject, Subject::Empty | Subject::Floor) {
            return Ok(());
        }
        if forwarded != packets || self.passed() != passed_before {
            let passed = if subject == Subject::Ours { self.passed() } else { Vec::new() };
            return Err(DatapathError::Passed { program: subject, forwarded, packets, passed });
        }
        let bytes = packets * self.programs.packet_length();
        if counted == bytes { Ok(()) } else { Err(DatapathError::Bytes { program: subject, counted, bytes }) }
    }

    /// Lets each program have all packets in each round, and takes the times. Verify before.
    ///
    /// # Errors
    ///
    /// [`DatapathError`], also if fastswan's program passed a packet meanwhile.
    pub fn measure(&mut self, rounds: u32) -> Result<Figures, DatapathError> {
        let before = self.counted(Subject::Ours)?;
        let [mut floor, mut lpm, mut ours, mut ratio] = [const { Vec::new() }; 4];
        for _ in 0..rounds.max(1) {
            let [empty, floor_time, lpm_time, our_time] = self.round()?;
            floor.push(floor_time - empty);
            lpm.push(lpm_time - empty);
            ours.push(our_time - empty);
            ratio.push((lpm_time - empty) / (our_time - empty));
        }
        let forwarded = self.counted(Subject::Ours)?.packets - before.packets;
        let packets = u64::from(rounds.max(1)) * u64::from(self.packets);
        if forwarded != packets {
            return Err(DatapathError::Passed {
                program: Subject::Ours,
                forwarded,
                packets,
                passed: self.passed(),
            });
        }
        let [lpm, floor, ours, ratio] = [lpm, floor, ours, ratio].map(Spread::of);
        Ok(Figures { lpm, floor, ours, ratio })
    }

    /// Nanoseconds that a packet takes each program, with the driver. A turn is all packets: with shorter ones, much of what a
    /// program looks up would have left the caches while the others had their turns.
    fn round(&mut self) -> Result<[f64; Subject::ALL.len()], DatapathError> {
        let mut times = [0.0; Subject::ALL.len()];
        for (subject, time) in Subject::ALL.into_iter().zip(&mut times) {
            self.programs.run(subject, self.flows.len(), 0..self.packets)?;
            let mut intervals: Vec<f64> = intervals(&self.programs.moments(self.packets)?).collect();
            *time = median(&mut intervals);
        }
        Ok(times)
    }

    /// What a program has counted as forwarded since it was loaded, if it counts.
    fn counted(&self, subject: Subject) -> Result<Traffic, DatapathError> {
        match subject {
            Subject::Empty | Subject::Floor => Ok(Traffic::default()),
            Subject::Lpm => {
                let (packets, bytes) = self.programs.counted_by_lpm()?;
                Ok(Traffic { packets, bytes })
            }
            Subject::Ours => Ok((0..self.policies)
                .map(|slot| self.ours.traffic(Slot(slot)))
                .fold(Traffic::default(), |sum, traffic| sum + traffic)),
        }
    }

    fn passed(&self) -> Vec<(&'static str, u64)> {
        self.ours.table.passes().into_iter().map(|(reason, packets)| (reason.name(), packets)).collect()
    }
}
