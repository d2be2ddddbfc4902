//! The interfaces that packets come in on, and their ports.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use crate::{host::HostFacts, table::Port};

/// Between two attempts to attach to an interface.
const PAUSE: Duration = Duration::from_secs(1);

/// Whether packets that come in on an interface may be fast.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case", tag = "state"))]
#[non_exhaustive]
pub enum InterfaceState {
    /// There is no such interface. It is attached to when it comes.
    Missing,
    /// The program is to be attached, as soon as the table holds everything.
    Waiting,
    /// The program runs there.
    Attached {
        /// The VLANs whose packets may be fast; 0 is for untagged frames. Empty if the device is down, has no Ethernet
        /// address, is a member of a bridge, bond or VRF, or has its frames taken by a macvlan or ipvlan device, here or in
        /// another network namespace.
        vlans: Vec<u16>,
    },
    /// The program runs there, and packets must not skip what else hooks into where they come in: they pass.
    Hooked {
        /// What that is.
        hook: String,
    },
    /// The program could not be attached. That is tried again.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// The program runs there, and its frames do not show all of a packet: they pass.
    Unsuitable {
        /// Why, and what to do.
        reason: String,
    },
}

impl fmt::Display for InterfaceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no such interface; it is attached when it comes"),
            Self::Waiting => f.write_str("the program is not attached so far"),
            Self::Attached { vlans } if vlans.is_empty() => f.write_str(
                "attached, but it is down, has no Ethernet address, belongs to a bridge, bond or VRF, or a macvlan or ipvlan \
                 device takes its frames, here or in another network namespace",
            ),
            Self::Attached { vlans } => write!(f, "attached, VLANs {vlans:?}"),
            Self::Refused { reason } => write!(f, "not attached: {reason}"),
            Self::Hooked { hook } => write!(f, "its packets pass: the fast path would skip {hook}"),
            Self::Unsuitable { reason } => write!(f, "its packets pass: {reason}"),
        }
    }
}

/// Interfaces that are to be attached to, by name.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    wanted: Vec<Interface>,
    /// What the table has.
    ports: BTreeMap<(u32, u16), Port>,
    /// What it is to have.
    wanted_ports: BTreeMap<(u32, u16), Port>,
    /// Ports that the table had no room for.
    refused: BTreeSet<(u32, u16)>,
}

#[derive(Debug)]
struct Interface {
    name: String,
    ifindex: Option<u32>,
    stage: Stage,
    unsuitable: Option<String>,
    /// What hooks into where its untagged packets come in.
    hook: Option<String>,
}

#[derive(Debug, PartialEq)]
enum Stage {
    Waiting,
    Attaching,
    Attached,
    Refused { reason: String, again: Instant },
}

impl Interfaces {
    pub(super) fn follow(&mut self, name: String, ifindex: Option<u32>, host: &HostFacts) {
        if !self.wanted.iter().any(|interface| interface.name == name) {
            self.wanted.push(Interface {
                name,
                ifindex,
                stage: Stage::Waiting,
                unsuitable: None,
                hook: None,
            });
            self.resolve(host);
        }
    }

    /// Whether there was such an interface.
    pub(super) fn forget(&mut self, name: &str, host: &HostFacts) -> bool {
        let before = self.wanted.len();
        self.wanted.retain(|interface| interface.name != name);
        self.resolve(host);
        self.wanted.len() < before
    }

    /// Forgets an interface that is gone: another one may have its index now.
    pub(super) fn lose(&mut self, ifindex: u32) {
        for interface in self.wanted.iter_mut().filter(|interface| interface.ifindex == Some(ifindex)) {
            interface.ifindex = None;
        }
    }

    /// Takes up that the program runs no longer where it was attached. True if that is new.
    pub(super) fn detached(&mut self, ifindex: u32, host: &HostFacts) -> bool {
        let ran =
            |interface: &Interface| interface.ifindex == Some(ifindex) && interface.stage == Stage::Attached;
        let is_new = self.wanted.iter().any(ran);
        if is_new {
            self.lose(ifindex);
            self.resolve(host);
        }
        is_new
    }

    /// Takes up what links there are: an interface that is gone is looked for by its name.
    pub(super) fn resolve(&mut self, host: &HostFacts) {
        for interface in &mut self.wanted {
            let is_there = interface.ifindex.is_some_and(|ifindex| host.link(ifindex).is_some());
            if !is_there {
                interface.ifindex = host.ifindex(&interface.name);
                interface.stage = Stage::Waiting;
                interface.unsuitable = None;
            }
            let hook = interface.ifindex.and_then(|ifindex| host.hook_at(ifindex, 0));
            interface.hook = hook.map(ToString::to_string);
        }
        self.wanted_ports = self
            .wanted
            .iter()
            .filter(|interface| interface.unsuitable.is_none())
            .filter_map(|interface| interface.ifindex)
            .flat_map(|ifindex| host.ports(ifindex))
            .map(|port| ((port.ifindex, port.vlan), port))
            .collect();
        self.refused.retain(|port| self.wanted_ports.contains_key(port));
    }

