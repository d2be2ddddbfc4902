//! What the kernel chooses when policies are really offloaded, as a model for machines where nothing can offload one.
//! [Stories](stories) say what is special about that order, and hold the model to it, and kernels where something can.
//!
//! It follows `xfrm_policy_insert_list`, the tree of inexact policies and `xfrm_policy_lookup_bytype`, for
//! outbound main policies without mark and interface id:
//!
//! - Policies whose prefixes both have full length are in one hash, those with two short prefixes (below /16, for
//!   IPv6 below /48) in one list. The rest lies in lists by prefixes that do not overlap: when a shorter prefix
//!   comes, the lists of those inside it are merged.
//! - A policy goes behind the last of its list whose number is not higher. An offloaded one goes to the head.
//! - When lists are merged, the policies of all but one are put into that one, the oldest first; then each goes
//!   behind those at the front whose number is lower, or equal and which are older.
//! - A lookup takes the first match of the hash, and stops if that is offloaded. Else it goes through the lists for
//!   both addresses, for the source, for the destination, and for none, and takes of each the first match, unless a
//!   policy with a higher number than the best so far comes first.

use std::net::IpAddr;

use fastswan::{
    ChannelSource, Policy, PolicyEvent, PolicyId, Selector, Snapshot,
    policy::{Direction, OffloadDev, Template},
    source::channel::PolicySender,
};
use ipnet::IpNet;

use super::{judge::Judge, packets::Packet, sets::is_promoted};
use crate::requests::Change;

/// More than a round changes.
const EVENTS: usize = 4096;

/// The chains of both families.
#[derive(Debug)]
pub(super) struct Chains {
    policies: Policies,
    families: [Family; 2],
    events: Vec<PolicySender>,
}

/// All policies that were ever added, the oldest first: their numbers are positions in age.
type Policies = Vec<Policy>;
type List = Vec<usize>;

#[derive(Debug, Default)]
struct Family {
    exact: List,
    any: List,
    by_source: Vec<Node>,
    by_destination: Vec<Node>,
}

/// A list of those whose source or destination is inside a prefix.
#[derive(Debug)]
struct Node {
    prefix: IpNet,
    list: List,
    /// Inside a destination, the lists by source.
    by_source: Vec<Node>,
}

impl Chains {
    /// Empty ones, and so many sources that tell what changes.
    pub(super) fn new(sources: usize) -> (Self, Vec<ChannelSource>) {
        let ends = (0..sources).map(|_| ChannelSource::new(Snapshot::default(), EVENTS));
        let (events, sources) = ends.unzip();
        (Self { policies: Vec::new(), families: Default::default(), events }, sources)
    }

    /// Adds a policy, or replaces the one with its identity, and returns it with the number that names it.
    fn put(&mut self, policy: &Policy) -> Policy {
        let number = self.policies.len();
        let old = self.find(&policy.id);
        let index =
            old.map_or(u32::try_from(number * 8 + 1).unwrap_or(u32::MAX), |old| self.policies[old].index);
        let policy = Policy { index, ..policy.clone() };
        self.policies.push(policy.clone());
        let family = &mut self.families[which(&policy.id)];
        insert(family.list(&self.policies, &policy.id), number, old, &self.policies);
        if let Some(old) = old {
            family.remove(old);
            family.prune();
        }
        policy
    }

    /// Makes a change, and returns what its source says of it.
    pub(super) fn change(&mut self, change: &Change) -> PolicyEvent {
        match change {
            Change::Add(policy) | Change::Update(policy) => PolicyEvent::Policy(self.put(policy)),
            Change::Delete { id, index } => {
                if let Some(number) = self.find(id) {
                    let family = &mut self.families[which(id)];
                    family.remove(number);
                    // A deletion by index leaves empty lists behind.
                    if index.is_none() {
                        family.prune();
                    }
                }
                PolicyEvent::PolicyRemoved(id.clone())
            }
            Change::Flush(table) => {
                self.families = Default::default();
                PolicyEvent::PoliciesFlushed(*table)
            }
            Change::Default(default_policy) => PolicyEvent::DefaultPolicy(*default_policy),
            Change::Resynchronise => {
                let numbers = self.families.iter().flat_map(Family::all);
                let policies = numbers.map(|number| self.policies[number].clone()).collect();
                PolicyEvent::Snapshot(Snapshot { policies, ..Snapshot::default() })
            }
        }
    }

