//! The lab that most stories take place in: a client, a gateway and a peer, in a row.
//!
//! ```text
//! client                   gateway                   peer
//! eth0 ─────────────── lan0     out0 ─────────────── eth0
//! 10.1.0.5             10.1.0.1 192.0.2.1            192.0.2.2     10.2.0.9
//! 2001:db8:1::5    2001:db8:1::1 2001:db8:f::1       2001:db8:f::2 2001:db8:2::9
//! ```
//!
//! Client and peer send to each other through the gateway. The gateway knows its neighbours, but neither
//! forwards nor has a route to the peer's second addresses, unless [`Site::route`] says so: until then what
//! gets through has taken the fast path. Nothing is encrypted anywhere.

use fastswan::policy::MacAddr;

use crate::lab::{End, LabError, Namespace, introduce, join_with_index};

/// Address of the client's eth0.
pub const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
/// Address of the gateway's lan0.
pub const LAN: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
/// Address of the gateway's out0.
pub const OUT: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
/// Address of the peer's eth0.
pub const PEER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xbb]);

/// The three hosts.
#[derive(Debug)]
pub struct Site {
    /// Behind the gateway's lan0.
    pub client: Namespace,
    /// Between them.
    pub gateway: Namespace,
    /// Behind the gateway's out0.
    pub peer: Namespace,
}

impl Site {
    /// Makes them.
    ///
    /// # Errors
    ///
    /// [`LabError`], for instance without root.
    pub fn new() -> Result<Self, LabError> {
        Self::with_indices(None, None)
    }

    /// Makes them, with these interface indices for the gateway's lan0 and out0.
    ///
    /// # Errors
    ///
    /// [`LabError`], for instance without root.
    pub fn with_indices(lan: Option<u32>, out: Option<u32>) -> Result<Self, LabError> {
        let site = Self {
            client: Namespace::new("client")?,
            gateway: Namespace::new("gateway")?,
            peer: Namespace::new("peer")?,
        };
        let end = |namespace, device, mac, addresses| End { namespace, device, mac, addresses };
        let lan0 = end(&site.gateway, "lan0", LAN, &["10.1.0.1/16", "2001:db8:1::1/48"]);
        let client = end(&site.client, "eth0", CLIENT, &["10.1.0.5/16", "2001:db8:1::5/48"]);
        let out0 = end(&site.gateway, "out0", OUT, &["192.0.2.1/24", "2001:db8:f::1/48"]);
        let peer = end(&site.peer, "eth0", PEER, &["192.0.2.2/24", "2001:db8:f::2/48"]);
        for (index, one, other) in [(lan, lan0, client), (out, out0, peer)] {
            join_with_index(index, one, other, 1500)?;
            introduce(one, other)?;
        }
        for address in ["10.2.0.9/16", "2001:db8:2::9/48 nodad"] {
            site.peer.ip(&format!("address add {address} dev eth0"))?;
        }
        for (host, v4, v6) in
            [(&site.client, "10.1.0.1", "2001:db8:1::1"), (&site.peer, "192.0.2.1", "2001:db8:f::1")]
        {
            host.ip(&format!("route add default via {v4}"))?;
            host.ip(&format!("route add default via {v6}"))?;
        }
        Ok(site)
    }

    /// Makes the gateway's kernel forward to the peer's second addresses and back.
    ///
    /// # Errors
    ///
    /// [`LabError`].
    pub fn route(&self) -> Result<(), LabError> {
        self.gateway.forward()?;
        self.gateway.ip("route add 10.2.0.0/16 via 192.0.2.2")?;
        self.gateway.ip("route add 2001:db8:2::/48 via 2001:db8:f::2").map(drop)
    }
}
