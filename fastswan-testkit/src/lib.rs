//! What fastswan is tested with, and what programs that embed it may test themselves with.
//!
//! - [`lab`]: hosts and links, as network namespaces;
//! - [`site`]: the lab that most stories take place in;
//! - [`capture`]: what devices send and receive;
//! - [`frames`]: Ethernet frames, right or wrong in the way a story needs;
//! - [`prog_run`]: single frames through the XDP program;
//! - [`model`]: what the program should do with a frame, written a second time;
//! - [`conformance`]: the program against the model, at random;
//! - [`oracle`]: the kernel as judge of the whole mirror;
//! - [`chaos`]: everything changes at once, as fast as the kernel takes it;
//! - [`host_facts`]: what is followed of a host, compared with what is read;
//! - [`churn`]: a full table of routes that changes all the time, and how it is followed;
//! - [`growth`]: a table that is too small, and its larger successor, under traffic;
//! - [`cpu`]: on which CPUs threads run;
//! - [`datapath`]: what a packet costs in the XDP program, beside what it would cost elsewhere;
//! - [`filling`]: how fast tables are filled, with cells and from the bytes that the kernel tells;
//! - [`guest`]: what happens between gateways that offload;
//! - [`xfrm`]: XFRM messages, real ones and a way to send them;
//! - [`promote`]: software policies that pretend to be offloaded, for labs only;
//! - [`table_suite`]: what every table must do;
//! - [`vm`]: guests with other kernels and the software NIC.

pub mod capture;
pub mod chaos;
pub mod churn;
pub mod conformance;
pub mod cpu;
pub mod datapath;
pub mod filling;
pub mod frames;
pub mod growth;
pub mod guest;
pub mod host_facts;
pub mod lab;
pub mod model;
pub mod oracle;
pub mod prog_run;
pub mod promote;
pub mod requests;
pub mod site;
mod sys;
pub mod table_suite;
pub mod vm;
pub mod xfrm;

/// The example in the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
