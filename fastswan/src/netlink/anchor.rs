//! A network namespace to come back to.
//!
//! Sockets belong to the network namespace of the thread that opens them, and `/proc/sys/net` shows that of the thread
//! that looks. A source is polled by threads that may be elsewhere, and `setns(2)` takes `CAP_SYS_ADMIN`; but a new thread
//! is where the one is that starts it. So a source keeps a thread that never leaves, and has it start others.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::mpsc,
    task::{Context, Poll},
    thread,
};

use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;
/// Tells whether somebody still waits for a job.
pub(super) type IsAwaited<'a> = dyn Fn() -> bool + Sync + 'a;

/// Keeps the network namespace of the thread that made it. Its thread ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Anchor(mpsc::Sender<(&'static str, Work)>);

impl Anchor {
    /// In the network namespace of the calling thread.
    pub(crate) fn here() -> io::Result<Self> {
        let (sender, work) = mpsc::channel::<(&'static str, Work)>();
        thread::Builder::new().name("fastswan-anchor".to_owned()).spawn(move || {
            for (name, work) in work {
                // If it cannot be started, the work is dropped, and with it the sender of its result.
                let _ = thread::Builder::new().name(name.to_owned()).spawn(work);
            }
        })?;
        Ok(Self(sender))
    }

    /// Has this done on a thread of its own in the namespace.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Job<T> {
        self.run_unless_dropped(name, |_| work())
    }

    /// The same, for work that asks now and then whether somebody still waits for it.
    pub(super) fn run_unless_dropped<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnOnce(&IsAwaited<'_>) -> T + Send + 'static,
    ) -> Job<T> {
        let (result, receiver) = oneshot::channel();
        let work = Box::new(move || {
            let done = work(&|| !result.is_closed());
            // Nobody waits for it any longer if this fails.
            let _ = result.send(done);
        });
        // It fails if the thread is gone, and then the job says so.
        let _ = self.0.send((name, work));
        Job(receiver)
    }
}

/// Work in progress: a future of its result, or of an error if its thread could not be started. Dropping it does not stop
/// it.
#[derive(Debug)]
pub(crate) struct Job<T>(oneshot::Receiver<T>);

impl<T> Future for Job<T> {
    type Output = io::Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let gone = |_| io::Error::other("a thread could not be started, or has failed");
        Pin::new(&mut self.0).poll(context).map(|result| result.map_err(gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_elsewhere_and_a_failure_is_an_error() {
        let anchor = Anchor::here().unwrap();
        let here = thread::current().id();
        assert_ne!(anchor.run("test", move || thread::current().id()).await.unwrap(), here);
        let failed = anchor.run("test", || -> u32 { panic!("on purpose") });
        failed.await.unwrap_err();
        assert_eq!(anchor.run("test", || 7).await.unwrap(), 7, "one failure is not the end");
    }

    #[tokio::test]
    async fn work_learns_that_nobody_waits_for_it() {
        let anchor = Anchor::here().unwrap();
        let (said, says) = mpsc::channel();
        let job = anchor.run_unless_dropped("test", move |is_awaited| {
            let before = is_awaited();
            while is_awaited() {
                thread::yield_now();
            }
            said.send(before).unwrap();
        });
        drop(job);
        says.recv().unwrap();
    }
}
