//! Routes of two tables, where a rule for some packets leaves open which of them decides.

use std::time::Duration;

use fastswan::{
    Gateway, NetlinkHost, Selector, StaticSource, XdpForwarder,
    forwarder::{LoadConfig, RunAction},
    policy::{Egress, NextHop},
    source::fixed::StaticPolicy,
    table::TableConfig,
};
use fastswan_testkit::{
    frames::Frame,
    lab,
    site::{CLIENT, LAN, Site},
};
use tokio::time::sleep;

const TIME: Duration = Duration::from_secs(2);

/// Packets of the LAN have a table of their own. It says what main says, but that some go by another gateway of the same device;
/// and then that these are dropped.
#[test]
fn a_route_that_drops_packets_counts_where_only_gateways_differed() {
    if !lab::require_root("routes") {
        return;
    }
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            let site = Site::new().unwrap();
            site.route().unwrap();
            site.gateway.join_this_thread().unwrap();
            site.gateway.ip("rule add iif lan0 lookup 100 pref 100").unwrap();
            site.gateway.ip("route add 10.2.0.0/16 via 192.0.2.2 table 100").unwrap();
            site.gateway.ip("route add 10.2.3.0/24 via 192.0.2.77 table 100").unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(tell(&site));
        });
        told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

async fn tell(site: &Site) {
    let [lan, out] = ["lan0", "out0"].map(|device| site.gateway.ifindex(device).unwrap());
    let selector = Selector::between("10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()).unwrap();
    let [local, remote] = ["192.0.2.1", "192.0.2.2"].map(|end| end.parse().unwrap());
    let policy = StaticPolicy::new(selector, out, local, remote)
        .priority(100)
        .egress(Egress { next_hop: NextHop::Neighbour, max_length: Some(1400) });
    let config = TableConfig { cells_v4: 64, cells_v6: 64, exceptions: 16, slots: 8 };
    // The kernel's own routes would be asked about some packets, and tell.
    let (forwarder, table) = XdpForwarder::load(LoadConfig::new(config).ask_back(0)).unwrap();
    let source = StaticSource::new(&[policy]);
    let mut gateway = Gateway::new(source, NetlinkHost::open().unwrap(), table).with_interface("lan0");
    let action = |destination| {
        let packet = Frame::v4("10.1.0.5", destination).macs(CLIENT, LAN).ttl(64).payload(100).build();
        forwarder.run(&packet, lan).unwrap().action
    };
    gateway.run_until(sleep(TIME)).await.unwrap();
    assert_eq!([action("10.2.3.9"), action("10.2.4.9")], [RunAction::Redirect; 2]);
    site.gateway.ip("route replace blackhole 10.2.3.0/24 table 100").unwrap();
    gateway.run_until(sleep(TIME)).await.unwrap();
    assert_eq!([action("10.2.3.9"), action("10.2.4.9")], [RunAction::Pass, RunAction::Redirect]);
}
