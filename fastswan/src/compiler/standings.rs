//! How packets of policies leave, or why they must not.

use std::iter;

use fastswan_ebpf::PassReason;

use super::{
    path::{OuterRoute, OuterRoutes, Paths},
    reliance::Noted,
    rule::eligible,
};
use crate::{
    database::{Database, PolicyKey},
    policy::{Action, Policy},
    table::Standing,
};

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
    pub(super) fn of(&mut self, policy: &Policy) -> Standing {
        let outer = self.routes.of(policy);
        self.noted.add(policy, outer);
        standing(policy, outer, self.database, self.paths)
    }

    /// Those of many, with their keys; and what all of these depend on.
    pub(super) fn of_all(mut self, policies: Vec<PolicyKey>) -> (Vec<(PolicyKey, Standing)>, Noted) {
        let mut standings = Vec::with_capacity(policies.len());
        for key in policies {
            if let Some(policy) = self.database.policy_with_key(key) {
                standings.push((key, self.of(policy)));
            }
        }
        (standings, self.noted)
    }

    /// What all so far depend on.
    pub(super) fn noted(self) -> Noted {
        self.noted
    }
}

/// How a policy's packets leave by the outer route that they have, or why they must not.
fn standing(policy: &Policy, outer: Option<OuterRoute>, database: &Database, paths: &Paths) -> Standing {
    let template = eligible(policy)?;
    let Some(device) = policy.offload else { return Err(PassReason::NotOffloaded) };
    if database.is_about_to_expire(policy.expires) {
        return Err(PassReason::Ineligible);
    }
    let default_policy = database.default_policy();
    if (default_policy.forward, default_policy.outbound) != (Action::Allow, Action::Allow) {
        return Err(PassReason::DefaultBlock);
    }
    if paths.hook(policy.id.selector.family(), device.ifindex).is_some() {
        return Err(PassReason::Hook);
    }
    if policy.assumed.is_some() {
        return paths
            .forwarding(policy, device, template, outer, iter::once(policy.assumed))
            .ok_or(PassReason::NoPath);
    }
    let associations = database.live_sas(policy);
    if associations.clone().all(|sa| database.is_about_to_expire(sa.expires)) {
        return Err(PassReason::NoSa);
    }
    // The device may go on using one that is about to expire, beside another.
    let overheads = associations.map(|sa| sa.overhead);
    paths.forwarding(policy, device, template, outer, overheads).ok_or(PassReason::NoPath)
}
