//! Policies and associations are moved to another far end (`XFRM_MSG_MIGRATE`), as for a mobile peer, under traffic.
//!
//! The kernel deletes the old associations and tells neither of that nor of the policy, but of the move. A NIC that leaks
//! sends in clear what it has no association for.

use std::net::IpAddr;

use anyhow::Context as _;
use fastswan::{Policy, policy::Direction};

use super::scene::{Plan, Scene};
use crate::{
    guest::{Story, gateways::NIC_B, wait_for},
    requests::{Requests, deleted_association, migration},
};

/// Where the tunnels are moved to: another address of B.
const ELSEWHERE: &str = "192.0.2.20";

pub(super) fn migrate(story: &mut Story) -> anyhow::Result<()> {
    let plan = Plan { leak: true, refuse_clear: true, mirror: &["--guard", "on"], ..Plan::default() };
    let mut scene = Scene::established(story, plan)?;
    scene.gateways.b.ip(&format!("address add {ELSEWHERE}/24 dev nic0"))?;
    let neighbour = format!("neighbour replace {ELSEWHERE} lladdr {NIC_B} dev nic0");
    scene.gateways.a.ip(&neighbour)?;
    let mut kernel = scene.gateways.a.enter(Requests::open)?;
    // The associations lose their offload: the software NIC takes no moved one over (`ENODATA`).
    for _ in 0..2 {
        scene.wait_until_fast()?;
        scene.traffic()?.may_lose(true);
        move_elsewhere(&mut kernel)?;
        scene.traffic()?.wait_for_departures(300)?;
        // Charon does not know where its association is.
        scene.swan_a.swanctl(&["--terminate", "--ike", "gateway"])?;
        for sa in kernel.dump()?.sas {
            if sa.id.destination == ELSEWHERE.parse::<IpAddr>()? {
                kernel.make([deleted_association(&sa.id)])?.remove(0).context("deleting what was moved")?;
            }
        }
        scene.swan_a.initiate("net")?;
        scene.wait_until_fast()?;
        scene.traffic()?.may_lose(false);
        scene.traffic()?.wait_for_arrivals(100)?;
    }
    wait_for("a report of the guard", || scene.counted().times_shut >= 2)?;
    scene.finish(story)
}

fn move_elsewhere(kernel: &mut Requests) -> anyhow::Result<()> {
    let before = kernel.dump()?;
    let policy = offloaded(&before.policies).context("no policy is offloaded")?;
    let template = policy.templates[0];
    let request = migration(&policy.id, &template, (template.source, ELSEWHERE.parse()?), None);
    kernel.make([request])?.remove(0).context("moving the tunnel")
}

fn offloaded(policies: &[Policy]) -> Option<&Policy> {
    let is_it = |policy: &&Policy| {
        policy.id.direction == Direction::Out && policy.offload.is_some() && !policy.templates.is_empty()
    };
    policies.iter().find(is_it)
}
