//! What a device does for a policy or an association, and how packets leave it.

use std::fmt;

/// How much of IPsec a device does for a policy or association.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OffloadKind {
    /// Only the cipher; packets need the kernel's stack. Never fast.
    Crypto,
    /// Everything (`XFRM_OFFLOAD_PACKET`, Linux 6.2).
    Packet,
}

/// The device that a policy or an association is offloaded to (`struct xfrm_user_offload`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OffloadDev {
    /// Interface index of the device.
    pub ifindex: u32,
    /// How much it does.
    pub kind: OffloadKind,
    /// `XFRM_OFFLOAD_INBOUND`: packets that arrive. Associations of both directions look alike otherwise.
    pub inbound: bool,
}

/// How fast packets of a policy leave. The kernel does not tell; sources and embedders may.
///
/// ```
/// use fastswan::policy::{Egress, NextHop};
///
/// let header =
///     NextHop::Fixed { source: "02:00:5e:10:00:01".parse()?, destination: "02:00:5e:10:00:02".parse()? };
/// let egress = Egress { next_hop: header, max_length: Some(1400) };
/// assert_ne!(egress, Egress::default(), "by default the device writes its own header");
/// # Ok::<(), fastswan::policy::ParseMacAddrError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Egress {
    /// The Ethernet header they leave with.
    pub next_hop: NextHop,
    /// The longest packet, in bytes from the IP header on, that may be fast. What the association and the MTU of the path
    /// leave room for is a limit as well; if neither is known, nothing is fast.
    pub max_length: Option<u16>,
}

/// The Ethernet header of a packet that leaves through the fast path. VLAN tags are taken off in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NextHop {
    /// The device writes its own, as packet-offload NICs do in tunnel mode: the addresses stay as they are.
    #[default]
    Device,
    /// The program writes these addresses.
    Fixed {
        /// Source address, usually the device's own.
        source: MacAddr,
        /// Destination address: the neighbour's.
        destination: MacAddr,
    },
    /// The program writes the addresses that the kernel's routes and neighbour table give for the outer
    /// destination of the policy's template. As long as the neighbour's is not known nothing is fast, and the host source is
    /// [asked](crate::HostSource::solicit) to find it.
    Neighbour,
}

/// An Ethernet address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for MacAddr {
    type Err = ParseMacAddrError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacAddrError(s.to_owned());
        let mut bytes = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

/// A text is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address: write six pairs of hexadecimal digits, as in 02:00:5e:10:00:00")]
pub struct ParseMacAddrError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ethernet_address_survives_text_and_back() {
        let mac: MacAddr = "02:00:5e:10:00:ff".parse().unwrap();
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for wrong in
            ["", "02", "02:00:5e:10:00", "02:00:5e:10:00:ff:00", "2:0:5e:10:0:ff", "02:00:5e:10:00:fg"]
        {
            assert!(wrong.parse::<MacAddr>().is_err(), "{wrong}");
        }
    }
}
