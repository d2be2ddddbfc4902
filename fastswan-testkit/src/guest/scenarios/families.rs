//! Tunnels of other kinds than IPv4 in IPv4.

use super::scene::{Plan, Scene};
use crate::guest::{Story, gateways::Gateways, swan::Child, traffic::Traffic, wait_for};

const V4: (&str, &str) = ("10.1.0.0/16", "10.2.0.0/16");
const V6: (&str, &str) = ("2001:db8:1::/48", "2001:db8:2::/48");
const OUTER_V4: (&str, &str) = ("192.0.2.1", "192.0.2.2");
const OUTER_V6: (&str, &str) = ("2001:db8:f::1", "2001:db8:f::2");

pub(super) fn ipv6(story: &mut Story) -> anyhow::Result<()> {
    let children = [Child::between(V6.0, V6.1)];
    let plan = Plan { outer: OUTER_V6, children: &children, logs: "6in6", ..Plan::default() };
    let mut scene = Scene::set_up(story, plan)?;
    scene.swan_a.initiate("net")?;
    scene.traffic = Some(traffic_v6(&scene)?);
    scene.wait_until_fast()?;
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)?;

    for (logs, inner, outer) in [("6in4", V6, OUTER_V4), ("4in6", V4, OUTER_V6)] {
        crosses(story, logs, inner, outer)?;
    }
    Ok(())
}

/// Of packets in an offloaded tunnel between addresses of the other family the kernel forwards none, and thus nobody
/// does.
fn crosses(story: &mut Story, logs: &str, inner: (&str, &str), outer: (&str, &str)) -> anyhow::Result<()> {
    let children = [Child::between(inner.0, inner.1)];
    let mut scene = Scene::set_up(story, Plan { outer, children: &children, logs, ..Plan::default() })?;
    scene.swan_a.initiate("net")?;
    let mut traffic = if inner == V6 { traffic_v6(&scene)? } else { Traffic::start(&scene.gateways)? };
    traffic.may_lose(true);
    wait_for("packets from b", || traffic.arrived()[1] > 100)?;
    let arrived = traffic.arrived()[0];
    let errors = Gateways::ipsec_errors(&scene.gateways.a);
    scene.traffic = Some(traffic);
    story.expect(
        arrived == 0 && errors.iter().any(|error| error.starts_with("XfrmOutBundleGenError")),
        format!("{logs}: the kernel forwards such packets, {arrived} arrived at b: the rule is too strict"),
    );
    story.expect(Scene::redirected() == 0, format!("{logs}: packets were fast that the kernel drops"));
    scene.finish(story)
}

fn traffic_v6(scene: &Scene) -> anyhow::Result<Traffic> {
    let Gateways { host_a, host_b, .. } = &scene.gateways;
    Traffic::between([(host_a, "2001:db8:1::5"), (host_b, "2001:db8:2::9")])
}

pub(super) fn esn(story: &mut Story) -> anyhow::Result<()> {
    let child = Child { proposal: "aes128gcm16-esn", ..Child::between(V4.0, V4.1) };
    let mut scene = Scene::established(story, Plan { children: &[child], logs: "ike", ..Plan::default() })?;
    let state = scene.gateways.a.ip("xfrm state")?;
    story.expect(state.contains("esn"), "the associations have no extended sequence numbers");
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)?;

    let mut scene = Scene::set_up(story, Plan { logs: "wrap", ..Plan::default() })?;
    manual(&scene)?;
    scene.traffic = Some(Traffic::start(&scene.gateways)?);
    scene.wait_until_fast()?;
    // Both directions begin 100 packets before the lower half of the number wraps.
    scene.traffic()?.wait_for_arrivals(300)?;
    let state = scene.gateways.b.ip("xfrm state")?;
    story.expect(state.contains("oseq-hi 0x1"), format!("the sequence number has not wrapped: {state}"));
    scene.finish(story)
}

/// Associations and policies as an operator would add them, whose sequence numbers are about to wrap.
fn manual(scene: &Scene) -> anyhow::Result<()> {
    const KEY: &str = "0x000102030405060708090a0b0c0d0e0f10111213";
    for (gateway, here, there, offload) in [
        (&scene.gateways.a, ("192.0.2.1", V4.0), ("192.0.2.2", V4.1), true),
        (&scene.gateways.b, ("192.0.2.2", V4.1), ("192.0.2.1", V4.0), false),
    ] {
        for (from, to, direction) in [(here, there, "out"), (there, here, "in")] {
            let device = |direction: &str| {
                let direction = if direction.is_empty() { String::new() } else { format!("dir {direction}") };
                if offload { format!("offload packet dev nic0 {direction}") } else { String::new() }
            };
            let spi = if from.0 == "192.0.2.1" { "0x1001" } else { "0x1002" };
            let addresses = format!("src {} dst {}", from.0, to.0);
            // The kernel wants no window of an outbound association whose direction it is told, as NICs are.
            let numbers = match (direction, offload) {
                ("out", true) => "replay-window 0 replay-oseq 0xffffff9b replay-oseq-hi 0",
                ("out", false) => "replay-window 64 replay-oseq 0xffffff9b replay-oseq-hi 0",
                _ => "replay-window 64 replay-seq 0xffffff9b replay-seq-hi 0",
            };
            gateway.ip(&format!(
                "xfrm state add {addresses} proto esp spi {spi} reqid 1 mode tunnel flag esn {numbers} \
                 aead rfc4106(gcm(aes)) {KEY} 128 {}",
                device(direction)
            ))?;
            let policy = |direction: &str, offload: &str| {
                format!(
                    "xfrm policy add src {} dst {} dir {direction} priority 100 \
                     tmpl {addresses} proto esp reqid 1 mode tunnel {offload}",
                    from.1, to.1
                )
            };
            gateway.ip(&policy(direction, &device("")))?;
            if direction == "in" {
                gateway.ip(&policy("fwd", ""))?;
            }
        }
    }
    Ok(())
}

pub(super) fn transport(story: &mut Story) -> anyhow::Result<()> {
    let child = Child { mode: "transport", ..Child::between("192.0.2.1/32[17]", "192.0.2.2/32[17]") };
    let mut scene = Scene::set_up(story, Plan { children: &[child], ..Plan::default() })?;
    scene.swan_a.initiate("net")?;
    let gateways = &scene.gateways;
    let traffic = Traffic::between([(&gateways.a, "192.0.2.1"), (&gateways.b, "192.0.2.2")])?;
    scene.traffic = Some(traffic);
    scene.traffic()?.wait_for_arrivals(500)?;
    let esp = Gateways::PORT_A.counter("tx_esp")?;
    story.expect(esp >= 500, format!("the NIC has encrypted only {esp} packets"));
    story.expect(Scene::redirected() == 0, "packets of a gateway itself were fast");
    scene.finish(story)
}
