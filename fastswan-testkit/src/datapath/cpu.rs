//! Threads that stay on a CPU.

use nix::{
    Result,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Keeps this thread on a CPU.
pub(super) fn stay_on(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus))
}
