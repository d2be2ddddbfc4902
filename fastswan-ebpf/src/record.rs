//! How the program reads the kernel's own record of a frame, its `xdp_buff`.

/// The immediate of a call that the loader writes anew: as one of the kernel's function `bpf_cast_to_kern_ctx` (Linux 6.2), whose
/// number is another one in each kernel. No helper has this number.
pub const CAST_MARKER: u32 = 0x4653_4331;

/// The bit of the record's flags that says that a frame lies in several buffers (`XDP_FLAGS_HAS_FRAGS`).
pub const SEVERAL_BUFFERS: u32 = 1;
