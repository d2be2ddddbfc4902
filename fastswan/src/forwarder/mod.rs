//! Loads the XDP program, attaches it to interfaces and detaches it.
//!
//! The bytecode is part of the crate: building it takes no eBPF tools. Loading gives the program's table,
//! which a gateway fills.
//!
//! A [`Gateway`](crate::Gateway) that has the forwarder ([`with_forwarder`](crate::Gateway::with_forwarder)) does the rest:
//!
//! ```no_run
//! use fastswan::{Gateway, NetlinkHost, NetlinkSource, XdpForwarder};
//! use fastswan::{forwarder::AttachConfig, table::TableConfig};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let (forwarder, table) = XdpForwarder::load(TableConfig::default())?;
//! let mut gateway = Gateway::new(NetlinkSource::open()?, NetlinkHost::open()?, table)
//!     .with_forwarder(forwarder, ["lan0", "nic0"].map(AttachConfig::new))?
//!     .pinned_in("/sys/fs/bpf/gateway");
//! gateway.run_until(std::future::pending()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A driver of your own keeps this order: [load](XdpForwarder::load), [resolve](XdpForwarder::resolve) the interfaces,
//! tell the table about their ports ([`HostFacts::ports`](crate::HostFacts::ports)), fill it, then
//! [attach](XdpForwarder::attach), or [take over](XdpForwarder::attach_pinned) from an earlier process. The first packet
//! that meets the program then finds all that it needs. As long as it runs, [look again](XdpForwarder::check_ports) when
//! links change, and [attach again](XdpForwarder::reattach) what came back.
//!
//! Rooms: `load`; `hook`, what the kernel attaches programs to; `attach`, which interface is meant and how; `port`,
//! whether it is suitable; `pins`, what outlives a process; `takeover`, all ports or none; `reattach`; `supersession`;
//! `run`; the guard.

use std::path::{Path, PathBuf};

use aya::Ebpf;

#[cfg(feature = "guard")]
pub use self::guard::{Guard, GuardError};
pub use self::{
    attach::{AttachConfig, Attachment, Interface, ResolvedPort},
    error::{ForwarderError, HeldBy},
    load::LoadConfig,
    mode::AttachMode,
    port::{PortProblem, PortStatus},
    reattach::Reattachment,
    run::{ProgramCost, Run, RunAction},
};
use self::{
    attach::{Candidate, find},
    hook::xdp::{Link, Program},
    pins::Pins,
    takeover::Takeover,
};
use crate::{
    sys::grace_period,
    table::{BpfTable, Counters, MapsError, array},
};

mod attach;
mod error;
#[cfg(feature = "guard")]
mod guard;
mod hook;
mod load;
mod mode;
mod pins;
mod port;
mod reattach;
mod record;
mod run;
mod supersession;
mod takeover;
mod test_run;

/// The XDP program in the kernel, and where it is attached. Dropping it detaches it, but from ports that are
/// [pinned](Self::attach_pinned).
///
/// Needs Linux 6.12 (or [`LoadConfig::allow_unjudged_kernel`]), `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`. The
/// [module](self) shows one at work.
#[derive(Debug)]
pub struct XdpForwarder {
    ebpf: Ebpf,
    program: Program,
    attached: Vec<Attached>,
    /// Where the ports are pinned.
    pinned_in: Option<PathBuf>,
}

/// A port, the link that is held to it, and how it was asked for.
#[derive(Debug)]
struct Attached {
    attachment: Attachment,
    link: Link,
    config: AttachConfig,
    /// What its sender left undone when it was attached.
    excused: Vec<PortProblem>,
    /// Where its index is one.
    namespace: u64,
}

impl Attached {
    fn new(candidate: Candidate, (link, attachment): (Link, Attachment)) -> Self {
        let Candidate { config, excused, namespace, .. } = candidate;
        Self { attachment, link, config, excused, namespace }
    }

    /// Whether its interface is meant.
    fn is(&self, interface: &Interface) -> bool {
        match interface {
            Interface::Name(name) => {
                self.attachment.interface == *name || self.config.interface == *interface
            }
            Interface::Index(ifindex) => self.attachment.ifindex == *ifindex,
        }
    }
}

impl XdpForwarder {
    /// Loads the program with a new table of the given size. The table passes everything until it is filled,
    /// enabled and its lease renewed.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NotPermitted`], [`ForwarderError::UnjudgedKernel`], [`ForwarderError::Unsupported`],
    /// [`ForwarderError::TableSize`], [`ForwarderError::NoMemory`], or [`ForwarderError::Bpf`] with what the kernel says.
    pub fn load(config: impl Into<LoadConfig>) -> Result<(Self, BpfTable), ForwarderError> {
        load::load(&config.into())
    }

