//! What a datagram of the kernel's XFRM netlink says. Pure: bytes in, meaning out, no panic for any bytes.
//!
//! Structures are those of `netlink-packet-xfrm`, read one by one: its parsers of whole messages panic on
//! messages that are shorter than their fixed part. The numbers of `linux/xfrm.h` that it lacks are here.

use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;
use netlink_packet_core::{NetlinkBuffer, NlaBuffer, NlasIterator, Parseable as _};
use netlink_packet_xfrm::{
    Address, Lifetime, LifetimeConfig, Selector as RawSelector, UserExpire, UserPolicyDefault,
    UserPolicyExpire, UserPolicyId, UserPolicyInfo, UserSaId, UserSaInfo, UserTemplate,
    XFRM_USER_TEMPLATE_LEN as TEMPLATE_LENGTH, XfrmAttrs, constants as xfrm,
};

use crate::{
    event::PolicyEvent,
    policy::{
        Action, DefaultPolicy, Direction, Family, Mark, Mode, OffloadDev, OffloadKind, Overhead, Policy,
        PolicyId, PolicyType, PortMatch, SaId, SecurityAssociation, Selector, Template, Templates,
    },
};

const XFRM_OFFLOAD_INBOUND: u8 = 2;
const XFRM_OFFLOAD_PACKET: u8 = 4;
const XFRM_POLICY_CPU_ACQUIRE: u8 = 4;
const XFRM_USERPOLICY_BLOCK: u8 = 1;
/// Moves one association (Linux 7.2).
const XFRM_MSG_MIGRATE_STATE: u16 = 0x29;
/// `XFRMA_SPD_INFO` and `XFRMA_SAD_CNT`: both are structures of counts only.
const XFRMA_INFO: u16 = 1;
const INFO_FLAGS_LENGTH: usize = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const XFRMA_SET_MARK: u16 = 29;
const XFRMA_SET_MARK_MASK: u16 = 30;
const XFRMA_SA_DIR: u16 = 33;
const XFRM_SA_DIR_IN: u8 = 1;
const XFRMA_SA_PCPU: u16 = 35;

/// One message of a datagram.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The sequence number of the request that it answers; 0 for notifications.
    pub sequence: u32,
    /// A dump was interrupted by a change (`NLM_F_DUMP_INTR`).
    pub interrupted: bool,
    /// What it says.
    pub content: Content,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Content {
    /// Something about policies or associations.
    Event(PolicyEvent),
    /// The end of a dump, with its errno; 0 is success.
    Done(i32),
    /// An error, as a positive errno; 0 acknowledges a request.
    Error(i32),
    /// The kernel lost messages.
    Overrun,
    /// An association that is not complete, and none yet. Without an SPI, the kernel waits for it to be made; with one
    /// but without keys, a daemon has reserved the SPI (`XFRM_MSG_ALLOCSPI`). Dumps have these, notifications do not.
    Larval(SecurityAssociation),
    /// Policies or associations were given other addresses. What they are now is not told.
    Migrated,
    /// Nothing that concerns forwarded packets: a soft limit, a per-socket policy, or a kind of message that changes
    /// no policy and no association.
    Ignored,
}

impl Content {
    /// The same, but if they count, a larval association with an SPI is one.
    pub(crate) fn counting_larval(self, they_count: bool) -> Self {
        match self {
            Self::Larval(sa) if they_count && sa.id.spi != 0 => Self::Event(PolicyEvent::Sa(sa)),
            other => other,
        }
    }
}

/// Bytes are not what the kernel sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("undecodable XFRM message of type {kind:#x}: {reason}; the source will ask for everything again")]
pub struct DecodeError {
    /// Message type; 0 if not even that could be read.
    pub kind: u16,
    /// What is wrong.
    pub reason: String,
}

/// Reads all messages of a datagram.
///
/// # Errors
///
/// [`DecodeError`] for the first message that cannot be read. Nothing of the datagram may then be relied on.
pub fn decode(datagram: &Bytes) -> Result<Vec<Message>, DecodeError> {
    Messages(datagram).collect()
}

/// The messages of a datagram, or of what is left of it. None after the first that cannot be read means anything.
struct Messages<'a>(&'a [u8]);

impl Iterator for Messages<'_> {
    type Item = Result<Message, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let unread = std::mem::take(&mut self.0);
        if unread.is_empty() {
            return None;
        }
        let buffer = match NetlinkBuffer::new_checked(unread) {
            Ok(buffer) => buffer,
            Err(error) => return Some(Err(DecodeError { kind: 0, reason: error.to_string() })),
        };
        // Messages begin at multiples of 4 bytes; the last one need not end there.
        let length = (buffer.length() as usize).next_multiple_of(4);
        self.0 = unread.get(length..).unwrap_or_default();
        Some(message(&buffer))
    }
}

