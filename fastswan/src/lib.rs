//! Forwards packets of hardware-offloaded IPsec policies at XDP.
//!
//! The kernel's packet-offloaded XFRM policies are mirrored into BPF maps, and an XDP program forwards what
//! they match straight to the device that encrypts it. A packet is either handled exactly as the kernel would, or
//! passed to the kernel: when anything is unknown, stale, unsupported or out of room, it is passed, and a
//! [`PassReason`] is counted.
//!
//! # Layers
//!
//! Data goes one way, from sources to a table. In the order of the layers, each with what it guarantees to the next:
//!
//! **[`policy`], [`event`], [`host`]** are plain data: policies, selectors, templates and associations in the kernel's
//! terms, what sources say of them, and [`HostFacts`], what the host does with addresses.
//!
//! **[`source`]**: a [`PolicySource`] tells policies and associations, first all of them, then each change; a
//! [`HostSource`] does so of the host. Each says explicitly whether it has caught up, and, when it loses track, says
//! that at once. `NetlinkSource` and `NetlinkHost` ask the running kernel, in the network namespace in which they were
//! opened; [`StaticSource`], `ChannelSource` and [`VouchedHost`] are told by you. Write your own for anything else.
//! Adapters ([`PolicySourceExt`]) only take away: no packet is fast through one that would not be fast without.
//!
//! **[`database`]**: a [`Database`] is what a source has told, each policy and association once, and knows whether that
//! is current.
//!
//! **[`compiler`]**: a [`Compiler`] says which region of packet space may be fast. A region is fast only if the
//! kernel's choice among policies is certain; if the table is too small, more passes. The same input gives the same
//! output.
//!
//! **[`mirror`]**: a [`Mirror`](mirror::Mirror) guarantees the order: nothing is fast while an input is stale or
//! something that was told is not written, and the lease ends one lease after the sources were asked. Database,
//! compiler and mirror do no I/O and have no clock.
//!
//! **[`table`]**: an [`OffloadTable`] holds the decisions, and a packet sees all of an update or nothing of it.
//! `BpfTable` is read by the XDP program, [`MemoryTable`] is for tests and simulations.
//!
//! **`forwarder`**: an `XdpForwarder` loads the program, attaches it to suitable interfaces only, pins it, takes over all
//! ports or none, and detaches it.
//!
//! **`gateway`**: a `Gateway` drives a mirror with tokio, and attaches the program when the table holds everything.
//! While it runs, a `GatewayHandle` tells its status and takes commands from any thread.
//!
//! A typical user touches the gateway and its handle, the forwarder's `AttachConfig`, and two sources:
//!
#![cfg_attr(feature = "bpf", doc = "```no_run")]
#![cfg_attr(not(feature = "bpf"), doc = "```ignore")]
//! use fastswan::{Gateway, NetlinkHost, NetlinkSource, XdpForwarder};
//! use fastswan::{forwarder::AttachConfig, table::TableConfig};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let (forwarder, table) = XdpForwarder::load(TableConfig::default())?;
//! let mut gateway = Gateway::new(NetlinkSource::open()?, NetlinkHost::open()?, table)
//!     // Where packets come in that are to be encrypted. The device that encrypts them need not be listed.
//!     .with_forwarder(forwarder, [AttachConfig::new("lan0")])?;
//! let handle = gateway.handle();
//! let stop = async {
//!     // Elsewhere, on any thread, as often as you like.
//!     if let Ok(status) = handle.status().await {
//!         println!("{status}");
//!     }
//! };
//! gateway.run_until(stop).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Errors say what was tried, on which object, why it failed and what to do: print them with `{error}`.
//!
//! # Before you rely on it
//!
//! **What the fast path skips.** SNMP counters, `AF_PACKET` taps, ICMP redirects and the egress qdisc, which change no
//! packet's fate. Netfilter, filters of tc, tcx programs and IPVS do, so what one of them may concern is not fast, unless you
//! allow its kind with `Gateway::with_allowed_hooks`: [`host::hooks`] says when that is right, and what such a ruleset looks
//! like.
//!
//! **Lag.** The kernel changes a device first and tells user space afterwards. Between the two a packet may still be
//! forwarded by the old state. Where the kernel allows it, `XdpForwarder::attach_guard` (feature `guard`) closes this gap
//! for what is removed, and `GatewayHandle::hold` for removals that you plan; for policies that come it stays.
//!
//! **Host facts** are followed change by change: links, addresses, routes, rules, neighbours, next hop objects and sysctls. The
//! kernel does not notify of all sysctls: `disable_xfrm` and some others are known within about 200 ms.
//!
//! # Features
//!
//! Features only add. By default there are `bpf` and `netlink`.
//!
//! - `netlink`: the kernel as a source of policies and of host facts. Linux only; brings `tokio`.
//! - `bpf`: `forwarder` and `BpfTable`, which ask the kernel about devices; brings `netlink`.
//! - `tokio`: `gateway` and `ChannelSource`, on any platform.
//! - `serde`: a status can be serialised; with `netlink`, which finds interfaces by name, `StaticSource::from_toml`.
//! - `metrics`: a gateway records its `metrics`; brings `tokio`.
//! - `guard`: `XdpForwarder::attach_guard`; brings `bpf`.
//! - `untrusted-netlink-senders`: for tests only; lets a netlink source believe processes.
//! - `broken-rules`: for the oracle of the testkit only; lets a compiler break the promise on purpose.
//!
//! Without any, what decides is left: [`policy`], [`event`], [`host`], [`database`], [`compiler`], [`table`] with
//! [`MemoryTable`], [`mirror`] and the sources that do no I/O. That builds on any platform, for simulations, tests and
//! drivers of your own.
//!
//! # Requirements
//!
//! The forwarder needs 64-bit Linux 6.12 or later, or an explicit opt-in (`LoadConfig::allow_unjudged_kernel`), since
//! no test has compared the decisions with those of older kernels; and `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`.
//! The crate needs Rust 1.88.

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
