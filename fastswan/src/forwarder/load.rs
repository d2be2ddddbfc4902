//! Loading: the bytecode, the kernels that take it, and the size of the table.

use std::{error::Error, os::fd::AsFd as _};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    programs::{ProgramError, Xdp},
    util::{KernelVersion, nr_cpus},
};
use fastswan_ebpf::ASK_NEVER;

use super::{
    ForwarderError, XdpForwarder,
    error::{chain, errno, lacking},
    hook::xdp::Program,
    record::Record,
};
use crate::table::{BpfTable, TableConfig, verify};

#[cfg(target_endian = "little")]
static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/fastswan.bpfel.o");
#[cfg(target_endian = "big")]
static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/fastswan.bpfeb.o");

/// The name of the program in the object, and what it and the maps need of the kernel.
pub(super) const PROGRAM: &str = "fastswan";
const PROGRAM_NEEDS: &str = "XDP programs for frames in several buffers (Linux 5.18)";
const MAPS_NEED: &str = "array maps that can be mapped (Linux 5.5) and hashed device maps (Linux 5.4)";

/// The first kernel whose decisions the oracle and the scenarios in guests have judged. What the program needs of the
/// kernel is found out by trying; this is about what cannot be tried, the kernel's rules for policies.
const OLDEST_JUDGED: KernelVersion = KernelVersion::new(6, 12, 0);

/// The largest tables that [`XdpForwarder::load`] tries to make.
const MOST_CELLS: u32 = 1 << 26;
const MOST_EXCEPTIONS: u32 = 1 << 22;
const MOST_SLOTS: u32 = 1 << 24;

/// One packet in so many is one that the kernel is asked about.
const DEFAULT_ASK_BACK: u32 = 1024;
const MOST_ASK_BACK: u32 = 1 << 31;

/// How to load the program.
///
/// Needs Linux 6.12, or [`allow_unjudged_kernel`](Self::allow_unjudged_kernel).
///
/// ```no_run
/// use fastswan::{XdpForwarder, forwarder::LoadConfig, table::TableConfig};
///
/// let config = LoadConfig::new(TableConfig::default()).allow_unjudged_kernel(true);
/// let (forwarder, table) = XdpForwarder::load(config)?;
/// # Ok::<(), fastswan::forwarder::ForwarderError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadConfig {
    table: TableConfig,
    allow_unjudged_kernel: bool,
    ask_back: u32,
    /// Another object, and the bits of what its program leaves out.
    #[cfg(feature = "broken-rules")]
    ablation: Option<(&'static [u8], u32)>,
    /// As on a kernel that does not tell where to look.
    #[cfg(feature = "broken-rules")]
    without_record: bool,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self::new(TableConfig::default())
    }
}

impl LoadConfig {
    /// Loads with a table of this size.
    #[must_use]
    pub fn new(table: TableConfig) -> Self {
        Self {
            table,
            allow_unjudged_kernel: false,
            ask_back: DEFAULT_ASK_BACK,
            #[cfg(feature = "broken-rules")]
            ablation: None,
            #[cfg(feature = "broken-rules")]
            without_record: false,
        }
    }

    /// Loads also on kernels before 6.12. No test has compared this library's decisions with theirs: a packet that is
    /// fast there may be one that the kernel would treat otherwise.
    #[must_use]
    pub fn allow_unjudged_kernel(mut self, allow: bool) -> Self {
        self.allow_unjudged_kernel = allow;
        self
    }

    /// Has the kernel's own rules and routes (`bpf_fib_lookup`) asked about one in this many packets that would be fast:
    /// the first of each policy on each CPU, and then every so many. 1,024 unless set; 0 asks never, 1 about each; other
    /// numbers are rounded up to a power of two, at most 2³¹.
    ///
    /// A packet that they do not lead to its policy's device, or that is longer than their path takes, passes
    /// ([`PassReason::FibDiffers`]), and so do those after it until one agrees. The host is then read again, at most once a
    /// second, and nothing is fast meanwhile. A [`Gateway`](crate::Gateway) asks nothing while the embedder
    /// [vouches](crate::HostFacts::vouched) for the host. Routes by a firewall mark are not seen: the mark is taken to be 0.
    ///
    /// An answer takes some hundred nanoseconds: with 1,024, less than a nanosecond a packet.
    ///
    /// Needs no later kernel than the program does.
    ///
    /// [`PassReason::FibDiffers`]: crate::PassReason::FibDiffers
    ///
    /// ```
    /// use fastswan::{forwarder::LoadConfig, table::TableConfig};
    ///
    /// // Four times as often.
    /// let config = LoadConfig::new(TableConfig::default()).ask_back(256);
    /// # drop(config);
    /// ```
    #[must_use]
    pub fn ask_back(mut self, packets: u32) -> Self {
        self.ask_back = packets;
        self
    }