    /// The policy that an index names.
    pub(super) fn policy(&self, index: u32) -> Option<&Policy> {
        self.policies.iter().rev().find(|policy| policy.index == index)
    }

    fn find(&self, id: &PolicyId) -> Option<usize> {
        self.families[which(id)].all().find(|&number| self.policies[number].id == *id)
    }
}

fn which(id: &PolicyId) -> usize {
    usize::from(id.selector.destination.addr().is_ipv6())
}

impl Judge for Chains {
    fn make(&mut self, changes: &[Change]) -> anyhow::Result<()> {
        for change in changes {
            let event = self.change(change);
            for events in &self.events {
                events.try_send(event.clone())?;
            }
        }
        Ok(())
    }

    fn choose(&mut self, packet: &Packet) -> anyhow::Result<Option<u32>> {
        let family = &self.families[usize::from(packet.source.is_ipv6())];
        let chosen = family.look_up(&self.policies, packet);
        Ok(chosen.map(|number| self.policies[number].index))
    }
}

impl Family {
    /// The list that a policy belongs into.
    fn list(&mut self, policies: &[Policy], id: &PolicyId) -> &mut List {
        let (source, destination) = (id.selector.source, id.selector.destination);
        let is_full = |prefix: IpNet| prefix.prefix_len() == prefix.max_prefix_len();
        if is_full(source) && is_full(destination) {
            return &mut self.exact;
        }
        match (is_short(source), is_short(destination)) {
            (true, true) => &mut self.any,
            (false, true) => &mut node(&mut self.by_source, source, policies).list,
            (true, false) => &mut node(&mut self.by_destination, destination, policies).list,
            (false, false) => {
                let destination = node(&mut self.by_destination, destination, policies);
                &mut node(&mut destination.by_source, source, policies).list
            }
        }
    }

    fn look_up(&self, policies: &[Policy], packet: &Packet) -> Option<usize> {
        let matches = |number: &&usize| packet.matches(&policies[**number].id.selector);
        let mut best = self.exact.iter().find(matches).copied();
        if best.is_some_and(|best| is_promoted(&policies[best])) {
            return best;
        }
        let at =
            |nodes: &'_ [Node], address: IpAddr| nodes.iter().position(|node| node.prefix.contains(&address));
        let of_destination = at(&self.by_destination, packet.destination).map(|at| &self.by_destination[at]);
        let of_source = at(&self.by_source, packet.source).map(|at| &self.by_source[at]);
        let of_both =
            of_destination.and_then(|node| at(&node.by_source, packet.source).map(|at| &node.by_source[at]));
        let lists = [of_both, of_source, of_destination].map(|node| node.map(|node| &node.list));
        for list in lists.into_iter().flatten().chain([&self.any]) {
            let limit = best.map_or(u32::MAX, |best| policies[best].priority);
            let in_time = list.iter().take_while(|&&number| policies[number].priority <= limit);
            if let Some(&found) = in_time.into_iter().find(matches) {
                let is_older =
                    |best: usize| policies[found].priority == policies[best].priority && best < found;
                if !best.is_some_and(is_older) {
                    best = Some(found);
                }
            }
        }
        best
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        let inner = self.by_destination.iter().flat_map(|node| &node.by_source);
        self.by_source.iter().chain(&self.by_destination).chain(inner)
    }

    fn all(&self) -> impl Iterator<Item = usize> {
        self.exact.iter().chain(&self.any).chain(self.nodes().flat_map(|node| &node.list)).copied()
    }

