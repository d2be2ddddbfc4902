//! Counts what is lost after the XDP program has given it away: between the program and the device, and in the device's
//! driver. Two programs at the kernel's tracepoints do so, where they can be loaded.

use std::{fs, io, sync::OnceLock};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
    programs::{ProgramError, RawTracePoint, raw_trace_point::RawTracePointLink},
};
use fastswan_ebpf::Losses as Record;

use super::{maps::MapsError, mmap::Region, net_device::ifindex_offset, verify::verify};

/// The programs of the object, and the tracepoints that they are attached to.
const HOOKS: [(&str, &str); 2] =
    [("fastswan_lost_redirects", "xdp_redirect_err"), ("fastswan_lost_frames", "xdp_devmap_xmit")];

/// The counters, and the programs that count as long as it is kept.
#[derive(Debug)]
pub(super) struct Losses {
    record: Region<Record>,
    ingress: HashMap<MapData, u32, u32>,
    _links: Vec<RawTracePointLink>,
}

/// Why losses are not counted.
#[derive(Debug, thiserror::Error)]
pub(super) enum LossesError {
    #[error(transparent)]
    Maps(#[from] MapsError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("the kernel's BTF does not tell where a device has its index: {0}")]
    Offset(io::Error),
    #[error("program {name} at tracepoint {tracepoint}: {error}")]
    Program {
        name: &'static str,
        tracepoint: &'static str,
        #[source]
        error: ProgramError,
    },
}

impl Losses {
    /// Counts for the device map with this id.
    pub(super) fn attach(ebpf: &mut Ebpf, record: Region<Record>, devices: u32) -> Result<Self, LossesError> {
        let offset = offset_of_ifindex().map_err(LossesError::Offset)?;
        record[0].devices.store(u64::from(devices));
        record[0].ifindex_offset.store(u64::from(offset));
        let ingress = ebpf.take_map("INGRESS").ok_or(MapsError::Missing("INGRESS"))?;
        let links = HOOKS.map(|(name, tracepoint)| {
            attach(ebpf, name, tracepoint).map_err(|error| LossesError::Program { name, tracepoint, error })
        });
        Ok(Self {
            record,
            ingress: ingress.try_into()?,
            _links: links.into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// Counts what comes in on an interface, or no longer.
    pub(super) fn watch(&mut self, ifindex: u32, watch: bool) {
        let changed = if watch { self.ingress.insert(ifindex, 1, 0) } else { self.ingress.remove(&ifindex) };
        if let Err(error) = changed {
            tracing::warn!(ifindex, %error, "losses of an interface's packets may not be counted");
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.record[0].redirects.load() + self.record[0].frames.load()
    }
}

/// Read once: BTF has some megabytes.
fn offset_of_ifindex() -> io::Result<u32> {
    static OFFSET: OnceLock<u32> = OnceLock::new();
    if let Some(offset) = OFFSET.get() {
        return Ok(*offset);
    }
    let btf = fs::read("/sys/kernel/btf/vmlinux")?;
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "no net_device with an ifindex");
    ifindex_offset(&btf).ok_or_else(missing).map(|offset| *OFFSET.get_or_init(|| offset))
}

fn attach(ebpf: &mut Ebpf, name: &str, tracepoint: &str) -> Result<RawTracePointLink, ProgramError> {
    let program: &mut RawTracePoint = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()?;
    verify(|| program.load())?;
    let link = program.attach(tracepoint)?;
    program.take_link(link)
}
