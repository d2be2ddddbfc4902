//! How fast a change of a policy gets from the event into the table, at several numbers of policies of several kinds
//! of gateways, and how long it takes to begin with all of them.
//!
//! The table is a `MemoryTable`; a `BpfTable` is written by the same code, into mapped memory. Set `POLICIES` to
//! measure at other numbers: `POLICIES=1000000 cargo bench --bench policy_changes`.

use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use fastswan::{Policy, PolicyEvent};
use fastswan_benches::mixes::{Mirror, Mix};

/// Policies that come and go.
const LATER: u32 = 1000;

fn sizes() -> Vec<u32> {
    match std::env::var("POLICIES") {
        Ok(sizes) => sizes.split(',').filter_map(|size| size.trim().parse().ok()).collect(),
        Err(_) => vec![1_000, 10_000, 100_000],
    }
}

fn policy_changes(criterion: &mut Criterion) {
    let sizes = sizes();
    let mut group = criterion.benchmark_group("policy_changes");
    for mix in Mix::ALL {
        for &size in &sizes {
            let mut mirror = Mirror::with(mix, size, LATER);
            let later: Vec<Policy> = (size..size + LATER).map(|number| mix.policy(number)).collect();
            let id = |what| BenchmarkId::new(format!("{}, {what}", mix.name()), size);
            // Each policy is added, changed and removed again; one of the three is timed.
            for (timed, what) in ["add", "update", "remove"].into_iter().enumerate() {
                group.bench_function(id(what), |bencher| {
                    bencher.iter_custom(|iterations| {
                        let mut sum = Duration::ZERO;
                        for policy in
                            later.iter().cycle().take(usize::try_from(iterations).unwrap_or(usize::MAX))
                        {
                            let changed = Policy { index: 1, use_limited: true, ..policy.clone() };
                            let events = [
                                PolicyEvent::Policy(policy.clone()),
                                PolicyEvent::Policy(changed),
                                PolicyEvent::PolicyRemoved(policy.id.clone()),
                            ];
                            for (number, event) in events.into_iter().enumerate() {
                                let start = Instant::now();
                                mirror.take(event);
                                if number == timed {
                                    sum += start.elapsed();
                                }
                            }
                        }
                        sum
                    });
                });
            }
        }
    }
    group.finish();

    let mut group = criterion.benchmark_group("build");
    group.sample_size(10);
    for mix in Mix::ALL {
        for &size in &sizes {
            let snapshot = mix.snapshot(size);
            group.bench_function(BenchmarkId::new(mix.name(), size), |bencher| {
                bencher.iter_batched(
                    || (Mirror::new(size), PolicyEvent::Snapshot(snapshot.clone())),
                    |(mut mirror, snapshot)| {
                        mirror.take(snapshot);
                        // Dropping it is not part of it.
                        mirror
                    },
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

criterion_group!(benches, policy_changes);
criterion_main!(benches);
