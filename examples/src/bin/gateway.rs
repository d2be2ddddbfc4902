//! What an embedder's main looks like: a source, a table and the program, put together by hand.
//!
//! `gateway LAN NIC`: packets that come in on either interface and match a policy that the kernel has
//! offloaded to a device leave through that device. Needs root, or `CAP_BPF`, `CAP_NET_ADMIN` and
//! `CAP_PERFMON`.

use std::time::Duration;

use anyhow::Context as _;
use fastswan::{
    Gateway, HostFacts, NetlinkSource, OffloadTable as _, XdpForwarder,
    forwarder::{AttachConfig, Attachment},
    table::TableConfig,
};
use tokio::time::sleep;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let interfaces: Vec<String> = std::env::args().skip(1).collect();
    anyhow::ensure!(!interfaces.is_empty(), "usage: gateway INTERFACE...");

    // What the host does with addresses: its own, its routes, its neighbours.
    let host = HostFacts::read()?;

    // The program and its table. Nothing is forwarded before the table says so.
    let (mut forwarder, mut table) = XdpForwarder::load(&TableConfig::default())?;
    for interface in &interfaces {
        let Attachment { ifindex, mode, .. } = forwarder
            .attach(&AttachConfig::new(interface))
            .with_context(|| format!("cannot forward packets of {interface}"))?;
        println!("{interface}: attached, {mode:?}");
        for port in host.ports(ifindex) {
            table.set_port(&port)?;
        }
    }

    // What the kernel says about policies goes into the table from here on.
    let mut gateway = Gateway::new(NetlinkSource::open()?, table, host);
    loop {
        gateway.run_until(sleep(Duration::from_secs(5))).await?;
        print!("{}", gateway.report());
    }
}
