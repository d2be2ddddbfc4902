//! What takes policies and associations away without a message of XFRM's.

use super::scene::{Plan, Scene};
use crate::guest::{Story, nic};

/// What is asked of each: one second after, nothing is sent into the void; later all is well again.
const STILL_FAST: &str = "packets are still sent to the port one second after it went";

pub(super) fn flap(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::established(story, Plan { refuse_clear: true, ..Plan::default() })?;
    scene.traffic()?.may_lose(true);
    scene.gateways.a.ip("link set nic0 down")?;
    story.expect(Scene::is_slow_within_a_second(), STILL_FAST);
    scene.gateways.set_up_ends()?;
    scene.swan_a.swanctl(&["--rekey", "--child", "net"])?;
    scene.wait_until_fast()?;
    scene.traffic()?.may_lose(false);
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)
}

pub(super) fn unload(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::established(story, Plan { refuse_clear: true, ..Plan::default() })?;
    scene.traffic()?.may_lose(true);
    nic::unload()?;
    // There is no port to count: what XDP sends to a device that is gone, it does not pass.
    let before = scene.counted().fast_packets;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let after = scene.counted().fast_packets;
    std::thread::sleep(std::time::Duration::from_secs(2));
    let last = scene.counted().fast_packets;
    story.expect(after == last, format!("{STILL_FAST}: {before}, {after}, {last}"));
    nic::load()?;
    scene.gateways.renew_wire()?;
    scene.restart_mirror("mirror-2")?;
    scene.swan_a.swanctl(&["--terminate", "--ike", "gateway", "--force"])?;
    scene.swan_a.initiate("net")?;
    scene.wait_until_fast()?;
    scene.traffic()?.may_lose(false);
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)
}

pub(super) fn move_away(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::established(story, Plan { refuse_clear: true, ..Plan::default() })?;
    scene.traffic()?.may_lose(true);
    let host = scene.gateways.host_a.name().to_owned();
    scene.gateways.a.ip(&format!("link set nic0 netns {host}"))?;
    story.expect(Scene::is_slow_within_a_second(), STILL_FAST);
    let gateway = scene.gateways.a.name().to_owned();
    scene.gateways.host_a.ip(&format!("link set nic0 netns {gateway}"))?;
    scene.gateways.set_up_ends()?;
    scene.restart_mirror("mirror-2")?;
    scene.swan_a.swanctl(&["--rekey", "--child", "net"])?;
    scene.wait_until_fast()?;
    scene.traffic()?.may_lose(false);
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)
}
