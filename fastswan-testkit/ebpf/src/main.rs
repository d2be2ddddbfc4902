//! The XDP programs of `cargo testkit bench datapath` and `bench veth`. The library of this crate tells what they are.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// The programs read and write packets and maps; each block says why it is sound.
#![allow(unsafe_code)]

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("these are XDP programs: build them with `cargo testkit ebpf build`");
}
