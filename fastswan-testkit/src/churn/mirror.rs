//! What is measured: a gateway with the real host source and the real table, on a thread of its own.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, OnceLock, mpsc::Sender},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use async_trait::async_trait;
use fastswan::{
    BpfTable, Gateway, HostEvent, HostSource, NetlinkHost, Selector, StaticSource, gateway::Status,
    host::HostError, source::fixed::StaticPolicy,
};
use ipnet::{IpNet, Ipv4Net};
use tokio::sync::oneshot;

/// This end of all tunnels.
const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// How the gateway began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// From the opening of the host source to its first snapshot.
    pub(super) first_read: Duration,
    /// From the same moment until everything was in the table.
    pub(super) synchronised: Duration,
    /// What the process grew by meanwhile, in bytes, without the table's maps.
    pub(super) grown: u64,
}

/// Runs until it is told to stop, and tells what it met. Takes a thread that is on the host.
pub(super) fn run(
    table: BpfTable,
    (policies, device): (u32, u32),
    port: &str,
    begun: &Sender<Begun>,
    stop: oneshot::Receiver<()>,
) -> anyhow::Result<Status> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let tunnels = (0..policies).map(|number| tunnel(number, device)).collect::<Result<Vec<_>, _>>()?;
        let source = StaticSource::new(&tunnels);
        drop(tunnels);
        let (before, opened) = (resident()?, Instant::now());
        let first_read = Arc::new(OnceLock::new());
        let host = Timed { host: NetlinkHost::open()?, opened, first_read: first_read.clone() };
        let mut gateway = Gateway::new(source, host, table).with_interface(port);
        gateway.synchronise().await?;
        let synchronised = opened.elapsed();
        let grown = resident()?.saturating_sub(before);
        let first_read = *first_read.get().context("the host source has told nothing")?;
        begun.send(Begun { first_read, synchronised, grown })?;
        gateway.run_until(async { drop(stop.await) }).await?;
        Ok(gateway.status())
    })
}

/// An address that the policy with this number is about.
pub(super) fn destination(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(network(number) | 9)
}

fn network(number: u32) -> u32 {
    0x2000_0000 | number << 8
}

/// From the gateway's network to one of many, with a far end of its own.
fn tunnel(number: u32, device: u32) -> anyhow::Result<StaticPolicy> {
    let net = |bits, length| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from_bits(bits), length));
    let selector = Selector::between(net(0x0a01_0000, 16), net(network(number), 24))?;
    let peer = Ipv4Addr::from_bits(0xc700_0000 | number);
    Ok(StaticPolicy::new(selector, device, LOCAL.into(), IpAddr::V4(peer)).priority(100))
}

/// Bytes of this process that are in memory.
fn resident() -> anyhow::Result<u64> {
    let pages = fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = pages.split(' ').nth(1).context("an odd statm")?.parse()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.context("no page size")?;
    Ok(pages * u64::try_from(page)?)
}

/// The host source, whose first snapshot is timed.
struct Timed {
    host: NetlinkHost,
    opened: Instant,
    first_read: Arc<OnceLock<Duration>>,
}

#[async_trait]
impl HostSource for Timed {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        let event = self.host.next_event().await?;
        if matches!(event, Some(HostEvent::Snapshot(_))) {
            self.first_read.get_or_init(|| self.opened.elapsed());
        }
        Ok(event)
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        self.host.caught_up()
    }

    fn resync(&mut self) {
        self.host.resync();
    }
}
