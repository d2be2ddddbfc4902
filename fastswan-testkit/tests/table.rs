//! The shared suite, on every table there is.

use fastswan::{MemoryTable, XdpForwarder};
use fastswan_testkit::table_suite;

#[test]
fn a_table_in_memory_does_what_a_table_does() {
    table_suite::check(MemoryTable::new);
}

#[test]
fn a_table_in_bpf_maps_does_what_a_table_does() {
    // The maps outlive the forwarder, which only holds the program.
    table_suite::check(|config| XdpForwarder::load(config).expect("loading the program").1);
}
