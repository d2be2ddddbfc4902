//! Where a frame came in.

use fastswan_ebpf::{PassReason, Port, Value, find, hash, port_key, port_position};

use super::{
    lookup::Entries,
    maps::{CONTROL, PORT_BUCKETS, PORTS},
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
pub(super) fn port(ifindex: u32, vlan: u16) -> Result<Arrival, PassReason> {
    let port = record(ifindex, vlan).ok_or(PassReason::UnknownPort)?;
    let flags_and_receiver = port.flags_and_receiver.load();
    Ok(Arrival {
        ifindex,
        address: port.address.load(),
        flags: flags_and_receiver & 0xffff_ffff,
        receiver: (flags_and_receiver >> 32) as u32,
    })
}

#[inline(always)]
fn record(ifindex: u32, vlan: u16) -> Option<&'static Port> {
    let key = port_key(ifindex, vlan);
    let port = PORTS.get(port_position(ifindex, vlan))?;
    if port.key.load() == key {
        return Some(port);
    }
    PORTS.get(displaced(key) as u32)
}

/// The index of a port that lies elsewhere, or one beyond all if there is none. A function of its own to the verifier.
#[inline(never)]
extern "C" fn displaced(key: u64) -> u64 {
    const NOWHERE: u64 = u32::MAX as u64;
    let Some(control) = CONTROL.get(0) else { return NOWHERE };
    let (start, buckets) = (control.ports_start.load(), control.ports_buckets.load());
    let hashed = hash(&[key], start, Value::numbered(0), buckets);
    match find(&Entries(&PORT_BUCKETS), &[key], &hashed) {
        Some(entry) => u64::from(entry.payload()),
        None => NOWHERE,
    }
}
