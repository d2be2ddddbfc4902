//! Why a packet is fast, or passes, in terms of the policies.
//!
//! The answer comes from what is compiled, so it is the program's; the reasons are looked up in the database.

use std::{fmt, net::IpAddr, str::FromStr};

use fastswan_ebpf::PassReason;
use ipnet::IpNet;

use super::{
    Compiler, exceptions,
    facts::AddressFacts,
    rule::{Candidate, Terms, eligible, is_check, judge, same_way},
    standings::Standings,
};
use crate::{
    database::{Database, Freshness},
    host::{Hook, PathMtu},
    policy::{Direction, Family, Policy, PolicyId, SaId, Selector, Template},
    table::{Fact, Forwarding, Port, Side, Verdict},
};

/// A packet that arrives, as far as its fate depends on more than its own shape.
///
/// ```
/// use fastswan::compiler::Flow;
///
/// let flow: Flow = "10.1.0.5 10.2.0.9 17 1000 2000".parse()?;
/// assert_eq!((flow.protocol, flow.destination_port), (17, 2000));
/// // What comes in on the interface with index 2, without a VLAN tag.
/// let flow = Flow { ingress: Some((2, 0)), ..flow };
/// # let _ = flow;
/// # Ok::<(), fastswan::compiler::ParseFlowError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Interface index and VLAN id (0 for none) that it comes in on; `None` leaves that out of account.
    pub ingress: Option<(u32, u16)>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Upper-layer protocol.
    pub protocol: u8,
    /// Source port, or ICMP type.
    pub source_port: u16,
    /// Destination port, or ICMP code.
    pub destination_port: u16,
    /// Its mark. Frames have none when XDP sees them: only the kernel marks packets.
    pub mark: u32,
}

impl Flow {
    /// Packets between two addresses, of protocol 0, which no packet has, and without ports.
    #[must_use]
    pub fn between(source: IpAddr, destination: IpAddr) -> Self {
        Self { ingress: None, source, destination, protocol: 0, source_port: 0, destination_port: 0, mark: 0 }
    }
}

impl FromStr for Flow {
    type Err = ParseFlowError;

    /// Reads addresses, and if need be the number of the protocol, and ports: `10.1.0.5 10.2.0.9 17 1000 2000`.
    fn from_str(text: &str) -> Result<Self, ParseFlowError> {
        let mut words = text.split_whitespace();
        let error = |what| ParseFlowError { text: text.to_owned(), what };
        let mut address = || words.next()?.parse().ok();
        let (Some(source), Some(destination)) = (address(), address()) else {
            return Err(error("a source and a destination address"));
        };
        let mut flow = Self::between(source, destination);
        let number =
            |word: Option<&str>, what| word.map_or(Ok(0), |word| word.parse().map_err(|_| error(what)));
        let protocol: u16 = number(words.next(), "the protocol's number (6 is TCP, 17 is UDP)")?;
        flow.protocol =
            protocol.try_into().map_err(|_| error("the protocol's number (6 is TCP, 17 is UDP)"))?;
        flow.source_port = number(words.next(), "a source port")?;
        flow.destination_port = number(words.next(), "a destination port")?;
        if words.next().is_some() { Err(error("nothing after the ports")) } else { Ok(flow) }
    }
}

/// A text does not describe a [`Flow`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no packet: it needs {what}, as in \"10.1.0.5 10.2.0.9 17 1000 2000\"")]
pub struct ParseFlowError {
    text: String,
    what: &'static str,
}

