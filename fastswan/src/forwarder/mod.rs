//! Loads the XDP program, attaches it to interfaces and detaches it.
//!
//! The bytecode is part of the crate: building it takes no eBPF tools. Loading gives the program's table,
//! which the caller fills, usually through a [`Gateway`](crate::Gateway).

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions, include_bytes_aligned,
    maps::Array,
    programs::{
        ProgramError, ProgramInfo, Xdp, XdpMode,
        links::FdLink,
        xdp::{XdpLink, XdpLinkId},
    },
    util::{KernelVersion, nr_cpus},
};

pub use self::error::ForwarderError;
#[cfg(feature = "guard")]
pub use self::guard::{Guard, GuardError};
use self::{
    error::errno,
    link::{PortLink, read_link},
    pins::{Pins, owner},
};
use crate::{
    sys::{grace_period, ifindex, monotonic_coarse_nanoseconds, strips_vlan_tags},
    table::{BpfTable, Counters, MapsError, TableConfig, array},
};

mod error;
#[cfg(feature = "guard")]
mod guard;
mod link;
mod pins;

#[cfg(target_endian = "little")]
static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/fastswan.bpfel.o");
#[cfg(target_endian = "big")]
static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/fastswan.bpfeb.o");

/// The program, and the one that tells its time, by their names in the object.
const PROGRAM: &str = "fastswan";
const CLOCK_PROGRAM: &str = "fastswan_clock";

/// Packet offload came with Linux 6.2; what the program uses (multi-buffer XDP and
/// `bpf_ktime_get_coarse_ns`) with 5.18 and earlier.
const OLDEST_KERNEL: (u8, u8) = (6, 2);

/// How the program is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// Native if the driver can, otherwise generic; [`Attachment::fallback`] tells why.
    #[default]
    Automatic,
    /// In the driver, before the kernel allocates a packet: the fast way.
    Native,
    /// In the kernel's stack: works with every driver and gains less.
    Generic,
}

/// Where and how to attach the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachConfig {
    interface: String,
    mode: AttachMode,
    complete_frames: bool,
}

impl AttachConfig {
    /// Attaches to the interface with this name in the thread's network namespace, automatically native or
    /// generic.
    #[must_use]
    pub fn new(interface: impl Into<String>) -> Self {
        Self { interface: interface.into(), mode: AttachMode::default(), complete_frames: false }
    }

    /// Sets the mode.
    #[must_use]
    pub fn mode(mut self, mode: AttachMode) -> Self {
        self.mode = mode;
        self
    }

    /// States that whoever sends to this software port (veth, tap, bridge) sends complete frames: TX checksum
    /// and TX VLAN offload are off there. XDP cannot tell, and a packet forwarded without its checksum is lost.
    #[must_use]
    pub fn complete_frames(mut self, complete: bool) -> Self {
        self.complete_frames = complete;
        self
    }
}

/// An interface that the program runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its name when it was attached.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// How it is attached; never [`AttachMode::Automatic`].
    pub mode: AttachMode,
    /// Why it is generic although it was to be automatic.
    pub fallback: Option<String>,
}

/// What the program does with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The frame's fate.
    pub action: RunAction,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

/// The fate of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAction {
    /// To the kernel (`XDP_PASS`).
    Pass,
    /// Out of the interface it came in on (`XDP_TX`).
    Transmit,
    /// To another interface (`XDP_REDIRECT`).
    Redirect,
    /// Something that the program never answers: `XDP_DROP`, `XDP_ABORTED`.
    Other(u32),
}

/// What the kernel's verifier says about the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Instructions of the program, as the kernel rewrote them.
    pub instructions: u32,
    /// Instructions that the verifier walked through, of 1,000,000 that it allows (Linux 5.16).
    pub verified_instructions: u32,
}

/// The XDP program in the kernel, and where it is attached. Dropping it detaches it, but from ports that are
/// [pinned](Self::attach_pinned).
///
/// Needs Linux 6.2, `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`.
#[derive(Debug)]
pub struct XdpForwarder {
    ebpf: Ebpf,
    attached: Vec<(Attachment, XdpLinkId)>,
    /// Where the ports are pinned.
    pinned_in: Option<PathBuf>,
}

