//! Keeps the program attached where packets come in.

use std::{fmt, future::pending, path::PathBuf, time::Instant};

use futures::{FutureExt as _, future::BoxFuture};

use super::GatewayError;
use crate::{
    forwarder::{AttachConfig, ForwarderError, PortProblem, ResolvedPort, XdpForwarder},
    mirror::Mirror,
};

/// A forwarder, and the interfaces that it is to be attached to.
#[derive(Default)]
pub(super) struct Attached {
    forwarder: Option<XdpForwarder>,
    /// The name that each had when it was found, and how to attach to it.
    interfaces: Vec<(String, AttachConfig)>,
    directory: Option<PathBuf>,
    /// The program was attached once: from then on a failure is no reason to end.
    has_begun: bool,
    /// Another process has taken over from this one.
    superseded: Option<BoxFuture<'static, ForwarderError>>,
}

impl Attached {
    /// Takes a forwarder, and finds the interfaces.
    pub(super) fn begin(
        &mut self,
        forwarder: XdpForwarder,
        configs: Vec<AttachConfig>,
    ) -> Result<Vec<ResolvedPort>, ForwarderError> {
        let ports = forwarder.resolve(&configs)?;
        self.interfaces = ports.iter().map(|port| port.interface.clone()).zip(configs).collect();
        self.forwarder = Some(forwarder);
        Ok(ports)
    }

    pub(super) fn pin_in(&mut self, directory: PathBuf) {
        self.directory = Some(directory);
    }

    pub(super) fn take(self) -> Option<XdpForwarder> {
        self.forwarder
    }

    /// Waits until another process has taken over. Cancel-safe.
    pub(super) async fn superseded(&mut self) -> GatewayError {
        match &mut self.superseded {
            Some(superseded) => GatewayError::Forwarder(superseded.await),
            None => pending().await,
        }
    }

    /// Attaches to the interfaces with these indices, for the first time to all at once. Without a forwarder somebody else
    /// does.
    pub(super) fn attach(
        &mut self,
        interfaces: &[u32],
        mirror: &mut Mirror,
        now: Instant,
    ) -> Result<(), GatewayError> {
        let Some(forwarder) = &mut self.forwarder else {
            for ifindex in interfaces {
                mirror.handle_attached(*ifindex, Ok(()), now);
            }
            return Ok(());
        };
        if !std::mem::replace(&mut self.has_begun, true)
            && let Some(directory) = &self.directory
        {
            let configs: Vec<_> = self.interfaces.iter().map(|(_, config)| config.clone()).collect();
            for attachment in forwarder.attach_pinned(directory, &configs)? {
                mirror.handle_attached(attachment.ifindex, Ok(()), now);
            }
            self.superseded = Some(forwarder.superseded().boxed());
            return Ok(());
        }
        for ifindex in interfaces {
            let found = mirror.interfaces().find(|(_, index, _)| *index == Some(*ifindex));
            let name = found.map(|(name, ..)| name.to_owned());
            let config = self.interfaces.iter().find(|(known, _)| Some(known) == name.as_ref());
            let Some((_, config)) = config else { continue };
            match forwarder.attach(config) {
                Ok(attachment) => mirror.handle_attached(attachment.ifindex, Ok(()), now),
                Err(error) => {
                    tracing::warn!(%error, "cannot attach to an interface: its packets pass; trying again");
                    mirror.handle_attached(*ifindex, Err(error.to_string()), now);
                }
            }
        }
        Ok(())
    }

    /// Looks whether the frames of each port still show all of a packet, after something about links has changed.
    pub(super) fn look_again(&self, mirror: &mut Mirror) {
        for port in self.forwarder.iter().flat_map(XdpForwarder::check_ports) {
            match &port.problem {
                // Another interface may have its name and index, and then the host source need not tell that it was gone.
                Some(PortProblem::Gone { .. }) => mirror.handle_detached(port.ifindex),
                Some(problem) => {
                    let problem = problem.to_string();
                    tracing::warn!(interface = port.interface, problem, "its packets pass");
                    mirror.handle_suitability(port.ifindex, Some(&problem));
                }
                None => mirror.handle_suitability(port.ifindex, None),
            }
        }
    }

    /// Finds another interface to attach to.
    pub(super) fn add(&mut self, config: AttachConfig) -> Result<ResolvedPort, ForwarderError> {
        let forwarder = self.forwarder.as_ref().ok_or(ForwarderError::NoForwarder)?;
        let mut ports = forwarder.resolve(std::slice::from_ref(&config))?;
        let Some(port) = ports.pop() else {
            return Err(ForwarderError::NoSuchInterface { interface: config.interface.to_string() });
        };
        self.interfaces.retain(|(name, _)| *name != port.interface);
        self.interfaces.push((port.interface.clone(), config));
        Ok(port)
    }

    pub(super) fn remove(&mut self, interface: &str) -> Result<(), ForwarderError> {
        self.interfaces.retain(|(name, _)| name != interface);
        self.forwarder.as_mut().ok_or(ForwarderError::NoForwarder)?.detach(interface)
    }
}

/// Whether another gateway forwards in this one's place.
pub(super) fn is_superseded(error: &GatewayError) -> bool {
    matches!(error, GatewayError::Forwarder(ForwarderError::Superseded { .. }))
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("interfaces", &self.interfaces).finish_non_exhaustive()
    }
}
