//! Asking and commanding a gateway while it runs.

use tokio::sync::{mpsc, oneshot, watch};

use super::status::{GatewayState, Status};
#[cfg(feature = "bpf")]
use crate::forwarder::{AttachConfig, ForwarderError, ResolvedPort};
use crate::{
    compiler::{Explanation, Flow},
    mirror::{HoldId, HoldTarget},
};

/// Commands that wait at the most. The sender of another one waits.
const WAITING: usize = 64;

/// Asks and commands a gateway while it runs, from any thread, and from any executor. Clones are for the same gateway.
///
/// Nothing that it does stops the gateway for longer than a fraction of a millisecond, however many policies there are.
/// Each method waits until the gateway has run and answered: a question between two runs of
/// [`Gateway::run_until`](super::Gateway::run_until) is answered in the next one. It fails with [`HandleError::Failed`] once the
/// gateway has failed, and with [`HandleError::Ended`] once it is gone, also if it waits when that happens.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fastswan::{Gateway, MemoryTable, StaticSource, VouchedHost, table::TableConfig};
///
/// let table = MemoryTable::new(&TableConfig::default());
/// let mut gateway = Gateway::new(StaticSource::new(&[]), VouchedHost::new(), table);
/// let handle = gateway.handle();
/// // Elsewhere, on any thread.
/// let asking = async {
///     let status = handle.status().await?;
///     println!("{status}");
///     Ok::<_, fastswan::gateway::HandleError>(status.policies.len())
/// };
/// let mut policies = None;
/// gateway.run_until(async { policies = asking.await.ok() }).await?;
/// assert_eq!(policies, Some(0));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GatewayHandle {
    commands: mpsc::Sender<Command>,
    states: watch::Receiver<GatewayState>,
}

/// What a gateway is told to do, each with whom to answer.
#[derive(Debug)]
pub(super) enum Command {
    Status(oneshot::Sender<Status>),
    Explain(Flow, oneshot::Sender<Explanation>),
    Kill(bool, oneshot::Sender<()>),
    Hold(HoldTarget, oneshot::Sender<HoldId>),
    Release(HoldId, oneshot::Sender<bool>),
    #[cfg(feature = "bpf")]
    Attach(AttachConfig, oneshot::Sender<Result<ResolvedPort, ForwarderError>>),
    #[cfg(feature = "bpf")]
    Detach(String, oneshot::Sender<Result<(), ForwarderError>>),
}

/// A gateway did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// It was dropped.
    #[error("the gateway was dropped: build another, and take a handle of that")]
    Ended,
    /// It has failed, and everything passes. [`GatewayError`](super::GatewayError) says why: the result of its run.
    #[error("the gateway has failed: build another of its parts, and take a handle of that")]
    Failed,
    /// An interface could not be attached to, or detached from.
    #[cfg(feature = "bpf")]
    #[error(transparent)]
    Forwarder(#[from] ForwarderError),
}

/// The gateway's ends of what its handles hold.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) states: watch::Sender<GatewayState>,
    handle: GatewayHandle,
}

impl Ends {
    pub(super) fn new() -> Self {
        let (sender, commands) = mpsc::channel(WAITING);
        let (states, receiver) = watch::channel(GatewayState::default());
        Self { commands, states, handle: GatewayHandle { commands: sender, states: receiver } }
    }

    pub(super) fn handle(&self) -> GatewayHandle {
        self.handle.clone()
    }

    /// Tells that the gateway has failed.
    pub(super) fn fail(&self) {
        self.states.send_modify(|state| {
            state.is_on = false;
            state.has_ended = true;
        });
    }

    /// Takes no more commands, and refuses those that wait: each learns that the gateway has failed. Cancel-safe.
    pub(super) async fn refuse_commands(&mut self) {
        self.commands.close();
        // Those too whose sender has a place in the queue and is about to fill it.
        while self.commands.recv().await.is_some() {}
    }
}

impl GatewayHandle {
    /// What the gateway does, and why.
    ///
    /// # Errors
    ///
    /// [`HandleError::Failed`] and [`HandleError::Ended`].
    pub async fn status(&self) -> Result<Status, HandleError> {
        let mut status = self.ask(Command::Status).await?;
        // Here, so that the gateway need not.
        status.sort();
        Ok(status)
    }

