//! What is lost after the program has given it away: programs at the tracepoints that tell of it. Loaded where that is
//! allowed.

use aya_ebpf::{
    EbpfContext as _, helpers::bpf_probe_read_kernel, macros::raw_tracepoint, programs::RawTracePointContext,
};

use super::{
    maps::{INGRESS, LOSSES},
    sequence::{add, increment},
};

/// `xdp_redirect_err`: the frame could not be handed to the device. Its arguments are the device that the frame came
/// from, the program, the target, the error, and the type and the id of the map (Linux 5.13).
#[raw_tracepoint]
fn fastswan_lost_redirects(context: RawTracePointContext) -> i32 {
    const MAP_ID: usize = 5;
    if let Some(losses) = LOSSES.get(0)
        && u64::from(argument(&context, MAP_ID) as u32) == losses.devices.load()
    {
        increment(&losses.redirects);
    }
    0
}

/// `xdp_devmap_xmit`: the driver has taken some frames and not others. Its arguments are the device that the frames
/// came from, the one that they were to leave by, how many it has taken and how many not (Linux 5.6).
#[raw_tracepoint]
fn fastswan_lost_frames(context: RawTracePointContext) -> i32 {
    const FROM: usize = 0;
    const DROPS: usize = 3;
    let drops = argument(&context, DROPS) as i32;
    let Some(losses) = LOSSES.get(0) else { return 0 };
    if drops <= 0 {
        return 0;
    }
    let ifindex = argument(&context, FROM).wrapping_add(losses.ifindex_offset.load());
    // SAFETY: this read fails if the address is not one of the kernel's.
    let Ok(ifindex) = (unsafe { bpf_probe_read_kernel(ifindex as *const u32) }) else { return 0 };
    // SAFETY: only whether there is an entry is looked at.
    if unsafe { INGRESS.get(&ifindex) }.is_some() {
        add(&losses.frames, drops as u64);
    }
    0
}

/// An argument of the tracepoint, which is a number of 64 bits whatever its type.
#[inline(always)]
fn argument(context: &RawTracePointContext, number: usize) -> u64 {
    // SAFETY: the context is an array of the arguments, and both tracepoints have more than are asked for; the verifier
    // checks it.
    unsafe { context.as_ptr().cast::<u64>().add(number).read() }
}
