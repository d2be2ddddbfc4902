//! Rules of policy routing.

use ipnet::IpNet;

use crate::policy::Family;

/// A rule of policy routing (`ip rule`).
///
/// ```
/// use fastswan::host::{Rule, RuleAction};
/// use fastswan::policy::Family;
///
/// // As strongSwan adds it, so that its routes come before all others.
/// let charon = Rule::lookup(Family::V4, 220, 220);
/// assert!(charon.selector.is_everything());
/// assert_eq!(charon.action, RuleAction::Lookup { table: 220, suppress_prefix_length: None, suppress_group: false });
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rule {
    /// The family it is for.
    pub family: Family,
    /// Lower comes first; of equal ones, the one that was told first.
    pub priority: u32,
    /// The packets that it is for.
    pub selector: RuleSelector,
    /// What happens to them.
    pub action: RuleAction,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RuleAction {
    /// Looks up a table, and goes on with the next rule if there is no route, or one that throws.
    Lookup {
        /// The table.
        table: u32,
        /// A route with a prefix of this length or a shorter one does not count (`suppress_prefixlength`).
        suppress_prefix_length: Option<u8>,
        /// A route by a device of a certain group does not count (`suppress_ifgroup`).
        suppress_group: bool,
    },
    /// Goes on with the first rule of this priority, or, if there is none, with the next one.
    Goto(u32),
    /// Nothing: the next rule counts.
    Nop,
    /// Drops, whether or not it tells the sender.
    Deny,
    /// Something else.
    Unclear,
}

/// The packets that a rule is for: those that meet all of this, or, inverted, that do not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RuleSelector {
    /// It is for the packets that do not meet the rest (`not`).
    pub inverted: bool,
    /// Their source lies in this prefix.
    pub source: Option<IpNet>,
    /// Their destination lies in this prefix.
    pub destination: Option<IpNet>,
    /// Their mark, of which the mask counts: value and mask (`fwmark`).
    pub mark: Option<(u32, u32)>,
    /// The name of the interface that they arrive on; `lo` for those of the host itself.
    pub iif: Option<String>,
    /// The name of the interface that they must leave by. That of a forwarded packet is not known before its route is.
    pub oif: Option<String>,
    /// They belong to a VRF.
    pub l3mdev: bool,
    /// Something else about them: type of service, protocol, ports, user, tunnel.
    pub other: bool,
}

impl Rule {
    /// One for some packets.
    #[must_use]
    pub fn new(family: Family, priority: u32, selector: RuleSelector, action: RuleAction) -> Self {
        Self { family, priority, selector, action }
    }

    /// One that looks up a table for every packet.
    #[must_use]
    pub fn lookup(family: Family, priority: u32, table: u32) -> Self {
        let action = RuleAction::Lookup { table, suppress_prefix_length: None, suppress_group: false };
        Self::new(family, priority, RuleSelector::default(), action)
    }

    /// The rules of a host without policy routing: the tables local (255), main (254) and default (253).
    #[must_use]
    pub fn ordinary(family: Family) -> [Self; 3] {
        [(0, 255), (32_766, 254), (32_767, 253)]
            .map(|(priority, table)| Self::lookup(family, priority, table))
    }
}

impl RuleSelector {
    /// Whether every packet meets it.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }
}
