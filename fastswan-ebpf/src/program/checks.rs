//! What a measurement leaves out.

use fastswan_ebpf::Check;

/// The bits of what is left out. Set when the program is loaded, so that the verifier leaves out its instructions too.
#[cfg(feature = "ablation")]
#[unsafe(no_mangle)]
static ABLATED: u32 = 0;

/// Whether the program does this. It always does, but for measurements.
#[inline(always)]
pub(super) fn does(check: Check) -> bool {
    #[cfg(feature = "ablation")]
    // SAFETY: the address is that of a static, which the program never writes.
    let ablated = unsafe { (&raw const ABLATED).read_volatile() };
    #[cfg(not(feature = "ablation"))]
    let ablated = 0;
    ablated & check.bit() == 0
}
