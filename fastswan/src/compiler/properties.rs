//! The compiler against the brute force, for random changes.

use fastswan_ebpf::PassReason;
use proptest::{collection::vec, prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{
    Compiler,
    brute_force::{Choices, Step, World, check, packets, via},
    model::{AMPLE, Model, NIC, Packet, association, offloaded, tunnel},
};
use crate::{
    database::Database,
    event::{PolicyEvent, Snapshot},
    host::{Route, RouteKind},
    policy::{Direction, Family},
    table::{Capacity, Fact, ReversePath, Side},
};

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(any::<u8>(), 0..360).prop_map(|bytes| Choices(&bytes).steps())
}

fn capacity() -> impl Strategy<Value = Capacity> {
    any::<[u8; 2]>().prop_map(|bytes| Choices(&bytes).capacity())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// For every packet, the first cell that contains it gives exactly the rule's answer, after every change.
    #[test]
    fn the_first_cell_gives_the_answer_of_the_rule(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Off);
        for step in steps {
            world.take(step);
            check(&world, true);
        }
    }

    /// With a reverse path filter, the source fact of a packet that is fast names the device of its route.
    #[test]
    fn source_facts_are_the_routes_back_when_a_link_filters_by_them(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Strict);
        for step in steps {
            world.take(step);
            check(&world, true);
            for packet in packets().filter(|packet| packet.source.is_ipv4()) {
                if world.table.decide(&packet).is_ok() && !world.is_guarded(&packet) {
                    let route = match world.table.fact(Side::Source, packet.source) {
                        Some(Fact::Via(ifindex)) => Some(via(ifindex)),
                        Some(Fact::Denied) => Some(RouteKind::Blackhole),
                        None => None,
                    };
                    prop_assert_eq!(route, world.route(packet.source), "{:?}", packet);
                }
            }
        }
    }

    /// Compiling everything at once and compiling after every change end in the same table, but for slots.
    #[test]
    fn the_way_to_a_database_does_not_matter(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Off);
        for step in steps {
            world.take(step);
        }
        let mut fresh = Model::default();
        let mut compiler = Compiler::new(AMPLE);
        compiler.set_host(&world.host);
        fresh.apply(&compiler.compile(&world.database));
        prop_assert_eq!(fresh.cells.keys().collect::<Vec<_>>(), world.table.cells.keys().collect::<Vec<_>>());
        prop_assert_eq!(&fresh.facts, &world.table.facts);
        prop_assert_eq!(&fresh.guards, &world.table.guards);
        prop_assert_eq!(&fresh.exceptions, &world.table.exceptions);
        for packet in packets() {
            prop_assert_eq!(fresh.decide(&packet).err(), world.table.decide(&packet).err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// After every single write of a split update, every packet is decided as before the update, as after it, or
    /// passes.
    #[test]
    fn a_packet_meets_the_old_table_or_the_new_one_or_passes(steps in steps()) {
        let mut world = World::new(AMPLE, ReversePath::Off);
        for step in steps {
            let update = world.compile(step);
            let mut new = world.table.clone();
            new.apply(&update);
            let fates: Vec<_> = packets().map(|packet| (world.table.decide(&packet), new.decide(&packet))).collect();
            for part in update.split(1) {
                world.table.apply(&part);
                for (packet, (old, new)) in packets().zip(&fates) {
                    let found = world.table.decide(&packet);
                    prop_assert!(found.is_err() || found == *old || found == *new, "{:?}: {:?}", packet, found);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// However small the table is, no packet is fast that the rule keeps in the kernel.
    #[test]
    fn a_table_that_is_too_small_is_never_fast_against_the_rule(steps in steps(), capacity in capacity()) {
        let mut world = World::new(capacity, ReversePath::Off);
        for step in steps {
            world.take(step);
            check(&world, false);
        }
    }
}

#[test]
fn the_random_worlds_have_fast_packets_to_be_wrong_about() {
    let mut runner = TestRunner::deterministic();
    let (mut fast, mut all, mut small) = (0, 0, 0);
    for _ in 0..64 {
        let steps = steps().new_tree(&mut runner).unwrap().current();
        let capacity = capacity().new_tree(&mut runner).unwrap().current();
        let mut world = World::new(AMPLE, ReversePath::Off);
        let mut cramped = World::new(capacity, ReversePath::Off);
        for step in steps {
            world.take(step.clone());
            cramped.take(step);
        }
        all += packets().count();
        fast += check(&world, true);
        small += check(&cramped, false);
    }
    assert!(fast * 50 > all, "{fast} of {all} packets are fast");
    assert!(small * 20 > fast && small < fast, "{small} of {fast} are fast in small tables");
}

/// A default route through the device, and the tunnels' own address.
fn routes() -> Vec<Route> {
    let own = "192.0.2.1/32".parse().unwrap();
    vec![Route::new(254, Family::V4.everything(), via(NIC)), Route::new(255, own, RouteKind::Local)]
}

#[test]
fn peers_inside_the_local_network_need_cells_in_proportion_to_their_number() {
    let mut database = Database::default();
    let peers = 1000;
    let policies = (0..peers).flat_map(|n: u32| {
        let peer = format!("10.{}.{}.0/24", n / 256, n % 256);
        let mut back = tunnel(&peer, "10.0.0.0/8");
        back.id.direction = Direction::Forward;
        [offloaded("10.0.0.0/8", &peer), back]
    });
    let (policies, sas) = (policies.collect(), vec![association()]);
    database.apply(PolicyEvent::Snapshot(Snapshot { policies, sas, ..Snapshot::default() }));
    let mut host = World::new(AMPLE, ReversePath::Off).host;
    host.routes = routes();
    let mut compiler = Compiler::new(AMPLE);
    compiler.set_host(&host);
    let update = compiler.compile(&database);
    assert_eq!((update.cells.len(), compiler.fast_policies(&database)), (2000, 1000));

    let mut table = Model::default();
    table.apply(&update);
    let decide = |source: [u8; 4], destination: [u8; 4]| {
        table.decide(&Packet::between(source.into(), destination.into()))
    };
    assert!(decide([10, 99, 0, 1], [10, 1, 1, 1]).is_ok());
    assert_eq!(decide([10, 2, 2, 1], [10, 1, 1, 1]), Err(PassReason::Guarded), "from peer to peer");
    assert_eq!(decide([10, 2, 2, 1], [10, 99, 0, 1]), Err(PassReason::ForwardOrSubPolicy), "from a peer");
}

#[test]
fn twenty_thousand_sites_compile_to_one_cell_each() {
    let mut database = Database::default();
    let site = |n: u32| offloaded(&format!("10.{}.{}.0/24", n / 256, n % 256), "172.16.0.0/12");
    let policies = (0..20_000).map(site).collect();
    let sas = vec![association()];
    database.apply(PolicyEvent::Snapshot(Snapshot { policies, sas, ..Snapshot::default() }));
    let mut host = World::new(AMPLE, ReversePath::Off).host;
    host.routes = routes();
    let mut compiler = Compiler::new(AMPLE);
    compiler.set_host(&host);
    let update = compiler.compile(&database);
    assert_eq!((update.cells.len(), update.facts.len()), (20_000, 0));
    assert_eq!(compiler.fast_policies(&database), 20_000);
}
