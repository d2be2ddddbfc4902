//! The programs and their maps.

use core::arch::asm;

use aya_ebpf::{
    bindings::xdp_action::{XDP_PASS, XDP_TX},
    helpers::{
        bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
        bpf_xdp_get_buff_len,
    },
    macros::{fentry, map, xdp},
    maps::{Array, DevMapHash},
    programs::{FEntryContext, XdpContext},
};
use fastswan_ebpf::{
    Bucket, Buckets, Control, EXCEPTION_LISTS, EXCEPTION_WORDS_V4, EXCEPTION_WORDS_V6, ExceptionList,
    Forwarding, KEY_WORDS_V4, KEY_WORDS_V6, LISTS, List, PORT_PROBES, PORT_SLOTS, PassReason, Passes, Port,
    SpaceControl, Traffic, TupleList, UPPER_LAYER_BITS, Value, Word, first_hit, is_special_v4, is_special_v6,
    packed_mac, port_key, port_slot, unpacked_mac, upper_layer,
};

use self::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, Ethernet, Frame, Ipv4, Ipv6, Ports, Vlan,
    checksum_after_ttl_decrement, checksum_is_good, is_extension_header, ports_of,
};

mod wire;

/// `BPF_F_MMAPABLE`
const MMAPABLE: u32 = 1 << 10;
const ETHERNET_LENGTH: usize = size_of::<Ethernet>();

// User space sets lengths of 1 to what it needs when it loads the maps.
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, MMAPABLE);
#[map]
static CELLS_V4: Array<Bucket<KEY_WORDS_V4>> = Array::with_max_entries(1, MMAPABLE);
#[map]
static CELLS_V6: Array<Bucket<KEY_WORDS_V6>> = Array::with_max_entries(1, MMAPABLE);
#[map]
static TUPLES_V4: Array<TupleList<KEY_WORDS_V4>> = Array::with_max_entries(LISTS as u32, MMAPABLE);
#[map]
static TUPLES_V6: Array<TupleList<KEY_WORDS_V6>> = Array::with_max_entries(LISTS as u32, MMAPABLE);
#[map]
static EXCEPTIONS_V4: Array<Bucket<EXCEPTION_WORDS_V4>> = Array::with_max_entries(1, MMAPABLE);
#[map]
static EXCEPTIONS_V6: Array<Bucket<EXCEPTION_WORDS_V6>> = Array::with_max_entries(1, MMAPABLE);
#[map]
static UPPER_TUPLES_V4: Array<TupleList<EXCEPTION_WORDS_V4>> =
    Array::with_max_entries(EXCEPTION_LISTS as u32, MMAPABLE);
#[map]
static UPPER_TUPLES_V6: Array<TupleList<EXCEPTION_WORDS_V6>> =
    Array::with_max_entries(EXCEPTION_LISTS as u32, MMAPABLE);
#[map]
static FORWARDINGS: Array<Forwarding> = Array::with_max_entries(1, MMAPABLE);
#[map]
static PORTS: Array<Port> = Array::with_max_entries(PORT_SLOTS as u32, MMAPABLE);
#[map]
static TRAFFIC: Array<Traffic> = Array::with_max_entries(1, MMAPABLE);
#[map]
static PASSES: Array<Passes> = Array::with_max_entries(1, MMAPABLE);
#[map]
static DEVICES: DevMapHash = DevMapHash::with_max_entries(256, 0);
#[map]
static CLOCK: Array<Word> = Array::with_max_entries(1, MMAPABLE);

/// Slots that the table has, which is the stride of `TRAFFIC`. Set when the program is loaded.
#[unsafe(no_mangle)]
static SLOTS: u32 = 0;
/// Not 0 where the processor may reorder reads. Set when the program is loaded.
#[unsafe(no_mangle)]
static WEAKLY_ORDERED: u32 = 0;

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
#[xdp]
fn fastswan_clock(_: XdpContext) -> u32 {
    if let Some(clock) = CLOCK.get(0) {
        clock.store(now());
    }
    XDP_PASS
}

/// The guard, once for each function that it is attached to: it counts removals before the kernel does anything about them.
/// Loaded only if asked for.
#[fentry]
fn fastswan_guard_policy(_: FEntryContext) -> i32 {
    removal_begins()
}

#[fentry]
fn fastswan_guard_sa(_: FEntryContext) -> i32 {
    removal_begins()
}

#[fentry]
fn fastswan_guard_device(_: FEntryContext) -> i32 {
    removal_begins()
}

