//! A daemon to run beside strongSwan: mirrors the kernel's packet-offloaded policies until it is told to stop.
//!
//! Run as root: `cargo run --bin mirror -- lan0 nic0`. What it does is logged to stderr (`RUST_LOG=debug` tells
//! more), and what it did is printed when it ends.

use std::{collections::BTreeMap, future::Future, io, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use fastswan::{
    BpfTable, Gateway, HostEvent, HostFacts, HostSource as _, NetlinkHost, NetlinkSource, OffloadTable as _,
    PolicySource, XdpForwarder,
    compiler::{Flow, PolicyState},
    forwarder::{AttachConfig, AttachMode, Guard},
    gateway::Report,
    table::{Port, TableConfig, TableError},
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, sleep_until},
};
use tracing_subscriber::EnvFilter;

/// Seconds between two looks at what metrics do not count by themselves.
const LOOK: u64 = 5;

/// Upper bounds of the histograms.
const SECONDS: [f64; 9] = [1e-5, 1e-4, 1e-3, 5e-3, 2e-2, 5e-2, 2e-1, 1.0, 5.0];
const EVENTS: [f64; 7] = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0];

/// Forwards packets of packet-offloaded IPsec policies at XDP.
#[derive(Parser)]
struct Arguments {
    /// Interfaces that packets come in on.
    #[arg(required = true)]
    interfaces: Vec<String>,
    /// How to attach.
    #[arg(long, value_enum, default_value_t = Mode::Automatic)]
    mode: Mode,
    /// The interfaces are software ports (veth, tap) whose senders complete every frame.
    #[arg(long)]
    complete_frames: bool,
    /// A directory below /sys/fs/bpf that the program is pinned in. It then stays attached when this process ends,
    /// passes everything, and the next one takes over from it, or from one that still runs.
    #[arg(long)]
    pin: Option<PathBuf>,
    /// Milliseconds that packets are fast without a sign of life of this process; from 50 up.
    #[arg(long, default_value_t = 1000)]
    lease: u64,
    /// Whether the fast path is shut before the kernel removes anything (on, off), or only where that can be had (auto).
    #[arg(long, value_enum, default_value_t = Guarding::Auto)]
    guard: Guarding,
    /// Cells, host facts and guards of IPv4 that fit.
    #[arg(long, default_value_t = TableConfig::default().cells_v4)]
    cells_v4: u32,
    /// The same of IPv6.
    #[arg(long, default_value_t = TableConfig::default().cells_v6)]
    cells_v6: u32,
    /// Policies that can be fast at the same time.
    #[arg(long, default_value_t = TableConfig::default().slots)]
    policies: u32,
    /// Seconds between two reports; 0 for none but the last.
    #[arg(long, default_value_t = 60)]
    report: u64,
    /// Prints each report as a JSON object on a line.
    #[arg(long)]
    json: bool,
    /// An address and port to serve metrics on, over HTTP in Prometheus' text format, as in 127.0.0.1:9100.
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// A packet to explain in each report: why it is fast, or why not. As in
    /// "10.1.0.5 10.2.0.9 17 1000 2000": addresses, and if need be protocol number and ports.
    #[arg(long, value_parser = flow)]
    explain: Vec<Flow>,
}

