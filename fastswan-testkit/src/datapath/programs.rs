//! The testkit's own XDP programs, and how a program is run by the driver.

use std::{net::IpAddr, ops::Range};

use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions, include_bytes_aligned,
    maps::{Array, DevMap, Map, MapData, MapError, PerCpuArray, ProgramArray},
    programs::{ProgramError, ProgramFd, Xdp, loaded_programs},
};
use fastswan::policy::{Family, MacAddr};
use fastswan_testkit_ebpf::{INTERVAL, NEXT_HOP, PORT, SENDER, TTL};

use super::{error::DatapathError, flows::Flow, lab::Devices, subject::Subject, tries::Tries};
use crate::frames::Frame;

#[cfg(target_endian = "little")]
pub(super) static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/testkit.bpfel.o");
#[cfg(target_endian = "big")]
pub(super) static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/testkit.bpfeb.o");

/// One packet in so many is one that fastswan's program asks the kernel's routes about, which is the library's default.
pub const ASK_BACK: u32 = 1024;

/// Bytes behind the UDP header. A frame is longer than Ethernet's shortest, so that it needs no padding.
const PAYLOAD: usize = 22;
const ETHERNET_LENGTH: usize = 14;
const UDP_LENGTH: usize = 8;

/// The programs, and what they share with user space.
pub(super) struct Programs {
    ebpf: Ebpf,
    family: Family,
    /// Frames claim to come in on the first.
    devices: Devices,
    flows: Flows,
    progress: Array<MapData, [u64; 2]>,
    times: Array<MapData, u64>,
    under_test: ProgramArray<MapData>,
    /// What is in there. The kernel rewrites the driver's code to change that, for which all processors must wait.
    subject: Option<Subject>,
    counters: PerCpuArray<MapData, [u64; 2]>,
    policies: u32,
    ours: ProgramFd,
}

enum Flows {
    V4(Array<MapData, [[u8; 4]; 2]>),
    V6(Array<MapData, [[u8; 16]; 2]>),
}

/// What became of one packet.
#[derive(Debug)]
pub(super) struct Fate {
    /// What the program returned.
    pub(super) answer: u32,
    /// The headers afterwards.
    pub(super) headers: Vec<u8>,
}

impl Programs {
    /// Loads them, with room for as many policies and flows. `ours` is the number of fastswan's program in the kernel.
    pub(super) fn load(
        family: Family,
        devices: Devices,
        policies: u32,
        flows: u32,
        ours: u32,
    ) -> Result<(Self, Tries), DatapathError> {
        let redirects = u8::from(devices.ingress != devices.egress);
        let mut loader = EbpfLoader::new();
        loader.override_global("REDIRECTS", &redirects, true);
        let tables = match family {
            Family::V4 => [("FLOWS_V4", flows), ("DESTINATIONS_V4", policies), ("POLICIES_V4", policies)],
            Family::V6 => [("FLOWS_V6", flows), ("DESTINATIONS_V6", policies), ("POLICIES_V6", policies)],
        };
        for (map, length) in tables {
            loader.map_max_entries(map, length);
        }
        loader.map_max_entries("COUNTERS", policies);
        let mut ebpf = loader
            .load(BYTECODE)
            .map_err(DatapathError::bpf("creating the maps of the testkit's programs"))?;
        for (name, program) in ebpf.programs_mut() {
            <&mut Xdp>::try_from(program)
                .and_then(Xdp::load)
                .map_err(DatapathError::bpf(format!("loading the testkit's program {name}")))?;
        }
        let ours = open_ours(ours)?;
        if redirects != 0 {
            let mut egress: DevMap<MapData> = take(&mut ebpf, "EGRESS")?;
            let put = egress.set(0, devices.egress, None, 0);
            put.map_err(DatapathError::bpf("telling the testkit's programs where frames leave"))?;
        }
        let tries = Tries::take(&mut ebpf, family)?;
        let programs = Self {
            family,
            devices,
            flows: match family {
                Family::V4 => Flows::V4(take(&mut ebpf, "FLOWS_V4")?),
                Family::V6 => Flows::V6(take(&mut ebpf, "FLOWS_V6")?),
            },
            progress: take(&mut ebpf, "PROGRESS")?,
            times: take(&mut ebpf, "TIMES")?,
            under_test: take(&mut ebpf, "UNDER_TEST")?,
            subject: None,
            counters: take(&mut ebpf, "COUNTERS")?,
            policies,
            ours,
            ebpf,
        };
        Ok((programs, tries))
    }

