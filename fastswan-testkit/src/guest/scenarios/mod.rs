//! What is told.

mod associations;
mod driver;
mod families;
mod hooks;
mod lifecycle;
mod migrate;
mod oddities;
mod processes;
mod scale;
mod scene;
mod silent;
mod spoof;

use std::time::Duration;

use super::Scenario;

/// In the order in which they are told.
pub(super) fn all() -> Vec<Scenario> {
    let scenario = |name, about, tell| Scenario {
        name,
        about,
        expected_failure: None,
        limit: Duration::from_secs(240),
        tell,
    };
    vec![
        scenario("establish", "a tunnel comes up, and its packets are fast", lifecycle::establish),
        scenario("rekey", "associations are replaced again and again", lifecycle::rekey),
        // Three times, of which two are with a NIC that leaks: without and with the mirror's guard.
        Scenario {
            limit: Duration::from_secs(240),
            ..scenario("delete", "the tunnel is deleted, and then IKE terminated", lifecycle::delete)
        },
        Scenario {
            limit: Duration::from_secs(240),
            ..scenario("migrate", "the tunnel is moved to another far end", migrate::migrate)
        },
        scenario("trap", "the first packet brings the tunnel up", lifecycle::trap),
        scenario("flap", "the NIC's link goes down and up, then a rekey", silent::flap),
        scenario("unload", "the NIC's driver is removed, and comes back", silent::unload),
        scenario("move", "the NIC moves to another namespace", silent::move_away),
        scenario("charon-kill", "charon is killed, and starts again", processes::charon_kill),
        scenario("mirror-kill", "the mirror is killed, and starts again", processes::mirror_kill),
        scenario("mirror-stop", "the mirror is stopped, superseded, and wakes up", processes::mirror_stop),
        scenario("spoof", "forged packets come in clear from the wire", spoof::spoof),
        // Waits for what does not come, packet by packet.
        Scenario {
            limit: Duration::from_secs(240),
            ..scenario(
                "fragments-options",
                "odd packets fare as without a mirror",
                oddities::fragments_options,
            )
        },
        scenario(
            "odd-associations",
            "associations that are there, but not for the packets",
            associations::odd_associations,
        ),
        scenario("ipv6", "IPv6 in IPv6; nothing is fast in a tunnel of the other family", families::ipv6),
        scenario("esn", "extended sequence numbers, across 2^32", families::esn),
        scenario("transport", "gateways talk to each other in transport mode", families::transport),
        scenario("hooks", "firewalls, filters and IPVS come into the way, and go", hooks::hooks),
        scenario("many", "1,000 tunnels", scale::many),
        scenario("driver", "100 link flaps, unloading and loading of the NIC", driver::driver),
    ]
}
