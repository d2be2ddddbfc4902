//! The same policies in the table of fastswan's program and in the tries of `lpm`.

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
    lab::Devices,
    mix::Mix,
    programs::{ASK_BACK, Programs},
    subject::Subject,
    tries::Tries,
};
use crate::prog_run::ProgRun;

/// The programs, and the policies of a mix that they know.
pub(super) struct Tables {
    mix: Mix,
    family: Family,
    policies: u32,
    devices: Devices,
    pub(super) ours: ProgRun,
    database: Database,
    compiler: Compiler,
    pub(super) programs: Programs,
    tries: Tries,
}

impl Tables {
    /// Loads all programs, with room for as many flows, and writes the first policies of a mix.
    pub(super) fn new(
        mix: Mix,
        family: Family,
        policies: u32,
        flows: u32,
        devices: Devices,
        configure: impl FnOnce(LoadConfig) -> LoadConfig,
    ) -> Result<Self, DatapathError> {
        let cells = policies + mix.other_cells();
        let (cells_v4, cells_v6) = match family {
            Family::V4 => (cells, 1),
            Family::V6 => (1, cells),
        };
        let config = TableConfig { cells_v4, cells_v6, exceptions: 64, slots: policies };
        let ours = ProgRun::load(configure(LoadConfig::from(&config).ask_back(ASK_BACK)))?;
        let (programs, tries) = Programs::load(family, devices, policies, flows, ours.program_id())?;
        let mut compiler = Compiler::new(config.capacity());
        compiler.set_host(&mix.host(devices.egress));
        let database = Database::default();
        let mut tables = Self { mix, family, policies, devices, ours, database, compiler, programs, tries };
        tables.fill()?;
        Ok(tables)
    }

    fn fill(&mut self) -> Result<(), DatapathError> {
        let Self { mix, family, policies, devices, .. } = *self;
        let own = (0..policies).map(|number| mix.policy(family, number, devices.egress));
        let policies_of_gateway = own.chain(mix.others()).collect();
        let snapshot = Snapshot { policies: policies_of_gateway, ..Snapshot::default() };
        self.database.apply(PolicyEvent::Snapshot(snapshot));
        self.write()?;
        self.ours.table.set_port(&Port {
            ifindex: devices.ingress,
            vlan: 0,
            receiver: devices.ingress,
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
    pub(super) fn remove_from_table(&mut self, number: u32) -> Result<(), DatapathError> {
        let policy = self.mix.policy(self.family, number, self.devices.egress);
        self.database.apply(PolicyEvent::PolicyRemoved(policy.id));
        self.write()
    }

    /// Takes a policy, and all others for its destination, out of the tries of `lpm`.
    pub(super) fn remove_from_tries(&mut self, number: u32) -> Result<(), DatapathError> {
        self.tries.remove(self.mix.networks(self.family, number).1)
    }

    fn write(&mut self) -> Result<(), DatapathError> {
        let update = self.compiler.compile(&self.database);
        Ok(self.ours.table.apply(&update)?)
    }

    /// Gives the programs that make frames at most this many flows, and returns them.
    pub(super) fn set_flows(
        &mut self,
        temperature: Temperature,
        most: u32,
    ) -> Result<Vec<Flow>, DatapathError> {
        let flows = temperature.flows(self.mix, self.family, self.policies, most);
        self.programs.set_flows(&flows)?;
        Ok(flows)
    }

    /// What a program has counted as forwarded since it was loaded, if it counts.
    pub(super) fn counted(&self, subject: Subject) -> Result<Traffic, DatapathError> {
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

    /// Packets that fastswan's program has passed since it was loaded, by reason.
    pub(super) fn passed(&self) -> Vec<(&'static str, u64)> {
        self.ours.table.passes().into_iter().map(|(reason, packets)| (reason.name(), packets)).collect()
    }
}
