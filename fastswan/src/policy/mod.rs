//! What the kernel knows about IPsec: policies, their selectors and templates, and security associations.
//!
//! The terms are those of RFC 4301 and `ip-xfrm(8)`. Values come from a [`PolicySource`](crate::PolicySource)
//! and end up in the [`Database`](crate::Database). Nothing here does I/O. Addresses and ports are in host
//! order, as everywhere in the Rust standard library.

mod association;
mod offload;
mod selector;
mod template;

use std::fmt;

pub use self::{
    association::{Overhead, SaId, SecurityAssociation},
    offload::{Egress, MacAddr, NextHop, OffloadDev, OffloadKind, ParseMacAddrError},
    selector::{Family, MixedFamilies, PortMatch, Selector},
    template::{Mode, Template, Templates},
};

/// `IPPROTO_ESP`, the only IPsec protocol that NICs take over (RFC 4303).
pub const IPPROTO_ESP: u8 = 50;

/// One IPsec policy, as the kernel has it.
///
/// ```
/// use fastswan::policy::{Direction, OffloadDev, OffloadKind, Template};
/// use fastswan::{Policy, PolicyId, Selector};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let tunnel = Template::esp_tunnel("192.0.2.1".parse()?, "192.0.2.2".parse()?, 1);
/// let device = OffloadDev { ifindex: 7, kind: OffloadKind::Packet, inbound: false };
/// let policy = Policy {
///     priority: 100,
///     templates: [tunnel].into(),
///     offload: Some(device),
///     ..Policy::new(PolicyId::new(Direction::Out, selector))
/// };
/// assert_eq!(policy.id.to_string(), "out 10.1.0.0/16 → 10.2.0.0/16");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
// Each is a fact of its own, and any of them may be true together.
#[allow(clippy::struct_excessive_bools)]
pub struct Policy {
    /// Its identity.
    pub id: PolicyId,
    /// The kernel's number for it; 0 if its source has none.
    pub index: u32,
    /// Lower is better. The kernel orders offloaded policies first whatever their priority.
    pub priority: u32,
    /// What it does.
    pub action: Action,
    /// What it asks for, outermost last; none is a bypass.
    pub templates: Templates,
    /// The device it is offloaded to.
    pub offload: Option<OffloadDev>,
    /// It ends after a number of packets or bytes, or a time since its last use, which only the kernel counts:
    /// never fast.
    pub use_limited: bool,
    /// The kernel asks for an association for each processor that has packets (`XFRM_POLICY_CPU_ACQUIRE`, Linux 6.13),
    /// and what is fast it would never hear of: never fast.
    pub asks_per_cpu: bool,
    /// When the kernel deletes it for its age, in seconds since 1970 by the wall clock; `None` is never.
    pub expires: Option<u64>,
    /// A [`Mirror`](crate::mirror::Mirror) that has been told to hold it keeps it from being fast. Sources leave it as it is.
    pub held: bool,
    /// How its packets leave the device when they take the fast path.
    pub egress: Egress,
    /// An association that its author vouches for, by what it adds to a packet: the device encrypts all that it is
    /// handed for this policy. It serves this policy alone, and none from elsewhere is looked for.
    pub assumed: Option<Overhead>,
    /// The embedder keeps it from being fast, and it is what it was in all else: see
    /// [`withhold`](crate::PolicySourceExt::withhold).
    pub withheld: bool,
    /// Sources that were [merged](crate::source::adapters::merge) disagree about it: packets that it matches pass,
    /// whatever else matches.
    pub disputed: bool,
    /// The source that told of it, if several were merged.
    pub origin: Origin,
}

/// Which of several [merged](crate::source::adapters::merge) sources told of a policy or an association. Policies are
/// served by associations of their own origin only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin(pub(crate) u32);

impl Policy {
    /// A policy that allows, with priority 0 and nothing else set.
    #[must_use]
    pub fn new(id: PolicyId) -> Self {
        Self {
            id,
            index: 0,
            priority: 0,
            action: Action::Allow,
            templates: Templates::default(),
            offload: None,
            use_limited: false,
            asks_per_cpu: false,
            expires: None,
            held: false,
            egress: Egress::default(),
            assumed: None,
            withheld: false,
            disputed: false,
            origin: Origin::default(),
        }
    }

    /// Whether the kernel gave the policy to a device that does all of IPsec.
    #[must_use]
    pub fn is_packet_offloaded(&self) -> bool {
        matches!(self.offload, Some(OffloadDev { kind: OffloadKind::Packet, .. }))
    }
}

/// What makes two policies the same policy to the kernel.
///
/// ```
/// use fastswan::{PolicyId, Selector, policy::Direction};
///
/// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let id = PolicyId { if_id: 42, ..PolicyId::new(Direction::Out, selector) };
/// assert_eq!(id.to_string(), "out 10.1.0.0/16 → 10.2.0.0/16 if_id 0x2a");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyId {
    /// Direction.
    pub direction: Direction,
    /// Table.
    pub policy_type: PolicyType,
    /// Mark match.
    pub mark: Mark,
    /// Interface id (`XFRMA_IF_ID`); 0 is none.
    pub if_id: u32,
    /// Security context (`XFRMA_SEC_CTX`), as the kernel sent it; empty is none.
    pub security_context: Box<[u8]>,
    /// Selector, byte for byte.
    pub selector: Selector,
}

impl PolicyId {
    /// The identity of a main policy without mark, interface id and security context.
    #[must_use]
    pub fn new(direction: Direction, selector: Selector) -> Self {
        Self {
            direction,
            policy_type: PolicyType::Main,
            mark: Mark::default(),
            if_id: 0,
            security_context: Box::default(),
            selector,
        }
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::In => "in",
            Direction::Out => "out",
            Direction::Forward => "fwd",
        };
        write!(f, "{direction} {}", self.selector)?;
        if self.policy_type == PolicyType::Sub {
            f.write_str(" ptype sub")?;
        }
        if self.mark.mask != 0 {
            write!(f, " mark {:#x}/{:#x}", self.mark.value, self.mark.mask)?;
        }
        if self.if_id != 0 {
            write!(f, " if_id {:#x}", self.if_id)?;
        }
        Ok(())
    }
}

/// The direction a policy applies to (`XFRM_POLICY_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Packets for this host, after decryption.
    In,
    /// Packets that leave: this host's own and forwarded ones.
    Out,
    /// Packets that are forwarded, checked before routing decides where they leave.
    Forward,
}

/// Which of the two policy tables of the kernel a policy is in (`XFRM_POLICY_TYPE_*`).
///
/// Sub policies are looked up first, then main policies as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyType {
    /// The ordinary table.
    #[default]
    Main,
    /// The table of `CONFIG_XFRM_SUB_POLICY`.
    Sub,
}

/// What a policy, or the default for packets without one, does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Action {
    /// Apply the templates; a policy without any is a bypass.
    #[default]
    Allow,
    /// Drop.
    Block,
}

/// A packet mark match: a packet matches if `packet.mark & mask == value`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark {
    /// The value, already masked.
    pub value: u32,
    /// The mask; zero matches every packet.
    pub mask: u32,
}

/// What the kernel does with packets that no policy matches (`XFRM_MSG_GETDEFAULT`, Linux 5.14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DefaultPolicy {
    /// For packets to this host.
    pub inbound: Action,
    /// For forwarded packets.
    pub forward: Action,
    /// For packets that leave.
    pub outbound: Action,
}
