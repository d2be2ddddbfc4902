//! Why a packet was passed to the kernel.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why a packet was passed to the kernel, in the order in which the program checks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        #[non_exhaustive]
        pub enum PassReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl PassReason {
            /// Every reason, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name in counters and metrics: lower case words joined by underscores.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

reasons! {
    /// The kill switch is on: the mirror is not up to date, or the embedder turned it on.
    Disabled = "disabled",
    /// The lease has run out: the mirror has not said lately that it is alive and caught up.
    LeaseExpired = "lease_expired",
    /// A batch of changes was being written, or has been since the packet was looked up.
    Updating = "updating",
    /// The frame lies in several buffers.
    MultiBuffer = "multi_buffer",
    /// The frame is shorter than its headers.
    Truncated = "truncated",
    /// Neither IPv4 nor IPv6, or more than two VLAN tags.
    NotIp = "not_ip",
    /// No port is known for the interface and VLAN.
    UnknownPort = "unknown_port",
    /// The frame is not sent to the port's address.
    OtherDestinationMac = "other_destination_mac",
    /// The port does not forward the family.
    NotForwarding = "not_forwarding",
    /// The version in the IP header is not the one in the Ethernet header, or the header is too short.
    BadHeader = "bad_header",
    /// IPv4 options.
    Options = "ipv4_options",
    /// An IPv6 extension header, or no next header.
    ExtensionHeader = "ipv6_extension_header",
    /// A fragment.
    Fragment = "fragment",
    /// The packet is longer than the frame, or its length is 0 (a jumbogram).
    BadLength = "bad_length",
    /// The IPv4 header checksum is wrong.
    BadChecksum = "bad_checksum",
    /// The TTL or hop limit is 1 or 0.
    TtlExpired = "ttl_expired",
    /// The source is one that is never forwarded: loopback, multicast, link-local, this network.
    MartianSource = "martian_source",
    /// The destination is one that is never forwarded: loopback, multicast, broadcast, link-local.
    MartianDestination = "martian_destination",
    /// A message of IPv6 neighbour discovery: where the kernel is a proxy for its destination, it takes it for itself.
    NeighbourDiscovery = "neighbour_discovery",
    /// A policy asks for the packet's protocol or ports.
    Exception = "exception",
    /// No policy matches.
    NoPolicy = "no_policy",
    /// The policy that the kernel would choose is not offloaded, is a bypass or blocks.
    NotOffloaded = "not_offloaded",
    /// Several policies match and the kernel's choice is not certain, or it is not the offloaded one.
    Shadowed = "shadowed",
    /// A forward policy, a sub policy, or one that merged sources disagree about, matches too.
    ForwardOrSubPolicy = "forward_or_sub_policy",
    /// The policy has a mark, an interface, a limit, a security context, a mode or a tunnel of another family that
    /// the fast path does not handle.
    Ineligible = "ineligible",
    /// The policy has no live packet-offload association on its device.
    NoSa = "no_sa",
    /// The default policy blocks.
    DefaultBlock = "default_block",
    /// The next hop, the device or the path's length is not known.
    NoPath = "no_path",
    /// The table has no room for the region.
    Capacity = "capacity",
    /// A forward policy, a sub policy, or one that there was no room to tell apart, is about the packet's source.
    Guarded = "guarded",
    /// The destination is an address that the host does not forward to: its own, broadcast, unroutable.
    DeniedDestination = "denied_destination",
    /// The destination is routed to another device than the policy's.
    RouteElsewhere = "route_elsewhere",
    /// The source is the host's own address, or unroutable.
    DeniedSource = "denied_source",
    /// The route back to the source fails the port's reverse path filter.
    ReversePath = "reverse_path",
    /// The packet is longer than the policy's path takes.
    TooLong = "too_long",
    /// The guard has seen the kernel begin to remove a policy, an association or a device, and the mirror has not
    /// caught up with that yet.
    Removal = "removal",
    /// The device takes redirected frames only from CPUs that it has a channel for, and this is none of them.
    NoChannel = "no_channel",
    /// The frame could not be handed to the device: it is not in the device map, or a helper refused.
    EgressUnavailable = "egress_unavailable",
    /// The embedder keeps the policy from being fast.
    Held = "held",
    /// A hook may change the packet's fate on its way, such as a firewall's.
    Hook = "hook",
    /// The kernel's own routes, which are asked about one packet in many, do not lead to the policy's device.
    FibDiffers = "fib_differs",
}

impl PassReason {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The reason with this number.
    #[must_use]
    pub fn from_index(index: u32) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }
}
