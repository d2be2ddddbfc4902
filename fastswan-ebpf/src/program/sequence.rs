//! Reads that must not meet a change, and additions that several CPUs make.

use core::arch::asm;

use fastswan_ebpf::{Check, Control, PassReason, Word};

use super::{Pass, checks::does, counters::passes, maps::WEAKLY_ORDERED};

/// A section in which the tables must not change.
pub(super) struct Sequence<'a> {
    control: &'a Control,
    begun: u64,
}

impl<'a> Sequence<'a> {
    #[inline(always)]
    pub(super) fn begin(control: &'a Control) -> Result<Self, PassReason> {
        let begun = control.sequence.load();
        if does(Check::Sequence) && begun & 1 != 0 {
            return Err(PassReason::Updating);
        }
        fence()?;
        Ok(Self { control, begun })
    }

    #[inline(always)]
    pub(super) fn still_holds(self) -> Result<(), PassReason> {
        fence()?;
        if !does(Check::Sequence) || self.control.sequence.load() == self.begun {
            Ok(())
        } else {
            Err(PassReason::Updating)
        }
    }

    /// Why a packet passes for which this reason was found: after a change it may be that of no table that there was.
    #[inline(always)]
    pub(super) fn reason(self, found: Pass) -> Pass {
        if !does(Check::Reasons) {
            return found;
        }
        self.still_holds().map_or_else(Pass::from, |()| found)
    }
}

/// Keeps the processor from reordering reads across this point, where it might.
///
/// BPF has no barrier before Linux 6.15, but its atomic instructions that return a value are fully ordered.
#[inline(always)]
fn fence() -> Result<(), PassReason> {
    // SAFETY: a global that is set when the program is loaded; the verifier knows its value and removes the
    // branch that is not taken.
    if unsafe { (&raw const WEAKLY_ORDERED).read_volatile() } != 0 {
        increment(&passes().ok_or(PassReason::Updating)?.scratch);
    }
    Ok(())
}

/// Adds 1 to a word that others may write at the same time. Nothing before or after is reordered across it.
#[inline(always)]
pub(super) fn increment(word: &Word) {
    add(word, 1);
}

/// Adds to a word, likewise.
#[inline(always)]
pub(super) fn add(word: &Word, value: u64) {
    // Rust has no atomic read-modify-write operations for this target.
    // SAFETY: the pointer comes from a reference, and words may be written through one.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
            value = inout(reg) value => _,
            word = in(reg) word.atomic().as_ptr(),
            options(nostack),
        );
    }
}
