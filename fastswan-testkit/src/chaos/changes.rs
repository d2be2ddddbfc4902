//! What is changed, at random: policies and associations that come, change and go in every way that the kernel knows.
//!
//! The changes depend on the seed alone, and not on what the kernel has made of earlier ones: what expires has an
//! identity that is not used for anything else.

use std::{collections::HashSet, net::Ipv6Addr, ops::Range};

use fastswan::{
    Policy, PolicyId, SecurityAssociation, Selector,
    policy::{
        Action, DefaultPolicy, Direction, Family, OffloadDev, OffloadKind, PolicyType, PortMatch, SaId,
        Template,
    },
};
use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};

use super::{
    hindrance::{Hindrance, noise},
    host::v4,
    judge::{Packet, inside},
    offload::is_offered,
};
use crate::requests::Change;

/// Policies that are there at the same time, without those that expire.
const MOST: usize = 400;
/// Associations that may be deleted.
const MOST_ASSOCIATIONS: usize = 100;
/// Peers that policies have tunnels to.
const PEERS: u32 = 12;
/// Changes between two quiet points. Every other time there are not more than the mirror's receive buffer holds, so that
/// it has no reason to read everything, which would repair what it has missed.
const SMALL_ROUND: Range<usize> = 200..500;
const ROUND: Range<usize> = 1000..10_000;
/// One round in so many begins with more notifications than the receive buffer holds.
const BURST_EVERY: u64 = 10;
/// One round in so many is calm: so many changes, a moment apart, so that the mirror keeps track for as long as an audit
/// takes.
const CALM_EVERY: u64 = 40;
const CALM_ROUND: usize = 400;
const BURST: Range<usize> = 2000..4000;
/// Packets that are looked at while something is in their way.
const MOST_LOOKS: usize = 50;

/// Something that happens.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// One change.
    Change(Change),
    /// Many changes, a batch at a time.
    Burst(Vec<Change>),
    /// A policy that expires after some seconds.
    Temporary(Policy, u64),
    /// A larval association, which expires by itself.
    Allocate(SecurityAssociation),
    DeleteAssociation(SaId),
    FlushAssociations,
    /// Policies are offloaded to the device that is lost from time to time. The kernel has none of them.
    Offload(SecurityAssociation, Vec<Policy>),
    /// One of them is deleted.
    Unload(Policy),
    /// Nothing for a moment.
    Wait,
    /// The device goes down, with all that was offloaded to it, and comes back.
    LoseDevice,
    /// A policy is moved to another far end, if the kernel can move the associations as well.
    Migrate(PolicyId, Template),
    /// The kernel sorts its policies anew: these are the least prefix lengths of those that it hashes.
    Thresholds(u8),
    /// The port's link changes, in one of several ways.
    Port(u8),
    /// A device comes and goes.
    Device,
    /// Something comes in the way of packets.
    Hinder(Hindrance),
    /// It goes, after these packets have been looked at: none of them may be fast.
    Relent(Vec<Packet>),
    /// Unrelated routes and neighbours come and go.
    Noise(String),
}

/// A step, and the policies that may be fast until then and not any longer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Happening {
    pub(super) step: Step,
    pub(super) ended: Vec<Policy>,
}

/// What is there, as far as the changes tell.
#[derive(Debug)]
pub(super) struct World {
    /// The device that is lost from time to time.
    loose: u32,
    policies: Vec<Policy>,
    identities: HashSet<PolicyId>,
    /// The latest first.
    associations: Vec<SaId>,
    /// What is offloaded to that device, and whether anything was since the last quiet point.
    offloaded: Vec<Policy>,
    loaded: bool,
    /// How many policies, associations and rounds there were.
    made: u32,
    spis: u32,
    /// The last two bytes of the latest destination that nothing else has to do with.
    hosts: u16,
    rounds: u64,
    /// Whether the host changes too, and what is in the way of packets now.
    changes_host: bool,
    hindrance: Option<Hindrance>,
}

