//! What is counted, for each CPU apart.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use fastswan_ebpf::{Passes, Traffic};

use super::maps::{PASSES, SLOTS, TRAFFIC};

/// What a CPU has forwarded for a slot.
#[inline(always)]
pub(super) fn traffic_of(cpu: u32, slot: u32) -> Option<&'static Traffic> {
    // SAFETY: a global that is set when the program is loaded.
    let slots = unsafe { (&raw const SLOTS).read_volatile() };
    TRAFFIC.get(cpu * slots + slot)
}

#[inline(always)]
pub(super) fn count(traffic: &Traffic, length: usize) {
    traffic.packets.add(1);
    traffic.bytes.add(length as u64);
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
