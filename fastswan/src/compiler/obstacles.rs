//! What keeps everything, or all of a family, from being fast: to be said once, and not packet by packet.

use std::fmt;

use super::Compiler;
use crate::{
    database::Database,
    host::{Hook, HookPlace},
    policy::{Action, DefaultPolicy, Family, PolicyId},
};

/// Why no packet at all, or none of a family, can be fast, whatever policies are offloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// The default policy blocks packets that are forwarded, or that leave.
    DefaultBlock(DefaultPolicy),
    /// A forward policy, or a sub policy, is about every packet of its family, and the kernel must check it.
    Check(PolicyId),
    /// Nothing is known about the host: no rule of a family says which table of routes counts.
    UnknownHost(Family),
    /// A rule of policy routing does something that is not understood, so routes are not clear.
    Rule {
        /// Its family.
        family: Family,
        /// Its priority (`pref`).
        priority: u32,
    },
    /// No interface forwards packets of a family.
    NotForwarding(Family),
    /// Something may change the fate of all packets on their way, or of those of a family.
    Hook(Hook),
}

impl Obstacle {
    /// The family that cannot be fast; `None` if that is both.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        match self {
            Self::DefaultBlock(_) => None,
            Self::Hook(hook) => match hook.place {
                HookPlace::Forwarding(family) => family,
                _ => None,
            },
            Self::Check(policy) => Some(policy.selector.family()),
            Self::UnknownHost(family) | Self::Rule { family, .. } | Self::NotForwarding(family) => {
                Some(*family)
            }
        }
    }
}

impl Compiler {
    /// What keeps everything, or all of a family, from being fast, apart from policies that are not offloaded and
    /// associations that are not there; for a log and for a status. Of what the database says, as it was compiled last.
    #[must_use]
    pub fn obstacles(&self, database: &Database) -> Vec<Obstacle> {
        let mut obstacles = self.paths.obstacles();
        if !database.is_current() {
            return obstacles;
        }
        let default_policy = database.default_policy();
        if (default_policy.forward, default_policy.outbound) != (Action::Allow, Action::Allow) {
            obstacles.push(Obstacle::DefaultBlock(default_policy));
        }
        let checks = [Family::V4, Family::V6].into_iter().filter_map(|family| {
            let check = database.policy_with_key(self.verdicts.family(family).check_of_everything()?)?;
            Some(Obstacle::Check(check.id.clone()))
        });
        obstacles.extend(checks);
        obstacles
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |family: &Family| match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        match self {
            Self::DefaultBlock(DefaultPolicy { forward: Action::Block, .. }) => {
                f.write_str("the default policy blocks forwarded packets (`ip xfrm policy setdefault`)")
            }
            Self::DefaultBlock(_) => {
                f.write_str("the default policy blocks packets that leave (`ip xfrm policy setdefault`)")
            }
            Self::Check(policy) => {
                write!(
                    f,
                    "the policy {policy} is about every packet that is forwarded, and the kernel must check it"
                )
            }
            Self::UnknownHost(family) => write!(f, "the routes for {} are not known", name(family)),
            Self::Rule { family, priority } => write!(
                f,
                "the rule with pref {priority} for {} does something that is not understood, so routes are not clear",
                name(family)
            ),
            Self::NotForwarding(family) => write!(f, "no interface forwards {}", name(family)),
            Self::Hook(hook) => match self.family() {
                Some(family) => write!(f, "the fast path would skip {hook} ({} only)", name(&family)),
                None => write!(f, "the fast path would skip {hook}"),
            },
        }
    }
}
