//! Requests that change the kernel's policies and associations, as bytes (`linux/xfrm.h`), and the socket that they
//! are made on. `ip` takes a process for each.

use std::{io, net::IpAddr, os::fd::AsRawFd as _};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use fastswan::{
    Policy, PolicyEvent, PolicyId, SecurityAssociation, Selector, Snapshot,
    netlink::{self, Content, decode},
    policy::{
        Action, DefaultPolicy, Direction, Family, Mode, OffloadDev, OffloadKind, PolicyType, SaId, Template,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};
use nix::sys::socket::{MsgFlags, recv};

const NEWSA: u16 = 0x10;
const DELSA: u16 = 0x11;
const GETSA: u16 = 0x12;
const NEWPOLICY: u16 = 0x13;
const DELPOLICY: u16 = 0x14;
const GETPOLICY: u16 = 0x15;
const ALLOCSPI: u16 = 0x16;
const UPDPOLICY: u16 = 0x19;
const FLUSHSA: u16 = 0x1c;
const FLUSHPOLICY: u16 = 0x1d;
const MIGRATE: u16 = 0x21;
const NEWSPDINFO: u16 = 0x24;
const SETDEFAULT: u16 = 0x27;
const GETDEFAULT: u16 = 0x28;
/// Linux 7.2.
const MIGRATE_STATE: u16 = 0x29;

const ATTRIBUTE_TEMPLATE: u16 = 5;
const ATTRIBUTE_POLICY: u16 = 7;
const ATTRIBUTE_POLICY_TYPE: u16 = 16;
const ATTRIBUTE_MIGRATE: u16 = 17;
const ATTRIBUTE_AEAD: u16 = 18;
const ATTRIBUTE_MARK: u16 = 21;
const ATTRIBUTE_OFFLOAD_DEVICE: u16 = 28;
const ATTRIBUTE_IF_ID: u16 = 31;
/// `XFRMA_SET_MARK` and `XFRMA_SET_MARK_MASK`
const ATTRIBUTES_SET_MARK: [u16; 2] = [29, 30];
/// `XFRMA_SA_DIR`, Linux 6.10.
const ATTRIBUTE_DIRECTION: u16 = 33;
/// `XFRMA_SA_PCPU`, Linux 6.13.
const ATTRIBUTE_CPU: u16 = 35;

/// `XFRMA_SPD_IPV4_HTHRESH` and `XFRMA_SPD_IPV6_HTHRESH`, in messages about the policy database.
const ATTRIBUTES_THRESHOLDS: [u16; 2] = [3, 4];

/// `XFRM_MIGRATE_STATE_CLEAR_OFFLOAD`
const CLEAR_OFFLOAD: u32 = 1;

/// `XFRM_STATE_WILDRECV`
const WILDCARD_RECEIVE: u8 = 8;

pub(crate) const REQUEST: u16 = 1;
pub(crate) const ACKNOWLEDGE: u16 = 4;
pub(crate) const DUMP: u16 = 0x300;
const HEADER_LENGTH: usize = 16;
/// Lengths of `struct xfrm_userpolicy_info`, `struct xfrm_userpolicy_id` and `struct xfrm_usersa_info`.
const POLICY_LENGTH: usize = 168;
const POLICY_ID_LENGTH: usize = 64;
const ASSOCIATION_LENGTH: usize = 224;
/// Length of `struct xfrm_usersa_id`.
const ASSOCIATION_ID_LENGTH: usize = 24;
/// A limit that no test reaches.
const MANY_PACKETS: u64 = 1 << 40;
/// The lifetime in seconds of what does not expire.
const FOREVER: u64 = 0;

/// Requests that are sent at once: all acknowledgements fit into a receive buffer.
pub(crate) const BATCH: usize = 100;
/// The kernel never makes a datagram longer.
const LONGEST_DATAGRAM: usize = 1 << 16;

/// A socket to make requests on, in the network namespace of the thread that opened it.
pub(crate) struct Requests {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Requests {
    /// One for policies and associations.
    pub(crate) fn open() -> io::Result<Self> {
        Self::to(NETLINK_XFRM)
    }

    /// One to this part of the kernel (`NETLINK_…`).
    pub(crate) fn to(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; LONGEST_DATAGRAM] })
    }

    /// Makes requests, at most [`BATCH`], and returns when the kernel has acknowledged them: what became of each.
    pub(crate) fn make(
        &mut self,
        messages: impl IntoIterator<Item = Message>,
    ) -> anyhow::Result<Vec<io::Result<()>>> {
        self.make_with(0, messages)
    }

    /// The same with these flags besides (`NLM_F_…`).
    pub(crate) fn make_with(
        &mut self,
        flags: u16,
        messages: impl IntoIterator<Item = Message>,
    ) -> anyhow::Result<Vec<io::Result<()>>> {
        let first = self.sequence + 1;
        let mut batch = Vec::new();
        for message in messages {
            self.sequence += 1;
            batch.extend(message.bytes(REQUEST | ACKNOWLEDGE | flags, self.sequence));
        }
        self.socket.send_to(&batch, &SocketAddr::new(0, 0), 0)?;
        (first..=self.sequence)
            .map(|sequence| {
                let answer = self.receive()?;
                let (acknowledged, error) =
                    acknowledgement(answer).context("an acknowledgement is cut short")?;
                ensure!(acknowledged == sequence, "{acknowledged} acknowledged instead of {sequence}");
                Ok(if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-error)) })
            })
            .collect()
    }

    /// Asks for something that is not a dump, and returns the datagram that answers it.
    pub(crate) fn ask(&mut self, message: &Message) -> anyhow::Result<Bytes> {
        self.send(message, 0)?;
        let answer = Bytes::copy_from_slice(self.receive()?);
        match &decode(&answer)?[..] {
            [netlink::Message { content: Content::Error(errno), .. }] => {
                bail!(io::Error::from_raw_os_error(*errno))
            }
            _ => Ok(answer),
        }
    }

    /// What the kernel has: associations, larval ones with an SPI among them, policies and the default policy, one after
    /// the other.
    pub(crate) fn dump(&mut self) -> anyhow::Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        for message in everything() {
            self.send(&message, DUMP)?;
            let mut done = false;
            while !done {
                let datagram = Bytes::copy_from_slice(self.receive()?);
                for message in decode(&datagram)? {
                    match message.content {
                        Content::Event(PolicyEvent::Sa(sa)) => snapshot.sas.push(sa),
                        Content::Larval(sa) if sa.id.spi != 0 => snapshot.sas.push(sa),
                        Content::Event(PolicyEvent::Policy(policy)) => snapshot.policies.push(policy),
                        Content::Done(0) => done = true,
                        Content::Done(errno) | Content::Error(errno) => {
                            bail!(io::Error::from_raw_os_error(errno))
                        }
                        _ => {}
                    }
                }
            }
        }
        let mut message = Message::new(GETDEFAULT);
        message.0.extend([0; 4]);
        for message in decode(&self.ask(&message)?)? {
            if let Content::Event(PolicyEvent::DefaultPolicy(default_policy)) = message.content {
                snapshot.default_policy = default_policy;
            }
        }
        Ok(snapshot)
    }

    fn send(&mut self, message: &Message, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let request = message.bytes(REQUEST | flags, self.sequence);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0).map(drop)
    }

    fn receive(&mut self) -> io::Result<&[u8]> {
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        Ok(&self.buffer[..length])
    }
}