impl World {
    pub(super) fn new(loose: u32) -> Self {
        Self {
            loose,
            policies: Vec::new(),
            identities: HashSet::new(),
            associations: Vec::new(),
            offloaded: Vec::new(),
            loaded: false,
            made: 0,
            spis: 0x100,
            hosts: 0,
            rounds: 0,
            changes_host: false,
            hindrance: None,
        }
    }

    /// Has the host change as well.
    pub(super) fn change_host(self, changes: bool) -> Self {
        Self { changes_host: changes, ..self }
    }

    /// What happens between two quiet points.
    pub(super) fn round(&mut self, rng: &mut StdRng) -> Vec<Happening> {
        self.rounds += 1;
        if self.rounds.is_multiple_of(CALM_EVERY) {
            return (0..CALM_ROUND).flat_map(|_| [self.change(rng), happening(Step::Wait)]).collect();
        }
        let mut round = Vec::new();
        if self.rounds % BURST_EVERY == 2 {
            round.push(self.burst(rng));
        }
        let size = if self.rounds.is_multiple_of(2) { ROUND } else { SMALL_ROUND };
        for _ in 0..rng.random_range(size) {
            let happening = self.happening(rng);
            round.push(happening);
        }
        if self.rounds.is_multiple_of(3) {
            self.thin_out(&mut round);
        }
        round
    }

    /// What happens before a quiet point, whatever has become of the round: the kernel has all that was offloaded, every
    /// peer has an association, and nothing is in the way.
    pub(super) fn settle(&mut self, rng: &mut StdRng) -> Vec<Happening> {
        let mut end: Vec<Happening> = (0..PEERS).map(|peer| happening(self.allocate(peer * 2 + 1))).collect();
        end.extend(self.relent(rng));
        if std::mem::take(&mut self.loaded) {
            end.push(self.lose_device());
        }
        end
    }

    fn happening(&mut self, rng: &mut StdRng) -> Happening {
        if self.changes_host {
            match rng.random_range(0..1000) {
                0 => return self.relent(rng).unwrap_or_else(|| self.hinder(rng)),
                1 => return happening(Step::Noise(noise(rng))),
                _ => {}
            }
        }
        match rng.random_range(0..10_000) {
            0..300 => {
                let policy = self.temporary(rng);
                happening(Step::Temporary(policy, rng.random_range(1..3)))
            }
            300..400 => happening(self.allocate(rng.random_range(0..PEERS) * 2 + 1)),
            400..480 if !self.associations.is_empty() => {
                let at = rng.random_range(0..self.associations.len());
                happening(Step::DeleteAssociation(self.associations.remove(at)))
            }
            // The kernel does not tell of a flush that deletes nothing.
            480..485 if !self.policies.is_empty() => self.flush(),
            485..490 => {
                self.associations.clear();
                happening(Step::FlushAssociations)
            }
            490..500 => happening(Step::Change(Change::Default(blocking(rng)))),
            // Soon, so that it does not block for long.
            500..680 => happening(Step::Change(Change::Default(DefaultPolicy::default()))),
            680..684 if self.offloaded.len() < 40 => self.offload(rng),
            684..692 => match self.offloaded.pop() {
                Some(policy) => Happening { step: Step::Unload(policy.clone()), ended: vec![policy] },
                None => self.change(rng),
            },
            692 => self.lose_device(),
            693..698 => self.migrate(rng),
            698 => happening(Step::Thresholds(rng.random_range(16..=32))),
            699 => happening(if rng.random() { Step::Port(rng.random_range(0..2)) } else { Step::Device }),
            _ => self.change(rng),
        }
    }

