//! Forwards packets of hardware-offloaded IPsec policies at XDP.

pub mod compiler;
pub mod database;
pub mod forwarder;
pub mod gateway;
pub mod host;
pub mod policy;
mod prefix_map;
pub mod source;
mod sys;
pub mod table;

pub use compiler::Compiler;
pub use database::Database;
pub use fastswan_ebpf::PassReason;
pub use forwarder::XdpForwarder;
pub use gateway::Gateway;
pub use host::HostFacts;
pub use policy::{Policy, PolicyId, SecurityAssociation, Selector};
pub use source::{
    PolicyEvent, PolicySource, Snapshot, SourceError, adapters::PolicySourceExt, channel::ChannelSource,
    fixed::StaticSource, netlink::NetlinkSource,
};
pub use table::{BpfTable, MemoryTable, OffloadTable};
