//! `BPF_PROG_TEST_RUN`: a program runs on a frame of the caller's.

use aya::{
    TestRun as _, TestRunOptions,
    programs::{ProgramError, Xdp},
};

/// Runs a program on a frame that claims to come in on an interface, without sending anything.
pub(super) fn test_run(
    program: &Xdp,
    frame: &[u8],
    output: Option<&mut [u8]>,
    ifindex: u32,
) -> Result<aya::TestRunResult, ProgramError> {
    // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    let context: Vec<u8> = [0, length, 0, ifindex, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = output;
    options.ctx_in = Some(&context);
    program.test_run(options)
}