    /// Adds, updates or deletes a policy.
    fn change(&mut self, rng: &mut StdRng) -> Happening {
        let full = self.policies.len() >= MOST;
        match rng.random_range(0..4) {
            0 if !self.policies.is_empty() => {
                let at = rng.random_range(0..self.policies.len());
                let old = &mut self.policies[at];
                let new = updated(old, rng);
                let old = std::mem::replace(old, new.clone());
                let gone = (!is_offered(&new)).then_some(old);
                Happening { step: Step::Change(Change::Update(new)), ended: ended(gone) }
            }
            1 | 2 if !full => {
                let policy = self.add(rng);
                happening(Step::Change(Change::Add(policy)))
            }
            _ if !self.policies.is_empty() => {
                let old = self.remove(rng);
                let change =
                    Change::Delete { id: old.id.clone(), index: rng.random::<bool>().then_some(old.index) };
                Happening { step: Step::Change(change), ended: ended([old]) }
            }
            _ => {
                let policy = self.add(rng);
                happening(Step::Change(Change::Add(policy)))
            }
        }
    }

    /// Adds and deletes, with more notifications than the mirror has room for.
    fn burst(&mut self, rng: &mut StdRng) -> Happening {
        let mut changes = Vec::new();
        let mut gone = Vec::new();
        for _ in 0..rng.random_range(BURST) {
            if self.policies.len() < MOST && rng.random() {
                changes.push(Change::Add(self.add(rng)));
            } else if !self.policies.is_empty() {
                let old = self.remove(rng);
                changes.push(Change::Delete { id: old.id.clone(), index: None });
                gone.push(old);
            }
        }
        Happening { step: Step::Burst(changes), ended: ended(gone) }
    }

    fn flush(&mut self) -> Happening {
        self.identities.clear();
        let gone = [&mut self.policies, &mut self.offloaded].map(std::mem::take).concat();
        Happening { step: Step::Change(Change::Flush(PolicyType::Main)), ended: ended(gone) }
    }

    /// Deletes policies that make many packets pass, so that enough stays fast.
    fn thin_out(&mut self, round: &mut Vec<Happening>) {
        for old in self.policies.extract_if(.., |policy| is_wide(&policy.id)) {
            self.identities.remove(&old.id);
            let change = Change::Delete { id: old.id.clone(), index: None };
            round.push(Happening { step: Step::Change(change), ended: ended([old]) });
        }
        round.push(happening(Step::Change(Change::Default(DefaultPolicy::default()))));
    }

    fn add(&mut self, rng: &mut StdRng) -> Policy {
        let id = loop {
            let id = identity(rng);
            if self.identities.insert(id.clone()) {
                break id;
            }
        };
        let mut policy = policy(id, rng);
        policy.index = self.index(policy.id.direction);
        self.policies.push(policy.clone());
        policy
    }

    fn remove(&mut self, rng: &mut StdRng) -> Policy {
        let at = rng.random_range(0..self.policies.len());
        let old = self.policies.swap_remove(at);
        self.identities.remove(&old.id);
        old
    }

    fn temporary(&mut self, rng: &mut StdRng) -> Policy {
        let index = self.index(Direction::Out);
        let destination = self.host(4);
        let id = PolicyId::new(Direction::Out, selector(v4(1, rng.random_range(0..8), 0, 24), destination));
        Policy {
            index,
            priority: 1000,
            templates: [tunnel(peer(id.selector.family(), rng))].into(),
            ..Policy::new(id)
        }
    }

    fn offload(&mut self, rng: &mut StdRng) -> Happening {
        let offload = Some(OffloadDev { ifindex: self.loose, kind: OffloadKind::Packet, inbound: false });
        let template = Template {
            source: super::LOOSE_ADDRESS,
            destination: super::LOOSE_PEER,
            ..tunnel(PEERS * 2 + 1)
        };
        let policies = (0..rng.random_range(1..8)).map(|_| {
            let index = self.index(Direction::Out);
            let destination = self.host(3);
            let id = PolicyId::new(Direction::Out, selector(v4(1, 0, 0, 16), destination));
            Policy { index, priority: 1000, templates: [template].into(), offload, ..Policy::new(id) }
        });
        let policies: Vec<Policy> = policies.collect();
        self.offloaded.extend(policies.clone());
        self.loaded = true;
        self.spis += 1;
        let sa = SecurityAssociation { offload, ..SecurityAssociation::for_template(&template, self.spis) };
        happening(Step::Offload(sa, policies))
    }

