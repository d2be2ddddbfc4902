//! Which policies and associations pretend to be offloaded, since no device here takes them: those whose reqid is odd.
//!
//! Unlike [`Promote`](crate::promote::Promote) this assumes no associations: they come and go as policies do. The
//! next hop of each policy names it, so that a frame that was forwarded tells which policy it was for. When they expire is
//! not told: they would be switched off ahead, and nobody would have to hear of it.

use fastswan::{
    Policy, PolicyEvent, SecurityAssociation, Snapshot,
    policy::{Direction, Family, OffloadDev, OffloadKind, Overhead, Template},
};

use crate::promote::naming;

/// Whether a policy is to be offloaded.
pub(super) fn is_offered(policy: &Policy) -> bool {
    policy.id.direction == Direction::Out
        && matches!(policy.templates[..], [Template { reqid, .. }] if reqid % 2 == 1)
}

/// Makes what an event tells look as if it were offloaded to a device, unless it is to another one.
pub(super) fn pretend(event: &mut PolicyEvent, device: u32) {
    match event {
        PolicyEvent::Policy(policy) => pretend_policy(policy, device),
        PolicyEvent::Sa(sa) => pretend_association(sa, device),
        PolicyEvent::Snapshot(snapshot) | PolicyEvent::Audit(snapshot) => pretend_snapshot(snapshot, device),
        _ => {}
    }
}

/// The same of everything.
pub(super) fn pretend_snapshot(snapshot: &mut Snapshot, device: u32) {
    for policy in &mut snapshot.policies {
        pretend_policy(policy, device);
    }
    for sa in &mut snapshot.sas {
        pretend_association(sa, device);
    }
}

fn pretend_policy(policy: &mut Policy, device: u32) {
    if is_offered(policy) {
        policy.offload.get_or_insert(outbound(device));
        policy.egress.next_hop = naming(policy.index);
        policy.expires = None;
    }
}

fn pretend_association(sa: &mut SecurityAssociation, device: u32) {
    if sa.reqid % 2 == 1 {
        sa.offload.get_or_insert(outbound(device));
        sa.expires = None;
        sa.overhead = Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16));
        // The kernel gives larval ones the selector of their outer addresses.
        sa.selector = None;
    }
}

fn outbound(ifindex: u32) -> OffloadDev {
    OffloadDev { ifindex, kind: OffloadKind::Packet, inbound: false }
}
