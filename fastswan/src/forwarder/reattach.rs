//! Looking after ports that are attached: are they still there, are they still suitable, and has one come back?
//!
//! The kernel takes the program along when an interface goes, and an interface that comes back under the same name has
//! another index. One that moves to another network namespace takes the program with it, where the same index may be
//! another port's; so its link is closed as soon as it is missed here.

use std::io;

use super::{
    AttachMode, Attached, Attachment, ForwarderError, Interface, PortProblem, PortStatus, XdpForwarder,
    attach::{Candidate, find},
    pins::Pins,
    port::{merges_packets, unsuitable},
};
use crate::{netlink::read_link, sys::network_namespace};

/// What came of attaching again to a port that had gone.
#[derive(Debug)]
#[non_exhaustive]
pub struct Reattachment {
    /// The name of the interface.
    pub interface: String,
    /// The index that it had: the table's ports of this index are to be removed.
    pub before: u32,
    /// Where the program is attached now, or why it is not.
    pub now: Result<Attachment, ForwarderError>,
}

impl XdpForwarder {
    /// Looks at each attached port anew: a few system calls each. Do it when links change, also when only their features do
    /// (`RTM_NEWLINK`). The packets of a port that has a [`PortProblem`] must pass from then on: remove it from the table
    /// ([`Ports::remove_port`](crate::table::Ports::remove_port)) until it has none. The program is taken off a port that has
    /// moved to another network namespace. Call it in the network namespace in which the ports were attached.
    ///
    /// ```no_run
    /// # use fastswan::{XdpForwarder, table::Ports};
    /// # fn run(forwarder: &XdpForwarder, table: &mut impl Ports) {
    /// for port in forwarder.check_ports() {
    ///     if let Some(problem) = port.problem {
    ///         table.remove_port(port.ifindex, 0);
    ///         println!("its packets pass: {problem}");
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn check_ports(&self) -> Vec<PortStatus> {
        let status = |it: &Attached| PortStatus {
            interface: it.attachment.interface.clone(),
            ifindex: it.attachment.ifindex,
            problem: self.problem(it),
        };
        self.attached.iter().map(status).collect()
    }

    /// Attaches again to the ports that have gone or lost the program, if there is an interface of their name (or of their
    /// index, for those that were asked for by index), and closes the links of those that moved to another network
    /// namespace. A port that runs another program of these pins, left by a process that ended while it took over, is taken
    /// back. Returns what was tried; nothing if all ports are as they should be.
    ///
    /// Their packets pass until the table knows the new ports.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Superseded`] or another error of the directory that the ports are pinned in. Those of single ports
    /// are in their [`Reattachment`].
    pub fn reattach(&mut self) -> Result<Vec<Reattachment>, ForwarderError> {
        let is_lost = |it: &&Attached| {
            matches!(self.problem(it), Some(PortProblem::Gone { .. } | PortProblem::Replaced { .. }))
        };
        let lost: Vec<u32> = self.attached.iter().filter(is_lost).map(|it| it.attachment.ifindex).collect();
        if lost.is_empty() {
            return Ok(Vec::new());
        }
        let pins = self.own_pins()?;
        let mut tried = Vec::new();
        for ifindex in lost {
            let Some(at) = self.attached.iter().position(|it| it.attachment.ifindex == ifindex) else {
                continue;
            };
            let interface = self.attached[at].attachment.interface.clone();
            let now = self.reattach_one(pins.as_ref(), at);
            tried.push(Reattachment { interface, before: ifindex, now });
        }
        Ok(tried)
    }

    fn reattach_one(&mut self, pins: Option<&Pins>, at: usize) -> Result<Attachment, ForwarderError> {
        let Attached { attachment, link, config, .. } = &self.attached[at];
        let before = attachment.ifindex;
        // By what it was called then, if not by an index: also one that was asked for by an alternative name.
        let config = match &config.interface {
            Interface::Index(_) => config.clone(),
            Interface::Name(_) => {
                let mut config = config.clone();
                if find(&config.interface).is_err() {
                    config.interface = Interface::Name(attachment.interface.clone());
                }
                config
            }
        };
        let joins_here = link.joined().is_ok_and(|joined| joined.ifindex == Some(before))
            && read_link(before).is_ok_and(|port| {
                port.program.is_some()
                    && link.joined().is_ok_and(|joined| port.program == Some(joined.program))
            });
        if !joins_here {
            // Elsewhere it would go on forwarding what is not this namespace's.
            link.detach().map_err(|error| {
                ForwarderError::new(format!("detaching from {}", attachment.interface), error)
            })?;
            if let Some(pins) = pins {
                pins.unpin_port(before)?;
            }
        }
        let mut candidate = Candidate::find(&config)?;
        let is_other =
            |(other, it): (usize, &Attached)| other != at && it.attachment.ifindex == candidate.link.ifindex;
        if self.attached.iter().enumerate().any(is_other) {
            return Err(ForwarderError::NamedTwice {
                interface: candidate.link.name.clone(),
                named: [config.interface.to_string(), candidate.link.name],
            });
        }
        // The embedder has said nothing about what the new one's sender leaves undone.
        candidate.excused.clone_from(&self.attached[at].excused);
        let attachment = self.attach_candidate(pins, candidate)?;
        // The new one is the last.
        self.attached.swap_remove(at);
        Ok(attachment)
    }

    fn problem(&self, it: &Attached) -> Option<PortProblem> {
        let Attachment { interface, ifindex, mode, .. } = &it.attachment;
        match network_namespace() {
            Ok(namespace) if namespace == it.namespace => {}
            Ok(_) => {
                return Some(unknown(
                    interface,
                    &io::Error::other("this thread is in another network namespace"),
                ));
            }
            Err(error) => return Some(unknown(interface, &error)),
        }
        let link = match read_link(*ifindex) {
            Ok(link) => link,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Some(gone(it)),
            Err(error) => return Some(unknown(interface, &error)),
        };
        if link.program != Some(self.program.id) {
            // The link of a port whose index another interface has now joins nothing.
            let joins = it.link.joined().is_ok_and(|joined| joined.ifindex == Some(*ifindex));
            return Some(match link.program {
                None if !joins || link.name != *interface => gone(it),
                program => PortProblem::Replaced { interface: link.name, program },
            });
        }
        let problems = unsuitable(&link).and_then(|problems| {
            let stacked = if *mode == AttachMode::Generic { merges_packets(&link)? } else { None };
            Ok(problems.into_iter().filter(|problem| !it.excused.contains(problem)).chain(stacked).next())
        });
        problems.unwrap_or_else(|error| Some(unknown(interface, &error)))
    }
}

/// Takes the program off a port that is not here any longer. If it was deleted, that has no effect; if it was moved to another
/// network namespace, the program would go on forwarding there as if it were here.
fn gone(it: &Attached) -> PortProblem {
    let interface = it.attachment.interface.clone();
    if let Err(error) = it.link.detach() {
        tracing::warn!(%error, interface, "the program is still on an interface that is gone");
    }
    PortProblem::Gone { interface }
}

fn unknown(interface: &str, error: &io::Error) -> PortProblem {
    PortProblem::Unknown { interface: interface.to_owned(), error: error.to_string() }
}
