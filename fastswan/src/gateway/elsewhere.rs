//! Without the feature `bpf`, another program attaches the XDP program.

use std::{future::pending, time::Instant};

use super::GatewayError;
use crate::mirror::Mirror;

/// The same as with the feature, without a forwarder.
#[derive(Debug, Default)]
pub(super) struct Attached(());

#[expect(clippy::unused_self, reason = "the signatures are those of the feature `bpf`")]
impl Attached {
    pub(super) async fn superseded(&mut self) -> GatewayError {
        pending().await
    }

    #[expect(clippy::unnecessary_wraps, reason = "it can fail with the feature `bpf`")]
    pub(super) fn attach(
        &mut self,
        interfaces: &[u32],
        mirror: &mut Mirror,
        now: Instant,
    ) -> Result<(), GatewayError> {
        for ifindex in interfaces {
            mirror.handle_attached(*ifindex, Ok(()), now);
        }
        Ok(())
    }

    pub(super) fn look_again(&self, _: &mut Mirror) {}
}

/// Nothing takes over.
pub(super) fn is_superseded(_: &GatewayError) -> bool {
    false
}
