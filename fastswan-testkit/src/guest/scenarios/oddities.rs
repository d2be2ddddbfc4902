//! Packets that are not quite like others.

use std::{collections::BTreeMap, io::Write as _, time::Duration};

use super::scene::{Plan, Scene};
use crate::{
    capture::Capture,
    frames::Frame,
    guest::{
        Story,
        gateways::{HOST_A, LAN_A},
        swan::Child,
    },
    lab,
};

/// How long answers may be under way.
const LAST: Duration = Duration::from_secs(1);

pub(super) fn fragments_options(story: &mut Story) -> anyhow::Result<()> {
    let children = [
        Child::between("10.1.0.0/16", "10.2.0.0/16"),
        Child { name: "net6", ..Child::between("2001:db8:1::/48", "2001:db8:2::/48") },
    ];
    let mut scene = Scene::established(story, Plan { children: &children, ..Plan::default() })?;
    scene.traffic()?.may_lose(true);
    // Some are longer than the host would send.
    scene.gateways.host_a.ip("link set eth0 mtu 1500")?;
    // Only the odd ones from now on.
    if let Some(traffic) = scene.traffic.take() {
        traffic.stop()?;
    }
    let mut with = BTreeMap::new();
    for (name, frame) in odd() {
        let before = Scene::redirected();
        with.insert(name, fate(&scene, frame)?);
        let redirected = Scene::redirected() - before;
        story.expect(redirected == 0, format!("{name}: {redirected} packets were fast"));
    }
    let fast = fate(&scene, Frame::v4("10.1.0.5", "10.2.0.9").udp(7000, 7001).payload(64))?;
    story.expect(Scene::redirected() > 0 && fast.at_b == 1, "an ordinary packet was not fast");
    let counted = scene.counted();
    if let Some(mirror) = scene.mirror.take() {
        mirror.stop()?;
    }
    for (name, frame) in odd() {
        let without = fate(&scene, frame)?;
        let with = &with[name];
        story.expect(*with == without, format!("{name}: {with:?} with a mirror, {without:?} without"));
    }
    story.add("fast_packets", counted.fast_packets);
    story.figure("odd", odd().len() as u64);
    scene.finish(story)
}

fn odd() -> Vec<(&'static str, Frame)> {
    let v4 = || Frame::v4("10.1.0.5", "10.2.0.9").udp(7000, 7001).payload(64);
    let v6 = || Frame::v6("2001:db8:1::5", "2001:db8:2::9").udp(7000, 7001).payload(64);
    vec![
        ("a first fragment", v4().fragment(0, true)),
        ("a last fragment", v4().fragment(185, false)),
        ("IP options", v4().ip_options(&[1, 1, 1, 0])),
        ("TTL 1", v4().ttl(1)),
        ("a wrong checksum", v4().wrong_checksum()),
        ("too long for the tunnel", v4().payload(1440)),
        ("to an unknown host", Frame::v4("10.1.0.5", "10.2.0.77").udp(7000, 7001).ttl(1)),
        ("to the gateway itself", Frame::v4("10.1.0.5", "10.1.0.1").udp(7000, 7001)),
        ("to another's address", v4().macs(HOST_A, HOST_A)),
        ("hop-by-hop options", v6().hop_by_hop()),
        ("destination options", v6().destination_options()),
        ("an IPv6 fragment", v6().fragment(0, true)),
        ("hop limit 1", v6().ttl(1)),
        ("IPv6 too long for the tunnel", v6().payload(1440)),
    ]
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fate {
    /// Packets that have arrived at host b.
    pub(super) at_b: usize,
    /// ICMP messages that have come back to host a, by type and code of the last.
    back: usize,
    icmp: Option<(u8, u8)>,
}

/// Sends a frame from host a, and looks what becomes of it.
pub(super) fn fate(scene: &Scene, frame: Frame) -> anyhow::Result<Fate> {
    let frame = if let Some([2, 0, 0, 0, 0, 0xaa]) = frame.clone().build().first_chunk::<6>() {
        frame
    } else {
        frame.macs(HOST_A, LAN_A)
    };
    let mut at_b = Capture::open(&scene.gateways.host_b)?;
    let mut at_a = Capture::open(&scene.gateways.host_a)?;
    scene.gateways.host_a.enter(|| lab::wire("eth0"))?.write_all(&frame.build())?;
    let mut fate = Fate::default();
    while let Some(captured) = at_b.next(LAST)? {
        fate.at_b += usize::from(captured.received && is_odd(captured.frame));
    }
    while let Some(captured) = at_a.next(Duration::from_millis(10))? {
        if let (true, Some(icmp)) = (captured.received, icmp_error(captured.frame)) {
            fate.back += 1;
            fate.icmp = Some(icmp);
        }
    }
    Ok(fate)
}

/// Whether a frame is a packet from host a.
fn is_odd(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(26..30) == Some(&[10, 1, 0, 5]),
        Some([0x86, 0xdd]) => {
            let source = frame.get(22..38);
            let udp_or_more = frame.get(20).is_some_and(|next| *next != 58);
            udp_or_more && source.is_some_and(|source| source.starts_with(&[0x20, 1, 0xd, 0xb8, 0, 1]))
        }
        _ => false,
    }
}

/// Type and code of an ICMP error.
fn icmp_error(frame: &[u8]) -> Option<(u8, u8)> {
    let at = match frame.get(12..14)? {
        [0x08, 0x00] if frame.get(23) == Some(&1) => 34,
        [0x86, 0xdd] if frame.get(20) == Some(&58) => 54,
        _ => return None,
    };
    let (kind, code) = (*frame.get(at)?, *frame.get(at + 1)?);
    // Of IPv6, errors are below 128; of IPv4, they are 3, 11 and 12.
    (if at == 54 { kind < 128 } else { [3, 11, 12].contains(&kind) }).then_some((kind, code))
}
