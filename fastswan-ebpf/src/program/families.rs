//! The headers of each address family, and the checks that depend on the policy.

use core::arch::asm;

use fastswan_ebpf::{
    Check, Control, ExceptionList, Forwarded, List, PassReason, Port, Value, Way, is_special_v4,
    is_special_v6, upper_layer,
    wire::{Frame, Ipv4, Ipv6},
};

use super::{
    Pass,
    arrival::Arrival,
    checks::does,
    counters::{cpu, forwarded},
    headers::{ICMPV6, Ports, checksum_is_good, is_extension_header, is_neighbour_discovery, ports_of},
    lookup::{cell_v4, cell_v6, first_hit_v4, first_hit_v6, is_exception_v4, is_exception_v6},
    maps::{SLOTS, WAYS},
};

/// A packet that is to be forwarded.
pub(super) struct Packet {
    /// This CPU.
    pub(super) cpu: u32,
    /// What it has forwarded for the packet's slot.
    pub(super) forwarded: &'static Forwarded,
    pub(super) way: &'static Way,
    pub(super) device: u32,
    /// CPUs from which the device takes packets: those with lower numbers.
    pub(super) cpus: u32,
    /// From the IP header on.
    pub(super) length: usize,
}

#[inline(always)]
pub(super) fn packet_v4(
    frame: Frame,
    network: usize,
    control: &Control,
    port: Arrival,
) -> Result<Packet, Pass> {
    if port.flags & Port::FORWARDS_V4 == 0 {
        return Err(PassReason::NotForwarding.into());
    }
    let ip = frame.header::<Ipv4>(network)?;
    // SAFETY: bounds-checked.
    let header = unsafe { &*ip };
    if header.version_and_length != 0x45 {
        let options = header.version_and_length >> 4 == 4 && header.version_and_length & 0xf > 5;
        return Err(if options { PassReason::Options } else { PassReason::BadHeader }.into());
    }
    const DONT_FRAGMENT: u16 = 0x4000;
    if u16::from_be(header.fragment) & !DONT_FRAGMENT != 0 {
        return Err(PassReason::Fragment.into());
    }
    let length = length_of(header.total_length);
    if length < size_of::<Ipv4>() || frame.start + network + length > frame.end {
        return Err(PassReason::BadLength.into());
    }
    if does(Check::Checksum) && !checksum_is_good(ip) {
        return Err(PassReason::BadChecksum.into());
    }
    if header.ttl <= 1 {
        return Err(PassReason::TtlExpired.into());
    }
    let source = u32::from_be(header.source);
    let destination = u32::from_be(header.destination);
    if does(Check::Special) && is_special_v4(source) {
        return Err(PassReason::MartianSource.into());
    }
    if does(Check::Special) && is_special_v4(destination) {
        return Err(PassReason::MartianDestination.into());
    }
    let key = [u64::from(destination) << 32 | u64::from(source)];
    let family = Family {
        has_exceptions: does(Check::Exceptions) && control.exceptions_v4.load() != 0,
        is_exception: is_exception_v4,
        first_hit: first_hit_v4,
        reverse_path: port.flags & (Port::REVERSE_PATH_STRICT | Port::REVERSE_PATH_LOOSE),
    };
    family.exceptions(
        frame,
        network + size_of::<Ipv4>(),
        length - size_of::<Ipv4>(),
        header.protocol,
        &key,
    )?;
    family.classify(cell_v4(&key), &key, length, port)
}

#[inline(always)]
pub(super) fn packet_v6(
    frame: Frame,
    network: usize,
    control: &Control,
    port: Arrival,
) -> Result<Packet, Pass> {
    if port.flags & Port::FORWARDS_V6 == 0 {
        return Err(PassReason::NotForwarding.into());
    }
    let ip = frame.header::<Ipv6>(network)?;
    // SAFETY: bounds-checked.
    let header = unsafe { &*ip };
    if u32::from_be(header.version_class_flow) >> 28 != 6 {
        return Err(PassReason::BadHeader.into());
    }
    if header.next_header == 44 {
        return Err(PassReason::Fragment.into());
    }
    if is_extension_header(header.next_header) {
        return Err(PassReason::ExtensionHeader.into());
    }
    let payload = length_of(header.payload_length);
    let length = size_of::<Ipv6>() + payload;
    if payload == 0 || frame.start + network + length > frame.end {
        return Err(PassReason::BadLength.into());
    }
    if header.hop_limit <= 1 {
        return Err(PassReason::TtlExpired.into());
    }
    let source = header.source.map(u64::from_be);
    let destination = header.destination.map(u64::from_be);
    if does(Check::Special) && is_special_v6(source) {
        return Err(PassReason::MartianSource.into());
    }
    if does(Check::Special) && is_special_v6(destination) {
        return Err(PassReason::MartianDestination.into());
    }
    if header.next_header == ICMPV6 {
        let icmp_type = frame.header::<u8>(network + size_of::<Ipv6>())?;
        // SAFETY: bounds-checked.
        if is_neighbour_discovery(unsafe { *icmp_type }) {
            return Err(PassReason::NeighbourDiscovery.into());
        }
    }
    let key = [destination[0], destination[1], source[0], source[1]];
    let family = Family {
        has_exceptions: does(Check::Exceptions) && control.exceptions_v6.load() != 0,
        is_exception: is_exception_v6,
        first_hit: first_hit_v6,
        // The kernel has no reverse path filter for IPv6.
        reverse_path: 0,
    };
    family.exceptions(frame, network + size_of::<Ipv6>(), payload, header.next_header, &key)?;
    family.classify(cell_v6(&key), &key, length, port)
}

