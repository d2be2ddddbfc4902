//! What one change of a policy costs, from the event to the table, and what all policies take: figures that a mean
//! does not tell. `cargo bench --bench policy_scale`, with the number of policies as an argument.
//!
//! The table is a `MemoryTable`; a `BpfTable` is written by the same code, into mapped memory.

use std::time::{Duration, Instant};

use fastswan::{
    Compiler, Database, HostFacts, MemoryTable, Policy, PolicyEvent, Selector, Snapshot,
    policy::Family,
    table::{Change, TableConfig},
};
use fastswan_benches::mixes::{Mirror, Mix, association};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// Changes of each kind that are timed.
const CHANGES: u32 = 2_000;

/// How long each event takes.
fn times(mirror: &mut Mirror, events: impl Iterator<Item = PolicyEvent>) -> Percentiles {
    Percentiles::of(events.map(|event| time(mirror, event)).collect())
}

fn time(mirror: &mut Mirror, event: PolicyEvent) -> Duration {
    let start = Instant::now();
    mirror.take(event);
    start.elapsed()
}

struct Percentiles {
    median: Duration,
    p99: Duration,
    max: Duration,
}

impl Percentiles {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self {
            median: times[times.len() / 2],
            p99: times[times.len() * 99 / 100],
            max: times[times.len() - 1],
        }
    }
}

fn main() {
    let sizes: Vec<u32> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![1_000, 10_000, 100_000] } else { sizes };
    println!(
        "| mix | policies | build ms | add µs: median, p99, max | update | remove | highest priority ms | policy over all ms | bytes of memory per policy | of maps |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for mix in Mix::ALL {
        for &size in &sizes {
            measure(mix, size);
        }
    }
}

fn measure(mix: Mix, size: u32) {
    let mut mirror = Mirror::new(size + CHANGES);
    let later: Vec<Policy> = (size..size + CHANGES).map(|number| mix.policy(number)).collect();
    let snapshot = || {
        let mut snapshot = mix.snapshot(size);
        snapshot.sas.extend(later.iter().filter_map(association));
        snapshot
    };
    // Associations first: what they take is not the policies'.
    let associations = Snapshot { policies: Vec::new(), ..snapshot() };
    time(&mut mirror, PolicyEvent::Snapshot(associations));
    let before = ALLOCATED.current_usage();
    let count = size as usize;
    let build = PolicyEvent::Snapshot(snapshot());
    let build = time(&mut mirror, build);
    let memory = ALLOCATED.current_usage().saturating_sub(before);

    let add = times(&mut mirror, later.iter().map(|policy| PolicyEvent::Policy(policy.clone())));
    let changed = later.iter().map(|policy| Policy { index: 9, use_limited: true, ..policy.clone() });
    let update = times(&mut mirror, changed.map(PolicyEvent::Policy));
    let remove = times(&mut mirror, later.iter().map(|policy| PolicyEvent::PolicyRemoved(policy.id.clone())));

    // A policy far from all others with the highest priority number, and one over everything.
    let mut highest = Mix::SiteToSite.policy(0);
    let far = |net: &str| net.parse().expect("a prefix");
    highest.id.selector =
        Selector::between(far("203.0.113.0/25"), far("203.0.113.128/25")).expect("one family");
    let highest = |priority| PolicyEvent::Policy(Policy { priority, ..highest.clone() });
    let highest = Percentiles::of((0..9).map(|n| time(&mut mirror, highest(300 + n))).collect());
    let mut over_all = Mix::SiteToSite.policy(0);
    over_all.offload = None;
    over_all.id.selector = Selector::between(far("0.0.0.0/0"), far("0.0.0.0/0")).expect("one family");
    let add_over_all = time(&mut mirror, PolicyEvent::Policy(Policy { priority: 1, ..over_all.clone() }));
    let remove_over_all = time(&mut mirror, PolicyEvent::PolicyRemoved(over_all.id));

    // The table that holds just these.
    let mut database = Database::default();
    database.apply(PolicyEvent::Snapshot(mix.snapshot(size)));
    let mut compiler = Compiler::new(Mirror::config(size).capacity());
    compiler.set_host(&HostFacts::vouched());
    let all = compiler.compile(&database);
    let count_of = |counts: &dyn Fn(&Change) -> bool| {
        u32::try_from(all.changes().filter(counts).count()).unwrap_or(u32::MAX)
    };
    let cells = |family| {
        count_of(&|change| match change {
            Change::Cell(cell, _) => Family::of(&cell.destination) == family,
            Change::Guard(guard, _) => Family::of(guard) == family,
            _ => false,
        })
    };
    let config = TableConfig {
        cells_v4: cells(Family::V4),
        cells_v6: cells(Family::V6),
        exceptions: count_of(&|change| matches!(change, Change::Exception(..))),
        slots: count_of(&|change| matches!(change, Change::Slot(..))),
    };
    let before = ALLOCATED.current_usage();
    let table = MemoryTable::new(&config);
    let maps = (ALLOCATED.current_usage() - before) / count;
    drop(table);

    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let us = |times: &Percentiles| {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        format!("{:.1}, {:.1}, {:.0}", us(times.median), us(times.p99), us(times.max))
    };
    println!(
        "| {} | {count} | {:.0} | {} | {} | {} | {:.1} | {:.0}, {:.0} | {} | {} |",
        mix.name(),
        ms(build),
        us(&add),
        us(&update),
        us(&remove),
        ms(highest.median),
        ms(add_over_all),
        ms(remove_over_all),
        memory / count,
        maps,
    );
}