    /// Finds interfaces and looks whether they are suitable, without touching them: for the table to know their ports
    /// before their first packet meets the program.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NoSuchInterface`], [`ForwarderError::NotAName`], [`ForwarderError::NamedTwice`] or
    /// [`ForwarderError::Unsuitable`].
    pub fn resolve(&self, configs: &[AttachConfig]) -> Result<Vec<ResolvedPort>, ForwarderError> {
        Ok(Candidate::find_all(configs)?.iter().map(Candidate::resolved).collect())
    }

    /// Attaches the program to an interface, and pins it there if this forwarder's ports are
    /// [pinned](Self::attach_pinned). Its packets pass until the table knows the port
    /// ([`Ports::set_port`](crate::table::Ports::set_port)). One that was attached, went away, and came back under
    /// its name, is attached again.
    ///
    /// # Errors
    ///
    /// Those of [`Self::resolve`], [`ForwarderError::AlreadyAttached`], [`ForwarderError::NoNativeXdp`],
    /// [`ForwarderError::NotPermitted`] or [`ForwarderError::Attach`], and those of [`Self::attach_pinned`] if it is pinned.
    pub fn attach(&mut self, config: &AttachConfig) -> Result<Attachment, ForwarderError> {
        let pins = self.own_pins()?;
        let candidate = Candidate::find(config)?;
        let ifindex = candidate.link.ifindex;
        let runs_ours = candidate.link.program == Some(self.program.id);
        if let Some(before) = self.attached.iter().find(|it| it.attachment.ifindex == ifindex && runs_ours) {
            return Err(ForwarderError::NamedTwice {
                interface: candidate.link.name,
                named: [before.config.interface.to_string(), config.interface.to_string()],
            });
        }
        // What was attached under this name or index is gone.
        let name = Interface::Name(candidate.link.name.clone());
        self.close(pins.as_ref(), |it| it.is(&name) || it.attachment.ifindex == ifindex)?;
        self.attach_candidate(pins.as_ref(), candidate)
    }

    /// Attaches to a port that runs no program of this forwarder.
    fn attach_candidate(
        &mut self,
        pins: Option<&Pins>,
        candidate: Candidate,
    ) -> Result<Attachment, ForwarderError> {
        let attached = match pins {
            None => match candidate.link.program {
                Some(_) => return Err(ForwarderError::taken(&candidate.link)),
                None => candidate.attach(&self.program)?,
            },
            Some(pins) => {
                self.check_free(pins, &candidate)?;
                let mut takeover = Takeover::begin(pins, &self.program);
                let attached = takeover.port(&candidate, None)?;
                takeover.keep();
                attached
            }
        };
        let attachment = attached.1.clone();
        self.attached.push(Attached::new(candidate, attached));
        Ok(attachment)
    }

    /// Attaches the program to interfaces, and pins it there, so that it stays attached when the process ends: then
    /// every packet passes to the kernel as soon as the lease is over, and the next process takes over without a gap.
    /// `directory` is made on a BPF file system, which allows no dots in names, and belongs to one network namespace.
    ///
    /// If an earlier process has left its program in the directory, or still runs, this one **takes over**: at each
    /// of the interfaces one program replaces the other, and interfaces that are not named any longer are given up.
    /// What the earlier one counted is added to this table's counters, those of policies to the policies with the same
    /// [index](crate::Policy::index). So tell the table about the ports ([`Self::resolve`]) and fill it before, and
    /// do not write to it meanwhile; [`Gateway::pinned_in`](crate::Gateway::pinned_in) has all of this done. An earlier
    /// process that is still there, or wakes up later, goes on writing to its own maps, which no attached program reads:
    /// [`Self::superseded`] tells it.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NotABpfFileSystem`], [`ForwarderError::DotInName`], [`ForwarderError::OtherNamespace`],
    /// [`ForwarderError::Superseded`] if another process has taken over from this one, [`ForwarderError::Bpf`] if another
    /// process takes 10 seconds to take over, and those of [`Self::attach`]. Nothing has changed then: the earlier process
    /// has its ports, and this one may try again.
    pub fn attach_pinned(
        &mut self,
        directory: impl AsRef<Path>,
        configs: &[AttachConfig],
    ) -> Result<Vec<Attachment>, ForwarderError> {
        let directory = directory.as_ref();
        let pins = self.lock_pins(directory)?;
        let candidates = Candidate::find_all(configs)?;
        candidates.iter().try_for_each(|candidate| self.check_free(&pins, candidate))?;
        let before = pins.owner().filter(|before| *before != self.program.id);
        pins.remove_stale_counters(&[self.program.id, before.unwrap_or_default()]);

        let mut takeover = Takeover::begin(&pins, &self.program);
        takeover.pin_counters(&self.ebpf)?;
        let mut attached = Vec::new();
        for candidate in candidates {
            let own = self.attached.iter().find(|it| it.attachment.ifindex == candidate.link.ifindex);
            let own = own.filter(|_| candidate.link.program == Some(self.program.id));
            let mut port = takeover.port(&candidate, own.map(|own| &own.link))?;
            if let Some(own) = own {
                port.1.fallback.clone_from(&own.attachment.fallback);
            }
            attached.push(Attached::new(candidate, port));
        }
        takeover.commit()?;

        self.pinned_in = Some(directory.to_owned());
        let attachments: Vec<_> = attached.iter().map(|it| it.attachment.clone()).collect();
        let is_named = |ifindex: u32| attachments.iter().any(|it| it.ifindex == ifindex);
        let given_up: Vec<u32> = pins.ports().into_iter().filter(|ifindex| !is_named(*ifindex)).collect();
        for ifindex in &given_up {
            if let Err(error) = pins.remove_port(*ifindex) {
                tracing::warn!(%error, "an interface that is not named any longer keeps its pin");
            }
        }
        self.attached.retain(|it| {
            let ifindex = it.attachment.ifindex;
            !is_named(ifindex) && !given_up.contains(&ifindex)
        });
        self.attached.extend(attached);
        if let Some(before) = before {
            self.inherit_counters(&pins, before);
        }
        Ok(attachments)
    }

