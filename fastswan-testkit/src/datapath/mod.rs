//! What a packet costs in the data path, beside what it would cost elsewhere.
//!
//! A [`Bench`] holds the same policies four times: in fastswan's own program, filled by the library's compiler; in `lpm`, the
//! classical two longest-prefix matches; and not at all in `floor`, which only does what every program must that forwards, and
//! `empty`, which is subtracted from the others. A driver program writes the headers of the next of many flows into the frame
//! and calls the program under test; it reads the clock every 1,024 packets. The programs take turns in one process, so that
//! a busy machine is as busy for each. Where a table happens to lie in memory makes a difference of tens of nanoseconds: load a
//! bench anew for each round.
//!
//! Frames come in on a device of a lab, and leave on the same one (`XDP_TX`), with other Ethernet addresses. Before anything
//! is measured, [`Bench::verify`] makes sure that the programs forward, and forward right.
//!
//! [`verdicts`] changes policies meanwhile, and judges every verdict.
//!
//! [`veth`] sends live frames through a gateway instead, and counts what arrives.

mod ablation;
mod bench;
mod error;
mod flows;
mod lab;
mod mix;
mod programs;
mod subject;
mod tables;
mod timing;
mod tries;
pub mod verdicts;
pub mod veth;

pub use self::{
    ablation::{Ablation, Costs, without},
    bench::Bench,
    error::DatapathError,
    flows::Temperature,
    lab::DatapathLab,
    mix::Mix,
    programs::ASK_BACK,
    subject::Subject,
    timing::{Figures, Round, Spread},
};
