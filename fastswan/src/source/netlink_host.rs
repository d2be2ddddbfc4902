//! The running kernel as a source of facts about the host.

use std::{
    collections::{BTreeSet, VecDeque},
    convert::identity,
    future::pending,
    io,
    net::IpAddr,
    time::Duration,
};

use async_trait::async_trait;
use futures::FutureExt as _;
use tokio::{
    task::{unconstrained, yield_now},
    time::{Instant, sleep_until},
};

use super::HostSource;
#[cfg(feature = "broken-rules")]
use crate::host::BrokenHostRule;
use crate::{
    host::{Hook, HostChange, HostError, HostEvent, HostFacts, HostStaleCause},
    netlink::{
        Anchor, BackOff, Datagram, Follower, Found, HookWatch, HostSockets, Job, NetlinkSocket, Question,
        Solicitor, Sysctls, Told, Wanted, hear, heard_device, read_all, read_hooks, read_host,
        read_neighbours, read_path_mtus, read_routes, read_rules, read_sysctls, remedy, take_icmp,
    },
    policy::Family,
};

/// What a burst of changes brings: some 40,000 notifications, and a tenth of that about neighbours.
const RECEIVE_BUFFER: usize = 32 << 20;
const NEIGHBOURS_BUFFER: usize = 4 << 20;

/// Messages that are read at once, from each socket.
const MOST_MESSAGES: usize = 4096;
/// Messages that are kept while everything is being read.
const LONGEST_BACKLOG: usize = 1 << 18;
/// Datagrams that are thrown away before everything is read.
const MOST_UNREAD: usize = 1 << 20;

/// From one look at the sysctls that the kernel does not tell of, and at the links of other namespaces, to the next, for each so
/// many links.
const SYSCTLS: Duration = Duration::from_millis(150);
const SYSCTL_LINKS: usize = 256;

/// What the running kernel does with addresses, in the network namespace of the thread that opens it, on whatever thread
/// it is polled.
///
/// It yields everything at first, and then each change of links, routes, rules, neighbours, path MTUs and sysctls, as the kernel tells of
/// it. A neighbour that is only heard from again is no change. Where the kernel changes routes in silence, because a link, an
/// address or a next hop object goes or a lifetime ends, those that may be concerned are told as
/// [unclear](crate::host::RouteKind::Unclear) at once, the routes of the family are read again on another thread, and what is
/// different is told. Of other sysctls the kernel does not tell: they are looked at every 150 ms; with more than 256
/// links in proportion less often. With them it looks at the links of the other network namespaces that its own has a number
/// for, since a macvlan or ipvlan device there may take frames of a link here. Lifetimes are looked at every 200 ms, with more than 2,000 IPv6 prefixes in proportion less
/// often, since they may be cut short in silence.
///
/// When there were more notifications about links, routes and rules than its receive buffer of 32 MiB holds, it says so, and
/// yields everything again. An overrun of neighbours, which have a buffer of their own, makes it tell that none is known,
/// until they have been read again.
///
/// Which path MTUs it learns, the kernel does not tell either. It learns them from ICMP messages to the host, of which this gets
/// copies, and asks the kernel about each. That takes `CAP_NET_RAW`: without, those that some packet of the kernel's has used are
/// found within 200 ms, with more than 2,000 routes in proportion later, and others are missed. What has expired or was flushed
/// goes within about five seconds. When there are more messages than can be asked about, the path MTUs of the family are
/// [unclear](HostFacts::unclear_path_mtus) until all have been read.
///
/// Netfilter, filters of tc and other [hooks](crate::host::hooks) are followed on a thread of their own, which looks ten times a
/// second at what the kernel does not tell of. They take `CAP_NET_ADMIN` to read: without, each kind counts as there.
///
/// It has the kernel find neighbours that policies wait for and keep those that fast packets go to
/// ([`solicit`](HostSource::solicit)), by requests (`NTF_USE`) that count as a packet would. That takes `CAP_NET_ADMIN` and
/// Linux 5.0: without, a warning says so once a minute. An entry that somebody has made is left alone.
///
/// Needs Linux; from 6.3 on it hears whether devices take redirected frames. Needs no privilege, but without
/// `CAP_NET_ADMIN` its buffers are smaller, and it may read what a link loses while the kernel still takes it away.
///
/// ```no_run
/// use fastswan::{HostEvent, HostSource as _, NetlinkHost};
///
/// # async fn run() -> Result<(), fastswan::host::HostError> {
/// let mut host = NetlinkHost::open()?;
/// while let Some(event) = host.next_event().await? {
///     match event {
///         HostEvent::Snapshot(facts) => println!("{} routes", facts.routes.len()),
///         HostEvent::Changes(changes) => println!("{changes:?}"),
///         HostEvent::Stale(cause) => println!("{}: what was said no longer counts", cause.name()),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct NetlinkHost {
    /// On whatever thread it is polled, the kernel is asked in the namespace that this was opened in.
    anchor: Anchor,
    sockets: HostSockets,
    hooks: HookWatch,
    /// As they were told last.
    known_hooks: Option<Vec<Hook>>,
    state: State,
    /// Links whose frames devices of other network namespaces may take, as they were known when track was lost last.
    taken: BTreeSet<u32>,
    /// Not yielded yet.
    ready: VecDeque<HostEvent>,
    back_off: BackOff,
    solicitor: Solicitor,
    #[cfg(feature = "broken-rules")]
    broken: Option<BrokenHostRule>,
}

