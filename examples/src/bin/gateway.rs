//! An embedder's main: source, table and forwarder, joined by a [`Gateway`].
//!
//! Run as root, with the interfaces that packets come in on: `cargo run --bin gateway -- lan0 nic0`

use std::time::Duration;

use anyhow::Context as _;
use fastswan::{
    Gateway, HostFacts, NetlinkSource, PolicySourceExt as _, XdpForwarder,
    forwarder::AttachConfig,
    policy::{Egress, NextHop},
    table::{Ports as _, TableConfig},
};
use tokio::time::sleep;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let host = HostFacts::read()?;
    let (mut forwarder, mut table) = XdpForwarder::load(&TableConfig {
        cells_v4: 65_536,
        cells_v6: 65_536,
        exceptions: 1024,
        slots: 4096,
    })?;
    for interface in std::env::args().skip(1) {
        let attachment = forwarder.attach(&AttachConfig::new(interface))?;
        println!("{}: {:?}", attachment.interface, attachment.mode);
        for port in host.ports(attachment.ifindex) {
            table.set_port(&port)?;
        }
    }

    // What the kernel does not tell, and this embedder knows: its NIC wants frames with the Ethernet header
    // of the next router, and one customer's traffic is to stay in the kernel.
    let customer = "10.99.0.0/16".parse().context("a prefix")?;
    let source = NetlinkSource::open()?
        .with_egress(|policy| Egress { next_hop: NextHop::Neighbour, ..policy.egress })
        .withhold(move |policy| policy.id.selector.source == customer);

    let mut gateway = Gateway::new(source, table, &host);
    loop {
        // Any future can end a run: here, the time until the next report.
        gateway.run_until(sleep(Duration::from_secs(10))).await?;
        print!("{}", gateway.report());
    }
}
