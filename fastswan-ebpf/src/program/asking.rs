//! What the kernel is asked: whether its own routes lead a packet where it is about to go (`bpf_fib_lookup`).
//!
//! All else has said that the packet is fast, and its frame is as it came. A mirror that has drifted from the kernel is
//! found by its own traffic: the packet passes, and user space is woken.

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Params},
    helpers::{bpf_fib_lookup, bpf_ktime_get_coarse_ns},
    programs::XdpContext,
};
use fastswan_ebpf::{
    ASK_NEVER, Control, Forwarded, PassReason,
    wire::{ETHERTYPE_IPV4, Frame, Ipv4, Ipv6},
};

use super::{counters::passes, headers::ports_for_rules, maps::REMOVALS};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Between two signals of one CPU, in nanoseconds.
const BETWEEN_SIGNALS: u64 = 10_000_000;

/// Whether the kernel is to be asked about the next packet of a slot. As long as it does not agree the number stays, so
/// that the slot's packets are asked about one by one.
#[inline(always)]
pub(super) fn is_due(control: &Control, forwarded: &Forwarded) -> bool {
    forwarded.packets.load() & control.ask_mask.load() == 0
}

/// Fails if the kernel would not forward a packet that came in on `receiver` to `device`.
///
/// A neighbour that is not resolved is none of the routes' business: the mirror knows next hops itself.
#[inline(always)]
pub(super) fn ask(
    context: &XdpContext,
    network: usize,
    ether_type: u16,
    receiver: u32,
    device: u32,
) -> Result<(), PassReason> {
    if leads_to(context, network, ether_type, receiver, device) {
        Ok(())
    } else {
        Err(PassReason::FibDiffers)
    }
}

/// A function of its own: so its memory is not on the stack of those packets that are not asked about.
#[inline(never)]
fn leads_to(context: &XdpContext, network: usize, ether_type: u16, receiver: u32, device: u32) -> bool {
    let Some(passes) = passes() else { return true };
    // Never is all ones, which the first packet of a slot meets too.
    if super::maps::CONTROL.get(0).is_none_or(|control| control.ask_mask.load() == ASK_NEVER) {
        return true;
    }
    passes.asked.add(1);
    if answer(context, network, ether_type, receiver) == Some(device) {
        return true;
    }
    // SAFETY: a helper call without arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if now.wrapping_sub(passes.woken.load()) >= BETWEEN_SIGNALS {
        passes.woken.store(now);
        // Without room there is something to be read already.
        let _ = REMOVALS.output::<u64>(0_u64, 0);
    }
    false
}

/// The device that the kernel's rules and routes lead to; `None` if it would not forward, or in pieces.
#[inline(always)]
fn answer(context: &XdpContext, network: usize, ether_type: u16, receiver: u32) -> Option<u32> {
    // SAFETY: numbers and arrays of numbers, for which zero is valid.
    let mut params: Params = unsafe { core::mem::zeroed() };
    params.ifindex = receiver;
    let frame = Frame::of(context);
    if ether_type == ETHERTYPE_IPV4 {
        let ip = frame.header::<Ipv4>(network).ok()?;
        // SAFETY: bounds-checked; fields of packed structures are read byte for byte if need be.
        let header = unsafe { &*ip };
        params.family = AF_INET;
        params.l4_protocol = header.protocol;
        params.__bindgen_anon_1.tot_len = u16::from_be(header.total_length);
        params.__bindgen_anon_2.tos = header.traffic_class;
        params.__bindgen_anon_3.ipv4_src = header.source;
        params.__bindgen_anon_4.ipv4_dst = header.destination;
        set_ports(&mut params, ports_for_rules(frame, network + size_of::<Ipv4>(), header.protocol));
    } else {
        let ip = frame.header::<Ipv6>(network).ok()?;
        // SAFETY: likewise.
        let header = unsafe { &*ip };
        params.family = AF_INET6;
        params.l4_protocol = header.next_header;
        let length = u16::from_be(header.payload_length);
        params.__bindgen_anon_1.tot_len = length.saturating_add(size_of::<Ipv6>() as u16);
        params.__bindgen_anon_2.flowinfo = header.version_class_flow & 0x0fff_ffff_u32.to_be();
        params.__bindgen_anon_3.ipv6_src = words(header.source);
        params.__bindgen_anon_4.ipv6_dst = words(header.destination);
        set_ports(&mut params, ports_for_rules(frame, network + size_of::<Ipv6>(), header.next_header));
    }
    // SAFETY: a helper call on the program's own context, with parameters of the size that is told.
    let code = unsafe { bpf_fib_lookup(context.ctx.cast(), &raw mut params, size_of::<Params>() as i32, 0) };
    // The device is told in both cases, since Linux 5.10.
    let is_routed =
        code == i64::from(BPF_FIB_LKUP_RET_SUCCESS) || code == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH);
    is_routed.then_some(params.ifindex)
}

/// One by one: as one number they would not be aligned, and on the stack they must be.
#[inline(always)]
fn set_ports(params: &mut Params, [source, destination]: [u16; 2]) {
    // SAFETY: the pointers come from a reference.
    unsafe {
        (&raw mut params.sport).write_volatile(source);
        (&raw mut params.dport).write_volatile(destination);
    }
}

/// An address as it lies in memory, in other pieces.
#[inline(always)]
fn words(address: [u64; 2]) -> [u32; 4] {
    // SAFETY: both have 16 bytes, and every bit pattern is valid.
    unsafe { core::mem::transmute(address) }
}
