//! Taking over pinned ports: all of them, or none.
//!
//! A take-over is a list of steps, each of which knows how it is undone. Until [`Takeover::commit`] the earlier program is
//! the owner of the directory, and a take-over that is dropped before undoes its steps in reverse order: the earlier process
//! goes on as if nothing had been tried, and so may this one try again. If this process ends half-way instead, the ports that it
//! had are its program's, whose lease is nobody's to renew: they pass everything until the earlier process takes them back
//! ([`XdpForwarder::reattach`](super::XdpForwarder::reattach)) or the next one takes over.

use aya::Ebpf;

use super::{
    AttachMode, Attachment, ForwarderError,
    attach::Candidate,
    hook::xdp::{Link, Program},
    pins::Pins,
};

/// Steps of a take-over that is not committed.
#[derive(Debug)]
pub(super) struct Takeover<'t> {
    pins: &'t Pins,
    /// The program that takes over.
    program: &'t Program,
    /// How to undo each step.
    undo: Vec<Undo>,
}

#[derive(Debug)]
enum Undo {
    /// A port ran the owner's program.
    GiveBack { ifindex: u32, link: Link },
    /// A port ran the owner's program in another mode.
    Restore { ifindex: u32, generic: bool },
    /// A port ran no program.
    Detach { ifindex: u32, link: Link },
    /// A port ran this program, and was not pinned.
    Unpin { ifindex: u32 },
    /// This program's counters were not pinned.
    RemoveCounters,
}

impl<'t> Takeover<'t> {
    pub(super) fn begin(pins: &'t Pins, program: &'t Program) -> Self {
        Self { pins, program, undo: Vec::new() }
    }

    /// Pins the counters, for the process that takes over from this one.
    pub(super) fn pin_counters(&mut self, ebpf: &Ebpf) -> Result<(), ForwarderError> {
        if self.pins.owner() != Some(self.program.id) {
            self.undo.push(Undo::RemoveCounters);
        }
        self.pins.add_counters(self.program.id, ebpf)
    }

    /// Makes a port run this program, and pins its link. `own` is the link by which it does already, if so.
    pub(super) fn port(
        &mut self,
        candidate: &Candidate,
        own: Option<&Link>,
    ) -> Result<(Link, Attachment), ForwarderError> {
        let ifindex = candidate.link.ifindex;
        let mode = if candidate.link.generic { AttachMode::Generic } else { AttachMode::Native };
        let attachment = Attachment { interface: candidate.link.name.clone(), ifindex, mode, fallback: None };
        if let Some((link, joined)) = self.pins.link(ifindex) {
            // A link whose port is gone, or was replaced by another one of its index, is of no use.
            let is_port = joined.ifindex == Some(ifindex) && candidate.link.program == Some(joined.program);
            if is_port && [AttachMode::Automatic, mode].contains(&candidate.config.mode) {
                self.replace(&link, ifindex, joined.program)?;
                return Ok((link, attachment));
            }
            self.pins.remove_port(ifindex)?;
            if is_port && joined.program != self.program.id {
                self.undo.push(Undo::Restore { ifindex, generic: candidate.link.generic });
            }
        } else if let Some(own) = own {
            let link = own.try_clone().map_err(|error| ForwarderError::new("copying a link", error))?;
            self.pins.add_port(ifindex, &link)?;
            self.undo.push(Undo::Unpin { ifindex });
            return Ok((link, attachment));
        }
        let (link, attachment) = candidate.attach(self.program)?;
        // Until it is pinned, it is undone by being dropped.
        self.pins.add_port(ifindex, &link)?;
        let copy = link.try_clone().map_err(|error| ForwarderError::new("copying a link", error))?;
        self.undo.push(Undo::Detach { ifindex, link: copy });
        Ok((link, attachment))
    }

    /// Puts this program in the place of another one.
    fn replace(&mut self, link: &Link, ifindex: u32, before: u32) -> Result<(), ForwarderError> {
        let error =
            |error| ForwarderError::new(format!("replacing the XDP program of port #{ifindex}"), error);
        if before == self.program.id {
            return Ok(());
        }
        let link_to_undo = link.try_clone().map_err(error)?;
        link.replace(self.program).map_err(error)?;
        self.undo.push(Undo::GiveBack { ifindex, link: link_to_undo });
        Ok(())
    }

    /// Makes this program the owner. Before, nothing has happened for anybody else; afterwards all has.
    pub(super) fn commit(mut self) -> Result<(), ForwarderError> {
        self.pins.set_owner(self.program)?;
        self.undo.clear();
        Ok(())
    }

    /// Keeps what was done by the owner itself.
    pub(super) fn keep(mut self) {
        self.undo.clear();
    }
}

impl Drop for Takeover<'_> {
    fn drop(&mut self) {
        if self.undo.is_empty() {
            return;
        }
        let owner = self.pins.owner_program();
        while let Some(step) = self.undo.pop() {
            let what = format!("{step:?}");
            if let Err(error) = step.undo(self.pins, self.program.id, owner.as_ref()) {
                tracing::warn!(%error, step = what, "a step of a take-over that has failed is not undone");
            }
        }
        tracing::info!(owner = owner.map(|owner| owner.id), "a take-over has failed and is undone");
    }
}

impl Undo {
    fn undo(self, pins: &Pins, program: u32, owner: Option<&Program>) -> Result<(), ForwarderError> {
        let error = |ifindex: u32, error| ForwarderError::new(format!("giving back port #{ifindex}"), error);
        match (self, owner) {
            (Self::GiveBack { ifindex, link }, Some(owner)) => {
                link.replace(owner).map_err(|failure| error(ifindex, failure))
            }
            (Self::Restore { ifindex, generic }, Some(owner)) => {
                let link =
                    Link::attach(owner, ifindex, generic).map_err(|failure| error(ifindex, failure))?;
                pins.add_port(ifindex, &link)
            }
            (Self::GiveBack { ifindex, link } | Self::Detach { ifindex, link }, _) => {
                link.detach().map_err(|failure| error(ifindex, failure))?;
                pins.unpin_port(ifindex)
            }
            (Self::Unpin { ifindex }, _) => pins.unpin_port(ifindex),
            (Self::Restore { .. }, None) => Ok(()),
            (Self::RemoveCounters, _) => {
                pins.remove_counters(program);
                Ok(())
            }
        }
    }
}