impl XdpForwarder {
    /// Loads the program with a new table of the given size. The table passes everything until it is filled,
    /// enabled and its lease renewed.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NotPermitted`], [`ForwarderError::KernelTooOld`], or [`ForwarderError::Bpf`] with
    /// what the kernel says, for instance too little memory for the table.
    pub fn load(config: &TableConfig) -> Result<(Self, BpfTable), ForwarderError> {
        check_kernel()?;
        let cpus =
            nr_cpus().map_err(|(path, error)| ForwarderError::new(format!("reading {path}"), error))?;
        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        let weakly_ordered = u32::from(!cfg!(any(target_arch = "x86_64", target_arch = "s390x")));
        let mut loader = EbpfLoader::new();
        loader.override_global("SLOTS", &config.slots, true);
        loader.override_global("WEAKLY_ORDERED", &weakly_ordered, true);
        for (map, length) in BpfTable::map_lengths(config, cpus) {
            loader.map_max_entries(map, length);
        }
        let mut ebpf =
            loader.load(BYTECODE).map_err(|error| ForwarderError::new("creating the BPF maps", error))?;
        for name in [PROGRAM, CLOCK_PROGRAM] {
            program_mut(&mut ebpf, name)
                .and_then(Xdp::load)
                .map_err(|error| ForwarderError::new(format!("loading the XDP program {name}"), error))?;
        }
        let clock_offset = learn_clock_offset(&mut ebpf)?;
        let table = BpfTable::take(&mut ebpf, config, cpus, clock_offset)
            .map_err(|error| ForwarderError::new("mapping the BPF maps", error))?;
        Ok((Self { ebpf, attached: Vec::new(), pinned_in: None }, table))
    }

