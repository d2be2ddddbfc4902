//! Frames a second from end to end, on veth pairs.
//!
//! ```text
//! client                        gateway                        peer
//! eth0 ──────────────────── lan0       out0 ──────────────────── eth0
//! generator            program under test                        sink
//! ```
//!
//! The generator is an XDP program that the kernel runs in a loop on live frames (`BPF_PROG_TEST_RUN` with
//! `BPF_F_TEST_XDP_LIVE_FRAMES`, 64 at a time): it writes the Ethernet and IP headers of the next flow, and the frame leaves
//! the client's eth0. No socket and no packet buffer is involved. It comes in at the gateway's lan0, on which a [`Contestant`]
//! is attached in native mode, or no program: then the gateway's kernel makes a packet buffer of it and forwards it. It leaves
//! by out0 and arrives at the peer's eth0, where the sink counts and drops it. All of that happens on the CPU that runs the
//! generator, one batch of frames after the other, so a rate is that of generating, forwarding and receiving on one CPU. With
//! two CPUs there are two generators, and each device has a queue for each of them.
//!
//! The generator reads the clock every 128 frames, two batches. A rate is 128 frames in the median of those intervals, summed
//! up over the CPUs, times the share of all frames that the sink has counted: an interruption does not change it, and a frame
//! that is lost does.
//!
//! The contestants take turns in one process. [`VethBench::verify`] makes sure that each of them forwards all frames, and
//! rewrites them as it should: a packet socket of the peer's sees frames of up to 4,096 flows, before the sink is attached.

mod bench;
mod contestant;
mod ends;
mod error;
mod figures;
mod lab;

pub use self::{
    bench::VethBench,
    contestant::Contestant,
    error::VethError,
    figures::{Figures, Measured},
};