/// Makes a request in this thread's network namespace, and returns when the kernel has acknowledged it.
///
/// # Errors
///
/// What the kernel answered, or the errno of a system call.
pub fn make(message: &Message) -> anyhow::Result<()> {
    Requests::open()?.make([message.clone()])?.pop().context("a request without an acknowledgement")??;
    Ok(())
}

/// The sequence number of what was acknowledged, and the error.
pub(crate) fn acknowledgement(answer: &[u8]) -> Option<(u32, i32)> {
    let number = |at: usize| answer.get(at..).and_then(|bytes| bytes.first_chunk().copied());
    Some((u32::from_ne_bytes(number(8)?), i32::from_ne_bytes(number(16)?)))
}

/// A change of policies.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Adds a policy.
    Add(Policy),
    /// Changes the policy with the same identity.
    Update(Policy),
    /// Deletes a policy, by its selector or, if it is given, by its index.
    Delete {
        /// Which.
        id: PolicyId,
        /// Its index.
        index: Option<u32>,
    },
    /// Deletes all policies of a type.
    Flush(PolicyType),
    /// Sets the default policy.
    Default(DefaultPolicy),
    /// Changes nothing; the source starts over with a snapshot.
    Resynchronise,
}

/// A message to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message(Vec<u8>);

/// The request for a change.
#[must_use]
pub fn request(change: &Change) -> Message {
    match change {
        Change::Add(policy) => Message::policy(NEWPOLICY, policy, FOREVER),
        Change::Update(policy) => Message::policy(UPDPOLICY, policy, FOREVER),
        Change::Delete { id, index } => Message::deletion(id, *index),
        Change::Flush(table) => Message::flush(*table),
        Change::Default(default_policy) => Message::default_policy(*default_policy),
        // `NLMSG_NOOP`
        Change::Resynchronise => Message::new(1),
    }
}

