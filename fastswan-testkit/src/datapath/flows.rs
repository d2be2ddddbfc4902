//! The packets that programs are measured with.

use std::{fmt, net::IpAddr};

use fastswan::policy::Family;
use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};

use super::mix::Mix;

/// The same flows in every run.
const SEED: u64 = 14;
/// Policies whose packets stay in the processor's nearest caches, and their flows.
const WARM_POLICIES: u32 = 16;
const WARM_FLOWS: u32 = 1 << 12;

/// How much of what is looked up lies in the processor's caches already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temperature {
    /// Random packets of all policies.
    Cold,
    /// 4,096 flows of 16 policies, over and over: their entries and the flows fit into the first two caches.
    Warm,
    /// Random packets of policies that have shares as of Zipf's law: the n-th has 1/n of the first's, and which is the n-th is
    /// random.
    Zipf,
}

impl Temperature {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cold, Self::Warm, Self::Zipf];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Zipf => "zipf",
        }
    }

    /// Random flows, at most as many as asked for, which is a power of two.
    pub(super) fn flows(self, mix: Mix, family: Family, policies: u32, most: u32) -> Vec<Flow> {
        let mut rng = SmallRng::seed_from_u64(SEED);
        let flow = |rng: &mut SmallRng, number| Flow {
            source: address(rng, mix.sources(family, number)),
            destination: address(rng, mix.networks(family, number).1),
        };
        match self {
            Self::Cold => (0..most)
                .map(|_| {
                    let number = rng.random_range(0..policies);
                    flow(&mut rng, number)
                })
                .collect(),
            Self::Warm => {
                let warm = policies.min(WARM_POLICIES);
                (0..most.min(WARM_FLOWS))
                    .map(|_| {
                        // Far from each other.
                        let number = rng.random_range(0..warm) * (policies / warm);
                        flow(&mut rng, number)
                    })
                    .collect()
            }
            Self::Zipf => {
                let mut ranked: Vec<u32> = (0..policies).collect();
                ranked.shuffle(&mut rng);
                let mut total = 0.0;
                let shares: Vec<f64> = (1..=policies)
                    .map(|rank| {
                        total += 1.0 / f64::from(rank);
                        total
                    })
                    .collect();
                (0..most)
                    .map(|_| {
                        let chosen = rng.random_range(0.0..total);
                        let rank = shares.partition_point(|share| *share <= chosen);
                        let number = ranked[rank.min(ranked.len() - 1)];
                        flow(&mut rng, number)
                    })
                    .collect()
            }
        }
    }
}

/// Packets from one address to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.source, self.destination)
    }
}

/// A random address of a network.
pub(super) fn address(rng: &mut SmallRng, network: IpNet) -> IpAddr {
    match network {
        IpNet::V4(network) => {
            let host: u32 = rng.random();
            IpAddr::V4((network.network().to_bits() | host & network.hostmask().to_bits()).into())
        }
        IpNet::V6(network) => {
            let host: u128 = rng.random();
            IpAddr::V6((network.network().to_bits() | host & network.hostmask().to_bits()).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn by_destination(temperature: Temperature, policies: u32) -> Vec<usize> {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for flow in temperature.flows(Mix::Pool, Family::V4, policies, 1 << 12) {
            *counts.entry(flow.destination).or_default() += 1;
        }
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable_by(|one, other| other.cmp(one));
        counts
    }

    #[test]
    fn cold_flows_are_of_all_policies_and_warm_ones_of_few() {
        assert_eq!(by_destination(Temperature::Cold, 100).len(), 100);
        assert_eq!(by_destination(Temperature::Warm, 100).len(), 16);
        assert_eq!(by_destination(Temperature::Warm, 1).len(), 1);
    }

    #[test]
    fn shares_of_policies_follow_zipfs_law() {
        let counts = by_destination(Temperature::Zipf, 100);
        // 1 / (1 + 1/2 + … + 1/100) of 4,096 is 790.
        assert!((700..880).contains(&counts[0]), "{counts:?}");
        assert!((350..440).contains(&counts[1]), "{counts:?}");
    }

    #[test]
    fn flows_are_in_the_networks_of_policies_and_the_same_each_time() {
        for mix in Mix::ALL {
            for &family in mix.families() {
                let flows = Temperature::Cold.flows(mix, family, 64, 256);
                for flow in &flows {
                    let of = (0..64).filter(|&number| {
                        let (source, destination) = mix.networks(family, number);
                        source.contains(&flow.source) && destination.contains(&flow.destination)
                    });
                    assert_eq!(of.count(), 1, "{}: {flow}", mix.name());
                }
                assert_eq!(flows, Temperature::Cold.flows(mix, family, 64, 256));
            }
        }
    }
}
