//! What is counted, for each CPU apart.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use fastswan_ebpf::{Forwarded, Passes};

use super::maps::{FORWARDED, PASSES, SLOT_COUNT};

/// What a CPU has forwarded for a slot.
#[inline(always)]
pub(super) fn forwarded(cpu: u32, slot: u32) -> Option<&'static Forwarded> {
    // SAFETY: a global that is set when the program is loaded.
    let count = unsafe { (&raw const SLOT_COUNT).read_volatile() };
    FORWARDED.get(cpu * count + slot)
}

#[inline(always)]
pub(super) fn count(forwarded: &Forwarded, length: usize) {
    forwarded.packets.add(1);
    forwarded.bytes.add(length as u64);
}

#[inline(always)]
pub(super) fn passes() -> Option<&'static Passes> {
    PASSES.get(cpu())
}

#[inline(always)]
pub(super) fn cpu() -> u32 {
    // SAFETY: a helper call without arguments.
    unsafe { bpf_get_smp_processor_id() as u32 }
}