/// Whether a packet is fast, and why.
///
/// ```
/// use fastswan::compiler::{Explanation, Flow};
/// use fastswan::{Compiler, Database, PassReason, table::TableConfig};
///
/// let compiler = Compiler::new(TableConfig::default().capacity());
/// let flow = Flow::between("10.1.0.5".parse()?, "10.2.0.9".parse()?);
/// // No source has told anything.
/// let explanation = compiler.explain(&Database::default(), &flow, None);
/// assert!(matches!(explanation, Explanation::Pass { reason: PassReason::Disabled, .. }));
/// println!("{explanation}");
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Explanation {
    /// It is forwarded at XDP, if its length is within the limit.
    Fast {
        /// The policy that the kernel is certain to choose.
        policy: PolicyId,
        /// The associations that the device may use; none if the policy is [assumed](Policy::assumed) to have one.
        sas: Vec<SaId>,
        /// How it leaves.
        forwarding: Forwarding,
    },
    /// It goes to the kernel.
    Pass {
        /// As it is counted.
        reason: PassReason,
        /// What is behind it.
        cause: Cause,
    },
}

impl Explanation {
    pub(crate) fn killed() -> Self {
        Self::Pass { reason: PassReason::Disabled, cause: Cause::Killed }
    }

    pub(crate) fn host_unknown() -> Self {
        Self::Pass { reason: PassReason::Disabled, cause: Cause::HostUnknown }
    }
}

/// Why a packet goes to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// What the source told is not what the kernel has.
    NotCurrent(Freshness),
    /// What the host does with addresses is not known at the moment.
    HostUnknown,
    /// The embedder has turned the kill switch on.
    Killed,
    /// The packet has a mark, so it has been in the kernel already.
    Marked,
    /// The two addresses are of different families.
    MixedFamilies,
    /// The port is not known to the table, or it does not forward the family.
    Port,
    /// The address is one that is never forwarded: loopback, multicast, link-local and the like.
    Special(IpAddr),
    /// A policy is about the packet's protocol or ports.
    Exception(PolicyId),
    /// No policy matches.
    NoPolicy,
    /// The best policy is the kernel's own work, a bypass or a block.
    NotOffloaded(PolicyId),
    /// Another policy makes the kernel's choice uncertain, or another one than this.
    Shadowed {
        /// The packet-offloaded policy with the best priority.
        policy: PolicyId,
        /// The other one.
        by: PolicyId,
        /// How.
        how: Shadow,
    },
    /// A forward policy or a sub policy is about the packet, or about its source.
    Check(PolicyId),
    /// The sources that were merged disagree about a policy that is about the packet, or about its source.
    Disputed(PolicyId),
    /// The embedder keeps the policy from being fast.
    Held(PolicyId),
    /// The policy asks for what the fast path does not do.
    Ineligible(PolicyId, &'static str),
    /// The policy has no live packet-offload association on its device.
    NoSa(PolicyId),
    /// The policy's association is for some packets only.
    NarrowSa {
        /// The policy.
        policy: PolicyId,
        /// The association.
        sa: SaId,
        /// Which packets.
        selector: Selector,
    },
    /// An association of the policy's tunnel gives its packets a mark, with which the kernel may look for another route.
    MarkingSa {
        /// The policy.
        policy: PolicyId,
        /// The association.
        sa: SaId,
    },
    /// The default policy blocks.
    DefaultBlock,
    /// The next hop of the policy, its device or its path's length is not known.
    NoPath(PolicyId),
    /// The policy's tunnel begins at an address that the host no longer has: the kernel finds no route from it.
    ForeignSource(PolicyId, IpAddr),
    /// Something may change the packet's fate on its way, or before, where it comes in.
    Hook(Hook),
    /// The table has no room.
    Capacity,
    /// The policy's device, which has this index, takes no frames from XDP.
    Egress(u32),
    /// The kernel has learnt that packets to the destination must be shorter than the policy's device takes: it answers those
    /// that are too long.
    PathMtu(PathMtu),
    /// An address is one that the host does not forward to or from, or has no route. The prefix is the one that is
    /// known about.
    Address {
        /// Of the packet.
        side: Side,
        /// What is known about, if anything is.
        prefix: Option<IpNet>,
        /// What is known.
        fact: Option<Fact>,
        /// The priority (`pref`) of the rule of policy routing that says so, or of the first one of which it is not known
        /// whether it is for the packet. `None` if no rule matters.
        rule: Option<u32>,
    },
}

