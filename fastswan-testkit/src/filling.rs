//! How fast tables are filled: with cells alone, and with policies from the bytes that the kernel tells.
//!
//! Policies are site-to-site: networks of /24 on both sides, each pair with a tunnel and an association of its own, all behind the
//! same next hop. The bytes are what a kernel answers to requests for all associations and all policies, in datagrams as long as it
//! makes them. They go through the library's decoder, database and compiler into a table, as a gateway does it that begins: all of
//! it is written at once, while nothing is fast yet.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use fastswan::{
    BpfTable, Compiler, Database, HostFacts, MemoryTable, OffloadTable, Policy, PolicyEvent,
    SecurityAssociation, Snapshot, XdpForwarder,
    host::{Forwards, Link, Neighbour, Route, RouteKind, Rule},
    netlink::{Content, decode},
    policy::{Egress, Family, MacAddr, Overhead},
    table::{Change, TableConfig, TableUpdate},
};
use ipnet::IpNet;

use crate::{
    datapath::Mix,
    requests::{self, keyed_association, request},
};

/// `NLM_F_MULTI`: part of a dump.
const MULTI: u16 = 2;
/// The kernel makes no longer datagrams of a dump, whatever the receive buffer (`netlink_dump`).
const LONGEST_DATAGRAM: usize = 32_000;
const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// What is to be written.
#[derive(Debug)]
pub struct Filling {
    policies: u32,
    host: HostFacts,
    /// What a kernel dumps of associations, and of policies.
    dump: [Vec<Bytes>; 2],
    snapshot: Snapshot,
}

/// How long policies took from their bytes into a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// Reading the bytes.
    pub decode: Duration,
    /// Into the database.
    pub database: Duration,
    /// What follows for the table.
    pub compile: Duration,
    /// Into the table.
    pub write: Duration,
    /// All of it, as the clock has it.
    pub all: Duration,
}

impl Filling {
    /// Policies that are offloaded to a device.
    #[must_use]
    pub fn new(policies: u32, device: u32) -> Self {
        let mut snapshot = Snapshot::default();
        for number in 0..policies {
            let policy = Mix::SiteToSite.policy(Family::V4, number, device);
            // What the kernel tells of it.
            let policy = Policy { egress: Egress::default(), assumed: None, ..policy };
            if let Some(template) = policy.templates.first() {
                snapshot.sas.push(SecurityAssociation {
                    offload: policy.offload,
                    overhead: Some(Overhead::aes_gcm_tunnel(Family::V4, false, 16)),
                    ..SecurityAssociation::for_template(template, 0x1000_0000 | number)
                });
            }
            snapshot.policies.push(policy);
        }
        let associations = snapshot.sas.iter().map(|sa| keyed_association(sa, &[0; 20]));
        let added = snapshot.policies.iter().map(|policy| request(&requests::Change::Add(policy.clone())));
        let dump = [datagrams(associations), datagrams(added)];
        Self { policies, host: host(device), dump, snapshot }
    }

