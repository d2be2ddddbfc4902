//! Attributes of netlink messages: type, length and value, one after the other. Every length is checked.

use netlink_packet_core::NlasIterator;

pub(super) use super::super::wire::text;
use super::super::{request::RequestError, wire::kind_and_value};

/// Length of an attribute's header in bytes.
const HEADER: usize = 4;

/// Reads attributes one after the other; ends after the first error.
#[derive(Clone, Debug)]
pub(super) struct Attributes<'a>(NlasIterator<&'a [u8]>);

impl<'a> Attributes<'a> {
    /// Those behind a fixed header of this length.
    pub(super) fn behind(payload: &'a [u8], header: usize) -> Result<Self, RequestError> {
        let rest = payload.get(header..);
        rest.map(Self::inside).ok_or_else(|| undecodable("a message is shorter than its header"))
    }

    /// Those inside an attribute.
    pub(super) fn inside(value: &'a [u8]) -> Self {
        Self(NlasIterator::new(value))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), RequestError>;

    fn next(&mut self) -> Option<Self::Item> {
        let attribute = self.0.next()?;
        let too_long = |_| undecodable("an attribute is longer than what it is in");
        Some(attribute.map(kind_and_value).map_err(too_long))
    }
}

/// Writes attributes one after the other, behind a fixed header.
#[derive(Clone, Debug, Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        // Values here are names and numbers.
        let length = u16::try_from(HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

/// A number in network byte order, as nfnetlink has them.
pub(super) fn network_u32(value: &[u8]) -> Result<u32, RequestError> {
    let bytes = <[u8; 4]>::try_from(value);
    bytes.map(u32::from_be_bytes).map_err(|_| undecodable("a number does not have 4 bytes"))
}

/// A number in the processor's byte order, as rtnetlink has them.
pub(super) fn host_u32(value: &[u8]) -> Result<u32, RequestError> {
    let bytes = <[u8; 4]>::try_from(value);
    bytes.map(u32::from_ne_bytes).map_err(|_| undecodable("a number does not have 4 bytes"))
}

pub(super) fn undecodable(what: &str) -> RequestError {
    RequestError::Undecodable(what.to_owned())
}

/// What a message must have.
pub(super) fn needed<T>(value: Option<T>, what: &str) -> Result<T, RequestError> {
    value.ok_or_else(|| undecodable(&format!("a message without {what}")))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Bytes from a text of hexadecimal numbers.
    pub(in super::super) fn bytes(text: &str) -> Vec<u8> {
        let digit = |digit: u8| u8::try_from(char::from(digit).to_digit(16).unwrap()).unwrap();
        text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
    }

    /// Lengths to which a message can be cut inside its header or an attribute, its padding apart.
    pub(in super::super) fn cuts(payload: &[u8], header: usize) -> Vec<usize> {
        let mut between = vec![header];
        let mut at = header;
        while let Some([l0, l1]) = payload.get(at..).and_then(<[u8]>::first_chunk) {
            let end = at + usize::from(u16::from_ne_bytes([*l0, *l1]));
            at = end.next_multiple_of(4);
            between.extend(end..=at);
        }
        (0..payload.len()).filter(|length| !between.contains(length)).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let body = Body(vec![9; 4]).with(1, b"filter\0").with(2 | 0xc000, &[1, 2, 3, 4]);
        let read: Vec<_> = Attributes::behind(&body.0, 4).unwrap().map(Result::unwrap).collect();
        assert_eq!(read, [(1, &b"filter\0"[..]), (2, &[1, 2, 3, 4])]);
        assert_eq!(text(read[0].1), "filter");
        assert_eq!(network_u32(read[1].1).unwrap(), 0x0102_0304);
    }

    #[test]
    fn a_cut_inside_an_attribute_is_an_error_and_the_last_thing_read() {
        let body = Body::default().with(1, b"filter\0").with(2, &[1, 2, 3, 4]).0;
        for length in 0..body.len() {
            let read: Vec<_> = Attributes::inside(&body[..length]).collect();
            // Padding may be missing.
            let is_whole = matches!(length, 0 | 11 | 12);
            assert_eq!(read.iter().all(Result::is_ok), is_whole, "{length}");
        }
        Attributes::behind(&[], 4).unwrap_err();
        for length in [0_u8, 3, 9] {
            let attribute = [length, 0, 1, 0, 5, 5, 5, 5];
            let read: Vec<_> = Attributes::inside(&attribute).collect();
            assert!(matches!(read[..], [Err(_)]), "{length}");
        }
    }
}