/// How a policy keeps another one from being fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Shadow {
    /// It has a better priority.
    Better,
    /// It has the same priority.
    Tie,
    /// It is offloaded too, leads another way, and may be found first.
    Offloaded,
    /// It loses, but not to the highest priority number that offloaded policies have had: the kernel may look at it
    /// first.
    BelowHighest,
    /// It loses, but stands in an order that a snapshot does not tell.
    UnknownOrder,
}

impl Compiler {
    /// Whether a packet is fast, and why. `port` is the one it comes in on, if that is to be taken into account.
    ///
    /// Looks at all policies.
    #[must_use]
    pub fn explain(&self, database: &Database, flow: &Flow, port: Option<&Port>) -> Explanation {
        self.explained(database, flow, port).unwrap_or_else(|pass| *pass)
    }

    fn explained(
        &self,
        database: &Database,
        flow: &Flow,
        port: Option<&Port>,
    ) -> Result<Explanation, Box<Explanation>> {
        if !database.is_current() {
            return Err(pass(PassReason::Disabled, Cause::NotCurrent(database.freshness())));
        }
        if flow.mark != 0 {
            return Err(pass(PassReason::Disabled, Cause::Marked));
        }
        let family = Family::of(&flow.destination.into());
        if family != Family::of(&flow.source.into()) {
            return Err(pass(PassReason::BadHeader, Cause::MixedFamilies));
        }
        if flow.ingress.is_some() {
            let port = port.ok_or_else(|| pass(PassReason::UnknownPort, Cause::Port))?;
            let forwards = match family {
                Family::V4 => port.forwards.v4,
                Family::V6 => port.forwards.v6,
            };
            if !forwards {
                return Err(pass(PassReason::NotForwarding, Cause::Port));
            }
        }
        for (address, reason) in
            [(flow.source, PassReason::MartianSource), (flow.destination, PassReason::MartianDestination)]
        {
            if is_special(address) {
                return Err(pass(reason, Cause::Special(address)));
            }
        }
        let matching: Vec<&Policy> = database.policies().filter(|policy| is_about(policy, flow)).collect();
        let compiled = self.verdicts.family(family);
        let is_listed = |policy: &&&Policy| {
            exceptions::exception(policy).is_some_and(|exception| compiled.exceptions().is_listed(&exception))
        };
        if let Some(policy) = matching.iter().find(is_listed) {
            return Err(pass(PassReason::Exception, Cause::Exception(policy.id.clone())));
        }

        let verdict = compiled.verdict(flow.source, flow.destination);
        let (slot, probes) = match verdict {
            None => {
                // The table has no cell for it, so the program knows of no policy.
                let is_left_out =
                    |policy: &&Policy| policy.id.direction == Direction::Out && policy.is_packet_offloaded();
                let no_room = matching.iter().any(is_left_out);
                return Err(pass(
                    PassReason::NoPolicy,
                    if no_room { Cause::Capacity } else { Cause::NoPolicy },
                ));
            }
            Some(Verdict::Pass(reason)) => {
                let cause = match reason {
                    PassReason::DeniedDestination | PassReason::RouteElsewhere => {
                        self.of_address(Side::Destination, flow)
                    }
                    PassReason::DeniedSource => self.of_address(Side::Source, flow),
                    _ => cause(database, &matching, reason),
                };
                return Err(pass(reason, cause));
            }
            Some(Verdict::Fast { slot, probes }) => (slot, probes),
        };
        let owner = matching.iter().find(|policy| self.slot(database, &policy.id) == Some(slot));
        let Some(policy) = owner else { return Err(pass(PassReason::NoPolicy, Cause::NoPolicy)) };
        let forwarding = Standings::new(database, &self.paths)
            .of(policy)
            .standing
            .map_err(|reason| pass(reason, self.of_standing(database, policy, reason)))?;
        if probes.guards && compiled.is_guarded(flow.source) {
            let is_guard =
                |policy: &&Policy| is_check(policy) && policy.id.selector.source.contains(&flow.source);
            // Rather one that is about the destination too, but any will do.
            let guard = database
                .policies()
                .filter(is_guard)
                .max_by_key(|policy| policy.id.selector.destination.contains(&flow.destination));
            let cause = guard.map_or(Cause::Capacity, of_check);
            return Err(pass(PassReason::Guarded, cause));
        }
        let addresses = (flow.source, flow.destination);
        AddressFacts::new(&self.paths, family)
            .allow(addresses, probes, forwarding.ifindex, port)
            .map_err(|(reason, side)| pass(reason, self.of_address(side, flow)))?;
        let mut sas: Vec<SaId> = match policy.assumed {
            Some(_) => Vec::new(),
            None => database.live_sas(policy).map(|sa| sa.id).collect(),
        };
        sas.sort_unstable();
        Ok(Explanation::Fast { policy: policy.id.clone(), sas, forwarding })
    }

