//! The IPv4 addresses of the host, kept up by what the kernel tells of each device's.
//!
//! A device may have an address several times, with prefixes or peers of its own, and several devices may have the same one:
//! it is the host's until the last of them is gone.

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
};

use crate::host::HostChange;

/// An address of a device, by all that tells it apart from others there (`__inet_insert_ifa`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeviceAddress {
    /// The host's.
    pub(crate) own: Ipv4Addr,
    /// The other end's; the same where there is no other end.
    pub(crate) peer: Ipv4Addr,
    /// Length of the network's prefix, which is around the peer.
    pub(crate) prefix_length: u8,
}

/// The addresses of all devices, and what has changed about the host's.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// By interface index.
    devices: HashMap<u32, BTreeSet<DeviceAddress>>,
    /// How often the devices have each.
    own: HashMap<Ipv4Addr, u32>,
    changes: Vec<HostChange>,
}

impl Addresses {
    pub(super) fn new(read: impl IntoIterator<Item = (u32, DeviceAddress)>) -> Self {
        let mut addresses = Self::default();
        for (ifindex, address) in read {
            addresses.add(ifindex, address);
        }
        addresses.changes.clear();
        addresses
    }

    /// The host's, each once, in no particular order.
    pub(super) fn own(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.own.keys().copied()
    }

    /// Whether a device has one.
    pub(super) fn has(&self, ifindex: u32) -> bool {
        self.devices.contains_key(&ifindex)
    }

    pub(super) fn add(&mut self, ifindex: u32, address: DeviceAddress) {
        if self.devices.entry(ifindex).or_default().insert(address) {
            let count = self.own.entry(address.own).or_default();
            *count += 1;
            if *count == 1 {
                self.changes.push(HostChange::Address(address.own));
            }
        }
    }

    pub(super) fn remove(&mut self, ifindex: u32, address: DeviceAddress) {
        let Some(of_device) = self.devices.get_mut(&ifindex) else { return };
        if of_device.remove(&address) {
            if of_device.is_empty() {
                self.devices.remove(&ifindex);
            }
            self.release(address.own);
        }
    }

    /// A device is gone.
    pub(super) fn lose(&mut self, ifindex: u32) {
        for address in self.devices.remove(&ifindex).into_iter().flatten() {
            self.release(address.own);
        }
    }

    fn release(&mut self, own: Ipv4Addr) {
        if let Some(count) = self.own.get_mut(&own) {
            *count -= 1;
            if *count == 0 {
                self.own.remove(&own);
                self.changes.push(HostChange::AddressGone(own));
            }
        }
    }

    /// What has changed since, or the beginning of it.
    pub(super) fn changes(&mut self) -> Vec<HostChange> {
        std::mem::take(&mut self.changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(own: &str, peer: &str, prefix_length: u8) -> DeviceAddress {
        DeviceAddress { own: own.parse().unwrap(), peer: peer.parse().unwrap(), prefix_length }
    }

    #[test]
    fn an_address_is_the_hosts_until_the_last_device_has_lost_it() {
        let [wide, narrow] = [24, 32].map(|length| address("10.0.0.1", "10.0.0.1", length));
        let other_end = address("10.0.0.1", "10.9.0.1", 32);
        let own: Ipv4Addr = "10.0.0.1".parse().unwrap();
        let mut addresses = Addresses::new([(1, wide), (1, narrow), (2, other_end)]);
        assert_eq!(addresses.own().collect::<Vec<_>>(), [own]);
        assert_eq!(addresses.changes(), [], "it was read");
        addresses.add(1, wide);
        addresses.remove(1, wide);
        assert!(addresses.has(1), "the other one is left");
        addresses.remove(1, narrow);
        addresses.remove(1, narrow);
        assert!(!addresses.has(1));
        assert_eq!(addresses.changes(), []);
        addresses.lose(2);
        addresses.lose(2);
        assert_eq!(addresses.changes(), [HostChange::AddressGone(own)]);
        addresses.add(3, narrow);
        assert_eq!(addresses.changes(), [HostChange::Address(own)]);
        assert_eq!(addresses.own().count(), 1);
    }
}