/// Moves policies and associations elsewhere: it changes the policies before it removes the old associations.
#[fentry]
fn fastswan_guard_migration(_: FEntryContext) -> i32 {
    removal_begins()
}

#[inline(always)]
fn removal_begins() -> i32 {
    if let Some(control) = CONTROL.get(0) {
        increment(&control.removals);
    }
    0
}

#[inline(always)]
fn forward(context: &XdpContext) -> Result<u32, Pass> {
    let control = CONTROL.get(0).ok_or(PassReason::Disabled)?;
    if control.enabled.load() == 0 {
        return Err(PassReason::Disabled.into());
    }
    let left = control.deadline.load().wrapping_sub(now());
    if left == 0 || left > control.lease.load() {
        return Err(PassReason::LeaseExpired.into());
    }
    let sequence = Sequence::begin(control)?;

    let frame = Frame::of(context);
    // SAFETY: a helper call on the program's own context.
    if unsafe { bpf_xdp_get_buff_len(context.ctx) } != (frame.end - frame.start) as u64 {
        return Err(PassReason::MultiBuffer.into());
    }
    let ethernet = frame.header::<Ethernet>(0)?;
    // SAFETY: `Frame::header` checked the bounds, here and wherever a header is read below; fields of packed
    // structures are read byte for byte if need be.
    let (destination, source, outer_type) =
        unsafe { ((*ethernet).destination, (*ethernet).source, u16::from_be((*ethernet).ether_type)) };
    let (vlan, ether_type, network) = vlan_and_network(frame, outer_type)?;
    if ether_type != ETHERTYPE_IPV4 && ether_type != ETHERTYPE_IPV6 {
        return Err(PassReason::NotIp.into());
    }

    let port = port(context.ingress_ifindex() as u32, vlan)?;
    if packed_mac(destination) != port.address {
        return Err(PassReason::OtherDestinationMac.into());
    }
    let packet = if ether_type == ETHERTYPE_IPV4 {
        packet_v4(frame, network, control, port)?
    } else {
        packet_v6(frame, network, control, port)?
    };
    let forwarding = FORWARDINGS.get(packet.slot).ok_or(PassReason::EgressUnavailable)?;
    let rewrite = (forwarding.destination.load(), forwarding.source.load());
    // As late as possible, but while the tables are still those of the lookup: an acknowledgement says that they hold
    // what followed from the removals. The removals last, so that one that begins meanwhile counts.
    let acknowledged = control.acknowledged.load();
    if acknowledged != control.removals.load() {
        return Err(PassReason::Removal.into());
    }
    sequence.still_holds()?;

    let action = if packet.device == port.ifindex {
        XDP_TX
    } else {
        DEVICES.redirect(packet.device, u64::from(XDP_PASS)).map_err(|_| PassReason::EgressUnavailable)?
    };
    let addresses = if rewrite == (0, 0) { (packed_mac(destination), packed_mac(source)) } else { rewrite };
    let tags = network - ETHERNET_LENGTH;
    let padding = frame.end - frame.start - network - packet.length;
    strip(context, tags, padding)?;

    let frame = Frame::of(context);
    write_ethernet(frame, addresses, ether_type)?;
    decrement_ttl(frame, ether_type)?;
    count(packet.slot, packet.length);
    Ok(action)
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

/// A packet that is to be forwarded.
struct Packet {
    slot: u32,
    device: u32,
    /// From the IP header on.
    length: usize,
}

/// The port that a frame came in on, as one read of the table found it.
#[derive(Clone, Copy)]
struct Arrival {
    ifindex: u32,
    address: u64,
    flags: u64,
    receiver: u32,
}

/// The VLAN id (0 if there is none), the type of what follows the tags, and where it begins.
#[inline(always)]
fn vlan_and_network(frame: Frame, outer_type: u16) -> Result<(u16, u16, usize), PassReason> {
    if outer_type != ETHERTYPE_VLAN && outer_type != ETHERTYPE_QINQ {
        return Ok((0, outer_type, ETHERNET_LENGTH));
    }
    let outer = frame.header::<Vlan>(ETHERNET_LENGTH)?;
    // SAFETY: bounds-checked.
    let (outer_id, inner_type) =
        unsafe { (u16::from_be((*outer).control) & 0xfff, u16::from_be((*outer).ether_type)) };
    let after_outer = ETHERNET_LENGTH + size_of::<Vlan>();
    if inner_type != ETHERTYPE_VLAN && inner_type != ETHERTYPE_QINQ {
        if outer_type == ETHERTYPE_QINQ {
            // A service tag alone is another VLAN than a customer tag with the same id.
            return Err(PassReason::UnknownPort);
        }
        return Ok((outer_id, inner_type, after_outer));
    }
    let inner = frame.header::<Vlan>(after_outer)?;
    // SAFETY: bounds-checked.
    let (inner_id, ether_type) =
        unsafe { (u16::from_be((*inner).control) & 0xfff, u16::from_be((*inner).ether_type)) };
    // Two tags are known only if one of them is a priority tag: no port is named by a pair of VLANs.
    if outer_type != ETHERTYPE_VLAN || inner_type != ETHERTYPE_VLAN || outer_id != 0 {
        return Err(PassReason::UnknownPort);
    }
    Ok((inner_id, ether_type, after_outer + size_of::<Vlan>()))
}

#[inline(always)]
fn port(ifindex: u32, vlan: u16) -> Result<Arrival, PassReason> {
    let key = port_key(ifindex, vlan);
    let first = port_slot(key);
    let mut probe = 0;
    while probe < PORT_PROBES as u64 {
        let slot = (first + probe) % PORT_SLOTS as u64;
        let port = PORTS.get(slot as u32).ok_or(PassReason::UnknownPort)?;
        if port.key.load() == key {
            let flags_and_receiver = port.flags_and_receiver.load();
            return Ok(Arrival {
                ifindex,
                address: port.address.load(),
                flags: flags_and_receiver & 0xffff_ffff,
                receiver: (flags_and_receiver >> 32) as u32,
            });
        }
        probe += 1;
    }
    Err(PassReason::UnknownPort)
}

#[inline(always)]
fn packet_v4(frame: Frame, network: usize, control: &Control, port: Arrival) -> Result<Packet, Pass> {
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
    if !checksum_is_good(ip) {
        return Err(PassReason::BadChecksum.into());
    }
    if header.ttl <= 1 {
        return Err(PassReason::TtlExpired.into());
    }
    let source = u32::from_be(header.source);
    let destination = u32::from_be(header.destination);
    if is_special_v4(source) {
        return Err(PassReason::MartianSource.into());
    }
    if is_special_v4(destination) {
        return Err(PassReason::MartianDestination.into());
    }
    let key = [u64::from(destination) << 32 | u64::from(source)];
    let family = Family {
        has_exceptions: has_exceptions(&control.exceptions_v4),
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
    family.classify(&key, length, port)
}

#[inline(always)]
fn packet_v6(frame: Frame, network: usize, control: &Control, port: Arrival) -> Result<Packet, Pass> {
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
    if is_special_v6(source) {
        return Err(PassReason::MartianSource.into());
    }
    if is_special_v6(destination) {
        return Err(PassReason::MartianDestination.into());
    }
    let key = [destination[0], destination[1], source[0], source[1]];
    let family = Family {
        has_exceptions: has_exceptions(&control.exceptions_v6),
        is_exception: is_exception_v6,
        first_hit: first_hit_v6,
        // The kernel has no reverse path filter for IPv6.
        reverse_path: 0,
    };
    family.exceptions(frame, network + size_of::<Ipv6>(), payload, header.next_header, &key)?;
    family.classify(&key, length, port)
}

/// The tables of one address family.
struct Family<F, E> {
    has_exceptions: bool,
    is_exception: E,
    first_hit: F,
    reverse_path: u64,
}

struct Entries<'a, const K: usize>(&'a Array<Bucket<K>>);

impl<const K: usize> Buckets<K> for Entries<'_, K> {
    #[inline(always)]
    fn bucket(&self, index: u64) -> Option<&Bucket<K>> {
        self.0.get(index as u32)
    }
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
    fn classify<const K: usize>(&self, key: &[u64; K], length: usize, port: Arrival) -> Result<Packet, Pass>
    where
        F: Fn(List, &[u64; K]) -> Option<Value>,
    {
        let cell = (self.first_hit)(List::Cells, key).ok_or(PassReason::NoPolicy)?;
        if cell.kind() != Value::FAST {
            return Err(Pass(cell.payload()));
        }
        let slot = cell.payload();
        let forwarding = FORWARDINGS.get(slot).ok_or(PassReason::EgressUnavailable)?;
        let device_and_length = forwarding.device_and_length.load();
        let device = device_and_length as u32;
        if device == 0 {
            let reason = (device_and_length >> 32) as u32;
            return Err(if reason == 0 { PassReason::EgressUnavailable.into() } else { Pass(reason - 1) });
        }
        if cell.probes_guards() && (self.first_hit)(List::Guards, key).is_some() {
            return Err(PassReason::Guarded.into());
        }
        if cell.probes_destination() {
            let fact = (self.first_hit)(List::Destinations, key).ok_or(PassReason::DeniedDestination)?;
            if fact.kind() != Value::VIA {
                return Err(PassReason::DeniedDestination.into());
            }
            if fact.payload() != device {
                return Err(PassReason::RouteElsewhere.into());
            }
        }
        if cell.probes_source() || self.reverse_path != 0 {
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
        if length as u64 > device_and_length >> 32 & 0xffff {
            return Err(PassReason::TooLong.into());
        }
        Ok(Packet { slot, device, length })
    }
}

fn first_hit_v4(list: List, key: &[u64; KEY_WORDS_V4]) -> Option<Value> {
    found(lookup_v4(list as u64, key[0]))
}

fn first_hit_v6(list: List, key: &[u64; KEY_WORDS_V6]) -> Option<Value> {
    found(lookup_v6(list as u64, key[0], key[1], key[2], key[3]))
}

fn is_exception_v4(list: ExceptionList, key: &[u64; KEY_WORDS_V4], upper: u64) -> bool {
    lookup_exception_v4(list as u64, key[0], upper) != 0
}

fn is_exception_v6(list: ExceptionList, key: &[u64; KEY_WORDS_V6], upper: u64) -> bool {
    // A function takes five numbers at most.
    let list_and_upper = (list as u64) << UPPER_LAYER_BITS | upper;
    lookup_exception_v6(list_and_upper, key[0], key[1], key[2], key[3]) != 0
}

#[inline(always)]
fn has_exceptions(control: &SpaceControl<EXCEPTION_LISTS>) -> bool {
    control.tuples[ExceptionList::Ports as usize].load() != 0
}

/// No entry is 0.
#[inline(always)]
fn found(stored: u64) -> Option<Value> {
    (stored != 0).then_some(Value(stored))
}

/// A lookup is a function of its own to the verifier, which then follows its paths once and not once for each
/// way to get there. Only numbers may be passed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_v4(list: u64, key: u64) -> u64 {
    let Some(control) = CONTROL.get(0) else { return UNREADABLE };
    lookup(&control.v4, &TUPLES_V4, &CELLS_V4, list, &[key])
}

