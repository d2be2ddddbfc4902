//! The running kernel as a source of facts about the host.

use std::{collections::VecDeque, convert::identity, io, time::Duration};

use async_trait::async_trait;
use tokio::time::{Instant, sleep_until};

use super::HostSource;
use crate::{
    host::{HostError, HostEvent, HostFacts, HostStaleCause},
    netlink::{Anchor, HostChanges, Job, read_host, remedy},
};

/// From the end of one reading to the beginning of the next.
const PAUSE: Duration = Duration::from_millis(100);
/// The same, when it has failed.
const RETRY: Duration = Duration::from_secs(1);

/// What the running kernel does with addresses, in the network namespace of the thread that opens it, on whatever thread
/// it is polled.
///
/// It yields everything at first. When the kernel tells of a change (of links, addresses, routes, rules, neighbours, next
/// hop objects, forwarding, reverse path filters, or of whether a device takes redirected frames), it says so at once,
/// and yields everything again, at most ten times a second. A neighbour that is only heard from again is no change. Of
/// other sysctls the kernel does not tell: they are known as they were when something else changed last.
///
/// Needs Linux; from 6.3 on it hears whether devices take redirected frames. Needs no privilege, but without
/// `CAP_NET_ADMIN` it may read what a link loses while the kernel still takes it away.
///
/// ```no_run
/// use fastswan::{HostEvent, HostSource as _, NetlinkHost};
///
/// # async fn run() -> Result<(), fastswan::host::HostError> {
/// let mut host = NetlinkHost::open()?;
/// while let Some(event) = host.next_event().await? {
///     match event {
///         HostEvent::Snapshot(facts) => println!("{} routes", facts.routes.len()),
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
    changes: HostChanges,
    state: State,
    /// Not yielded yet.
    ready: VecDeque<HostEvent>,
}

#[derive(Debug)]
enum State {
    /// It is read then.
    Waiting(Instant),
    /// It is being read.
    Reading(Job<Result<HostFacts, HostError>>),
    /// What was yielded is what the kernel has. It is not read again before.
    Following(Instant),
}

impl NetlinkHost {
    /// Subscribes to the kernel's notifications. Must be called inside a tokio runtime with I/O and time.
    ///
    /// # Errors
    ///
    /// [`HostError::System`]: the kernel or the service manager allows no such sockets, or no more.
    pub fn open() -> Result<Self, HostError> {
        let changes = HostChanges::subscribe().map_err(|error| {
            system(
                "subscribing to notifications about links, addresses, routes and neighbours (NETLINK_ROUTE)",
                error,
            )
        })?;
        let anchor = Anchor::here().map_err(|error| system("starting a thread", error))?;
        Ok(Self { anchor, changes, state: State::Waiting(Instant::now()), ready: VecDeque::new() })
    }

    /// Reads the facts once, in the network namespace of the calling thread, and blocks meanwhile: a few microseconds for
    /// each route and neighbour. They age at once: to forward by them, follow a [`NetlinkHost`].
    ///
    /// # Errors
    ///
    /// [`HostError`].
    pub fn read_once() -> Result<HostFacts, HostError> {
        read_host()
    }

    /// Everything is to be read again.
    fn lose_track(&mut self, not_before: Instant, cause: HostStaleCause) {
        self.state = State::Waiting(not_before);
        self.ready.push_back(HostEvent::Stale(cause));
    }
}

#[async_trait]
impl HostSource for NetlinkHost {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match &mut self.state {
                State::Waiting(until) => {
                    // A timer takes a millisecond even when it is due.
                    if Instant::now() < *until {
                        sleep_until(*until).await;
                    }
                    // What is told from now on may not be read, or be read in part.
                    self.changes.forget();
                    self.state = State::Reading(self.anchor.run("fastswan-host", read_host));
                }
                State::Reading(reading) => {
                    let started = reading.await.map_err(|error| system("starting a thread", error));
                    match started.and_then(identity) {
                        Ok(facts) => {
                            self.changes.know(&facts);
                            self.state = State::Following(Instant::now() + PAUSE);
                            self.ready.push_back(HostEvent::Snapshot(facts));
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot read what the host does, trying again in 1 s");
                            self.lose_track(Instant::now() + RETRY, HostStaleCause::Unreadable);
                        }
                    }
                }
                State::Following(not_before) => {
                    let not_before = *not_before;
                    let cause = self.changes.changed().await.map_err(|error| system(HEARING, error))?;
                    self.lose_track(not_before, cause);
                }
            }
        }
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        let State::Following(not_before) = self.state else { return Ok(false) };
        if !self.ready.is_empty() {
            return Ok(false);
        }
        match self.changes.try_changed().map_err(|error| system(HEARING, error))? {
            None => Ok(true),
            Some(cause) => {
                self.lose_track(not_before, cause);
                Ok(false)
            }
        }
    }

    fn resync(&mut self) {
        self.lose_track(Instant::now(), HostStaleCause::Requested);
    }
}

const HEARING: &str = "hearing of changes of links, addresses, routes and neighbours";

fn system(attempt: &str, error: io::Error) -> HostError {
    HostError::System { attempt: attempt.to_owned(), remedy: remedy(&error), error }
}
