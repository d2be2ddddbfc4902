//! The XDP program against the [model](crate::model): random tables, and frames that reach deep into them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::Ipv4Header;
use fastswan::{
    OffloadTable as _, PassReason,
    forwarder::{ForwarderError, RunAction},
    policy::{Family, MacAddr, PortMatch},
    table::{
        Cell, Exception, Fact, Forwarding, Forwards, Port, ReversePath, Side, Slot, TableConfig, TableUpdate,
        Traffic, Verdict,
    },
};
use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::{
    frames::{Frame, Tag},
    model::Model,
    prog_run::ProgRun,
};

/// The loopback device, which every namespace has: frames claim to come in there.
const INGRESS: u32 = 1;
/// There is no such device.
const NOWHERE: u32 = 999_999;
const VLAN: u16 = 5;
const SENDER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
const PORT: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const SLOTS: u32 = 8;

/// A program and a model with the same random table.
#[derive(Debug)]
pub struct Conformance {
    program: ProgRun,
    model: Model,
}

impl Conformance {
    /// Loads the program and fills both from a seed. Some packets go to `egress`, which must take redirected
    /// frames.
    ///
    /// # Errors
    ///
    /// Those of [`ProgRun::new`].
    ///
    /// # Panics
    ///
    /// If the table does not fit.
    pub fn new(seed: u64, egress: Option<u32>) -> Result<Self, ForwarderError> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut program = ProgRun::new(&TableConfig { cells: 1024, slots: SLOTS })?;
        let mut model = Model::default();
        let update = table(&mut rng, egress.unwrap_or(NOWHERE));
        program.table.apply(&update).expect("room for the table");
        model.apply(&update);
        if egress.is_none() {
            model.forget_device(NOWHERE);
        }
        for vlan in [0, VLAN] {
            let port = port(&mut rng, vlan);
            program.table.set_port(&port).expect("room for two ports");
            model.set_port(port);
        }
        Ok(Self { program, model })
    }

    /// Runs both on a frame of 14 to 3,000 bytes, and returns what they did.
    ///
    /// # Panics
    ///
    /// If they did not do the same, or not to the same counters.
    pub fn check(&self, frame: &[u8]) -> Result<Slot, PassReason> {
        let expected = self.model.forward(frame, INGRESS);
        let slot = expected.as_ref().map(|forwarded| forwarded.slot);
        let before = slot.map(|slot| self.program.traffic(slot)).unwrap_or_default();
        let outcome = self.program.run(frame, INGRESS).expect("the kernel runs the program");
        match expected {
            Ok(forwarded) => {
                assert_eq!((outcome.action, outcome.reason), (forwarded.action, None), "{frame:02x?}");
                assert_eq!(outcome.frame, forwarded.frame, "{frame:02x?}");
                let after = self.program.traffic(forwarded.slot);
                let Traffic { packets, bytes } = forwarded.traffic;
                assert_eq!((after.packets - before.packets, after.bytes - before.bytes), (packets, bytes));
                Ok(forwarded.slot)
            }
            Err(reason) => {
                assert_eq!((outcome.action, outcome.reason), (RunAction::Pass, Some(reason)), "{frame:02x?}");
                assert_eq!(outcome.frame, frame, "a frame that is passed stays as it was");
                Err(reason)
            }
        }
    }
}

/// A frame for such a table, made from any bytes: some choose one that is right, the others damage it.
#[must_use]
pub fn frame(bytes: &[u8]) -> Vec<u8> {
    let [family, source, destination, upper, length, shape, damage @ ..] = bytes else { return vec![0; 14] };
    let number = |byte: u8| u32::from(byte);
    let frame = if family % 2 == 0 {
        Frame::v4(&host_v4(number(*source)).to_string(), &host_v4(number(*destination)).to_string())
    } else {
        Frame::v6(&host_v6(number(*source)).to_string(), &host_v6(number(*destination)).to_string())
    };
    let frame = match upper % 8 {
        0 => frame.tcp(1000, 2000),
        1 => frame.icmp(8, 0),
        2 => frame.udp(1, 4500),
        3 => frame.protocol(*upper),
        _ => frame.udp(1000, 2000),
    };
    let tags: &[Tag] = match shape % 8 {
        0 => &[Tag::vlan(VLAN)],
        1 => &[Tag::vlan(0), Tag::vlan(VLAN)],
        2 => &[Tag::service(VLAN)],
        _ => &[],
    };
    let frame = frame.macs(SENDER, PORT).tags(tags).payload(usize::from(*length) * 6).ttl(shape | 1);
    let header = 14 + 4 * tags.len();
    let mut frame = frame.padding(usize::from(shape / 64)).build();
    // Damage near the front, where the program looks.
    for change in damage.chunks_exact(2) {
        let near = frame.len().min(80);
        frame[usize::from(change[0]) % near] = change[1];
    }
    if damage.len() % 2 == 0 {
        repair_checksum(&mut frame[header..]);
    }
    frame
}

