//! Waiting until something is so.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;

/// Nothing takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// Waits until something is so.
pub(super) fn wait(mut reached: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !reached()? {
        ensure!(Instant::now() < deadline, "waited in vain");
        thread::sleep(PAUSE);
    }
    Ok(())
}
