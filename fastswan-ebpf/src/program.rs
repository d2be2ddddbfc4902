//! The programs: the XDP program, the one that tells the time, the guard's, and those that count losses.
//!
//! One room each: the [maps](maps), VLAN [tags](tags), where a frame [came in](arrival), in how many [buffers](buffers), the checks of each
//! [family](families), the [lookups](lookup), reads that must not meet a [change](sequence), what the kernel is
//! [asked](asking), what is [rewritten](rewriting) and [counted](counters); beside them the [guard] and the [losses].

use aya_ebpf::{
    bindings::{
        TC_ACT_UNSPEC,
        xdp_action::{XDP_PASS, XDP_TX},
    },
    helpers::bpf_jiffies64,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use fastswan_ebpf::{
    ADDRESS_MASK, Check, Control, PassReason, Way,
    wire::{Addresses, ETHERNET_LENGTH, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Frame},
};

use self::{
    arrival::{Arrival, port},
    asking::{ask, is_due},
    buffers::is_whole,
    checks::does,
    counters::{count, passes},
    families::{Packet, packet_v4, packet_v6},
    maps::{CLOCK, CONTROL, DEVICES},
    rewriting::{decrement_ttl, strip, write_ethernet},
    sequence::Sequence,
    tags::vlan_and_network,
};

mod arrival;
mod asking;
mod buffers;
mod checks;
mod counters;
mod families;
mod guard;
mod headers;
mod lookup;
mod losses;
mod maps;
mod rewriting;
mod sequence;
mod tags;

/// Forwards a packet that a policy's device will encrypt, or passes it to the kernel.
#[xdp(frags)]
fn fastswan(context: XdpContext) -> u32 {
    match forward(&context) {
        Ok(action) => action,
        Err(Pass(reason)) => {
            if let Some(packets) = passes().and_then(|passes| passes.packets.get(reason as usize)) {
                packets.add(1);
            }
            XDP_PASS
        }
    }
}

/// Tells the time by the clock that leases are judged by. Run by user space, never attached.
#[classifier]
fn fastswan_clock(_: TcContext) -> i32 {
    if let Some(clock) = CLOCK.get(0) {
        clock.store(ticks());
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn forward(context: &XdpContext) -> Result<u32, Pass> {
    let control = CONTROL.get(0).ok_or(PassReason::Disabled)?;
    if does(Check::Lease) {
        if control.enabled.load() == 0 {
            return Err(PassReason::Disabled.into());
        }
        let left = control.deadline.load().wrapping_sub(ticks());
        if left == 0 || left > control.lease.load() {
            return Err(PassReason::LeaseExpired.into());
        }
    }
    let sequence = Sequence::begin(control)?;
    let decision = match decide(context, control) {
        Ok(decision) => decision,
        Err(reason) => return Err(sequence.reason(reason)),
    };
    sequence.still_holds()?;

    let Decision { port, ether_type, network, packet, padding, addresses } = decision;
    if does(Check::Asking) && is_due(control, packet.forwarded) {
        ask(context, network, ether_type, port.receiver, packet.device)?;
    }
    let action = if packet.device == port.ifindex {
        XDP_TX
    } else if packet.cpu >= packet.cpus {
        return Err(PassReason::NoChannel.into());
    } else {
        DEVICES.redirect(packet.device, u64::from(XDP_PASS)).map_err(|_| PassReason::EgressUnavailable)?
    };
    let tags = network - ETHERNET_LENGTH;
    strip(context, tags, padding)?;

    let frame = Frame::of(context);
    write_ethernet(frame, addresses, ether_type)?;
    decrement_ttl(frame, ether_type)?;
    if does(Check::Counting) {
        count(packet.forwarded, packet.length);
    }
    Ok(action)
}

/// How a packet is to be forwarded.
struct Decision {
    port: Arrival,
    ether_type: u16,
    /// Where the IP header begins.
    network: usize,
    packet: Packet,
    /// Bytes of the frame behind the packet.
    padding: usize,
    /// Those that it is to leave with.
    addresses: Addresses,
}

/// Reads the frame and the tables, which must not change meanwhile: neither way of coming back means anything if they have.
#[inline(always)]
fn decide(context: &XdpContext, control: &Control) -> Result<Decision, Pass> {
    let frame = Frame::of(context);
    if does(Check::Buffers) && !is_whole(context, frame) {
        return Err(PassReason::MultiBuffer.into());
    }
    let ethernet = frame.header::<Ethernet>(0)?;
    // SAFETY: `Frame::header` checked the bounds, here and wherever a header is read below; fields of packed
    // structures are read byte for byte if need be.
    let (addresses, outer_type) = unsafe { ((*ethernet).addresses, u16::from_be((*ethernet).ether_type)) };
    let (vlan, ether_type, network) = vlan_and_network(frame, outer_type)?;
    if ether_type != ETHERTYPE_IPV4 && ether_type != ETHERTYPE_IPV6 {
        return Err(PassReason::NotIp.into());
    }

    let port = port(context.ingress_ifindex() as u32, vlan)?;
    if does(Check::Address) && addresses.first & ADDRESS_MASK != port.address {
        return Err(PassReason::OtherDestinationMac.into());
    }
    let packet = if ether_type == ETHERTYPE_IPV4 {
        packet_v4(frame, network, control, port)?
    } else {
        packet_v6(frame, network, control, port)?
    };
    let padding = frame.end - frame.start - network - packet.length;
    let rest = packet.way.rest.load();
    let addresses = if Way::rewrites(rest) {
        Addresses { first: packet.way.first.load(), rest: rest as u32 }
    } else {
        addresses
    };
    // As late as possible, but while the tables are still those of the lookup: an acknowledgement says that they hold
    // what followed from the removals. The removals last, so that one that begins meanwhile counts.
    if does(Check::Removals) {
        let acknowledged = control.acknowledged.load();
        if acknowledged != control.removals.load() {
            return Err(PassReason::Removal.into());
        }
    }
    Ok(Decision { port, ether_type, network, packet, padding, addresses })
}

/// The number of a [`PassReason`]. Cells and slots carry numbers, which the verifier wants to see checked where they are
/// used.
struct Pass(u32);

impl From<PassReason> for Pass {
    #[inline(always)]
    fn from(reason: PassReason) -> Self {
        Self(reason as u32)
    }
}

/// The kernel's ticks (jiffies). The verifier puts a read of memory in place of the call.
#[inline(always)]
fn ticks() -> u64 {
    // SAFETY: a helper call without arguments.
    unsafe { bpf_jiffies64() }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the program has no panicking path; if it had one, the verifier would refuse this loop.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