#[derive(Debug)]
enum State {
    /// Everything is read then.
    Waiting(Instant),
    /// It is being read.
    Reading(Box<Beginning>),
    /// What was yielded is what the kernel has.
    Following(Box<Following>),
}

/// What was read at first.
type Begun = Result<(Box<Follower>, HostFacts), HostError>;

/// Everything is being read.
#[derive(Debug)]
struct Beginning {
    job: Job<Begun>,
    read: Option<Begun>,
    /// What was told meanwhile.
    backlog: Vec<Told>,
    has_lost_neighbours: bool,
}

#[derive(Debug)]
struct Following {
    follower: Box<Follower>,
    /// What is being read beside the loop.
    reading: Option<(Wanted, Job<Result<Found, HostError>>)>,
    found: Option<(Wanted, Result<Found, HostError>)>,
    sysctls: Look,
}

/// Looks at the sysctls that the kernel does not tell of.
#[derive(Debug)]
enum Look {
    Waiting(Instant),
    Looking(u64, Job<Result<Sysctls, HostError>>),
}

/// What has happened while waiting.
enum Woken {
    /// Something that is to be looked at.
    Again,
    Route(io::Result<Datagram>),
    Neighbours(io::Result<Datagram>),
    Device(io::Result<Datagram>),
    Begun(Begun),
    Found(Result<Found, HostError>),
    Sysctls(Result<Sysctls, HostError>),
    Hooks(io::Result<Vec<Hook>>),
    Icmp((Family, io::Result<Option<Question>>)),
}

impl NetlinkHost {
    /// Subscribes to the kernel's notifications. Must be called inside a tokio runtime with I/O and time.
    ///
    /// # Errors
    ///
    /// [`HostError::System`]: the kernel or the service manager allows no such sockets, or no more.
    pub fn open() -> Result<Self, HostError> {
        Self::with_receive_buffers(RECEIVE_BUFFER, NEIGHBOURS_BUFFER)
    }

    /// The same with receive buffers of so many bytes, as in `SO_RCVBUF`: one for links, routes and rules, one for neighbours.
    /// Beyond `net.core.rmem_max` it takes `CAP_NET_ADMIN`; without, the kernel gives what it allows.
    ///
    /// # Errors
    ///
    /// Those of [`Self::open`].
    pub fn with_receive_buffers(routes: usize, neighbours: usize) -> Result<Self, HostError> {
        let sockets = HostSockets::subscribe(routes, neighbours).map_err(|error| {
            system(
                "subscribing to notifications about links, addresses, routes and neighbours (NETLINK_ROUTE)",
                error,
            )
        })?;
        let anchor = Anchor::here().map_err(|error| system("starting a thread", error))?;
        let hooks = HookWatch::start(&anchor);
        Ok(Self {
            anchor,
            sockets,
            hooks,
            known_hooks: None,
            state: State::Waiting(Instant::now()),
            taken: BTreeSet::new(),
            ready: VecDeque::new(),
            back_off: BackOff::default(),
            solicitor: Solicitor::default(),
            #[cfg(feature = "broken-rules")]
            broken: None,
        })
    }

