//! Where the host sends packets: rules and tables folded into one map.
//!
//! The kernel asks each rule's table in turn for the longest prefix, and goes on with the next rule if there
//! is none or if it is a `throw` route (`fib_rules_lookup`). When no rule looks at anything but the
//! destination, the answer is the same for all addresses that have the same longest prefix over all tables,
//! so one longest-prefix map holds it.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use super::{HostFacts, Route, RouteKind, Rule, RuleAction};
use crate::{policy::Family, prefix_map::PrefixMap};

/// What is known about the routes of a family.
#[derive(Clone, Debug)]
pub(crate) enum Routing {
    /// Nothing that can be relied on: there are no rules, a rule looks at more than the destination, or there
    /// are VRFs.
    Unknown,
    /// The embedder answers for it.
    Vouched,
    /// This. Addresses without a prefix are unreachable, and `Throw` does not occur.
    Known(PrefixMap<RouteKind>),
}

impl HostFacts {
    /// What is known about the routes of a family.
    pub(crate) fn routing(&self, family: Family) -> Routing {
        if self.vouched {
            return Routing::Vouched;
        }
        let mut rules: Vec<_> = self.rules.iter().filter(|rule| rule.family == family).collect();
        rules.sort_by_key(|rule| rule.priority);
        let tables: Option<Vec<u32>> = rules.iter().map(|rule| table(rule)).collect();
        match tables {
            Some(tables) if !tables.is_empty() && self.links.iter().all(|link| link.kind != "vrf") => {
                Routing::Known(flatten(&self.routes, family, &tables))
            }
            _ => Routing::Unknown,
        }
    }
}

impl Routing {
    /// Where packets to an address go, if that is known and there is a route.
    pub(crate) fn route(&self, destination: IpAddr) -> Option<RouteKind> {
        match self {
            Self::Known(routes) => routes.covering(destination.into()).next().map(|(_, kind)| *kind),
            Self::Unknown | Self::Vouched => None,
        }
    }
}

/// The table that a rule looks up for every packet.
pub(crate) fn table(rule: &Rule) -> Option<u32> {
    match rule.action {
        RuleAction::Lookup { table, suppress_prefix_length: None, suppress_group: false }
            if rule.selector.is_everything() =>
        {
            Some(table)
        }
        _ => None,
    }
}

fn flatten(routes: &[Route], family: Family, tables: &[u32]) -> PrefixMap<RouteKind> {
    let mut by_table: BTreeMap<u32, BTreeMap<IpNet, Vec<&Route>>> = BTreeMap::new();
    for route in routes.iter().filter(|route| Family::of(&route.destination) == family) {
        let prefixes = by_table.entry(route.table).or_default();
        prefixes.entry(route.destination.trunc()).or_default().push(route);
    }
    let by_table: BTreeMap<u32, PrefixMap<RouteKind>> = by_table
        .into_iter()
        .map(|(table, prefixes)| {
            let chosen = prefixes.into_iter().map(|(prefix, routes)| (prefix, choose(&routes, family)));
            (table, PrefixMap::new(chosen.collect()))
        })
        .collect();
    let asked: Vec<_> = tables.iter().filter_map(|table| by_table.get(table)).collect();
    let answer = |prefix| {
        asked
            .iter()
            .filter_map(|table| table.covering(prefix).next())
            .map(|(_, kind)| *kind)
            .find(|kind| *kind != RouteKind::Throw)
            .unwrap_or(RouteKind::Unreachable)
    };
    let prefixes = asked.iter().flat_map(|table| table.iter()).map(|(prefix, _)| prefix);
    PrefixMap::new(prefixes.map(|prefix| (prefix, answer(prefix))).collect())
}

