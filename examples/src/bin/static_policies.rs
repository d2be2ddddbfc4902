//! Policies from a file instead of the kernel, for whoever sets up their NIC by other means.
//!
//! Run as root: `cargo run --bin static_policies -- examples/static_policies.toml lan0 nic0`

use anyhow::Context as _;
use fastswan::{
    Gateway, HostFacts, StaticSource, XdpForwarder,
    forwarder::AttachConfig,
    table::{Ports as _, TableConfig},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let file = arguments.next().context("usage: static_policies FILE INTERFACE...")?;
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    let source = StaticSource::from_toml(&text)?;

    let host = HostFacts::read()?;
    let (mut forwarder, mut table) = XdpForwarder::load(&TableConfig::default())?;
    for interface in arguments {
        let attachment = forwarder.attach(&AttachConfig::new(interface))?;
        for port in host.ports(attachment.ifindex) {
            table.set_port(&port)?;
        }
    }
    let mut gateway = Gateway::new(source, table, &host);
    gateway.run_until(async { drop(tokio::signal::ctrl_c().await) }).await?;
    print!("{}", gateway.report());
    Ok(())
}