/// What a message of this kind with this payload says.
pub(super) fn read(kind: u16, payload: &[u8]) -> Result<Content, DecodeError> {
    content(kind, payload).map_err(|reason| DecodeError { kind, reason })
}

/// How many policies or associations the payload of an answer to `XFRM_MSG_GETSPDINFO` or `XFRM_MSG_GETSADINFO` counts;
/// 0 if it is not one.
pub(super) fn counted(payload: &[u8]) -> usize {
    let mut attributes = NlasIterator::new(payload.get(INFO_FLAGS_LENGTH..).unwrap_or_default());
    let Some(Ok(counts)) = attributes.find(|attribute| matches!(attribute, Ok(a) if a.kind() == XFRMA_INFO))
    else {
        return 0;
    };
    let (counts, _) = counts.value().as_chunks();
    counts.iter().fold(0, |all, count| all.saturating_add(u32::from_ne_bytes(*count) as usize))
}

fn message(buffer: &NetlinkBuffer<&[u8]>) -> Result<Message, DecodeError> {
    let content = read(buffer.message_type(), buffer.payload())?;
    let interrupted = buffer.flags() & NLM_F_DUMP_INTR != 0;
    Ok(Message { sequence: buffer.sequence_number(), interrupted, content })
}

fn content(kind: u16, payload: &[u8]) -> Result<Content, String> {
    let event = match kind {
        NLMSG_NOOP => return Ok(Content::Ignored),
        NLMSG_ERROR => return Ok(Content::Error(errno(payload)?)),
        NLMSG_DONE => return Ok(Content::Done(errno(payload)?)),
        NLMSG_OVERRUN => return Ok(Content::Overrun),
        xfrm::XFRM_MSG_NEWPOLICY | xfrm::XFRM_MSG_UPDPOLICY => {
            let info = UserPolicyInfo::parse(payload).map_err(text)?;
            let attributes = Attributes::read(payload, xfrm_length::POLICY_INFO)?;
            policy(&info, attributes)?.map(PolicyEvent::Policy)
        }
        xfrm::XFRM_MSG_DELPOLICY => {
            UserPolicyId::parse(payload).map_err(text)?;
            let mut attributes = Attributes::read(payload, xfrm_length::POLICY_ID)?;
            // The fixed part lacks the selector if the policy was deleted by its index.
            let info = attributes.policy.take().ok_or("a deleted policy is not described")?;
            policy_id(&info, attributes)?.map(PolicyEvent::PolicyRemoved)
        }
        xfrm::XFRM_MSG_POLEXPIRE => {
            let expire = UserPolicyExpire::parse(payload).map_err(text)?;
            let attributes = Attributes::read(payload, xfrm_length::POLICY_EXPIRE)?;
            // A soft limit deletes nothing.
            let id = policy_id(&expire.pol, attributes)?;
            id.filter(|_| expire.hard != 0).map(PolicyEvent::PolicyRemoved)
        }
        xfrm::XFRM_MSG_FLUSHPOLICY => {
            Some(PolicyEvent::PoliciesFlushed(Attributes::read(payload, 0)?.policy_type))
        }
        xfrm::XFRM_MSG_NEWSA | xfrm::XFRM_MSG_UPDSA => {
            let info = UserSaInfo::parse(payload).map_err(text)?;
            let attributes = Attributes::read(payload, xfrm_length::SA_INFO)?;
            let sa = sa(&info, &attributes)?;
            // An update tells what was asked for. The kernel keeps most of what it had (`xfrm_state_update`).
            if kind == xfrm::XFRM_MSG_UPDSA && sa.is_outbound_packet_offload() {
                return Err("an update of an offloaded association does not tell what it is now".into());
            }
            if sa.id.spi == 0 || is_ipsec(sa.id.protocol) && !attributes.has_algorithm {
                return Ok(Content::Larval(sa));
            }
            Some(PolicyEvent::Sa(sa))
        }
        xfrm::XFRM_MSG_DELSA => {
            let id = UserSaId::parse(payload).map_err(text)?;
            let attributes = Attributes::read(payload, xfrm_length::SA_ID)?;
            let destination = address(id.family, &id.daddr)?;
            let id = SaId { mark: attributes.mark, ..SaId::new(destination, id.spi, id.proto) };
            Some(id).filter(|id| id.spi != 0).map(PolicyEvent::SaRemoved)
        }
        xfrm::XFRM_MSG_EXPIRE => {
            let expire = UserExpire::parse(payload).map_err(text)?;
            let attributes = Attributes::read(payload, xfrm_length::SA_EXPIRE)?;
            let id = sa_id(&expire.state, &attributes)?;
            Some(id).filter(|id| id.spi != 0 && expire.hard != 0).map(PolicyEvent::SaRemoved)
        }
        xfrm::XFRM_MSG_FLUSHSA => {
            Some(PolicyEvent::SasFlushed(*payload.first().ok_or("a flush without a protocol")?))
        }
        // What SETDEFAULT changes is told as an answer to GETDEFAULT.
        xfrm::XFRM_MSG_GETDEFAULT => Some(PolicyEvent::DefaultPolicy(default_policy(payload)?)),
        xfrm::XFRM_MSG_MIGRATE | XFRM_MSG_MIGRATE_STATE => return Ok(Content::Migrated),
        _ => None,
    };
    Ok(event.map_or(Content::Ignored, Content::Event))
}

