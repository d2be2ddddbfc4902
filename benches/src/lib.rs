//! What the benchmarks need beside the library: the BPF maps that they compare it with.

pub mod mixes;
pub mod sys;