fn flow(text: &str) -> anyhow::Result<Flow> {
    let mut words = text.split_whitespace();
    let mut address = || words.next().context("two addresses are needed").and_then(|word| Ok(word.parse()?));
    let mut flow = Flow::between(address()?, address()?);
    if let Some(protocol) = words.next() {
        flow.protocol = protocol.parse().context("the protocol is a number: 6 is TCP, 17 is UDP")?;
    }
    for port in [&mut flow.source_port, &mut flow.destination_port] {
        *port = words.next().map_or(Ok(0), str::parse)?;
    }
    Ok(flow)
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Guarding {
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    Automatic,
    Native,
    Generic,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let mode = match arguments.mode {
        Mode::Automatic => AttachMode::Automatic,
        Mode::Native => AttachMode::Native,
        Mode::Generic => AttachMode::Generic,
    };

    if let Some(address) = arguments.metrics {
        serve_metrics(address)?;
    }
    let mut watch = NetlinkHost::open()?;
    let host = loop {
        if let Some(HostEvent::Snapshot(host)) = watch.next_event().await? {
            break host;
        }
    };
    let config = TableConfig {
        cells_v4: arguments.cells_v4,
        cells_v6: arguments.cells_v6,
        slots: arguments.policies,
        ..TableConfig::default()
    };
    let (mut forwarder, table) = XdpForwarder::load(&config)?;
    let _guard = guard(&mut forwarder, arguments.guard)?;
    let mut gateway =
        Gateway::new(NetlinkSource::open()?, table, &host).with_lease(Duration::from_millis(arguments.lease));
    // Whoever runs before this process goes on until it knows all.
    gateway.synchronise().await?;
    let configs: Vec<_> = arguments
        .interfaces
        .iter()
        .map(|name| AttachConfig::new(name).mode(mode).complete_frames(arguments.complete_frames))
        .collect();
    let attachments = match &arguments.pin {
        Some(directory) => forwarder.attach_pinned(directory, &configs)?,
        None => configs.iter().map(|config| forwarder.attach(config)).collect::<Result<_, _>>()?,
    };
    let interfaces = attachments.iter().map(|attachment| attachment.ifindex).collect();
    let mut follower = Host { source: watch, interfaces, ports: Vec::new() };
    follower.set_ports(gateway.table_mut(), &host)?;

    let mut stopped = std::pin::pin!(stop_signal()?);
    let mut ended = false;
    let mut next_report = seconds_from_now(arguments.report);
    while !ended {
        let pause = async {
            let next_look = arguments.metrics.and_then(|_| seconds_from_now(LOOK));
            match [next_report, next_look].into_iter().flatten().min() {
                Some(next) => sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        let mut host_event = None;
        gateway
            .run_until(async {
                tokio::select! {
                    () = &mut stopped => ended = true,
                    () = superseded(&forwarder) => ended = true,
                    event = follower.source.next_event() => host_event = Some(event),
                    () = pause => {}
                }
            })
            .await?;
        if let Some(event) = host_event.transpose()?.flatten() {
            follower.follow(&mut gateway, event)?;
        }
        // It looks at all policies, which is of no use to anybody if nobody is served.
        if arguments.metrics.is_some() {
            gateway.record_metrics();
        }
        if !ended && next_report.is_none_or(|next| Instant::now() < next) {
            continue;
        }
        next_report = seconds_from_now(arguments.report);
        let report = gateway.report();
        if arguments.json {
            println!("{}", json(&report));
        } else {
            print!("{report}");
        }
        for flow in &arguments.explain {
            println!("{} to {}: {}", flow.source, flow.destination, gateway.explain(flow));
        }
    }
    if let Some(directory) = arguments.pin.filter(|_| forwarder.is_superseded()) {
        bail!("another process has taken over the ports pinned in {}", directory.display());
    }
    Ok(())
}

/// Takes up what the host does with addresses whenever that changes.
struct Host {
    source: NetlinkHost,
    /// Packets come in on these.
    interfaces: Vec<u32>,
    /// As they are in the table.
    ports: Vec<Port>,
}

impl Host {
    fn follow<S: PolicySource>(
        &mut self,
        gateway: &mut Gateway<S, BpfTable>,
        event: HostEvent,
    ) -> anyhow::Result<()> {
        match event {
            HostEvent::Snapshot(host) => {
                self.set_ports(gateway.table_mut(), &host)?;
                gateway.set_host(&host)?;
            }
            _ => gateway.forget_host(),
        }
        Ok(())
    }

    /// Makes the table's ports those of the interfaces.
    fn set_ports(&mut self, table: &mut BpfTable, host: &HostFacts) -> Result<(), TableError> {
        let ports: Vec<Port> = self.interfaces.iter().flat_map(|ifindex| host.ports(*ifindex)).collect();
        for old in std::mem::replace(&mut self.ports, ports) {
            if !self.ports.iter().any(|port| (port.ifindex, port.vlan) == (old.ifindex, old.vlan)) {
                table.remove_port(old.ifindex, old.vlan);
            }
        }
        self.ports.iter().try_for_each(|port| table.set_port(port))
    }
}

/// Attaches the guard, as it was asked for, and says what came of it.
fn guard(forwarder: &mut XdpForwarder, guarding: Guarding) -> anyhow::Result<Option<Guard>> {
    if guarding == Guarding::Off {
        tracing::info!("no guard: packets follow removals with a lag");
        return Ok(None);
    }
    match forwarder.attach_guard() {
        Ok(guard) => {
            tracing::info!("the guard shuts the fast path before anything is removed");
            Ok(Some(guard))
        }
        Err(error) if guarding == Guarding::Auto => {
            tracing::warn!(%error, "no guard: packets follow removals with a lag");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// A report in numbers: packets of policies that are gone are not in it.
fn json(report: &Report) -> serde_json::Value {
    let fast = report.policies.iter().filter(|(policy, _)| policy.state == PolicyState::Fast);
    let passed: BTreeMap<_, _> =
        report.passes.iter().map(|(reason, packets)| (reason.name(), packets)).collect();
    serde_json::json!({
        "policies": report.policies.len(),
        "fast_policies": fast.count(),
        "fast_packets": report.policies.iter().map(|(_, traffic)| traffic.packets).sum::<u64>(),
        "fast_bytes": report.policies.iter().map(|(_, traffic)| traffic.bytes).sum::<u64>(),
        "passed": passed,
        "resyncs": report.resyncs,
        "lease_expiries": report.lease_expiries,
        "audit_repairs": report.audit_repairs,
        "times_shut": report.times_shut,
    })
}

/// Serves what the gateway records, from a task of this runtime.
fn serve_metrics(address: SocketAddr) -> anyhow::Result<()> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_events".to_owned()), &EVENTS)?
        .with_http_listener(address)
        .install()
        .with_context(|| {
            format!("cannot serve metrics on {address}: choose a free port of an address of this host")
        })
}

/// `None` is never.
fn seconds_from_now(seconds: u64) -> Option<Instant> {
    (seconds > 0).then(|| Instant::now() + Duration::from_secs(seconds))
}

/// Waits until another process has taken over.
async fn superseded(forwarder: &XdpForwarder) {
    while !forwarder.is_superseded() {
        sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until this process is told to stop. Then the program is detached, unless it is pinned, since the forwarder is
/// dropped.
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}
