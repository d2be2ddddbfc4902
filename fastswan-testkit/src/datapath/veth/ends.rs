//! Where frames begin and where they end.

use std::{
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use aya::{
    TestRun as _, TestRunOptions,
    maps::{MapData, PerCpuArray, PerCpuValues},
    programs::{TestRunAttrs, Xdp, xdp::XdpMode},
    util::nr_cpus,
};
use fastswan::table::Traffic;
use fastswan_testkit_ebpf::{LIVE_INTERVAL, MOST_PACKETS};

use super::{
    super::{
        error::DatapathError,
        programs::{Programs, context},
        timing::{intervals, median},
    },
    contestant::Contestant,
    error::VethError,
    lab::{ETH, VethLab},
};
use crate::cpu::run_on;

/// Frames that the kernel makes and sends at a time, and that a device takes up at a time.
pub(super) const BATCH: u32 = 64;
/// For how long no frame must have arrived until those that have not are lost.
const SILENCE: Duration = Duration::from_millis(200);

/// The generator and the sink.
pub(super) struct Ends {
    progress: PerCpuArray<MapData, [u64; 2]>,
    times: PerCpuArray<MapData, u64>,
    arrived: PerCpuArray<MapData, [u64; 2]>,
}

/// What became of the frames of a turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// Frames that were sent.
    pub(super) frames: u64,
    /// What has arrived, in bytes from the IP header on.
    pub(super) arrived: Traffic,
    /// Millions of frames that arrive in a second.
    pub(super) mpps: f64,
}

impl Turn {
    /// The share of frames that have not arrived.
    pub(super) fn lost(&self) -> f64 {
        1.0 - share(self.arrived.packets, self.frames)
    }
}

impl Ends {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, DatapathError> {
        Ok(Self {
            progress: programs.take("PROGRESS_OF_CPU")?,
            times: programs.take("TIMES_OF_CPU")?,
            arrived: programs.take("ARRIVED")?,
        })
    }

    /// Attaches the sink to the peer's device, until the programs are closed.
    pub(super) fn attach_sink(programs: &mut Programs, lab: &VethLab) -> Result<(), VethError> {
        let device = lab.peer.ifindex(ETH)?;
        let sink = programs.program_mut("sink")?;
        let attached = lab.peer.enter(|| sink.attach_to_if_index(device, XdpMode::Driver));
        attached.map_err(DatapathError::bpf("attaching the sink"))?;
        Ok(())
    }

    /// Sends this many frames on each of some CPUs, beginning with the flow that stands beside it, a multiple of 128, and waits
    /// until they have arrived at the sink.
    pub(super) fn send(
        &mut self,
        programs: &Programs,
        lab: &VethLab,
        contestant: Contestant,
        starts: &[(usize, usize)],
        flows: usize,
        frames: u32,
    ) -> Result<Turn, VethError> {
        let before = self.arrived()?;
        self.generate(programs, lab, contestant, starts, flows, frames)?;
        let all = u64::from(frames) * starts.len() as u64;
        let arrived = self.wait(before, all)?;
        let mut mpps = 0.0;
        for &(cpu, start) in starts {
            let moments = self.moments(cpu, start, frames)?;
            mpps += 1e3 / median(&mut intervals(&moments, LIVE_INTERVAL).collect::<Vec<f64>>());
        }
        Ok(Turn { frames: all, arrived, mpps: mpps * share(arrived.packets, all) })
    }