/// The same for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_v6(list: u64, destination0: u64, destination1: u64, source0: u64, source1: u64) -> u64 {
    let Some(control) = CONTROL.get(0) else { return UNREADABLE };
    let key = [destination0, destination1, source0, source1];
    lookup(&control.v6, &TUPLES_V6, &CELLS_V6, list, &key)
}

/// Likewise for exceptions.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_exception_v4(list: u64, key: u64, upper: u64) -> u64 {
    let Some(control) = CONTROL.get(0) else { return UNREADABLE };
    lookup(&control.exceptions_v4, &UPPER_TUPLES_V4, &EXCEPTIONS_V4, list, &[key, upper])
}

/// The list is in the bits above the upper layer.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lookup_exception_v6(
    list_and_upper: u64,
    destination0: u64,
    destination1: u64,
    source0: u64,
    source1: u64,
) -> u64 {
    let Some(control) = CONTROL.get(0) else { return UNREADABLE };
    // A comparison and no shift: the verifier does not connect a number with what it was shifted from.
    let upper = list_and_upper & ((1 << UPPER_LAYER_BITS) - 1);
    let list = if list_and_upper == upper { ExceptionList::Ports } else { ExceptionList::Protocols };
    let key = [destination0, destination1, source0, source1, upper];
    lookup(&control.exceptions_v6, &UPPER_TUPLES_V6, &EXCEPTIONS_V6, list as u64, &key)
}

