//! The programs. All of them take frames in several buffers, since one that does calls only others that do.

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX},
    macros::xdp,
    programs::XdpContext,
};

use fastswan_ebpf::wire::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Frame, Ipv4, Ipv6};

mod driver;
mod egress;
mod headers;
mod judge;
mod lpm;
mod traffic;

/// Runs the program under test on the next IPv4 flow.
#[xdp(frags)]
fn driver_v4(context: XdpContext) -> u32 {
    driver::drive_v4(&context);
    // Not reached if there is a program under test.
    XDP_ABORTED
}

/// The same for IPv6.
#[xdp(frags)]
fn driver_v6(context: XdpContext) -> u32 {
    driver::drive_v6(&context);
    XDP_ABORTED
}

/// Judges the verdict on the packet before, and runs the program under test on the next IPv4 packet.
#[xdp(frags)]
fn judge_v4(context: XdpContext) -> u32 {
    judge::drive_v4(&context);
    // Reached behind the last packet.
    XDP_ABORTED
}

/// Sends the next IPv4 flow's frame from the device, if the frame is a live one.
#[xdp(frags)]
fn generator_v4(context: XdpContext) -> u32 {
    match driver::generate_v4(&context) {
        Some(()) => XDP_TX,
        None => XDP_ABORTED,
    }
}

/// Counts IPv4 frames and drops them.
#[xdp(frags)]
fn sink(context: XdpContext) -> u32 {
    let frame = Frame::of(&context);
    match ether_type(frame) {
        Some(ETHERTYPE_IPV4) => match egress::count_arrived(frame) {
            Some(()) => XDP_DROP,
            None => XDP_ABORTED,
        },
        _ => XDP_PASS,
    }
}

/// Sends the frame back as it is.
#[xdp(frags)]
fn empty(_: XdpContext) -> u32 {
    XDP_TX
}

/// Does to the frame what every program that forwards must do.
#[xdp(frags)]
fn floor(context: XdpContext) -> u32 {
    let frame = Frame::of(&context);
    let forwarded = match ether_type(frame) {
        Some(ETHERTYPE_IPV4) => {
            frame.header::<Ipv4>(size_of::<Ethernet>()).ok().and_then(headers::forward_v4)
        }
        Some(ETHERTYPE_IPV6) => {
            frame.header::<Ipv6>(size_of::<Ethernet>()).ok().and_then(headers::forward_v6)
        }
        _ => None,
    };
    match forwarded.and_then(|()| headers::address(frame)) {
        Some(()) => egress::transmit(),
        None => XDP_PASS,
    }
}

/// Finds the packet's policy, counts it there, and forwards it.
#[xdp(frags)]
fn lpm(context: XdpContext) -> u32 {
    let frame = Frame::of(&context);
    let forwarded = match ether_type(frame) {
        Some(ETHERTYPE_IPV4) => lpm::forward_v4(frame),
        Some(ETHERTYPE_IPV6) => lpm::forward_v6(frame),
        _ => None,
    };
    match forwarded {
        Some(()) => egress::transmit(),
        None => XDP_PASS,
    }
}

#[inline(always)]
fn ether_type(frame: Frame) -> Option<u16> {
    let ethernet = frame.header::<Ethernet>(0).ok()?;
    // SAFETY: `Frame::header` checked the bounds.
    Some(u16::from_be(unsafe { (*ethernet).ether_type }))
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the programs have no panicking path; if one had, the verifier would refuse this loop.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