    fn remove(&mut self, number: usize) {
        let remove = |list: &mut List| list.retain(|&other| other != number);
        remove(&mut self.exact);
        remove(&mut self.any);
        self.by_source.iter_mut().for_each(|node| remove(&mut node.list));
        for node in &mut self.by_destination {
            remove(&mut node.list);
            node.by_source.iter_mut().for_each(|node| remove(&mut node.list));
        }
    }

    /// Gives up lists that are empty.
    fn prune(&mut self) {
        let is_used = |node: &Node| !node.list.is_empty() || !node.by_source.is_empty();
        self.by_destination.iter_mut().for_each(|node| node.by_source.retain(is_used));
        self.by_destination.retain(is_used);
        self.by_source.retain(is_used);
    }
}

/// Whether a prefix has no list of its own.
fn is_short(prefix: IpNet) -> bool {
    let limit = if prefix.addr().is_ipv4() { 16 } else { 48 };
    prefix.addr().is_unspecified() || prefix.prefix_len() < limit
}

/// The node for a prefix: one that covers it, or a new one, into which those inside it are merged.
fn node<'a>(nodes: &'a mut Vec<Node>, prefix: IpNet, policies: &[Policy]) -> &'a mut Node {
    let prefix = prefix.trunc();
    if let Some(covering) = nodes.iter().position(|node| node.prefix.contains(&prefix)) {
        return &mut nodes[covering];
    }
    let mut inside = nodes.extract_if(.., |node| prefix.contains(&node.prefix));
    // Which one the kernel finds first depends on the shape of its tree; the oldest is likely to be near the root.
    let mut merged = inside.next().unwrap_or(Node { prefix, list: Vec::new(), by_source: Vec::new() });
    for node in inside {
        for node in node.by_source {
            reinsert_node(&mut merged.by_source, node, policies);
        }
        reinsert(&mut merged.list, node.list, policies);
    }
    merged.prefix = prefix;
    let last = nodes.len();
    nodes.push(merged);
    &mut nodes[last]
}

fn reinsert_node(nodes: &mut Vec<Node>, mut node: Node, policies: &[Policy]) {
    let overlaps =
        |one: &Node, other: &Node| one.prefix.contains(&other.prefix) || other.prefix.contains(&one.prefix);
    while let Some(found) = nodes.iter().position(|other| overlaps(other, &node)) {
        let mut other = nodes.remove(found);
        reinsert(&mut other.list, node.list, policies);
        if node.prefix.prefix_len() < other.prefix.prefix_len() {
            other.prefix = node.prefix;
        }
        node = other;
    }
    nodes.push(node);
}

/// Puts a new policy into a list, from which the old one with its identity was not removed yet.
fn insert(list: &mut List, number: usize, old: Option<usize>, policies: &[Policy]) {
    let priority = policies[number].priority;
    let mut behind = None;
    let mut seen_old = false;
    for (position, &other) in list.iter().enumerate() {
        let is_old = Some(other) == old;
        seen_old |= is_old;
        if is_old && priority > policies[other].priority {
            continue;
        }
        if !is_old && priority >= policies[other].priority {
            behind = Some(position);
            continue;
        }
        if seen_old {
            break;
        }
    }
    place(list, number, behind, policies);
}

/// Puts the policies of another list into a list.
fn reinsert(list: &mut List, mut others: List, policies: &[Policy]) {
    others.sort_unstable();
    for number in others {
        let key = |number: usize| (policies[number].priority, number);
        let ahead = list.iter().take_while(|&&other| key(other) < key(number)).count();
        place(list, number, ahead.checked_sub(1), policies);
    }
}

fn place(list: &mut List, number: usize, behind: Option<usize>, policies: &[Policy]) {
    let position = behind.filter(|_| !is_promoted(&policies[number])).map_or(0, |behind| behind + 1);
    list.insert(position, number);
}

