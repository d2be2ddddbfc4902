//! Learning that another process has taken over: the pinned owner is no longer this process's program.

use std::{
    future::{Future, pending},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use tokio::{io::unix::AsyncFd, time::sleep};

use super::{ForwarderError, XdpForwarder, pins::owner};
use crate::sys::watch_descriptor;

/// Between two looks, where the kernel has no inotify instance left to give.
const PAUSE: Duration = Duration::from_millis(200);

impl XdpForwarder {
    /// Whether another process has taken over the ports that were [pinned](Self::attach_pinned). Then this one's
    /// table is of no consequence: no attached program reads it.
    #[must_use]
    pub fn is_superseded(&self) -> bool {
        self.pinned_in.as_deref().is_some_and(|directory| is_superseded(directory, self.program.id))
    }

    /// Waits until another process takes over the ports that were [pinned](Self::attach_pinned) before this call, and
    /// gives [`ForwarderError::Superseded`]; for ever, if none was. It costs nothing while nothing happens. Await it in
    /// a tokio runtime with I/O and time. Cancel-safe.
    ///
    /// ```no_run
    /// # use fastswan::{XdpForwarder, forwarder::{AttachConfig, ForwarderError}, table::TableConfig};
    /// # async fn run() -> Result<(), ForwarderError> {
    /// let (mut forwarder, table) = XdpForwarder::load(&TableConfig::default())?;
    /// forwarder.attach_pinned("/sys/fs/bpf/gateway", &[AttachConfig::new("lan0")])?;
    /// let error = forwarder.superseded().await;
    /// println!("{error}");
    /// # Ok(())
    /// # }
    /// ```
    pub fn superseded(&self) -> impl Future<Output = ForwarderError> + Send + use<> {
        superseded(self.pinned_in.clone(), self.program.id)
    }
}

fn is_superseded(directory: &Path, program: u32) -> bool {
    owner(directory).is_some_and(|owner| owner != program)
}

async fn superseded(directory: Option<PathBuf>, program: u32) -> ForwarderError {
    let Some(directory) = directory else { return pending().await };
    // Before the first look, so that no change is missed between the two.
    let watch = watch(&directory).ok();
    while !is_superseded(&directory, program) {
        let changed = match &watch {
            Some(watch) => changed(watch).await.is_ok(),
            None => false,
        };
        if !changed {
            sleep(PAUSE).await;
        }
    }
    ForwarderError::Superseded { directory }
}

/// Tells of each name in a directory that comes by renaming, as the owner's does.
fn watch(directory: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let watch = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    add_watch(&watch, directory, WatchFlags::MOVED_TO)?;
    watch_descriptor(watch)
}

async fn changed(watch: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut ready = watch.readable().await?;
    let mut buffer = [MaybeUninit::uninit(); 512];
    let mut events = Reader::new(watch.get_ref(), &mut buffer);
    while events.next().is_ok() {}
    ready.clear_ready();
    Ok(())
}
