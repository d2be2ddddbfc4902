//! What the kernel knows about IPsec: policies, their selectors and templates, and security associations.
//!
//! The terms are those of RFC 4301 and `ip-xfrm(8)`. Values come from a [`PolicySource`](crate::PolicySource)
//! and end up in the [`Database`](crate::Database). Nothing here does I/O. Addresses and ports are in host
//! order, as everywhere in the Rust standard library.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use smallvec::SmallVec;

/// `IPPROTO_ESP`, the only IPsec protocol that NICs take over (RFC 4303).
pub const IPPROTO_ESP: u8 = 50;

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

/// A port match: a packet matches if `(packet.port ^ port) & mask == 0`. Host order.
///
/// For ICMP and ICMPv6 the kernel puts the type where the source port is and the code where the
/// destination port is.
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

/// How a security association wraps packets (`XFRM_MODE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Only the payload is protected; hosts only.
    Transport,
    /// The whole packet is protected, inside a new one.
    Tunnel,
    /// Another mode of the kernel, by its number; never fast.
    Other(u8),
}

/// One step of what a policy asks for (`struct xfrm_user_tmpl`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Template {
    /// Tunnel or transport.
    pub mode: Mode,
    /// IPsec protocol, [`IPPROTO_ESP`] for NICs.
    pub protocol: u8,
    /// The SPI, if the policy is bound to one association; 0 is any.
    pub spi: u32,
    /// Outer source address.
    pub source: IpAddr,
    /// Outer destination address.
    pub destination: IpAddr,
    /// Binds a policy to the associations that have the same number. Outbound, 0 is a number like others
    /// (`xfrm_state_find`).
    pub reqid: u32,
    /// The step may be left out when there is no association (`level use`).
    pub optional: bool,
}

impl Template {
    /// A required ESP tunnel between two outer addresses, for associations with this reqid and any SPI.
    #[must_use]
    pub fn esp_tunnel(source: IpAddr, destination: IpAddr, reqid: u32) -> Self {
        Self {
            mode: Mode::Tunnel,
            protocol: IPPROTO_ESP,
            spi: 0,
            source,
            destination,
            reqid,
            optional: false,
        }
    }
}

/// The templates of a policy. Nearly all policies have one, which then is part of them: `[template].into()`.
pub type Templates = SmallVec<[Template; 1]>;

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

/// What makes two policies the same policy to the kernel.
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
    pub security_context: Vec<u8>,
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
            security_context: Vec::new(),
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

/// One IPsec policy, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// How its packets leave the device when they take the fast path.
    pub egress: Egress,
}

impl Policy {
    /// A policy that allows, with priority 0 and nothing else set.
    #[must_use]
    pub fn new(id: PolicyId) -> Self {
        Self {
            id,
            index: 0,
            priority: 0,
            action: Action::Allow,
            templates: Templates::new(),
            offload: None,
            use_limited: false,
            asks_per_cpu: false,
            expires: None,
            egress: Egress::default(),
        }
    }

    /// Whether the kernel gave the policy to a device that does all of IPsec.
    #[must_use]
    pub fn is_packet_offloaded(&self) -> bool {
        matches!(self.offload, Some(OffloadDev { kind: OffloadKind::Packet, .. }))
    }
}

/// How fast packets of a policy leave. The kernel does not tell; sources and embedders may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Egress {
    /// The Ethernet header they leave with.
    pub next_hop: NextHop,
    /// The longest packet, in bytes from the IP header on, that may be fast. `None` derives it from the
    /// association and the MTU of the path; if that is not known, nothing is fast.
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
    /// destination of the policy's template. Not resolvable: nothing is fast.
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

/// What makes two security associations the same to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaId {
    /// Outer destination address.
    pub destination: IpAddr,
    /// SPI; never 0, which marks an association that the kernel is still asking for.
    pub spi: u32,
    /// IPsec protocol.
    pub protocol: u8,
    /// Mark match.
    pub mark: Mark,
}

impl fmt::Display for SaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dst {} proto {} spi {:#010x}", self.destination, self.protocol, self.spi)
    }
}

