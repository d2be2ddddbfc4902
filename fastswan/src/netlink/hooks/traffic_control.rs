//! Filters of traffic control where packets come in and where they leave.
//!
//! Of the queueing disciplines `ingress` and `clsact` every filter counts: nothing is known of what its actions or its program
//! do. The disciplines that queue what leaves a device have filters, too, and so have their classes. One that only chooses a
//! class changes no packet's fate, and the fast path does not pass the queues by design; one that has an action, or is a
//! program, counts (`tcf_exts_exec`).
//!
//! The kernel lists the filters of one discipline or class at a time. It follows the filters of a class only if that has
//! classes below it (`htb_classify`, `hfsc_classify`), so these are the ones that are asked about.

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
const RTM_NEWTCLASS: u16 = 40;
const RTM_DELTCLASS: u16 = 41;
const RTM_GETTCLASS: u16 = 42;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const RTM_NEWCHAIN: u16 = 100;
const RTM_DELCHAIN: u16 = 101;

/// Length of `struct tcmsg` in bytes.
const HEADER: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// `TC_H_CLSACT`, with `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS`.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
/// `TC_H_ROOT`
const ROOT: u32 = u32::MAX;

/// Disciplines that no filter can be added to (no `tcf_block`), and that most devices have.
const WITHOUT_FILTERS: [&str; 7] = ["noqueue", "pfifo_fast", "pfifo", "bfifo", "mq", "fq", "mqprio"];
/// Disciplines whose classes have no filters of their own (`tcf_block` refuses a class).
const WITHOUT_FILTERS_OF_CLASSES: [&str; 12] =
    ["fq_codel", "cake", "sfq", "sfb", "prio", "multiq", "drr", "qfq", "ets", "red", "tbf", "netem"];

/// The filters that can do without an action, and the attributes in which the kernel tells of one: `TCA_*_ACT` and `TCA_*_POLICE`.
const CLASSIFIERS: [(&str, &[u16]); 8] = [
    ("u32", &[6, 7]),
    ("flower", &[3]),
    ("matchall", &[2]),
    ("basic", &[3, 4]),
    ("fw", &[2, 4]),
    ("route", &[5, 6]),
    ("flow", &[9, 10]),
    ("cgroup", &[1, 2]),
];

/// Whether a notification of the group `RTNLGRP_TC` says that filters may not be as they were.
pub(super) fn is_change(kind: u16) -> bool {
    matches!(
        kind,
        RTM_NEWQDISC
            | RTM_DELQDISC
            | RTM_NEWTCLASS
            | RTM_DELTCLASS
            | RTM_NEWTFILTER
            | RTM_DELTFILTER
            | RTM_NEWCHAIN
            | RTM_DELCHAIN
    )
}

/// Reads what filters there are.
pub(super) fn read(kernel: &mut Requests, devices: &Devices) -> Result<Vec<Hook>, RequestError> {
    let of_use: BTreeSet<u32> = devices.of_use().collect();
    let mut parents = BTreeSet::new();
    let mut with_classes = BTreeSet::new();
    kernel.ask((RTM_GETQDISC, DUMP, &[0; HEADER]), |kind, payload| {
        if kind == RTM_NEWQDISC {
            let qdisc = Message::read(payload)?;
            let ifindex = qdisc.ifindex;
            match qdisc.kind.as_str() {
                "clsact" => parents.extend([(ifindex, INGRESS), (ifindex, EGRESS)]),
                "ingress" => drop(parents.insert((ifindex, INGRESS))),
                kind if WITHOUT_FILTERS.contains(&kind) || !of_use.contains(&ifindex) => {}
                // One without a handle is its device's root, which 0 stands for.
                kind => {
                    parents.insert((ifindex, qdisc.handle));
                    if !WITHOUT_FILTERS_OF_CLASSES.contains(&kind) {
                        with_classes.insert(ifindex);
                    }
                }
            }
        }
        Ok::<_, RequestError>(())
    })?;
    for ifindex in with_classes {
        parents.extend(classes_with_others_below(kernel, ifindex)?.into_iter().map(|class| (ifindex, class)));
    }
    let mut hooks = Vec::new();
    for (ifindex, parent) in parents {
        hooks.extend(filters(kernel, devices, ifindex, parent)?);
    }
    Ok(hooks)
}

/// The classes of a device that are not the lowest ones.
fn classes_with_others_below(kernel: &mut Requests, ifindex: u32) -> Result<BTreeSet<u32>, RequestError> {
    let mut classes = BTreeSet::new();
    let answer = kernel.ask((RTM_GETTCLASS, DUMP, &request(ifindex, 0)), |kind, payload| {
        if kind == RTM_NEWTCLASS {
            classes.insert(Message::read(payload)?.parent);
        }
        Ok::<_, RequestError>(())
    });
    unless_gone(answer)?;
    classes.remove(&ROOT);
    Ok(classes)
}

