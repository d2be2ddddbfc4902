//! All programs with the same policies.

use fastswan::{forwarder::LoadConfig, policy::Family};
use fastswan_testkit_ebpf::INTERVAL;

use super::{
    error::DatapathError,
    flows::{Flow, Temperature},
    lab::Devices,
    mix::Mix,
    programs::Fate,
    subject::Subject,
    tables::Tables,
    timing::{Round, intervals, median},
};

const XDP_TX: u32 = 3;
/// Flows whose frames are looked at one by one.
const LOOKED_AT: u32 = 4096;

/// The policies of a mix in the table of fastswan's program and in the tries of `lpm`, and flows to measure with.
pub struct Bench {
    tables: Tables,
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
        Self::load(mix, family, policies, packets, device, |config| config)
    }

    /// The same, with fastswan's program loaded in another way.
    pub(super) fn load(
        mix: Mix,
        family: Family,
        policies: u32,
        packets: u32,
        device: u32,
        configure: impl FnOnce(LoadConfig) -> LoadConfig,
    ) -> Result<Self, DatapathError> {
        let devices = Devices { ingress: device, egress: device };
        let tables = Tables::new(mix, family, policies, packets, devices, configure)?;
        Ok(Self { tables, packets, flows: Vec::new() })
    }

    /// Takes a policy out of fastswan's table, as if it had never been written.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Table`].
    pub fn remove_from_table(&mut self, number: u32) -> Result<(), DatapathError> {
        self.tables.remove_from_table(number)
    }

    /// Takes a policy, and all others for its destination, out of the tries of `lpm`.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Bpf`].
    pub fn remove_from_tries(&mut self, number: u32) -> Result<(), DatapathError> {
        self.tables.remove_from_tries(number)
    }

    /// Chooses the flows of the runs from now on.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Bpf`].
    pub fn set_temperature(&mut self, temperature: Temperature) -> Result<(), DatapathError> {
        self.flows = self.tables.set_flows(temperature, self.packets)?;
        Ok(())
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
            self.verify_headers(subject)?;
        }
        Ok(())
    }

    /// Looks at what a program makes of the headers of up to 4,096 flows, one by one.
    pub(super) fn verify_headers(&mut self, subject: Subject) -> Result<(), DatapathError> {
        for (index, flow) in (0..LOOKED_AT).zip(&self.flows) {
            let fate = self.tables.programs.run(subject, self.flows.len(), index..index + 1)?;
            let expected = self.tables.programs.headers(*flow, subject.forwards());
            if (fate.answer, &fate.headers) != (XDP_TX, &expected) {
                let Fate { answer, headers: frame } = fate;
                let flow = flow.to_string();
                return Err(DatapathError::WrongFrame { program: subject, flow, answer, frame, expected });
            }
        }
        Ok(())
    }

    fn verify_all(&mut self, subject: Subject) -> Result<(), DatapathError> {
        let before = self.tables.counted(subject)?;
        let passed_before = self.tables.passed();
        self.tables.programs.run(subject, self.flows.len(), 0..self.packets)?;
        let after = self.tables.counted(subject)?;
        let (forwarded, counted) = (after.packets - before.packets, after.bytes - before.bytes);
        let packets = u64::from(self.packets);
        if matches!(subject, Subject::Empty | Subject::Floor) {
            return Ok(());
        }
        if forwarded != packets || self.tables.passed() != passed_before {
            let passed = if subject == Subject::Ours { self.tables.passed() } else { Vec::new() };
            return Err(DatapathError::Passed { program: subject, forwarded, packets, passed });
        }
        let bytes = packets * self.tables.programs.packet_length();
        if counted == bytes { Ok(()) } else { Err(DatapathError::Bytes { program: subject, counted, bytes }) }
    }

    /// Lets each program have all packets in turn, and takes the times. Verify before. A turn is all packets: with shorter ones,
    /// much of what a program looks up would have left the caches while the others had their turns.
    ///
    /// # Errors
    ///
    /// [`DatapathError`], also if fastswan's program passed a packet meanwhile.
    pub fn measure(&mut self) -> Result<Round, DatapathError> {
        let before = self.tables.counted(Subject::Ours)?;
        let empty = self.time(Subject::Empty)?;
        let floor = self.time(Subject::Floor)? - empty;
        let lpm = self.time(Subject::Lpm)? - empty;
        let ours = self.time(Subject::Ours)? - empty;
        let forwarded = self.tables.counted(Subject::Ours)?.packets - before.packets;
        let packets = u64::from(self.packets);
        if forwarded != packets {
            return Err(DatapathError::Passed {
                program: Subject::Ours,
                forwarded,
                packets,
                passed: self.tables.passed(),
            });
        }
        Ok(Round { lpm, floor, ours })
    }

    /// Nanoseconds that a packet takes a program, with the driver.
    pub(super) fn time(&mut self, subject: Subject) -> Result<f64, DatapathError> {
        self.tables.programs.run(subject, self.flows.len(), 0..self.packets)?;
        let moments = self.tables.programs.moments(self.packets)?;
        Ok(median(&mut intervals(&moments, INTERVAL).collect::<Vec<f64>>()))
    }
}