/// A security association (RFC 4301 section 4.1), without its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecurityAssociation {
    /// Its identity.
    pub id: SaId,
    /// Outer source address.
    pub source: IpAddr,
    /// The number that binds policies to it.
    pub reqid: u32,
    /// Tunnel or transport.
    pub mode: Mode,
    /// Interface id; 0 is none.
    pub if_id: u32,
    /// The packets that may use it; `None` is every packet.
    pub selector: Option<Selector>,
    /// The processor whose packets may use it (`XFRMA_SA_PCPU`, Linux 6.13 and updates of 6.12); `None` is every one.
    pub cpu: Option<u32>,
    /// The kernel protects no packets with it: it has `XFRM_STATE_WILDRECV`, or is inbound (`XFRMA_SA_DIR`, Linux 6.10).
    pub receives_only: bool,
    /// It has a security context (`XFRMA_SEC_CTX`): only policies that have one, too, use it.
    pub has_security_context: bool,
    /// The device it is offloaded to.
    pub offload: Option<OffloadDev>,
    /// Bytes it adds to a packet: outer header, ESP header, IV, trailer and ICV, UDP encapsulation.
    /// `None` if the algorithm is not one that NICs have.
    pub overhead: Option<Overhead>,
    /// When the kernel deletes it for its age or for the time since its first use, at the earliest, in seconds since
    /// 1970 by the wall clock; `None` is never. A number of packets or bytes is not here: of a packet-offloaded
    /// association the device counts them, and its kernel hands packets to it all the same.
    pub expires: Option<u64>,
}

impl SecurityAssociation {
    /// The association that a template asks for, with this SPI: for packets of every kind, and not offloaded.
    #[must_use]
    pub fn for_template(template: &Template, spi: u32) -> Self {
        let Template { protocol, destination, .. } = *template;
        Self {
            id: SaId { destination, spi, protocol, mark: Mark::default() },
            source: template.source,
            reqid: template.reqid,
            mode: template.mode,
            if_id: 0,
            selector: None,
            cpu: None,
            receives_only: false,
            has_security_context: false,
            offload: None,
            overhead: None,
            expires: None,
        }
    }

    /// Whether a device does all of IPsec for the packets that leave under this association.
    #[must_use]
    pub fn is_outbound_packet_offload(&self) -> bool {
        matches!(self.offload, Some(OffloadDev { kind: OffloadKind::Packet, inbound: false, .. }))
    }
}

/// How an association makes packets longer (RFC 4303 section 2, RFC 4106 section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Overhead {
    /// Bytes before the encrypted part: outer IP header in tunnel mode, UDP encapsulation, ESP header and IV.
    pub header: u16,
    /// Bytes after it: the ICV.
    pub icv: u16,
}

impl Overhead {
    /// For `rfc4106(gcm(aes))` in tunnel mode: the only algorithm that packet-offload NICs have today.
    ///
    /// `outer` is the family of the outer header, `icv` the length of the ICV in bytes (8, 12 or 16).
    #[must_use]
    pub fn aes_gcm_tunnel(outer: Family, udp_encapsulation: bool, icv: u16) -> Self {
        let ip = match outer {
            Family::V4 => 20,
            Family::V6 => 40,
        };
        let esp_header_and_iv = 16;
        let udp = if udp_encapsulation { 8 } else { 0 };
        Self { header: ip + udp + esp_header_and_iv, icv }
    }

    /// The longest inner packet that fits into an outer path of `mtu` bytes, as the kernel computes it
    /// (`xfrm_state_mtu`): the encrypted part is a multiple of 4 bytes and ends with 2 bytes of trailer.
    #[must_use]
    pub fn longest_inner_packet(self, mtu: u16) -> u16 {
        let encrypted = mtu.saturating_sub(self.header).saturating_sub(self.icv) & !3;
        encrypted.saturating_sub(2)
    }
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

    #[test]
    fn an_esp_tunnel_over_ethernet_carries_what_the_kernel_says_it_carries() {
        // `ip route get` over an AES-GCM-16 tunnel on a 1500-byte link shows mtu 1446 (IPv4) and 1426 (IPv6).
        assert_eq!(Overhead::aes_gcm_tunnel(Family::V4, false, 16).longest_inner_packet(1500), 1446);
        assert_eq!(Overhead::aes_gcm_tunnel(Family::V6, false, 16).longest_inner_packet(1500), 1426);
        assert_eq!(Overhead::aes_gcm_tunnel(Family::V6, false, 16).longest_inner_packet(40), 0);
    }

    #[test]
    fn a_selector_between_families_is_refused() {
        let v4 = "10.0.0.0/8".parse().unwrap();
        let v6 = "2001:db8::/32".parse().unwrap();
        assert_eq!(Selector::between(v4, v6), Err(MixedFamilies { one: v4, other: v6 }));
    }
}
