//! Attributes and fixed parts of rtnetlink messages, read without a panic whatever comes, and written.
//!
//! The tables of routes are large and change all the time, so their messages are read in place instead of being turned into
//! lists of attributes first; and what a message has that is not known here must not make it unreadable.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NlaBuffer, NlasIterator};

use crate::policy::{Family, MacAddr};

/// A message that ends where it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message about {object} is cut off")]
pub(crate) struct CutOff {
    pub(crate) object: &'static str,
}

/// Kind and value of each attribute after a fixed part of so many bytes. It ends early where the attributes are malformed.
pub(super) fn attributes(payload: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let all = payload.get(fixed..).unwrap_or_default();
    NlasIterator::new(all).map_while(Result::ok).map(kind_and_value)
}

/// Kind and value of an attribute, without the flags that stand in its kind (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
pub(super) fn kind_and_value(attribute: NlaBuffer<&[u8]>) -> (u16, &[u8]) {
    let bytes = attribute.into_inner();
    let value = bytes.get(4..).unwrap_or_default();
    let kind = u16_at(bytes, 2).unwrap_or_default() & 0x3fff;
    (kind, value.get(..attribute.value_length()).unwrap_or_default())
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_ne_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

pub(super) fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(i32::from_ne_bytes)
}

/// An address, by its length.
pub(super) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|octets| Ipv4Addr::from(octets).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|octets| Ipv6Addr::from(octets).into()),
        _ => None,
    }
}

/// A name, which ends with a zero.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// An Ethernet address; loopback and tunnel devices have none, or all zeros.
pub(super) fn ethernet_address(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr).filter(|address| *address != MacAddr::default())
}

/// The family that a message is about, if it is one of these.
pub(super) fn family(number: u8) -> Option<Family> {
    match i32::from(number) {
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

/// An attribute as it stands in a request; its value is a multiple of four bytes.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(0);
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

/// The fixed part of a request, which begins with the family.
pub(super) fn of_family(family: Family, length: usize) -> Vec<u8> {
    let mut request = vec![0; length];
    request[0] = match family {
        Family::V4 => 2,
        Family::V6 => 10,
    };
    request
}

/// An address as it stands in a message.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The address that stands for none.
pub(super) fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_from_whatever_comes() {
        let mut bytes = vec![9, 9];
        bytes.extend([6, 0, 1, 0, 7, 8, 0, 0]);
        bytes.extend([8, 0, 2, 0x80, 192, 0, 2, 1]);
        let all: Vec<_> = attributes(&bytes, 2).collect();
        assert_eq!(all, [(1, &[7, 8][..]), (2, &[192, 0, 2, 1][..])]);
        assert_eq!(address(all[1].1), Some([192, 0, 2, 1].into()));
        for length in 0..bytes.len() {
            assert!(attributes(&bytes[..length], 2).count() < 2);
        }
        assert_eq!(attributes(&[0xff; 64], 3).count(), 0);
        assert_eq!((u32_at(&bytes, usize::MAX), u16_at(&bytes, bytes.len() - 1)), (None, None));
        assert_eq!(text(b"lan0\0\0"), "lan0");
    }
}
