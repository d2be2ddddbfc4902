//! What passes between the gateways.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use ipnet::{Ipv4Net, Ipv6Net};

use super::gateways::{FORGER, Gateways, NIC_B};
use crate::capture::Capture;

/// Packets in clear that are described.
const EXAMPLES: usize = 5;
const IKE: u16 = 500;

/// Follows the wire.
#[derive(Debug)]
pub struct Wire {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<Seen>>,
}

/// What was on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// ESP packets from A, and from B.
    pub esp: [u64; 2],
    /// Packets of IKE.
    pub ike: u64,
    /// Packets between hosts' networks that were not encrypted, from A and from B.
    pub clear: [u64; 2],
    /// Some of them.
    pub examples: Vec<String>,
}

impl Wire {
    /// Follows it from now on.
    ///
    /// # Errors
    ///
    /// If it cannot be captured.
    pub fn follow(gateways: &Gateways) -> std::io::Result<Self> {
        let mut capture = Capture::at(&gateways.wire, "wire0")?;
        let stop = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut seen = Seen::default();
            loop {
                match capture.next(Duration::from_millis(200)) {
                    Ok(Some(captured)) => seen.note(captured.frame),
                    Ok(None) if ending.load(Ordering::Relaxed) => return Ok(seen),
                    // The port was switched off.
                    Ok(None) | Err(_) => {
                        if ending.load(Ordering::Relaxed) {
                            return Ok(seen);
                        }
                    }
                }
            }
        });
        Ok(Self { stop, thread })
    }

    /// What was on it.
    ///
    /// # Errors
    ///
    /// If capturing failed.
    pub fn seen(self) -> std::io::Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Seen {
    fn note(&mut self, frame: &[u8]) {
        // What leaves A in clear from XDP has whatever Ethernet header it came with.
        let from = match frame.get(6..12) {
            Some(address) if address == FORGER.0 => return,
            Some(address) if address == NIC_B.0 => 1,
            _ => 0,
        };
        let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else { return };
        let (source, destination, protocol) = match &packet.net {
            Some(LaxNetSlice::Ipv4(packet)) => {
                let header = packet.header();
                (header.source_addr().into(), header.destination_addr().into(), header.protocol())
            }
            Some(LaxNetSlice::Ipv6(packet)) => {
                let header = packet.header();
                (header.source_addr().into(), header.destination_addr().into(), header.next_header())
            }
            _ => return,
        };
        if is_inner(source) || is_inner(destination) {
            self.clear[from] += 1;
            if self.examples.len() < EXAMPLES {
                self.examples.push(format!("{source} to {destination} protocol {}", protocol.0));
            }
        } else if protocol == IpNumber::ENCAPSULATING_SECURITY_PAYLOAD {
            self.esp[from] += 1;
        } else if let Some(TransportSlice::Udp(udp)) = &packet.transport {
            self.ike += u64::from(udp.destination_port() == IKE);
        }
    }
}

/// Whether an address is in a network behind a gateway.
fn is_inner(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8).contains(&address),
        IpAddr::V6(address) => [1, 2].into_iter().any(|network| {
            let network = Ipv6Addr::new(0x2001, 0xdb8, network, 0, 0, 0, 0, 0);
            Ipv6Net::new_assert(network, 48).contains(&address)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{frames::Frame, guest::gateways::NIC_A};

    #[test]
    fn what_has_an_inner_address_outside_is_in_clear() {
        let mut seen = Seen::default();
        let from_a = |frame: Frame| frame.macs(NIC_A, NIC_B).build();
        seen.note(&from_a(Frame::v4("10.1.0.5", "10.2.0.9").udp(1, 2)));
        seen.note(&from_a(Frame::v6("2001:db8:1::5", "2001:db8:2::9").udp(1, 2)));
        seen.note(&from_a(Frame::v4("192.0.2.1", "192.0.2.2").udp(500, 500)));
        seen.note(&from_a(Frame::v4("192.0.2.1", "192.0.2.2").protocol(50)));
        seen.note(&from_a(Frame::v6("2001:db8:f::1", "2001:db8:f::2").protocol(50)));
        assert_eq!((seen.clear, seen.ike, seen.esp), ([2, 0], 1, [2, 0]));
    }
}