    /// What is known about an address of a packet.
    fn of_address(&self, side: Side, flow: &Flow) -> Cause {
        let address = if side == Side::Source { flow.source } else { flow.destination };
        let facts = AddressFacts::new(&self.paths, Family::from(address));
        if let (Side::Destination, Some(mtu)) = (side, facts.limiting_path_mtu(address)) {
            return Cause::PathMtu(PathMtu { destination: address, mtu });
        }
        let (prefix, fact) = facts.known(side, address.into()).unzip();
        Cause::Address { side, prefix, fact, rule: facts.rule(side, address) }
    }

    fn of_standing(&self, database: &Database, policy: &Policy, reason: PassReason) -> Cause {
        let found = match (reason, eligible(policy)) {
            (PassReason::NoPath, Ok(Template { source, .. })) if !self.paths.may_send_from(*source) => {
                Some(Cause::ForeignSource(policy.id.clone(), *source))
            }
            (PassReason::Hook, _) => {
                let device = policy.offload.map_or(0, |device| device.ifindex);
                self.paths.hook(policy.id.selector.family(), device).cloned().map(Cause::Hook)
            }
            (PassReason::NoSa, _) => {
                let marking = database.marking_sa(policy);
                let marking = marking.map(|sa| Cause::MarkingSa { policy: policy.id.clone(), sa });
                marking.or_else(|| {
                    let (sa, selector) = database.narrow_sa(policy)?;
                    Some(Cause::NarrowSa { policy: policy.id.clone(), sa, selector })
                })
            }
            _ => None,
        };
        found.unwrap_or_else(|| of_standing(policy, reason))
    }
}

fn pass(reason: PassReason, cause: Cause) -> Box<Explanation> {
    Box::new(Explanation::Pass { reason, cause })
}

/// Whether a policy's selector matches, but for what no packet at XDP tells, and direction.
fn is_about(policy: &Policy, flow: &Flow) -> bool {
    let selector = &policy.id.selector;
    // Of DCCP, GRE and mobility packets the program does not read what the kernel compares with ports.
    let has_ports = !matches!(flow.protocol, 33 | 47 | 135);
    policy.id.direction != Direction::In
        && selector.source.contains(&flow.source)
        && selector.destination.contains(&flow.destination)
        && (selector.protocol == 0 || selector.protocol == flow.protocol)
        && (!has_ports
            || selector.source_port.matches(flow.source_port)
                && selector.destination_port.matches(flow.destination_port))
}

/// What is behind the reason of a cell, by the policies that match a packet in it.
fn cause(database: &Database, matching: &[&Policy], reason: PassReason) -> Cause {
    let mut outbound: Vec<&Policy> = matching.iter().copied().filter(|policy| !is_check(policy)).collect();
    outbound.sort_by_key(|policy| (policy.priority, !policy.is_packet_offloaded()));
    let offloaded = outbound.iter().find(|policy| policy.is_packet_offloaded());
    let found = match reason {
        PassReason::NotOffloaded => outbound.first().map(|policy| Cause::NotOffloaded(policy.id.clone())),
        PassReason::ForwardOrSubPolicy => {
            let check = matching.iter().find(|policy| is_check(policy));
            check.copied().map(of_check)
        }
        PassReason::Shadowed => offloaded.and_then(|policy| shadow(database, &outbound, policy)),
        _ => offloaded.map(|policy| of_standing(policy, reason)),
    };
    found.unwrap_or(Cause::Capacity)
}

