//! **For labs only:** software policies that pretend to be offloaded.
//!
//! No NIC that does packet offload is needed to try the fast path: [`Promote`] makes chosen outbound policies of
//! another source look as if the kernel had offloaded them to a device, and assumes a security association
//! for each. What is then sent to the device is *not encrypted*, so nothing but a lab should do this.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
};

use async_trait::async_trait;
use fastswan::{
    Policy, PolicyEvent, PolicySource, SecurityAssociation, SourceError,
    policy::{
        Direction, Family, IPPROTO_ESP, MacAddr, Mode, NextHop, OffloadDev, OffloadKind, Overhead, Template,
    },
    source::BoxFuture,
};

/// The first two bytes of addresses that name a policy; its index follows.
const NAME: [u8; 2] = [2, 6];

/// A next hop that names a policy, or a tunnel: a frame that was forwarded tells which it was for.
pub(crate) fn naming(index: u32) -> NextHop {
    let mut address = [0; 6];
    address[..2].copy_from_slice(&NAME);
    address[2..].copy_from_slice(&index.to_be_bytes());
    NextHop::Fixed { source: MacAddr::default(), destination: MacAddr(address) }
}

/// The number of the policy or the tunnel that a frame's destination address names.
pub(crate) fn named(frame: &[u8]) -> Option<u32> {
    let index = frame.strip_prefix(&NAME)?.first_chunk()?;
    Some(u32::from_be_bytes(*index))
}

/// Ends, reqid, interface id and device.
type Tunnel = (IpAddr, IpAddr, u32, u32, Option<u32>);

/// A source whose chosen outbound policies are promoted to packet offload, each with an assumed association.
#[derive(Debug)]
pub struct Promote<S, F> {
    source: S,
    choose: F,
    device: u32,
    next_hop: NextHop,
    /// Assumed SPI of each tunnel that a promoted policy ever had.
    spis: HashMap<Tunnel, u32>,
    ready: VecDeque<PolicyEvent>,
}

impl<S: PolicySource, F: FnMut(&Policy) -> bool + Send> Promote<S, F> {
    /// Promotes the outbound policies with one ESP template that `choose` returns true for, to the device with
    /// this interface index. Their packets leave with the Ethernet header of `next_hop`.
    ///
    /// A template in transport mode becomes one in tunnel mode between the same addresses. In a lab it may be
    /// optional (`level use`), and then the kernel forwards in clear as well: it takes no optional tunnels.
    ///
    /// A policy that is offloaded already stays on its device, and only its association is assumed.
    pub fn new(source: S, device: u32, next_hop: NextHop, choose: F) -> Self {
        Self { source, choose, device, next_hop, spis: HashMap::new(), ready: VecDeque::new() }
    }

    /// The policy as if it were offloaded, and its association; `None` if it stays as it is.
    fn promote(&mut self, policy: &Policy) -> Option<(Policy, SecurityAssociation)> {
        let [template] = policy.templates[..] else { return None };
        let esp = template.protocol == IPPROTO_ESP && !template.destination.is_unspecified();
        if policy.id.direction != Direction::Out || !esp || !(self.choose)(policy) {
            return None;
        }
        let promoted = OffloadDev { ifindex: self.device, kind: OffloadKind::Packet, inbound: false };
        let offload = policy.offload.or(Some(promoted));
        let Template { source, destination, reqid, .. } = template;
        let tunnel = (source, destination, reqid, policy.id.if_id, offload.map(|device| device.ifindex));
        let next = 0xfffe_0000 + u32::try_from(self.spis.len()).unwrap_or(0);
        let spi = *self.spis.entry(tunnel).or_insert(next);
        let outer = Family::from(template.destination);
        // Promoted policies have the association that is assumed for their tunnel and no other.
        let template = Template { mode: Mode::Tunnel, optional: false, spi, ..template };
        let association = SecurityAssociation {
            if_id: policy.id.if_id,
            offload,
            overhead: Some(Overhead::aes_gcm_tunnel(outer, false, 16)),
            ..SecurityAssociation::for_template(&template, spi)
        };
        let mut promoted = policy.clone();
        promoted.offload = offload;
        promoted.egress.next_hop = self.next_hop;
        promoted.templates = [template].into();
        Some((promoted, association))
    }

