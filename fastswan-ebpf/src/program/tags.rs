//! VLAN tags.

use fastswan_ebpf::{
    PassReason,
    wire::{ETHERNET_LENGTH, Frame, Vlan},
};

const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// The VLAN id (0 if there is none), the type of what follows the tags, and where it begins.
#[inline(always)]
pub(super) fn vlan_and_network(frame: Frame, outer_type: u16) -> Result<(u16, u16, usize), PassReason> {
    if outer_type != ETHERTYPE_VLAN && outer_type != ETHERTYPE_QINQ {
        return Ok((0, outer_type, ETHERNET_LENGTH));
    }
    let outer = frame.header::<Vlan>(ETHERNET_LENGTH)?;
    // SAFETY: bounds-checked.
    let (outer_id, inner_type) =
        unsafe { (u16::from_be((*outer).control) & 0xfff, u16::from_be((*outer).ether_type)) };
    let after_outer = ETHERNET_LENGTH + size_of::<Vlan>();
    if inner_type != ETHERTYPE_VLAN && inner_type != ETHERTYPE_QINQ {
        if outer_type == ETHERTYPE_QINQ {
            // A service tag alone is another VLAN than a customer tag with the same id.
            return Err(PassReason::UnknownPort);
        }
        return Ok((outer_id, inner_type, after_outer));
    }
    let inner = frame.header::<Vlan>(after_outer)?;
    // SAFETY: bounds-checked.
    let (inner_id, ether_type) =
        unsafe { (u16::from_be((*inner).control) & 0xfff, u16::from_be((*inner).ether_type)) };
    // Two tags are known only if one of them is a priority tag: no port is named by a pair of VLANs.
    if outer_type != ETHERTYPE_VLAN || inner_type != ETHERTYPE_VLAN || outer_id != 0 {
        return Err(PassReason::UnknownPort);
    }
    Ok((inner_id, ether_type, after_outer + size_of::<Vlan>()))
}
