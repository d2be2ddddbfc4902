//! The guard: programs at the kernel's functions that removals pass through.

use aya_ebpf::{bindings::BPF_RB_FORCE_WAKEUP, macros::fentry, programs::FEntryContext};

use super::{
    maps::{CONTROL, REMOVALS},
    sequence::increment,
};

/// The guard, once for each function that it is attached to: it counts removals before the kernel does anything about them.
/// Loaded only if asked for.
#[fentry]
fn fastswan_guard_policy(_: FEntryContext) -> i32 {
    removal_begins()
}

#[fentry]
fn fastswan_guard_sa(_: FEntryContext) -> i32 {
    removal_begins()
}

#[fentry]
fn fastswan_guard_device(_: FEntryContext) -> i32 {
    removal_begins()
}

#[inline(always)]
fn removal_begins() -> i32 {
    if let Some(control) = CONTROL.get(0) {
        increment(&control.removals);
        // Without room there is something to be read already.
        let _ = REMOVALS.output::<u64>(0_u64, u64::from(BPF_RB_FORCE_WAKEUP));
    }
    0
}
