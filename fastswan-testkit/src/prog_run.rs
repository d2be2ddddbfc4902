//! Single frames through the XDP program (`BPF_PROG_TEST_RUN`): what it does with them, and what it counts.

use std::{
    io,
    mem::offset_of,
    os::fd::AsFd as _,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya::{
    maps::{Array, Map, MapData, MapError},
    programs::loaded_programs,
};
use fastswan::{
    BpfTable, OffloadTable as _, PassReason, XdpForwarder,
    forwarder::{AttachConfig, ForwarderError, LoadConfig, RunAction},
    table::{Slot, TableConfig, TableCounters as _, Traffic},
};
use fastswan_ebpf::{Control, KEY_WORDS_V4, List, Passes, Tuple, TupleList, Way};
use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_getres},
};

use crate::sys::SharedNumbers;

/// The program and its table, with nothing attached.
#[derive(Debug)]
pub struct ProgRun {
    forwarder: XdpForwarder,
    /// The table that the program reads.
    pub table: BpfTable,
}

/// What became of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its fate.
    pub action: RunAction,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Why it was passed, by the counter that went up.
    pub reason: Option<PassReason>,
}

impl ProgRun {
    /// Loads the program with a new table, switches it on and gives it a lease of an hour.
    ///
    /// # Errors
    ///
    /// Those of [`XdpForwarder::load`].
    pub fn new(config: &TableConfig) -> Result<Self, ForwarderError> {
        Self::load(LoadConfig::from(config).ask_back(0))
    }

    /// The same, and the kernel's routes are asked as often as the configuration says.
    ///
    /// # Errors
    ///
    /// Those of [`XdpForwarder::load`].
    pub fn load(config: LoadConfig) -> Result<Self, ForwarderError> {
        let (forwarder, mut table) = XdpForwarder::load(config)?;
        table.set_asking(true);
        table.set_enabled(true);
        table.renew_lease(Instant::now() + Duration::from_secs(3600));
        Ok(Self { forwarder, table })
    }

    /// Runs the program on a frame that claims to come in on an interface of this network namespace.
    ///
    /// # Errors
    ///
    /// Those of [`XdpForwarder::run`].
    ///
    /// # Panics
    ///
    /// If the program does not count what it did: exactly one reason for a frame that it passes, none for
    /// one that it forwards.
    pub fn run(&self, frame: &[u8], ifindex: u32) -> Result<Outcome, ForwarderError> {
        let before = self.table.passes();
        let run = self.forwarder.run(frame, ifindex)?;
        let after = self.table.passes();
        let count = |counts: &[(PassReason, u64)], reason| {
            counts.iter().find(|(counted, _)| *counted == reason).map_or(0, |(_, packets)| *packets)
        };
        let counted: Vec<PassReason> = after
            .iter()
            .flat_map(|(reason, packets)| (count(&before, *reason)..*packets).map(|_| *reason))
            .collect();
        let expected = usize::from(run.action == RunAction::Pass);
        assert_eq!(counted.len(), expected, "{:?} was counted as {counted:?}", run.action);
        Ok(Outcome { action: run.action, frame: run.frame, reason: counted.first().copied() })
    }

    /// Makes the table look as if a batch of changes were being written, or as if it were done.
    ///
    /// # Errors
    ///
    /// If the control record cannot be found or written.
    pub fn set_updating(&self, updating: bool) -> anyhow::Result<()> {
        let mut control = control_record(&self.forwarder)?;
        let mut words = control.get(&0, 0)?;
        // The sequence number is the first word, and odd during an update.
        words[0] = if updating { words[0] | 1 } else { words[0].wrapping_add(1) & !1 };
        control.set(0, words, 0)?;
        Ok(())
    }

