//! Processes that are killed, stopped and started again.

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;

use super::scene::{Plan, Scene};
use crate::guest::{Story, mirror::Mirror, wait_for};

/// Where mirrors pin, for those that are to be restarted without a gap.
const PINNED: [&str; 2] = ["--pin", "/sys/fs/bpf/fastswan"];

pub(super) fn charon_kill(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::established(story, Plan { refuse_clear: true, ..Plan::default() })?;
    scene.swan_a.kill()?;
    scene.wait_until_fast()?;
    scene.traffic()?.wait_for_arrivals(200)?;
    // The new charon knows nothing of the old one's tunnel, and makes another.
    scene.traffic()?.may_lose(true);
    scene.swan_a.restart(&scene.gateways.a)?;
    scene.swan_a.initiate("net")?;
    scene.wait_until_fast()?;
    scene.traffic()?.may_lose(false);
    scene.traffic()?.wait_for_arrivals(200)?;
    scene.finish(story)
}

pub(super) fn mirror_kill(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::established(story, Plan { mirror: &PINNED, ..Plan::default() })?;
    let first = scene.mirror.take().context("there is no mirror")?;
    wait_for("a report", || first.counted().fast_packets > 0)?;
    let before = first.kill()?;
    scene.wait_until_slow()?;
    scene.traffic()?.wait_for_arrivals(100)?;
    let second = Mirror::start(&scene.gateways, "mirror-2", &PINNED, story.logs())?;
    scene.mirror = Some(second);
    scene.wait_until_fast()?;
    wait_for("a report of the second", || scene.counted().fast_packets > 0)?;
    let after = scene.counted();
    story.expect(
        after.fast_packets >= before.fast_packets,
        format!("{} packets were counted before, {} after", before.fast_packets, after.fast_packets),
    );
    scene.finish(story)
}

pub(super) fn mirror_stop(story: &mut Story) -> anyhow::Result<()> {
    let mut scene = Scene::established(story, Plan { mirror: &PINNED, ..Plan::default() })?;
    let first = scene.mirror.take().context("there is no mirror")?;
    first.signal(Signal::SIGSTOP)?;
    scene.wait_until_slow()?;
    first.signal(Signal::SIGCONT)?;
    scene.wait_until_fast()?;

    first.signal(Signal::SIGSTOP)?;
    scene.wait_until_slow()?;
    scene.mirror = Some(Mirror::start(&scene.gateways, "mirror-2", &PINNED, story.logs())?);
    scene.wait_until_fast()?;
    first.signal(Signal::SIGCONT)?;
    let log = first.failed()?;
    ensure!(log.contains("another process has taken over"), "the first mirror said: {log}");
    scene.wait_until_fast()?;
    scene.finish(story)
}