/// The requests for all associations and all policies.
pub(crate) fn everything() -> [Message; 2] {
    [(GETSA, ASSOCIATION_ID_LENGTH), (GETPOLICY, POLICY_ID_LENGTH)].map(|(kind, fixed)| {
        let mut message = Message::new(kind);
        message.0.resize(HEADER_LENGTH + fixed, 0);
        message
    })
}

/// The request for a policy that expires.
pub(crate) fn temporary(policy: &Policy, seconds: u64) -> Message {
    Message::policy(NEWPOLICY, policy, seconds)
}

/// What the kernel tells when a policy was deleted by its selector.
pub(crate) fn told_deletion(policy: &Policy) -> Message {
    let mut message = Message::deletion(&policy.id, None);
    let described = Message::policy(NEWPOLICY, policy, FOREVER);
    message.attribute(ATTRIBUTE_POLICY, &described.0[HEADER_LENGTH..HEADER_LENGTH + POLICY_LENGTH]);
    message
}

/// The request for a larval association with this SPI, which the kernel answers with the association.
#[must_use]
pub fn allocation(sa: &SecurityAssociation) -> Message {
    let mut message = Message::association(ALLOCSPI, sa);
    // The least and the greatest that it may be.
    message.0.extend([sa.id.spi.to_ne_bytes(); 2].concat());
    message
}

/// What the kernel tells when an association was added.
pub(crate) fn told_association(sa: &SecurityAssociation) -> Message {
    let mut message = Message::association(NEWSA, sa);
    message.offload(sa.offload);
    message
}

/// The request for an association with AES-GCM-128 that has this key, salt included, and no limits.
pub(crate) fn keyed_association(sa: &SecurityAssociation, key: &[u8; 20]) -> Message {
    let mut message = Message::association(NEWSA, sa);
    // Soft and hard limits of bytes and of packets, after the selector, the identity and the source.
    message.0[HEADER_LENGTH + 96..][..32].fill(u8::MAX);
    // `struct xfrm_algo_aead`, with lengths in bits.
    let mut algorithm = [0; 64 + 8];
    algorithm[..17].copy_from_slice(b"rfc4106(gcm(aes))");
    algorithm[64..68].copy_from_slice(&160_u32.to_ne_bytes());
    algorithm[68..].copy_from_slice(&128_u32.to_ne_bytes());
    message.attribute(ATTRIBUTE_AEAD, &[&algorithm[..], key].concat());
    message.offload(sa.offload);
    if sa.sets_mark {
        for (attribute, value) in ATTRIBUTES_SET_MARK.into_iter().zip([1_u32, u32::MAX]) {
            message.attribute(attribute, &value.to_ne_bytes());
        }
    }
    if let Some(cpu) = sa.cpu {
        // The kernel takes none without a direction; 2 is out.
        message.attribute(ATTRIBUTE_DIRECTION, &[2]);
        message.attribute(ATTRIBUTE_CPU, &cpu.to_ne_bytes());
    }
    message
}