    /// **For measurements only:** loads a program of this library that was built to leave out what it is told to.
    #[cfg(feature = "broken-rules")]
    #[doc(hidden)]
    #[must_use]
    pub fn ablate(mut self, object: &'static [u8], checks: u32) -> Self {
        self.ablation = Some((object, checks));
        self
    }

    /// **For tests only:** loads it as on a kernel that does not describe its types.
    #[cfg(feature = "broken-rules")]
    #[doc(hidden)]
    #[must_use]
    pub fn without_record(mut self) -> Self {
        self.without_record = true;
        self
    }

    fn ask_mask(&self) -> u64 {
        match self.ask_back {
            0 => ASK_NEVER,
            packets => u64::from(packets.min(MOST_ASK_BACK).next_power_of_two()) - 1,
        }
    }
}

impl From<TableConfig> for LoadConfig {
    fn from(table: TableConfig) -> Self {
        Self::new(table)
    }
}

impl From<&TableConfig> for LoadConfig {
    fn from(table: &TableConfig) -> Self {
        Self::new(table.clone())
    }
}

/// Loads the program with a new table.
pub(super) fn load(config: &LoadConfig) -> Result<(XdpForwarder, BpfTable), ForwarderError> {
    let ask_mask = config.ask_mask();
    #[cfg(feature = "broken-rules")]
    let (ablation, without_record) = (&config.ablation, config.without_record);
    let LoadConfig { table: config, allow_unjudged_kernel, .. } = config;
    check_size(config)?;
    if !allow_unjudged_kernel {
        check_judged(kernel()?)?;
    }
    let cpus = nr_cpus().map_err(|(path, error)| ForwarderError::new(format!("reading {path}"), error))?;
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    let weakly_ordered = u32::from(!cfg!(any(target_arch = "x86_64", target_arch = "s390x")));
    let mut loader = EbpfLoader::new();
    loader.override_global("SLOT_COUNT", &config.slots, true);
    loader.override_global("WEAKLY_ORDERED", &weakly_ordered, true);
    for (map, length) in BpfTable::map_lengths(config, cpus) {
        loader.map_max_entries(map, length);
    }
    let object = BYTECODE;
    #[cfg(feature = "broken-rules")]
    let object = match ablation {
        None => object,
        Some((object, checks)) => {
            loader.override_global("ABLATED", checks, true);
            object
        }
    };
    // With the kernel's own record of a frame, if it tells where in it to look.
    let record = Record::of_kernel();
    #[cfg(feature = "broken-rules")]
    let record = record.filter(|_| !without_record);
    let (written, start) = record.map(|record| record.write_calls(object)).unzip();
    let flags = record.map_or(0, |record| record.flags);
    loader.override_global("BUFFER_FLAGS", &flags, true);
    let object = written.as_deref().zip(start).map_or(object, |(written, start)| &written[start..]);
    let mut ebpf = loader.load(object).map_err(|error| refused("creating the BPF maps", MAPS_NEED, error))?;
    program_mut(&mut ebpf, PROGRAM)
        .and_then(|program| verify(|| program.load()))
        .map_err(|error| refused("loading the XDP program", PROGRAM_NEEDS, error))?;
    let table = BpfTable::take(&mut ebpf, config, cpus, ask_mask)
        .map_err(|error| ForwarderError::new("mapping the BPF maps", error))?;
    let program =
        loaded(&ebpf).map_err(|error| ForwarderError::new("reading about the XDP program", error))?;
    Ok((XdpForwarder { ebpf, program, attached: Vec::new(), pinned_in: None }, table))
}

