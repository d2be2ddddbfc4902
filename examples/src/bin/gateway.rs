//! An embedder's main: sources, table and forwarder, joined by a [`Gateway`]; a status on SIGUSR1, and a hold.
//!
//! Run as root, with the interfaces that packets come in on: `cargo run --bin gateway -- lan0 nic0`

use anyhow::Context as _;
use fastswan::{
    Gateway, NetlinkHost, NetlinkSource, PolicySourceExt as _, Selector, XdpForwarder,
    forwarder::AttachConfig, mirror::HoldTarget, table::TableConfig,
};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    // One customer's traffic is to stay in the kernel.
    let customer: ipnet::IpNet = "10.99.0.0/16".parse().context("a prefix")?;
    let source = NetlinkSource::open()?.withhold(move |policy| policy.id.selector.source == customer);
    let (forwarder, table) = XdpForwarder::load(TableConfig::default())?;
    let mut gateway = Gateway::new(source, NetlinkHost::open()?, table)
        .with_forwarder(forwarder, std::env::args().skip(1).map(AttachConfig::new))?;

    let handle = gateway.handle();
    let mut wanted = signal(SignalKind::user_defined1())?;
    tokio::spawn(async move {
        while wanted.recv().await.is_some() {
            println!("{}", handle.status().await?);
            // Before a daemon takes policies away: when this returns, no packet is forwarded for them any longer.
            let tunnel = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
            let hold = handle.hold(HoldTarget::Selector(tunnel)).await?;
            handle.release(hold).await?;
        }
        anyhow::Ok(())
    });
    gateway.run_until(async { drop(tokio::signal::ctrl_c().await) }).await?;
    Ok(())
}