    /// Gives the driver other flows. There are a power of two of them.
    pub(super) fn set_flows(&mut self, flows: &[Flow]) -> Result<(), DatapathError> {
        for (index, flow) in (0_u32..).zip(flows) {
            match (&mut self.flows, flow.source, flow.destination) {
                (Flows::V4(map), IpAddr::V4(source), IpAddr::V4(destination)) => {
                    map.set(index, [source.octets(), destination.octets()], 0)
                }
                (Flows::V6(map), IpAddr::V6(source), IpAddr::V6(destination)) => {
                    map.set(index, [source.octets(), destination.octets()], 0)
                }
                _ => Err(MapError::ElementNotFound),
            }
            .map_err(DatapathError::bpf("writing the flows"))?;
        }
        Ok(())
    }

    /// Runs a program on some of the packets of a run, which are of one flow after the other, over and over, and returns
    /// the last packet's fate.
    pub(super) fn run(
        &mut self,
        subject: Subject,
        flows: usize,
        packets: Range<u32>,
    ) -> Result<Fate, DatapathError> {
        if self.subject != Some(subject) {
            self.put_under_test(subject)?;
        }
        let start = [u64::from(packets.start), flows as u64 - 1];
        self.progress.set(0, start, 0).map_err(DatapathError::bpf("starting the driver"))?;
        let fate = self.drive(subject, packets.end - packets.start)?;
        let progress = self.progress.get(&0, 0);
        let [sent, _] = progress.map_err(DatapathError::bpf("reading the driver's progress"))?;
        let (sent, packets) = (sent - u64::from(packets.start), u64::from(packets.end - packets.start));
        if sent == packets {
            Ok(fate)
        } else {
            Err(DatapathError::Unsent { program: subject, sent, packets })
        }
    }

    fn put_under_test(&mut self, subject: Subject) -> Result<(), DatapathError> {
        let program = match subject {
            Subject::Ours => &self.ours,
            Subject::Empty => fd(&self.ebpf, "empty")?,
            Subject::Floor => fd(&self.ebpf, "floor")?,
            Subject::Lpm => fd(&self.ebpf, "lpm")?,
        };
        let put = self.under_test.set(0, program, 0);
        put.map_err(DatapathError::bpf(format!("putting {subject} under test")))?;
        self.subject = Some(subject);
        Ok(())
    }

    /// One of the testkit's own.
    pub(super) fn program(&self, name: &str) -> Result<&Xdp, DatapathError> {
        xdp(&self.ebpf, name).map_err(opening(name))
    }

    /// The same, to attach it or to detach it.
    pub(super) fn program_mut(&mut self, name: &str) -> Result<&mut Xdp, DatapathError> {
        let program = self.ebpf.program_mut(name).ok_or(ProgramError::NotLoaded);
        program.and_then(TryInto::try_into).map_err(opening(name))
    }

    /// Takes a map of the testkit's own programs that nobody has taken.
    pub(super) fn take<M: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> Result<M, DatapathError> {
        take(&mut self.ebpf, name)
    }

    /// When every 1,024th packet of the last run began, in nanoseconds.
    pub(super) fn moments(&self, packets: u32) -> Result<Vec<u64>, DatapathError> {
        (0..packets / INTERVAL)
            .map(|index| self.times.get(&index, 0).map_err(DatapathError::bpf("reading the driver's times")))
            .collect()
    }

    /// Packets and bytes that `lpm` has forwarded.
    pub(super) fn counted_by_lpm(&self) -> Result<(u64, u64), DatapathError> {
        let mut sum = (0, 0);
        for policy in 0..self.policies {
            let counters = self.counters.get(&policy, 0);
            for [packets, bytes] in
                counters.map_err(DatapathError::bpf("reading the counters of lpm"))?.iter()
            {
                sum = (sum.0 + packets, sum.1 + bytes);
            }
        }
        Ok(sum)
    }

