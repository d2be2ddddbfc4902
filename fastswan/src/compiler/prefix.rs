//! Prefixes of one address family, as numbers.
//!
//! In their order each prefix comes right before all that lie inside it, so what is inside is a range.

use std::{fmt, ops::RangeInclusive};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{policy::Policy, table::Cell};

/// The address of a family, in host order.
pub(super) trait Address: Copy + Ord + fmt::Debug + Send + Sync + 'static {
    /// Bits of an address.
    const LENGTH: u8;
    /// The address without all but the first `length` bits.
    fn first(self, length: u8) -> Self;
    /// The address with all but the first `length` bits set.
    fn last(self, length: u8) -> Self;
    /// A prefix without its host bits; `None` if it is of the other family.
    fn prefix(net: &IpNet) -> Option<Prefix<Self>>;
    fn net(prefix: Prefix<Self>) -> IpNet;
}

impl Address for u32 {
    const LENGTH: u8 = 32;

    fn first(self, length: u8) -> Self {
        self & !Self::MAX.checked_shr(length.into()).unwrap_or(0)
    }

    fn last(self, length: u8) -> Self {
        self | Self::MAX.checked_shr(length.into()).unwrap_or(0)
    }

    fn prefix(net: &IpNet) -> Option<Prefix<Self>> {
        let IpNet::V4(net) = net else { return None };
        Some(Prefix { bits: net.network().into(), length: net.prefix_len() })
    }

    fn net(prefix: Prefix<Self>) -> IpNet {
        // The length comes from a prefix of this family.
        IpNet::V4(Ipv4Net::new_assert(prefix.bits.into(), prefix.length))
    }
}

/// An IPv6 address in two halves, which take less room than one `u128` in larger types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Halves(u64, u64);

impl Halves {
    fn of(bits: u128) -> Self {
        let half = |half: u128| u64::try_from(half & u128::from(u64::MAX)).unwrap_or(0);
        Self(half(bits >> 64), half(bits))
    }

    fn bits(self) -> u128 {
        u128::from(self.0) << 64 | u128::from(self.1)
    }
}

impl Address for Halves {
    const LENGTH: u8 = 128;

    fn first(self, length: u8) -> Self {
        Self::of(self.bits() & !u128::MAX.checked_shr(length.into()).unwrap_or(0))
    }

    fn last(self, length: u8) -> Self {
        Self::of(self.bits() | u128::MAX.checked_shr(length.into()).unwrap_or(0))
    }

    fn prefix(net: &IpNet) -> Option<Prefix<Self>> {
        let IpNet::V6(net) = net else { return None };
        Some(Prefix { bits: Self::of(net.network().into()), length: net.prefix_len() })
    }

    fn net(prefix: Prefix<Self>) -> IpNet {
        // The length comes from a prefix of this family.
        IpNet::V6(Ipv6Net::new_assert(prefix.bits.bits().into(), prefix.length))
    }
}

/// A prefix without host bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix<A> {
    bits: A,
    length: u8,
}

impl<A: Address> Prefix<A> {
    pub(super) fn length(self) -> u8 {
        self.length
    }

    pub(super) fn contains(self, other: Self) -> bool {
        self.length <= other.length && other.bits.first(self.length) == self.bits
    }

    /// The prefix of this length, at most its own, that contains it.
    pub(super) fn shortened(self, length: u8) -> Self {
        Self { bits: self.bits.first(length), length }
    }

    /// The last prefix inside it.
    pub(super) fn last(self) -> Self {
        Self { bits: self.bits.last(self.length), length: A::LENGTH }
    }

    /// It and all prefixes inside it.
    pub(super) fn inside(self) -> RangeInclusive<Self> {
        self..=self.last()
    }

    pub(super) fn net(self) -> IpNet {
        A::net(self)
    }
}

/// The packets from one prefix to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Region<A> {
    pub(super) destination: Prefix<A>,
    pub(super) source: Prefix<A>,
}

impl<A: Address> Region<A> {
    /// `None` if the prefixes are of the other family.
    pub(super) fn of(cell: &Cell) -> Option<Self> {
        Some(Self { destination: A::prefix(&cell.destination)?, source: A::prefix(&cell.source)? })
    }

    /// Between the addresses of a policy's selector; `None` if it is of the other family.
    pub(super) fn of_policy(policy: &Policy) -> Option<Self> {
        let selector = &policy.id.selector;
        Some(Self { destination: A::prefix(&selector.destination)?, source: A::prefix(&selector.source)? })
    }

    pub(super) fn cell(self) -> Cell {
        Cell { destination: self.destination.net(), source: self.source.net() }
    }

    /// The pair of prefix lengths.
    pub(super) fn tuple(self) -> (u8, u8) {
        (self.destination.length, self.source.length)
    }

    pub(super) fn contains(self, other: Self) -> bool {
        self.destination.contains(other.destination) && self.source.contains(other.source)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix() -> impl Strategy<Value = Prefix<u32>> {
        (any::<u32>(), 0..=32u8)
            .prop_map(|(bits, length)| Prefix { bits: bits & 0x8000_00ff, length: 32 }.shortened(length))
    }

    proptest! {
        /// The range of a prefix holds exactly the prefixes that it contains.
        #[test]
        fn what_is_inside_a_prefix_is_a_range(outer in prefix(), inner in prefix()) {
            prop_assert_eq!(outer.inside().contains(&inner), outer.contains(inner));
            let (outer_net, inner_net) = (outer.net(), inner.net());
            prop_assert_eq!(outer.contains(inner), outer_net.contains(&inner_net));
            prop_assert_eq!(u32::prefix(&inner_net), Some(inner));
        }
    }

    #[test]
    fn everything_is_a_prefix_of_length_zero() {
        let all = Halves::prefix(&"::/0".parse().unwrap()).unwrap();
        let one = Halves::prefix(&"2001:db8::1/128".parse().unwrap()).unwrap();
        assert!(all.contains(one) && !one.contains(all) && one.contains(one));
        assert_eq!((one.shortened(0), one.last(), all.last().length()), (all, one, 128));
        assert_eq!(u32::prefix(&all.net()), None);
    }
}
