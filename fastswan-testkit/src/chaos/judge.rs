//! What the mirror must have and do when nothing changes: the kernel's policies, and what a model makes of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastswan::{
    Database, Policy, PolicyEvent, Selector, Snapshot,
    policy::{Action, Direction, Family, PolicyType},
};
use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};

use super::host::{PORT, SENDER};
use crate::frames::Frame;

/// Ports of all packets.
const PORTS: (u16, u16) = (1000, 443);

/// What must become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// It is fast for the policy with this index.
    Fast(u32),
    Pass,
    /// Either: it depends on the order in which policies came, or is a matter of how the table is made.
    FastOrPass(u32),
}

/// A packet of UDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
}

impl Packet {
    /// One that a policy is about, most of the time.
    pub(super) fn near(policies: &[Policy], rng: &mut StdRng) -> Self {
        let outbound: Vec<&Policy> =
            policies.iter().filter(|policy| policy.id.direction == Direction::Out).collect();
        let everything = |v6| if v6 { "2001:db8:2::/48" } else { "10.2.0.0/16" };
        match outbound.choose(rng) {
            Some(policy) if rng.random_bool(0.95) => {
                let Selector { source, destination, .. } = policy.id.selector;
                let host = rng.random();
                Self { source: inside(source, host), destination: inside(destination, host) }
            }
            _ => {
                let v6 = rng.random();
                let source = if v6 { "2001:db8:1:3::7" } else { "10.1.3.7" };
                let destination = everything(v6).parse().expect("a prefix");
                Self {
                    source: source.parse().expect("an address"),
                    destination: inside(destination, rng.random()),
                }
            }
        }
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        let (source, destination) = (self.source.to_string(), self.destination.to_string());
        let frame = match self.source {
            IpAddr::V4(_) => Frame::v4(&source, &destination),
            IpAddr::V6(_) => Frame::v6(&source, &destination),
        };
        frame.udp(PORTS.0, PORTS.1).macs(SENDER, PORT).ttl(64).payload(64).build()
    }

    fn matches(&self, selector: &Selector) -> bool {
        selector.source.contains(&self.source) && selector.destination.contains(&self.destination)
    }
}

/// A packet that a selector is about.
pub(super) fn frame(selector: &Selector, host: u32) -> Vec<u8> {
    Packet { source: inside(selector.source, host), destination: inside(selector.destination, host) }.frame()
}

/// A host inside a prefix: neither its first nor its last address, which may be broadcast addresses, nor that of a
/// gateway, unless there are no others.
pub(super) fn inside(prefix: IpNet, host: u32) -> IpAddr {
    let free = u32::from(prefix.max_prefix_len() - prefix.prefix_len()).min(16);
    let last = (1_u32 << free) - 1;
    let host = if last > 3 { 2 + host % (last - 2) } else { host & last };
    match prefix.network() {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() | host).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() | u128::from(host)).into(),
    }
}

/// What must become of a packet, by looking at everything that the kernel has.
pub(super) fn expected(kernel: &Snapshot, packet: &Packet, device: u32) -> Expected {
    if kernel.default_policy.forward == Action::Block || kernel.default_policy.outbound == Action::Block {
        return Expected::Pass;
    }
    let is_out =
        |policy: &Policy| (policy.id.direction, policy.id.policy_type) == (Direction::Out, PolicyType::Main);
    let selects_ports = |policy: &Policy| {
        let selector = &policy.id.selector;
        (selector.protocol == 0 || selector.protocol == 17)
            && selector.source_port.matches(PORTS.0)
            && selector.destination_port.matches(PORTS.1)
    };
    let about: Vec<&Policy> = kernel
        .policies
        .iter()
        .filter(|policy| policy.id.direction != Direction::In)
        .filter(|policy| packet.matches(&policy.id.selector) && selects_ports(policy))
        .collect();
    if about.iter().any(|policy| !is_out(policy) || policy.id.selector.looks_at_upper_layer()) {
        return Expected::Pass;
    }
    let Some(best) = about.iter().min_by_key(|policy| policy.priority) else { return Expected::Pass };
    let others = || about.iter().filter(|other| other.id != best.id);
    let is_live = best.templates.first().is_some_and(|template| {
        kernel.sas.iter().any(|sa| {
            sa.is_outbound_packet_offload()
                && sa.offload == best.offload
                && (sa.id.destination, sa.source, sa.reqid)
                    == (template.destination, template.source, template.reqid)
        })
    });
    if !best.is_packet_offloaded()
        || best.offload.is_none_or(|offload| offload.ifindex != device)
        || best.action == Action::Block
        || !is_live
        || others().any(|other| other.is_packet_offloaded())
    {
        return Expected::Pass;
    }
    let family = Family::of(&best.id.selector.destination);
    let highest = kernel.policies.iter().filter(|policy| {
        is_out(policy) && policy.is_packet_offloaded() && policy.id.selector.family() == family
    });
    let highest = highest.map(|policy| policy.priority).max().unwrap_or(0);
    if others().any(|other| other.priority <= highest) {
        return Expected::Pass;
    }
    // Forward policies are kept by their sources, whatever their destinations.
    let is_guarded = kernel.policies.iter().any(|policy| {
        policy.id.direction == Direction::Forward && policy.id.selector.source.contains(&packet.source)
    });
    if others().next().is_some() || is_guarded {
        Expected::FastOrPass(best.index)
    } else {
        Expected::Fast(best.index)
    }
}

/// In the order that databases have.
pub(super) fn sorted(snapshot: Snapshot) -> Snapshot {
    let mut database = Database::default();
    database.apply(PolicyEvent::Snapshot(snapshot));
    database.snapshot()
}

/// What is in one and not in the other, in a few words.
pub(super) fn difference(kernel: &Snapshot, mirror: &Snapshot) -> String {
    let lost = kernel.policies.iter().filter(|policy| !mirror.policies.contains(policy));
    let left = mirror.policies.iter().filter(|policy| !kernel.policies.contains(policy));
    let describe =
        |policy: &Policy| format!("{} (index {}, priority {})", policy.id, policy.index, policy.priority);
    let lost: Vec<String> = lost.map(describe).collect();
    let left: Vec<String> = left.map(describe).collect();
    let lost_sas = kernel.sas.iter().filter(|sa| !mirror.sas.contains(sa));
    let left_sas = mirror.sas.iter().filter(|sa| !kernel.sas.contains(sa));
    format!(
        "policies that only the kernel has: {}, {:?}; that only the mirror has: {}, {:?}; associations that only the \
         kernel has: {}, that only the mirror has: {}; default policies: {:?} and {:?}",
        lost.len(),
        lost.first(),
        left.len(),
        left.first(),
        lost_sas.count(),
        left_sas.count(),
        kernel.default_policy,
        mirror.default_policy
    )
}
