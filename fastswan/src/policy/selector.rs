//! Which packets a policy is about.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// An address family that policies and packets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of a prefix.
    #[must_use]
    pub fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// The prefix that covers every address of the family.
    #[must_use]
    pub fn everything(self) -> IpNet {
        match self {
            Self::V4 => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            Self::V6 => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        }
    }
}

impl From<IpAddr> for Family {
    fn from(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A port match: a packet matches if `(packet.port ^ port) & mask == 0`. Host order.
///
/// For ICMP and ICMPv6 the kernel puts the type where the source port is and the code where the
/// destination port is.
///
/// ```
/// use fastswan::policy::PortMatch;
///
/// assert!(PortMatch::exactly(443).matches(443));
/// let even = PortMatch { port: 0, mask: 1 };
/// assert!(even.matches(8) && !even.matches(9));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortMatch {
    /// The port.
    pub port: u16,
    /// Which bits count; zero matches every port.
    pub mask: u16,
}

impl PortMatch {
    /// Matches one port.
    #[must_use]
    pub fn exactly(port: u16) -> Self {
        Self { port, mask: u16::MAX }
    }

    /// Whether a packet with this port matches.
    #[must_use]
    pub fn matches(self, port: u16) -> bool {
        (port ^ self.port) & self.mask == 0
    }
}

/// Which packets a policy is about (`struct xfrm_selector`).
///
/// Two selectors are the same to the kernel only if their bytes are: `10.0.0.5/24` and `10.0.0.6/24`
/// are different selectors that match the same packets, so prefixes keep their host bits here.
///
/// ```
/// use fastswan::{Selector, policy::PortMatch};
///
/// let mut https = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// https.protocol = 6;
/// https.destination_port = PortMatch::exactly(443);
/// assert_eq!(https.to_string(), "10.1.0.0/16 → 10.2.0.0/16 proto 6 dport 443");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selector {
    /// Source prefix; always of the same family as the destination.
    pub source: IpNet,
    /// Destination prefix.
    pub destination: IpNet,
    /// Upper-layer protocol; 0 is every protocol.
    pub protocol: u8,
    /// Source port, or ICMP type.
    pub source_port: PortMatch,
    /// Destination port, or ICMP code.
    pub destination_port: PortMatch,
    /// Index of the egress device of the packet's route; 0 is every device.
    pub ifindex: u32,
    /// Owner of the socket; not matched against forwarded packets.
    pub user: u32,
}

impl Selector {
    /// A selector for everything between two prefixes.
    ///
    /// # Errors
    ///
    /// [`MixedFamilies`] if one is IPv4 and the other IPv6.
    pub fn between(source: IpNet, destination: IpNet) -> Result<Self, MixedFamilies> {
        if Family::of(&source) != Family::of(&destination) {
            return Err(MixedFamilies { one: source, other: destination });
        }
        let any = PortMatch::default();
        Ok(Self {
            source,
            destination,
            protocol: 0,
            source_port: any,
            destination_port: any,
            ifindex: 0,
            user: 0,
        })
    }

    /// The address family.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(&self.destination)
    }

    /// Whether it matches every packet of its family.
    #[must_use]
    pub fn matches_everything(&self) -> bool {
        let lengths = (self.source.prefix_len(), self.destination.prefix_len());
        lengths == (0, 0) && !self.looks_at_upper_layer() && self.ifindex == 0
    }

    /// Whether it asks for nothing but addresses, and matches every packet that another one matches.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.source.contains(&other.source)
            && self.destination.contains(&other.destination)
            && !self.looks_at_upper_layer()
            && self.ifindex == 0
    }

    /// Whether it asks for more of a packet than its addresses: a protocol or a port.
    #[must_use]
    pub fn looks_at_upper_layer(&self) -> bool {
        self.protocol != 0 || self.source_port.mask != 0 || self.destination_port.mask != 0
    }
}

/// A selector was asked for between prefixes of different address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("selector from {one} to {other}: both prefixes must be of one address family")]
pub struct MixedFamilies {
    /// The source.
    pub one: IpNet,
    /// The destination.
    pub other: IpNet,
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.source, self.destination)?;
        if self.protocol != 0 {
            write!(f, " proto {}", self.protocol)?;
        }
        for (name, port) in [("sport", self.source_port), ("dport", self.destination_port)] {
            match port.mask {
                0 => {}
                u16::MAX => write!(f, " {name} {}", port.port)?,
                mask => write!(f, " {name} {}/{mask:#06x}", port.port)?,
            }
        }
        if self.ifindex != 0 {
            write!(f, " dev #{}", self.ifindex)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_between_families_is_refused() {
        let v4 = "10.0.0.0/8".parse().unwrap();
        let v6 = "2001:db8::/32".parse().unwrap();
        assert_eq!(Selector::between(v4, v6), Err(MixedFamilies { one: v4, other: v6 }));
    }
}
