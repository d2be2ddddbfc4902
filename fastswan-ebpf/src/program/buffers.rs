//! Whether a frame lies in one buffer.

use core::arch::asm;

use aya_ebpf::{helpers::bpf_xdp_get_buff_len, programs::XdpContext};
use fastswan_ebpf::{CAST_MARKER, SEVERAL_BUFFERS, wire::Frame};

use super::maps::BUFFER_FLAGS;

/// Whether all of a frame is what the program sees.
#[inline(always)]
pub(super) fn is_whole(context: &XdpContext, frame: Frame) -> bool {
    // SAFETY: a global that is set when the program is loaded; the verifier knows its value and removes the branch that is
    // not taken.
    let offset = unsafe { (&raw const BUFFER_FLAGS).read_volatile() };
    if offset != 0 {
        return flags(context, offset) & u64::from(SEVERAL_BUFFERS) == 0;
    }
    // SAFETY: a helper call on the program's own context.
    let length = unsafe { bpf_xdp_get_buff_len(context.ctx) };
    length == (frame.end - frame.start) as u64
}

/// The flags of the kernel's own record of a frame, so many bytes behind its beginning. A call of the helper costs nine
/// nanoseconds; this is a read of memory, since the verifier puts nothing in place of the call.
#[inline(always)]
fn flags(context: &XdpContext, offset: u32) -> u64 {
    let flags: u64;
    // SAFETY: the loader writes the number of `bpf_cast_to_kern_ctx` into the call, or leaves the offset at 0. It takes the
    // context and returns the record. The verifier sees to it that the record is not read beyond its end.
    unsafe {
        asm!(
            "call {marker}",
            "r0 += {offset}",
            "r0 = *(u32 *)(r0 + 0)",
            marker = const CAST_MARKER,
            offset = in(reg) u64::from(offset),
            out("r0") flags,
            inout("r1") context.ctx => _,
            out("r2") _,
            out("r3") _,
            out("r4") _,
            out("r5") _,
            options(nostack),
        );
    }
    flags
}
