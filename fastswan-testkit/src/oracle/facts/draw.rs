//! Where chance comes in when a host is changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};

use super::{aims::Aims, command::Command, tunnels::Tunnel};

/// A way to change the host, in one or more steps, and back.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    /// Between two of them, packets are judged.
    pub(super) steps: Vec<Vec<Command>>,
    /// What undoes them; what fails is left out.
    pub(super) undo: Vec<Command>,
    pub(super) aims: Aims,
}

impl Change {
    /// One step.
    pub(super) fn once(step: impl IntoIterator<Item = Command>) -> Self {
        Self::default().then(step)
    }

    /// One more step.
    pub(super) fn then(mut self, step: impl IntoIterator<Item = Command>) -> Self {
        self.steps.push(step.into_iter().collect());
        self
    }

    pub(super) fn undone_by(mut self, undo: impl IntoIterator<Item = Command>) -> Self {
        self.undo.extend(undo);
        self
    }

    /// Packets to these addresses are of interest.
    pub(super) fn to(mut self, prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        self.aims.destinations.extend(prefixes);
        self
    }

    /// Packets from these addresses are of interest.
    pub(super) fn from(mut self, prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        self.aims.sources.extend(prefixes);
        self
    }

    pub(super) fn tos(mut self, tos: u8) -> Self {
        self.aims.tos.push(tos);
        self
    }

    pub(super) fn ports(mut self, port: u16) -> Self {
        self.aims.ports.push(port);
        self
    }

    pub(super) fn lengths(mut self, around: usize) -> Self {
        self.aims.lengths.extend([around - 1, around, around + 1]);
        self
    }

    pub(super) fn solicitations(mut self) -> Self {
        self.aims.solicitations = true;
        self
    }
}

/// Chance, and what there is to choose from.
pub(super) struct Draw<'a> {
    pub(super) rng: &'a mut StdRng,
    pub(super) tunnels: &'a [Tunnel],
}

impl Draw<'_> {
    pub(super) fn flip(&mut self) -> bool {
        self.rng.random()
    }

    pub(super) fn one<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(self.rng).expect("something to choose from")
    }

    pub(super) fn below(&mut self, end: u32) -> u32 {
        self.rng.random_range(0..end)
    }

    /// A tunnel of a family.
    pub(super) fn tunnel(&mut self, v6: bool) -> Tunnel {
        let of_family: Vec<Tunnel> =
            self.tunnels.iter().filter(|tunnel| tunnel.is_v6() == v6).copied().collect();
        self.one(&of_family)
    }

    /// A prefix inside what a tunnel leads to, or all of it.
    pub(super) fn destination(&mut self, v6: bool) -> IpNet {
        let tunnel = self.tunnel(v6);
        let prefix = if tunnel.destination.prefix_len() == 0 {
            let v4 = ["10.2.0.0/16", "10.9.0.0/16", "172.16.0.0/12"];
            let of_v6 = ["2001:db8:2::/48", "2001:db8:9::/48", "2001:db8:10::/44"];
            self.one(if v6 { &of_v6 } else { &v4 }).parse().expect("a prefix")
        } else {
            tunnel.destination
        };
        self.inside(prefix)
    }

    /// A prefix inside what a tunnel comes from.
    pub(super) fn source(&mut self, v6: bool) -> IpNet {
        let v4 = ["10.1.0.0/16", "10.1.0.0/16", "10.7.0.0/16", "203.0.113.0/24"];
        let of_v6 = ["2001:db8:1::/48", "2001:db8:1::/48", "2001:db8:7::/48", "2001:db8:9::/48"];
        let network = self.one(if v6 { &of_v6 } else { &v4 }).parse().expect("a prefix");
        self.inside(network)
    }

    /// A prefix inside another one, or that one.
    pub(super) fn inside(&mut self, prefix: IpNet) -> IpNet {
        let (length, most) = (prefix.prefix_len(), prefix.max_prefix_len());
        if self.below(8) == 0 {
            return prefix;
        }
        let longer: &[u8] = if most == 32 { &[1, 4, 8, 9, 15, 16] } else { &[1, 4, 16, 17, 64, 80] };
        let length = (length + self.one(longer)).min(most);
        let network = bits(prefix.network());
        let room = bits(prefix.broadcast()) - network;
        // Near the beginning, so that what several changes are about overlaps.
        let random: u128 = if self.flip() { self.rng.random() } else { self.rng.random::<u128>() & 0xffff };
        let address = address(network | random & room, most == 32);
        IpNet::new(address, length).expect("a length of the family").trunc()
    }

    /// An address of a prefix.
    pub(super) fn address(&mut self, prefix: IpNet) -> IpAddr {
        let network = bits(prefix.network());
        let random: u128 = self.rng.random::<u128>() & (bits(prefix.broadcast()) - network);
        address(network | random, prefix.max_prefix_len() == 32)
    }

    /// A gateway behind out0.
    pub(super) fn gateway(&mut self, v6: bool) -> &'static str {
        if v6 { self.one(&["2001:db8:f::2", "2001:db8:f::3"]) } else { self.one(&["192.0.2.2", "192.0.2.3"]) }
    }

    /// A type of route that drops.
    pub(super) fn denial(&mut self) -> &'static str {
        self.one(&["blackhole", "unreachable", "prohibit"])
    }

    /// A way for a route to lead somewhere: to out0 as before, to another device, or nowhere.
    pub(super) fn via(&mut self, v6: bool) -> String {
        match self.below(4) {
            0 => format!("via {} dev out0", self.gateway(v6)),
            1 => format!("via {} dev out1", if v6 { "2001:db8:e::2" } else { "198.51.100.2" }),
            2 => "dev lan1".to_owned(),
            _ => format!("via {} dev lan0", if v6 { "2001:db8:1::5" } else { "10.1.0.5" }),
        }
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn address(bits: u128, v4: bool) -> IpAddr {
    match u32::try_from(bits & u128::from(u32::MAX)) {
        Ok(bits) if v4 => Ipv4Addr::from(bits).into(),
        _ => Ipv6Addr::from(bits).into(),
    }
}
