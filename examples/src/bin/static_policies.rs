//! Policies from a file instead of the kernel, for NICs that are set up by other means.
//!
//! Run as root: `cargo run --bin static_policies -- examples/static_policies.toml lan0 nic0`

use anyhow::Context as _;
use fastswan::{
    Gateway, NetlinkHost, StaticSource, XdpForwarder, forwarder::AttachConfig, table::TableConfig,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let file = arguments.next().context("usage: static_policies FILE INTERFACE...")?;
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    let source = StaticSource::from_toml(&text)?;

    let (forwarder, table) = XdpForwarder::load(TableConfig::default())?;
    let mut gateway = Gateway::new(source, NetlinkHost::open()?, table)
        .with_forwarder(forwarder, arguments.map(AttachConfig::new))?;
    gateway.run_until(async { drop(tokio::signal::ctrl_c().await) }).await?;
    Ok(())
}
