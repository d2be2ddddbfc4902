//! From which prefix lengths on the kernel keeps policies in its hash table (`ip xfrm policy set hthresh4 …`).
//!
//! When they change, the kernel sorts all policies anew, after which another one of the same priority may be the first, and
//! tells nobody. So they are asked for now and then.

use std::{convert::identity, io, time::Duration};

use netlink_packet_core::NlasIterator;
use netlink_packet_xfrm::constants::XFRM_MSG_GETSPDINFO;
use netlink_sys::protocols::NETLINK_XFRM;
use tokio::time::{Instant, sleep_until};

use super::{
    anchor::{Anchor, Job},
    request::{RequestError, Requests},
};

/// With this and the time that a thread takes to ask, a change is known within 250 ms. One that is undone within that
/// time is not.
const PERIOD: Duration = Duration::from_millis(100);

/// `linux/xfrm.h`
const XFRMA_SPD_IPV4_HTHRESH: u16 = 3;
const XFRMA_SPD_IPV6_HTHRESH: u16 = 4;
const FLAGS_LENGTH: usize = 4;

/// Bits of the local and the remote prefix, for both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Thresholds([u8; 4]);

impl Thresholds {
    fn read(payload: &[u8]) -> Self {
        let mut thresholds = Self::default();
        for attribute in NlasIterator::new(payload.get(FLAGS_LENGTH..).unwrap_or_default()).flatten() {
            let at = match attribute.kind() {
                XFRMA_SPD_IPV4_HTHRESH => 0..2,
                XFRMA_SPD_IPV6_HTHRESH => 2..4,
                _ => continue,
            };
            let bits = thresholds.0[at].iter_mut().zip(attribute.value());
            bits.for_each(|(bits, told)| *bits = *told);
        }
        thresholds
    }
}

/// What they are in the network namespace of this thread.
pub(crate) fn thresholds() -> io::Result<Thresholds> {
    let mut thresholds = Thresholds::default();
    Requests::open(NETLINK_XFRM)?.ask((XFRM_MSG_GETSPDINFO, 0, &[0; FLAGS_LENGTH]), |_, payload| {
        thresholds = Thresholds::read(payload);
        Ok::<_, RequestError>(())
    })?;
    Ok(thresholds)
}

/// Looks whether they are still those that were known at the last dump.
#[derive(Debug)]
pub(crate) struct ThresholdWatch {
    known: Thresholds,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Waiting(Instant),
    Asking(Job<io::Result<Thresholds>>),
}

impl ThresholdWatch {
    pub(crate) fn new(known: Thresholds) -> Self {
        Self { known, stage: Stage::Waiting(Instant::now() + PERIOD) }
    }

    /// Waits until they are others, or cannot be had. Cancel-safe.
    pub(crate) async fn changed(&mut self, anchor: &Anchor) {
        loop {
            match &mut self.stage {
                Stage::Waiting(until) => {
                    sleep_until(*until).await;
                    self.stage = Stage::Asking(anchor.run("fastswan-asks", thresholds));
                }
                Stage::Asking(asking) => {
                    let asked = asking.await.and_then(identity);
                    self.stage = Stage::Waiting(Instant::now() + PERIOD);
                    if asked.is_ok_and(|now| now == self.known) {
                        continue;
                    }
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read_from_whatever_comes() {
        let mut payload = vec![0; FLAGS_LENGTH];
        for (kind, bits) in
            [(1, [9, 9]), (XFRMA_SPD_IPV6_HTHRESH, [64, 48]), (XFRMA_SPD_IPV4_HTHRESH, [24, 16])]
        {
            payload.extend(6_u16.to_ne_bytes());
            payload.extend(kind.to_ne_bytes());
            payload.extend([bits[0], bits[1], 0, 0]);
        }
        assert_eq!(Thresholds::read(&payload), Thresholds([24, 16, 64, 48]));
        for length in 0..payload.len() {
            Thresholds::read(&payload[..length]);
        }
    }
}
