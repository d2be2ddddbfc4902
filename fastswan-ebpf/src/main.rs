//! The XDP program: forwards packets of offloaded policies, passes everything else to the kernel.
//!
//! The checks come in the order of [`PassReason`], and until all of them have succeeded the frame stays as
//! it is. The maps and the lookup are described in the library of this crate.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
// The program reads packets and shared memory; each block says why it is sound.
#![allow(unsafe_code)]

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is an XDP program: build it with `cargo testkit ebpf build`");
}