    /// Attaches the program to an interface. Its packets pass until the table knows the port
    /// ([`Ports::set_port`](crate::table::Ports::set_port)).
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NoSuchInterface`], [`ForwarderError::StripsVlanTags`],
    /// [`ForwarderError::IncompleteFrames`], [`ForwarderError::AlreadyAttached`],
    /// [`ForwarderError::NoNativeXdp`], [`ForwarderError::NotPermitted`] or [`ForwarderError::Attach`].
    pub fn attach(&mut self, config: &AttachConfig) -> Result<Attachment, ForwarderError> {
        let ifindex = find_interface(config)?;
        check_port(config, ifindex, None)?;
        self.attach_new(config, ifindex)
    }

    /// Attaches the program to interfaces, and pins it there, so that it stays attached when the process ends: then
    /// every packet passes to the kernel as soon as the lease is over, and the next process takes over without a gap.
    /// `directory` is made on a BPF file system, which allows no dots in names, and belongs to one network namespace.
    ///
    /// If an earlier process has left its program in the directory, or still runs, this one **takes over**: at each
    /// of the interfaces one program replaces the other, and interfaces that are not named any longer are given up.
    /// What the earlier one counted is added to this table's counters, those of policies to the policies with the same
    /// [index](crate::Policy::index). So fill the table before, for instance with
    /// [`Gateway::synchronise`](crate::Gateway::synchronise), and do not write to it meanwhile. An earlier process
    /// that is still there, or wakes up later, goes on writing to its own maps, which nobody reads:
    /// [`Self::is_superseded`] tells it.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NotABpfFileSystem`], [`ForwarderError::Superseded`] if another process has taken over from
    /// this one, [`ForwarderError::Bpf`] if another process takes 10 seconds to take over, and those of
    /// [`Self::attach`]. Interfaces that come before the one that failed are attached.
    pub fn attach_pinned(
        &mut self,
        directory: impl AsRef<Path>,
        configs: &[AttachConfig],
    ) -> Result<Vec<Attachment>, ForwarderError> {
        let directory = directory.as_ref();
        let pins = self.lock_pins(directory)?;
        let program_id = self.program_id()?;
        let mut ports = Vec::new();
        for config in configs {
            let ifindex = find_interface(config)?;
            let pinned = pins.link(ifindex).map(|(_, program)| program);
            check_port(config, ifindex, pinned)?;
            ports.push((config, ifindex));
        }
        pins.add_counters(program_id, &self.ebpf)?;
        self.pinned_in = Some(directory.to_owned());

        let mut attachments = Vec::new();
        for &(config, ifindex) in &ports {
            attachments.push(match self.take_over(&pins, config, ifindex)? {
                Some(attachment) => attachment,
                None => self.attach_and_pin(&pins, config, ifindex)?,
            });
        }
        for ifindex in pins.ports() {
            if !ports.iter().any(|(_, kept)| *kept == ifindex) {
                pins.remove_port(ifindex)?;
                self.close(|attachment| attachment.ifindex == ifindex)?;
            }
        }

        let before = pins.owner().filter(|before| *before != program_id);
        let program = program_mut(&mut self.ebpf, PROGRAM);
        pins.set_owner(program.map_err(|error| ForwarderError::new("pinning the XDP program", error))?)?;
        if let Some(before) = before {
            // Packets that were in the other program are counted, then no more are.
            grace_period();
            match (pins.counters(before), self.counters()) {
                (Ok(theirs), Ok(ours)) => ours.inherit(&theirs),
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(%error, "the counters of the earlier process are lost");
                }
            }
            pins.remove_counters(before);
            tracing::info!(before, now = program_id, "took over from an earlier process");
        }
        Ok(attachments)
    }

    /// Whether another process has taken over the ports that were [pinned](Self::attach_pinned). Then this one's
    /// table is of no consequence: nobody reads it.
    #[must_use]
    pub fn is_superseded(&self) -> bool {
        let owner = self.pinned_in.as_deref().and_then(owner);
        owner.is_some_and(|owner| self.program_id().is_ok_and(|program| program != owner))
    }

    /// Detaches the program from all interfaces, also from those that were [pinned](Self::attach_pinned), and removes
    /// the pins.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Superseded`], or [`ForwarderError::Bpf`].
    pub fn detach_all(&mut self) -> Result<(), ForwarderError> {
        if let Some(directory) = self.pinned_in.clone() {
            self.lock_pins(&directory)?.remove_all()?;
            self.pinned_in = None;
        }
        self.close(|_| true)
    }

    /// Closes links. What is not pinned is detached.
    fn close(&mut self, which: impl Fn(&Attachment) -> bool) -> Result<(), ForwarderError> {
        let mut links =
            self.attached.extract_if(.., |(attachment, _)| which(attachment)).map(|(_, link)| link);
        program_mut(&mut self.ebpf, PROGRAM)
            .and_then(|program| links.try_for_each(|link| program.detach(link)))
            .map_err(|error| ForwarderError::new("detaching the XDP program", error))
    }

    /// Attaches to a port that runs no program.
    fn attach_new(&mut self, config: &AttachConfig, ifindex: u32) -> Result<Attachment, ForwarderError> {
        let interface = &config.interface;
        let (link, mode, fallback) = match config.mode {
            AttachMode::Native | AttachMode::Generic => {
                (self.attach_link(interface, ifindex, config.mode)?, config.mode, None)
            }
            AttachMode::Automatic => match self.attach_link(interface, ifindex, AttachMode::Native) {
                Ok(link) => (link, AttachMode::Native, None),
                Err(error @ (ForwarderError::NoNativeXdp { .. } | ForwarderError::Attach { .. })) => {
                    let link = self.attach_link(interface, ifindex, AttachMode::Generic)?;
                    (link, AttachMode::Generic, Some(error.to_string()))
                }
                Err(error) => return Err(error),
            },
        };
        let attachment = Attachment { interface: interface.clone(), ifindex, mode, fallback };
        tracing::info!(interface, ifindex, ?mode, fallback = attachment.fallback, "attached the XDP program");
        self.attached.push((attachment.clone(), link));
        Ok(attachment)
    }

    /// Replaces the program of a port that is pinned; `None` if it is not, or in another mode than it is to be.
    fn take_over(
        &mut self,
        pins: &Pins,
        config: &AttachConfig,
        ifindex: u32,
    ) -> Result<Option<Attachment>, ForwarderError> {
        let interface = config.interface.clone();
        let Some((link, pinned)) = pins.link(ifindex) else { return Ok(None) };
        let port = read_link(ifindex)
            .map_err(|error| ForwarderError::new(format!("asking about {interface}"), error))?;
        let mode = if port.generic { AttachMode::Generic } else { AttachMode::Native };
        // A link whose port is gone, or was replaced by another one of its index, is of no use.
        if port.program != Some(pinned) || ![AttachMode::Automatic, mode].contains(&config.mode) {
            drop(link);
            pins.remove_port(ifindex)?;
            self.close(|attachment| attachment.ifindex == ifindex)?;
            pins::wait_for_release(ifindex);
            return Ok(None);
        }
        let link = self.replace(link).map_err(|error| {
            ForwarderError::new(format!("replacing the XDP program of {interface}"), error)
        })?;
        let attachment = Attachment { interface, ifindex, mode, fallback: None };
        self.close(|attachment| attachment.ifindex == ifindex)?;
        self.attached.push((attachment.clone(), link));
        Ok(Some(attachment))
    }

    fn attach_and_pin(
        &mut self,
        pins: &Pins,
        config: &AttachConfig,
        ifindex: u32,
    ) -> Result<Attachment, ForwarderError> {
        let attachment = self.attach_new(config, ifindex)?;
        let attempt = || format!("pinning the link to {}", config.interface);
        let Some((_, link)) = self.attached.pop() else { return Ok(attachment) };
        let link: XdpLink = program_mut(&mut self.ebpf, PROGRAM)
            .and_then(|program| program.take_link(link))
            .map_err(|error| ForwarderError::new(attempt(), error))?;
        let link = FdLink::try_from(link).map_err(|error| ForwarderError::new(attempt(), error))?;
        let link = link.pin(pins.port(ifindex)).map_err(|error| ForwarderError::new(attempt(), error))?;
        let link = self.replace(link.into()).map_err(|error| ForwarderError::new(attempt(), error))?;
        self.attached.push((attachment.clone(), link));
        Ok(attachment)
    }

    /// Makes a link run this program.
    fn replace(&mut self, link: FdLink) -> Result<XdpLinkId, Box<dyn std::error::Error + Send + Sync>> {
        let link = XdpLink::try_from(link)?;
        Ok(program_mut(&mut self.ebpf, PROGRAM)?.attach_to_link(link)?)
    }

    /// Locks a directory, unless it was this forwarder's and is not any longer.
    fn lock_pins(&self, directory: &Path) -> Result<Pins, ForwarderError> {
        let pins = Pins::lock(directory)?;
        if self.pinned_in.as_deref() == Some(directory) && self.is_superseded() {
            return Err(ForwarderError::Superseded { directory: directory.to_owned() });
        }
        Ok(pins)
    }

    fn counters(&self) -> Result<Counters, MapsError> {
        let [slots, traffic, passes] = Counters::MAPS.map(|name| array(&self.ebpf, name));
        Counters::map([slots?, traffic?, passes?])
    }

    /// Detaches the program from an interface, also if it is pinned there.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NotAttached`], [`ForwarderError::Superseded`], or [`ForwarderError::Bpf`].
    pub fn detach(&mut self, interface: &str) -> Result<(), ForwarderError> {
        // More than one if an interface went away and another of its name was attached.
        let is_it = |attachment: &Attachment| attachment.interface == interface;
        let ports: Vec<u32> =
            self.attachments().filter(|it| is_it(it)).map(|attachment| attachment.ifindex).collect();
        if ports.is_empty() {
            return Err(ForwarderError::NotAttached { interface: interface.to_owned() });
        }
        if let Some(directory) = &self.pinned_in {
            let pins = self.lock_pins(directory)?;
            ports.into_iter().try_for_each(|ifindex| pins.remove_port(ifindex))?;
        }
        self.close(is_it)
    }

    /// Where it is attached.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.iter().map(|(attachment, _)| attachment)
    }

    /// Runs the program on a frame that claims to come in on an interface of this network namespace, without
    /// sending anything (`BPF_PROG_TEST_RUN`). The frame is counted like any other.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Bpf`], for instance if the frame has less than 14 bytes.
    pub fn run(&self, frame: &[u8], ifindex: u32) -> Result<Run, ForwarderError> {
        let error = |error: ProgramError| ForwarderError::new("running the XDP program", error);
        let program = program(&self.ebpf, PROGRAM).map_err(error)?;
        // The program only ever shortens a frame.
        let mut output = vec![0; frame.len()];
        let result = test_run(program, frame, Some(&mut output), ifindex).map_err(error)?;
        output.truncate(result.data_size_out as usize);
        let action = match result.return_value {
            2 => RunAction::Pass,
            3 => RunAction::Transmit,
            4 => RunAction::Redirect,
            other => RunAction::Other(other),
        };
        Ok(Run { action, frame: output })
    }

    /// The program's number in the kernel, as `bpftool prog` shows it.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Bpf`].
    pub fn program_id(&self) -> Result<u32, ForwarderError> {
        Ok(self.program_info()?.id())
    }

    /// What the program costs the verifier.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Bpf`].
    pub fn cost(&self) -> Result<ProgramCost, ForwarderError> {
        let info = self.program_info()?;
        Ok(ProgramCost {
            // An instruction has 8 bytes.
            instructions: info.size_translated().unwrap_or(0) / 8,
            verified_instructions: info.verified_instruction_count().unwrap_or(0),
        })
    }

    fn program_info(&self) -> Result<ProgramInfo, ForwarderError> {
        program(&self.ebpf, PROGRAM)
            .and_then(Xdp::info)
            .map_err(|error| ForwarderError::new("reading about the XDP program", error))
    }

    fn attach_link(
        &mut self,
        interface: &str,
        ifindex: u32,
        mode: AttachMode,
    ) -> Result<XdpLinkId, ForwarderError> {
        let xdp_mode = if mode == AttachMode::Generic { XdpMode::Skb } else { XdpMode::Driver };
        let program = program_mut(&mut self.ebpf, PROGRAM);
        program.and_then(|program| program.attach_to_if_index(ifindex, xdp_mode)).map_err(|error| {
            let interface = interface.to_owned();
            let Some(code) = errno(&error) else {
                return ForwarderError::new(format!("attaching to {interface}"), error);
            };
            let error = io::Error::from_raw_os_error(code);
            match code {
                libc::EOPNOTSUPP if mode == AttachMode::Native => {
                    ForwarderError::NoNativeXdp { interface, error }
                }
                libc::EBUSY | libc::EEXIST => {
                    let program = read_link(ifindex).ok().and_then(|link| link.program);
                    ForwarderError::AlreadyAttached { interface, program }
                }
                libc::ENODEV => ForwarderError::NoSuchInterface { interface },
                libc::EPERM => {
                    ForwarderError::NotPermitted { attempt: format!("attaching to {interface}"), error }
                }
                _ => ForwarderError::Attach { interface, mode, error },
            }
        })
    }
}

