//! Policies and associations are moved to another far end (`XFRM_MSG_MIGRATE`), as for a mobile peer, under traffic; so is
//! an association alone (`XFRM_MSG_MIGRATE_STATE`), where the kernel knows how.
//!
//! The kernel deletes the old associations and tells neither of that nor of the policy, but of the move. A NIC that leaks
//! sends in clear what it has no association for.

use std::net::IpAddr;

use anyhow::Context as _;
use fastswan::{Policy, policy::Direction};

use super::scene::{Plan, Scene};
use crate::{
    guest::{Story, gateways::NIC_B, wait_for},
    requests::{Requests, deleted_association, migration, moved_association},
};

/// Where the tunnels are moved to: another address of B.
const ELSEWHERE: &str = "192.0.2.20";

pub(super) fn migrate(story: &mut Story) -> anyhow::Result<()> {
    // For each move one packet may have been looked up before.
    let mirror = &["--guard", "on"];
    let plan = Plan { leak: true, refuse_clear: true, mirror, in_flight: 3, ..Plan::default() };
    let mut scene = Scene::established(story, plan)?;
    scene.gateways.b.ip(&format!("address add {ELSEWHERE}/24 dev nic0"))?;
    let neighbour = format!("neighbour replace {ELSEWHERE} lladdr {NIC_B} dev nic0");
    scene.gateways.a.ip(&neighbour)?;
    let mut kernel = scene.gateways.a.enter(Requests::open)?;
    // The associations lose their offload: the software NIC takes no moved one over (`ENODATA`).
    let ways: [Move; 3] = [move_tunnel, move_tunnel, move_association];
    let mut moved = 0;
    for move_elsewhere in ways {
        scene.wait_until_fast()?;
        scene.traffic()?.may_lose(true);
        moved += u64::from(move_elsewhere(&mut kernel)?);
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
    story.figure("moved", moved);
    wait_for("a report of the guard", || scene.counted().times_shut >= 2)?;
    scene.finish(story)
}

/// Moves something, if the kernel knows how.
type Move = fn(&mut Requests) -> anyhow::Result<bool>;

fn move_tunnel(kernel: &mut Requests) -> anyhow::Result<bool> {
    let before = kernel.dump()?;
    let policy = offloaded(&before.policies).context("no policy is offloaded")?;
    let template = policy.templates[0];
    let request = migration(&policy.id, &template, (template.source, ELSEWHERE.parse()?), None);
    kernel.make([request])?.remove(0).context("moving the tunnel")?;
    Ok(true)
}

fn move_association(kernel: &mut Requests) -> anyhow::Result<bool> {
    let before = kernel.dump()?;
    let sa = before.sas.iter().find(|sa| sa.is_outbound_packet_offload());
    let sa = sa.context("no association is offloaded")?;
    match kernel.make([moved_association(sa, (sa.source, ELSEWHERE.parse()?))])?.remove(0) {
        Ok(()) => Ok(true),
        // No such message.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error).context("moving an association"),
    }
}

fn offloaded(policies: &[Policy]) -> Option<&Policy> {
    let is_it = |policy: &&Policy| {
        policy.id.direction == Direction::Out && policy.offload.is_some() && !policy.templates.is_empty()
    };
    policies.iter().find(is_it)
}
