//! The bench with live frames counts frames that arrive as they should, whoever forwards them.

use fastswan_testkit::{
    cpu,
    datapath::veth::{Contestant, VethBench, VethError},
    lab,
};

const POLICIES: u32 = 100;
const FRAMES: u32 = 1 << 12;

/// Up to two CPUs that this process may run on.
fn cpus() -> Vec<usize> {
    cpu::allowed().unwrap().into_iter().take(2).collect()
}

#[test]
fn live_frames_arrive_rewritten_and_in_full_whoever_forwards_them() {
    if !lab::require_root("forwarding live frames") {
        return;
    }
    let cpus = cpus();
    let mut bench = VethBench::new(POLICIES, FRAMES, &cpus).unwrap();
    bench.verify().unwrap();
    let figures = bench.measure(2).unwrap();
    assert_eq!(figures.len(), cpus.len());
    for figures in figures {
        assert_eq!(figures.contestants.map(|measured| measured.contestant), Contestant::ALL);
        for measured in figures.contestants {
            assert!(measured.mpps.min > 0.0 && measured.mpps.max.is_finite(), "{measured:?}");
            // Where frames wait for another process, a queue may run over.
            assert!(measured.lost.max < 0.5, "{measured:?}");
        }
    }
}

#[test]
fn a_packet_that_the_kernel_forwards_in_the_programs_place_is_noticed() {
    if !lab::require_root("forwarding live frames without a policy") {
        return;
    }
    let mut bench = VethBench::new(POLICIES, FRAMES, &cpus()[..1]).unwrap();
    bench.remove_from_table(7).unwrap();
    match bench.verify().unwrap_err() {
        VethError::NotByProgram { contestant: Contestant::Ours, forwarded, arrived, passed } => {
            assert!(forwarded < arrived, "{forwarded} of {arrived}");
            let missing = passed.iter().find(|(reason, _)| *reason == "no_policy").unwrap().1;
            assert!(missing >= arrived - forwarded, "{passed:?}");
        }
        other => panic!("{other}"),
    }
}
