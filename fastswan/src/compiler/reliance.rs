//! What of the host the policies that have slots depend on: so that a change that concerns none of them costs nothing.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use smallvec::SmallVec;

use super::{
    neighbours::Neighbours,
    path::{self, Concerns, Paths},
    rule::eligible,
};
use crate::{
    policy::{Family, NextHop, Policy},
    table::Slot,
};

/// Devices, outer addresses and neighbours of policies with slots, and what of them has changed.
#[derive(Debug, Default)]
pub(super) struct Reliance {
    devices: BTreeSet<u32>,
    addresses: Addresses,
    neighbours: Neighbours,
    changed: Changed,
}

/// Of templates, at both ends, as numbers: these are compared faster.
#[derive(Debug, Default)]
struct Addresses {
    v4: BTreeSet<u32>,
    v6: BTreeSet<u128>,
}

impl Addresses {
    fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    fn has_some_in(&self, prefix: &IpNet) -> bool {
        match prefix {
            IpNet::V4(prefix) => has_some(&self.v4, prefix.network().into(), prefix.broadcast().into()),
            IpNet::V6(prefix) => has_some(&self.v6, prefix.network().into(), prefix.broadcast().into()),
        }
    }
}

/// What some policies depend on.
#[derive(Debug, Default)]
pub(super) struct Noted {
    devices: SmallVec<[u32; 1]>,
    /// At either end.
    v4: [SmallVec<[u32; 1]>; 2],
    v6: [SmallVec<[u128; 1]>; 2],
}

impl Noted {
    /// Takes note of a policy, if it is one whose packets could be fast.
    pub(super) fn add(&mut self, policy: &Policy) {
        let (Ok(template), Some(device)) = (eligible(policy), policy.offload) else { return };
        push_other(&mut self.devices, device.ifindex);
        for (end, address) in [template.source, template.destination].into_iter().enumerate() {
            match address {
                IpAddr::V4(address) => push_other(&mut self.v4[end], address.into()),
                IpAddr::V6(address) => push_other(&mut self.v6[end], address.into()),
            }
        }
    }
}

#[derive(Debug, Default)]
struct Changed {
    is_everything: bool,
    devices: BTreeSet<u32>,
    addresses: BTreeSet<(IpNet, Option<u32>)>,
    neighbours: BTreeSet<(u32, IpAddr)>,
}

impl Reliance {
    /// Keeps what was noted. What policies took before is still there; that costs no more than a look at them.
    pub(super) fn note(&mut self, noted: Noted) {
        add_all(&mut self.devices, noted.devices);
        noted.v4.into_iter().for_each(|end| add_all(&mut self.addresses.v4, end));
        noted.v6.into_iter().for_each(|end| add_all(&mut self.addresses.v6, end));
    }

    /// Takes note of the neighbour that a slot's packets are sent to, if it must be known.
    pub(super) fn sends_to(&mut self, slot: Slot, neighbour: Option<(u32, IpAddr)>) {
        self.neighbours.set(slot, neighbour);
    }

    /// Takes note that a slot is no policy's any longer.
    pub(super) fn forget(&mut self, slot: Slot) {
        self.neighbours.set(slot, None);
    }

    pub(super) fn neighbours(&self) -> &Neighbours {
        &self.neighbours
    }

    /// Takes note of a change.
    pub(super) fn changed(&mut self, concerns: Concerns) {
        let changed = &mut self.changed;
        match concerns {
            Concerns::Nothing => {}
            Concerns::Everything | Concerns::Policies => changed.is_everything = true,
            Concerns::Device(ifindex) => {
                changed.devices.extend(self.devices.get(&ifindex));
            }
            Concerns::Neighbour(neighbour) => {
                if self.neighbours.contains(&neighbour) {
                    changed.neighbours.insert(neighbour);
                }
            }
            Concerns::Addresses(prefix, table) => {
                if self.addresses.has_some_in(&prefix) {
                    changed.addresses.insert((prefix, table));
                }
            }
        }
    }

    /// Has everything noted anew when there is far more than policies with this many slots depend on: of those that are gone.
    pub(super) fn limit(&mut self, slots: usize) {
        if self.addresses.len() > 4 * slots + 1024 {
            self.changed(Concerns::Policies);
        }
    }

    /// Whether something has changed that policies depend on.
    pub(super) fn has_changed(&self) -> bool {
        let Changed { is_everything, devices, addresses, neighbours } = &self.changed;
        *is_everything || !devices.is_empty() || !addresses.is_empty() || !neighbours.is_empty()
    }

    /// Whether a policy depends on what has changed.
    pub(super) fn concerns(&self, policy: &Policy, paths: &Paths) -> bool {
        let changed = &self.changed;
        let (Ok(template), Some(device)) = (eligible(policy), policy.offload) else { return true };
        let is_in = |(prefix, table): &(IpNet, Option<u32>)| {
            let routes = paths.routes(Family::of(prefix));
            [template.source, template.destination].into_iter().any(|address| {
                prefix.contains(&address)
                    && table.is_none_or(|table| routes.may_decide(table, *prefix, address.into()))
            })
        };
        // Which neighbour it was, the route may no longer tell.
        let is_sent_to = || match policy.egress.next_hop {
            NextHop::Neighbour => {
                let outer = paths.outer_route(template, device.ifindex);
                path::neighbour(policy, outer).is_none_or(|neighbour| changed.neighbours.contains(&neighbour))
            }
            NextHop::Device | NextHop::Fixed { .. } => false,
        };
        changed.is_everything
            || changed.devices.contains(&device.ifindex)
            || changed.addresses.iter().any(is_in)
            || !changed.neighbours.is_empty() && is_sent_to()
    }

    /// Forgets what has changed: it is taken up. If everything has, what policies depend on is noted anew.
    pub(super) fn take_up(&mut self) {
        if std::mem::take(&mut self.changed).is_everything {
            *self = Self { neighbours: std::mem::take(&mut self.neighbours), ..Self::default() };
        }
    }
}

fn has_some<T: Ord>(set: &BTreeSet<T>, first: T, last: T) -> bool {
    set.range(first..=last).next().is_some()
}

/// Adds one unless it is the last: policies that follow one another often have the same.
fn push_other<T: PartialEq>(list: &mut SmallVec<[T; 1]>, new: T) {
    if list.last() != Some(&new) {
        list.push(new);
    }
}

/// Many are put in order first, and then all go through the set together: that costs less than a search for each.
fn add_all<T: Ord>(set: &mut BTreeSet<T>, new: SmallVec<[T; 1]>) {
    if new.len() > 1 + set.len() / 8 {
        set.append(&mut new.into_iter().collect());
    } else {
        set.extend(new);
    }
}
