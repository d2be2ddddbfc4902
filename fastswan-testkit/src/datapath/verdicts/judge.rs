//! The judge: a program that has fastswan's looked at packet by packet.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd as _,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, ProgramArray},
    programs::{ProgramError, ProgramFd, Xdp},
};
use fastswan::policy::Family;
use fastswan_testkit_ebpf::{
    INTERVAL,
    verdict::{Judgement, Seen},
};

use super::{
    super::{
        error::DatapathError,
        flows::Flow,
        programs::{BYTECODE, drive, fd, frame_length, open_ours, take, xdp},
        timing::{intervals, median},
    },
    churn::VersionsOfGroups,
    error::VerdictError,
    policies::Policies,
};
use crate::sys::SharedNumbers;

const PROGRAM: &str = "judge_v4";

/// The program, and what it shares with user space.
pub(super) struct Judge {
    ebpf: Ebpf,
    /// Frames claim to come in there.
    ingress: u32,
    run: Array<MapData, [u64; 6]>,
    flows: Array<MapData, [u32; 4]>,
    judged: Array<MapData, u64>,
    evidence: Array<MapData, [u64; 6]>,
    times: Array<MapData, u64>,
    under_test: ProgramArray<MapData>,
    ours: ProgramFd,
}

/// What was seen in a run.
pub(super) struct Judged {
    /// Packets, by [`Judgement`].
    pub(super) counts: [u64; Judgement::COUNT as usize],
    /// Nanoseconds that a packet took, with the judge: the median of the intervals between two readings of the clock.
    pub(super) time: f64,
}

impl Judge {
    /// Loads it, with room for this many flows. `ours` is the number of fastswan's program in the kernel.
    pub(super) fn load(
        policies: Policies,
        flows: u32,
        ingress: u32,
        ours: u32,
    ) -> Result<(Self, VersionsOfGroups), VerdictError> {
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("JUDGE_FLOWS", flows);
        loader.map_max_entries("JUDGE_VERSIONS", policies.groups().into());
        let mut ebpf = loader.load(BYTECODE).map_err(DatapathError::bpf("creating the maps of the judge"))?;
        for name in [PROGRAM, "empty"] {
            let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded);
            program
                .and_then(<&mut Xdp>::try_from)
                .and_then(Xdp::load)
                .map_err(DatapathError::bpf(format!("loading the testkit's program {name}")))?;
        }
        let numbers = VersionsOfGroups::numbers(policies.groups());
        let versions = match ebpf.map("JUDGE_VERSIONS") {
            Some(Map::Array(map)) => SharedNumbers::map(map.fd().as_fd(), numbers),
            _ => Err(io::ErrorKind::NotFound.into()),
        };
        let versions = versions.map_err(VerdictError::system("mapping the versions of groups"))?;
        let judge = Self {
            ingress,
            run: take(&mut ebpf, "JUDGE_RUN")?,
            flows: take(&mut ebpf, "JUDGE_FLOWS")?,
            judged: take(&mut ebpf, "JUDGED")?,
            evidence: take(&mut ebpf, "JUDGE_EVIDENCE")?,
            times: take(&mut ebpf, "TIMES")?,
            under_test: take(&mut ebpf, "UNDER_TEST")?,
            ours: open_ours(ours)?,
            ebpf,
        };
        Ok((judge, VersionsOfGroups::new(versions, policies)))
    }

    /// Sets flows from this number on.
    pub(super) fn set_flows(&mut self, first: u32, flows: &[(Flow, u16)]) -> Result<(), DatapathError> {
        for (index, (Flow { source, destination }, group)) in (first..).zip(flows) {
            // Those of IPv4 only: as they lie in a header.
            let word = |address: &IpAddr| match address {
                IpAddr::V4(address) => u32::from_ne_bytes(address.octets()),
                IpAddr::V6(_) => 0,
            };
            let flow = [word(source), word(destination), u32::from(*group), 0];
            self.flows.set(index, flow, 0).map_err(DatapathError::bpf("writing the judge's flows"))?;
        }
        Ok(())
    }

    /// Has fastswan's program judged from now on, or one that returns at once and does nothing.
    pub(super) fn put_under_test(&mut self, ours: bool) -> Result<(), DatapathError> {
        let program = if ours { &self.ours } else { fd(&self.ebpf, "empty")? };
        self.under_test.set(0, program, 0).map_err(DatapathError::bpf("putting a program under test"))
    }

    /// Runs the program under test on packets of some flows, a power of two of them, over and over.
    pub(super) fn run(&mut self, first: u32, flows: u32, packets: u32) -> Result<Judged, VerdictError> {
        for judgement in 0..Judgement::COUNT {
            self.judged.set(judgement, 0, 0).map_err(DatapathError::bpf("starting the judge"))?;
        }
        let run = [0, u64::from(packets), u64::from(first), u64::from(flows) - 1, 0, 0];
        self.run.set(0, run, 0).map_err(DatapathError::bpf("starting the judge"))?;
        // Once more for the last packet to be judged.
        xdp(&self.ebpf, PROGRAM)
            .and_then(|program| drive(program, frame_length(Family::V4), self.ingress, packets + 1))
            .map_err(DatapathError::bpf("running the judge"))?;
        let mut counts = [0; Judgement::COUNT as usize];
        for (judgement, count) in (0..Judgement::COUNT).zip(&mut counts) {
            *count = self.judged.get(&judgement, 0).map_err(DatapathError::bpf("reading what was judged"))?;
        }
        let judged = counts.iter().sum();
        if judged != u64::from(packets) {
            return Err(VerdictError::Unseen { judged, packets });
        }
        let moments: Result<Vec<u64>, _> =
            (0..packets / INTERVAL).map(|interval| self.times.get(&interval, 0)).collect();
        let moments = moments.map_err(DatapathError::bpf("reading the judge's times"))?;
        let time = median(&mut intervals(&moments, INTERVAL).collect::<Vec<f64>>());
        Ok(Judged { counts, time })
    }

    /// The last verdict that was not right, in words.
    pub(super) fn evidence(&self) -> Result<String, DatapathError> {
        let evidence = self.evidence.get(&0, 0);
        let [flow, first, rest, ttl, done, begun] =
            evidence.map_err(DatapathError::bpf("reading the judge's evidence"))?;
        let flow = u32::try_from(flow).unwrap_or(0);
        let about = self.flows.get(&flow, 0);
        let [source, destination, group, _] = about.map_err(DatapathError::bpf("reading a flow"))?;
        let [source, destination] = [source, destination].map(|word| Ipv4Addr::from(word.to_ne_bytes()));
        let addresses: Vec<u8> =
            first.to_ne_bytes().into_iter().chain(u32::try_from(rest).unwrap_or(0).to_ne_bytes()).collect();
        let forwarded = u64::from(Seen::forwarded(0, 0).ttl) == ttl;
        let fate = if forwarded { "was forwarded" } else { "has a TTL of one that passed" };
        Ok(format!(
            "a packet from {source} to {destination} {fate}, with the Ethernet addresses {addresses:02x?}; its policy is of group \
             {group}, which was in version {done} before and {begun} afterwards, where odd ones are to pass"
        ))
    }
}
