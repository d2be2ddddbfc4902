//! Where a frame came in.

use fastswan_ebpf::{Control, PassReason, find, hash, port_key};

use super::{
    lookup::Entries,
    maps::{PORT_BUCKETS, PORTS},
};

/// The port that a frame came in on, as one read of the table found it.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    pub(super) ifindex: u32,
    pub(super) address: u64,
    pub(super) flags: u64,
    pub(super) receiver: u32,
}

/// The port of an interface and VLAN.
#[inline(always)]
pub(super) fn port(control: &Control, ifindex: u32, vlan: u16) -> Result<Arrival, PassReason> {
    let key = [port_key(ifindex, vlan)];
    let hashed = hash(&key, 0, control.ports.seed.load(), control.ports.bucket_mask.load());
    let entry = find(&Entries(&PORT_BUCKETS), &key, &hashed).ok_or(PassReason::UnknownPort)?;
    let port = PORTS.get(entry.payload()).ok_or(PassReason::UnknownPort)?;
    let flags_and_receiver = port.flags_and_receiver.load();
    Ok(Arrival {
        ifindex,
        address: port.address.load(),
        flags: flags_and_receiver & 0xffff_ffff,
        receiver: (flags_and_receiver >> 32) as u32,
    })
}