/// What keeps the packet-offloaded policy with the best priority from being certain.
fn shadow(database: &Database, outbound: &[&Policy], policy: &Policy) -> Option<Cause> {
    let highest = database.highest_offloaded_priority(policy.id.selector.family()).unwrap_or(0);
    let terms = Terms { highest, order: database.order(), broken: None };
    let others = || outbound.iter().filter(|other| !same_way(policy, other, None));
    let how = |other: &Policy| {
        if other.priority < policy.priority {
            Shadow::Better
        } else if other.priority == policy.priority {
            Shadow::Tie
        } else if other.is_packet_offloaded() {
            Shadow::Offloaded
        } else if other.priority <= highest {
            Shadow::BelowHighest
        } else {
            Shadow::UnknownOrder
        }
    };
    let candidate = |policy: &Policy| Some(Candidate::of(database.key_of(&policy.id)?, policy, None));
    let of_device = outbound.iter().filter(|policy| policy.is_packet_offloaded());
    let of_device: Vec<Candidate> = of_device.filter_map(|policy| candidate(policy)).collect();
    let is_certain_among_these = judge(&of_device, database, terms).choice.is_ok();
    let hinders = |other: &&&Policy| {
        let how = how(other);
        // The order of what is offloaded is rather named than that of what is not, unless it is known.
        matches!(how, Shadow::Better | Shadow::Tie | Shadow::BelowHighest)
            || (how == Shadow::UnknownOrder) == is_certain_among_these
    };
    let by = others().find(hinders).or_else(|| others().next())?;
    Some(Cause::Shadowed { policy: policy.id.clone(), by: by.id.clone(), how: how(by) })
}

fn of_check(policy: &Policy) -> Cause {
    let id = policy.id.clone();
    if policy.disputed { Cause::Disputed(id) } else { Cause::Check(id) }
}

fn of_standing(policy: &Policy, reason: PassReason) -> Cause {
    let id = policy.id.clone();
    match reason {
        PassReason::NotOffloaded => Cause::NotOffloaded(id),
        PassReason::Held => Cause::Held(id),
        PassReason::Ineligible => Cause::Ineligible(id, why_ineligible(policy)),
        PassReason::NoSa => Cause::NoSa(id),
        PassReason::DefaultBlock => Cause::DefaultBlock,
        PassReason::NoPath => Cause::NoPath(id),
        _ => Cause::Capacity,
    }
}

fn why_ineligible(policy: &Policy) -> &'static str {
    if policy.id.mark.mask != 0 {
        "has a mark"
    } else if policy.id.if_id != 0 {
        "has an interface id"
    } else if !policy.id.security_context.is_empty() {
        "has a security context"
    } else if policy.id.selector.ifindex != 0 {
        "is for one interface"
    } else if policy.use_limited {
        "ends after a number of packets or bytes, or some time after its last use"
    } else if policy.asks_per_cpu {
        "asks for an association for each processor"
    } else if policy.templates.len() != 1 {
        "has more than one template"
    } else if eligible(policy).is_ok() {
        "is about to expire"
    } else {
        "asks for something else than a required ESP tunnel between addresses of its own family"
    }
}

fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => fastswan_ebpf::is_special_v4(address.to_bits()),
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            let [high, low] = [bits >> 64, bits & u128::from(u64::MAX)];
            let half = |half: u128| u64::try_from(half).unwrap_or(0);
            fastswan_ebpf::is_special_v6([half(high), half(low)])
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fast { policy, sas, forwarding } => {
                write!(
                    f,
                    "fast: {policy}, device #{}, up to {} bytes",
                    forwarding.ifindex, forwarding.max_length
                )?;
                sas.iter().try_for_each(|sa| write!(f, ", SA {sa}"))
            }
            Self::Pass { reason, cause } => write!(f, "kernel ({}): {cause}", reason.name()),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotCurrent(Freshness::Stale(cause)) => {
                write!(f, "the source has lost track ({cause:?}) and has not started over yet")
            }
            Self::NotCurrent(_) => f.write_str("the source has not told its policies yet"),
            Self::Killed => f.write_str("the kill switch is on"),
            Self::HostUnknown => {
                f.write_str("what the host does with addresses has changed and has not been read yet")
            }
            Self::Marked => f.write_str("it has a mark, so it has been in the kernel already"),
            Self::MixedFamilies => f.write_str("its addresses are of different families"),
            Self::Port => f.write_str("no port that forwards its family is known there"),
            Self::Special(address) => write!(f, "{address} is never forwarded, or rarely"),
            Self::Exception(policy) => write!(f, "its protocol or ports are what {policy} is about"),
            Self::NoPolicy => f.write_str("no policy matches"),
            Self::NotOffloaded(policy) => {
                write!(f, "{policy} is not packet-offloaded, or is a bypass or a block")
            }
            Self::Shadowed { policy, by, how } => {
                let how = match how {
                    Shadow::Better => "has a better priority",
                    Shadow::Tie => "has the same priority, and which is older is not known",
                    Shadow::Offloaded => "is packet-offloaded too, leads another way, and may be found first",
                    Shadow::BelowHighest => {
                        "has no higher number than all packet-offloaded policies have had, so it may come first"
                    }
                    Shadow::UnknownOrder => {
                        "may come first: the order in the kernel is not known since the last snapshot"
                    }
                };
                write!(f, "{policy} is shadowed by {by}, which {how}")
            }
            Self::Check(policy) => write!(f, "the kernel must check {policy}"),
            Self::Disputed(policy) => write!(f, "the sources disagree about {policy}"),
            Self::Held(policy) => write!(f, "{policy} is kept from being fast by choice"),
            Self::Ineligible(policy, why) => write!(f, "{policy} {why}"),
            Self::NoSa(policy) => {
                write!(f, "{policy} has no live outbound packet-offload association on its device")
            }
            Self::NarrowSa { policy, sa, selector } => {
                write!(f, "the SA of {policy} ({sa}) is for {selector} only, which is not all of its packets")
            }
            Self::MarkingSa { policy, sa } => {
                write!(
                    f,
                    "an SA of {policy} ({sa}) sets a mark, by which rules may route its packets another way"
                )
            }
            Self::DefaultBlock => f.write_str("the default policy blocks"),
            Self::NoPath(policy) => {
                write!(
                    f,
                    "how packets of {policy} leave is not known: device, carrier, route, next hop or length"
                )
            }
            Self::ForeignSource(policy, address) => {
                write!(f, "the tunnel of {policy} begins at {address}, which is not an address of this host")
            }
            Self::Hook(hook) => write!(f, "the fast path would skip {hook}"),
            Self::Capacity => f.write_str("the table has no room to tell it apart from others"),
            Self::Egress(ifindex) => write!(
                f,
                "device #{ifindex} takes no frames from XDP: its driver does not, or, of a veth device, the peer has GRO off"
            ),
            Self::PathMtu(PathMtu { destination, mtu }) => {
                write!(
                    f,
                    "a path MTU of {mtu} has been learnt for {destination}: the kernel tells what is too long"
                )
            }
            Self::Address { side, prefix, fact, rule } => {
                let side = match side {
                    Side::Destination => "destination",
                    Side::Source => "source",
                };
                write!(f, "its {side} ")?;
                match fact {
                    Some(Fact::Via(device)) => write!(f, "is routed to device #{device}")?,
                    Some(Fact::Denied) => {
                        write!(f, "is the host's own, broadcast, unroutable or unclear")?;
                    }
                    None => f.write_str("is not routed the policy's way")?,
                }
                if let Some(prefix) = prefix {
                    write!(f, " ({prefix})")?;
                }
                rule.map_or(Ok(()), |priority| write!(f, ", by the rule with pref {priority}"))
            }
        }
    }
}
