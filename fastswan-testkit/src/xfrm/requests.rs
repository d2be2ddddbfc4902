//! Requests that change what the kernel has, as bytes (`linux/xfrm.h`). `ip` takes a process for each.

use std::net::{IpAddr, Ipv4Addr};

use fastswan::{
    Policy, PolicyId, Selector,
    policy::{Action, DefaultPolicy, Direction, Family, IPPROTO_ESP, Mode, PolicyType, Template},
};
use ipnet::IpNet;

const NLMSG_NOOP: u16 = 1;
const GETSA: u16 = 0x12;
const NEWPOLICY: u16 = 0x13;
const DELPOLICY: u16 = 0x14;
const GETPOLICY: u16 = 0x15;
const ALLOCSPI: u16 = 0x16;
const UPDPOLICY: u16 = 0x19;
const FLUSHPOLICY: u16 = 0x1d;
const SETDEFAULT: u16 = 0x27;

const ATTRIBUTE_TEMPLATE: u16 = 5;
const ATTRIBUTE_POLICY_TYPE: u16 = 16;
const ATTRIBUTE_MARK: u16 = 21;
const ATTRIBUTE_IF_ID: u16 = 31;

const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
const REQUEST_AND_DUMP: u16 = 1 | 0x300;
const HEADER_LENGTH: usize = 16;
/// Lengths of `struct xfrm_userpolicy_info` and `struct xfrm_userpolicy_id`.
const POLICY_LENGTH: usize = 168;
const POLICY_ID_LENGTH: usize = 64;
/// Length of `struct xfrm_usersa_id`.
const SA_ID_LENGTH: usize = 24;
/// Lengths of `struct xfrm_selector` and `struct xfrm_usersa_info`, and where the reqid is in the latter.
const SELECTOR_LENGTH: usize = 56;
const SA_LENGTH: usize = 224;
const REQID_OFFSET: usize = 208;
const AF_INET: u16 = 2;
const MODE_TUNNEL: u8 = 1;
/// A limit that no test reaches.
const MANY_PACKETS: u64 = 1 << 40;