    /// A port to remove from the table now.
    pub(super) fn next_to_remove(&mut self) -> Option<(u32, u16)> {
        let gone = *self.ports.keys().find(|port| !self.wanted_ports.contains_key(port))?;
        self.ports.remove(&gone);
        Some(gone)
    }

    /// A port to set in the table now.
    pub(super) fn next_to_set(&mut self) -> Option<Port> {
        let is_due = |(key, port): &(&(u32, u16), &Port)| {
            self.ports.get(key) != Some(port) && !self.refused.contains(key)
        };
        let (key, port) = self.wanted_ports.iter().find(is_due).map(|(key, port)| (*key, *port))?;
        self.ports.insert(key, port);
        Some(port)
    }

    /// Notes that the table has no room for a port.
    pub(super) fn refuse_port(&mut self, ifindex: u32, vlan: u16) {
        self.ports.remove(&(ifindex, vlan));
        self.refused.insert((ifindex, vlan));
    }

    /// The interfaces to attach to now.
    pub(super) fn start_attaching(&mut self, now: Instant) -> Vec<u32> {
        let mut due = Vec::new();
        for interface in &mut self.wanted {
            let Some(ifindex) = interface.ifindex else { continue };
            let is_due = match interface.stage {
                Stage::Waiting => true,
                Stage::Refused { again, .. } => again <= now,
                Stage::Attaching | Stage::Attached => false,
            };
            if is_due {
                interface.stage = Stage::Attaching;
                due.push(ifindex);
            }
        }
        due
    }

    /// Takes up what came of attaching.
    pub(super) fn attached(&mut self, ifindex: u32, result: &Result<(), String>, now: Instant) {
        for interface in self.wanted.iter_mut().filter(|interface| interface.ifindex == Some(ifindex)) {
            interface.stage = match result {
                Ok(()) => Stage::Attached,
                Err(reason) => Stage::Refused { reason: reason.clone(), again: now + PAUSE },
            };
        }
    }

    /// Takes up whether an interface's frames show all of a packet. True if that is new.
    pub(super) fn suit(&mut self, ifindex: u32, problem: Option<&str>, host: &HostFacts) -> bool {
        let mut is_new = false;
        for interface in self.wanted.iter_mut().filter(|interface| interface.ifindex == Some(ifindex)) {
            if interface.unsuitable.as_deref() != problem {
                interface.unsuitable = problem.map(str::to_owned);
                is_new = true;
            }
        }
        if is_new {
            self.resolve(host);
        }
        is_new
    }

    /// The interfaces by name, each with its index and state.
    pub(super) fn states(&self) -> impl Iterator<Item = (&str, Option<u32>, InterfaceState)> {
        self.wanted.iter().map(|interface| {
            let hook = interface.hook.as_ref();
            let state = match (interface.ifindex, &interface.unsuitable, &interface.stage) {
                (None, ..) => InterfaceState::Missing,
                (Some(_), _, Stage::Refused { reason, .. }) => {
                    InterfaceState::Refused { reason: reason.clone() }
                }
                (Some(_), Some(reason), _) => InterfaceState::Unsuitable { reason: reason.clone() },
                (Some(_), None, Stage::Attached) if hook.is_some() => {
                    InterfaceState::Hooked { hook: hook.cloned().unwrap_or_default() }
                }
                (Some(ifindex), None, Stage::Attached) => InterfaceState::Attached {
                    vlans: self
                        .ports
                        .range((ifindex, 0)..=(ifindex, u16::MAX))
                        .map(|((_, vlan), _)| *vlan)
                        .collect(),
                },
                (Some(_), None, Stage::Waiting | Stage::Attaching) => InterfaceState::Waiting,
            };
            (interface.name.as_str(), interface.ifindex, state)
        })
    }

    /// Whether the table has ports at all, and whether one of them is on a device.
    pub(super) fn has_only_ports_on(&self, ifindex: u32) -> bool {
        !self.ports.is_empty() && self.ports.keys().all(|(port, _)| *port == ifindex)
    }

    /// The port that the table has for an interface and VLAN.
    pub(super) fn port(&self, ifindex: u32, vlan: u16) -> Option<&Port> {
        self.ports.get(&(ifindex, vlan))
    }
}
