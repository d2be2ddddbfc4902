//! Forwards packets of hardware-offloaded IPsec policies at XDP.
//!
//! The kernel's packet-offloaded XFRM policies are mirrored into BPF maps, and an XDP program forwards what
//! they match straight to the device that encrypts it. A packet is either handled exactly as the kernel would, or
//! passed to the kernel: when anything is unknown, stale, unsupported or out of room, it is passed, and a
//! [`PassReason`] is counted.
//!
//! # Layers
//!
//! Data goes one way:
//!
//! - [`policy`]: policies, selectors, templates and security associations, in the kernel's terms.
//! - [`source`]: a [`PolicySource`] says what policies there are, first all of them, then each change.
//!   [`NetlinkSource`] asks the running kernel; [`StaticSource`] and [`ChannelSource`] are told by you; write
//!   your own for anything else, or change what another says with [`PolicySourceExt`].
//! - [`host`]: [`HostFacts`] tell what the host does with addresses: what is its own, what is routed where.
//! - [`database`]: a [`Database`] holds what a source has said.
//! - [`compiler`]: a [`Compiler`] decides which packets may be fast. Neither it nor the database does I/O.
//! - [`table`]: an [`OffloadTable`] holds the decisions. [`BpfTable`] is what the XDP program reads,
//!   [`MemoryTable`] is for tests and simulations.
//! - [`forwarder`]: an [`XdpForwarder`] loads the program, attaches it and detaches it.
//! - [`gateway`]: a [`Gateway`] is the loop that joins a source to a table.
//!
//! Most users need the last two, and a source:
//!
#![cfg_attr(feature = "bpf", doc = "```no_run")]
#![cfg_attr(not(feature = "bpf"), doc = "```ignore")]
//! use fastswan::{Gateway, HostFacts, NetlinkSource, XdpForwarder};
//! use fastswan::{forwarder::AttachConfig, table::{Ports as _, TableConfig}};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let host = HostFacts::read()?;
//! let (mut forwarder, mut table) = XdpForwarder::load(&TableConfig::default())?;
//! let attachment = forwarder.attach(&AttachConfig::new("lan0"))?;
//! for port in host.ports(attachment.ifindex) {
//!     table.set_port(&port)?;
//! }
//! let mut gateway = Gateway::new(NetlinkSource::open()?, table, &host);
//! gateway.run_until(std::future::pending()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Before you rely on it
//!
//! **What the fast path skips.** SNMP counters, `AF_PACKET` taps, ICMP redirects and the egress qdisc, which change no
//! packet's fate; and also netfilter rules, tc programs and IPVS on the ports, which do, and are **not detected yet**.
//!
//! **Lag.** The kernel changes a device first and tells user space afterwards. Between the two a packet may still be
//! forwarded by the old state. Where the kernel allows it, `XdpForwarder::attach_guard` (feature `guard`) closes this gap
//! for what is removed; for policies that come it stays.
//!
//! **Host facts** are read once. Read them again when [`NetlinkHost`] says that links, addresses, routes,
//! rules or neighbours have changed; it is not told of sysctls.
//!
//! # Features
//!
//! Features only add. By default there are `bpf` and `netlink`.
//!
//! - `netlink`: the kernel as a source, and what it tells of the host. Linux only; brings `tokio`.
//! - `bpf`: [`forwarder`] and `BpfTable`, which ask the kernel about devices; brings `netlink`.
//! - `tokio`: [`gateway`] and `ChannelSource`.
//! - `serde`: `StaticSource::from_toml`, with `netlink`, which finds interfaces by name.
//! - `metrics`: a gateway records its [`metrics`].
//! - `guard`: `XdpForwarder::attach_guard`.
//! - `untrusted-netlink-senders`: for tests only; lets a netlink source believe processes.
//! - `broken-rules`: for the oracle of the testkit only; lets a compiler break the promise on purpose.
//!
//! Without any, what decides is left: [`policy`], [`event`], [`host`], [`database`], [`compiler`], [`table`] with
//! [`MemoryTable`], [`mirror`] and the sources that do no I/O. That builds on any platform, for simulations, tests and
//! drivers of your own.
//!
//! Needs 64-bit Linux 6.2 or later and, for the forwarder, `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(not(feature = "bpf"), allow(dead_code, reason = "rooms below serve those that are left out"))]

pub mod compiler;
pub mod database;
pub mod event;
#[cfg(feature = "bpf")]
pub mod forwarder;
#[cfg(feature = "tokio")]
pub mod gateway;
pub mod host;
#[cfg(feature = "tokio")]
pub mod metrics;
pub mod mirror;
#[cfg(feature = "netlink")]
pub mod netlink;
pub mod policy;
mod prefix_map;
pub mod source;
#[cfg(feature = "netlink")]
mod sys;
pub mod table;
#[cfg(feature = "serde")]
mod text;

pub use compiler::Compiler;
pub use database::Database;
pub use event::{PolicyEvent, PolicyOrder, Snapshot};
pub use fastswan_ebpf::PassReason;
#[cfg(feature = "bpf")]
pub use forwarder::XdpForwarder;
#[cfg(feature = "tokio")]
pub use gateway::Gateway;
pub use host::{HostEvent, HostFacts};
pub use policy::{Policy, PolicyId, SecurityAssociation, Selector};
#[cfg(feature = "tokio")]
pub use source::channel::ChannelSource;
pub use source::{
    HostSource, PolicySource, SourceError, VouchedHost, adapters::PolicySourceExt, fixed::StaticSource,
};
#[cfg(feature = "netlink")]
pub use source::{NetlinkHost, NetlinkSource};
#[cfg(feature = "bpf")]
pub use table::BpfTable;
pub use table::{MemoryTable, OffloadTable};

/// The example in the README is compiled.
#[cfg(all(doctest, feature = "bpf"))]
#[doc = include_str!("../README.md")]
struct Readme;
