//! Firewalls, filters and load balancers that the fast path must not skip, on kernels that have all of them.

use std::fs;

use anyhow::Context as _;

use super::scene::{Plan, Scene};
use crate::{
    guest::Story,
    lab::{LabError, Namespace},
};

/// What comes in the way, how it comes, and how it goes. None of it has to do with the packets under way.
const HOOKS: [(&str, &str, &str); 6] = [
    (
        "a rule of nf_tables",
        "nft add table inet fw\n\
         nft add chain inet fw forward { type filter hook forward priority 0 ; }\n\
         nft add rule inet fw forward ip daddr 203.0.113.9 drop",
        "nft delete table inet fw",
    ),
    (
        "connection tracking",
        "nft add table ip track\n\
         nft add chain ip track out { type filter hook output priority 0 ; }\n\
         nft add rule ip track out ct state new counter",
        "nft delete table ip track",
    ),
    ("a service of IPVS", "ipvsadm -A -t 203.0.113.1:80 -s rr", "ipvsadm -D -t 203.0.113.1:80"),
    (
        "a flower filter on the port",
        "tc qdisc add dev lan0 clsact\n\
         tc filter add dev lan0 ingress protocol ip flower dst_ip 203.0.113.9 action drop",
        "tc qdisc del dev lan0 clsact",
    ),
    (
        "a flower filter on the egress device",
        "tc qdisc add dev nic0 clsact\n\
         tc filter add dev nic0 egress protocol ip flower dst_ip 203.0.113.9 action drop",
        "tc qdisc del dev nic0 clsact",
    ),
    (
        "a chain at the ingress of the port",
        "nft add table netdev fw\n\
         nft add chain netdev fw in { type filter hook ingress device lan0 priority 0 ; }\n\
         nft add rule netdev fw in ip daddr 203.0.113.9 drop",
        "nft delete table netdev fw",
    ),
];

pub(super) fn hooks(story: &mut Story) -> anyhow::Result<()> {
    let _elsewhere = hooks_elsewhere()?;
    let mut scene = Scene::established(story, Plan::default())?;
    // The kernel drops what cannot be confirmed when connection tracking begins in the midst of a connection.
    scene.traffic()?.may_lose(true);
    for (what, add, remove) in HOOKS {
        run(&scene.gateways.a, add)?;
        let is_slow = Scene::is_slow_within_a_second();
        story.expect(is_slow, format!("{what}: packets are still fast one second after it came"));
        run(&scene.gateways.a, remove)?;
        scene.wait_until_fast().with_context(|| format!("after {what} has gone"))?;
    }
    scene.traffic()?.may_lose(false);
    scene.traffic()?.wait_for_arrivals(200)?;
    story.figure("hooks", HOOKS.len() as u64);
    let untracked = scene.gateways.a.enter(|| fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack"));
    story.figure("conntrack_drops", untracked.map_or(0, |statistics| drops(&statistics)));
    scene.finish(story)
}

/// A namespace with all hooks, for as long as it is kept. The kernel patches its own code when the first hook of a kind comes
/// and when the last one goes, anywhere; emulated processors that run that code at the same time do not always survive it. With
/// this it does so before there is traffic.
fn hooks_elsewhere() -> anyhow::Result<Namespace> {
    let elsewhere = Namespace::new("hooks")?;
    for device in ["lan0", "nic0"] {
        elsewhere.ip(&format!("link add {device} type dummy"))?;
        elsewhere.ip(&format!("link set {device} up"))?;
    }
    for (what, add, _) in HOOKS {
        run(&elsewhere, add).with_context(|| format!("{what} in another namespace"))?;
    }
    Ok(elsewhere)
}

/// What connection tracking has dropped on all processors, or could not insert, which it drops too.
fn drops(statistics: &str) -> u64 {
    let mut lines = statistics.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let names = lines.next().unwrap_or_default();
    let wanted = |name: &str| matches!(name, "insert_failed" | "drop" | "early_drop");
    let number = |(name, number): (&&str, &str)| {
        u64::from_str_radix(number, 16).ok().filter(|_| wanted(name)).unwrap_or(0)
    };
    lines.flat_map(|numbers| names.iter().zip(numbers).map(number).collect::<Vec<_>>()).sum()
}

/// Runs commands in a namespace.
fn run(namespace: &Namespace, commands: &str) -> Result<(), LabError> {
    commands.lines().try_for_each(|command| namespace.run(command))
}
