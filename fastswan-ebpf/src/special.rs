//! Addresses that are never forwarded at XDP.

/// This network, loopback, link-local, multicast, reserved and limited broadcast, RFC 6890. Host order.
///
/// Some of them the kernel forwards; passing them is as right, and they are rare.
#[inline(always)]
#[must_use]
pub const fn is_special_v4(address: u32) -> bool {
    address >> 24 == 0 || address >> 24 == 127 || address >> 16 == 0xa9fe || address >= 0xe000_0000
}

/// Unspecified, loopback, IPv4-compatible and -mapped, link-local, site-local and multicast (RFC 4291), from
/// the two halves in host order. Likewise.
#[inline(always)]
#[must_use]
pub const fn is_special_v6(address: [u64; 2]) -> bool {
    (address[0] == 0 && matches!(address[1] >> 32, 0 | 0xffff))
        || address[0] >> 55 == 0xfe80 >> 7
        || address[0] >> 56 == 0xff
}