/// What a lookup that cannot be made gives: of whatever list, it makes the packet pass.
const UNREADABLE: u64 = Value::denied().0;

#[inline(always)]
fn lookup<const K: usize, const L: usize>(
    control: &SpaceControl<L>,
    tuples: &Array<TupleList<K>>,
    entries: &Array<Bucket<K>>,
    list: u64,
    key: &[u64; K],
) -> u64 {
    let (Some(length), Some(tuples)) = (control.tuples.get(list as usize), tuples.get(list as u32)) else {
        return UNREADABLE;
    };
    let (seed, bucket_mask) = (control.seed.load(), control.bucket_mask.load());
    match first_hit(&Entries(entries), tuples, length.load(), key, seed, bucket_mask) {
        Some(value) => value.0,
        None => 0,
    }
}

/// A section in which the tables must not change.
struct Sequence<'a> {
    control: &'a Control,
    begun: u64,
}

impl<'a> Sequence<'a> {
    #[inline(always)]
    fn begin(control: &'a Control) -> Result<Self, PassReason> {
        let begun = control.sequence.load();
        if begun & 1 != 0 {
            return Err(PassReason::Updating);
        }
        fence()?;
        Ok(Self { control, begun })
    }

    #[inline(always)]
    fn still_holds(self) -> Result<(), PassReason> {
        fence()?;
        if self.control.sequence.load() == self.begun { Ok(()) } else { Err(PassReason::Updating) }
    }
}