fn loaded(ebpf: &Ebpf) -> Result<Program, Box<dyn Error + Send + Sync>> {
    let xdp = program(ebpf, PROGRAM)?;
    let descriptor = xdp.fd()?;
    Ok(Program::new(descriptor.as_fd(), xdp.info()?.id())?)
}

/// Sizes for which there is no table are an error, with the name of the field.
fn check_size(config: &TableConfig) -> Result<(), ForwarderError> {
    let TableConfig { cells_v4, cells_v6, exceptions, slots, .. } = *config;
    let sizes = [
        ("cells_v4", cells_v4, MOST_CELLS),
        ("cells_v6", cells_v6, MOST_CELLS),
        ("exceptions", exceptions, MOST_EXCEPTIONS),
        ("slots", slots, MOST_SLOTS),
    ];
    for (field, value, most) in sizes {
        let range = 1..=most;
        if !range.contains(&value) {
            return Err(ForwarderError::TableSize { field, value, range });
        }
    }
    Ok(())
}

fn kernel() -> Result<KernelVersion, ForwarderError> {
    KernelVersion::current().map_err(|error| ForwarderError::new("reading the kernel version", error))
}

fn check_judged(found: KernelVersion) -> Result<(), ForwarderError> {
    if found < OLDEST_JUDGED {
        let (found, oldest) = (found.to_string(), OLDEST_JUDGED.to_string());
        return Err(ForwarderError::UnjudgedKernel { found, oldest });
    }
    Ok(())
}

/// Why the kernel does not take a map or a program: for lack of privileges, whichever error it gives then, or of a
/// feature.
fn refused(
    attempt: impl Into<String>,
    needs: &'static str,
    error: impl Into<Box<dyn Error + Send + Sync>>,
) -> ForwarderError {
    let (attempt, error) = (attempt.into(), error.into());
    let lacks = lacking();
    match errno(error.as_ref()) {
        Some(code) if !lacks.is_empty() => {
            let error = std::io::Error::from_raw_os_error(code);
            ForwarderError::NotPermitted { attempt, lacks, error }
        }
        Some(libc::EINVAL) => ForwarderError::Unsupported { attempt, needs, error: chain(error.as_ref()) },
        Some(libc::E2BIG) => ForwarderError::NoMemory { attempt, error: chain(error.as_ref()) },
        _ => ForwarderError::new(attempt, error),
    }
}

pub(super) fn program<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a Xdp, ProgramError> {
    ebpf.program(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

fn program_mut<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_asked_about_one_packet_in_a_power_of_two() {
        let mask = |packets| LoadConfig::default().ask_back(packets).ask_mask();
        assert_eq!([1, 2, 3, 1000, u32::MAX].map(mask), [0, 1, 3, 1023, (1 << 31) - 1]);
        assert_eq!((mask(0), LoadConfig::default().ask_mask()), (ASK_NEVER, 1023));
    }

    #[test]
    fn a_kernel_is_judged_from_the_first_that_the_tests_have_held_it_against() {
        for judged in
            [KernelVersion::new(6, 12, 0), KernelVersion::new(6, 12, 117), KernelVersion::new(7, 3, 4)]
        {
            check_judged(judged).unwrap();
        }
        for unjudged in [KernelVersion::new(6, 11, 99), KernelVersion::new(5, 15, 0)] {
            let message = check_judged(unjudged).unwrap_err().to_string();
            for word in [&unjudged.to_string(), "6.12", "allow_unjudged_kernel(true)"] {
                assert!(message.contains(word), "{message:?} says nothing of {word:?}");
            }
        }
    }

    #[test]
    fn a_table_of_no_or_absurd_size_is_refused_by_the_name_of_its_field() {
        let good = TableConfig::default();
        check_size(&good).unwrap();
        for field in ["cells_v4", "cells_v6", "exceptions", "slots"] {
            for size in [0, u32::MAX] {
                let mut config = good.clone();
                *match field {
                    "cells_v4" => &mut config.cells_v4,
                    "cells_v6" => &mut config.cells_v6,
                    "exceptions" => &mut config.exceptions,
                    _ => &mut config.slots,
                } = size;
                let message = check_size(&config).unwrap_err().to_string();
                for word in [field, &size.to_string(), "from 1 to"] {
                    assert!(message.contains(word), "{message:?} says nothing of {word:?}");
                }
            }
        }
    }
}