    /// Reads the facts once, in the network namespace of the calling thread, and blocks meanwhile: about a microsecond for
    /// each route and neighbour. They age at once: to forward by them, follow a [`NetlinkHost`], as a gateway does.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    pub fn read_once() -> Result<HostFacts, HostError> {
        Ok(HostFacts { hooks: read_hooks(), ..read_host()? })
    }

    /// Breaks a rule on purpose: for tests only.
    #[cfg(feature = "broken-rules")]
    #[must_use]
    pub fn with_broken_rule(mut self, rule: BrokenHostRule) -> Self {
        self.broken = Some(rule);
        self
    }

    /// Everything is to be read again.
    fn lose_track(&mut self, cause: HostStaleCause) {
        let now = Instant::now();
        if let State::Following(following) = &self.state {
            // What is read may not show them all.
            self.taken.clone_from(following.follower.taken_elsewhere());
        }
        self.state = State::Waiting(now + self.back_off.next(now));
        self.ready.clear();
        self.ready.push_back(HostEvent::Stale(cause));
    }

    /// Begins to read everything.
    fn begin(&mut self) -> Result<(), HostError> {
        // What was told before may have gaps.
        let HostSockets { route, neighbours, devices, icmp } = &mut self.sockets;
        for family in [Family::V4, Family::V6] {
            icmp.discard(family);
        }
        for socket in [Some(route), Some(neighbours), devices.as_mut()].into_iter().flatten() {
            for _ in 0..MOST_UNREAD {
                match socket.try_receive() {
                    Ok(None) => break,
                    Ok(Some(_)) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                    Err(error) => return Err(system(HEARING, error)),
                }
            }
        }
        let taken = self.taken.clone();
        let job = self.anchor.run("fastswan-host", move || begin(&taken));
        let beginning = Beginning { job, read: None, backlog: Vec::new(), has_lost_neighbours: false };
        self.state = State::Reading(Box::new(beginning));
        Ok(())
    }

    /// Takes up everything that is there. Whether that was all.
    fn step(&mut self) -> Result<bool, HostError> {
        let now = Instant::now();
        if let Some(hooks) = self.hooks.try_changed().map_err(|error| system(FOLLOWING_HOOKS, error))? {
            self.take_hooks(hooks);
        }
        self.solicitor.poll(&self.anchor);
        if let State::Following(following) = &mut self.state {
            following.poll(now, &self.anchor);
        }
        let is_drained = match self.drain(now)? {
            Ok(is_drained) => is_drained,
            Err(cause) => {
                self.lose_track(cause);
                return Ok(false);
            }
        };
        match &mut self.state {
            State::Waiting(_) => return Ok(false),
            State::Reading(_) => {
                if is_drained {
                    self.finish_beginning(now);
                }
                return Ok(false);
            }
            State::Following(following) => {
                if is_drained {
                    following.take_found(now, &self.anchor);
                    following.start_reading(now, &self.anchor);
                }
                self.sockets.icmp.follow(following.follower.path_mtus(), now);
                following.follower.handle_time(now);
                if following.follower.doubts_sysctls() && matches!(following.sysctls, Look::Waiting(_)) {
                    following.sysctls = Look::Waiting(now);
                }
                let changes = following.follower.changes(now);
                if !changes.is_empty() {
                    self.ready.push_back(HostEvent::Changes(changes));
                }
            }
        }
        Ok(is_drained && self.ready.is_empty())
    }

    /// Reads what the sockets hold, up to a limit. Whether that was all.
    fn drain(&mut self, now: Instant) -> Result<Result<bool, HostStaleCause>, HostError> {
        let mut messages = 0;
        while messages < MOST_MESSAGES {
            let Some(received) = self.sockets.route.try_receive().transpose() else { break };
            match self.hear(received, now)? {
                Ok(heard) => messages += heard,
                Err(cause) => return Ok(Err(cause)),
            }
        }
        let mut is_drained = messages < MOST_MESSAGES;
        messages = 0;
        while messages < MOST_MESSAGES {
            let Some(received) = self.sockets.neighbours.try_receive().transpose() else { break };
            messages += self.hear_neighbours(received, now)?;
        }
        is_drained &= messages < MOST_MESSAGES;
        messages = 0;
        while messages < MOST_MESSAGES {
            let devices = self.sockets.devices.as_mut();
            let Some(received) = devices.and_then(|devices| devices.try_receive().transpose()) else { break };
            self.hear_device(received)?;
            messages += 1;
        }
        Ok(Ok(is_drained && messages < MOST_MESSAGES))
    }

    fn hear(
        &mut self,
        received: io::Result<Datagram>,
        now: Instant,
    ) -> Result<Result<usize, HostStaleCause>, HostError> {
        let state = &mut self.state;
        let heard = hear(received, |told| match state {
            State::Waiting(_) => {}
            State::Reading(beginning) => beginning.backlog.push(told),
            State::Following(following) => following.follower.take(told, false, now),
        });
        let heard = heard.map_err(|error| system(HEARING, error))?;
        match state {
            State::Reading(beginning) if beginning.backlog.len() > LONGEST_BACKLOG => {
                Ok(Err(HostStaleCause::Overrun))
            }
            _ => Ok(heard),
        }
    }

    fn hear_neighbours(&mut self, received: io::Result<Datagram>, now: Instant) -> Result<usize, HostError> {
        match self.hear(received, now)? {
            Ok(heard) => Ok(heard),
            Err(cause) => {
                tracing::debug!(cause = cause.name(), "notifications about neighbours were lost");
                match &mut self.state {
                    State::Waiting(_) => {}
                    State::Reading(beginning) => {
                        beginning.has_lost_neighbours = true;
                        beginning.backlog.retain(|told| !matches!(told, Told::Neighbour(_)));
                    }
                    State::Following(following) => following.follower.lose_neighbours(),
                }
                Ok(1)
            }
        }
    }

    fn hear_device(&mut self, received: io::Result<Datagram>) -> Result<(), HostError> {
        let heard = heard_device(received).map_err(|error| system(HEARING, error))?;
        if let (State::Following(following), Some(change)) = (&mut self.state, heard) {
            following.follower.take_device(change);
        }
        Ok(())
    }

    fn take_hooks(&mut self, hooks: Vec<Hook>) {
        if matches!(self.state, State::Following(_)) {
            self.ready.push_back(HostEvent::Changes(vec![HostChange::Hooks(hooks.clone())]));
        }
        self.known_hooks = Some(hooks);
    }

    /// Goes on with following if everything has been read.
    fn finish_beginning(&mut self, now: Instant) {
        let State::Reading(beginning) = &mut self.state else { return };
        match beginning.read.take() {
            None => {}
            Some(Ok((mut follower, mut facts))) => {
                facts.hooks = self.known_hooks.clone().unwrap_or_default();
                #[cfg(feature = "broken-rules")]
                follower.set_broken(self.broken);
                for told in beginning.backlog.drain(..) {
                    follower.take(told, true, now);
                }
                if beginning.has_lost_neighbours {
                    follower.lose_neighbours();
                }
                for family in self.sockets.icmp.unheard() {
                    follower.path_mtus().poll(family, now);
                }
                self.back_off.settled(now);
                self.ready.push_back(HostEvent::Snapshot(facts));
                let sysctls = Look::Waiting(now + SYSCTLS);
                let following = Following { follower, reading: None, found: None, sysctls };
                self.state = State::Following(Box::new(following));
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "cannot read what the host does, trying again");
                self.lose_track(HostStaleCause::Unreadable);
            }
        }
    }

    /// Waits until there is something to look at, and takes note of it. Cancel-safe.
    async fn wait(&mut self) -> Result<(), HostError> {
        if let State::Waiting(until) = self.state {
            if self.known_hooks.is_none() {
                let hooks = self.hooks.changed().await;
                self.known_hooks = Some(hooks.map_err(|error| system(FOLLOWING_HOOKS, error))?);
            }
            // A timer takes a millisecond even when it is due.
            if Instant::now() < until {
                sleep_until(until).await;
            }
            return self.begin();
        }
        let HostSockets { route, neighbours, devices, icmp } = &mut self.sockets;
        let woken = match &mut self.state {
            State::Waiting(_) => Woken::Again,
            State::Reading(beginning) => tokio::select! {
                told = route.receive() => Woken::Route(told),
                told = neighbours.receive() => Woken::Neighbours(told),
                told = device(devices) => Woken::Device(told),
                read = &mut beginning.job, if beginning.read.is_none() => Woken::Begun(started(read)),
            },
            State::Following(following) => {
                let due = following.follower.due(following.reading.is_some() || following.found.is_some());
                let listens =
                    [Family::V4, Family::V6].map(|family| following.follower.path_mtus().listens(family));
                let Following { reading, sysctls, .. } = &mut **following;
                tokio::select! {
                    told = route.receive() => Woken::Route(told),
                    told = neighbours.receive() => Woken::Neighbours(told),
                    told = device(devices) => Woken::Device(told),
                    message = icmp.receive(listens) => Woken::Icmp(message),
                    found = found(reading) => Woken::Found(found),
                    hooks = self.hooks.changed() => Woken::Hooks(hooks),
                    looked = sysctls.looked() => looked.map_or(Woken::Again, Woken::Sysctls),
                    () = until(due), if due.is_some() => Woken::Again,
                }
            }
        };
        let now = Instant::now();
        match woken {
            Woken::Again => {}
            Woken::Route(told) => {
                if let Err(cause) = self.hear(told, now)? {
                    self.lose_track(cause);
                }
            }
            Woken::Neighbours(told) => {
                self.hear_neighbours(told, now)?;
            }
            Woken::Device(told) => self.hear_device(told)?,
            Woken::Icmp((family, message)) => {
                if let State::Following(following) = &mut self.state {
                    take_icmp(message, family, following.follower.path_mtus(), now);
                }
            }
            Woken::Hooks(hooks) => {
                let hooks = hooks.map_err(|error| system(FOLLOWING_HOOKS, error))?;
                self.take_hooks(hooks);
            }
            Woken::Begun(read) => {
                if let State::Reading(beginning) = &mut self.state {
                    beginning.read = Some(read);
                }
            }
            Woken::Found(found) => {
                if let State::Following(following) = &mut self.state {
                    following.set_found(found);
                }
            }
            Woken::Sysctls(looked) => {
                if let State::Following(following) = &mut self.state {
                    following.take_sysctls(looked, now);
                }
            }
        }
        Ok(())
    }
}

