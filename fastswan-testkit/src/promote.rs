//! **For labs only:** software policies that pretend to be offloaded.
//!
//! No NIC that does packet offload is needed to try the fast path: [`Promote`] makes chosen outbound policies of
//! another source look as if the kernel had offloaded them to a device, and assumes a security association
//! for each. What is then sent to the device is *not encrypted*, so nothing but a lab should do this.

use async_trait::async_trait;
use fastswan::{
    Policy, PolicyEvent, PolicySource, SourceError,
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

/// A source whose chosen outbound policies are promoted to packet offload, each with an assumed association.
#[derive(Debug)]
pub struct Promote<S, F> {
    source: S,
    choose: F,
    device: u32,
    next_hop: NextHop,
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
        Self { source, choose, device, next_hop }
    }

    /// Makes a policy look as if it were offloaded, unless it stays as it is.
    fn promote(&mut self, policy: &mut Policy) {
        let [template] = policy.templates[..] else { return };
        let esp = template.protocol == IPPROTO_ESP && !template.destination.is_unspecified();
        if policy.id.direction != Direction::Out || !esp || !(self.choose)(policy) {
            return;
        }
        let promoted = OffloadDev { ifindex: self.device, kind: OffloadKind::Packet, inbound: false };
        policy.offload = policy.offload.or(Some(promoted));
        policy.egress.next_hop = self.next_hop;
        policy.templates = [Template { mode: Mode::Tunnel, optional: false, ..template }].into();
        policy.assumed = Some(Overhead::aes_gcm_tunnel(Family::from(template.destination), false, 16));
    }
}

#[async_trait]
impl<S: PolicySource, F: FnMut(&Policy) -> bool + Send> PolicySource for Promote<S, F> {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        let mut event = self.source.next_event().await?;
        match &mut event {
            Some(PolicyEvent::Policy(policy)) => self.promote(policy),
            Some(PolicyEvent::Snapshot(snapshot) | PolicyEvent::Audit(snapshot)) => {
                snapshot.policies.iter_mut().for_each(|policy| self.promote(policy));
            }
            _ => {}
        }
        Ok(event)
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        self.source.caught_up()
    }

    fn settle(&mut self) -> BoxFuture<'static, Result<(), SourceError>> {
        self.source.settle()
    }

    fn written(&mut self) {
        self.source.written();
    }

    fn queued(&self) -> usize {
        self.source.queued()
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
                assert!(policy.assumed.is_some());
                assert_eq!(policy.egress.next_hop, NextHop::Neighbour);
            })
            .map(|policy| policy.id.selector.destination.to_string())
            .collect();
        assert_eq!(fast, ["10.2.0.0/16", "10.5.0.0/16"]);
    }
}
