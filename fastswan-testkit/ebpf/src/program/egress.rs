//! Where forwarded frames leave, and where they end.

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_TX},
    macros::map,
    maps::{DevMap, PerCpuArray},
};

use fastswan_ebpf::wire::Frame;

use super::{headers::packet_length, traffic::Counter};

/// Whether forwarded frames leave by the device in `EGRESS` instead of the one that they came in on. User space sets it when it
/// loads the programs, and the verifier leaves out what is then not reached.
#[unsafe(no_mangle)]
static REDIRECTS: u8 = 0;

#[map]
static EGRESS: DevMap = DevMap::with_max_entries(1, 0);
#[map]
static ARRIVED: PerCpuArray<Counter> = PerCpuArray::with_max_entries(1, 0);

/// What a program returns for a frame that it forwards.
#[inline(always)]
pub(super) fn transmit() -> u32 {
    // SAFETY: the address is that of a static, which the program never writes.
    if unsafe { (&raw const REDIRECTS).read_volatile() } == 0 {
        return XDP_TX;
    }
    EGRESS.redirect(0, u64::from(XDP_ABORTED)).unwrap_or(XDP_ABORTED)
}

/// Counts a frame that has arrived, from its IP header on.
#[inline(always)]
pub(super) fn count_arrived(frame: Frame) -> Option<()> {
    let counter = ARRIVED.get_ptr_mut(0)?;
    // SAFETY: the pointer is that of an array's element, which no other CPU has.
    unsafe { Counter::count(counter, packet_length(frame) as u64) };
    Some(())
}