    fn hinder(&mut self, rng: &mut StdRng) -> Happening {
        let hindrance = Hindrance::draw(rng);
        self.hindrance = Some(hindrance.clone());
        happening(Step::Hinder(hindrance))
    }

    /// What is in the way goes, if there is anything.
    fn relent(&mut self, rng: &mut StdRng) -> Option<Happening> {
        let Hindrance { concerns, .. } = self.hindrance.take()?;
        let concerned = self.policies.iter().filter(|policy| is_offered(policy)).filter_map(|policy| {
            let Selector { source, destination, .. } = policy.id.selector;
            concerns.part_of(source, destination)
        });
        let packets = concerned.take(MOST_LOOKS).map(|(source, destination)| {
            let host = rng.random();
            Packet { source: inside(source, host), destination: inside(destination, host) }
        });
        Some(happening(Step::Relent(packets.collect())))
    }

    fn lose_device(&mut self) -> Happening {
        Happening { step: Step::LoseDevice, ended: std::mem::take(&mut self.offloaded) }
    }

    fn migrate(&mut self, rng: &mut StdRng) -> Happening {
        match self.policies.choose(rng).and_then(|policy| Some((policy, policy.templates.first()?))) {
            Some((policy, template)) => happening(Step::Migrate(policy.id.clone(), *template)),
            None => self.change(rng),
        }
    }

    fn allocate(&mut self, reqid: u32) -> Step {
        self.spis += 1;
        let sa = SecurityAssociation::for_template(&tunnel(reqid), self.spis);
        // The oldest are likely to have expired.
        self.associations.truncate(MOST_ASSOCIATIONS);
        self.associations.insert(0, sa.id);
        Step::Allocate(sa)
    }

    /// A destination that no other policy is about, nor was lately.
    fn host(&mut self, zone: u8) -> IpNet {
        self.hosts = self.hosts.wrapping_add(1);
        let [net, host] = self.hosts.to_be_bytes();
        v4(zone, net, host, 32)
    }

    /// An index that no policy has had: the kernel takes it, and keeps it through updates.
    fn index(&mut self, direction: Direction) -> u32 {
        self.made += 1;
        let direction = match direction {
            Direction::In => 0,
            Direction::Out => 1,
            Direction::Forward => 2,
        };
        self.made * 8 + direction
    }
}

fn happening(step: Step) -> Happening {
    Happening { step, ended: Vec::new() }
}

/// Those of some that are gone that may have been fast.
fn ended(gone: impl IntoIterator<Item = Policy>) -> Vec<Policy> {
    gone.into_iter().filter(is_offered).collect()
}

/// Most are for tunnels between networks that seldom overlap.
fn identity(rng: &mut StdRng) -> PolicyId {
    let v6 = rng.random_bool(0.25);
    let place = if v6 { v6_network } else { v4 };
    let local = place(1, rng.random_range(0..8), 0, 24);
    let net = rng.random_range(0..48);
    let remote = match rng.random_range(0..100) {
        0 => place(2, 0, 0, 16),
        1..20 => place(2, net, rng.random_range(0..4) * 64, 26),
        20..40 => place(2, net, rng.random_range(0..64) * 4, 30),
        _ => place(2, net, 0, 24),
    };
    let out = selector(local, remote);
    match rng.random_range(0..100) {
        0..6 => PolicyId::new(Direction::In, selector(remote, local)),
        6..12 => PolicyId::new(Direction::Forward, selector(remote, local)),
        12 => PolicyId::new(Direction::Forward, out),
        13..16 => {
            let port = PortMatch::exactly(*[443, 500].choose(rng).expect("ports"));
            PolicyId::new(Direction::Out, Selector { protocol: 17, destination_port: port, ..out })
        }
        _ => PolicyId::new(Direction::Out, out),
    }
}

