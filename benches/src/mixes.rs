//! Policies as gateways have them, in any number, and what mirrors them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastswan::{
    Compiler, Database, HostFacts, MemoryTable, OffloadTable as _, Policy, PolicyEvent, PolicyId,
    SecurityAssociation, Selector, Snapshot,
    policy::{Direction, Egress, Family, OffloadDev, OffloadKind, Overhead, PortMatch, Template, Templates},
    table::TableConfig,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The packet-offload device.
const NIC: u32 = 7;

/// A kind of gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Networks of /24 on both sides, each pair with a tunnel of its own; outbound policies only.
    SiteToSite,
    /// A hub whose local network covers its peers', with an outbound, a forward and an inbound policy for each, and
    /// the bypass policies for IKE: what strongSwan installs.
    StrongSwan,
    /// Everything to single addresses.
    RoadWarrior,
    /// Prefixes of lengths from 16 to 28 inside one network of either family, a third of them software policies that
    /// lose.
    Overlaps,
}

impl Mix {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::SiteToSite, Self::StrongSwan, Self::RoadWarrior, Self::Overlaps];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SiteToSite => "site-to-site",
            Self::StrongSwan => "strongSwan",
            Self::RoadWarrior => "road warrior",
            Self::Overlaps => "overlaps",
        }
    }

    /// The policy with this number.
    #[must_use]
    pub fn policy(self, number: u32) -> Policy {
        match self {
            Self::SiteToSite => {
                let (source, destination) =
                    (v4(0x1000_0000 | number << 8, 24), v4(0x2000_0000 | number << 8, 24));
                offloaded(source, destination, number, 100)
            }
            Self::StrongSwan if number < 2 => {
                let mut bypass = software(v4(0, 0), v4(0, 0), 32);
                bypass.id.selector.protocol = 17;
                bypass.id.selector.destination_port = PortMatch::exactly([500, 4500][number as usize]);
                bypass.templates = Templates::default();
                bypass
            }
            Self::StrongSwan => {
                let (local, tunnel) = (v4(0x2000_0000, 3), number / 3);
                let remote = v4(0x2000_0000 | tunnel << 8, 24);
                let out = offloaded(local, remote, tunnel, 100);
                let back = Selector { source: remote, destination: local, ..out.id.selector };
                match number % 3 {
                    0 => out,
                    1 => Policy { id: PolicyId::new(Direction::Forward, back), offload: None, ..out },
                    _ => Policy { id: PolicyId::new(Direction::In, back), ..out },
                }
            }
            Self::RoadWarrior => offloaded(v4(0, 0), v4(0x2000_0000 | number, 32), number, 100),
            Self::Overlaps => {
                // Spread over the network as by chance, but always in the same way.
                let mixed = number.wrapping_mul(0x9e37_79b9);
                let lengths = (16 + (mixed >> 30) * 4, 16 + (mixed >> 28 & 3) * 4);
                let (from, to) = (mixed.rotate_left(7) & 0xff_ffff, mixed.rotate_left(19) & 0xff_ffff);
                let net = |bits: u32, length: u32| {
                    let length = u8::try_from(length).unwrap_or(0);
                    if number.is_multiple_of(2) {
                        v4(0x0a00_0000 | bits, length)
                    } else {
                        let bits = 0x2001_0db8 << 96 | u128::from(bits) << 72;
                        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(bits), length + 24))
                    }
                };
                let (source, destination) = (net(from, lengths.0), net(to, lengths.1));
                if number.is_multiple_of(3) {
                    software(source, destination, 200)
                } else {
                    offloaded(source, destination, number, 100)
                }
            }
        }
    }

    /// The first policies and their associations.
    #[must_use]
    pub fn snapshot(self, policies: u32) -> Snapshot {
        let policies: Vec<Policy> = (0..policies).map(|number| self.policy(number)).collect();
        let outbound = policies.iter().filter(|policy| policy.id.direction == Direction::Out);
        let sas = outbound.filter_map(association).collect();
        Snapshot { policies, sas, ..Snapshot::default() }
    }
}

/// A database, what it compiles to, and the table.
#[derive(Debug)]
pub struct Mirror {
    database: Database,
    compiler: Compiler,
    table: MemoryTable,
}

impl Mirror {
    /// An empty one with room for as many policies, some of which need more than one cell. The embedder answers for
    /// its routes: no routing table is part of what is measured.
    #[must_use]
    pub fn new(policies: u32) -> Self {
        let table = MemoryTable::new(&Self::config(policies));
        let mut compiler = Compiler::new(table.capacity());
        compiler.set_host(&HostFacts::vouched());
        Self { database: Database::default(), compiler, table }
    }

    /// The size of its table.
    #[must_use]
    pub fn config(policies: u32) -> TableConfig {
        let room = policies * 2;
        TableConfig { cells_v4: room, cells_v6: room, slots: room, ..TableConfig::default() }
    }

    /// One with the first policies of a mix, and the associations of more.
    #[must_use]
    pub fn with(mix: Mix, policies: u32, more: u32) -> Self {
        let mut mirror = Self::new(policies + more);
        let mut snapshot = mix.snapshot(policies);
        snapshot
            .sas
            .extend((policies..policies + more).filter_map(|number| association(&mix.policy(number))));
        mirror.take(PolicyEvent::Snapshot(snapshot));
        mirror
    }

    /// From the event into the table.
    ///
    /// # Panics
    ///
    /// If the compiler did not keep within the table's capacity.
    pub fn take(&mut self, event: PolicyEvent) {
        self.database.apply(event);
        for part in self.compiler.compile(&self.database).split(1024) {
            self.table.apply(&part).expect("room");
        }
    }
}

/// The association of a packet-offloaded policy.
#[must_use]
pub fn association(policy: &Policy) -> Option<SecurityAssociation> {
    let ([template], Some(offload)) = (&policy.templates[..], policy.offload) else { return None };
    Some(SecurityAssociation {
        offload: Some(offload),
        overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16)),
        ..SecurityAssociation::for_template(template, template.reqid | 0x1000_0000)
    })
}

fn v4(bits: u32, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(bits), length)).trunc()
}

fn software(source: IpNet, destination: IpNet, priority: u32) -> Policy {
    let selector = Selector::between(source, destination).expect("one family");
    Policy { priority, ..Policy::new(PolicyId::new(Direction::Out, selector)) }
}

fn offloaded(source: IpNet, destination: IpNet, tunnel: u32, priority: u32) -> Policy {
    let template = Template::esp_tunnel(
        IpAddr::from([192, 0, 2, 1]),
        Ipv4Addr::from(0xc633_0000 | tunnel).into(),
        tunnel + 1,
    );
    let mut policy = software(source, destination, priority);
    policy.templates = [template].into();
    policy.offload = Some(OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false });
    policy.egress = Egress { max_length: Some(1400), ..Egress::default() };
    policy
}
