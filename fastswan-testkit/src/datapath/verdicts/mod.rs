//! Whether every verdict is right while policies change as fast as they can.
//!
//! One thread, on a CPU of its own, changes policies through the library's database, compiler and table without pause, while the
//! kernel runs the XDP program on another CPU on packets of these policies, one after the other. A judge of the testkit's own, an
//! XDP program that calls the one under test (`judge_v4`), looks at what became of each packet: at the Ethernet addresses that
//! were written, or that none were. They name the group of the policy and its version, and user space says all the time in which
//! version each group may be. So a verdict is right if it was right at some moment of its lookup, to the few dozen changes that
//! a group takes from one version to the next, and no verdict that was right is ever taken for a wrong one.
//!
//! What policies go through is a [`Kind`]. Packets of one kind are run together, so the reasons that the program counts for
//! packets that pass can be judged as well: each must be the kind's, in a version in which the packet was to pass, or
//! `updating`.
//!
//! Two programs the judge must convict: [`VerdictBench::without_sequence`] loads one that does not look at the sequence number of
//! the table, and [`VerdictBench::without_reasons`] one that does not look at it again for packets that pass.

mod bench;
mod churn;
mod error;
mod judge;
mod kind;
mod lab;
mod policies;
mod tally;

pub use self::{
    bench::{VerdictBench, VerdictConfig},
    error::VerdictError,
    kind::Kind,
    lab::VerdictLab,
    tally::{KindTally, Tally},
};
