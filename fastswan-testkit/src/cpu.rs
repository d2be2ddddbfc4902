//! On which CPUs threads run.

use nix::{
    Result,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// Lets this thread, and those that it starts, run on these CPUs only.
///
/// # Errors
///
/// If there is no such CPU, or it may not run there.
pub fn run_on(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|&cpu| set.set(cpu))?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// The CPUs that this thread may run on.
///
/// # Errors
///
/// If the kernel does not tell.
pub fn allowed() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect())
}
