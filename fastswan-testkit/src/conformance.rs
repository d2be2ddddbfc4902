//! The XDP program against the [model](crate::model): random tables, and frames that reach deep into them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::Ipv4Header;
use fastswan::{
    OffloadTable as _, PassReason,
    forwarder::{ForwarderError, RunAction},
    policy::{Family, MacAddr, PortMatch},
    table::{
        Cell, Contents, Exception, Fact, Forwarding, Forwards, Port, Ports as _, Probes, ReversePath, Side,
        Slot, TableConfig, Traffic, Verdict,
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
const EXCEPTIONS: u32 = 512;

/// A program and a model with the same random table.
#[derive(Debug)]
pub struct Conformance {
    program: ProgRun,
    model: Model,
}

impl Conformance {
    /// Loads the program and fills both from a seed: with one table, and then with what makes another of it,
    /// the model at once and the program in parts. Some packets go to `egress`, which must take redirected
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
        let mut program = ProgRun::new(&TableConfig {
            cells_v4: 1024,
            cells_v6: 1024,
            exceptions: EXCEPTIONS,
            slots: SLOTS,
        })?;
        let mut model = Model::default();
        let [first, second] = [(); 2].map(|()| random_contents(&mut rng, egress.unwrap_or(NOWHERE)));
        for update in [first.replacing(&Contents::default()), second.replacing(&first)] {
            model.apply(&update);
            let mut parts = update.clone().split(rng.random_range(1..400));
            if parts.try_for_each(|part| program.table.apply(&part)).is_err() {
                // There is no room for the old pairs of prefix lengths beside the new ones.
                program.table.apply(&update).expect("room for the table");
                program.table.set_enabled(true);
            }
        }
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

/// Those that have ports, those that have none, and those whose ports cannot be read.
const PROTOCOLS: [u8; 10] = [6, 17, 33, 47, 50, 58, 89, 132, 135, 136];

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
        // Echo requests, or those of neighbour discovery and their neighbours.
        1 => frame.icmp(if upper / 8 % 2 == 0 { 8 } else { 130 + upper / 16 }, 0),
        2 => frame.udp(1, 4500),
        3 => frame.protocol(PROTOCOLS[usize::from(upper / 8) % PROTOCOLS.len()]),
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

fn random_contents(rng: &mut StdRng, egress: u32) -> Contents {
    let mut table = Contents::default();
    for family in [Family::V4, Family::V6] {
        for _ in 0..60 {
            let probes = Probes {
                destination: rng.random_bool(0.3),
                source: rng.random_bool(0.3),
                guards: rng.random_bool(0.3),
            };
            let verdict = if rng.random_bool(0.2) {
                Verdict::Pass(PassReason::Shadowed)
            } else {
                Verdict::Fast { slot: Slot(rng.random_range(0..SLOTS)), probes }
            };
            let cell = Cell { source: prefix(rng, family), destination: prefix(rng, family) };
            table.cells.insert(cell, verdict);
        }
        for _ in 0..20 {
            let side = if rng.random() { Side::Source } else { Side::Destination };
            let fact = *[Fact::Denied, Fact::Via(INGRESS), Fact::Via(egress)].choose(rng).expect("facts");
            table.facts.insert((side, prefix(rng, family)), fact);
        }
        for _ in 0..rng.random_range(0..6) {
            table.guards.insert(narrow(prefix(rng, family)));
        }
        // In half of all tables: without exceptions the program does not look at ports.
        if rng.random() {
            table.exceptions.extend(exceptions(rng, family));
        }
    }
    for slot in 0..SLOTS - 1 {
        let forwarding = Forwarding {
            ifindex: *[INGRESS, egress].choose(rng).expect("devices"),
            max_length: *[100, 576, 1400, 1500].choose(rng).expect("lengths"),
            rewrite: rng.random_bool(0.5).then_some((PORT, SENDER)),
        };
        let reason = *[PassReason::NoSa, PassReason::NoPath].choose(rng).expect("reasons");
        table.slots.insert(Slot(slot), if rng.random_bool(0.2) { Err(reason) } else { Ok(forwarding) });
    }
    table
}

/// The first addresses of a prefix that is wider than most, so that not everything lies in it.
fn narrow(prefix: IpNet) -> IpNet {
    let (least, most) = if prefix.addr().is_ipv4() { (14, 32) } else { (46, 128) };
    IpNet::new(prefix.addr(), prefix.prefix_len().clamp(least, most)).expect("a length of the family")
}

/// Exceptions of few tuples, some of which are different and share an entry, since they differ in bits of
/// ports that do not count.
fn exceptions(rng: &mut StdRng, family: Family) -> Vec<Exception> {
    let any = PortMatch::default();
    let everything = Cell { source: family.everything(), destination: family.everything() };
    let ike = Exception {
        cell: everything,
        protocol: 17,
        source_port: any,
        destination_port: PortMatch::exactly(4500),
    };
    let port = |rng: &mut StdRng, mask| {
        let port: u16 = *[0, 1, 8, 1000, 2000, 4500].choose(rng).expect("ports");
        PortMatch { port: port ^ rng.random_range(0..3), mask }
    };
    let mut exceptions = vec![ike];
    for _ in 0..rng.random_range(1..12) {
        let shape = Cell { source: prefix(rng, family), destination: prefix(rng, family) };
        let [source_mask, destination_mask] =
            [(); 2].map(|()| *[0, 0xffff, 0xfff0, 0xff00].choose(rng).expect("masks"));
        for _ in 0..rng.random_range(1..30) {
            let of_shape = |rng: &mut StdRng, shape: IpNet| {
                let address = prefix(rng, family).addr();
                IpNet::new(address, shape.prefix_len()).expect("a length of the family").trunc()
            };
            exceptions.push(Exception {
                cell: Cell {
                    source: narrow(of_shape(rng, shape.source)),
                    destination: of_shape(rng, shape.destination),
                },
                protocol: *[0, 1, 6, 17, 33, 47, 50, 58, 132].choose(rng).expect("protocols"),
                source_port: port(rng, source_mask),
                destination_port: port(rng, destination_mask),
            });
        }
    }
    exceptions
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
