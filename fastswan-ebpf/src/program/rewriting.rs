//! What changes in a frame that is forwarded.

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
    programs::XdpContext,
};
use fastswan_ebpf::{
    PassReason,
    wire::{Addresses, ETHERNET_LENGTH, ETHERTYPE_IPV4, Ethernet, Frame, Ipv4, Ipv6},
};

use super::headers::checksum_after_ttl_decrement;

/// Takes VLAN tags and Ethernet padding off the frame. The frame's bytes are as before if this fails.
#[inline(always)]
pub(super) fn strip(context: &XdpContext, tags: usize, padding: usize) -> Result<(), PassReason> {
    // SAFETY: helper calls on the program's own context; pointers into the frame are not used after them.
    unsafe {
        if tags != 0 && bpf_xdp_adjust_head(context.ctx, tags as i32) != 0 {
            return Err(PassReason::EgressUnavailable);
        }
        if padding != 0 && bpf_xdp_adjust_tail(context.ctx, -(padding as i32)) != 0 {
            bpf_xdp_adjust_head(context.ctx, -(tags as i32));
            return Err(PassReason::EgressUnavailable);
        }
    }
    Ok(())
}

#[inline(always)]
pub(super) fn write_ethernet(frame: Frame, addresses: Addresses, ether_type: u16) -> Result<(), PassReason> {
    let ethernet = frame.header::<Ethernet>(0)?;
    // SAFETY: bounds-checked.
    unsafe {
        (*ethernet).addresses = addresses;
        (*ethernet).ether_type = ether_type.to_be();
    }
    Ok(())
}

#[inline(always)]
pub(super) fn decrement_ttl(frame: Frame, ether_type: u16) -> Result<(), PassReason> {
    if ether_type == ETHERTYPE_IPV4 {
        let ip = frame.header::<Ipv4>(ETHERNET_LENGTH)?;
        // SAFETY: bounds-checked.
        unsafe {
            (*ip).ttl -= 1;
            (*ip).checksum = checksum_after_ttl_decrement((*ip).checksum);
        }
    } else {
        let ip = frame.header::<Ipv6>(ETHERNET_LENGTH)?;
        // SAFETY: bounds-checked.
        unsafe { (*ip).hop_limit -= 1 };
    }
    Ok(())
}