    /// Whether a packet is fast, via which policy and association, or why not.
    ///
    /// # Errors
    ///
    /// [`HandleError::Failed`] and [`HandleError::Ended`].
    pub async fn explain(&self, flow: Flow) -> Result<Explanation, HandleError> {
        self.ask(|answer| Command::Explain(flow, answer)).await
    }

    /// Turns the kill switch on, and everything passes from the return on; or off, and packets may be fast again.
    ///
    /// # Errors
    ///
    /// [`HandleError::Failed`] and [`HandleError::Ended`]; everything passes then.
    pub async fn set_kill_switch(&self, on: bool) -> Result<(), HandleError> {
        self.ask(|answer| Command::Kill(on, answer)).await
    }

    /// Keeps policies from being fast until [`Self::release`]. When this returns, no packet is forwarded for them any
    /// longer: the table was written, and the packets that were in the program have left it. So a daemon holds a policy
    /// before it removes it, and nothing is left to the lag. A hold whose future is dropped stays.
    ///
    /// # Errors
    ///
    /// [`HandleError::Failed`] and [`HandleError::Ended`]; everything passes then.
    pub async fn hold(&self, target: HoldTarget) -> Result<HoldId, HandleError> {
        self.ask(|answer| Command::Hold(target, answer)).await
    }

    /// Ends a hold. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// [`HandleError::Failed`] and [`HandleError::Ended`].
    pub async fn release(&self, hold: HoldId) -> Result<bool, HandleError> {
        self.ask(|answer| Command::Release(hold, answer)).await
    }

    /// Attaches the program to another interface, and keeps it attached, as those that the gateway began with.
    ///
    /// # Errors
    ///
    /// [`HandleError::Forwarder`] if there is no such interface, it is not suitable, or the gateway has no forwarder;
    /// [`HandleError::Failed`] and [`HandleError::Ended`].
    #[cfg(feature = "bpf")]
    pub async fn attach(&self, config: AttachConfig) -> Result<ResolvedPort, HandleError> {
        Ok(self.ask(|answer| Command::Attach(config, answer)).await??)
    }

    /// Detaches the program from an interface.
    ///
    /// # Errors
    ///
    /// [`HandleError::Forwarder`] if it is not attached; [`HandleError::Failed`] and [`HandleError::Ended`].
    #[cfg(feature = "bpf")]
    pub async fn detach(&self, interface: impl Into<String>) -> Result<(), HandleError> {
        let interface = interface.into();
        Ok(self.ask(|answer| Command::Detach(interface, answer)).await??)
    }

    /// Follows whether the fast path is on, and why not.
    #[must_use]
    pub fn watch(&self) -> StateWatch {
        StateWatch(self.states.clone())
    }

    async fn ask<A>(&self, command: impl FnOnce(oneshot::Sender<A>) -> Command) -> Result<A, HandleError> {
        let (sender, answer) = oneshot::channel();
        self.commands.send(command(sender)).await.map_err(|_| self.ended())?;
        answer.await.map_err(|_| self.ended())
    }

    /// Why there is no answer.
    fn ended(&self) -> HandleError {
        if self.states.borrow().has_ended { HandleError::Failed } else { HandleError::Ended }
    }
}

/// Tells when the state of a gateway changes. It need not be looked at: only the latest state is kept.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fastswan::{Gateway, MemoryTable, StaticSource, VouchedHost, table::TableConfig};
///
/// let table = MemoryTable::new(&TableConfig::default());
/// let mut gateway = Gateway::new(StaticSource::new(&[]), VouchedHost::new(), table);
/// let mut watch = gateway.handle().watch();
/// assert!(!watch.state().is_on);
/// gateway.synchronise().await?;
/// assert!(watch.changed().await.is_some_and(|state| state.is_on));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct StateWatch(watch::Receiver<GatewayState>);

impl StateWatch {
    /// The state now.
    #[must_use]
    pub fn state(&mut self) -> GatewayState {
        self.0.borrow_and_update().clone()
    }

    /// Waits until the state is another one than it was when it was looked at last; `None` once the gateway is gone, or when
    /// that was the state of one that has failed: there is no other after it. Cancel-safe.
    pub async fn changed(&mut self) -> Option<GatewayState> {
        if self.0.borrow().has_ended && !self.0.has_changed().ok()? {
            return None;
        }
        self.0.changed().await.ok()?;
        Some(self.state())
    }
}
