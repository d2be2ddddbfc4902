//! A daemon to run beside strongSwan: mirrors the kernel's packet-offloaded policies until it is told to stop.
//!
//! Run as root: `cargo run --bin mirror -- lan0 nic0`. What it does is logged to stderr (`RUST_LOG=debug` tells
//! more), and a report is printed now and then, on SIGUSR1, and when it ends. It ends with 3 when another one has taken over.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use fastswan::{
    Gateway, NetlinkHost, NetlinkSource, XdpForwarder,
    compiler::Flow,
    forwarder::{AttachConfig, AttachMode, ForwarderError, Guard, LoadConfig},
    gateway::{GatewayError, GatewayHandle, Status},
    host::{HookKind, Hooks},
    table::{TableConfig, Traffic},
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Upper bounds of the histograms.
const SECONDS: [f64; 9] = [1e-5, 1e-4, 1e-3, 5e-3, 2e-2, 5e-2, 2e-1, 1.0, 5.0];
const EVENTS: [f64; 7] = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0];
/// What it ends with when another process has taken over.
const SUPERSEDED: u8 = 3;

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
    /// Kinds of hooks that packets may skip although these may change their fate: you answer for it that they do not.
    #[arg(long, value_delimiter = ',')]
    allow_hooks: Vec<HookKind>,
    /// Run on a kernel on which fastswan's rules have not been judged.
    #[arg(long)]
    allow_unjudged_kernel: bool,
    /// Cells, host facts and guards of IPv4 that fit.
    #[arg(long, default_value_t = TableConfig::default().cells_v4)]
    cells_v4: u32,
    /// The same of IPv6.
    #[arg(long, default_value_t = TableConfig::default().cells_v6)]
    cells_v6: u32,
    /// Policies that can be fast at the same time.
    #[arg(long, default_value_t = TableConfig::default().slots)]
    policies: u32,
    /// Seconds between two reports; 0 for none but the last, and those on SIGUSR1.
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
    #[arg(long)]
    explain: Vec<Flow>,
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
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A log that cannot be written is no reason to stop.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .log_internal_errors(false)
        .init();
    if let Some(address) = arguments.metrics {
        serve_metrics(address)?;
    }
    let mode = match arguments.mode {
        Mode::Automatic => AttachMode::Automatic,
        Mode::Native => AttachMode::Native,
        Mode::Generic => AttachMode::Generic,
    };
    let config = TableConfig {
        cells_v4: arguments.cells_v4,
        cells_v6: arguments.cells_v6,
        slots: arguments.policies,
        ..TableConfig::default()
    };
    let config = LoadConfig::new(config).allow_unjudged_kernel(arguments.allow_unjudged_kernel);
    let (mut forwarder, table) = XdpForwarder::load(config)?;
    let _guard = guard(&mut forwarder, arguments.guard)?;
    let interfaces = arguments
        .interfaces
        .iter()
        .map(|name| AttachConfig::new(name.as_str()).mode(mode).complete_frames(arguments.complete_frames));
    let allowed = arguments.allow_hooks.iter().copied().fold(Hooks::none(), Hooks::allow);
    let mut gateway = Gateway::new(NetlinkSource::open()?, NetlinkHost::open()?, table)
        .with_lease(Duration::from_millis(arguments.lease))
        .with_allowed_hooks(allowed)
        .with_forwarder(forwarder, interfaces)?;
    if let Some(directory) = &arguments.pin {
        gateway = gateway.pinned_in(directory);
    }
    match gateway.run_until(report(gateway.handle(), arguments)).await {
        Err(GatewayError::Forwarder(error @ ForwarderError::Superseded { .. })) => {
            tracing::error!("{error}");
            Ok(ExitCode::from(SUPERSEDED))
        }
        other => Ok(other.map(|()| ExitCode::SUCCESS)?),
    }
}

/// Prints reports until the process is told to stop.
async fn report(handle: GatewayHandle, arguments: Arguments) {
    let signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::user_defined1()];
    let [Ok(mut interrupt), Ok(mut terminate), Ok(mut wanted)] = signals.map(signal) else { return };
    let mut gone = Traffic::default();
    loop {
        let is_last = tokio::select! {
            biased;
            () = received(&mut interrupt) => true,
            () = received(&mut terminate) => true,
            () = received(&mut wanted) => false,
            () = tokio::time::sleep(Duration::from_secs(arguments.report)), if arguments.report > 0 => false,
        };
        let Ok(status) = handle.status().await else { return };
        let mut text = if arguments.json { json(&status, &mut gone) } else { status.to_string() };
        for flow in &arguments.explain {
            let Ok(explanation) = handle.explain(*flow).await else { return };
            text.extend(["packet ", &flow.source.to_string(), " to ", &flow.destination.to_string()]);
            text.extend([": ", &explanation.to_string(), "\n"]);
        }
        // Whoever read the reports may have gone.
        let _ = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
        if is_last {
            return;
        }
    }
}

async fn received(signal: &mut Signal) {
    signal.recv().await;
}

/// A report in numbers. `gone` is what policies forwarded that were gone at an earlier one.
fn json(status: &Status, gone: &mut Traffic) -> String {
    let all = *gone + status.traffic();
    *gone = status.removed.iter().fold(*gone + status.removed_unnamed, |sum, policy| sum + policy.traffic);
    let statistics = &status.statistics;
    let report = serde_json::json!({
        "policies": status.policies.len(),
        "fast_policies": status.fast_policies(),
        "fast_packets": all.packets,
        "fast_bytes": all.bytes,
        "passed": status.passes,
        "resyncs": statistics.resyncs,
        "lease_expiries": statistics.lease_expiries,
        "audit_repairs": statistics.audit_repairs,
        "times_shut": statistics.times_shut,
        "interfaces": status.interfaces,
        "state": status.state,
    });
    format!("{report}\n")
}

/// Attaches the guard, as it was asked for, and says what came of it.
fn guard(forwarder: &mut XdpForwarder, guarding: Guarding) -> anyhow::Result<Option<Guard>> {
    let guard = if guarding == Guarding::Off { None } else { Some(forwarder.attach_guard()) };
    match guard {
        Some(Ok(guard)) => {
            tracing::info!("the guard shuts the fast path before anything is removed");
            return Ok(Some(guard));
        }
        Some(Err(error)) if guarding == Guarding::On => return Err(error.into()),
        Some(Err(error)) => tracing::warn!(%error, "no guard: packets follow removals with a lag"),
        None => tracing::info!("no guard: packets follow removals with a lag"),
    }
    Ok(None)
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