/// Makes an IPv4 header's checksum right, so that what is wrong behind it is reached.
fn repair_checksum(packet: &mut [u8]) {
    if let Ok((header, _)) = Ipv4Header::from_slice(packet) {
        packet[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    }
}

/// One of few addresses, so that prefixes are hit.
fn host_v4(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 | (number & 0xc0) << 10 | (number & 0x30) << 4 | (number & 0xf))
}

fn host_v6(number: u32) -> Ipv6Addr {
    let [_, net, high, low] = host_v4(number).octets().map(u16::from);
    Ipv6Addr::new(0x2001, 0xdb8, net, high, 0, 0, 0, low)
}

fn prefix(rng: &mut StdRng, family: Family) -> IpNet {
    let host = rng.random_range(0..256);
    let (address, lengths): (IpAddr, &[u8]) = match family {
        Family::V4 => (host_v4(host).into(), &[0, 8, 14, 16, 22, 24, 28, 30, 31, 32]),
        Family::V6 => (host_v6(host).into(), &[0, 32, 46, 48, 62, 64, 100, 124, 127, 128]),
    };
    let length = *lengths.choose(rng).expect("there are lengths");
    IpNet::new(address, length).expect("a length of the family").trunc()
}

fn table(rng: &mut StdRng, egress: u32) -> TableUpdate {
    let mut update = TableUpdate::default();
    for family in [Family::V4, Family::V6] {
        let mut cells = std::collections::BTreeMap::new();
        for _ in 0..60 {
            let verdict = if rng.random_bool(0.2) {
                Verdict::Pass(PassReason::Shadowed)
            } else {
                Verdict::Fast {
                    slot: Slot(rng.random_range(0..SLOTS)),
                    probe_destination: rng.random_bool(0.3),
                    probe_source: rng.random_bool(0.3),
                }
            };
            cells.insert(Cell { source: prefix(rng, family), destination: prefix(rng, family) }, verdict);
        }
        update.cells.extend(cells.into_iter().map(|(cell, verdict)| (cell, Some(verdict))));
        let mut facts = std::collections::BTreeMap::new();
        for _ in 0..20 {
            let side = if rng.random() { Side::Source } else { Side::Destination };
            let fact = *[Fact::Denied, Fact::Via(INGRESS), Fact::Via(egress)].choose(rng).expect("facts");
            facts.insert((side, prefix(rng, family)), fact);
        }
        update.facts.extend(facts.into_iter().map(|(prefix, fact)| (prefix, Some(fact))));
    }
    for slot in 0..SLOTS - 1 {
        let forwarding = Forwarding {
            ifindex: *[INGRESS, egress].choose(rng).expect("devices"),
            max_length: *[100, 576, 1400, 1500].choose(rng).expect("lengths"),
            rewrite: rng.random_bool(0.5).then_some((PORT, SENDER)),
        };
        update.forwardings.push((Slot(slot), Some(forwarding)));
    }
    // In half of all tables: without exceptions the program does not look at ports.
    if rng.random() {
        let family = if rng.random() { Family::V4 } else { Family::V6 };
        let everything = Cell { source: family.everything(), destination: family.everything() };
        let near = Cell { source: prefix(rng, family), destination: prefix(rng, family) };
        let any = PortMatch::default();
        update.exceptions = Some(vec![
            Exception {
                cell: everything,
                protocol: 17,
                source_port: any,
                destination_port: PortMatch::exactly(4500),
            },
            Exception { cell: near, protocol: 6, source_port: any, destination_port: any },
            Exception { cell: near, protocol: 0, source_port: PortMatch::exactly(8), destination_port: any },
        ]);
    }
    update
}

fn port(rng: &mut StdRng, vlan: u16) -> Port {
    Port {
        ifindex: INGRESS,
        vlan,
        receiver: INGRESS,
        address: PORT,
        forwards: Forwards { v4: vlan == 0 || rng.random(), v6: vlan == 0 || rng.random() },
        reverse_path: *[ReversePath::Off, ReversePath::Loose, ReversePath::Strict]
            .choose(rng)
            .expect("modes"),
    }
}
