//! `cargo demo`: the main job, between namespaces.

mod tally;
mod traffic;
mod tunnels;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    os::unix::process::CommandExt as _,
    process::Command as Process,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use fastswan::{
    BpfTable, Gateway, NetlinkHost, NetlinkSource, PolicySource, XdpForwarder,
    compiler::PolicyState,
    forwarder::AttachConfig,
    gateway::Status,
    table::{TableConfig, Traffic as Forwarded},
};
use fastswan_testkit::{
    lab::{clean_up_on_signals, remove_leftovers},
    promote::Promote,
};
use serde_json::json;
use tokio::time::sleep;

use self::{
    tally::{Count, Tally},
    traffic::Traffic,
    tunnels::{DELETED, EGRESS, INGRESS, SHADOWED, TUNNELS, Tunnel, Tunnels},
};

/// What `cargo demo` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long packets are sent.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

/// How long packets that are under way, and the gateway's next look, may take.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return run_as_root();
    }
    remove_leftovers();
    clean_up_on_signals()?;
    let tunnels = Tunnels::new()?;
    let outcome = tunnels.0.gateway.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(story(&tunnels, Duration::from_secs(arguments.seconds)))
    })?;
    outcome.print();
    if arguments.json {
        println!("{}", outcome.json());
    }
    outcome.judge()
}

/// Runs this program again through sudo, if somebody is there to type a password.
fn run_as_root() -> anyhow::Result<()> {
    let needs = "the demo makes network namespaces and loads an XDP program: run it as root";
    ensure!(std::io::stdin().is_terminal(), needs);
    eprintln!("The demo makes network namespaces and loads an XDP program: asking sudo for root.");
    let error =
        Process::new("sudo").arg("--").arg(std::env::current_exe()?).args(std::env::args().skip(1)).exec();
    Err(error).context(needs)
}

/// Attaches the program, sends for some time, deletes a policy half-way.
async fn story(tunnels: &Tunnels, duration: Duration) -> anyhow::Result<Outcome> {
    let (forwarder, table) =
        XdpForwarder::load(&TableConfig { cells_v4: 1024, cells_v6: 1024, exceptions: 64, slots: 64 })?;
    let device = nix::net::if_::if_nametoindex(EGRESS).context("the egress device is gone")?;
    let source = Promote::new(NetlinkSource::open()?, device, Tunnels::next_hop(), |_| true);
    let ingress = AttachConfig::new(INGRESS).complete_frames(true);
    let mut gateway =
        Gateway::new(source, NetlinkHost::open()?, table).with_forwarder(forwarder, [ingress])?;
    let all_fast = |status: &Status| rows(status, None).iter().all(|row| row.state == FAST);
    wait(&mut gateway, "policies did not become fast", |status| {
        status.policies.len() == TUNNELS.len() && all_fast(status)
    })
    .await?;
    println!("XDP on {INGRESS}, {} policies fast to {EGRESS}", TUNNELS.len());

    let tally = Tally::start(&tunnels.0)?;
    let traffic = Traffic::start(&tunnels.0)?;
    send(&mut gateway, &tally, duration / 2).await?;

    traffic.hold(true);
    wait(&mut gateway, "packets of the policy to delete did not arrive", settled(&tally, DELETED)).await?;
    let until_deleted = tally.of(DELETED);
    let deleted = rows(&gateway.status(), None).into_iter().find(|row| row.network == DELETED.to_string());
    tunnels.delete(DELETED)?;
    wait(&mut gateway, "the deletion was not noticed", |status| status.policies.len() == TUNNELS.len() - 1)
        .await?;
    println!("policy for {DELETED} deleted: its packets take the kernel's path from now on");
    traffic.hold(false);
    send(&mut gateway, &tally, duration / 2).await?;

    traffic.stop()?;
    for tunnel in TUNNELS {
        wait(&mut gateway, "packets did not arrive", settled(&tally, tunnel)).await.or_else(|error| {
            // The table says how many.
            eprintln!("{error}");
            anyhow::Ok(())
        })?;
    }
    let after_deletion = tally.of(DELETED) - until_deleted;
    let fast_when_sent = TUNNELS.into_iter().filter(|tunnel| ![DELETED, SHADOWED].contains(tunnel));
    let eligible = fast_when_sent.map(|tunnel| tally.of(tunnel).sent).sum::<u64>() + until_deleted.sent;
    let status = gateway.status();
    let outcome = Outcome {
        policies: rows(&status, deleted),
        passes: status.passes,
        total: tally.total(),
        eligible,
        shadowed_fast: tally.of(SHADOWED).fast,
        deleted_fast: after_deletion.fast,
    };
    tally.stop()?;
    Ok(outcome)
}

/// Lets the gateway run until something holds.
async fn wait<S: PolicySource>(
    gateway: &mut Gateway<S, NetlinkHost, BpfTable>,
    otherwise: &str,
    mut holds: impl FnMut(&Status) -> bool,
) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let status = gateway.status();
        if holds(&status) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{otherwise} within {} s:\n{status}", PATIENCE.as_secs());
        gateway.run_until(sleep(Duration::from_millis(20))).await?;
    }
}

