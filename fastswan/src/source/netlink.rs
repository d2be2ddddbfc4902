//! The running kernel as a source: XFRM netlink.
//!
//! A [`NetlinkSource`] subscribes to notifications first, then asks for everything on other sockets, and
//! then applies the notifications that came meanwhile, until there are none left: so the [`Snapshot`] it
//! yields is what the kernel had at one moment. From then on it yields each change. When it loses track (the
//! receive buffer overran, a message could not be read, a dump was cut short) it says so at once with
//! [`PolicyEvent::Stale`], and starts over. So it does when a device goes down or leaves to which policies or
//! associations are offloaded: the kernel deletes those without a notification. So it does when policies or associations
//! are migrated to other addresses, since the message does not tell what they are now.
//!
//! Nothing tells that the kernel has sorted its policies anew (`ip xfrm policy set hthresh4 …`), after which another one
//! of the same priority may be the first. So the thresholds are looked at ten times a second.
//!
//! Now and then it asks for everything again in the background and yields [`PolicyEvent::Audit`], so that a
//! change that was never told is found and repaired.

use std::{
    collections::{BTreeSet, VecDeque},
    convert::identity,
    fmt::Display,
    io,
    time::Duration,
};

use async_trait::async_trait;
use futures::{FutureExt as _, future::BoxFuture};
use netlink_sys::protocols::NETLINK_XFRM;
use tokio::time::{Instant, sleep_until};

use super::{PolicyEvent, PolicySource, Snapshot, SourceError, StaleCause};
use crate::{
    database::Database,
    netlink::{
        Anchor, Audit, BackOff, Content, Datagram, Dump, DumpConfig, DumpError, Dumped, Job, Links,
        NetlinkSocket, ThresholdWatch, Thresholds, decode, remedy, settle_links, settle_requests, thresholds,
    },
    policy::OffloadDev,
    sys::grace_period,
};

/// Multicast groups of `NETLINK_XFRM` (`enum xfrm_nlgroups`): expiries, associations, policies, migrations.
const GROUPS: [u32; 4] = [2, 3, 4, 7];

/// More devices that went down during a dump, or are in one datagram, cause another one.
const MOST_LOST: usize = 1024;

/// More notifications than a receive buffer holds: if they go on coming while they are thrown away before a dump, there
/// is a pause first.
const MOST_UNREAD: usize = 1 << 20;

/// Datagrams that are read to find out whether there is anything to be told.
const MOST_LOOKED_AT: usize = 64;

/// How a [`NetlinkSource`] listens.
///
/// ```no_run
/// use std::time::Duration;
///
/// use fastswan::{NetlinkSource, source::NetlinkConfig};
///
/// # async fn run() -> Result<(), fastswan::SourceError> {
/// let config = NetlinkConfig::default().receive_buffer(32 << 20).audit(Some(Duration::from_secs(300)));
/// let source = NetlinkSource::with_config(config)?;
/// # drop(source);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetlinkConfig {
    receive_buffer: usize,
    kernel_only: bool,
    count_larval: bool,
    audit: Option<Duration>,
}

impl Default for NetlinkConfig {
    /// 8 MiB, which holds some 5,000 notifications, from the kernel only; an audit every 30 s.
    fn default() -> Self {
        Self {
            receive_buffer: 8 << 20,
            kernel_only: true,
            count_larval: false,
            audit: Some(Duration::from_secs(30)),
        }
    }
}

impl NetlinkConfig {
    /// Sets the size of the receive buffer in bytes, as in `SO_RCVBUF`. Beyond `net.core.rmem_max` it takes
    /// `CAP_NET_ADMIN`; without, the kernel gives what it allows.
    #[must_use]
    pub fn receive_buffer(mut self, bytes: usize) -> Self {
        self.receive_buffer = bytes;
        self
    }

    /// Sets how long to wait after an audit, or after a snapshot, before everything is asked for again and compared
    /// with what was told; see [`PolicyEvent::Audit`]. `None` is never. While one runs, it takes the memory of a
    /// second copy. With 100,000 policies and as many associations, a gateway stops for 0.05 s to compare
    /// (`cargo testkit bench mirror`), and somewhat longer if something changed meanwhile: its lease must outlast that.
    #[must_use]
    pub fn audit(mut self, period: Option<Duration>) -> Self {
        self.audit = period;
        self
    }