/// Something that the kernel is asked for, and to acknowledge unless it answers.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// `XFRM_MSG_NEWPOLICY`
    AddPolicy(&'a Policy),
    /// `XFRM_MSG_UPDPOLICY`
    UpdatePolicy(&'a Policy),
    /// `XFRM_MSG_DELPOLICY`, by index if there is one, else by selector.
    DeletePolicy(&'a PolicyId, Option<u32>),
    /// `XFRM_MSG_FLUSHPOLICY`
    FlushPolicies(PolicyType),
    /// `XFRM_MSG_SETDEFAULT`
    SetDefault(DefaultPolicy),
    /// `XFRM_MSG_ALLOCSPI`: an ESP association in tunnel mode that has a SPI and waits for its keys. It is all that
    /// a kernel without ESP gives. Expires after `net.core.xfrm_acq_expires` seconds.
    ReserveSpi {
        /// Outer source.
        source: Ipv4Addr,
        /// Outer destination.
        destination: Ipv4Addr,
        /// The number that the policy's template asks for.
        reqid: u32,
        /// The SPI.
        spi: u32,
    },
    /// `XFRM_MSG_GETSA`, which is answered with all of them.
    DumpAssociations,
    /// `XFRM_MSG_GETPOLICY`, which is answered with all of them.
    DumpPolicies,
    /// `NLMSG_NOOP`
    Nothing,
}

impl Request<'_> {
    /// The message, with this sequence number.
    #[must_use]
    pub fn bytes(&self, sequence: u32) -> Vec<u8> {
        let (kind, mut message) = match *self {
            Self::AddPolicy(policy) => (NEWPOLICY, Message::policy(policy)),
            Self::UpdatePolicy(policy) => (UPDPOLICY, Message::policy(policy)),
            Self::DeletePolicy(id, index) => (DELPOLICY, Message::deletion(id, index)),
            Self::FlushPolicies(table) => (FLUSHPOLICY, Message::flush(table)),
            Self::SetDefault(default_policy) => (SETDEFAULT, Message::default_policy(default_policy)),
            Self::ReserveSpi { source, destination, reqid, spi } => {
                (ALLOCSPI, Message::spi(source, destination, reqid, spi))
            }
            Self::DumpAssociations => (GETSA, Message::zeroed(SA_ID_LENGTH)),
            Self::DumpPolicies => (GETPOLICY, Message::zeroed(POLICY_ID_LENGTH)),
            Self::Nothing => (NLMSG_NOOP, Message::new()),
        };
        let flags = match self {
            Self::DumpAssociations | Self::DumpPolicies => REQUEST_AND_DUMP,
            _ => REQUEST_AND_ACKNOWLEDGE,
        };
        let length = u32::try_from(message.0.len()).unwrap_or(u32::MAX);
        message.0[0..4].copy_from_slice(&length.to_ne_bytes());
        message.0[4..6].copy_from_slice(&kind.to_ne_bytes());
        message.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        message.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        message.0
    }
}

/// A message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new() -> Self {
        Self(vec![0; HEADER_LENGTH])
    }

    /// A fixed part of zeros.
    fn zeroed(length: usize) -> Self {
        Self(vec![0; HEADER_LENGTH + length])
    }

    fn policy(policy: &Policy) -> Self {
        let mut message = Self::new();
        message.selector(&policy.id.selector);
        let packets = if policy.use_limited { MANY_PACKETS } else { u64::MAX };
        // Soft and hard limits of bytes, soft and hard limits of packets, four times; then what was used.
        for limit in [u64::MAX, u64::MAX, packets, packets, 0, 0, 0, 0, 0, 0, 0, 0] {
            message.0.extend(limit.to_ne_bytes());
        }
        message.0.extend(policy.priority.to_ne_bytes());
        message.0.extend(0_u32.to_ne_bytes());
        message.0.extend([direction(policy.id.direction), u8::from(policy.action == Action::Block), 0, 0]);
        message.0.resize(HEADER_LENGTH + POLICY_LENGTH, 0);
        message.identity(&policy.id);
        if !policy.templates.is_empty() {
            let family = policy.id.selector.family();
            let templates: Vec<u8> =
                policy.templates.iter().flat_map(|template| template_bytes(template, family)).collect();
            message.attribute(ATTRIBUTE_TEMPLATE, &templates);
        }
        message
    }

    fn deletion(id: &PolicyId, index: Option<u32>) -> Self {
        let mut message = Self::new();
        match index {
            Some(_) => message.0.extend([0; SELECTOR_LENGTH]),
            None => message.selector(&id.selector),
        }
        message.0.extend(index.unwrap_or(0).to_ne_bytes());
        message.0.push(direction(id.direction));
        message.0.resize(HEADER_LENGTH + POLICY_ID_LENGTH, 0);
        message.identity(id);
        message
    }

    fn flush(table: PolicyType) -> Self {
        let mut message = Self::new();
        message.attribute(ATTRIBUTE_POLICY_TYPE, &policy_type(table));
        message
    }

    fn default_policy(default_policy: DefaultPolicy) -> Self {
        let mut message = Self::new();
        let action = |action| if action == Action::Block { 1 } else { 2 };
        let DefaultPolicy { inbound, forward, outbound } = default_policy;
        message.0.extend([action(inbound), action(forward), action(outbound), 0]);
        message
    }

    /// `struct xfrm_userspi_info`
    fn spi(source: Ipv4Addr, destination: Ipv4Addr, reqid: u32, spi: u32) -> Self {
        let mut message = Self::new();
        // No selector.
        message.0.resize(HEADER_LENGTH + SELECTOR_LENGTH, 0);
        message.0.extend(address(destination.into()));
        message.0.extend([0, 0, 0, 0, IPPROTO_ESP, 0, 0, 0]);
        message.0.extend(address(source.into()));
        // Lifetimes, statistics and a sequence number, all of which are the kernel's.
        message.0.resize(HEADER_LENGTH + REQID_OFFSET, 0);
        message.0.extend(reqid.to_ne_bytes());
        message.0.extend(AF_INET.to_ne_bytes());
        message.0.extend([MODE_TUNNEL, 0]);
        message.0.resize(HEADER_LENGTH + SA_LENGTH, 0);
        // The lowest and the highest number that is wanted.
        message.0.extend(spi.to_ne_bytes());
        message.0.extend(spi.to_ne_bytes());
        message
    }

    /// What identifies a policy besides its direction and selector.
    fn identity(&mut self, id: &PolicyId) {
        self.attribute(ATTRIBUTE_POLICY_TYPE, &policy_type(id.policy_type));
        if id.mark.mask != 0 {
            let mark = [id.mark.value.to_ne_bytes(), id.mark.mask.to_ne_bytes()].concat();
            self.attribute(ATTRIBUTE_MARK, &mark);
        }
        if id.if_id != 0 {
            self.attribute(ATTRIBUTE_IF_ID, &id.if_id.to_ne_bytes());
        }
    }

    fn selector(&mut self, selector: &Selector) {
        self.0.extend(address(selector.destination.addr()));
        self.0.extend(address(selector.source.addr()));
        for port in [selector.destination_port, selector.source_port] {
            self.0.extend(port.port.to_be_bytes());
            self.0.extend(port.mask.to_be_bytes());
        }
        self.0.extend(family_number(&selector.destination).to_ne_bytes());
        self.0.extend([selector.destination.prefix_len(), selector.source.prefix_len()]);
        self.0.extend([selector.protocol, 0, 0, 0]);
        self.0.extend(selector.ifindex.to_ne_bytes());
        self.0.extend(selector.user.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

fn template_bytes(template: &Template, family: Family) -> Vec<u8> {
    let mode = match template.mode {
        Mode::Transport => 0,
        Mode::Tunnel => 1,
        Mode::Other(mode) => mode,
    };
    let outer = match (template.mode, template.destination) {
        (Mode::Transport, _) if family == Family::V4 => libc::AF_INET,
        (Mode::Transport, _) | (_, IpAddr::V6(_)) => libc::AF_INET6,
        (_, IpAddr::V4(_)) => libc::AF_INET,
    };
    let mut bytes = address(template.destination).to_vec();
    bytes.extend(template.spi.to_be_bytes());
    bytes.extend([template.protocol, 0, 0, 0]);
    bytes.extend(u16::try_from(outer).unwrap_or(0).to_ne_bytes());
    bytes.extend([0, 0]);
    bytes.extend(address(template.source));
    bytes.extend(template.reqid.to_ne_bytes());
    bytes.extend([mode, 0, u8::from(template.optional), 0]);
    // Every algorithm of each kind.
    bytes.extend([u8::MAX; 12]);
    bytes
}

fn direction(direction: Direction) -> u8 {
    match direction {
        Direction::In => 0,
        Direction::Out => 1,
        Direction::Forward => 2,
    }
}

/// `struct xfrm_userpolicy_type`
fn policy_type(table: PolicyType) -> [u8; 6] {
    [u8::from(table == PolicyType::Sub), 0, 0, 0, 0, 0]
}

fn family_number(prefix: &IpNet) -> u16 {
    let family = if prefix.addr().is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u16::try_from(family).unwrap_or(0)
}

/// An `xfrm_address_t`.
fn address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            bytes
        }
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fastswan::{
        PolicyEvent,
        policy::Mark,
        source::netlink::{Content, decode},
    };

    use super::*;
    use crate::xfrm::CAPTURED;

    /// What a request says is what was to be said, by the decoder that knows the kernel's messages.
    #[test]
    fn what_the_kernel_has_can_be_asked_for_again() {
        let mut policies = 0;
        for (name, datagram) in CAPTURED {
            for message in decode(&Bytes::from_static(datagram)).unwrap() {
                let Content::Event(PolicyEvent::Policy(policy)) = message.content else { continue };
                let asked = Policy { offload: None, ..policy };
                let request = Bytes::from(Request::AddPolicy(&asked).bytes(7));
                let again = decode(&request).unwrap();
                let [again] = &again[..] else { panic!("{name}: {again:?}") };
                let expected = Policy { index: 0, ..asked };
                assert_eq!(again.sequence, 7);
                assert_eq!(again.content, Content::Event(PolicyEvent::Policy(expected)), "{name}");
                policies += 1;
            }
        }
        assert!(policies > 15, "{policies}");
    }

    #[test]
    fn marks_tables_interfaces_and_limits_are_asked_for() {
        let selector =
            Selector::between("10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()).unwrap();
        let id = PolicyId {
            policy_type: PolicyType::Sub,
            mark: Mark { value: 1, mask: 3 },
            if_id: 9,
            ..PolicyId::new(Direction::Out, Selector { ifindex: 4, ..selector })
        };
        let policy = Policy { priority: 5, use_limited: true, action: Action::Block, ..Policy::new(id) };
        let messages = decode(&Bytes::from(Request::UpdatePolicy(&policy).bytes(1))).unwrap();
        assert_eq!(messages[0].content, Content::Event(PolicyEvent::Policy(policy)));
    }
}