    /// Bytes of a packet, from the IP header on.
    pub(super) fn packet_length(&self) -> u64 {
        (self.frame_length() - ETHERNET_LENGTH) as u64
    }

    /// The headers that a packet of a flow should have as it comes in, or as it leaves.
    pub(super) fn headers(&self, flow: Flow, forwarded: bool) -> Vec<u8> {
        let mut frame = frame(flow);
        if forwarded {
            frame = frame.macs(MacAddr(PORT), MacAddr(NEXT_HOP)).ttl(TTL - 1);
        }
        let mut bytes = frame.build();
        bytes.truncate(self.header_length());
        bytes
    }

    /// Ethernet and IP.
    fn header_length(&self) -> usize {
        header_length(self.family)
    }

    /// Bytes of a frame, from the Ethernet header on.
    pub(super) fn frame_length(&self) -> usize {
        frame_length(self.family)
    }

    fn drive(&self, subject: Subject, packets: u32) -> Result<Fate, DatapathError> {
        let name = match self.family {
            Family::V4 => "driver_v4",
            Family::V6 => "driver_v6",
        };
        let driven = xdp(&self.ebpf, name)
            .and_then(|driver| drive(driver, self.frame_length(), self.devices.ingress, packets));
        let (answer, mut headers) = driven.map_err(DatapathError::bpf(format!("running {subject}")))?;
        headers.truncate(self.header_length());
        Ok(Fate { answer, headers })
    }
}

/// Runs a program this often on one frame, which claims to come in on a device of this thread's network namespace and has this
/// many bytes, all zero. Returns what the program answered last, and what became of the frame.
pub(super) fn drive(
    driver: &Xdp,
    length: usize,
    device: u32,
    times: u32,
) -> Result<(u32, Vec<u8>), ProgramError> {
    let mut frame = vec![0; length];
    let input = frame.clone();
    let context = context(input.len(), device);
    let mut options = TestRunOptions::new();
    options.data_in = Some(&input);
    options.data_out = Some(&mut frame);
    options.ctx_in = Some(&context);
    options.repeat = times;
    let answer = driver.test_run(options)?.return_value;
    Ok((answer, frame))
}

/// fastswan's program, by its number in the kernel.
pub(super) fn open_ours(number: u32) -> Result<ProgramFd, DatapathError> {
    loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == number)
        .ok_or(ProgramError::NotLoaded)
        .and_then(|program| program.fd())
        .map_err(DatapathError::bpf("opening fastswan's program"))
}

fn header_length(family: Family) -> usize {
    ETHERNET_LENGTH
        + match family {
            Family::V4 => 20,
            Family::V6 => 40,
        }
}

/// Bytes of a frame, from the Ethernet header on.
pub(super) fn frame_length(family: Family) -> usize {
    header_length(family) + UDP_LENGTH + PAYLOAD
}

/// The same as the driver writes, with ports that no policy asks for.
fn frame(flow: Flow) -> Frame {
    let (source, destination) = (flow.source.to_string(), flow.destination.to_string());
    let frame = if flow.source.is_ipv4() {
        Frame::v4(&source, &destination)
    } else {
        Frame::v6(&source, &destination)
    };
    frame.macs(MacAddr(SENDER), MacAddr(PORT)).udp(1000, 2000).payload(PAYLOAD).ttl(TTL)
}

pub(super) fn xdp<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a Xdp, ProgramError> {
    ebpf.program(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

pub(super) fn fd<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, DatapathError> {
    xdp(ebpf, name).and_then(Xdp::fd).map_err(opening(name))
}

fn opening(name: &str) -> impl FnOnce(ProgramError) -> DatapathError + use<> {
    DatapathError::bpf(format!("opening the testkit's program {name}"))
}

/// A `struct xdp_md` for a frame that claims to come in on a device of this thread's network namespace: `data`, `data_end`,
/// `data_meta`, `ingress_ifindex`, `rx_queue_index`, `egress_ifindex`.
pub(super) fn context(length: usize, device: u32) -> Vec<u8> {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    [0, length, 0, device, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect()
}

pub(super) fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<M, DatapathError> {
    let map = ebpf.take_map(name).ok_or_else(|| DatapathError::bpf(name)("there is no such map"))?;
    map.try_into().map_err(DatapathError::bpf(format!("opening the map {name}")))
}
