//! How packets of policies leave, or why they must not.

use std::{iter, net::IpAddr};

use fastswan_ebpf::PassReason;

use super::{
    path::{self, Lack, OuterRoute, OuterRoutes, Paths},
    reliance::Noted,
    rule::eligible,
};
use crate::{
    database::{Database, PolicyKey},
    policy::{Action, Policy},
    table::{Forwarding, Standing},
};

/// How packets of one policy leave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) standing: Standing,
    /// The neighbour that they are sent to, or would be if its address were known.
    pub(super) neighbour: Option<(u32, IpAddr)>,
}

/// Works them out of one policy after the other.
#[derive(Debug)]
pub(super) struct Standings<'d> {
    database: &'d Database,
    paths: &'d Paths,
    routes: OuterRoutes<'d>,
    noted: Noted,
}

impl<'d> Standings<'d> {
    pub(super) fn new(database: &'d Database, paths: &'d Paths) -> Self {
        Self { database, paths, routes: OuterRoutes::new(paths), noted: Noted::default() }
    }

    /// That of a policy, of which it is noted what it depends on.
    pub(super) fn of(&mut self, policy: &Policy) -> Way {
        self.noted.add(policy);
        let outer = self.routes.of(policy);
        let forwarding = forwarding(policy, outer, self.database, self.paths);
        let neighbour = match forwarding {
            Ok(_) => path::neighbour(policy, outer),
            Err(Lack::Neighbour(neighbour)) => Some(neighbour),
            Err(Lack::Reason(_)) => None,
        };
        Way { standing: forwarding.map_err(Lack::reason), neighbour }
    }

    /// Those of many, with their keys; and what all of these depend on.
    pub(super) fn of_all(mut self, policies: Vec<PolicyKey>) -> (Vec<(PolicyKey, Way)>, Noted) {
        let mut ways = Vec::with_capacity(policies.len());
        for key in policies {
            if let Some(policy) = self.database.policy_with_key(key) {
                ways.push((key, self.of(policy)));
            }
        }
        (ways, self.noted)
    }

    /// What all so far depend on.
    pub(super) fn noted(self) -> Noted {
        self.noted
    }
}

/// How a policy's packets leave by the outer route that they have, or what they lack.
fn forwarding(
    policy: &Policy,
    outer: Option<OuterRoute>,
    database: &Database,
    paths: &Paths,
) -> Result<Forwarding, Lack> {
    let template = eligible(policy)?;
    let device = policy.offload.ok_or(PassReason::NotOffloaded)?;
    if database.is_about_to_expire(policy.expires) {
        return Err(PassReason::Ineligible.into());
    }
    let default_policy = database.default_policy();
    if (default_policy.forward, default_policy.outbound) != (Action::Allow, Action::Allow) {
        return Err(PassReason::DefaultBlock.into());
    }
    if paths.hook(policy.id.selector.family(), device.ifindex).is_some() {
        return Err(PassReason::Hook.into());
    }
    if policy.assumed.is_some() {
        return paths.forwarding(policy, device, template, outer, iter::once(policy.assumed));
    }
    let associations = database.live_sas(policy);
    if associations.clone().all(|sa| database.is_about_to_expire(sa.expires)) {
        return Err(PassReason::NoSa.into());
    }
    // The device may go on using one that is about to expire, beside another.
    let overheads = associations.map(|sa| sa.overhead);
    paths.forwarding(policy, device, template, outer, overheads)
}
