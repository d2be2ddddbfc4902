//! The policies that change, in all their versions, and their packets.

use fastswan::{
    Policy, PolicyEvent, SecurityAssociation, Snapshot,
    policy::{Family, MacAddr, NextHop, OffloadDev, Overhead},
    table::TableConfig,
};
use fastswan_testkit_ebpf::verdict::way;
use ipnet::IpNet;
use rand::{RngExt as _, rngs::SmallRng};

use super::{
    super::{
        flows::{Flow, address},
        mix::Mix,
    },
    kind::Kind,
};

/// Most groups.
const MOST_GROUPS: u32 = 1024;
/// Policies of a group, if there are fewer groups.
const FEW: u32 = 16;
/// Below that of offloaded policies: such a software policy may be the kernel's choice.
const SOFTWARE_PRIORITY: u32 = 50;

/// Policies with numbers, in groups that change together. Which kind a group is of goes by its number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policies {
    count: u32,
    groups: u16,
    devices: [u32; 2],
}

impl Policies {
    /// At least one group of each kind.
    pub(super) const FEWEST: u32 = FEW * Kind::COUNT;

    /// So many, [`Self::FEWEST`] or more, whose packets leave by these devices.
    pub(super) fn new(count: u32, devices: [u32; 2]) -> Self {
        let groups = (count / FEW).clamp(Kind::COUNT, MOST_GROUPS);
        Self { count, groups: u16::try_from(groups).unwrap_or(u16::MAX), devices }
    }

    pub(super) fn groups(self) -> u16 {
        self.groups
    }

    pub(super) fn kind(group: u16) -> Kind {
        Kind::ALL[usize::from(group) % Kind::ALL.len()]
    }

    /// The numbers of a group's policies.
    pub(super) fn members(self, group: u16) -> impl Iterator<Item = u32> {
        (u32::from(group)..self.count).step_by(usize::from(self.groups))
    }

    fn group(self, number: u32) -> u16 {
        u16::try_from(number % u32::from(self.groups)).unwrap_or(u16::MAX)
    }

    /// A table that all of them fit into, and not much more.
    pub(super) fn table(self) -> TableConfig {
        let shadows = self.count / 3;
        // Slots that were freed are used again, the oldest first, and not before all have been used.
        TableConfig {
            cells_v4: self.count + shadows + 64,
            cells_v6: 1,
            exceptions: 64,
            slots: self.count + self.count / 2 + 64,
        }
    }

    /// All of them in their first version.
    pub(super) fn snapshot(self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for number in 0..self.count {
            snapshot.policies.push(self.policy(number, 0));
            match Self::kind(self.group(number)) {
                Kind::LosesAssociation => snapshot.sas.extend(self.association(number, 0)),
                Kind::AlwaysShadowed => snapshot.policies.push(shadow(number, 0)),
                _ => {}
            }
        }
        snapshot
    }

    /// What happens to a policy when its group gets to a version.
    pub(super) fn events(self, number: u32, version: u32) -> [Option<PolicyEvent>; 2] {
        let policy = || PolicyEvent::Policy(self.policy(number, version));
        let is_to_pass = !version.is_multiple_of(2);
        match Self::kind(self.group(number)) {
            Kind::Steady => [None, None],
            Kind::ComesAndGoes if is_to_pass => {
                [Some(PolicyEvent::PolicyRemoved(self.policy(number, version).id)), None]
            }
            Kind::Moves | Kind::ComesAndGoes => [Some(policy()), None],
            Kind::LosesAssociation => {
                let association = self.association(number, version);
                if is_to_pass {
                    [association.map(|association| PolicyEvent::SaRemoved(association.id)), None]
                } else {
                    [Some(policy()), association.map(PolicyEvent::Sa)]
                }
            }
            Kind::Shadowed if is_to_pass => [Some(PolicyEvent::Policy(shadow(number, 0))), None],
            Kind::Shadowed => [Some(policy()), Some(PolicyEvent::PolicyRemoved(shadow(number, 0).id))],
            Kind::AlwaysShadowed => {
                let (there, gone) = (shadow(number, version), shadow(number, version + 1));
                [Some(PolicyEvent::Policy(there)), Some(PolicyEvent::PolicyRemoved(gone.id))]
            }
        }
    }

    /// A policy for nobody's packets, the only one with its prefix lengths: when it comes or goes, so does their entry in the list
    /// of pairs of lengths, and those of all others move.
    pub(super) fn lone(self, turn: u32) -> Policy {
        let mut policy = self.policy(self.count, 0);
        let [source, destination] = [25 + turn % 4, 30].map(|length| u8::try_from(length).unwrap_or(32));
        let selector = &mut policy.id.selector;
        selector.source = narrowed(selector.source, source);
        selector.destination = narrowed(selector.destination, destination);
        policy
    }

    /// Random packets of policies of a kind, each with the group of its policy.
    pub(super) fn flows(self, kind: Kind, flows: u32, rng: &mut SmallRng) -> Vec<(Flow, u16)> {
        let groups: Vec<u16> = (0..self.groups).filter(|&group| Self::kind(group) == kind).collect();
        let flow = |_| {
            let group = groups[rng.random_range(0..groups.len())];
            let members = self.members(group).count();
            let number = u32::from(group)
                + u32::from(self.groups) * rng.random_range(0..u32::try_from(members).unwrap_or(1));
            let (source, mut destination) = Mix::SiteToSite.networks(Family::V4, number);
            if matches!(kind, Kind::Shadowed | Kind::AlwaysShadowed) {
                destination = shadow(number, 0).id.selector.destination;
            }
            (Flow { source: address(rng, source), destination: address(rng, destination) }, group)
        };
        (0..flows).map(flow).collect()
    }

    /// A policy in a version.
    fn policy(self, number: u32, version: u32) -> Policy {
        let group = self.group(number);
        let device = self.device(group, version);
        let mut policy = Mix::SiteToSite.policy(Family::V4, number, device);
        let (destination, source) = way(group, version);
        policy.egress.next_hop =
            NextHop::Fixed { source: MacAddr(source), destination: MacAddr(destination) };
        if Self::kind(group) == Kind::LosesAssociation {
            policy.assumed = None;
        }
        policy
    }

    fn device(self, group: u16, version: u32) -> u32 {
        self.devices[(usize::from(group) / Kind::ALL.len() + version as usize / 2) % 2]
    }

    fn association(self, number: u32, version: u32) -> Option<SecurityAssociation> {
        let policy = self.policy(number, version);
        let offload: Option<OffloadDev> = policy.offload;
        Some(SecurityAssociation {
            offload,
            overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16)),
            ..SecurityAssociation::for_template(policy.templates.first()?, 0x1000_0000 | number)
        })
    }
}

/// A software policy for a part of a policy: an odd turn's has all of an even turn's.
fn shadow(number: u32, turn: u32) -> Policy {
    let mut shadow = Mix::SiteToSite.allowance(Family::V4, number);
    shadow.priority = SOFTWARE_PRIORITY;
    let length = if turn.is_multiple_of(2) { 26 + number % 3 } else { 25 };
    let destination = &mut shadow.id.selector.destination;
    *destination = narrowed(*destination, u8::try_from(length).unwrap_or(32));
    shadow
}

/// The first part of a network that has this length; the network if it is as long already.
fn narrowed(network: IpNet, length: u8) -> IpNet {
    IpNet::new(network.network(), length.max(network.prefix_len())).unwrap_or(network).trunc()
}
