//! The machine that a bench runs on, and what else it had to do.

use std::fs;

use anyhow::Context as _;
use fastswan_testkit::cpu;
use nix::sched::sched_getcpu;
use serde_json::{Value, json};

/// The machine before the bench.
pub(super) struct Machine {
    kernel: String,
    processor: String,
    load: Vec<f64>,
}

impl Machine {
    pub(super) fn look() -> anyhow::Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        Ok(Self { kernel, processor: processor()?, load: load()? })
    }

    /// The same, and its load now.
    pub(super) fn json(&self) -> anyhow::Result<Value> {
        Ok(json!({
            "kernel": self.kernel,
            "cpu": self.processor,
            "load_before": self.load,
            "load_after": load()?,
        }))
    }
}

/// Keeps this thread on the CPU that it is on.
pub(super) fn stay_on_this_cpu() -> anyhow::Result<()> {
    cpu::run_on(&[sched_getcpu()?]).context("staying on one CPU")
}

/// The load of the machine in the last minute, the last five and the last fifteen.
fn load() -> anyhow::Result<Vec<f64>> {
    let load = fs::read_to_string("/proc/loadavg")?;
    load.split(' ').take(3).map(|figure| figure.parse().context("an odd loadavg")).collect()
}

/// What the kernel calls the processor; empty if it does not say.
fn processor() -> anyhow::Result<String> {
    let processors = fs::read_to_string("/proc/cpuinfo")?;
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(model.map_or_else(String::new, |(_, model)| model.to_owned()))
}