impl Following {
    /// Looks whether what is done beside the loop is done.
    fn poll(&mut self, now: Instant, anchor: &Anchor) {
        if let Some(found) = unconstrained(found(&mut self.reading)).now_or_never() {
            self.set_found(found);
        }
        match &mut self.sysctls {
            Look::Looking(_, job) => {
                if let Some(looked) = unconstrained(job).now_or_never() {
                    self.take_sysctls(started(looked), now);
                }
            }
            Look::Waiting(until) if *until <= now => {
                self.sysctls =
                    Look::Looking(self.follower.stamp(), anchor.run("fastswan-host", read_sysctls));
            }
            Look::Waiting(_) => {}
        }
    }

    fn set_found(&mut self, found: Result<Found, HostError>) {
        self.found = self.reading.take().map(|(wanted, _)| (wanted, found));
    }

    fn start_reading(&mut self, now: Instant, anchor: &Anchor) {
        if self.reading.is_some() || self.found.is_some() {
            return;
        }
        let Some(wanted) = self.follower.start_reading(now) else { return };
        let what = wanted.clone();
        let job = anchor.run("fastswan-host", move || match what {
            Wanted::Routes(family, known) => {
                read_routes(family, &known).map(|routes| Found::Routes(family, routes))
            }
            Wanted::Rules(family) => read_rules(family).map(|rules| Found::Rules(family, rules)),
            Wanted::Neighbours => read_neighbours().map(Found::Neighbours),
            Wanted::PathMtus(family) => read_path_mtus(family).map(|read| Found::PathMtus(family, read)),
        });
        self.reading = Some((wanted.without_routes(), job));
    }

