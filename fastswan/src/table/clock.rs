//! The clock that leases are judged by: the kernel's ticks (jiffies), which cost the program one read of memory.
//!
//! User space cannot see them, and does not compute them from another clock: a kernel without high-resolution timers may
//! lose some. A program tells them, when it is asked.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use aya::{
    Ebpf,
    programs::{ProgramError, SchedClassifier},
};
use fastswan_ebpf::Word;
use rustix::time::{ClockId, clock_getres};

use super::{
    maps::{MapsError, map},
    mmap::Region,
    verify::verify,
};
use crate::sys::bpf;

/// The program of the object that tells the time.
const CLOCK_PROGRAM: &str = "fastswan_clock";

/// The program, and the memory where it leaves its answer.
#[derive(Debug)]
pub(super) struct Clock {
    program: OwnedFd,
    answer: Region<Word>,
    tick: Duration,
}

impl Clock {
    /// Takes the clock of an object whose programs are loaded.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, MapsError> {
        let program: &mut SchedClassifier =
            ebpf.program_mut(CLOCK_PROGRAM).ok_or(ProgramError::NotLoaded)?.try_into()?;
        verify(|| program.load())?;
        let program = program.fd()?.as_fd().try_clone_to_owned().map_err(ProgramError::from)?;
        let clock = Self { program, answer: map(ebpf, "CLOCK", 1)?, tick: length_of_tick() };
        clock.now()?;
        Ok(clock)
    }

    /// Ticks of the kernel, up to now.
    pub(super) fn now(&self) -> Result<u64, ProgramError> {
        // An Ethernet header is the least that there can be of a packet.
        bpf::run(self.program.as_fd(), &[0; 14])?;
        Ok(self.answer[0].load())
    }

    /// How long a tick is.
    pub(super) fn tick(&self) -> Duration {
        self.tick
    }
}

/// Whole ticks in a time. Added to what the [`Clock`] tells they end no later than the time: that tick has begun.
pub(super) fn whole_ticks(time: Duration, tick: Duration) -> u64 {
    u64::try_from(time.as_nanos() / tick.as_nanos().max(1)).unwrap_or(u64::MAX / 2)
}

/// The coarse clocks go forward with the ticks.
fn length_of_tick() -> Duration {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    Duration::try_from(tick).unwrap_or(Duration::from_millis(10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_rounded_down_to_whole_ticks() {
        let ticks = |time| whole_ticks(Duration::from_millis(time), Duration::from_millis(4));
        assert_eq!([0, 3, 4, 7, 1000].map(ticks), [0, 0, 1, 1, 250]);
    }

    #[test]
    fn a_tick_is_one_of_those_that_kernels_are_built_with() {
        let tick = length_of_tick();
        assert!((Duration::from_millis(1)..=Duration::from_millis(10)).contains(&tick), "{tick:?}");
    }
}
