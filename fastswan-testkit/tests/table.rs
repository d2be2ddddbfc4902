//! The shared suite, on every table there is.

use std::os::fd::AsFd as _;

use fastswan::{MemoryTable, OffloadTable as _, XdpForwarder, table::TableConfig};
use fastswan_testkit::{
    lab::{self, Namespace},
    table_suite,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

#[test]
fn a_table_in_memory_does_what_a_table_does() {
    table_suite::check(MemoryTable::new);
}

#[test]
fn a_table_in_bpf_maps_does_what_a_table_does() {
    // The maps outlive the forwarder, which only holds the program.
    table_suite::check(|config| XdpForwarder::load(config).expect("loading the program").1);
}

#[test]
fn a_removal_wakes_whoever_waits_for_its_signal_once_it_is_counted() {
    if !lab::require_root("the signal of removals") {
        return;
    }
    let namespace = Namespace::new("signal").unwrap();
    let (mut forwarder, mut table) = XdpForwarder::load(TableConfig::default()).unwrap();
    assert!(MemoryTable::new(&TableConfig::default()).removal_signal().is_none());
    // Another test says what is wrong if it cannot be attached.
    let Ok(_guard) = forwarder.attach_guard() else { return };
    let signal = table.removal_signal().unwrap().try_clone_to_owned().unwrap();
    let is_told = |within: u16| {
        let mut waiting = [PollFd::new(signal.as_fd(), PollFlags::POLLIN)];
        poll(&mut waiting, PollTimeout::from(within)).unwrap() == 1
    };
    for _ in 0..3 {
        // Removals in other namespaces are told of, too.
        while is_told(100) {
            table.drain_removal_signal();
        }
        let before = table.removals().begun;
        let policy = "src 10.1.0.0/16 dst 10.2.0.0/16 dir out";
        namespace.ip(&format!("xfrm policy add {policy}")).unwrap();
        namespace.ip(&format!("xfrm policy delete {policy}")).unwrap();
        assert!(is_told(10_000));
        assert!(table.removals().begun > before, "counted before it is told");
        table.drain_removal_signal();
    }
}