/// The request to move a policy, and the associations of its template, to other outer addresses. Associations keep their
/// offload only if it is asked for, and if the kernel knows how (Linux 6.16).
#[must_use]
pub fn migration(
    id: &PolicyId,
    old: &Template,
    new: (IpAddr, IpAddr),
    offload: Option<OffloadDev>,
) -> Message {
    let mut message = Message::deletion(id, None);
    message.0[4..6].copy_from_slice(&MIGRATE.to_ne_bytes());
    // `struct xfrm_user_migrate`
    let mut migrate = [old.destination, old.source, new.1, new.0].map(address).concat();
    migrate.extend([old.protocol, mode(old.mode), 0, 0]);
    migrate.extend(old.reqid.to_ne_bytes());
    migrate.extend([old.destination, new.1].map(|outer| address_family(outer).to_ne_bytes()).concat());
    message.attribute(ATTRIBUTE_MIGRATE, &migrate);
    message.offload(offload);
    message
}

/// The request to move one association to other outer addresses, and no policy (Linux 7.2). It loses its offload.
#[must_use]
pub fn moved_association(sa: &SecurityAssociation, new: (IpAddr, IpAddr)) -> Message {
    let mut message = deleted_association(&sa.id);
    message.0[4..6].copy_from_slice(&MIGRATE_STATE.to_ne_bytes());
    // The rest of `struct xfrm_user_migrate_state`: no mark, and a selector that matches everything of a family.
    message.0.extend([new.1, new.0].map(address).concat());
    message.0.extend([0; 8]);
    let family = address_family(new.1).to_ne_bytes();
    message.0.extend([[0; 40].as_slice(), &family, &[0; 14]].concat());
    message.0.extend([sa.reqid, CLEAR_OFFLOAD].map(u32::to_ne_bytes).concat());
    message.0.extend([family, [0; 2]].concat());
    message
}

/// The request to hash policies whose prefixes have at least so many bits (local and remote), for both families. The
/// kernel sorts all of them anew.
#[must_use]
pub fn thresholds(bits: [[u8; 2]; 2]) -> Message {
    let mut message = Message::new(NEWSPDINFO);
    message.0.extend([0; 4]);
    for (kind, bits) in ATTRIBUTES_THRESHOLDS.into_iter().zip(bits) {
        message.attribute(kind, &bits);
    }
    message
}

/// The request to delete an association.
pub(crate) fn deleted_association(id: &SaId) -> Message {
    let mut message = Message::new(DELSA);
    message.0.extend(address(id.destination));
    message.0.extend(id.spi.to_be_bytes());
    message.0.extend(address_family(id.destination).to_ne_bytes());
    message.0.extend([id.protocol, 0]);
    message
}

/// The request to delete all associations.
pub(crate) fn flushed_associations() -> Message {
    let mut message = Message::new(FLUSHSA);
    message.0.push(u8::MAX);
    message
}

impl Message {
    /// One of this kind, with nothing in it.
    pub(crate) fn new(kind: u16) -> Self {
        let mut bytes = vec![0; HEADER_LENGTH];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        Self(bytes)
    }