    /// Takes up what was read, once all that was told before has been.
    fn take_found(&mut self, now: Instant, anchor: &Anchor) {
        match self.found.take() {
            None => {}
            Some((_, Ok(found))) => {
                if let Some(old) = self.follower.finish_reading(found, now) {
                    // It may take long, and nobody waits for it.
                    drop(anchor.run("fastswan-host", move || drop(old)));
                }
            }
            Some((wanted, Err(error))) => {
                tracing::warn!(%error, "cannot read what the host does, trying again");
                self.follower.give_up(&wanted, now);
            }
        }
    }

    fn take_sysctls(&mut self, looked: Result<Sysctls, HostError>, now: Instant) {
        let mut links = self.follower.links();
        if let Look::Looking(stamp, _) = self.sysctls {
            match looked {
                Ok(sysctls) => {
                    links = sysctls.read;
                    self.follower.take_sysctls(stamp, sysctls, now);
                }
                Err(error) => tracing::debug!(%error, "cannot read sysctls, trying again"),
            }
        }
        let share = u32::try_from(links / SYSCTL_LINKS).unwrap_or(u32::MAX);
        self.sysctls = Look::Waiting(now + SYSCTLS.saturating_mul(share.saturating_add(1)));
    }
}

impl Look {
    /// Waits until it is time, or until something was read. Cancel-safe.
    async fn looked(&mut self) -> Option<Result<Sysctls, HostError>> {
        match self {
            Self::Waiting(until) => {
                sleep_until(*until).await;
                None
            }
            Self::Looking(_, job) => Some(started(job.await)),
        }
    }
}

