//! What is counted, for each CPU apart.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use fastswan_ebpf::{Passes, SlotRecord};

use super::maps::{PASSES, SLOT_COUNT, SLOTS};

/// What a CPU knows of a slot, and counts for it.
#[inline(always)]
pub(super) fn slot_of(cpu: u32, slot: u32) -> Option<&'static SlotRecord> {
    // SAFETY: a global that is set when the program is loaded.
    let count = unsafe { (&raw const SLOT_COUNT).read_volatile() };
    SLOTS.get(cpu * count + slot)
}

#[inline(always)]
pub(super) fn count(slot: &SlotRecord, length: usize) {
    slot.packets.add(1);
    slot.bytes.add(length as u64);
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