    /// Bytes of the dump.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.dump.iter().flatten().map(Bytes::len).sum()
    }

    /// A table that the policies fit into.
    #[must_use]
    pub fn config(&self) -> TableConfig {
        let room = self.policies.max(1024);
        TableConfig { cells_v4: room, cells_v6: 1, exceptions: 64, slots: room }
    }

    /// Cells in a second that are written to a new [`MemoryTable`] and to a new [`BpfTable`], as many as there are policies, in one
    /// update.
    ///
    /// # Errors
    ///
    /// If the program cannot be loaded, for instance without root, or the cells do not fit.
    pub fn write_cells(&self) -> anyhow::Result<[f64; 2]> {
        let mut database = Database::default();
        database.apply(PolicyEvent::Snapshot(self.snapshot.clone()));
        let mut compiler = self.compiler();
        let (mut cells, mut others) = (TableUpdate::default(), TableUpdate::default());
        for change in compiler.compile(&database).changes() {
            let part = if matches!(change, Change::Cell(..)) { &mut cells } else { &mut others };
            part.push(change);
        }
        ensure!(cells.len() == self.policies as usize, "{} cells of {} policies", cells.len(), self.policies);
        let write = |table: &mut dyn OffloadTable| -> anyhow::Result<f64> {
            table.apply(&others)?;
            let start = Instant::now();
            table.apply(&cells)?;
            Ok(f64::from(self.policies) / start.elapsed().as_secs_f64())
        };
        let (_forwarder, mut table) = self.load()?;
        Ok([write(&mut MemoryTable::new(&self.config()))?, write(&mut table)?])
    }

    /// From the bytes of the dump into a new [`BpfTable`]. With two threads, policies and associations are decoded side by side, as
    /// [`NetlinkSource`](fastswan::NetlinkSource) does it.
    ///
    /// # Errors
    ///
    /// If the program cannot be loaded, for instance without root; if something is not as it was told; or if not all policies
    /// are fast.
    pub fn fill_from_bytes(&self, two_threads: bool) -> anyhow::Result<Stages> {
        let (_forwarder, mut table) = self.load()?;
        let mut compiler = self.compiler();
        let mut database = Database::default();
        let start = Instant::now();
        let snapshot = self.decode(two_threads)?;
        let decoded = start.elapsed();
        database.apply(PolicyEvent::Snapshot(snapshot));
        let stored = start.elapsed();
        let update = compiler.compile(&database);
        let updated = start.elapsed();
        table.apply(&update)?;
        let all = start.elapsed();
        let fast = compiler.fast_policies(&database);
        ensure!(fast == self.policies as usize, "{fast} of {} policies are fast", self.policies);
        ensure!(database.snapshot().policies.len() == fast, "others are there than were told");
        Ok(Stages {
            decode: decoded,
            database: stored.saturating_sub(decoded),
            compile: updated.saturating_sub(stored),
            write: all.saturating_sub(updated),
            all,
        })
    }

    fn decode(&self, two_threads: bool) -> anyhow::Result<Snapshot> {
        let [associations, policies] = &self.dump;
        let expected = self.policies as usize;
        let mut snapshot = if two_threads {
            std::thread::scope(|scope| -> anyhow::Result<Snapshot> {
                let associations = scope.spawn(|| decoded(associations, expected));
                let policies = decoded(policies, expected)?;
                let associations =
                    associations.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                Ok(Snapshot { sas: associations.sas, ..policies })
            })?
        } else {
            let policies = decoded(policies, expected)?;
            Snapshot { sas: decoded(associations, expected)?.sas, ..policies }
        };
        snapshot.order = self.snapshot.order;
        Ok(snapshot)
    }

    fn load(&self) -> anyhow::Result<(XdpForwarder, BpfTable)> {
        XdpForwarder::load(self.config()).context("loading fastswan's program")
    }

    fn compiler(&self) -> Compiler {
        let mut compiler = Compiler::new(self.config().capacity());
        compiler.set_host(&self.host);
        compiler
    }
}

/// What datagrams tell, with room for so many of each.
fn decoded(datagrams: &[Bytes], expected: usize) -> anyhow::Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    for datagram in datagrams {
        for message in decode(datagram)? {
            match message.content {
                Content::Event(PolicyEvent::Policy(policy)) => {
                    snapshot.policies.reserve_exact(expected.saturating_sub(snapshot.policies.capacity()));
                    snapshot.policies.push(policy);
                }
                Content::Event(PolicyEvent::Sa(sa)) => {
                    snapshot.sas.reserve_exact(expected.saturating_sub(snapshot.sas.capacity()));
                    snapshot.sas.push(sa);
                }
                other => anyhow::bail!("a dump does not tell {other:?}"),
            }
        }
    }
    Ok(snapshot)
}

/// Messages as a kernel dumps them.
fn datagrams(messages: impl Iterator<Item = requests::Message>) -> Vec<Bytes> {
    let mut datagrams = Vec::new();
    let mut datagram = Vec::new();
    for message in messages {
        let message = message.bytes(MULTI, 1);
        if datagram.len() + message.len() > LONGEST_DATAGRAM {
            datagrams.push(Bytes::from(std::mem::take(&mut datagram)));
        }
        datagram.extend(message);
    }
    datagrams.push(datagram.into());
    datagrams
}

/// A host with one device, behind which a router has everything.
fn host(device: u32) -> HostFacts {
    let (local, main) = (255, 254);
    let everywhere = RouteKind::Unicast { ifindex: device, gateway: Some(ROUTER.into()), mtu: None };
    let link = RouteKind::Unicast { ifindex: device, gateway: None, mtu: None };
    let net =
        |address: Ipv4Addr, length| IpNet::new(IpAddr::from(address), length).unwrap_or_default().trunc();
    HostFacts {
        links: vec![Link {
            ifindex: device,
            address: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            carrier: true,
            forwards: Forwards { v4: true, v6: true },
            ..Link::default()
        }],
        routes: vec![
            Route::new(local, net(LOCAL, 32), RouteKind::Local),
            Route::new(main, net(LOCAL, 24), link),
            Route::new(main, net(Ipv4Addr::UNSPECIFIED, 0), everywhere),
        ],
        rules: Rule::ordinary(Family::V4).into(),
        neighbours: vec![Neighbour {
            ifindex: device,
            destination: ROUTER.into(),
            address: MacAddr([2, 0, 0, 0, 0, 2]),
        }],
        addresses: vec![LOCAL],
        ..HostFacts::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_would_dump_is_what_it_has() {
        let filling = Filling::new(1000, 7);
        assert!(filling.dump.iter().all(|datagrams| datagrams.len() > 5));
        for two_threads in [false, true] {
            assert_eq!(filling.decode(two_threads).unwrap(), filling.snapshot);
        }
    }
}
