//! Many tunnels.

use std::{fmt::Write as _, fs, time::Instant};

use anyhow::ensure;

use super::scene::{Plan, Scene};
use crate::{
    guest::{Story, traffic::Traffic, wait_for},
    lab::Namespace,
};

const TUNNELS: u32 = 1000;

pub(super) fn many(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::set_up(story, Plan::default())?;
    let elapsed = |start: Instant| u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    // Only what has a route is fast.
    scene.gateways.a.ip("route add 10.0.0.0/8 via 192.0.2.2")?;
    scene.restart_mirror("mirror-1")?;
    batch(story, &scene.gateways.b, "b", &tunnels(false))?;
    let start = Instant::now();
    batch(story, &scene.gateways.a, "a", &tunnels(true))?;
    story.figure("install_ms", elapsed(start));
    wait_for("all tunnels to be fast", || scene.counted().fast_policies == u64::from(TUNNELS))?;
    story.figure("mirrored_ms", elapsed(start));

    // Host b is in the last network.
    let last = network(TUNNELS - 1);
    let address = last.replace(".0/24", ".9");
    scene.gateways.host_b.ip(&format!("address add {address}/32 dev lo"))?;
    scene.gateways.b.ip(&format!("route add {last} via 10.2.0.9"))?;
    scene.restart_mirror("mirror-2")?;
    let start = Instant::now();
    wait_for("all tunnels to be fast", || scene.counted().fast_policies == u64::from(TUNNELS))?;
    story.figure("restart_ms", elapsed(start));
    let hosts = [(&scene.gateways.host_a, "10.1.0.5"), (&scene.gateways.host_b, address.as_str())];
    scene.traffic = Some(Traffic::between(hosts)?);
    scene.wait_until_fast()?;
    scene.traffic()?.wait_for_arrivals(200)?;

    scene.traffic()?.may_lose(true);
    ensure!(scene.counted().fast_packets > 0, "no packet was counted");
    scene.gateways.refuse_clear()?;
    let start = Instant::now();
    scene.gateways.a.ip("xfrm state flush")?;
    story.figure("flush_ms", elapsed(start));
    scene.wait_until_slow()?;
    wait_for("no tunnel to be fast", || scene.counted().fast_policies == 0)?;
    story.figure("flushed_ms", elapsed(start));
    scene.finish(story)
}

fn network(number: u32) -> String {
    format!("10.{}.{}.0/24", 16 + number / 256, number % 256)
}

/// Commands for `ip -batch` at A, which offloads, or at B.
fn tunnels(at_a: bool) -> String {
    const KEY: &str = "0x000102030405060708090a0b0c0d0e0f10111213";
    let (here, there) = if at_a { ("192.0.2.1", "192.0.2.2") } else { ("192.0.2.2", "192.0.2.1") };
    let offload = |direction: &str| {
        if at_a { format!("offload packet dev nic0 {direction}") } else { String::new() }
    };
    let mut commands = String::new();
    for number in 0..TUNNELS {
        let (a, b) = ("10.1.0.0/16".to_owned(), network(number));
        let (mine, theirs) = if at_a { (a, b) } else { (b, a) };
        let reqid = number + 1;
        let (from_a, from_b) = (0x10_0000 + number, 0x20_0000 + number);
        let (outbound, inbound) = if at_a { (from_a, from_b) } else { (from_b, from_a) };
        for (source, destination, spi, direction, more) in
            [(here, there, outbound, "dir out", ""), (there, here, inbound, "dir in", "replay-window 32")]
        {
            let _ = writeln!(
                commands,
                "xfrm state add src {source} dst {destination} proto esp spi {spi} reqid {reqid} mode tunnel \
                 {more} aead rfc4106(gcm(aes)) {KEY} 128 {}",
                offload(direction)
            );
        }
        for (direction, source, destination, outer, offload) in [
            ("out", &mine, &theirs, (here, there), offload("")),
            ("in", &theirs, &mine, (there, here), offload("")),
            ("fwd", &theirs, &mine, (there, here), String::new()),
        ] {
            let (from, to) = outer;
            let _ = writeln!(
                commands,
                "xfrm policy add src {source} dst {destination} dir {direction} priority 100 \
                 tmpl src {from} dst {to} proto esp reqid {reqid} mode tunnel {offload}"
            );
        }
    }
    commands
}

fn batch(story: &Story, gateway: &Namespace, name: &str, commands: &str) -> anyhow::Result<()> {
    let file = story.logs().join(format!("tunnels-{name}"));
    fs::write(&file, commands)?;
    gateway.ip(&format!("-batch {}", file.display()))?;
    Ok(())
}