/// The filters of a discipline or of a class that count.
fn filters(
    kernel: &mut Requests,
    devices: &Devices,
    ifindex: u32,
    parent: u32,
) -> Result<Vec<Hook>, RequestError> {
    let mut found = BTreeSet::new();
    let answer = kernel.ask((RTM_GETTFILTER, DUMP, &request(ifindex, parent)), |kind, payload| {
        if kind == RTM_NEWTFILTER {
            let filter = Message::read(payload)?;
            if matches!(parent, INGRESS | EGRESS) || !filter.only_classifies()? {
                // The upper half is the preference.
                found.insert((filter.info >> 16, filter.kind));
            }
        }
        Ok::<_, RequestError>(())
    });
    unless_gone(answer)?;
    let device = devices.name(ifindex);
    let (place, hook) = match parent {
        INGRESS => (HookPlace::Ingress(ifindex), format!("{device} ingress")),
        EGRESS => (HookPlace::Egress(ifindex), format!("{device} egress")),
        0 => (HookPlace::Egress(ifindex), format!("{device} root")),
        _ => {
            (HookPlace::Egress(ifindex), format!("{device} parent {:x}:{:x}", parent >> 16, parent & 0xffff))
        }
    };
    let name = |(preference, kind)| format!("filter {kind} pref {preference} on {hook}");
    let hooks = found.into_iter().map(|filter| Hook { kind: HookKind::Tc, place, name: name(filter) });
    Ok(hooks.collect())
}

fn request(ifindex: u32, parent: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    header
}

/// The device, its queueing discipline or the class may have gone, which is told.
fn unless_gone(answer: Result<(), RequestError>) -> Result<(), RequestError> {
    match answer {
        Err(RequestError::Refused(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// What a message about a discipline, a class or a filter says.
#[derive(Debug, PartialEq, Eq)]
struct Message<'a> {
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
    kind: String,
    options: &'a [u8],
}

impl<'a> Message<'a> {
    fn read(payload: &'a [u8]) -> Result<Self, RequestError> {
        let header =
            payload.first_chunk::<HEADER>().ok_or_else(|| undecodable("a message of tc without a header"))?;
        let (mut kind, mut options) = (None, &[][..]);
        for attribute in Attributes::behind(payload, HEADER)? {
            match attribute? {
                (TCA_KIND, value) => kind = Some(text(value)),
                (TCA_OPTIONS, value) => options = value,
                _ => {}
            }
        }
        Ok(Self {
            ifindex: host_u32(&header[4..8])?,
            handle: host_u32(&header[8..12])?,
            parent: host_u32(&header[12..16])?,
            info: host_u32(&header[16..20])?,
            kind: needed(kind, "the kind of a filter")?,
            options,
        })
    }

    /// Whether a filter does nothing but choose a class.
    fn only_classifies(&self) -> Result<bool, RequestError> {
        let Some((_, actions)) = CLASSIFIERS.iter().find(|(kind, _)| *kind == self.kind) else {
            return Ok(false);
        };
        for attribute in Attributes::inside(self.options) {
            if actions.contains(&attribute?.0) {
                return Ok(false);
            }
        }
        Ok(true)
    }
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
    use crate::netlink::hooks::attribute::{
        Body,
        tests::{bytes, cuts},
    };

    /// As Linux 6.18 has told of a queueing discipline `clsact`, and of a filter u32 with preference 49152.
    const QDISC: &str = "00000000030000000000fffff1ffffff010000000b000100636c7361637400000400020005000c00000000000c00070000000000\
         00000000";
    const FILTER: &str =
        "000000000300000000000080f2ffffff080000c0080001007533320008000b00000000000c0002000800040001000000";

    #[test]
    fn a_message_tells_its_device_and_kind() {
        let payload = bytes(QDISC);
        let qdisc = Message::read(&payload).unwrap();
        assert_eq!((qdisc.ifindex, qdisc.handle, qdisc.kind.as_str()), (3, 0xffff_0000, "clsact"));
        let payload = bytes(FILTER);
        let filter = Message::read(&payload).unwrap();
        assert_eq!((filter.ifindex, filter.info >> 16, filter.kind.as_str()), (3, 49152, "u32"));
    }

    #[test]
    fn a_filter_without_an_action_only_classifies_if_its_kind_is_known() {
        let only_classifies = |kind: &str, options: &[u16]| {
            let options = options.iter().fold(Body::default(), |body, kind| body.with(*kind, &[1; 4]));
            let message = Body(vec![0; HEADER]).with(TCA_KIND, kind.as_bytes()).with(TCA_OPTIONS, &options.0);
            Message::read(&message.0).unwrap().only_classifies().unwrap()
        };
        // `TCA_U32_CLASSID`, `TCA_U32_SEL`, `TCA_U32_ACT`, `TCA_U32_POLICE`
        assert!(only_classifies("u32", &[1, 5]));
        assert!(!only_classifies("u32", &[1, 5, 7]));
        assert!(!only_classifies("u32", &[1, 5, 6]));
        assert!(only_classifies("flower", &[1, 10]));
        assert!(!only_classifies("flower", &[1, 3]));
        assert!(!only_classifies("bpf", &[]), "a program does anything");
        assert!(!only_classifies("tomorrow", &[]));
    }

    #[test]
    fn a_message_cut_short_is_an_error_unless_the_cut_is_between_attributes() {
        for payload in [QDISC, FILTER].map(bytes) {
            for length in cuts(&payload, HEADER) {
                Message::read(&payload[..length]).unwrap_err();
            }
            for length in 0..payload.len() {
                let mut changed = payload.clone();
                changed[length] = 0xff;
                let _ = Message::read(&changed).and_then(|message| message.only_classifies());
                let _ = Message::read(&payload[..length]);
            }
        }
    }
}
