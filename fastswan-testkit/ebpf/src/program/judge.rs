//! Runs the program under test on one packet after the other, and judges its verdict on each by what it made of the frame.
//!
//! A program that is called does not return to its caller, but the kernel runs the judge again on the frame as it was left: so
//! each packet is judged when the next one's turn has come, and the last one by a run more.

use core::sync::atomic::AtomicU64;

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::map, maps::Array, programs::XdpContext};
use fastswan_ebpf::wire::{Ethernet, Frame, Ipv4};
use fastswan_testkit_ebpf::{
    INTERVAL,
    verdict::{Judgement, Seen, Versions, judge},
};

use super::driver::{TIMES, run, write_v4};

/// `BPF_F_MMAPABLE`
const MMAPABLE: u32 = 1 << 10;

/// A run, and the packet that is not judged yet.
#[repr(C)]
struct Run {
    /// Packets so far.
    sent: u64,
    /// All of them.
    packets: u64,
    /// The flow of the first.
    first_flow: u64,
    /// Flows, a power of two, minus 1.
    mask: u64,
    /// The flow of the last packet.
    flow: u64,
    /// What was done of its group's versions before.
    done: u64,
}

/// A verdict that is not right.
#[repr(C)]
struct Evidence {
    flow: u64,
    first: u64,
    rest: u64,
    ttl: u64,
    done: u64,
    begun: u64,
}

// User space sets lengths of 1 to what it needs when it loads the maps.
#[map]
static JUDGE_RUN: Array<Run> = Array::with_max_entries(1, 0);
#[map]
static JUDGE_FLOWS: Array<[u32; 4]> = Array::with_max_entries(1, 0);
#[map]
static JUDGE_VERSIONS: Array<Versions> = Array::with_max_entries(1, MMAPABLE);
#[map]
static JUDGED: Array<u64> = Array::with_max_entries(Judgement::COUNT, 0);
#[map]
static JUDGE_EVIDENCE: Array<Evidence> = Array::with_max_entries(1, 0);

/// Judges the packet before, and has the next one looked up. Returns if there is none, or if something is missing.
#[inline(always)]
pub(super) fn drive_v4(context: &XdpContext) -> Option<()> {
    let state = JUDGE_RUN.get_ptr_mut(0)?;
    let frame = Frame::of(context);
    // SAFETY: the pointer is that of an array's element. One CPU runs the judge at a time, and user space writes this
    // between runs.
    let (sent, packets) = unsafe { ((*state).sent, (*state).packets) };
    if sent > 0 {
        // SAFETY: likewise.
        let (flow, done) = unsafe { ((*state).flow, (*state).done) };
        judge_frame(frame, flow, done)?;
    }
    if sent == packets {
        return None;
    }
    // SAFETY: likewise.
    let flow = unsafe { (*state).first_flow + (sent & (*state).mask) };
    let [source, destination, group, _] = *JUDGE_FLOWS.get(flow as u32)?;
    if sent % u64::from(INTERVAL) == 0 {
        let time = TIMES.get_ptr_mut((sent / u64::from(INTERVAL)) as u32)?;
        // SAFETY: a helper call without arguments, and a pointer to an array's element, likewise.
        unsafe { *time = bpf_ktime_get_ns() };
    }
    let done = read(&JUDGE_VERSIONS.get(group)?.done);
    // SAFETY: likewise.
    unsafe {
        (*state).sent = sent + 1;
        (*state).flow = flow;
        (*state).done = done;
    }
    write_v4(frame, [source, destination])?;
    run(context);
    None
}

#[inline(always)]
fn judge_frame(frame: Frame, flow: u64, done: u64) -> Option<()> {
    let [.., group, _] = *JUDGE_FLOWS.get(flow as u32)?;
    // Before anything else changes: the program has read its tables before.
    let begun = read(&JUDGE_VERSIONS.get(group)?.begun);
    let ethernet = frame.header::<Ethernet>(0).ok()?;
    let ip = frame.header::<Ipv4>(size_of::<Ethernet>()).ok()?;
    // SAFETY: `Frame::header` checked the bounds; fields of packed structures are read byte for byte if need be.
    let seen = unsafe {
        Seen { first: (*ethernet).addresses.first, rest: (*ethernet).addresses.rest, ttl: (*ip).ttl }
    };
    let judgement = judge(seen, group as u16, done, begun);
    let count = JUDGED.get_ptr_mut(judgement as u32)?;
    // SAFETY: a pointer to an array's element that only the judge writes, on one CPU at a time, and user space between runs.
    unsafe { *count += 1 };
    if judgement == Judgement::Wrong {
        let evidence = JUDGE_EVIDENCE.get_ptr_mut(0)?;
        let Seen { first, rest, ttl } = seen;
        // SAFETY: likewise.
        unsafe {
            *evidence = Evidence { flow, first, rest: rest.into(), ttl: ttl.into(), done, begun };
        }
    }
    Some(())
}

/// Reads a number that user space writes meanwhile. On processors that reorder reads, the barriers of the program under test
/// lie between what is read before it and after it.
#[inline(always)]
fn read(number: &AtomicU64) -> u64 {
    // SAFETY: the pointer comes from a reference.
    unsafe { number.as_ptr().read_volatile() }
}