/// Keeps the processor from reordering reads across this point, where it might.
///
/// BPF has no barrier before Linux 6.15, but its atomic instructions that return a value are fully ordered.
#[inline(always)]
fn fence() -> Result<(), PassReason> {
    // SAFETY: a global that is set when the program is loaded; the verifier knows its value and removes the
    // branch that is not taken.
    if unsafe { (&raw const WEAKLY_ORDERED).read_volatile() } != 0 {
        increment(&passes().ok_or(PassReason::Updating)?.scratch);
    }
    Ok(())
}

/// Adds 1 to a word that others may write at the same time. Nothing before or after is reordered across it.
#[inline(always)]
fn increment(word: &Word) {
    // Rust has no atomic read-modify-write operations for this target.
    // SAFETY: the pointer comes from a reference, and words may be written through one.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
            value = inout(reg) 1_u64 => _,
            word = in(reg) word.atomic().as_ptr(),
            options(nostack),
        );
    }
}

/// Takes VLAN tags and Ethernet padding off the frame. The frame's bytes are as before if this fails.
#[inline(always)]
fn strip(context: &XdpContext, tags: usize, padding: usize) -> Result<(), PassReason> {
    // SAFETY: helper calls on the program's own context; pointers into the frame are not used after them.
    unsafe {
        if tags != 0 && bpf_xdp_adjust_head(context.ctx, tags as i32) != 0 {
            return Err(PassReason::EgressUnavailable);
        }
        if padding != 0 && bpf_xdp_adjust_tail(context.ctx, -(padding as i32)) != 0 {
            bpf_xdp_adjust_head(context.ctx, -(tags as i32));
            return Err(PassReason::EgressUnavailable);
        }
    }
    Ok(())
}

#[inline(always)]
fn write_ethernet(frame: Frame, addresses: (u64, u64), ether_type: u16) -> Result<(), PassReason> {
    let ethernet = frame.header::<Ethernet>(0)?;
    // SAFETY: bounds-checked.
    unsafe {
        (*ethernet).destination = unpacked_mac(addresses.0);
        (*ethernet).source = unpacked_mac(addresses.1);
        (*ethernet).ether_type = ether_type.to_be();
    }
    Ok(())
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

#[inline(always)]
fn decrement_ttl(frame: Frame, ether_type: u16) -> Result<(), PassReason> {
    if ether_type == ETHERTYPE_IPV4 {
        let ip = frame.header::<Ipv4>(ETHERNET_LENGTH)?;
        // SAFETY: bounds-checked.
        unsafe {
            (*ip).ttl -= 1;
            (*ip).checksum = checksum_after_ttl_decrement((*ip).checksum);
        }
    } else {
        let ip = frame.header::<Ipv6>(ETHERNET_LENGTH)?;
        // SAFETY: bounds-checked.
        unsafe { (*ip).hop_limit -= 1 };
    }
    Ok(())
}

#[inline(always)]
fn count(slot: u32, length: usize) {
    // SAFETY: a global that is set when the program is loaded.
    let slots = unsafe { (&raw const SLOTS).read_volatile() };
    if let Some(traffic) = TRAFFIC.get(cpu() * slots + slot) {
        traffic.packets.add(1);
        traffic.bytes.add(length as u64);
    }
}

#[inline(always)]
fn passes() -> Option<&'static Passes> {
    PASSES.get(cpu())
}

#[inline(always)]
fn cpu() -> u32 {
    // SAFETY: a helper call without arguments.
    unsafe { bpf_get_smp_processor_id() as u32 }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper call without arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the program has no panicking path; if it had one, the verifier would refuse this loop.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