    /// Makes the table look as if batches of changes were written all the time, of which none is being written when it is looked at,
    /// until it is told to stop.
    ///
    /// # Errors
    ///
    /// If the control record cannot be found or mapped.
    pub fn change_nothing(&self, stop: &AtomicBool) -> anyhow::Result<()> {
        let control = map_of(&self.forwarder, "CONTROL")?;
        let words = SharedNumbers::map(control.fd().as_fd(), size_of::<Control>() / 8)?;
        while !stop.load(Ordering::Relaxed) {
            // The sequence number is the first word.
            words[0].fetch_add(2, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Makes all devices ones that take redirected frames from this many CPUs only.
    ///
    /// # Errors
    ///
    /// If the ways cannot be found or written.
    pub fn limit_cpus(&self, cpus: u16) -> anyhow::Result<()> {
        let map = map_of(&self.forwarder, "WAYS")?;
        let mut ways: Array<MapData, [u64; size_of::<Way>() / 8]> = Map::Array(map).try_into()?;
        for index in 0..ways.len() {
            let mut way = ways.get(&index, 0)?;
            if Way::device(way[0]) != 0 {
                way[0] = Way::exit(Way::device(way[0]), u16::try_from(Way::max_length(way[0]))?, cpus);
                ways.set(index, way, 0)?;
            }
        }
        Ok(())
    }

    /// Attaches the program to an interface of this thread's network namespace.
    ///
    /// # Errors
    ///
    /// Those of [`XdpForwarder::attach`].
    pub fn attach(&mut self, config: &AttachConfig) -> Result<(), ForwarderError> {
        self.forwarder.attach(config).map(drop)
    }

    /// Detaches the program from all interfaces.
    ///
    /// # Errors
    ///
    /// Those of [`XdpForwarder::detach_all`].
    pub fn detach_all(&mut self) -> Result<(), ForwarderError> {
        self.forwarder.detach_all()
    }

    /// The program's number in the kernel.
    #[must_use]
    pub fn program_id(&self) -> u32 {
        self.forwarder.program_id()
    }

    /// What counts the packets that pass, for another thread than the one that writes the table.
    ///
    /// # Errors
    ///
    /// If the counters cannot be found.
    pub fn pass_counters(&self) -> anyhow::Result<PassCounters> {
        Ok(PassCounters(Map::Array(map_of(&self.forwarder, "PASSES")?).try_into()?))
    }

    /// What a slot has forwarded.
    #[must_use]
    pub fn traffic(&self, slot: Slot) -> Traffic {
        self.table.traffic(slot)
    }
}

/// What counts the packets that a program passes.
pub struct PassCounters(Array<MapData, [u64; size_of::<Passes>() / 8]>);

impl PassCounters {
    /// Packets that were passed, by reason.
    ///
    /// # Errors
    ///
    /// If the counters cannot be read.
    pub fn read(&self) -> Result<[u64; PassReason::COUNT], MapError> {
        let mut sum = [0; PassReason::COUNT];
        for column in 0..self.0.len() {
            let words = self.0.get(&column, 0)?;
            for (sum, packets) in sum.iter_mut().zip(&words[offset_of!(Passes, packets) / 8..]) {
                *sum += packets;
            }
        }
        Ok(sum)
    }
}

/// Where the hash of the first tuple of IPv4 cells begins: it changes when all of the hash is written anew.
///
/// # Errors
///
/// If the list of tuples cannot be found or read.
pub fn hash_start(forwarder: &XdpForwarder) -> anyhow::Result<u64> {
    const WORDS: usize = size_of::<TupleList<KEY_WORDS_V4>>() / 8;
    let lists: Array<MapData, [u64; WORDS]> = Map::Array(map_of(forwarder, "TUPLES_V4")?).try_into()?;
    let words = lists.get(&(List::Cells as u32), 0)?;
    Ok(words[(offset_of!(TupleList<KEY_WORDS_V4>, tuples) + offset_of!(Tuple<KEY_WORDS_V4>, start)) / 8])
}

fn control_record(
    forwarder: &XdpForwarder,
) -> anyhow::Result<Array<MapData, [u64; size_of::<Control>() / 8]>> {
    Ok(Map::Array(map_of(forwarder, "CONTROL")?).try_into()?)
}

/// The map of this name that the program has.
fn map_of(forwarder: &XdpForwarder, name: &str) -> anyhow::Result<MapData> {
    let program = forwarder.program_id();
    let info = loaded_programs()
        .filter_map(Result::ok)
        .find(|info| info.id() == program)
        .context("the program is not in the kernel")?;
    for id in info.map_ids()?.context("the kernel does not tell a program's maps")? {
        let map = MapData::from_id(id)?;
        if map.info()?.name_as_str() == Some(name) {
            return Ok(map);
        }
    }
    anyhow::bail!("the program has no map {name}")
}

/// The clock that leases are judged by does not tick more often than this.
pub(crate) fn lease_tick() -> io::Result<Duration> {
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?;
    Ok(Duration::from_nanos(u64::try_from(tick.num_nanoseconds()).map_err(io::Error::other)?))
}
