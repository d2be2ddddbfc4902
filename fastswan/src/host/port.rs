//! Where packets may come in.

use crate::policy::MacAddr;

/// An (interface, VLAN) pair from which packets may be fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// Interface index of the device that the program is attached to.
    pub ifindex: u32,
    /// VLAN id, 0 for untagged and priority-tagged frames.
    pub vlan: u16,
    /// Interface index of the device that the kernel would receive the packet on: `ifindex`, or a VLAN device.
    pub receiver: u32,
    /// The address that frames must be sent to.
    pub address: MacAddr,
    /// Forwarding is on for the receiver, per family.
    pub forwards: Forwards,
    /// The receiver's reverse path filter for IPv4 (RFC 3704).
    pub reverse_path: ReversePath,
}

/// Which families a port forwards (`net.ipv4.conf.*.forwarding`, `net.ipv6.conf.*.forwarding`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Forwards {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

/// What a port asks of the route back to a packet's source (`net.ipv4.conf.*.rp_filter`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReversePath {
    /// Nothing.
    #[default]
    Off,
    /// It must lead through the receiving device.
    Strict,
    /// There must be one.
    Loose,
}