    fn dump(&self) -> DumpConfig {
        DumpConfig { receive_buffer: self.receive_buffer, count_larval: self.count_larval }
    }

    /// Believes messages that another process sent. For tests only: a process with `CAP_NET_ADMIN` in the
    /// namespace can then make packets leave in clear.
    #[cfg(feature = "untrusted-netlink-senders")]
    #[must_use]
    pub fn believe_anyone(mut self) -> Self {
        self.kernel_only = false;
        self
    }

    /// Takes larval associations for complete ones. For tests only, of kernels without ESP: those have no others.
    #[cfg(feature = "untrusted-netlink-senders")]
    #[must_use]
    pub fn count_larval(mut self) -> Self {
        self.count_larval = true;
        self
    }
}

/// What a [`NetlinkSource`] has met since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetlinkStatistics {
    /// Datagrams that were read.
    pub datagrams: u64,
    /// Changes of policies and associations among them.
    pub events: u64,
    /// Messages that change neither.
    pub ignored: u64,
    /// Datagrams that were dropped because the kernel did not send them.
    pub foreign: u64,
    /// Times that the receive buffer overran.
    pub overruns: u64,
    /// Datagrams that could not be read.
    pub undecodable: u64,
    /// Times that policies or associations were given other addresses.
    pub migrations: u64,
    /// Dumps that gave a snapshot.
    pub dumps: u64,
    /// Dumps that failed and were started again.
    pub failed_dumps: u64,
    /// Times that a device was lost to which policies or associations are offloaded.
    pub lost_devices: u64,
    /// Audits that were yielded.
    pub audits: u64,
    /// Audits that were given up: the dump failed, a link was lost, or too much changed meanwhile.
    pub failed_audits: u64,
}

/// The policies and associations of the running kernel, in the network namespace of the thread that opens it.
///
/// Needs no privilege to listen to a user's own namespace; reading them takes `CAP_NET_ADMIN`.
///
/// Needs Linux with `CONFIG_XFRM_USER`; policies that are packet-offloaded exist from Linux 6.2 on.
///
/// ```no_run
/// use fastswan::{NetlinkSource, PolicyEvent, PolicySource as _};
///
/// # async fn run() -> Result<(), fastswan::SourceError> {
/// let mut source = NetlinkSource::open()?;
/// while let Some(event) = source.next_event().await? {
///     match event {
///         PolicyEvent::Snapshot(all) => println!("{} policies", all.policies.len()),
///         PolicyEvent::Stale(cause) => println!("{}: what was told no longer counts", cause.name()),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct NetlinkSource {
    config: NetlinkConfig,
    /// On whatever thread it is polled, the kernel is asked in the namespace that it was opened in.
    anchor: Anchor,
    notifications: NetlinkSocket,
    links: Links,
    /// Devices that something has been offloaded to since the last dump.
    devices: BTreeSet<u32>,
    /// Devices that went down or left, and that notifications still unread may turn out to be about.
    lost: BTreeSet<u32>,
    state: State,
    /// Events of the last datagram that were not yielded yet.
    ready: VecDeque<PolicyEvent>,
    audit: Audit,
    thresholds: ThresholdWatch,
    back_off: BackOff,
    statistics: NetlinkStatistics,
}

#[derive(Debug)]
enum State {
    /// The next dump starts then.
    Waiting(Instant),
    /// What links have lost is being deleted.
    Settling(Job<io::Result<Thresholds>>),
    /// A dump is being read.
    Dumping(Dump),
    /// What was yielded is what the kernel has.
    Following,
}

impl NetlinkSource {
    /// Subscribes to the kernel's notifications. Must be called inside a tokio runtime with I/O and time.
    ///
    /// # Errors
    ///
    /// [`SourceError::System`]: the kernel lacks `CONFIG_XFRM_USER`, or allows no more sockets.
    pub fn open() -> Result<Self, SourceError> {
        Self::with_config(NetlinkConfig::default())
    }