/// What happens to policies, and which of them is chosen for a packet then.
#[derive(Clone, Debug)]
pub(super) struct Story {
    pub(super) name: &'static str,
    /// To a kernel that has no policies.
    pub(super) changes: Vec<Change>,
    pub(super) packet: Packet,
    pub(super) winner: Option<PolicyId>,
}

/// Stories about policies that are offloaded to a device, or to none that is known. Those with different numbers lead
/// different ways, so that it matters which of them is chosen.
pub(super) fn stories(device: Option<OffloadDev>) -> Vec<Story> {
    let policy = |source: &str, destination: &str, priority: u32, offload: bool| {
        let prefix = |text: &str| text.parse().expect("a prefix");
        let selector =
            Selector::between(prefix(source), prefix(destination)).expect("prefixes of one family");
        let reqid = 2 * priority + u32::from(offload);
        let template = Template::esp_tunnel([192, 0, 2, 1].into(), [192, 0, 2, 2].into(), reqid);
        Policy {
            priority,
            templates: [template].into(),
            offload: device.filter(|_| offload),
            ..Policy::new(PolicyId::new(Direction::Out, selector))
        }
    };
    let mut stories = Vec::new();
    let mut tell = |name, changes: Vec<Change>, [source, destination]: [&str; 2], winner: Option<&Policy>| {
        let packet = Packet::plain(source, destination);
        stories.push(Story { name, changes, packet, winner: winner.map(|policy| policy.id.clone()) });
    };
    let deletion = |policy: &Policy| Change::Delete { id: policy.id.clone(), index: None };

    let wide = policy("10.1.0.0/16", "10.2.0.0/16", 10, false);
    let narrow = policy("10.1.0.0/24", "10.2.0.0/24", 20, false);
    let everything = policy("0.0.0.0/0", "0.0.0.0/0", 10, false);
    for (policies, winner) in [
        ([&wide, &narrow, &everything], &wide),
        ([&narrow, &wide, &everything], &wide),
        ([&everything, &narrow, &wide], &everything),
    ] {
        let name = "the lowest number wins among software policies, and the oldest of equals";
        tell(name, added(policies), ["10.1.0.9", "10.2.0.9"], Some(winner));
    }
    tell("no policy is about the packet", added([&wide, &narrow]), ["10.3.0.9", "10.2.0.9"], None);

    let better = policy("10.1.0.0/24", "10.2.0.0/24", 10, false);
    let offloaded = policy("10.1.0.0/25", "10.2.0.0/24", 20, true);
    let packet = ["10.1.0.9", "10.2.0.9"];
    let name = "an offloaded policy stands before better ones that came first";
    tell(name, added([&better, &offloaded]), packet, Some(&offloaded));
    let name = "a better policy that comes later stands before an offloaded one";
    tell(name, added([&offloaded, &better]), packet, Some(&better));

    for offload in [true, false] {
        let hosts = policy("10.1.0.9/32", "10.2.0.9/32", 20, offload);
        let winner = if offload { &hosts } else { &better };
        let name = "an offloaded policy between two hosts is chosen whatever else there is";
        tell(name, added([&better, &hosts]), packet, Some(winner));
    }

    let wide = policy("0.0.0.0/0", "10.2.0.0/24", 10, true);
    let worse = policy("0.0.0.0/0", "10.2.0.20/32", 30, true);
    let narrow = policy("10.1.0.0/24", "10.2.0.0/25", 20, false);
    let name = "an offloaded policy with a lower number is found before others";
    tell(name, added([&wide, &narrow]), packet, Some(&wide));
    let name = "an offloaded policy hides better ones behind it from those who found another";
    tell(name, added([&wide, &worse, &narrow]), packet, Some(&narrow));

    let best = policy("10.1.0.0/24", "10.2.0.0/24", 10, true);
    let other = policy("10.1.0.0/25", "10.2.0.0/24", 20, true);
    for (priority, winner) in [(20, &other), (15, &other), (21, &best)] {
        let update = Change::Update(policy("10.1.0.0/25", "10.2.0.0/24", priority, false));
        let name = "a policy that loses its offload stays before older ones, unless its number rises";
        tell(name, [added([&best, &other]), vec![update]].concat(), packet, Some(winner));
    }

    let site = policy("10.1.0.0/16", "10.2.0.0/16", 100, true);
    let default = policy("10.1.0.0/16", "0.0.0.0/0", 200, true);
    let name = "a site that came after the default tunnel is chosen";
    tell(name, added([&default, &site]), packet, Some(&site));
    let around = policy("10.1.0.0/16", "10.2.0.0/16", 100, true);
    let inside = policy("10.1.0.0/24", "10.2.0.0/24", 200, true);
    let name =
        "of two offloaded policies in a list the newer is chosen, whatever the priority and the prefixes";
    tell(name, added([&around, &inside]), packet, Some(&inside));
    tell(name, added([&inside, &around]), packet, Some(&around));
    let narrow = policy("10.1.0.0/24", "10.2.0.0/24", 100, true);
    let wide = policy("10.1.0.0/16", "10.2.0.0/16", 200, true);
    tell(name, added([&narrow, &wide]), packet, Some(&wide));
    let again = vec![Change::Update(around.clone())];
    let name = "an update that changes nothing makes an offloaded policy the newest";
    tell(name, [added([&around, &inside]), again].concat(), packet, Some(&around));
    let hosts = policy("10.1.0.9/32", "10.2.0.9/32", 200, true);
    let name = "an offloaded policy between two hosts hides newer and better ones";
    tell(name, added([&hosts, &site]), packet, Some(&hosts));
    let wide = policy("10.0.0.0/8", "10.2.0.0/16", 100, true);
    let elsewhere = policy("172.16.0.0/12", "10.2.0.0/16", 300, true);
    let name = "a worse one that does not match stops the search for another in its list";
    let worse = policy("10.1.0.0/16", "10.2.0.0/16", 200, true);
    tell(name, added([&worse, &wide, &elsewhere]), packet, Some(&worse));
    let name = "but only if something was found before";
    let worse = policy("10.0.0.0/8", "0.0.0.0/0", 200, true);
    tell(name, added([&worse, &wide, &elsewhere]), packet, Some(&wide));

    let neighbour = policy("10.1.0.0/24", "10.2.3.0/24", 10, false);
    let best = policy("10.1.0.0/24", "10.2.1.0/24", 50, true);
    let highest = policy("10.1.0.0/25", "10.2.1.128/25", 300, true);
    let loser = policy("10.1.0.5/32", "10.2.1.0/24", 150, false);
    let wide = policy("10.1.200.0/24", "10.2.0.0/16", 1000, false);
    let packet = ["10.1.0.5", "10.2.1.9"];
    let apart = [added([&neighbour, &best, &highest, &loser]), vec![deletion(&highest)]].concat();
    tell("without a merge the offloaded policy stays ahead", apart, packet, Some(&best));
    let merged = [added([&neighbour, &best, &highest, &loser, &wide]), vec![deletion(&highest)]].concat();
    let name = "a merge puts a policy before offloaded ones, and it stays there";
    tell(name, merged, packet, Some(&loser));
    stories
}

fn added<const N: usize>(policies: [&Policy; N]) -> Vec<Change> {
    policies.map(|policy| Change::Add(policy.clone())).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_chooses_what_the_stories_say() {
        for story in stories(None) {
            let (mut chains, _sources) = Chains::new(1);
            chains.make(&story.changes).unwrap();
            let index = chains.choose(&story.packet).unwrap();
            let chosen = index.and_then(|index| chains.policy(index)).map(|policy| policy.id.clone());
            assert_eq!(chosen, story.winner, "{}", story.name);
        }
    }
}
