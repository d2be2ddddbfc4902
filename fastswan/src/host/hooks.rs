//! What hooks into the kernel's way of forwarding and may change a packet's fate there: firewalls, address translation,
//! programs, load balancers.
//!
//! The fast path skips them. So what a hook may concern is not fast, unless the embedder allows its kind.
//!
//! # When to allow a kind
//!
//! When nothing that it does to packets of offloaded policies is missed if they skip it. For `nf_tables` with connection
//! tracking that takes two things: these packets must not be tracked, since the kernel would see one direction only, and
//! they must be accepted wherever something else is dropped, so that those that pass have the same fate as those that are
//! fast.
//!
//! ```text
//! table inet tunnels {
//!     # Both directions, before connection tracking (priority -200) sees them.
//!     chain untracked {
//!         type filter hook prerouting priority raw; policy accept;
//!         ip saddr 10.1.0.0/16 ip daddr 10.2.0.0/16 notrack
//!         ip saddr 10.2.0.0/16 ip daddr 10.1.0.0/16 notrack
//!     }
//!     chain forward {
//!         type filter hook forward priority filter; policy drop;
//!         # Before any other rule, and in every chain that is not `policy accept` throughout.
//!         ip saddr 10.1.0.0/16 ip daddr 10.2.0.0/16 accept
//!         ip saddr 10.2.0.0/16 ip daddr 10.1.0.0/16 accept
//!         ct state established,related accept
//!     }
//! }
//! ```
//!
//! No chain of type `nat` may match these packets either; untracked ones skip those. Then
//! `Hooks::none().allow(HookKind::NfTables).allow(HookKind::Conntrack)` is right.

use std::{fmt, str::FromStr};

use crate::policy::Family;

/// Something that may change the fate of packets that are forwarded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hook {
    /// What it is.
    pub kind: HookKind,
    /// Which packets meet it.
    pub place: HookPlace,
    /// Which one it is, for people: the chain, the program, the table; or why it is not known whether there is one.
    pub name: String,
}

/// What kind of hook it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HookKind {
    /// A base chain of `nf_tables`, as `nft` and today's `iptables` make them.
    NfTables,
    /// A legacy table: `iptables-legacy`, `ip6tables-legacy`.
    IpTables,
    /// Connection tracking. Without any rule it drops what it has no room to track.
    Conntrack,
    /// A virtual service of IPVS.
    Ipvs,
    /// A filter of traffic control, or a tcx program.
    Tc,
    /// An XDP program on a device that is on top of another one, such as a VLAN device.
    Xdp,
    /// Another function at a hook of netfilter: a BPF program, or a kernel module's.
    Netfilter,
}

/// Where a hook is, and so which packets meet it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HookPlace {
    /// In the IP layer: all packets of a family that are forwarded, or of both families.
    Forwarding(Option<Family>),
    /// Where packets come in from the device with this interface index.
    Ingress(u32),
    /// Where packets leave to the device with this interface index.
    Egress(u32),
}

impl HookKind {
    /// Every kind.
    pub const ALL: [Self; 7] =
        [Self::NfTables, Self::IpTables, Self::Conntrack, Self::Ipvs, Self::Tc, Self::Xdp, Self::Netfilter];

    /// Its name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NfTables => "nf_tables",
            Self::IpTables => "ip_tables",
            Self::Conntrack => "conntrack",
            Self::Ipvs => "ipvs",
            Self::Tc => "tc",
            Self::Xdp => "xdp",
            Self::Netfilter => "netfilter",
        }
    }
}

impl FromStr for HookKind {
    type Err = ParseHookKindError;

    /// By its [name](Self::name), or with hyphens for underscores.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_named = |kind: &Self| kind.name() == text.replace('-', "_");
        Self::ALL.into_iter().find(is_named).ok_or_else(|| ParseHookKindError(text.to_owned()))
    }
}

/// There is no kind of hook of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no kind of hook is called {0:?}: write one of nf_tables, ip_tables, conntrack, ipvs, tc, xdp, netfilter"
)]
pub struct ParseHookKindError(String);

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.name)
    }
}

/// The kinds of hooks that the fast path may skip.
///
/// ```
/// use fastswan::host::{HookKind, Hooks};
///
/// let hooks = Hooks::none().allow(HookKind::NfTables).allow(HookKind::Conntrack);
/// assert!(hooks.allows(HookKind::NfTables) && !hooks.allows(HookKind::Tc));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hooks {
    /// A bit for each kind.
    allowed: u32,
}

impl Hooks {
    /// None: what a hook may concern is not fast.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// These, and hooks of this kind: the embedder answers for it that packets may skip them. See the
    /// [module](self) for when that is right.
    #[must_use]
    pub fn allow(self, kind: HookKind) -> Self {
        Self { allowed: self.allowed | bit(kind) }
    }

    /// Whether the fast path may skip hooks of this kind.
    #[must_use]
    pub fn allows(self, kind: HookKind) -> bool {
        self.allowed & bit(kind) != 0
    }
}

fn bit(kind: HookKind) -> u32 {
    1 << kind as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_allowed_by_itself() {
        for kind in HookKind::ALL {
            let hooks = Hooks::none().allow(kind);
            assert!(HookKind::ALL.iter().all(|other| hooks.allows(*other) == (*other == kind)), "{kind:?}");
            assert!(!Hooks::none().allows(kind));
        }
    }

    #[test]
    fn kinds_are_read_by_their_names_and_an_error_names_all() {
        for kind in HookKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(kind.name().replace('_', "-").parse(), Ok(kind));
        }
        let error = "ebtables".parse::<HookKind>().unwrap_err().to_string();
        assert!(HookKind::ALL.iter().all(|kind| error.contains(kind.name())), "{error}");
    }
}
