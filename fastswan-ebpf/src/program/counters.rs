//! What is counted, for each CPU apart.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use fastswan_ebpf::Passes;

use super::maps::{PASSES, SLOTS, TRAFFIC};

#[inline(always)]
pub(super) fn count(cpu: u32, slot: u32, length: usize) {
    // SAFETY: a global that is set when the program is loaded.
    let slots = unsafe { (&raw const SLOTS).read_volatile() };
    if let Some(traffic) = TRAFFIC.get(cpu * slots + slot) {
        traffic.packets.add(1);
        traffic.bytes.add(length as u64);
    }
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
