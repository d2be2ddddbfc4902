//! How fast the data path's tables take changes, against the ways that need system calls.
//!
//! Every measurement replaces the verdicts of 1,000 site-to-site cells among the number that the table
//! holds, IPv4 /24 to /24, or adds or removes an exception for each of 1,000 sites. Needs root.

use std::{hint::black_box, net::Ipv4Addr};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastswan::{
    MemoryTable, OffloadTable, XdpForwarder,
    policy::PortMatch,
    table::{Cell, Change, Exception, Probes, Slot, TableConfig, TableUpdate, Verdict},
};
use fastswan_benches::sys::{KernelMap, Kind};
use ipnet::{IpNet, Ipv4Net};

/// Cells that one iteration writes.
const WRITES: u32 = 1000;
/// Cells in the table.
const SIZES: [u32; 3] = [1_000, 10_000, 100_000];

fn site(number: u32, network: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from(u32::from(network) << 28 | number << 8), 24)
}

fn update(numbers: impl Iterator<Item = u32>, slot: u32) -> TableUpdate {
    let verdict = Verdict::Fast { slot: Slot(slot), probes: Probes::default() };
    let cell = |number| Cell { destination: IpNet::V4(site(number, 1)), source: IpNet::V4(site(number, 2)) };
    numbers.map(|n| Change::Cell(cell(n), Some(verdict))).collect()
}

fn table<T: OffloadTable>(criterion: &mut Criterion, name: &str, make: impl Fn(&TableConfig) -> T) {
    let mut group = criterion.benchmark_group("map_updates");
    group.throughput(Throughput::Elements(WRITES.into()));
    for size in SIZES {
        let mut table = make(&TableConfig { cells_v4: size, cells_v6: size, exceptions: 64, slots: 4 });
        table.apply(&update(0..size, 0)).expect("room");
        let batches = [update(0..WRITES, 1), update(0..WRITES, 2)];
        let mut turn = 0;
        group.bench_function(BenchmarkId::new(format!("{name}, one batch"), size), |bencher| {
            bencher.iter(|| {
                turn ^= 1;
                table.apply(black_box(&batches[turn])).expect("room");
            });
        });
        let singles: [Vec<TableUpdate>; 2] =
            [1, 2].map(|slot| (0..WRITES).map(|number| update(number..=number, slot)).collect());
        group.bench_function(BenchmarkId::new(format!("{name}, one by one"), size), |bencher| {
            bencher.iter(|| {
                turn ^= 1;
                for single in &singles[turn] {
                    table.apply(black_box(single)).expect("room");
                }
            });
        });
    }
    group.finish();
}

fn exceptions<T: OffloadTable>(criterion: &mut Criterion, name: &str, make: impl Fn(&TableConfig) -> T) {
    let mut group = criterion.benchmark_group("map_updates");
    group.throughput(Throughput::Elements(WRITES.into()));
    let mut table = make(&TableConfig { cells_v4: 64, cells_v6: 64, exceptions: WRITES, slots: 4 });
    let update = |number, there| {
        let exception = Exception {
            cell: Cell { destination: IpNet::V4(site(number, 1)), source: IpNet::V4(site(number, 2)) },
            protocol: 17,
            source_port: PortMatch::default(),
            destination_port: PortMatch::exactly(4500),
        };
        TableUpdate::from(Change::Exception(exception, there))
    };
    let updates: [Vec<TableUpdate>; 2] =
        [true, false].map(|there| (0..WRITES).map(|number| update(number, there)).collect());
    let mut turn = 1;
    group.bench_function(format!("{name}, exceptions one by one"), |bencher| {
        bencher.iter(|| {
            turn ^= 1;
            for update in &updates[turn] {
                table.apply(black_box(update)).expect("room");
            }
        });
    });
    group.finish();
}

fn kernel_map<const K: usize>(
    criterion: &mut Criterion,
    name: &str,
    kind: Kind,
    key: impl Fn(u32) -> [u8; K],
) {
    let mut group = criterion.benchmark_group("map_updates");
    group.throughput(Throughput::Elements(WRITES.into()));
    for size in SIZES {
        let map = KernelMap::create(kind, size).expect("creating a BPF map needs root");
        let keys: Vec<[u8; K]> = (0..size).map(&key).collect();
        map.update_batch(&keys, &vec![0; keys.len()]).expect("room");
        let keys = &keys[..WRITES as usize];
        let values = [vec![1; keys.len()], vec![2; keys.len()]];
        let mut turn = 0;
        group.bench_function(BenchmarkId::new(format!("{name}, one batch"), size), |bencher| {
            bencher.iter(|| {
                turn ^= 1;
                map.update_batch(black_box(keys), &values[turn]).expect("room");
            });
        });
        group.bench_function(BenchmarkId::new(format!("{name}, one by one"), size), |bencher| {
            bencher.iter(|| {
                turn ^= 1;
                for (key, value) in keys.iter().zip(&values[turn]) {
                    map.update(black_box(key), *value).expect("room");
                }
            });
        });
    }
    group.finish();
}

/// Both prefixes in one key, as a hash would have them.
fn hash_key(number: u32) -> [u8; 8] {
    let (source, destination) = (u32::from(site(number, 2).network()), u32::from(site(number, 1).network()));
    (u64::from(destination) << 32 | u64::from(source)).to_ne_bytes()
}

/// The destination prefix, as a trie would have it.
fn trie_key(number: u32) -> [u8; 8] {
    let mut key = [0; 8];
    key[..4].copy_from_slice(&24_u32.to_ne_bytes());
    key[4..].copy_from_slice(&site(number, 1).network().octets());
    key
}

fn map_updates(criterion: &mut Criterion) {
    table(criterion, "MemoryTable", MemoryTable::new);
    table(criterion, "BpfTable", |config| XdpForwarder::load(config).expect("loading needs root").1);
    exceptions(criterion, "BpfTable", |config| XdpForwarder::load(config).expect("loading needs root").1);
    kernel_map(criterion, "BPF hash", Kind::Hash, hash_key);
    kernel_map(criterion, "BPF LPM trie", Kind::LpmTrie, trie_key);
}

criterion_group!(benches, map_updates);
criterion_main!(benches);
