//! The daemon that an operator runs beside strongSwan: `mirror LAN NIC`.
//!
//! It mirrors the kernel's packet-offloaded policies and forwards their packets, until SIGINT or SIGTERM. A
//! policy is never fast without a live association; there is no option to assume one.

use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use fastswan::{
    Gateway, HostFacts, NetlinkSource, OffloadTable as _, XdpForwarder,
    forwarder::{AttachConfig, AttachMode},
    table::TableConfig,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};

/// Forwards packets of packet-offloaded IPsec policies at XDP.
#[derive(Debug, Parser)]
struct Arguments {
    /// Interfaces whose packets are forwarded: the clear side, and the device that encrypts.
    #[arg(required = true)]
    interfaces: Vec<String>,
    /// How the program is attached.
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// Software ports (veth, tun) only: their senders have TX checksum and TX VLAN offload off.
    #[arg(long)]
    complete_frames: bool,
    /// Milliseconds that forwarding goes on without a sign of life of this daemon, from 50 up.
    #[arg(long, default_value_t = 1000)]
    lease_ms: u64,
    /// Seconds between reports on standard output; 0 for none.
    #[arg(long, default_value_t = 0)]
    report_seconds: u64,
    /// Cells and host facts that the table holds, for each address family.
    #[arg(long, default_value_t = TableConfig::default().cells)]
    cells: u32,
    /// Policies that can be fast at the same time.
    #[arg(long, default_value_t = TableConfig::default().slots)]
    policies: u32,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Mode {
    /// Native where the driver can, otherwise generic.
    #[default]
    Automatic,
    /// In the driver.
    Native,
    /// In the kernel's stack.
    Generic,
}

impl From<Mode> for AttachMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Automatic => Self::Automatic,
            Mode::Native => Self::Native,
            Mode::Generic => Self::Generic,
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let host = HostFacts::read()?;
    let config = TableConfig { cells: arguments.cells, slots: arguments.policies };
    let (mut forwarder, mut table) = XdpForwarder::load(&config)?;
    for interface in &arguments.interfaces {
        let config = AttachConfig::new(interface)
            .mode(arguments.mode.into())
            .complete_frames(arguments.complete_frames);
        let attachment =
            forwarder.attach(&config).with_context(|| format!("cannot forward packets of {interface}"))?;
        for port in host.ports(attachment.ifindex) {
            table.set_port(&port)?;
        }
    }
    let mut gateway = Gateway::new(NetlinkSource::open()?, table, host)
        .with_lease(Duration::from_millis(arguments.lease_ms));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(stop);
    let period = match arguments.report_seconds {
        0 => Duration::MAX,
        seconds => Duration::from_secs(seconds),
    };
    loop {
        let mut stopped = false;
        let turn = async {
            tokio::select! {
                () = &mut stop => stopped = true,
                () = sleep(period) => {}
            }
        };
        gateway.run_until(turn).await?;
        print!("{}", gateway.report());
        if stopped {
            // Dropping the gateway passes everything to the kernel, dropping the forwarder detaches it.
            return Ok(());
        }
    }
}
