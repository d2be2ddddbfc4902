//! The XDP program.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