/// Lengths of the fixed parts of messages in bytes.
mod xfrm_length {
    pub(super) use netlink_packet_xfrm::{
        XFRM_USER_EXPIRE_LEN as SA_EXPIRE, XFRM_USER_POLICY_EXPIRE_LEN as POLICY_EXPIRE,
        XFRM_USER_POLICY_ID_LEN as POLICY_ID, XFRM_USER_POLICY_INFO_LEN as POLICY_INFO,
        XFRM_USER_SA_ID_LEN as SA_ID, XFRM_USER_SA_INFO_LEN as SA_INFO,
    };
}

/// The attributes that matter.
#[derive(Default)]
struct Attributes {
    /// In few messages, so it is not to make the others slow.
    policy: Option<Box<UserPolicyInfo>>,
    policy_type: PolicyType,
    templates: Templates,
    mark: Mark,
    if_id: u32,
    security_context: Box<[u8]>,
    is_inbound: bool,
    cpu: Option<u32>,
    set_mark: Option<u32>,
    set_mark_mask: Option<u32>,
    offload: Option<OffloadDev>,
    /// Name and ICV length in bits of an AEAD algorithm.
    aead: Option<(String, u32)>,
    /// An algorithm of any kind.
    has_algorithm: bool,
    udp_encapsulation: bool,
}

impl Attributes {
    fn read(payload: &[u8], fixed: usize) -> Result<Self, String> {
        let bytes = payload.get(fixed..).ok_or("shorter than its fixed part")?;
        let mut attributes = Self::default();
        for attribute in NlasIterator::new(bytes) {
            attributes.add(&attribute.map_err(text)?)?;
        }
        Ok(attributes)
    }

    fn add(&mut self, attribute: &NlaBuffer<&[u8]>) -> Result<(), String> {
        let kind = attribute.kind();
        self.has_algorithm |= matches!(
            kind,
            xfrm::XFRMA_ALG_AUTH
                | xfrm::XFRMA_ALG_AUTH_TRUNC
                | xfrm::XFRMA_ALG_CRYPT
                | xfrm::XFRMA_ALG_COMP
                | xfrm::XFRMA_ALG_AEAD
        );
        match kind {
            xfrm::XFRMA_SEC_CTX => self.security_context = attribute.value().into(),
            xfrm::XFRMA_TMPL => self.templates = templates(attribute.value())?,
            XFRMA_SA_DIR => self.is_inbound = attribute.value().first() == Some(&XFRM_SA_DIR_IN),
            XFRMA_SA_PCPU => {
                let number = attribute.value().first_chunk().ok_or("a processor's number is cut short")?;
                self.cpu = Some(u32::from_ne_bytes(*number));
            }
            XFRMA_SET_MARK | XFRMA_SET_MARK_MASK => {
                let value = attribute.value().first_chunk().ok_or("a mark to set is cut short")?;
                let told = if kind == XFRMA_SET_MARK { &mut self.set_mark } else { &mut self.set_mark_mask };
                *told = Some(u32::from_ne_bytes(*value));
            }
            xfrm::XFRMA_POLICY
            | xfrm::XFRMA_POLICY_TYPE
            | xfrm::XFRMA_MARK
            | xfrm::XFRMA_IF_ID
            | xfrm::XFRMA_OFFLOAD_DEV
            | xfrm::XFRMA_ALG_AEAD
            | xfrm::XFRMA_ENCAP => match XfrmAttrs::parse(attribute).map_err(text)? {
                XfrmAttrs::PolicyInfo(info) => self.policy = Some(Box::new(info)),
                XfrmAttrs::PolicyType(policy_type) => {
                    self.policy_type = match policy_type.ptype {
                        xfrm::XFRM_POLICY_TYPE_MAIN => PolicyType::Main,
                        xfrm::XFRM_POLICY_TYPE_SUB => PolicyType::Sub,
                        other => return Err(format!("policy type {other}")),
                    };
                }
                XfrmAttrs::Mark(mark) => self.mark = Mark { value: mark.value, mask: mark.mask },
                XfrmAttrs::IfId(if_id) => self.if_id = if_id,
                XfrmAttrs::OffloadDevice(device) => {
                    let packet = device.flags & XFRM_OFFLOAD_PACKET != 0;
                    self.offload = Some(OffloadDev {
                        ifindex: u32::try_from(device.ifindex).map_err(text)?,
                        kind: if packet { OffloadKind::Packet } else { OffloadKind::Crypto },
                        inbound: device.flags & XFRM_OFFLOAD_INBOUND != 0,
                    });
                }
                XfrmAttrs::EncryptionAlgAead(aead) => {
                    let name = aead.alg_name.split(|&byte| byte == 0).next().unwrap_or_default();
                    self.aead = Some((String::from_utf8_lossy(name).into_owned(), aead.alg_icv_len));
                }
                XfrmAttrs::EncapsulationTemplate(_) => self.udp_encapsulation = true,
                _ => {}
            },
            _ => {}
        }
        Ok(())
    }
}