    /// The same with a configuration.
    ///
    /// # Errors
    ///
    /// Those of [`Self::open`].
    pub fn with_config(config: NetlinkConfig) -> Result<Self, SourceError> {
        let notifications = NetlinkSocket::open(NETLINK_XFRM, &GROUPS, Some(config.receive_buffer))
            .map_err(|error| system("subscribing to notifications about policies (NETLINK_XFRM)", error))?;
        let links = Links::open(config.receive_buffer)
            .map_err(|error| system("subscribing to notifications about links (NETLINK_ROUTE)", error))?;
        let anchor = Anchor::here().map_err(|error| system("starting a thread", error))?;
        Ok(Self {
            audit: Audit::new(config.audit),
            thresholds: ThresholdWatch::new(Thresholds::default()),
            anchor,
            config,
            notifications,
            links,
            devices: BTreeSet::new(),
            lost: BTreeSet::new(),
            state: State::Waiting(Instant::now()),
            ready: VecDeque::new(),
            back_off: BackOff::default(),
            statistics: NetlinkStatistics::default(),
        })
    }

    /// What it has met so far.
    #[must_use]
    pub fn statistics(&self) -> NetlinkStatistics {
        self.statistics
    }

    /// Takes the time for a dump and gives up only where waiting cannot help.
    async fn resynchronise(&mut self) -> Result<Snapshot, SourceError> {
        loop {
            let failure = match &mut self.state {
                State::Following => {
                    self.state = State::Waiting(Instant::now());
                    continue;
                }
                State::Waiting(until) => {
                    // A timer takes a millisecond even when it is due.
                    if Instant::now() < *until {
                        sleep_until(*until).await;
                    }
                    match self.begin() {
                        Ok(settled) => {
                            self.state = State::Settling(settled);
                            continue;
                        }
                        Err(error) => DumpError::from(error),
                    }
                }
                State::Settling(settled) => {
                    let settled = settled.await.and_then(identity);
                    match settled.and_then(|thresholds| self.start_dump(thresholds)) {
                        Ok(dump) => {
                            self.state = State::Dumping(dump);
                            continue;
                        }
                        Err(error) => DumpError::from(error),
                    }
                }
                State::Dumping(dump) => match dump.finish().await {
                    Ok(dumped) => match self.replay(dumped) {
                        Ok(snapshot) => {
                            self.statistics.dumps += 1;
                            self.back_off.settled(Instant::now());
                            self.state = State::Following;
                            self.audit.restart();
                            return Ok(snapshot);
                        }
                        Err(_) => DumpError::Interrupted,
                    },
                    Err(error) => error,
                },
            };
            if failure.errno() == Some(libc::EPERM) {
                let error = io::Error::from_raw_os_error(libc::EPERM);
                return Err(system("reading the kernel's policies and associations", error));
            }
            self.statistics.failed_dumps += 1;
            let pause = self.wait();
            tracing::warn!(%failure, ?pause, "cannot read policies and associations, trying again");
        }
    }

    /// Puts the next dump off, the longer the more often this happens.
    fn wait(&mut self) -> Duration {
        let now = Instant::now();
        let pause = self.back_off.next(now);
        self.state = State::Waiting(now + pause);
        pause
    }

    /// Begins to ask for everything. The order matters: links that were lost before have lost their offloads when what
    /// this returns is done, and so has every notification about those come, which must not be replayed after the dump.
    fn begin(&mut self) -> io::Result<Job<io::Result<Thresholds>>> {
        // Nothing is lost here that the dump does not tell.
        drain(MOST_UNREAD, || {
            let lost = self.links.try_lost();
            self.statistics.overruns += u64::from(lost.is_err());
            !matches!(lost, Ok(None))
        })?;
        self.lost.clear();
        Ok(self.anchor.run("fastswan-settle", || {
            settle_links()?;
            thresholds()
        }))
    }

    /// Goes on when that has settled, with the thresholds as they were then.
    fn start_dump(&mut self, thresholds: Thresholds) -> io::Result<Dump> {
        self.thresholds = ThresholdWatch::new(thresholds);
        drain(MOST_UNREAD, || {
            let received = self.notifications.try_receive();
            self.statistics.datagrams += u64::from(matches!(received, Ok(Some(_))));
            self.statistics.overruns += u64::from(received.is_err());
            !matches!(received, Ok(None))
        })?;
        Ok(Dump::start(&self.anchor, self.config.dump()))
    }