/// Whether all that was sent into a tunnel has arrived, and nothing more comes.
fn settled(tally: &Tally, tunnel: Tunnel) -> impl FnMut(&Status) -> bool {
    let (mut before, mut looks) = (None, 0);
    move |_| {
        let now = tally.of(tunnel);
        looks = if before == Some(now) && now.lost() == 0 { looks + 1 } else { 0 };
        before = Some(now);
        looks == 5
    }
}

/// Lets the gateway run, and tells how far it is.
async fn send<S: PolicySource>(
    gateway: &mut Gateway<S, NetlinkHost, BpfTable>,
    tally: &Tally,
    duration: Duration,
) -> anyhow::Result<()> {
    let terminal = std::io::stdout().is_terminal();
    let start = Instant::now();
    while start.elapsed() < duration {
        let left = duration.saturating_sub(start.elapsed());
        gateway.run_until(sleep(left.min(Duration::from_secs(1)))).await?;
        let Count { sent, fast, kernel, .. } = tally.total();
        let line = format!("{sent} packets sent, {fast} forwarded by XDP, {kernel} by the kernel");
        if terminal {
            print!("\r{line}");
            std::io::stdout().flush()?;
        } else {
            println!("{line}");
        }
    }
    if terminal {
        println!();
    }
    Ok(())
}

/// A policy, and what it has done.
struct Row {
    network: String,
    state: String,
    forwarded: Forwarded,
}

const FAST: &str = "fast";

/// The policies of a status, and one that is no longer in it.
fn rows(status: &Status, deleted: Option<Row>) -> Vec<Row> {
    let rows = status.policies.iter().map(|policy| Row {
        network: policy.id.selector.destination.to_string(),
        state: match policy.state {
            PolicyState::Fast => FAST.to_owned(),
            PolicyState::Pass(reason) => reason.name().to_owned(),
        },
        forwarded: policy.traffic,
    });
    rows.chain(deleted.map(|row| Row { state: "deleted".to_owned(), ..row })).collect()
}

/// What the demo found.
struct Outcome {
    policies: Vec<Row>,
    passes: BTreeMap<&'static str, u64>,
    total: Count,
    /// Packets of policies that were fast when they were sent.
    eligible: u64,
    /// Packets that were fast although a better policy without offload matches.
    shadowed_fast: u64,
    /// Packets that were fast although their policy was deleted.
    deleted_fast: u64,
}

impl Outcome {
    fn fast_packets(&self) -> u64 {
        self.policies.iter().map(|row| row.forwarded.packets).sum()
    }

    /// Whoever arrives damaged is lost too.
    fn lost(&self) -> i64 {
        self.total.lost()
    }

    fn print(&self) {
        println!(
            "\n{:<20} {:<8} {:<10} {:>12} {:>14}",
            "policy to", "device", "state", "fast packets", "fast bytes"
        );
        for Row { network, state, forwarded: Forwarded { packets, bytes } } in &self.policies {
            println!("{network:<20} {EGRESS:<8} {state:<10} {packets:>12} {bytes:>14}");
        }
        println!("\npassed to the kernel, by reason");
        for (reason, packets) in &self.passes {
            println!("{reason:<40} {packets:>12}");
        }
        let Count { sent, fast, kernel, .. } = self.total;
        println!(
            "\n{sent} packets sent, {fast} arrived through XDP, {kernel} through the kernel, {} lost",
            self.lost()
        );
    }

    fn json(&self) -> serde_json::Value {
        let policy = |Row { network, state, forwarded }: &Row| {
            let Forwarded { packets, bytes } = forwarded;
            json!({
                "destination": network, "device": EGRESS, "state": state,
                "fast_packets": packets, "fast_bytes": bytes,
            })
        };
        json!({
            "policies": self.policies.iter().map(policy).collect::<Vec<_>>(),
            "sent": self.total.sent,
            "eligible": self.eligible,
            "fast_packets": self.fast_packets(),
            "kernel_packets": self.total.kernel,
            "shadowed_fast": self.shadowed_fast,
            "lost": self.lost(),
            "pass_reasons": self.passes,
        })
    }

    /// Fails if the demo did not show what it is to show.
    fn judge(&self) -> anyhow::Result<()> {
        let fast = self.fast_packets();
        ensure!(self.lost() == 0, "{} packets were lost, {} damaged", self.lost(), self.total.damaged);
        ensure!(fast == self.total.fast, "XDP counted {fast} packets and the peer {}", self.total.fast);
        ensure!(self.shadowed_fast == 0, "{} packets of a shadowed policy were fast", self.shadowed_fast);
        ensure!(self.deleted_fast == 0, "{} packets of a deleted policy were fast", self.deleted_fast);
        ensure!(self.total.kernel > 0, "the kernel forwarded nothing");
        ensure!(
            fast * 100 >= self.eligible * 99,
            "only {fast} of {} eligible packets were fast",
            self.eligible
        );
        Ok(())
    }
}
