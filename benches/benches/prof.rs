//! Scratch.
use fastswan::{Compiler, Database, HostFacts, MemoryTable, OffloadTable, PolicyEvent, Snapshot};
use fastswan_benches::mixes::{Mirror, Mix, association};
use std::time::Instant;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mix = Mix::ALL[args[1].parse::<usize>().unwrap()];
    let size: u32 = args[2].parse().unwrap();
    let rounds: u32 = args[3].parse().unwrap();
    let _ = association;
    let snapshot = mix.snapshot(size);
    let mut best = [f64::MAX; 4];
    for _ in 0..rounds {
        let s = snapshot.clone();
        let mut database = Database::default();
        database.apply(PolicyEvent::Snapshot(Snapshot { policies: vec![], ..s.clone() }));
        let mut table = MemoryTable::new(&Mirror::config(size));
        let mut compiler = Compiler::new(Mirror::config(size).capacity());
        compiler.set_host(&HostFacts::vouched());
        let t0 = Instant::now();
        database.apply(PolicyEvent::Snapshot(s));
        let t1 = Instant::now();
        let update = compiler.compile(&database);
        let t2 = Instant::now();
        table.apply(&update).unwrap();
        let t3 = Instant::now();
        for (b, d) in best.iter_mut().zip([t1 - t0, t2 - t1, t3 - t2, t3 - t0]) {
            *b = b.min(d.as_secs_f64() * 1e3);
        }
    }
    println!(
        "{} database {:.1} compile {:.1} write {:.1} all {:.1}",
        mix.name(),
        best[0],
        best[1],
        best[2],
        best[3]
    );
}