    /// Applies what was notified during a dump, until nothing is left. A change that the dump has seen already
    /// is applied again, together with all that came after it.
    fn replay(&mut self, Dumped { snapshot, devices }: Dumped) -> Result<Snapshot, StaleCause> {
        self.devices = devices;
        // Mostly nothing was, and what would be built here is built again by whoever reads the snapshot.
        let snapshot = match self.notifications.try_receive().transpose() {
            None => snapshot,
            Some(first) => self.apply_to(snapshot, first)?,
        };
        while let Some(lost) = self.links.try_lost().transpose() {
            self.judge(lost)?;
        }
        Ok(snapshot)
    }

    /// A snapshot after a notification, and all that are there already.
    fn apply_to(&mut self, snapshot: Snapshot, first: io::Result<Datagram>) -> Result<Snapshot, StaleCause> {
        let mut database = Database::default();
        database.apply(PolicyEvent::Snapshot(snapshot));
        let mut next = Some(first);
        while let Some(received) = next {
            self.read(received)?;
            self.ready.drain(..).for_each(|event| database.apply(event));
            next = self.notifications.try_receive().transpose();
        }
        Ok(database.into_snapshot())
    }

    /// Decides what the loss of devices means, now or when all notifications before it have been read.
    fn judge(&mut self, lost: io::Result<Vec<u32>>) -> Result<(), StaleCause> {
        let lost = lost.map_err(|error| {
            self.statistics.overruns += 1;
            tracing::warn!(%error, "lost notifications about links");
            StaleCause::Overrun
        })?;
        // Nobody knows yet whether it matters: an audit may come to know of an offload that was never told.
        if !lost.is_empty() && self.audit.is_running() {
            self.give_up_audit("a link was lost");
        }
        self.lost.extend(lost);
        if self.lost.len() > MOST_LOST {
            return Err(StaleCause::Overrun);
        }
        let Some(ifindex) = self.lost.intersection(&self.devices).next().copied() else { return Ok(()) };
        self.statistics.lost_devices += 1;
        Err(StaleCause::DeviceLost(ifindex))
    }

    /// Takes what an audit has come to.
    fn take_audit(&mut self, step: Result<Option<Dumped>, DumpError>) {
        match step {
            Ok(None) => {}
            Ok(Some(Dumped { snapshot, devices })) => {
                self.statistics.audits += 1;
                self.devices.extend(devices);
                self.ready.push_back(PolicyEvent::Audit(snapshot));
                self.audit.restart();
            }
            Err(error) => self.give_up_audit(error),
        }
    }

    fn give_up_audit(&mut self, why: impl Display) {
        self.statistics.failed_audits += 1;
        tracing::warn!(%why, "an audit was given up, trying again later");
        self.audit.restart();
    }

    /// Waits for the next datagram, of either kind, and reads it. An audit goes on while there is none.
    async fn listen(&mut self) -> Result<(), StaleCause> {
        if !self.lost.is_empty() {
            // An offload that is younger than the last notification read, but older than the loss.
            match self.notifications.try_receive().transpose() {
                Some(received) => {
                    self.read(received)?;
                    self.judge(Ok(Vec::new()))?;
                }
                None => self.lost.clear(),
            }
            return Ok(());
        }
        tokio::select! {
            biased;
            lost = self.links.lost() => self.judge(lost),
            received = self.notifications.receive() => self.read(received),
            step = self.audit.advance(&self.anchor, self.config.dump()) => {
                self.take_audit(step);
                Ok(())
            }
            () = self.thresholds.changed(&self.anchor) => Err(StaleCause::Rehashed),
        }
    }

    /// Reads what is there until something is to be told. True if there is nothing left, and nothing to be told. Many
    /// datagrams that say nothing are left for the next look.
    fn look(&mut self) -> Result<bool, StaleCause> {
        for _ in 0..MOST_LOOKED_AT {
            if let Some(lost) = self.links.try_lost().transpose() {
                self.judge(lost)?;
            } else if let Some(received) = self.notifications.try_receive().transpose() {
                self.read(received)?;
                self.judge(Ok(Vec::new()))?;
            } else {
                // Each offload that is older than the loss has been told.
                self.lost.clear();
                return Ok(true);
            }
            if !self.ready.is_empty() {
                break;
            }
        }
        Ok(false)
    }

    /// Forgets what was read: there will be another dump.
    fn lose_track(&mut self) {
        self.ready.clear();
        self.audit.restart();
        self.wait();
    }