    /// Sends this many frames on each of some CPUs, beginning with the flow that stands beside it.
    pub(super) fn generate(
        &mut self,
        programs: &Programs,
        lab: &VethLab,
        contestant: Contestant,
        starts: &[(usize, usize)],
        flows: usize,
        frames: u32,
    ) -> Result<(), VethError> {
        let mut progress = vec![[0; 2]; nr_cpus().map_err(|(path, error)| VethError::system(path)(error))?];
        for &(cpu, start) in starts {
            progress[cpu] = [start as u64, flows as u64 - 1];
        }
        let progress =
            PerCpuValues::try_from(progress).map_err(VethError::system("starting the generator"))?;
        self.progress.set(0, progress, 0).map_err(DatapathError::bpf("starting the generator"))?;
        run_on_all(programs, lab, starts, frames)?;
        let progress = self.progress.get(&0, 0);
        let progress = progress.map_err(DatapathError::bpf("reading the generator's progress"))?;
        let sent = starts.iter().map(|&(cpu, start)| progress[cpu][0] - start as u64).sum();
        let all = u64::from(frames) * starts.len() as u64;
        if sent == all { Ok(()) } else { Err(VethError::Unsent { contestant, sent, frames: all }) }
    }

    /// When every 128th frame of a CPU began, in nanoseconds.
    fn moments(&self, cpu: usize, start: usize, frames: u32) -> Result<Vec<u64>, DatapathError> {
        let first = start as u64 / u64::from(LIVE_INTERVAL);
        (first..first + u64::from(frames / LIVE_INTERVAL))
            .map(|interval| {
                let index = u32::try_from(interval % u64::from(MOST_PACKETS / LIVE_INTERVAL)).unwrap_or(0);
                let times = self.times.get(&index, 0);
                Ok(times.map_err(DatapathError::bpf("reading the generator's times"))?[cpu])
            })
            .collect()
    }

    /// Waits until all of these have arrived, or no more do, and returns what has.
    fn wait(&self, before: Traffic, frames: u64) -> Result<Traffic, DatapathError> {
        let (mut last, mut since) = (self.arrived()?, Instant::now());
        while last.packets - before.packets < frames && since.elapsed() < SILENCE {
            thread::sleep(SILENCE / 200);
            let now = self.arrived()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(Traffic { packets: last.packets - before.packets, bytes: last.bytes - before.bytes })
    }

    /// What has arrived at the sink since it was loaded.
    fn arrived(&self) -> Result<Traffic, DatapathError> {
        let arrived = self.arrived.get(&0, 0).map_err(DatapathError::bpf("reading what has arrived"))?;
        Ok(arrived.iter().fold(Traffic::default(), |sum, &[packets, bytes]| sum + Traffic { packets, bytes }))
    }
}

/// Runs the generator in the client, on each of these CPUs at the same time.
fn run_on_all(
    programs: &Programs,
    lab: &VethLab,
    starts: &[(usize, usize)],
    frames: u32,
) -> Result<(), VethError> {
    let generator = programs.program("generator_v4")?;
    let device = lab.client.ifindex(ETH)?;
    let length = programs.frame_length();
    let begin = Barrier::new(starts.len());
    thread::scope(|scope| {
        let generators: Vec<_> = starts
            .iter()
            .map(|&(cpu, _)| {
                let begin = &begin;
                scope.spawn(move || {
                    let ready = lab.client.join_this_thread().map_err(VethError::from).and_then(|()| {
                        run_on(&[cpu]).map_err(VethError::system(format!("staying on CPU {cpu}")))
                    });
                    // Also if it is not: the others wait.
                    begin.wait();
                    ready?;
                    run(generator, device, length, frames)
                })
            })
            .collect();
        generators.into_iter().try_for_each(|generator| {
            generator.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Runs the generator on live frames of a device of this thread's network namespace.
fn run(generator: &Xdp, device: u32, length: usize, frames: u32) -> Result<(), VethError> {
    let (frame, context) = (vec![0; length], context(length, device));
    let mut options = TestRunOptions::new();
    options.data_in = Some(&frame);
    options.ctx_in = Some(&context);
    options.repeat = frames;
    options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
    generator.test_run(options).map_err(DatapathError::bpf("running the generator"))?;
    Ok(())
}

// Far below the numbers that a float does not hold.
#[allow(clippy::cast_precision_loss)]
fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}
