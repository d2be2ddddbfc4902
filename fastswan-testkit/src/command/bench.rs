//! `cargo testkit bench`: how long a mirror takes to begin with what a kernel has, and what memory it needs; how it follows a
//! host that changes all the time; what a packet costs, and whether its verdict is right while policies change; how many frames a
//! gateway forwards in a second; how fast a table is filled, and how it grows.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    process::Command as Process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use async_trait::async_trait;
use clap::Subcommand;
use fastswan::{
    Gateway, NetlinkHost, NetlinkSource, Policy, PolicyEvent, PolicyId, PolicySource, SecurityAssociation,
    Selector, SourceError, XdpForwarder,
    policy::{Direction, Family, OffloadDev, OffloadKind, Overhead, Template},
    source::{BoxFuture, NetlinkConfig},
    table::TableConfig,
};
use fastswan_testkit::{
    lab::{clean_up_on_signals, remove_leftovers},
    requests::{Change, allocation, request},
    site::Site,
    xfrm::{ask, dump_undecoded},
};
use ipnet::{IpNet, Ipv4Net};
use serde_json::json;

mod ablation;
mod churn;
mod datapath;
mod filling;
mod growth;
mod machine;
mod panels;
mod verdicts;
mod veth;

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// From the kernel's policies and associations to the table, compared with only reading them.
    Mirror(Arguments),
    /// How a gateway follows a host whose many routes change all the time.
    Churn(churn::Arguments),
    /// What a packet costs in the XDP program, beside two longest-prefix matches and beside only forwarding.
    Datapath(datapath::Arguments),
    /// What each check of the XDP program costs.
    Ablation(ablation::Arguments),
    /// How many frames a gateway forwards in a second, on veth pairs from end to end, beside two longest-prefix matches, only
    /// forwarding, and the kernel.
    Veth(veth::Arguments),
    /// How a table that is too small is replaced by a larger one under traffic, and how its policies are deleted.
    Growth(growth::Arguments),
    /// How fast tables are filled, with cells and from the bytes that the kernel tells.
    Filling(filling::Arguments),
    /// Whether every verdict is right while policies change as fast as they can.
    Verdicts(verdicts::Arguments),
    /// One round, in a namespace that has them already.
    #[command(hide = true)]
    Round(Size),
}

/// What `cargo testkit bench mirror` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    size: Size,
    /// How often it is measured, each time by a fresh process.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Prints one JSON object on the last line of stdout.
    #[arg(long)]
    json: bool,
}

/// How much there is.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Size {
    /// Outbound policies, each with an association of its own.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    policies: u32,
}

/// What a round measures.
#[derive(Clone, Copy, Debug, serde::Deserialize, serde::Serialize)]
struct Round {
    /// Reading everything into a buffer, in seconds.
    dump: f64,
    /// From the opening of the source until everything is in the table, in seconds.
    mirror: f64,
    /// How much longer that took, in time on a processor: other processes make less of a difference to it.
    ratio: f64,
    /// What the process grew by meanwhile, in bytes per policy, without the table's maps.
    bytes: f64,
    /// How long the loop stops to compare all of it with what an audit has found, in seconds.
    audit: f64,
    /// How long it takes to look at all policies for a status, which a gateway does a few at a time, in seconds.
    status: f64,
}

/// A column of what is printed: its name there and in JSON, and how it comes from a round.
type Figure = (&'static str, &'static str, fn(&Round) -> f64);

const FIGURES: [Figure; 7] = [
    ("dump ms", "dump_ms", |round| round.dump * 1e3),
    ("mirror ms", "mirror_ms", |round| round.mirror * 1e3),
    ("ratio", "ratio", |round| round.mirror / round.dump),
    ("processor ratio", "processor_ratio", |round| round.ratio),
    ("bytes per policy", "bytes_per_policy", |round| round.bytes),
    ("audit ms", "audit_ms", |round| round.audit * 1e3),
    ("status ms", "status_ms", |round| round.status * 1e3),
];

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Mirror(arguments) => mirror(arguments),
        Command::Churn(arguments) => churn::run(arguments),
        Command::Datapath(arguments) => datapath::run(arguments),
        Command::Ablation(arguments) => ablation::run(arguments),
        Command::Veth(arguments) => veth::run(arguments),
        Command::Growth(arguments) => growth::run(arguments),
        Command::Filling(arguments) => filling::run(arguments),
        Command::Verdicts(arguments) => verdicts::run(arguments),
        Command::Round(size) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            println!("{}", serde_json::to_string(&runtime.block_on(round(size.policies))?)?);
            Ok(())
        }
    }
}