/// Reads everything.
fn begin(taken: &BTreeSet<u32>) -> Begun {
    let (follower, facts) = Follower::new(read_all()?, taken, Instant::now());
    Ok((Box::new(follower), facts))
}

/// Waits for what is being read; for ever if nothing is. Cancel-safe.
async fn found(reading: &mut Option<(Wanted, Job<Result<Found, HostError>>)>) -> Result<Found, HostError> {
    match reading {
        Some((_, job)) => started(job.await),
        None => pending().await,
    }
}

/// Waits for the next datagram; for ever without a socket. Cancel-safe.
async fn device(devices: &mut Option<NetlinkSocket>) -> io::Result<Datagram> {
    match devices {
        Some(devices) => devices.receive().await,
        None => pending().await,
    }
}

async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        sleep_until(due).await;
    }
}

#[async_trait]
impl HostSource for NetlinkHost {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if !matches!(self.state, State::Waiting(_)) {
                let is_drained = self.step()?;
                if !self.ready.is_empty() {
                    continue;
                }
                if !is_drained && matches!(self.state, State::Following(_)) {
                    // There is more, and others have something to do too.
                    yield_now().await;
                    continue;
                }
            }
            self.wait().await?;
        }
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        match self.state {
            State::Following(_) if self.ready.is_empty() => {
                let is_drained = self.step()?;
                Ok(is_drained && self.hooks.caught_up().map_err(|error| system(FOLLOWING_HOOKS, error))?)
            }
            _ => Ok(false),
        }
    }

    fn resync(&mut self) {
        self.lose_track(HostStaleCause::Requested);
    }

    fn solicit(&mut self, neighbours: &[(u32, IpAddr)]) {
        self.solicitor.solicit(neighbours, &self.anchor);
    }

    fn failed_solicitations(&self) -> u64 {
        self.solicitor.failed()
    }
}

const FOLLOWING_HOOKS: &str = "following netfilter, tc and other hooks";
const HEARING: &str = "hearing of changes of links, addresses, routes and neighbours";

fn started<T>(result: io::Result<Result<T, HostError>>) -> Result<T, HostError> {
    result.map_err(|error| system("starting a thread", error)).and_then(identity)
}

fn system(attempt: &str, error: io::Error) -> HostError {
    HostError::System { attempt: attempt.to_owned(), remedy: remedy(&error), error }
}
