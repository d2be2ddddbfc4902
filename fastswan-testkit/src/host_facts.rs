//! Facts of hosts, compared.

use std::collections::HashSet;

use fastswan::{
    HostFacts,
    host::{Route, RouteKind},
    policy::Family,
};

/// In an order of its own, which lets routes of one prefix be as they are.
#[must_use]
pub fn sorted(mut facts: HostFacts) -> HostFacts {
    // Beside a route with several next hops, a dump of IPv6 leaves out others.
    let is_unclear = |route: &Route| route.destination.addr().is_ipv6() && route.kind == RouteKind::Unclear;
    let unclear: HashSet<_> =
        facts.routes.iter().filter(|one| is_unclear(one)).map(|one| (one.table, one.destination)).collect();
    facts.routes.retain(|route| !unclear.contains(&(route.table, route.destination)));
    let unclear = unclear.into_iter().map(|(table, prefix)| Route::new(table, prefix, RouteKind::Unclear));
    facts.routes.extend(unclear);
    facts.links.sort_by_key(|link| link.ifindex);
    // Source-specific routes are in tables of their own.
    facts.routes.sort_by_key(|route| (route.table, route.destination, route.source));
    facts.rules.sort_by_key(|rule| (rule.family == Family::V6, rule.priority));
    facts.neighbours.sort_by_key(|neighbour| (neighbour.ifindex, neighbour.destination));
    facts.path_mtus.sort();
    facts.addresses.sort();
    facts
}

/// What was told and is not read, and the other way round.
#[must_use]
pub fn difference(told: &HostFacts, read: &HostFacts) -> String {
    fn lines<T: std::fmt::Debug + PartialEq>(what: &str, told: &[T], read: &[T]) -> String {
        let only = |these: &[T], those: &[T]| {
            let only: Vec<_> =
                these.iter().filter(|one| !those.contains(one)).map(|one| format!("{one:?}")).collect();
            only.join("\n    ")
        };
        if told == read {
            return String::new();
        }
        format!("{what}:\n  told {}\n  read {}\n", only(told, read), only(read, told))
    }
    lines("links", &told.links, &read.links)
        + &lines("routes", &told.routes, &read.routes)
        + &lines("rules", &told.rules, &read.rules)
        + &lines("neighbours", &told.neighbours, &read.neighbours)
        + &lines("hooks", &told.hooks, &read.hooks)
        + &lines("path MTUs", &told.path_mtus, &read.path_mtus)
        + &lines("addresses", &told.addresses, &read.addresses)
}