/// The tables of one address family.
struct Family<F, E> {
    has_exceptions: bool,
    is_exception: E,
    first_hit: F,
    reverse_path: u64,
}

impl<F, E> Family<F, E> {
    /// Fails if the packet's protocol or ports are on the list of exceptions.
    #[inline(always)]
    fn exceptions<const K: usize>(
        &self,
        frame: Frame,
        transport: usize,
        length: usize,
        protocol: u8,
        key: &[u64; K],
    ) -> Result<(), PassReason>
    where
        E: Fn(ExceptionList, &[u64; K], u64) -> bool,
    {
        if !self.has_exceptions {
            return Ok(());
        }
        let (upper, known) = match ports_of(protocol) {
            Ports::Ports => {
                let ports = frame.header::<[u16; 2]>(transport)?;
                // SAFETY: bounds-checked.
                let ports = unsafe { ports.read_unaligned() };
                (upper_layer(protocol, u16::from_be(ports[0]), u16::from_be(ports[1])), length >= 4)
            }
            Ports::TypeAndCode => {
                let octets = frame.header::<[u8; 2]>(transport)?;
                // SAFETY: bounds-checked.
                let octets = unsafe { *octets };
                (upper_layer(protocol, u16::from(octets[0]), u16::from(octets[1])), length >= 2)
            }
            Ports::Zero => (upper_layer(protocol, 0, 0), true),
            Ports::Unknown => (upper_layer(protocol, 0, 0), false),
        };
        let list = if known { ExceptionList::Ports } else { ExceptionList::Protocols };
        if (self.is_exception)(list, key, upper) { Err(PassReason::Exception) } else { Ok(()) }
    }

    /// Finds the policy, and checks what depends on it.
    #[inline(always)]
    fn classify<const K: usize>(
        &self,
        cell: Option<Value>,
        key: &[u64; K],
        length: usize,
        port: Arrival,
    ) -> Result<Packet, Pass>
    where
        F: Fn(List, &[u64; K]) -> Option<Value>,
    {
        let cell = cell.ok_or(PassReason::NoPolicy)?;
        if cell.kind() != Value::FAST {
            return Err(Pass(cell.payload()));
        }
        let slot = SLOTS.get(cell.payload()).ok_or(PassReason::EgressUnavailable)?;
        let cpu = cpu();
        let forwarded = forwarded(cpu, cell.payload()).ok_or(PassReason::EgressUnavailable)?;
        let way = WAYS.get(slot.way()).ok_or(PassReason::EgressUnavailable)?;
        let exit = way.exit.load();
        let device = Way::device(exit);
        if device == 0 {
            return Err(Way::reason(exit).map_or(PassReason::EgressUnavailable.into(), Pass));
        }
        let probes = |probes: bool| does(Check::Probes) && probes;
        if probes(cell.probes_guards()) && (self.first_hit)(List::Guards, key).is_some() {
            return Err(PassReason::Guarded.into());
        }
        if probes(cell.probes_destination()) {
            let fact = (self.first_hit)(List::Destinations, key).ok_or(PassReason::DeniedDestination)?;
            if fact.kind() != Value::VIA {
                return Err(PassReason::DeniedDestination.into());
            }
            if fact.payload() != device {
                return Err(PassReason::RouteElsewhere.into());
            }
        }
        if probes(cell.probes_source() || self.reverse_path != 0) {
            match (self.first_hit)(List::Sources, key) {
                None if self.reverse_path != 0 => return Err(PassReason::ReversePath.into()),
                None => {}
                Some(fact) if fact.kind() != Value::VIA => return Err(PassReason::DeniedSource.into()),
                Some(fact) => {
                    let strict = self.reverse_path & Port::REVERSE_PATH_STRICT != 0;
                    if strict && fact.payload() != port.receiver {
                        return Err(PassReason::ReversePath.into());
                    }
                }
            }
        }
        if does(Check::Length) && length as u64 > Way::max_length(exit) {
            return Err(PassReason::TooLong.into());
        }
        Ok(Packet { cpu, forwarded, way, device, cpus: Way::cpus(exit), length })
    }
}

/// The length that a header's field holds. The verifier of Linux 6.12 takes a number whose bytes were swapped for any
/// number of 64 bits; so it is masked, where the compiler cannot see that this changes nothing.
#[inline(always)]
fn length_of(field: u16) -> usize {
    let mut length = u64::from(u16::from_be(field));
    // SAFETY: this changes one register.
    unsafe { asm!("{0} &= 0xffff", inout(reg) length, options(pure, nomem, nostack)) };
    length as usize
}