/// A policy, or `None` if it is one of a socket.
fn policy(info: &UserPolicyInfo, mut attributes: Attributes) -> Result<Option<Policy>, String> {
    let (templates, offload) = (std::mem::take(&mut attributes.templates), attributes.offload);
    let Some(id) = policy_id(info, attributes)? else { return Ok(None) };
    let action = match info.action {
        xfrm::XFRM_POLICY_ALLOW => Action::Allow,
        xfrm::XFRM_POLICY_BLOCK => Action::Block,
        other => return Err(format!("policy action {other}")),
    };
    Ok(Some(Policy {
        index: info.index,
        priority: info.priority,
        action,
        templates,
        offload,
        use_limited: is_use_limited(&info.lifetime_cfg),
        asks_per_cpu: info.flags & XFRM_POLICY_CPU_ACQUIRE != 0,
        expires: expires(&info.lifetime_cur, &[info.lifetime_cfg.hard_add_expires_seconds]),
        ..Policy::new(id)
    }))
}

/// The identity of a policy, or `None` if it is one of a socket.
fn policy_id(info: &UserPolicyInfo, attributes: Attributes) -> Result<Option<PolicyId>, String> {
    let direction = match info.direction {
        xfrm::XFRM_POLICY_IN => Direction::In,
        xfrm::XFRM_POLICY_OUT => Direction::Out,
        xfrm::XFRM_POLICY_FWD => Direction::Forward,
        _ => return Ok(None),
    };
    Ok(Some(PolicyId {
        direction,
        policy_type: attributes.policy_type,
        mark: attributes.mark,
        if_id: attributes.if_id,
        security_context: attributes.security_context,
        selector: selector(&info.selector)?,
    }))
}

fn selector(raw: &RawSelector) -> Result<Selector, String> {
    let prefix = |address_of: &Address, length| {
        IpNet::new(address(raw.family, address_of)?, length).map_err(|_| format!("prefix length {length}"))
    };
    Ok(Selector {
        source: prefix(&raw.saddr, raw.prefixlen_s)?,
        destination: prefix(&raw.daddr, raw.prefixlen_d)?,
        protocol: raw.proto,
        source_port: PortMatch { port: raw.sport, mask: raw.sport_mask },
        destination_port: PortMatch { port: raw.dport, mask: raw.dport_mask },
        ifindex: u32::try_from(raw.ifindex).map_err(text)?,
        user: raw.user,
    })
}

fn templates(raw: &[u8]) -> Result<Templates, String> {
    let (templates, rest) = raw.as_chunks::<TEMPLATE_LENGTH>();
    if !rest.is_empty() {
        return Err("a template is cut short".into());
    }
    templates.iter().map(|raw| template(&UserTemplate::parse(raw).map_err(text)?)).collect()
}

fn template(raw: &UserTemplate) -> Result<Template, String> {
    Ok(Template {
        mode: mode(raw.mode),
        protocol: raw.id.proto,
        spi: raw.id.spi,
        source: address(raw.family, &raw.saddr)?,
        destination: address(raw.family, &raw.id.daddr)?,
        reqid: raw.reqid,
        optional: raw.optional != 0,
    })
}