    /// Adds what an earlier program counted.
    fn inherit_counters(&self, pins: &Pins, before: u32) {
        // Packets that were in the other program are counted, then no more are.
        grace_period();
        match (pins.counters(before), self.counters()) {
            (Ok(theirs), Ok(ours)) => ours.inherit(&theirs),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, "the counters of the earlier process are lost");
            }
        }
        pins.remove_counters(before);
        tracing::info!(before, now = self.program.id, "took over from an earlier process");
    }

    /// Refuses a port that runs a program which is neither this one's nor that of the pinned link.
    fn check_free(&self, pins: &Pins, candidate: &Candidate) -> Result<(), ForwarderError> {
        let ifindex = candidate.link.ifindex;
        let pinned = || pins.link(ifindex).map(|(_, joined)| joined.program);
        let own = || {
            let mut attached = self.attached.iter();
            attached.any(|it| it.attachment.ifindex == ifindex).then_some(self.program.id)
        };
        match candidate.link.program {
            program @ Some(_) if program != pinned() && program != own() => {
                Err(ForwarderError::taken(&candidate.link))
            }
            _ => Ok(()),
        }
    }

    /// Detaches the program from an interface, also if it is pinned there. It may be gone.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::NotAttached`], [`ForwarderError::Superseded`], or [`ForwarderError::Bpf`].
    pub fn detach(&mut self, interface: impl Into<Interface>) -> Result<(), ForwarderError> {
        let interface = interface.into();
        let index = find(&interface).ok().map(|link| link.ifindex);
        // More than one if an interface went away and another of its name was attached.
        let is_it = |it: &Attached| it.is(&interface) || Some(it.attachment.ifindex) == index;
        if !self.attached.iter().any(is_it) {
            return Err(ForwarderError::NotAttached { interface: interface.to_string() });
        }
        let pins = self.own_pins()?;
        self.close(pins.as_ref(), is_it)
    }

    /// Detaches the program from all interfaces, also from those that were [pinned](Self::attach_pinned), and removes
    /// the pins.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Superseded`], or [`ForwarderError::Bpf`].
    pub fn detach_all(&mut self) -> Result<(), ForwarderError> {
        if let Some(pins) = self.own_pins()? {
            pins.remove_all()?;
            self.pinned_in = None;
        }
        self.close(None, |_| true)
    }

    /// Where it is attached. [`Self::check_ports`] tells which of them are still there.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.iter().map(|it| &it.attachment)
    }

    /// Detaches from ports, and forgets them.
    fn close(
        &mut self,
        pins: Option<&Pins>,
        which: impl Fn(&Attached) -> bool,
    ) -> Result<(), ForwarderError> {
        while let Some(at) = self.attached.iter().position(&which) {
            let Attached { attachment: Attachment { interface, ifindex, .. }, link, .. } = &self.attached[at];
            link.detach()
                .map_err(|error| ForwarderError::new(format!("detaching from {interface}"), error))?;
            if let Some(pins) = pins {
                pins.remove_port(*ifindex)?;
            }
            self.attached.remove(at);
        }
        Ok(())
    }

    /// The directory that this forwarder's ports are pinned in, locked.
    fn own_pins(&self) -> Result<Option<Pins>, ForwarderError> {
        self.pinned_in.as_deref().map(|directory| self.lock_pins(directory)).transpose()
    }

    /// Locks a directory, unless it was this forwarder's and is not any longer.
    fn lock_pins(&self, directory: &Path) -> Result<Pins, ForwarderError> {
        let pins = Pins::lock(directory)?;
        if self.pinned_in.as_deref() == Some(directory) && self.is_superseded() {
            return Err(ForwarderError::Superseded { directory: directory.to_owned() });
        }
        Ok(pins)
    }

    fn counters(&self) -> Result<Counters, MapsError> {
        let [slots, forwarded, passes] = Counters::MAPS.map(|name| array(&self.ebpf, name));
        Counters::map([slots?, forwarded?, passes?])
    }
}
