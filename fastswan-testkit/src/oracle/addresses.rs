//! Addresses of the lab, and prefixes inside its networks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastswan::policy::MacAddr;
use ipnet::IpNet;

/// Where packets come from, and the port that they enter by.
pub(super) const SENDER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
pub(super) const PORT: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

/// Where something else happens than forwarding to the outer device.
pub(super) const SPECIAL_V4: [&str; 22] = [
    "0.0.0.0",
    "10.1.0.0",
    "10.1.0.1",
    "10.1.0.2",
    "10.1.255.255",
    "10.2.0.1",
    "10.2.66.0",
    "10.2.66.9",
    "10.2.67.0",
    "10.2.88.0",
    "10.2.88.255",
    "10.2.89.0",
    "10.3.77.1",
    "127.0.0.1",
    "169.254.1.1",
    "192.0.2.1",
    "192.0.2.2",
    "192.0.2.255",
    "192.0.3.0",
    "224.0.0.5",
    "240.0.0.1",
    "255.255.255.255",
];
pub(super) const SPECIAL_V6: [&str; 14] = [
    "::",
    "::1",
    "2001:db8:1::",
    "2001:db8:1::1",
    "2001:db8:2::",
    "2001:db8:2::1",
    "2001:db8:2:66::9",
    "2001:db8:2:88::1",
    "2001:db8:f::1",
    "2001:db8:f::2",
    "2001:db8:f::",
    "::ffff:10.2.0.9",
    "fe80::1",
    "ff02::5",
];

/// The same prefix for IPv4, 10.`zone`.`net`.`host`/`length`, and for IPv6, 2001:db8:`zone`:`net`::`host`.
pub(super) fn place(v6: bool, zone: u16, net: u16, host: u16, length: u8) -> IpNet {
    let low = |number: u16| u8::try_from(number).unwrap_or(u8::MAX);
    let (address, length): (IpAddr, u8) = if v6 {
        let length = match length {
            0..=8 => length * 4,
            9..=16 => 32 + (length - 8) * 2,
            17..=24 => 48 + (length - 16) * 2,
            _ => 96 + length,
        };
        (Ipv6Addr::new(0x2001, 0xdb8, zone, net, 0, 0, 0, host).into(), length)
    } else {
        (Ipv4Addr::new(10, low(zone), low(net), low(host)).into(), length)
    };
    IpNet::new(address, length).expect("a length of the family").trunc()
}