fn check_kernel() -> Result<(), ForwarderError> {
    let found =
        KernelVersion::current().map_err(|error| ForwarderError::new("reading the kernel version", error))?;
    let (major, minor) = OLDEST_KERNEL;
    if found < KernelVersion::new(major, minor, 0) {
        return Err(ForwarderError::KernelTooOld { found: found.to_string() });
    }
    Ok(())
}

fn find_interface(config: &AttachConfig) -> Result<u32, ForwarderError> {
    let interface = &config.interface;
    ifindex(interface).map_err(|_| ForwarderError::NoSuchInterface { interface: interface.clone() })
}

/// Refuses ports that are taken, but for those that run the program `pinned`, or whose frames do not show what the
/// program must see.
fn check_port(config: &AttachConfig, ifindex: u32, pinned: Option<u32>) -> Result<(), ForwarderError> {
    let interface = config.interface.clone();
    let attempt = || format!("asking about {interface}");
    let link = read_link(ifindex).map_err(|error| ForwarderError::new(attempt(), error))?;
    match link {
        PortLink { program: program @ Some(_), .. } if program != pinned => {
            Err(ForwarderError::AlreadyAttached { interface, program })
        }
        // A software port's VLAN tags are taken off, or not put on, by the sender.
        PortLink { hardware: false, .. } if config.complete_frames => Ok(()),
        PortLink { hardware: false, kind, .. } => Err(ForwarderError::IncompleteFrames { interface, kind }),
        _ => match strips_vlan_tags(&interface) {
            Ok(false) => Ok(()),
            Ok(true) => Err(ForwarderError::StripsVlanTags { interface }),
            Err(error) => Err(ForwarderError::new(attempt(), error)),
        },
    }
}