fn mirror(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads an XDP program: run it as root"
    );
    remove_leftovers();
    clean_up_on_signals()?;
    let policies = arguments.size.policies;
    let site = Site::new()?;
    site.gateway.forward()?;
    // The networks of the policies, and the other ends of their tunnels.
    for destination in ["32.0.0.0/3", "199.0.0.0/8"] {
        site.gateway.ip(&format!("route add {destination} via 192.0.2.2"))?;
    }
    // Those that wait for their keys live that long.
    site.gateway.sysctl("net.core.xfrm_acq_expires", "86400")?;
    let start = Instant::now();
    site.gateway.enter(|| install(policies))?;
    println!(
        "the kernel has {policies} policies and as many associations after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    print!("{:>5}", "round");
    for (name, ..) in FIGURES {
        print!(" {name:>16}");
    }
    println!();
    let mut rounds = Vec::new();
    for number in 1..=arguments.rounds {
        let round = site.gateway.enter(|| in_a_process(policies))?;
        print!("{number:>5}");
        for (.., figure) in FIGURES {
            print!(" {:>16.2}", figure(&round));
        }
        println!();
        rounds.push(round);
    }
    println!("\n{:<17} {:>8} {:>8} {:>8}", "", "min", "median", "max");
    let mut json = json!({ "policies": policies, "rounds": arguments.rounds });
    for (name, key, figure) in FIGURES {
        let [min, median, max] = spread(&rounds, figure);
        println!("{name:<17} {min:>8.2} {median:>8.2} {max:>8.2}");
        json[key] = json!([min, median, max]);
    }
    if arguments.json {
        println!("{json}");
    }
    Ok(())
}

/// Minimum, median and maximum.
fn spread<R>(rounds: &[R], figure: impl Fn(&R) -> f64) -> [f64; 3] {
    let mut figures: Vec<f64> = rounds.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    [figures[0], figures[figures.len() / 2], figures[figures.len() - 1]]
}

