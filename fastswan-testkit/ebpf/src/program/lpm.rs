//! The classical way to find a packet's policy: a longest-prefix match of the destination gives the number of a
//! prefix, and one of that number and the source gives the policy. It checks nothing that this does not need.

use aya_ebpf::{
    macros::map,
    maps::{LpmTrie, PerCpuArray, lpm_trie::Key},
};

use fastswan_ebpf::wire::{Ethernet, Frame, Ipv4, Ipv6};

use super::{headers, traffic::Counter};

// User space sets the lengths when it loads the maps.
#[map]
static DESTINATIONS_V4: LpmTrie<u32, u32> = LpmTrie::with_max_entries(1, 0);
#[map]
static DESTINATIONS_V6: LpmTrie<[u64; 2], u32> = LpmTrie::with_max_entries(1, 0);
#[map]
static POLICIES_V4: LpmTrie<[u32; 2], u32> = LpmTrie::with_max_entries(1, 0);
#[map]
static POLICIES_V6: LpmTrie<SourceV6, u32> = LpmTrie::with_max_entries(1, 0);
#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(1, 0);

/// What the second match of IPv6 is about.
#[repr(C, packed)]
struct SourceV6 {
    destination: u32,
    source: [u64; 2],
}

/// The key of the first match of IPv6. What is on the stack must be aligned to its own size, and the words of the address
/// are not if the length before them is.
#[repr(C, align(8))]
struct DestinationV6 {
    padding: u32,
    length: u32,
    address: [u64; 2],
}

impl DestinationV6 {
    #[inline(always)]
    fn key(&self) -> &Key<[u64; 2]> {
        // SAFETY: from the length on it is such a key, which is packed and may lie at any address.
        unsafe { &*(&raw const self.length).cast() }
    }
}

#[inline(always)]
pub(super) fn forward_v4(frame: Frame) -> Option<()> {
    let ip = frame.header::<Ipv4>(size_of::<Ethernet>()).ok()?;
    // SAFETY: `Frame::header` checked the bounds.
    let (source, destination, length) =
        unsafe { ((*ip).source, (*ip).destination, u16::from_be((*ip).total_length)) };
    let destination = DESTINATIONS_V4.get(Key::new(32, destination))?;
    let policy = POLICIES_V4.get(Key::new(64, [*destination, source]))?;
    headers::forward_v4(ip)?;
    count(*policy, u64::from(length))?;
    headers::address(frame)
}

#[inline(always)]
pub(super) fn forward_v6(frame: Frame) -> Option<()> {
    let ip = frame.header::<Ipv6>(size_of::<Ethernet>()).ok()?;
    // SAFETY: bounds-checked.
    let (source, address, length) = unsafe {
        (
            headers::address_v6(&raw const (*ip).source),
            headers::address_v6(&raw const (*ip).destination),
            u16::from_be((*ip).payload_length),
        )
    };
    let destination = DestinationV6 { padding: 0, length: 128, address };
    let destination = DESTINATIONS_V6.get(destination.key())?;
    let policy = POLICIES_V6.get(Key::new(160, SourceV6 { destination: *destination, source }))?;
    headers::forward_v6(ip)?;
    count(*policy, size_of::<Ipv6>() as u64 + u64::from(length))?;
    headers::address(frame)
}

#[inline(always)]
fn count(policy: u32, bytes: u64) -> Option<()> {
    let counter = COUNTERS.get_ptr_mut(policy)?;
    // SAFETY: the pointer is that of an array's element, which no other CPU has.
    unsafe { Counter::count(counter, bytes) };
    Some(())
}
