//! What comes in clear from the wire, with addresses of a network behind the other gateway.

use std::{io::Write as _, net::UdpSocket, time::Duration};

use super::scene::{Plan, Scene};
use crate::{
    capture::Capture,
    frames::Frame,
    guest::{
        Story,
        gateways::{FORGER, Gateways, NIC_A},
        wait_for,
    },
    lab,
};

/// Who is not there.
const FORGED: &str = "10.2.0.66";
const FORGERIES: u64 = 200;

pub(super) fn spoof(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::set_up(story, Plan { leak: true, ..Plan::default() })?;
    let mut host = Capture::open(&scene.gateways.host_a)?;
    // Nobody answers that the port is closed.
    let _sink = scene.gateways.host_a.enter(|| UdpSocket::bind("10.1.0.5:7001"))?;
    // Without a tunnel they arrive, so that somebody would notice if they did later.
    forge(&scene, 1)?;
    let mut arrived = 0;
    wait_for("a forged packet without a tunnel", || {
        arrived += forged(&mut host);
        arrived == 1
    })?;

    scene.swan_a.initiate("net")?;
    scene.traffic = Some(crate::guest::traffic::Traffic::start(&scene.gateways)?);
    scene.wait_until_fast()?;
    let leaked = || Gateways::PORT_A.counter("rx_policy_leak").unwrap_or(0);
    let before = leaked();
    forge(&scene, FORGERIES)?;
    wait_for("the NIC to let them in", || leaked() >= before + FORGERIES)?;
    scene.traffic()?.wait_for_arrivals(200)?;
    let arrived = forged(&mut host);
    story.figure("forged", FORGERIES);
    story.figure("forged_arrived", arrived);
    story.expect(arrived == 0, format!("{arrived} of {FORGERIES} forged packets reached host a"));
    scene.finish(story)
}

fn forge(scene: &Scene, count: u64) -> anyhow::Result<()> {
    let frame = Frame::v4(FORGED, "10.1.0.5").udp(7000, 7001).payload(64);
    let frame = frame.macs(FORGER, NIC_A).build();
    let mut wire = scene.gateways.wire.enter(|| lab::wire("wire0"))?;
    for _ in 0..count {
        wire.write_all(&frame)?;
    }
    Ok(())
}

/// Forged packets that have arrived at the host since it was looked at last. Others keep coming, but not that often.
fn forged(host: &mut Capture) -> u64 {
    let mut arrived = 0;
    while let Ok(Some(captured)) = host.next(Duration::from_millis(1)) {
        let source = captured.frame.get(26..30);
        arrived += u64::from(captured.received && source == Some(&[10, 2, 0, 66]));
    }
    arrived
}
