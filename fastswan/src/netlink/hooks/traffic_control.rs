//! Filters of traffic control where packets come in and where they leave.
//!
//! Those are filters of the queueing disciplines `ingress` and `clsact`. Filters of others choose a queue among those of
//! an egress discipline, which the fast path does not pass by design. Every filter counts: nothing is known of what its
//! actions or its program do.

use std::collections::BTreeSet;

use super::{
    attribute::{Attributes, host_u32, needed, text, undecodable},
    devices::Devices,
};
use crate::{
    host::{Hook, HookKind, HookPlace},
    netlink::request::{DUMP, RequestError, Requests},
};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const RTM_NEWCHAIN: u16 = 100;
const RTM_DELCHAIN: u16 = 101;

/// Length of `struct tcmsg` in bytes.
const HEADER: usize = 20;
const TCA_KIND: u16 = 1;
/// `TC_H_CLSACT`, with `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS`.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;

/// Whether a notification of the group `RTNLGRP_TC` says that filters may not be as they were.
pub(super) fn is_change(kind: u16) -> bool {
    matches!(
        kind,
        RTM_NEWQDISC | RTM_DELQDISC | RTM_NEWTFILTER | RTM_DELTFILTER | RTM_NEWCHAIN | RTM_DELCHAIN
    )
}

/// Reads what filters there are.
pub(super) fn read(kernel: &mut Requests, devices: &Devices) -> Result<Vec<Hook>, RequestError> {
    let mut places = BTreeSet::new();
    kernel.ask((RTM_GETQDISC, DUMP, &[0; HEADER]), |kind, payload| {
        if kind == RTM_NEWQDISC {
            let (ifindex, _, qdisc) = message(payload)?;
            match qdisc.as_str() {
                "clsact" => places.extend([(ifindex, INGRESS), (ifindex, EGRESS)]),
                "ingress" => drop(places.insert((ifindex, INGRESS))),
                _ => {}
            }
        }
        Ok::<_, RequestError>(())
    })?;
    let mut hooks = Vec::new();
    for (ifindex, parent) in places {
        hooks.extend(filters(kernel, devices, ifindex, parent)?);
    }
    Ok(hooks)
}

fn filters(
    kernel: &mut Requests,
    devices: &Devices,
    ifindex: u32,
    parent: u32,
) -> Result<Vec<Hook>, RequestError> {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    let mut found = BTreeSet::new();
    let answer = kernel.ask((RTM_GETTFILTER, DUMP, &header), |kind, payload| {
        if kind == RTM_NEWTFILTER {
            let (_, info, filter) = message(payload)?;
            // The upper half is the preference.
            found.insert((info >> 16, filter));
        }
        Ok::<_, RequestError>(())
    });
    match answer {
        // The device or its queueing discipline has gone, which is told.
        Err(RequestError::Refused(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => return Ok(Vec::new()),
        other => other?,
    }
    let (place, hook) = match parent {
        INGRESS => (HookPlace::Ingress(ifindex), "ingress"),
        _ => (HookPlace::Egress(ifindex), "egress"),
    };
    let device = devices.name(ifindex);
    let name = |(preference, kind)| format!("filter {kind} pref {preference} on {device} {hook}");
    let hooks = found.into_iter().map(|filter| Hook { kind: HookKind::Tc, place, name: name(filter) });
    Ok(hooks.collect())
}

/// Interface index, `tcm_info` and kind.
fn message(payload: &[u8]) -> Result<(u32, u32, String), RequestError> {
    let header =
        payload.first_chunk::<HEADER>().ok_or_else(|| undecodable("a message of tc without a header"))?;
    let mut kind = None;
    for attribute in Attributes::behind(payload, HEADER)? {
        if let (TCA_KIND, value) = attribute? {
            kind = Some(text(value));
        }
    }
    Ok((host_u32(&header[4..8])?, host_u32(&header[16..20])?, needed(kind, "the kind of a filter")?))
}

/// tcx programs (Linux 6.6), of which the kernel does not tell.
pub(super) fn tcx(devices: &Devices) -> std::io::Result<Vec<Hook>> {
    use crate::sys::bpf::{Tcx, tcx_programs};

    let mut hooks = Vec::new();
    for ifindex in devices.of_use() {
        for (side, place, hook) in [
            (Tcx::Ingress, HookPlace::Ingress(ifindex), "ingress"),
            (Tcx::Egress, HookPlace::Egress(ifindex), "egress"),
        ] {
            let Some(program) = tcx_programs(ifindex, side)? else { continue };
            let name = format!("tcx program #{program} on {} {hook}", devices.name(ifindex));
            hooks.push(Hook { kind: HookKind::Tc, place, name });
        }
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::hooks::attribute::tests::{bytes, cuts};

    /// As Linux 6.18 has told of a queueing discipline `clsact`, and of a filter u32 with preference 49152.
    const QDISC: &str = "00000000030000000000fffff1ffffff010000000b000100636c7361637400000400020005000c00000000000c00070000000000\
         00000000";
    const FILTER: &str =
        "000000000300000000000080f2ffffff080000c0080001007533320008000b00000000000c0002000800040001000000";

    #[test]
    fn a_message_tells_its_device_and_kind() {
        assert_eq!(message(&bytes(QDISC)).unwrap(), (3, 1, "clsact".to_owned()));
        let (device, info, kind) = message(&bytes(FILTER)).unwrap();
        assert_eq!((device, info >> 16, kind.as_str()), (3, 49152, "u32"));
    }

    #[test]
    fn a_message_cut_short_is_an_error_unless_the_cut_is_between_attributes() {
        for payload in [QDISC, FILTER].map(bytes) {
            for length in cuts(&payload, HEADER) {
                message(&payload[..length]).unwrap_err();
            }
            for length in 0..payload.len() {
                let mut changed = payload.clone();
                changed[length] = 0xff;
                let _ = message(&changed);
                let _ = message(&payload[..length]);
            }
        }
    }
}
