//! Security associations.

use std::{fmt, net::IpAddr};

use super::{Family, Mark, Mode, OffloadDev, OffloadKind, Origin, Selector, Template};

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
    /// The source that told of it, if several were merged: to the kernel of each it is another one.
    pub origin: Origin,
}

impl SaId {
    /// The identity of an association without a mark.
    #[must_use]
    pub fn new(destination: IpAddr, spi: u32, protocol: u8) -> Self {
        Self { destination, spi, protocol, mark: Mark::default(), origin: Origin::default() }
    }
}

impl fmt::Display for SaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dst {} proto {} spi {:#010x}", self.destination, self.protocol, self.spi)
    }
}

/// A security association (RFC 4301 section 4.1), without its keys.
///
/// ```
/// use fastswan::SecurityAssociation;
/// use fastswan::policy::{Family, OffloadDev, OffloadKind, Overhead, Template};
///
/// let tunnel = Template::esp_tunnel("192.0.2.1".parse()?, "192.0.2.2".parse()?, 7);
/// let association = SecurityAssociation {
///     offload: Some(OffloadDev { ifindex: 3, kind: OffloadKind::Packet, inbound: false }),
///     overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16)),
///     ..SecurityAssociation::for_template(&tunnel, 0x1234_5678)
/// };
/// assert!(association.is_outbound_packet_offload());
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
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
    /// It gives its packets a mark (`XFRMA_SET_MARK`, strongSwan's `set_mark_out`), with which the kernel looks for the route to
    /// its destination: another one than without, if a rule asks for marks. Policies that may use it are not fast.
    pub sets_mark: bool,
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
            id: SaId::new(destination, spi, protocol),
            source: template.source,
            reqid: template.reqid,
            mode: template.mode,
            if_id: 0,
            selector: None,
            cpu: None,
            receives_only: false,
            has_security_context: false,
            sets_mark: false,
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
///
/// ```
/// use fastswan::policy::{Family, Overhead};
///
/// // As `ip route get` over such a tunnel tells for a link of 1500 bytes.
/// assert_eq!(Overhead::aes_gcm_tunnel(Family::V4, false, 16).longest_inner_packet(1500), 1446);
/// ```
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_esp_tunnel_over_ethernet_carries_what_the_kernel_says_it_carries() {
        // `ip route get` over an AES-GCM-16 tunnel on a 1500-byte link shows mtu 1446 (IPv4) and 1426 (IPv6).
        assert_eq!(Overhead::aes_gcm_tunnel(Family::V4, false, 16).longest_inner_packet(1500), 1446);
        assert_eq!(Overhead::aes_gcm_tunnel(Family::V6, false, 16).longest_inner_packet(1500), 1426);
        assert_eq!(Overhead::aes_gcm_tunnel(Family::V6, false, 16).longest_inner_packet(40), 0);
    }
}