fn sa(info: &UserSaInfo, attributes: &Attributes) -> Result<SecurityAssociation, String> {
    let id = sa_id(info, attributes)?;
    // A family of 0 is no selector at all.
    let selector = if info.selector.family == 0 { None } else { Some(selector(&info.selector)?) };
    Ok(SecurityAssociation {
        id,
        source: address(info.family, &info.saddr)?,
        reqid: info.reqid,
        mode: mode(info.mode),
        if_id: attributes.if_id,
        selector,
        cpu: attributes.cpu,
        receives_only: attributes.is_inbound || info.flags & xfrm::XFRM_STATE_WILDRECV != 0,
        has_security_context: !attributes.security_context.is_empty(),
        sets_mark: sets_mark(attributes),
        offload: attributes.offload,
        overhead: overhead(info, attributes),
        expires: expires(
            &info.lifetime_cur,
            &[info.lifetime_cfg.hard_add_expires_seconds, info.lifetime_cfg.hard_use_expires_seconds],
        ),
    })
}

/// Whether a packet without a mark gets one (`xfrm_smark_init`, `xfrm_smark_get`).
fn sets_mark(attributes: &Attributes) -> bool {
    let mask = attributes.set_mark_mask.unwrap_or(u32::MAX);
    attributes.set_mark.is_some_and(|mark| mark & mask != 0)
}

/// Whether associations of a protocol have algorithms: ESP, AH and `IPComp`. Those of Mobile IPv6 have none.
fn is_ipsec(protocol: u8) -> bool {
    matches!(protocol, 50 | 51 | 108)
}

fn sa_id(info: &UserSaInfo, attributes: &Attributes) -> Result<SaId, String> {
    let destination = address(info.family, &info.id.daddr)?;
    Ok(SaId { mark: attributes.mark, ..SaId::new(destination, info.id.spi, info.id.proto) })
}

fn overhead(info: &UserSaInfo, attributes: &Attributes) -> Option<Overhead> {
    let (name, icv_bits) = attributes.aead.as_ref()?;
    if name != "rfc4106(gcm(aes))" || mode(info.mode) != Mode::Tunnel {
        return None;
    }
    let outer = if info.family == AF_INET { Family::V4 } else { Family::V6 };
    Some(Overhead::aes_gcm_tunnel(outer, attributes.udp_encapsulation, u16::try_from(icv_bits / 8).ok()?))
}

fn mode(raw: u8) -> Mode {
    match raw {
        xfrm::XFRM_MODE_TRANSPORT => Mode::Transport,
        xfrm::XFRM_MODE_TUNNEL => Mode::Tunnel,
        other => Mode::Other(other),
    }
}

fn default_policy(payload: &[u8]) -> Result<DefaultPolicy, String> {
    let raw = UserPolicyDefault::parse(payload).map_err(text)?;
    let action = |raw| if raw == XFRM_USERPOLICY_BLOCK { Action::Block } else { Action::Allow };
    Ok(DefaultPolicy {
        inbound: action(raw.input),
        forward: action(raw.forward),
        outbound: action(raw.output),
    })
}

/// When the first of these hard limits in seconds strikes; 0 is none. The first use may be as old as the addition, and
/// is not looked at: no notification tells of it, so dumps would differ from what was told.
fn expires(current: &Lifetime, limits: &[u64]) -> Option<u64> {
    let limit = limits.iter().filter(|limit| **limit != 0).min()?;
    Some(current.add_time.saturating_add(*limit))
}

/// Whether the kernel counts something that would end the policy: packets, bytes, or time since its last use.
fn is_use_limited(lifetime: &LifetimeConfig) -> bool {
    lifetime.hard_packet_limit != xfrm::XFRM_INF
        || lifetime.hard_byte_limit != xfrm::XFRM_INF
        || lifetime.hard_use_expires_seconds != 0
}

fn address(family: u16, raw: &Address) -> Result<IpAddr, String> {
    match family {
        AF_INET => Ok(raw.to_ipv4().into()),
        AF_INET6 => Ok(raw.to_ipv6().into()),
        other => Err(format!("address family {other}")),
    }
}

/// The kernel writes errors as negative numbers; a `Done` of an old kernel may lack it.
fn errno(payload: &[u8]) -> Result<i32, String> {
    if payload.is_empty() {
        return Ok(0);
    }
    let bytes = payload.first_chunk().ok_or("an error code is cut short")?;
    Ok(i32::from_ne_bytes(*bytes).saturating_neg())
}

fn text<E: std::error::Error>(error: E) -> String {
    error.to_string()
}
