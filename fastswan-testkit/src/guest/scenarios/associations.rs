//! Associations that are there, but that the kernel does not take for the packets. The NIC would, since it compares less.

use std::time::Duration;

use anyhow::Context as _;
use fastswan::policy::{OffloadDev, OffloadKind, SaId, SecurityAssociation, Template};

use super::{
    oddities::fate,
    scene::{Plan, Scene},
};
use crate::{
    cpu::run_on,
    frames::Frame,
    guest::{Story, wait_at_most, wait_for},
    lab::{LabError, Namespace},
    requests::{Requests, keyed_association},
};

const KEY: [u8; 20] = [7; 20];
/// The same, as `ip` wants it.
const SAME_KEY: &str = "0x0707070707070707070707070707070707070707";
const TUNNEL: &str = "src 192.0.2.1 dst 192.0.2.2 proto esp";
const SPI: u32 = 0x1001;
const REQID: u32 = 7;
/// Packets that are sent to see what becomes of them.
const PACKETS: usize = 3;
/// The mirror reports once in a second.
const REPORT: Duration = Duration::from_secs(5);

pub(super) fn odd_associations(story: &mut Story) -> anyhow::Result<()> {
    // Nothing comes back, but for the complaints of host b, which has nobody to receive the packets.
    let scene = Scene::set_up(story, Plan { refuse_clear: true, ..Plan::default() })?;
    expect_packets(&scene.gateways.b)?;
    let kernel = scene.gateways.a.enter(Requests::open)?;
    let mut gateway = Gateway { story, scene, kernel };
    let sa = gateway.association()?;
    gateway.policy("add", REQID)?;
    gateway.are_fast("an ordinary association", &[&sa])?;

    gateway.policy("update", 0)?;
    gateway.are_slow("a template with reqid 0", &[&sa], 0)?;
    gateway.policy("update", REQID)?;
    gateway.are_fast("a template with the association's reqid again", &[&sa])?;

    let receives = SecurityAssociation { receives_only: true, ..sa.clone() };
    gateway.are_slow("an association that receives only", &[&receives], 0)?;

    let marking = SecurityAssociation { sets_mark: true, ..sa.clone() };
    gateway.are_slow("an association that sets a mark", &[&marking], PACKETS)?;

    let one_cpu = SecurityAssociation { cpu: Some(1), ..sa.clone() };
    run_on(&[0])?;
    gateway.are_slow("an association for another processor", &[&one_cpu], 0)?;
    run_on(&[1])?;
    gateway.are_slow("an association for this processor", &[&one_cpu], PACKETS)?;
    run_on(&[0, 1])?;

    let id = SaId { spi: SPI + 1, ..sa.id };
    let software = SecurityAssociation { id, offload: None, ..sa.clone() };
    gateway.are_slow("an association of software after one of the NIC", &[&sa, &software], 0)?;

    gateway.are_fast("an ordinary association at last", &[&sa])?;
    gateway.scene.finish(story)
}

/// Makes B decrypt the packets of A.
fn expect_packets(b: &Namespace) -> Result<(), LabError> {
    b.ip(&format!(
        "xfrm state add {TUNNEL} spi {SPI} reqid 1 mode tunnel aead rfc4106(gcm(aes)) {SAME_KEY} 128"
    ))?;
    for direction in ["in", "fwd"] {
        b.ip(&format!(
            "xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir {direction} tmpl {TUNNEL} reqid 1 mode tunnel"
        ))?;
    }
    Ok(())
}

/// A, with one offloaded policy.
struct Gateway<'a> {
    story: &'a mut Story,
    scene: Scene,
    kernel: Requests,
}

impl Gateway<'_> {
    /// Adds its policy, or changes it.
    fn policy(&self, command: &str, reqid: u32) -> anyhow::Result<()> {
        self.scene.gateways.a.ip(&format!(
            "xfrm policy {command} src 10.1.0.0/16 dst 10.2.0.0/16 dir out priority 100 \
             tmpl {TUNNEL} reqid {reqid} mode tunnel offload packet dev nic0"
        ))?;
        Ok(())
    }

    /// An association that the NIC has for the policy. It takes none with reqid 0, no more than real ones do.
    fn association(&self) -> anyhow::Result<SecurityAssociation> {
        let template = Template::esp_tunnel("192.0.2.1".parse()?, "192.0.2.2".parse()?, REQID);
        let ifindex = self.scene.gateways.a.ifindex("nic0")?;
        let offload = Some(OffloadDev { ifindex, kind: OffloadKind::Packet, inbound: false });
        Ok(SecurityAssociation { offload, ..SecurityAssociation::for_template(&template, SPI) })
    }

    /// Adds these associations, one after the other, to no others.
    fn has(&mut self, sas: &[&SecurityAssociation]) -> anyhow::Result<()> {
        self.scene.gateways.a.ip("xfrm state flush")?;
        for sa in sas {
            self.kernel.make([keyed_association(sa, &KEY)])?.remove(0).context("adding an association")?;
        }
        Ok(())
    }

    /// With these associations, packets arrive, and are fast.
    fn are_fast(&mut self, what: &str, sas: &[&SecurityAssociation]) -> anyhow::Result<()> {
        self.has(sas)?;
        let before = Scene::redirected();
        wait_for(&format!("packets on the fast path: {what}"), || {
            self.send(1).is_ok_and(|arrived| arrived == 1) && Scene::redirected() > before
        })
    }

    /// With these associations, so many packets arrive, and none is fast.
    fn are_slow(&mut self, what: &str, sas: &[&SecurityAssociation], expected: usize) -> anyhow::Result<()> {
        self.has(sas)?;
        let passed = |scene: &Scene| scene.counted().passed.get("no_sa").copied().unwrap_or(0);
        let (redirected, passed_before) = (Scene::redirected(), passed(&self.scene));
        let arrived = self.send(PACKETS)?;
        let redirected = Scene::redirected() - redirected;
        self.story.expect(arrived == expected, format!("{what}: {arrived} packets arrived, not {expected}"));
        self.story.expect(redirected == 0, format!("{what}: {redirected} packets were fast"));
        let all = passed_before + PACKETS as u64;
        let told = wait_at_most(REPORT, "a report", || passed(&self.scene) >= all).is_ok();
        self.story.expect(told, format!("{what}: packets did not pass for want of an association"));
        Ok(())
    }

    /// Sends packets from host a, and returns how many have arrived at host b.
    fn send(&self, packets: usize) -> anyhow::Result<usize> {
        let packet = || Frame::v4("10.1.0.5", "10.2.0.9").udp(7000, 7001).payload(64);
        (0..packets).map(|_| Ok(fate(&self.scene, packet())?.at_b)).sum()
    }
}
