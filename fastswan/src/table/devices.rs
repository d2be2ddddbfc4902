//! The devices that packets are redirected to.

use std::{collections::BTreeMap, io};

use aya::maps::{
    MapData, MapError,
    xdp::{DevMapHash, XdpMapError},
};

use super::{Slot, Standing, store::Store};
use crate::{netlink::takes_redirected_frames, sys::transmitting_cpus};

/// The device map, and who needs what in it.
///
/// The kernel is asked about a device when the first slot that forwards to it comes, and when
/// [told to](super::Devices::refresh_devices): never once for each slot. A device that cannot be redirected to is not in
/// the map, so that its packets pass.
pub(super) struct DeviceMap {
    map: DevMapHash<MapData>,
    users: Users,
    /// Whether each device that has slots takes redirected packets, or why not.
    answers: BTreeMap<u32, Result<(), String>>,
}

impl DeviceMap {
    pub(super) fn new(map: DevMapHash<MapData>) -> Self {
        Self { map, users: Users::default(), answers: BTreeMap::new() }
    }

    /// Makes the devices of an update's slots reachable. Those that its slots leave still are, until
    /// [`Self::leave`].
    pub(super) fn enter(&mut self, slots: &[(Slot, Option<Standing>)], store: &mut Store) {
        // The store refuses the others.
        let limit = store.capacity().slots;
        for (slot, standing) in slots.iter().filter(|(slot, _)| (slot.0 as usize) < limit) {
            let device = standing.and_then(Result::ok).map(|forwarding| forwarding.ifindex);
            if let Some(ifindex) = device.filter(|ifindex| !self.users.has(*ifindex)) {
                self.ask(ifindex, store);
            }
            self.users.enter(*slot, device);
        }
    }

    /// Takes the devices out that no slot uses any longer.
    pub(super) fn leave(&mut self, store: &mut Store) {
        for ifindex in self.users.leave() {
            // It is gone already if the device is.
            let _ = self.map.remove(ifindex);
            self.answers.remove(&ifindex);
            store.limit_cpus(ifindex, None);
        }
    }

    /// Asks the kernel about all devices again.
    pub(super) fn refresh(&mut self, store: &mut Store) {
        for ifindex in self.answers.keys().copied().collect::<Vec<_>>() {
            self.ask(ifindex, store);
        }
    }

    pub(super) fn takes_redirects(&self, ifindex: u32) -> bool {
        self.answers.get(&ifindex).is_some_and(Result::is_ok)
    }

    /// Lets packets be redirected to a device, unless they would be lost on the way. Whatever fails is a reason not to:
    /// a device may be gone between any two of these calls.
    fn ask(&mut self, ifindex: u32, store: &mut Store) {
        let entered = self.try_to_enter(ifindex, store);
        if let Err(reason) = &entered {
            let _ = self.map.remove(ifindex);
            if self.answers.get(&ifindex) != Some(&entered) {
                tracing::warn!(
                    ifindex,
                    reason,
                    "no packet is redirected to a device: only what arrives there is fast"
                );
            }
        } else if self.answers.get(&ifindex).is_some_and(Result::is_err) {
            tracing::info!(ifindex, "packets are redirected to a device again");
        }
        self.answers.insert(ifindex, entered);
    }

    fn try_to_enter(&mut self, ifindex: u32, store: &mut Store) -> Result<(), String> {
        if !takes_redirected_frames(ifindex).map_err(|error| error.to_string())? {
            return Err("its driver takes none; a veth device does when its peer has GRO on".to_owned());
        }
        let cpus = transmitting_cpus(ifindex).map_err(|error| format!("asking for its channels: {error}"))?;
        // The limit first: what may be redirected from now on is limited already.
        store.limit_cpus(ifindex, cpus);
        // Even if it is there: the kernel drops devices that unregister, and another may have the number now.
        self.map.insert(ifindex, ifindex, None, 0).map_err(|error| io_error(error).to_string())
    }
}

fn io_error(error: XdpMapError) -> io::Error {
    match error {
        XdpMapError::MapError(MapError::SyscallError(error)) => error.io_error,
        other => io::Error::other(other),
    }
}

/// Which device each slot uses, and how many slots each device has.
#[derive(Debug, Default)]
struct Users {
    /// By slot.
    device_of: Vec<Option<u32>>,
    slots: BTreeMap<u32, usize>,
    /// Devices that slots have left, once for each slot.
    left: Vec<u32>,
}

impl Users {
    fn has(&self, device: u32) -> bool {
        self.slots.contains_key(&device)
    }

    /// Notes the device that a slot uses from now on.
    fn enter(&mut self, slot: Slot, device: Option<u32>) {
        let number = slot.0 as usize;
        if self.device_of.len() <= number {
            self.device_of.resize(number + 1, None);
        }
        self.left.extend(std::mem::replace(&mut self.device_of[number], device));
        if let Some(device) = device {
            *self.slots.entry(device).or_default() += 1;
        }
    }

    /// The devices that have no slot any longer.
    fn leave(&mut self) -> Vec<u32> {
        let mut unused = Vec::new();
        for device in self.left.drain(..) {
            if let Some(slots) = self.slots.get_mut(&device) {
                *slots -= 1;
                if *slots == 0 {
                    self.slots.remove(&device);
                    unused.push(device);
                }
            }
        }
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_new_with_its_first_slot_and_unused_with_its_last() {
        let mut users = Users::default();
        assert!(!users.has(7));
        users.enter(Slot(0), Some(7));
        users.enter(Slot(1), Some(7));
        assert!(users.has(7));
        users.enter(Slot(0), None);
        assert_eq!(users.leave(), []);
        users.enter(Slot(1), None);
        assert!(users.has(7), "until all of the update is written");
        assert_eq!(users.leave(), [7]);
        assert!(!users.has(7));
        users.enter(Slot(1), None);
        assert_eq!(users.leave(), [], "a slot that was free already leaves nothing");
    }

    #[test]
    fn a_slot_that_is_written_again_or_handed_over_keeps_its_device() {
        let mut users = Users::default();
        users.enter(Slot(0), Some(7));
        users.enter(Slot(0), Some(7));
        assert_eq!(users.leave(), []);
        users.enter(Slot(0), None);
        users.enter(Slot(0), Some(7));
        assert_eq!(users.leave(), []);
        users.enter(Slot(0), Some(8));
        assert_eq!(users.leave(), [7]);
        assert!(users.has(8) && !users.has(7));
    }
}