/// A round of its own process, in this thread's network namespace.
fn in_a_process(policies: u32) -> anyhow::Result<Round> {
    let program = std::env::current_exe()?;
    let output =
        Process::new(program).args(["bench", "round", "--policies", &policies.to_string()]).output()?;
    ensure!(output.status.success(), "a round failed: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("reading what a round has measured")
}

async fn round(policies: u32) -> anyhow::Result<Round> {
    let count = policies as usize;
    let device = nix::net::if_::if_nametoindex("out0").context("no out0")?;
    let config = TableConfig { cells_v4: policies.max(1024) * 2, slots: policies, ..TableConfig::default() };
    let (_forwarder, table) = XdpForwarder::load(&config)?;

    let start = Moment::now()?;
    let dumped = dump_undecoded()?;
    let dump = start.elapsed()?;

    let before = resident()?;
    let start = Moment::now()?;
    let source = Offloaded::new(device)?;
    let pretended = source.pretended.clone();
    let mut gateway = Gateway::new(source, NetlinkHost::open()?, table);
    gateway.synchronise().await?;
    let mirror = start.elapsed()?.without(Duration::from_nanos(pretended.load(Ordering::Relaxed)));
    let grown = resident()?.saturating_sub(before);

    let start = Instant::now();
    let status = gateway.status();
    let looked = start.elapsed().as_secs_f64();
    ensure!(status.policies.len() == count, "only {} policies were mirrored", status.policies.len());
    ensure!(status.fast_policies() == u64::from(policies), "not all are fast: {:?}", status.totals);
    ensure!(dumped > count * 2 * 200, "only {dumped} bytes were dumped");
    // Far below the numbers that a float does not hold.
    #[allow(clippy::cast_precision_loss)]
    let bytes = grown as f64 / f64::from(policies);
    let ratio = mirror.processor.as_secs_f64() / dump.processor.as_secs_f64();
    let mut database = gateway.mirror().database().clone();
    let found = PolicyEvent::Audit(database.snapshot());
    let audit = time(|| database.apply(found));
    ensure!(database.audit_repairs() == 0, "the audit found something");
    Ok(Round {
        dump: dump.wall.as_secs_f64(),
        mirror: mirror.wall.as_secs_f64(),
        ratio,
        bytes,
        audit,
        status: looked,
    })
}

/// How long something takes, in seconds.
fn time(what: impl FnOnce()) -> f64 {
    let start = Instant::now();
    what();
    start.elapsed().as_secs_f64()
}

/// A moment of this process.
struct Moment {
    wall: Instant,
    processor: Duration,
}

/// What has gone by since.
struct Elapsed {
    wall: Duration,
    processor: Duration,
}

impl Moment {
    fn now() -> anyhow::Result<Self> {
        let processor = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
        Ok(Self { wall: Instant::now(), processor: processor.into() })
    }

    fn elapsed(&self) -> anyhow::Result<Elapsed> {
        let now = Self::now()?;
        Ok(Elapsed {
            wall: now.wall - self.wall,
            processor: now.processor.saturating_sub(self.processor).max(Duration::from_nanos(1)),
        })
    }
}

impl Elapsed {
    fn without(&self, time: Duration) -> Self {
        Self { wall: self.wall.saturating_sub(time), processor: self.processor.saturating_sub(time) }
    }
}

/// Bytes of this process that are in memory.
fn resident() -> anyhow::Result<u64> {
    let pages = fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = pages.split(' ').nth(1).context("an odd statm")?.parse()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.context("no page size")?;
    Ok(pages * u64::try_from(page)?)
}

/// Gives the kernel of this thread's network namespace policies and associations. Linux 6.18 takes longer for each SPI
/// the more there are (`xfrm_alloc_spi`): a minute or two for 100,000.
fn install(policies: u32) -> io::Result<()> {
    let numbers: Vec<u32> = (0..policies).collect();
    for numbers in numbers.chunks(1000) {
        let policies: Vec<Policy> = numbers.iter().map(|&number| policy(number)).collect();
        let associations = policies
            .iter()
            .zip(numbers)
            .map(|(policy, number)| {
                SecurityAssociation::for_template(&policy.templates[0], 0x1000_0000 | number)
            })
            .map(|association| allocation(&association));
        let added = policies.iter().cloned().map(|policy| request(&Change::Add(policy)));
        ask(&added.chain(associations).collect::<Vec<_>>(), 1)?;
    }
    Ok(())
}

const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The other end of a tunnel. Not in the order of reqids and SPIs: the kernel's hash of the three is an XOR, and
/// would be the same for all.
fn peer(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0xc700_0000 | number.wrapping_mul(0x9e_3779) & 0xff_ffff)
}

/// From the gateway's network to one of many, with a tunnel of its own.
fn policy(number: u32) -> Policy {
    let net = |bits: u32, length| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(bits), length));
    let selector = Selector::between(net(0x0a01_0000, 16), net(0x2000_0000 | number << 8, 24));
    let id = PolicyId::new(Direction::Out, selector.expect("one family"));
    let template = Template::esp_tunnel(IpAddr::V4(LOCAL), peer(number).into(), number + 1);
    Policy { priority: 100, templates: [template].into(), ..Policy::new(id) }
}

/// **For labs only:** all that a source tells is offloaded to a device.
struct Offloaded {
    source: NetlinkSource,
    device: u32,
    /// Nanoseconds that pretending took.
    pretended: Arc<AtomicU64>,
}

impl Offloaded {
    fn new(device: u32) -> Result<Self, SourceError> {
        let source = NetlinkSource::with_config(NetlinkConfig::default().count_larval())?;
        Ok(Self { source, device, pretended: Arc::default() })
    }
}

#[async_trait]
impl PolicySource for Offloaded {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        let mut event = self.source.next_event().await?;
        let start = Instant::now();
        let offload = Some(OffloadDev { ifindex: self.device, kind: OffloadKind::Packet, inbound: false });
        if let Some(PolicyEvent::Snapshot(snapshot)) = &mut event {
            for policy in &mut snapshot.policies {
                policy.offload = offload;
            }
            for sa in &mut snapshot.sas {
                sa.offload = offload;
                sa.overhead = Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16));
                // That of the packet that it would have been asked for.
                sa.selector = None;
            }
        }
        let pretended = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.pretended.fetch_add(pretended, Ordering::Relaxed);
        Ok(event)
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        self.source.caught_up()
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        self.source.settle()
    }

    fn written(&mut self) {
        self.source.written();
    }
}