    /// Puts a structure behind the header.
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// As it is sent.
    pub(crate) fn bytes(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let mut bytes = self.0.clone();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn policy(kind: u16, policy: &Policy, seconds: u64) -> Self {
        let mut message = Self::new(kind);
        message.selector(&policy.id.selector);
        let packets = if policy.use_limited { MANY_PACKETS } else { u64::MAX };
        // Soft and hard limits of bytes, of packets, of seconds since the addition, of seconds since the first use;
        // then what was used.
        for limit in [u64::MAX, u64::MAX, packets, packets, 0, seconds, 0, 0, 0, 0, 0, 0] {
            message.0.extend(limit.to_ne_bytes());
        }
        message.0.extend(policy.priority.to_ne_bytes());
        message.0.extend(policy.index.to_ne_bytes());
        let action = u8::from(policy.action == Action::Block);
        message.0.extend([direction(policy.id.direction), action, u8::from(policy.asks_per_cpu) * 4, 0]);
        message.0.resize(HEADER_LENGTH + POLICY_LENGTH, 0);
        message.identity(&policy.id);
        if !policy.templates.is_empty() {
            let family = policy.id.selector.family();
            let templates: Vec<u8> =
                policy.templates.iter().flat_map(|template| template_bytes(template, family)).collect();
            message.attribute(ATTRIBUTE_TEMPLATE, &templates);
        }
        message.offload(policy.offload);
        message
    }

    /// `struct xfrm_usersa_info`
    fn association(kind: u16, sa: &SecurityAssociation) -> Self {
        let mut message = Self::new(kind);
        // No selector.
        message.0.extend([0; 56]);
        message.0.extend(address(sa.id.destination));
        message.0.extend(sa.id.spi.to_be_bytes());
        message.0.extend([sa.id.protocol, 0, 0, 0]);
        message.0.extend(address(sa.source));
        // Limits, what was used, statistics and a sequence number.
        message.0.extend([0; 64 + 32 + 12 + 4]);
        message.0.extend(sa.reqid.to_ne_bytes());
        message.0.extend(address_family(sa.id.destination).to_ne_bytes());
        let flags = if sa.receives_only { WILDCARD_RECEIVE } else { 0 };
        message.0.extend([mode(sa.mode), 0, flags]);
        message.0.resize(HEADER_LENGTH + ASSOCIATION_LENGTH, 0);
        message
    }

    fn deletion(id: &PolicyId, index: Option<u32>) -> Self {
        let mut message = Self::new(DELPOLICY);
        match index {
            Some(_) => message.0.extend([0; 56]),
            None => message.selector(&id.selector),
        }
        message.0.extend(index.unwrap_or(0).to_ne_bytes());
        message.0.push(direction(id.direction));
        message.0.resize(HEADER_LENGTH + POLICY_ID_LENGTH, 0);
        message.identity(id);
        message
    }

    fn flush(table: PolicyType) -> Self {
        let mut message = Self::new(FLUSHPOLICY);
        message.attribute(ATTRIBUTE_POLICY_TYPE, &policy_type(table));
        message
    }

    fn default_policy(default_policy: DefaultPolicy) -> Self {
        let mut message = Self::new(SETDEFAULT);
        let action = |action| if action == Action::Block { 1 } else { 2 };
        let DefaultPolicy { inbound, forward, outbound } = default_policy;
        message.0.extend([action(inbound), action(forward), action(outbound), 0]);
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

    fn offload(&mut self, offload: Option<OffloadDev>) {
        if let Some(OffloadDev { ifindex, kind, inbound }) = offload {
            let flags = u8::from(kind == OffloadKind::Packet) * 4 + u8::from(inbound) * 2;
            let device = [ifindex.to_ne_bytes(), [flags, 0, 0, 0]].concat();
            self.attribute(ATTRIBUTE_OFFLOAD_DEVICE, &device);
        }
    }

    fn selector(&mut self, selector: &Selector) {
        self.0.extend(address(selector.destination.addr()));
        self.0.extend(address(selector.source.addr()));
        for port in [selector.destination_port, selector.source_port] {
            self.0.extend(port.port.to_be_bytes());
            self.0.extend(port.mask.to_be_bytes());
        }
        self.0.extend(address_family(selector.destination.addr()).to_ne_bytes());
        self.0.extend([selector.destination.prefix_len(), selector.source.prefix_len()]);
        self.0.extend([selector.protocol, 0, 0, 0]);
        self.0.extend(selector.ifindex.to_ne_bytes());
        self.0.extend(selector.user.to_ne_bytes());
    }

    /// Adds an attribute.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

fn template_bytes(template: &Template, family: Family) -> Vec<u8> {
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
    bytes.extend([mode(template.mode), 0, u8::from(template.optional), 0]);
    // Every algorithm of each kind.
    bytes.extend([u8::MAX; 12]);
    bytes
}

fn mode(mode: Mode) -> u8 {
    match mode {
        Mode::Transport => 0,
        Mode::Tunnel => 1,
        Mode::Other(mode) => mode,
    }
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

fn address_family(address: IpAddr) -> u16 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
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
    use fastswan::policy::Mark;

    use super::*;
    use crate::xfrm::CAPTURED;

    /// What a request says is what was to be said, by the decoder that knows the kernel's messages.
    #[test]
    fn what_the_kernel_has_can_be_asked_for_again() {
        let mut policies = 0;
        for (name, datagram) in CAPTURED {
            for message in decode(&Bytes::from_static(datagram)).unwrap_or_default() {
                let Content::Event(PolicyEvent::Policy(policy)) = message.content else { continue };
                let request = Bytes::from(request(&Change::Add(policy.clone())).bytes(REQUEST, 7));
                let again = decode(&request).unwrap();
                let [again] = &again[..] else { panic!("{name}: {again:?}") };
                assert_eq!(again.sequence, 7);
                assert_eq!(again.content, Content::Event(PolicyEvent::Policy(policy)), "{name}");
                policies += 1;
            }
        }
        assert!(policies > 15, "{policies}");
    }

    #[test]
    fn what_the_kernel_would_tell_about_offloads_can_be_told_in_its_stead() {
        let content = |message: Message| {
            let mut messages = decode(&Bytes::from(message.bytes(0, 0))).unwrap();
            messages.pop().unwrap().content
        };
        let selector =
            Selector::between("10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()).unwrap();
        let offload = Some(OffloadDev { ifindex: 7, kind: OffloadKind::Packet, inbound: false });
        let policy = Policy { index: 9, offload, ..Policy::new(PolicyId::new(Direction::Out, selector)) };
        let removed = Content::Event(PolicyEvent::PolicyRemoved(policy.id.clone()));
        assert_eq!(content(told_deletion(&policy)), removed);
        assert_eq!(
            content(request(&Change::Add(policy.clone()))),
            Content::Event(PolicyEvent::Policy(policy))
        );

        let template = Template::esp_tunnel("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap(), 3);
        let sa = SecurityAssociation { offload, ..SecurityAssociation::for_template(&template, 0x101) };
        let id = sa.id;
        assert_eq!(content(told_association(&sa)), Content::Larval(sa));
        assert_eq!(content(deleted_association(&id)), Content::Event(PolicyEvent::SaRemoved(id)));
        let elsewhere = ("192.0.2.1".parse().unwrap(), "192.0.2.9".parse().unwrap());
        let sa = SecurityAssociation::for_template(&template, 0x101);
        let moved = moved_association(&sa, elsewhere);
        assert_eq!(moved.bytes(0, 0).len(), HEADER_LENGTH + 132, "the length that the kernel asks for");
        assert_eq!(content(moved), Content::Migrated);
        let flushed = Content::Event(PolicyEvent::SasFlushed(u8::MAX));
        assert_eq!(content(flushed_associations()), flushed);
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
        let policy = Policy {
            priority: 5,
            use_limited: true,
            asks_per_cpu: true,
            action: Action::Block,
            ..Policy::new(id)
        };
        let messages =
            decode(&Bytes::from(request(&Change::Update(policy.clone())).bytes(REQUEST, 1))).unwrap();
        assert_eq!(messages[0].content, Content::Event(PolicyEvent::Policy(policy)));
    }
}