fn program<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a Xdp, ProgramError> {
    ebpf.program(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

fn program_mut<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

fn test_run(
    program: &Xdp,
    frame: &[u8],
    output: Option<&mut [u8]>,
    ifindex: u32,
) -> Result<aya::TestRunResult, ProgramError> {
    // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    let context: Vec<u8> = [0, length, 0, ifindex, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = output;
    options.ctx_in = Some(&context);
    program.test_run(options)
}

/// The program's time minus this process's, in nanoseconds. They differ in a time namespace.
fn learn_clock_offset(ebpf: &mut Ebpf) -> Result<i64, ForwarderError> {
    let error = |error: Box<dyn std::error::Error + Send + Sync>| {
        ForwarderError::new("learning the clock of the XDP program", error)
    };
    // Both clocks tick together, but a tick may fall between the two readings: then the difference comes out
    // too small. The largest of a few is right, and a smaller one would only shorten the lease.
    let mut offset = i64::MIN;
    for _ in 0..8 {
        let program = program(ebpf, CLOCK_PROGRAM).map_err(|failure| error(failure.into()))?;
        test_run(program, &[0; 14], None, 0).map_err(|failure| error(failure.into()))?;
        let clock = ebpf.map("CLOCK").ok_or_else(|| error("the object has no map CLOCK".into()))?;
        let clock: Array<_, u64> =
            clock.try_into().map_err(|failure: aya::maps::MapError| error(failure.into()))?;
        let theirs = clock.get(&0, 0).map_err(|failure| error(failure.into()))?;
        let ours = monotonic_coarse_nanoseconds();
        offset = offset.max(theirs.cast_signed().wrapping_sub(ours.cast_signed()));
    }
    Ok(offset)
}
