//! Makes the frame one of the next flow, and runs the program under test on it; or has it leave the device, so that it comes in
//! where the program under test is attached.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, PerCpuArray, ProgramArray},
    programs::XdpContext,
};
use fastswan_ebpf::wire::{Addresses, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Frame, Ipv4, Ipv6};
use fastswan_testkit_ebpf::{INTERVAL, LIVE_INTERVAL, MOST_PACKETS, PORT, SENDER, TTL};

use super::headers::{self, packet_length};

const UDP: u8 = 17;
const DONT_FRAGMENT: u16 = 0x4000;

/// How far a run has come.
#[repr(C)]
struct Progress {
    /// Packets so far.
    packets: u64,
    /// Flows, a power of two, minus 1.
    mask: u64,
}

// User space sets the number of flows when it loads the maps.
#[map]
static PROGRESS: Array<Progress> = Array::with_max_entries(1, 0);
#[map]
static FLOWS_V4: Array<[u32; 2]> = Array::with_max_entries(1, 0);
#[map]
static FLOWS_V6: Array<[[u64; 2]; 2]> = Array::with_max_entries(1, 0);
#[map]
pub(super) static TIMES: Array<u64> = Array::with_max_entries(MOST_PACKETS / INTERVAL, 0);
#[map]
static UNDER_TEST: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static PROGRESS_OF_CPU: PerCpuArray<Progress> = PerCpuArray::with_max_entries(1, 0);
#[map]
static TIMES_OF_CPU: PerCpuArray<u64> = PerCpuArray::with_max_entries(MOST_PACKETS / LIVE_INTERVAL, 0);

/// Returns only if something is missing.
#[inline(always)]
pub(super) fn drive_v4(context: &XdpContext) -> Option<()> {
    write_v4(Frame::of(context), *FLOWS_V4.get(next_flow()?)?)?;
    run(context);
    None
}

/// Makes the frame one of the flow whose turn it is on this CPU.
#[inline(always)]
pub(super) fn generate_v4(context: &XdpContext) -> Option<()> {
    let progress = PROGRESS_OF_CPU.get_ptr_mut(0)?;
    // SAFETY: the pointer is that of an array's element, which no other CPU has, and user space writes it between runs.
    let flow = unsafe {
        advance(progress, LIVE_INTERVAL, |interval| {
            TIMES_OF_CPU.get_ptr_mut(interval % (MOST_PACKETS / LIVE_INTERVAL))
        })?
    };
    write_v4(Frame::of(context), *FLOWS_V4.get(flow)?)
}

/// Writes the headers of a packet from one address to another, which are in network order.
#[inline(always)]
pub(super) fn write_v4(frame: Frame, [source, destination]: [u32; 2]) -> Option<()> {
    write_ethernet(frame, ETHERTYPE_IPV4)?;
    let ip = frame.header::<Ipv4>(size_of::<Ethernet>()).ok()?;
    let length = packet_length(frame) as u16;
    // The one's complement sum (RFC 1071) of the words that are written.
    let mut sum = 0x4500 + u32::from(length) + u32::from(DONT_FRAGMENT);
    sum += u32::from(u16::from_be_bytes([TTL, UDP]));
    for address in [u32::from_be(source), u32::from_be(destination)] {
        sum += (address >> 16) + (address & 0xffff);
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    // In words: what is written byte by byte just before it is read costs a processor time that no packet of a NIC's does.
    let word = |first: u16, second: u16| (u32::from(first) << 16 | u32::from(second)).to_be();
    let words = ip.cast::<u32>();
    let header = [
        word(0x4500, length),
        word(0, DONT_FRAGMENT),
        word(u16::from_be_bytes([TTL, UDP]), !sum as u16),
        source,
        destination,
    ];
    let mut index = 0;
    while index < header.len() {
        // SAFETY: `Frame::header` checked the bounds of the header, which has so many words.
        unsafe { words.add(index).write_unaligned(header[index]) };
        index += 1;
    }
    Some(())
}

/// Likewise.
#[inline(always)]
pub(super) fn drive_v6(context: &XdpContext) -> Option<()> {
    let [source, destination] = *FLOWS_V6.get(next_flow()?)?;
    let frame = Frame::of(context);
    write_ethernet(frame, ETHERTYPE_IPV6)?;
    let ip = frame.header::<Ipv6>(size_of::<Ethernet>()).ok()?;
    let length = packet_length(frame) - size_of::<Ipv6>();
    // SAFETY: bounds-checked.
    unsafe {
        (*ip).version_class_flow = (6_u32 << 28).to_be();
        (*ip).payload_length = (length as u16).to_be();
        (*ip).next_header = UDP;
        (*ip).hop_limit = TTL;
        headers::write_address_v6(&raw mut (*ip).source, source);
        headers::write_address_v6(&raw mut (*ip).destination, destination);
    }
    run(context);
    None
}

/// The flow whose turn it is.
#[inline(always)]
fn next_flow() -> Option<u32> {
    let progress = PROGRESS.get_ptr_mut(0)?;
    // SAFETY: the pointer is that of an array's element. Only one CPU runs the driver at a time, and user space writes
    // this between runs.
    unsafe { advance(progress, INTERVAL, |interval| TIMES.get_ptr_mut(interval)) }
}

/// Counts a packet and returns its flow. Reads the clock every `interval` packets, and keeps the time where `times` says for
/// the number of the interval.
///
/// # Safety
///
/// Both pointers are those of arrays' elements that nothing else uses meanwhile.
#[inline(always)]
unsafe fn advance(
    progress: *mut Progress,
    interval: u32,
    times: impl FnOnce(u32) -> Option<*mut u64>,
) -> Option<u32> {
    // SAFETY: the caller says so.
    let (packet, mask) = unsafe { ((*progress).packets, (*progress).mask) };
    // SAFETY: likewise.
    unsafe { (*progress).packets = packet + 1 };
    if packet % u64::from(interval) == 0 {
        let time = times((packet / u64::from(interval)) as u32)?;
        // SAFETY: a helper call without arguments, and the caller answers for the pointer.
        unsafe { *time = bpf_ktime_get_ns() };
    }
    Some((packet & mask) as u32)
}

#[inline(always)]
fn write_ethernet(frame: Frame, ether_type: u16) -> Option<()> {
    let ethernet = frame.header::<Ethernet>(0).ok()?;
    headers::write_addresses(ethernet, const { Addresses::new(PORT, SENDER) });
    // SAFETY: bounds-checked.
    unsafe {
        (*ethernet).ether_type = ether_type.to_be();
    }
    Some(())
}

/// Calls the program under test, and returns only if there is none.
#[inline(always)]
pub(super) fn run(context: &XdpContext) {
    // SAFETY: the map is one of programs, and the context is the program's own.
    unsafe { UNDER_TEST.tail_call(context, 0) };
}
