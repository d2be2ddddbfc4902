//! Host sources that lie, each in one way. The judge must notice.

use std::collections::BTreeSet;

use async_trait::async_trait;
use fastswan::{
    HostEvent, HostFacts, HostSource,
    host::{HostError, Route, RouteKind, Rule},
    policy::Family,
};

/// What a host source gets wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HostMutant {
    /// It has not joined the groups of routes: they are as they were at first.
    Routes,
    /// It has not joined the groups of rules.
    Rules,
    /// It has not joined the groups of links and of what is set for them.
    Links,
    /// It has not joined the group of neighbours.
    Neighbours,
    /// It takes routes for one type of service to be for all.
    Tos,
    /// IPv6 routes that end go on.
    Lifetime,
    /// It tells the rules but the first in the opposite order.
    RuleOrder,
    /// It does not look at hooks.
    Hooks,
    /// It does not look at what path MTUs the kernel learns.
    PathMtus,
}

impl HostMutant {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Routes,
        Self::Rules,
        Self::Links,
        Self::Neighbours,
        Self::Tos,
        Self::Lifetime,
        Self::RuleOrder,
        Self::Hooks,
        Self::PathMtus,
    ];

    /// The kinds of change that it lies about.
    pub(super) fn kinds(self) -> &'static [&'static str] {
        match self {
            Self::Routes => &["route-denied", "route-elsewhere", "nexthop"],
            Self::Rules => &["rule-denies", "rule-to"],
            Self::Links => &["link-mtu", "forwarding-v4", "forwarding-v6"],
            Self::Neighbours => &["neighbour"],
            Self::Tos => &["route-tos", "route-tos-outer"],
            Self::Lifetime => &["v6-expires"],
            Self::Hooks => &["tc", "nft-filter", "nft-policy"],
            Self::RuleOrder => &["rule-order", "rule-table"],
            Self::PathMtus => &["path-mtu"],
        }
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Routes => "routes",
            Self::Rules => "rules",
            Self::Links => "links",
            Self::Neighbours => "neighbours",
            Self::Tos => "tos",
            Self::Lifetime => "lifetime",
            Self::RuleOrder => "rule-order",
            Self::Hooks => "hooks",
            Self::PathMtus => "path-mtus",
        }
    }
}

/// A source that lies.
pub(super) struct Lying<S> {
    source: S,
    how: HostMutant,
    /// What the source has told.
    facts: HostFacts,
    /// What it told first.
    first: Option<HostFacts>,
    /// IPv6 routes that were told at some time.
    ever: Vec<Route>,
}

impl<S> Lying<S> {
    pub(super) fn new(source: S, how: HostMutant) -> Self {
        Self { source, how, facts: HostFacts::default(), first: None, ever: Vec::new() }
    }

    fn lie(&mut self) -> HostFacts {
        let mut facts = self.facts.clone();
        let first = self.first.get_or_insert_with(|| facts.clone()).clone();
        match self.how {
            HostMutant::Routes => facts.routes = first.routes,
            HostMutant::Rules => facts.rules = first.rules,
            HostMutant::Links => facts.links = first.links,
            HostMutant::Neighbours => facts.neighbours = first.neighbours,
            HostMutant::Tos => facts.routes.iter_mut().for_each(|route| route.tos = 0),
            HostMutant::Lifetime => {
                let is_told = |route: &Route, routes: &[Route]| routes.contains(route);
                let gone = self.ever.iter().filter(|route| !is_told(route, &facts.routes)).copied();
                let gone: Vec<Route> = gone.collect();
                let forwards = |route: &&Route| {
                    Family::of(&route.destination) == Family::V6
                        && matches!(route.kind, RouteKind::Unicast { gateway: Some(_), .. })
                };
                let new: Vec<Route> = facts.routes.iter().filter(forwards).copied().collect();
                self.ever.extend(new.into_iter().filter(|route| !gone.contains(route)));
                // Those that have come instead count.
                let prefixes: BTreeSet<_> =
                    facts.routes.iter().map(|route| (route.table, route.destination)).collect();
                facts.routes.extend(
                    gone.into_iter().filter(|route| !prefixes.contains(&(route.table, route.destination))),
                );
            }
            HostMutant::Hooks => facts.hooks.clear(),
            HostMutant::PathMtus => facts.path_mtus.clear(),
            HostMutant::RuleOrder => {
                facts.rules = [Family::V4, Family::V6].map(|family| turned(&facts.rules, family)).concat();
            }
        }
        facts
    }
}

/// The rules of a family with the actions of all but the first in the opposite order.
fn turned(rules: &[Rule], family: Family) -> Vec<Rule> {
    let mut rules: Vec<Rule> = rules.iter().filter(|rule| rule.family == family).cloned().collect();
    rules.sort_by_key(|rule| rule.priority);
    let Some((_, rest)) = rules.split_first_mut() else { return rules };
    let priorities: Vec<u32> = rest.iter().map(|rule| rule.priority).collect();
    rest.reverse();
    for (rule, priority) in rest.iter_mut().zip(priorities) {
        rule.priority = priority;
    }
    rules
}

#[async_trait]
impl<S: HostSource> HostSource for Lying<S> {
    async fn next_event(&mut self) -> Result<Option<HostEvent>, HostError> {
        match self.source.next_event().await? {
            Some(HostEvent::Snapshot(facts)) => self.facts = facts,
            Some(HostEvent::Changes(changes)) => {
                for change in changes {
                    self.facts.apply(change);
                }
            }
            other => return Ok(other),
        }
        Ok(Some(HostEvent::Snapshot(self.lie())))
    }

    fn caught_up(&mut self) -> Result<bool, HostError> {
        self.source.caught_up()
    }
}
