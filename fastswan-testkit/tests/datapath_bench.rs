//! The bench of the data path measures programs that forward, and nothing else.

use fastswan::policy::Family;
use fastswan_testkit::{
    datapath::{Ablation, Bench, DatapathError, DatapathLab, Mix, Subject, Temperature},
    lab,
};

const POLICIES: u32 = 100;
const PACKETS: u32 = 1 << 12;

/// Runs a story in the gateway of a lab, with the index of its device.
fn story(what: &str, tell: impl FnOnce(u32) + Send) {
    if lab::require_root(what) {
        DatapathLab::new().unwrap().enter(tell).unwrap();
    }
}

fn bench(mix: Mix, family: Family, device: u32) -> Bench {
    let mut bench = Bench::new(mix, family, POLICIES, PACKETS, device).unwrap();
    bench.set_temperature(Temperature::Cold).unwrap();
    bench
}

#[test]
fn every_program_forwards_every_flow_of_every_mix() {
    story("the data path forwards all mixes", |device| {
        for mix in Mix::ALL {
            for &family in mix.families() {
                let mut bench = bench(mix, family, device);
                for temperature in Temperature::ALL {
                    let what = (mix.name(), family, temperature.name());
                    bench.set_temperature(temperature).unwrap();
                    bench.verify().unwrap_or_else(|error| panic!("{what:?}: {error}"));
                    let round = bench.measure().unwrap_or_else(|error| panic!("{what:?}: {error}"));
                    assert!((round.lpm / round.ours).is_finite(), "{what:?}: {round:?}");
                }
            }
        }
    });
}

#[test]
fn a_table_that_lacks_a_policy_is_noticed() {
    story("a policy is missing in the table", |device| {
        for family in [Family::V4, Family::V6] {
            let mut bench = bench(Mix::SiteToSite, family, device);
            bench.verify().unwrap();
            bench.remove_from_table(7).unwrap();
            match bench.verify().unwrap_err() {
                DatapathError::Passed { program: Subject::Ours, forwarded, passed, .. } => {
                    let missing = u64::from(PACKETS) - forwarded;
                    assert!(missing > 0);
                    assert_eq!(passed, [("no_policy", missing)]);
                }
                other => panic!("{other}"),
            }
            assert!(bench.measure().is_err(), "nor is it measured");
        }
    });
}

#[test]
fn tries_that_lack_a_policy_are_noticed() {
    story("a policy is missing in the tries", |device| {
        for family in [Family::V4, Family::V6] {
            let mut bench = bench(Mix::SiteToSite, family, device);
            bench.remove_from_tries(7).unwrap();
            let error = bench.verify().unwrap_err();
            assert!(matches!(error, DatapathError::Passed { program: Subject::Lpm, .. }), "{error}");
        }
    });
}

#[test]
fn every_check_is_left_out_in_turn() {
    story("each check is left out", |device| {
        for family in [Family::V4, Family::V6] {
            let mix = Mix::SiteToSite;
            let ablation = Ablation { mix, family, policies: POLICIES, packets: PACKETS, device };
            let costs = ablation.measure(1).unwrap();
            assert!(costs.whole.median.is_finite() && costs.checks.len() > 10, "{costs:?}");
        }
    });
}
