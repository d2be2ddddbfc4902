//! What each check of the program costs: the program without it, beside the whole one.

use aya::include_bytes_aligned;
use fastswan::{forwarder::LoadConfig, policy::Family};
use fastswan_ebpf::Check;

use super::{
    bench::Bench, error::DatapathError, flows::Temperature, mix::Mix, subject::Subject, timing::Spread,
};

/// The library's program, built so that it leaves out what it is told to.
#[cfg(target_endian = "little")]
static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/ablation.bpfel.o");
#[cfg(target_endian = "big")]
static BYTECODE: &[u8] = include_bytes_aligned!("../../bpf/ablation.bpfeb.o");

/// **For measurements only:** has a program loaded that leaves out this check. One that does not count does not ask either: it
/// would do so for each packet.
#[must_use]
pub fn without(config: LoadConfig, check: Check) -> LoadConfig {
    let others = if check == Check::Counting { Check::Asking.bit() } else { 0 };
    config.ablate(BYTECODE, check.bit() | others)
}

/// What is measured: policies of a mix, and packets that each go to another random one.
#[derive(Clone, Copy, Debug)]
pub struct Ablation {
    /// The kind of gateway.
    pub mix: Mix,
    /// The family of the policies.
    pub family: Family,
    /// How many there are.
    pub policies: u32,
    /// Packets of a run: a power of two from 2,048 to 1,048,576.
    pub packets: u32,
    /// Frames come in on this device of the thread's network namespace, and leave there.
    pub device: u32,
}

/// What the checks cost, in nanoseconds a packet.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// All of the program, beyond the empty one.
    pub whole: Spread,
    /// What it takes less without a check, round by round. Less than 0 if it takes more.
    pub checks: Vec<(Check, Spread)>,
}

impl Ablation {
    /// Loads in each round the whole program and then one without each check, and lets each have all packets after making
    /// sure that they do the same. Anew, since where a table lies in memory makes more of a difference than many a check.
    ///
    /// # Errors
    ///
    /// [`DatapathError`], for instance without root.
    pub fn measure(&self, rounds: u32) -> Result<Costs, DatapathError> {
        let mut whole = Vec::new();
        let mut saved = Check::ALL.map(|_| Vec::new());
        for _ in 0..rounds.max(1) {
            let all = self.time(|config| config)?;
            whole.push(all);
            for (check, saved) in Check::ALL.into_iter().zip(&mut saved) {
                saved.push(all - self.time(|config| without(config, check))?);
            }
        }
        let checks = Check::ALL.into_iter().zip(saved.map(Spread::of)).collect();
        Ok(Costs { whole: Spread::of(whole), checks })
    }

    /// What a packet takes the program beyond the empty one.
    fn time(&self, configure: impl FnOnce(LoadConfig) -> LoadConfig) -> Result<f64, DatapathError> {
        let Self { mix, family, policies, packets, device } = *self;
        let mut bench = Bench::load(mix, family, policies, packets, device, configure)?;
        bench.set_temperature(Temperature::Cold)?;
        bench.verify_headers(Subject::Ours)?;
        Ok(bench.time(Subject::Ours)? - bench.time(Subject::Empty)?)
    }
}
