//! What comes in the way of packets on the host, and goes: routes, rules, addresses, sysctls, filters, a device that
//! is down. And what changes beside them and has nothing to do with any packet.

use std::{fmt::Write as _, time::Duration};

use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng};

use super::{host::v4, mirror::LEASE};

/// How often what the kernel does not tell of is looked at, and how long that may take: ARCHITECTURE.md has the table.
const POLLED: Duration = Duration::from_millis(250);
/// Unrelated changes at a time: a few, and more than the host source's receive buffer holds.
const FEW: u32 = 50;
const MANY: u32 = 3000;

/// Something that makes packets pass while it is there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Hindrance {
    /// Command lines, and those that take it back.
    pub(super) comes: Vec<String>,
    pub(super) goes: Vec<String>,
    pub(super) concerns: Concerned,
    /// So long after it has come, none of those packets may be fast any longer.
    pub(super) within: Duration,
}

/// Which packets it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Concerned {
    All,
    /// Of one family.
    Family {
        v6: bool,
    },
    From(IpNet),
    To(IpNet),
}

impl Hindrance {
    /// Any.
    pub(super) fn draw(rng: &mut StdRng) -> Self {
        let v6 = rng.random_bool(0.25);
        let net = rng.random_range(0..48_u8);
        let to = if v6 { prefix(&format!("2001:db8:2:{net:x}::/64")) } else { v4(2, net, 0, 24) };
        let ip = if v6 { "ip -6" } else { "ip" };
        let told = |comes: &str, goes: &str, concerns| Self::new([comes], [goes], concerns, LEASE);
        let polled = |comes: &str, goes: &str, concerns| Self::new([comes], [goes], concerns, LEASE + POLLED);
        match rng.random_range(0..11) {
            0..3 => {
                let kind = ["blackhole", "unreachable", "prohibit"][rng.random_range(0..3)];
                let route = format!("{kind} {to} metric 7");
                told(
                    &format!("{ip} route add {route}"),
                    &format!("{ip} route del {route}"),
                    Concerned::To(to),
                )
            }
            3..5 => {
                let rule = format!("pref 90 to {to} blackhole");
                told(&format!("{ip} rule add {rule}"), &format!("{ip} rule del {rule}"), Concerned::To(to))
            }
            5 => {
                let own = format!("{to} dev lo table local");
                told(
                    &format!("{ip} route add local {own}"),
                    &format!("{ip} route del local {own}"),
                    Concerned::To(to),
                )
            }
            6 => {
                let key = if v6 { "net.ipv6.conf.all.forwarding" } else { "net.ipv4.ip_forward" };
                told(&format!("sysctl {key}=0"), &format!("sysctl {key}=1"), Concerned::Family { v6 })
            }
            7 => {
                let from = v4(1, rng.random_range(0..8), 0, 24);
                let (on, off) =
                    ("sysctl net.ipv4.conf.in0.rp_filter=1", "sysctl net.ipv4.conf.in0.rp_filter=0");
                Self::new(
                    [on.to_owned(), format!("ip route add {from} dev out0")],
                    [off.to_owned(), format!("ip route del {from} dev out0")],
                    Concerned::From(from),
                    LEASE,
                )
            }
            8 => {
                let key = "net.ipv4.conf.out0.disable_xfrm";
                let v4 = Concerned::Family { v6: false };
                polled(&format!("sysctl {key}=1"), &format!("sysctl {key}=0"), v4)
            }
            9 => Self::new(
                [
                    "nft add table inet fw",
                    "nft add chain inet fw forward { type filter hook forward priority 0 ; policy drop ; }",
                ],
                ["nft delete table inet fw"],
                Concerned::All,
                LEASE + POLLED,
            ),
            _ => Self::new(
                ["ip link set out0 down"],
                [
                    "ip link set out0 up",
                    "ip address replace 2001:db8:f::1/48 dev out0 nodad",
                    "ip route replace default via 192.0.2.2",
                    "ip route replace default via 2001:db8:f::2",
                ],
                Concerned::All,
                LEASE,
            ),
        }
    }

    fn new<Line: Into<String>>(
        comes: impl IntoIterator<Item = Line>,
        goes: impl IntoIterator<Item = Line>,
        concerns: Concerned,
        within: Duration,
    ) -> Self {
        let comes = comes.into_iter().map(Into::into).collect();
        Self { comes, goes: goes.into_iter().map(Into::into).collect(), concerns, within }
    }
}

impl Concerned {
    /// Those of the packets between two networks that it is about, if there are any.
    pub(super) fn part_of(self, source: IpNet, destination: IpNet) -> Option<(IpNet, IpNet)> {
        match self {
            Self::All => Some((source, destination)),
            Self::Family { v6 } => (source.addr().is_ipv6() == v6).then_some((source, destination)),
            Self::From(net) => Some((common(net, source)?, destination)),
            Self::To(net) => Some((source, common(net, destination)?)),
        }
    }
}

/// What two prefixes have in common: the longer one, or nothing.
fn common(one: IpNet, other: IpNet) -> Option<IpNet> {
    if one.contains(&other) { Some(other) } else { other.contains(&one).then_some(one) }
}

/// Lines for `ip -batch` about things that no packet has to do with; they leave nothing behind.
pub(super) fn noise(rng: &mut StdRng) -> String {
    let size = if rng.random_range(0..8) == 0 { MANY } else { FEW };
    let kind = rng.random_range(0..4);
    let mut lines = String::new();
    for verb in ["add", "del"] {
        for at in 0..size {
            let [.., high, low] = at.to_be_bytes();
            let line = match kind {
                0 => format!("route {verb} blackhole 10.99.{high}.{low}/32"),
                1 => format!("route {verb} 2001:db8:99::{at:x}/128 dev in0"),
                2 => format!("neighbour {verb} 10.1.{}.{low} lladdr 02:00:00:00:06:01 dev in0", 100 + high),
                _ => format!("route {verb} 10.99.{high}.{low}/32 dev in0 table 77"),
            };
            let _ = writeln!(lines, "{line}");
        }
    }
    lines
}

fn prefix(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packets_concerned_are_those_of_both() {
        let [wide, narrow, other] = ["10.2.0.0/16", "10.2.7.0/24", "10.3.0.0/24"].map(prefix);
        assert_eq!(Concerned::To(narrow).part_of(other, wide), Some((other, narrow)));
        assert_eq!(Concerned::To(wide).part_of(other, narrow), Some((other, narrow)));
        assert_eq!(Concerned::From(narrow).part_of(other, wide), None);
        assert_eq!(Concerned::Family { v6: true }.part_of(narrow, other), None);
        assert_eq!(Concerned::All.part_of(narrow, other), Some((narrow, other)));
    }
}