    /// What is to be said instead of an event.
    fn replace(&mut self, event: PolicyEvent) {
        match event {
            PolicyEvent::Policy(policy) => match self.promote(&policy) {
                Some((policy, association)) => {
                    self.ready.push_back(PolicyEvent::Sa(association));
                    self.ready.push_back(PolicyEvent::Policy(policy));
                }
                None => self.ready.push_back(PolicyEvent::Policy(policy)),
            },
            PolicyEvent::Snapshot(mut snapshot) => {
                for policy in &mut snapshot.policies {
                    if let Some((promoted, association)) = self.promote(policy) {
                        *policy = promoted;
                        snapshot.sas.push(association);
                    }
                }
                self.ready.push_back(PolicyEvent::Snapshot(snapshot));
            }
            // Real associations come and go; assumed ones stay, and matter to none but their policies. An audit
            // would miss them.
            PolicyEvent::SasFlushed(_) | PolicyEvent::Audit(_) => {}
            other => self.ready.push_back(other),
        }
    }
}

#[async_trait]
impl<S: PolicySource, F: FnMut(&Policy) -> bool + Send> PolicySource for Promote<S, F> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(event) = self.source.next_event().await? else { return Ok(None) };
            self.replace(event);
        }
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        Ok(self.ready.is_empty() && self.source.caught_up()?)
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        self.source.settle()
    }

    fn written(&mut self) {
        self.source.written();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fastswan::{ChannelSource, Database, PolicyId, Selector, Snapshot};
    use futures::FutureExt as _;

    const NIC: u32 = 7;

    fn policy(destination: &str, templates: usize) -> Policy {
        let source = "10.1.0.0/16".parse().unwrap();
        let selector = Selector::between(source, destination.parse().unwrap()).unwrap();
        let template = Template {
            mode: Mode::Transport,
            protocol: IPPROTO_ESP,
            spi: 0,
            source: "192.0.2.1".parse().unwrap(),
            destination: "192.0.2.2".parse().unwrap(),
            reqid: 1,
            optional: true,
        };
        Policy {
            templates: vec![template; templates].into(),
            ..Policy::new(PolicyId::new(Direction::Out, selector))
        }
    }

    #[tokio::test]
    async fn chosen_tunnels_are_offloaded_with_an_association_each_and_others_stay() {
        let policies = vec![policy("10.2.0.0/16", 1), policy("10.3.0.0/16", 0), policy("10.4.0.0/16", 1)];
        let (sender, source) = ChannelSource::new(Snapshot { policies, ..Snapshot::default() }, 4);
        let not_four = |policy: &Policy| policy.id.selector.destination.to_string() != "10.4.0.0/16";
        let mut promote = Promote::new(source, NIC, NextHop::Neighbour, not_four);
        let mut database = Database::default();
        sender.try_send(PolicyEvent::Policy(policy("10.5.0.0/16", 1))).unwrap();
        sender.try_send(PolicyEvent::SasFlushed(0)).unwrap();
        while let Some(event) = promote.next_event().now_or_never() {
            database.apply(event.unwrap().unwrap());
        }
        let fast: Vec<String> = database
            .policies()
            .filter(|policy| policy.is_packet_offloaded())
            .inspect(|policy| {
                let live = database.live_sas(&policy.templates[0], &policy.id.selector, 0, NIC).count();
                assert_eq!((live, policy.egress.next_hop), (1, NextHop::Neighbour));
            })
            .map(|policy| policy.id.selector.destination.to_string())
            .collect();
        assert_eq!(fast, ["10.2.0.0/16", "10.5.0.0/16"]);
    }
}
