//! The policies, and the kernel that has them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    ops::Range,
};

use fastswan::{
    Policy, PolicyId, Selector,
    policy::{Direction, IPPROTO_ESP, Mode, PolicyType, Template},
};
use ipnet::{IpNet, Ipv4Net};

use crate::requests::{BATCH, Change, Requests, request};

/// What the networks of all policies lie in.
pub(super) const NETWORKS: &str = "32.0.0.0/4";
const FIRST: u32 = 0x2000_0000;
/// Both ends of all tunnels.
const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const REMOTE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// Makes requests, in the network namespace of the thread that opens it.
pub(super) struct Kernel(Requests);

impl Kernel {
    pub(super) fn open() -> io::Result<Self> {
        Requests::open().map(Self)
    }

    /// Adds the policies with these numbers.
    pub(super) fn add(&mut self, numbers: Range<u32>) -> anyhow::Result<()> {
        self.make(numbers.map(|number| Ok(Change::Add(policy(number)?))))
    }

    /// Deletes the policies with these numbers, one by one.
    pub(super) fn delete(&mut self, numbers: Range<u32>) -> anyhow::Result<()> {
        self.make(numbers.map(|number| Ok(Change::Delete { id: policy(number)?.id, index: None })))
    }

    /// Deletes all policies at once.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        self.make([Ok(Change::Flush(PolicyType::Main))].into_iter())
    }

    fn make(&mut self, changes: impl Iterator<Item = anyhow::Result<Change>>) -> anyhow::Result<()> {
        let mut changes = changes.peekable();
        while changes.peek().is_some() {
            let batch: Vec<_> = changes
                .by_ref()
                .take(BATCH)
                .map(|change| Ok(request(&change?)))
                .collect::<anyhow::Result<_>>()?;
            self.0.make(batch)?.into_iter().collect::<io::Result<()>>()?;
        }
        Ok(())
    }
}

/// An address that the policy with this number is about.
pub(super) fn destination(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST | number << 8 | 9)
}

/// The number of a policy.
pub(super) fn number(id: &PolicyId) -> Option<u32> {
    match id.selector.destination {
        IpNet::V4(network) => Some((network.network().to_bits() ^ FIRST) >> 8),
        IpNet::V6(_) => None,
    }
}

/// From the client's network to one of many. An optional tunnel in transport mode: without an association the kernel forwards in
/// clear.
fn policy(number: u32) -> anyhow::Result<Policy> {
    let net = |bits, length| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from_bits(bits), length));
    let selector = Selector::between(net(0x0a01_0000, 16), net(FIRST | number << 8, 24))?;
    let template = Template {
        mode: Mode::Transport,
        protocol: IPPROTO_ESP,
        spi: 0,
        source: IpAddr::V4(LOCAL),
        destination: IpAddr::V4(REMOTE),
        reqid: number + 1,
        optional: true,
    };
    let id = PolicyId::new(Direction::Out, selector);
    Ok(Policy { priority: 100, templates: [template].into(), ..Policy::new(id) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::growth::Growth;

    #[test]
    fn each_policy_has_a_number_and_an_address_of_its_own() {
        for number in [0, 1, 255, 256, Growth::MOST_POLICIES - 1] {
            let policy = policy(number).unwrap();
            assert_eq!(super::number(&policy.id), Some(number));
            assert!(policy.id.selector.destination.contains(&IpAddr::V4(destination(number))));
            assert!(NETWORKS.parse::<IpNet>().unwrap().contains(&policy.id.selector.destination));
        }
    }
}