    /// Puts what a datagram says into `ready`.
    fn read(&mut self, received: io::Result<Datagram>) -> Result<(), StaleCause> {
        let datagram = received.map_err(|error| {
            // ENOBUFS, or an error after which nobody knows what was lost.
            self.statistics.overruns += 1;
            tracing::warn!(%error, "lost XFRM notifications");
            StaleCause::Overrun
        })?;
        self.statistics.datagrams += 1;
        if datagram.sender != 0 && self.config.kernel_only {
            self.statistics.foreign += 1;
            return Ok(());
        }
        let messages = if datagram.truncated { None } else { decode(&datagram.bytes).ok() };
        let Some(messages) = messages else {
            self.statistics.undecodable += 1;
            return Err(StaleCause::Undecodable);
        };
        for message in messages {
            match message.content.counting_larval(self.config.count_larval) {
                Content::Event(event) => {
                    self.statistics.events += 1;
                    match &event {
                        PolicyEvent::Policy(policy) => self.devices.extend(policy.offload.map(index)),
                        PolicyEvent::Sa(sa) => self.devices.extend(sa.offload.map(index)),
                        _ => {}
                    }
                    if !self.audit.note(&event) {
                        self.give_up_audit("too much changed meanwhile");
                    }
                    self.ready.push_back(event);
                }
                Content::Overrun => {
                    self.statistics.overruns += 1;
                    return Err(StaleCause::Overrun);
                }
                Content::Migrated => {
                    self.statistics.migrations += 1;
                    return Err(StaleCause::Migrated);
                }
                Content::Done(_) | Content::Error(_) | Content::Larval(_) | Content::Ignored => {
                    self.statistics.ignored += 1;
                }
            }
        }
        Ok(())
    }
}

/// Reads until nothing is left, unless that takes too often.
fn drain(most: usize, mut read: impl FnMut() -> bool) -> io::Result<()> {
    if (0..most).all(|_| read()) {
        return Err(io::Error::other("notifications come faster than they can be read"));
    }
    Ok(())
}

fn system(attempt: &str, error: io::Error) -> SourceError {
    let remedy = remedy(&error);
    SourceError::System { attempt: attempt.to_owned(), error, remedy }
}

fn index(device: OffloadDev) -> u32 {
    device.ifindex
}

#[async_trait]
impl PolicySource for NetlinkSource {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if !matches!(self.state, State::Following) {
                return self.resynchronise().await.map(|snapshot| Some(PolicyEvent::Snapshot(snapshot)));
            }
            if let Err(cause) = self.listen().await {
                self.lose_track();
                return Ok(Some(PolicyEvent::Stale(cause)));
            }
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        if !matches!(self.state, State::Following) || !self.ready.is_empty() {
            return Ok(false);
        }
        Ok(self.look().unwrap_or_else(|cause| {
            self.lose_track();
            self.ready.push_back(PolicyEvent::Stale(cause));
            false
        }))
    }

    /// A removal is counted first and notified of afterwards, and there are three kinds. What is asked for by
    /// netlink or `PF_KEY` is done, notification included, under a lock that each request takes. What happens to links
    /// is done under another (RTNL). And what expires does so in a softirq, which a grace period outlasts.
    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        let settled = self.anchor.run("fastswan-settle", || {
            settle_requests()?;
            settle_links()?;
            grace_period();
            Ok(())
        });
        let failed = |error| system("waiting for removals to be notified of", error);
        async move { settled.await.and_then(identity).map_err(failed) }.boxed()
    }

    /// Without what is still in the socket.
    fn queued(&self) -> usize {
        self.ready.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_is_filled_as_fast_as_it_is_read_is_left_alone() {
        let mut left = 3;
        let mut read = || {
            left -= 1;
            left > 0
        };
        drain(3, &mut read).unwrap();
        assert_eq!(left, 0);
        drain(MOST_UNREAD, || true).unwrap_err();
    }

    #[tokio::test]
    async fn more_lost_devices_than_are_kept_are_an_overrun() {
        let mut source = NetlinkSource::open().unwrap();
        let most = u32::try_from(MOST_LOST).unwrap();
        assert_eq!(source.judge(Ok((1..=most).collect())), Ok(()));
        assert_eq!(source.judge(Ok(vec![1])), Ok(()), "known already");
        assert_eq!(source.judge(Ok(vec![most + 1])), Err(StaleCause::Overrun));
    }
}
