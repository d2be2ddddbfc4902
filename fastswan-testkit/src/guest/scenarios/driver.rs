//! The test NIC's driver itself. What the kernel says of it is looked at after every run.

use std::fs;

use anyhow::ensure;

use crate::guest::{Story, gateways::Gateways, nic, nic::Pair, traffic::Traffic};

pub(super) fn driver(story: &mut Story) -> anyhow::Result<()> {
    let before = complaints()?;
    {
        let gateways = Gateways::new()?;
        let mut traffic = Traffic::start(&gateways)?;
        traffic.may_lose(true);
        traffic.wait_for_arrivals(50)?;
        for _ in 0..100 {
            gateways.a.ip("link set nic0 down")?;
            gateways.a.ip("link set nic0 up")?;
        }
        gateways.set_up_ends()?;
        traffic.wait_for_arrivals(50)?;
        let totals = traffic.stop()?;
        story.figure("sent", totals.sent.iter().sum());
    }
    for _ in 0..5 {
        nic::unload()?;
        ensure!(!nic::is_there(), "the driver is still there");
        nic::load()?;
        drop(Pair::new()?);
    }
    // With a pair, and with namespaces that go first.
    let pair = Pair::new()?;
    nic::unload()?;
    nic::load()?;
    drop(pair);
    let after = complaints()?;
    story.expect(before == after, format!("the kernel's log has {after} complaints, {before} before"));
    Ok(())
}

/// Lines of the kernel's log that are warnings or worse.
fn complaints() -> anyhow::Result<usize> {
    let log = std::process::Command::new("dmesg").output()?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    fs::metadata("/sys/kernel/debug")?;
    Ok(log.lines().filter(|line| line.contains("WARNING") || line.contains("BUG")).count())
}
