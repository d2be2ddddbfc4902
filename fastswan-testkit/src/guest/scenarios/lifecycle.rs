//! What IKE does to a tunnel in its life.

use fastswan::{XdpForwarder, table::TableConfig};

use super::scene::{Plan, Scene};
use crate::guest::{Story, traffic::Traffic, wait_for};

/// Half of what the verifier would walk through.
const MOST_VERIFIED: u64 = 500_000;

pub(super) fn establish(story: &mut Story) -> anyhow::Result<()> {
    let (forwarder, _) = XdpForwarder::load(TableConfig::default())?;
    let verified = u64::from(forwarder.cost()?.verified_instructions);
    story.figure("verified_instructions", verified);
    story.expect(verified <= MOST_VERIFIED, format!("the verifier walked through {verified} instructions"));
    drop(forwarder);
    let mut scene = Scene::established(story, Plan::default())?;
    scene.traffic()?.wait_for_arrivals(1000)?;
    let sent = scene.traffic()?.sent()[0];
    let redirected = Scene::redirected();
    story.expect(redirected * 10 >= sent * 9, format!("of {sent} packets only {redirected} were fast"));
    scene.finish(story)
}

pub(super) fn rekey(story: &mut Story) -> anyhow::Result<()> {
    for (logs, leak) in [("closed", false), ("leak", true)] {
        let mut scene = Scene::established(story, Plan { leak, logs, ..Plan::default() })?;
        for what in [["--child", "net"], ["--ike", "gateway"], ["--child", "net"]] {
            let spis = outbound_spis(&scene)?;
            scene.swan_a.swanctl(&[&["--rekey"], &what[..]].concat())?;
            if what[0] == "--child" {
                wait_for("another association", || outbound_spis(&scene).is_ok_and(|now| now != spis))?;
            }
            scene.wait_until_fast()?;
        }
        // The old inbound association goes five seconds after its successor has come.
        let arrived = scene.traffic()?.arrived()[1];
        wait_for("the last rekey to settle", || inbound_associations(&scene).is_ok_and(|count| count == 1))?;
        scene.traffic()?.wait_for_arrivals(50)?;
        story.expect(scene.traffic()?.arrived()[1] > arrived, "nothing arrived from b meanwhile");
        scene.finish(story)?;
    }
    Ok(())
}

pub(super) fn delete(story: &mut Story) -> anyhow::Result<()> {
    for (logs, leak, guard) in [("closed", false, "on"), ("unguarded", true, "off"), ("guarded", true, "on")]
    {
        let mirror = &["--guard", guard];
        // For each of the two removals below one packet may have been looked up before.
        let plan = Plan { leak, logs, mirror, refuse_clear: true, in_flight: 2, ..Plan::default() };
        let mut scene = Scene::established(story, plan)?;
        for what in [["--child", "net"], ["--ike", "gateway"]] {
            scene.traffic()?.may_lose(true);
            scene.swan_a.swanctl(&[&["--terminate"], &what[..]].concat())?;
            scene.wait_until_slow()?;
            scene.swan_a.initiate("net")?;
            scene.wait_until_fast()?;
            scene.traffic()?.may_lose(false);
            scene.traffic()?.wait_for_arrivals(100)?;
        }
        scene.finish(story)?;
    }
    Ok(())
}

pub(super) fn trap(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::set_up(story, Plan { refuse_clear: true, ..Plan::default() })?;
    scene.swan_a.swanctl(&["--install", "--child", "net"])?;
    story.expect(inbound_associations(&scene)? == 0, "there is an association before the first packet");
    let mut traffic = Traffic::start(&scene.gateways)?;
    traffic.may_lose(true);
    scene.traffic = Some(traffic);
    scene.wait_until_fast()?;
    scene.traffic()?.may_lose(false);
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)
}

/// The SPIs of A's associations towards B.
fn outbound_spis(scene: &Scene) -> anyhow::Result<Vec<String>> {
    associations(scene, "192.0.2.1", "192.0.2.2")
}

fn inbound_associations(scene: &Scene) -> anyhow::Result<usize> {
    Ok(associations(scene, "192.0.2.2", "192.0.2.1")?.len())
}

fn associations(scene: &Scene, source: &str, destination: &str) -> anyhow::Result<Vec<String>> {
    let said = scene.gateways.a.ip(&format!("xfrm state list src {source} dst {destination}"))?;
    let spis = said.lines().filter_map(|line| line.trim().strip_prefix("proto esp spi "));
    Ok(spis.map(|rest| rest.split(' ').next().unwrap_or_default().to_owned()).collect())
}