/// The kernel's choice among routes for one prefix.
///
/// IPv4 takes the lowest metric. IPv6 may take a worse one while a next hop does not answer
/// (`rt6_select`), so routes that disagree are not clear.
fn choose(routes: &[&Route], family: Family) -> RouteKind {
    use RouteKind::{Throw, Unclear, Unicast, Unreachable};

    let best = routes.iter().map(|route| route.metric).min();
    let mut kinds = routes
        .iter()
        .filter(|route| family == Family::V6 || route.tos != 0 || Some(route.metric) == best)
        .map(|route| match route {
            Route { tos: 0, source: None, kind, .. } => *kind,
            Route { kind: Unicast { .. } | Throw, .. } => Unclear,
            Route { kind, .. } => *kind,
        });
    let Some(first) = kinds.next() else { return Unreachable };
    kinds.fold(first, |one, other| match (one, other) {
        _ if one == other => one,
        (Unicast { .. } | Unclear, Unicast { .. } | Unclear) => Unclear,
        // Which of them the kernel takes, a dump does not tell.
        (Throw, _) | (_, Throw) => Unreachable,
        (Unicast { .. } | Unclear, denied) | (denied, _) => denied,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::Link;

    const MAIN: u32 = 254;
    const LOCAL: u32 = 255;

    fn via(ifindex: u32) -> RouteKind {
        RouteKind::Unicast { ifindex, gateway: None, mtu: None }
    }

    fn route(table: u32, destination: &str, kind: RouteKind) -> Route {
        Route::new(table, destination.parse().unwrap(), kind)
    }

    fn lookup(host: &HostFacts, destination: &str) -> Option<RouteKind> {
        let destination: IpAddr = destination.parse().unwrap();
        host.routing(destination.into()).route(destination)
    }

    fn host(routes: Vec<Route>) -> HostFacts {
        let rules = [Rule::ordinary(Family::V4), Rule::ordinary(Family::V6)].concat();
        HostFacts { routes, rules, ..HostFacts::default() }
    }

    #[test]
    fn an_own_address_wins_over_a_longer_route_of_a_later_table() {
        let host = host(vec![
            route(MAIN, "0.0.0.0/0", via(1)),
            route(MAIN, "127.0.0.1/32", via(1)),
            route(LOCAL, "127.0.0.0/8", RouteKind::Local),
        ]);
        assert_eq!(lookup(&host, "127.0.0.1"), Some(RouteKind::Local));
        assert_eq!(lookup(&host, "192.0.2.1"), Some(via(1)));
        assert_eq!(lookup(&host, "2001:db8::1"), None);
    }

    #[test]
    fn a_throw_route_goes_on_with_the_next_table_and_ends_nowhere_without_one() {
        let mut host = host(vec![
            route(100, "10.0.0.0/8", RouteKind::Throw),
            route(100, "0.0.0.0/0", via(2)),
            route(MAIN, "10.1.0.0/16", via(1)),
        ]);
        host.rules.push(Rule::lookup(Family::V4, 100, 100));
        assert_eq!(lookup(&host, "10.1.0.1"), Some(via(1)));
        assert_eq!(lookup(&host, "10.2.0.1"), Some(RouteKind::Unreachable));
        assert_eq!(lookup(&host, "192.0.2.1"), Some(via(2)));
    }

    #[test]
    fn the_lower_metric_wins_for_ipv4_and_disagreeing_routes_are_unclear_for_ipv6() {
        let metric = |metric, route| Route { metric, ..route };
        let host = host(vec![
            metric(5, route(MAIN, "10.0.0.0/8", via(2))),
            metric(1, route(MAIN, "10.0.0.0/8", via(1))),
            metric(1, route(MAIN, "10.1.0.0/16", via(1))),
            metric(1, route(MAIN, "10.1.0.0/16", via(2))),
            metric(5, route(MAIN, "2001:db8::/32", via(2))),
            metric(1, route(MAIN, "2001:db8::/32", via(1))),
            metric(1, route(MAIN, "2001:db8:1::/48", via(1))),
            metric(1, route(MAIN, "2001:db8:1::/48", RouteKind::Blackhole)),
        ]);
        assert_eq!(lookup(&host, "10.0.0.1"), Some(via(1)));
        assert_eq!(lookup(&host, "10.1.0.1"), Some(RouteKind::Unclear));
        assert_eq!(lookup(&host, "2001:db8::1"), Some(RouteKind::Unclear));
        assert_eq!(lookup(&host, "2001:db8:1::1"), Some(RouteKind::Blackhole));
    }

    #[test]
    fn routes_are_unknown_without_rules_with_a_rule_for_some_packets_and_with_a_vrf() {
        let known = host(vec![route(MAIN, "0.0.0.0/0", via(1)), route(MAIN, "::/0", via(1))]);
        assert!(matches!(known.routing(Family::V4), Routing::Known(_)));

        let without_rules = HostFacts { rules: Vec::new(), ..known.clone() };
        assert!(matches!(without_rules.routing(Family::V4), Routing::Unknown));

        let mut policy_routing = known.clone();
        policy_routing.rules.push(Rule { action: RuleAction::Unclear, ..Rule::lookup(Family::V4, 10, 10) });
        assert!(matches!(policy_routing.routing(Family::V4), Routing::Unknown));
        assert!(matches!(policy_routing.routing(Family::V6), Routing::Known(_)), "the other family is clear");

        let vrf = Link { kind: "vrf".to_owned(), ..Link::default() };
        let with_vrf = HostFacts { links: vec![vrf], ..known };
        assert!(matches!(with_vrf.routing(Family::V4), Routing::Unknown));

        assert!(matches!(HostFacts::vouched().routing(Family::V4), Routing::Vouched));
    }

    fn routes() -> impl Strategy<Value = Vec<Route>> {
        let kind = prop_oneof![
            (1..3u32).prop_map(via),
            Just(RouteKind::Throw),
            Just(RouteKind::Local),
            Just(RouteKind::Blackhole),
        ];
        let route =
            (0..3u32, 0..16u8, 28..=32u8, 0..2u32, kind).prop_map(|(table, host, length, metric, kind)| {
                let destination = format!("10.0.0.{host}/{length}").parse::<IpNet>().unwrap().trunc();
                Route { metric, ..Route::new(table, destination, kind) }
            });
        proptest::collection::vec(route, 0..12)
    }

    proptest! {
        /// One lookup in the map gives what asking table after table gives.
        #[test]
        fn the_map_answers_as_the_tables_do(routes in routes()) {
            let rules = [2, 0, 1].map(|table| Rule::lookup(Family::V4, 0, table));
            let host = HostFacts { routes: routes.clone(), rules: rules.to_vec(), ..HostFacts::default() };
            let routing = host.routing(Family::V4);
            for last in 0..16u8 {
                let address: IpAddr = [10, 0, 0, last].into();
                let mut expected = RouteKind::Unreachable;
                for table in [2, 0, 1] {
                    let longest = routes
                        .iter()
                        .filter(|route| route.table == table && route.destination.contains(&address))
                        .max_by_key(|route| (route.destination.prefix_len(), std::cmp::Reverse(route.metric)));
                    let Some(longest) = longest else { continue };
                    let rivals: Vec<_> = routes
                        .iter()
                        .filter(|r| (r.table, r.destination, r.metric) == (table, longest.destination, longest.metric))
                        .collect();
                    if rivals.iter().any(|rival| rival.kind != longest.kind) {
                        expected = RouteKind::Unclear;
                        break;
                    }
                    if longest.kind != RouteKind::Throw {
                        expected = longest.kind;
                        break;
                    }
                }
                let found = routing.route(address).unwrap_or(RouteKind::Unreachable);
                // Which of two contradicting routes of one metric is older, a dump does not tell.
                if expected == RouteKind::Unclear {
                    prop_assert!(!matches!(found, RouteKind::Unicast { .. }), "{address}: {found:?}");
                } else {
                    prop_assert_eq!(found, expected, "{}", address);
                }
            }
        }
    }
}