/// What such a policy may ask for.
fn policy(id: PolicyId, rng: &mut StdRng) -> Policy {
    let kind = if is_wide(&id) { rng.random_range(80..100) } else { rng.random_range(0..100) };
    let family = id.selector.family();
    let mut policy = Policy { priority: rng.random_range(900..1100), ..Policy::new(id) };
    match kind {
        0..75 => {
            policy.priority = 1000;
            policy.templates = [tunnel(peer(family, rng))].into();
        }
        // Not offloaded.
        75..85 => policy.templates = [tunnel(peer(family, rng) + 1)].into(),
        85..90 => policy.action = Action::Block,
        _ => {}
    }
    policy
}

/// What a policy is changed into. One that is not offloaded never will be, so that whoever looks whether it is still
/// fast cannot take it for what it became later.
fn updated(old: &Policy, rng: &mut StdRng) -> Policy {
    let mut new = Policy { index: old.index, ..policy(old.id.clone(), rng) };
    if is_offered(&new) && !is_offered(old) {
        new.templates.iter_mut().for_each(|template| template.reqid += 1);
    }
    new
}

/// Whether it is about many other policies' packets.
fn is_wide(id: &PolicyId) -> bool {
    let Selector { source, destination, .. } = id.selector;
    source.prefix_len().min(destination.prefix_len()) <= if source.addr().is_ipv4() { 16 } else { 48 }
}

fn blocking(rng: &mut StdRng) -> DefaultPolicy {
    match rng.random_range(0..2) {
        0 => DefaultPolicy { forward: Action::Block, ..DefaultPolicy::default() },
        _ => DefaultPolicy { outbound: Action::Block, ..DefaultPolicy::default() },
    }
}

/// The reqid of a peer with addresses of a family, for tunnels that are offloaded; the next one is for others.
fn peer(family: Family, rng: &mut StdRng) -> u32 {
    let reqids: Vec<u32> = (0..PEERS).map(|peer| peer * 2 + 1).collect();
    let of_family: Vec<u32> = reqids.into_iter().filter(|reqid| family_of(*reqid) == family).collect();
    *of_family.choose(rng).expect("peers of both families")
}

/// The family of a peer's addresses: every fourth has those of IPv6.
fn family_of(reqid: u32) -> Family {
    if (reqid - 1) / 2 % 4 == 3 { Family::V6 } else { Family::V4 }
}

fn tunnel(reqid: u32) -> Template {
    let (source, destination) = match family_of(reqid) {
        Family::V4 => (super::ADDRESS, super::PEER),
        Family::V6 => (super::ADDRESS_V6, super::PEER_V6),
    };
    Template::esp_tunnel(source, destination, reqid)
}

fn selector(source: IpNet, destination: IpNet) -> Selector {
    Selector::between(source, destination).expect("prefixes of one family")
}

/// 2001:db8:`zone`:`net`::`host`, with as many bits less as the same prefix of IPv4 has.
fn v6_network(zone: u8, net: u8, host: u8, length: u8) -> IpNet {
    let length = match length {
        0..=16 => 48,
        17..=24 => 64,
        _ => 96 + length,
    };
    let address = Ipv6Addr::new(0x2001, 0xdb8, zone.into(), net.into(), 0, 0, 0, host.into());
    IpNet::new(address.into(), length).expect("a length of the family").trunc()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn a_seed_repeats_the_changes() {
        let rounds = |seed| {
            let (mut rng, mut world) = (StdRng::seed_from_u64(seed), World::new(7).change_host(true));
            [world.round(&mut rng), world.round(&mut rng), world.round(&mut rng)]
        };
        assert_eq!(rounds(1), rounds(1));
        assert_ne!(rounds(1), rounds(2));
    }
}
