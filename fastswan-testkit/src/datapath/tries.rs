//! The policies as `lpm` looks them up.

use std::{
    collections::{HashMap, hash_map::Entry},
    thread::sleep,
    time::Duration,
};

use aya::{
    Ebpf, Pod,
    maps::{LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use fastswan::policy::Family;
use ipnet::IpNet;

use super::error::DatapathError;

type Trie<const N: usize> = LpmTrie<MapData, [u8; N], u32>;

/// The two tries of a family: from destinations to the numbers of their prefixes, and from these and sources to policies.
pub(super) enum Tries {
    V4 { destinations: Trie<4>, policies: Trie<8> },
    V6 { destinations: Trie<16>, policies: Trie<20> },
}

/// How long the kernel is given to make room for an entry.
const A_MOMENT: Duration = Duration::from_millis(1);
const MOST_TRIES: u32 = 1000;

/// Bits of the number of a destination prefix, which stands before a source.
const NUMBER_BITS: u32 = 32;

impl Tries {
    /// Those of the loaded programs.
    pub(super) fn take(ebpf: &mut Ebpf, family: Family) -> Result<Self, DatapathError> {
        Ok(match family {
            Family::V4 => Self::V4 {
                destinations: take(ebpf, "DESTINATIONS_V4")?,
                policies: take(ebpf, "POLICIES_V4")?,
            },
            Family::V6 => Self::V6 {
                destinations: take(ebpf, "DESTINATIONS_V6")?,
                policies: take(ebpf, "POLICIES_V6")?,
            },
        })
    }

    /// Writes sources and destinations of policies, whose numbers are their indices. Policies with the same destination
    /// share the number of its prefix.
    pub(super) fn fill(
        &mut self,
        policies: impl Iterator<Item = (IpNet, IpNet)>,
    ) -> Result<(), DatapathError> {
        let mut numbers: HashMap<IpNet, u32> = HashMap::new();
        for (policy, (source, destination)) in (0_u32..).zip(policies) {
            let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
            let number = match numbers.entry(destination) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => {
                    self.insert_destination(destination, *entry.insert(next))?;
                    next
                }
            };
            self.insert_policy(number, source, policy)?;
        }
        Ok(())
    }

    /// Removes all policies for a destination.
    pub(super) fn remove(&mut self, destination: IpNet) -> Result<(), DatapathError> {
        let length = u32::from(destination.prefix_len());
        match (self, destination) {
            (Self::V4 { destinations, .. }, IpNet::V4(net)) => {
                destinations.remove(&Key::new(length, net.network().octets())).map_err(failed)
            }
            (Self::V6 { destinations, .. }, IpNet::V6(net)) => {
                destinations.remove(&Key::new(length, net.network().octets())).map_err(failed)
            }
            _ => Err(other_family()),
        }
    }

    /// The number is in network order, as the program compares it.
    fn insert_destination(&mut self, destination: IpNet, number: u32) -> Result<(), DatapathError> {
        let length = u32::from(destination.prefix_len());
        match (self, destination) {
            (Self::V4 { destinations, .. }, IpNet::V4(net)) => {
                insert(destinations, &Key::new(length, net.network().octets()), number.to_be())
            }
            (Self::V6 { destinations, .. }, IpNet::V6(net)) => {
                insert(destinations, &Key::new(length, net.network().octets()), number.to_be())
            }
            _ => Err(other_family()),
        }
    }

    fn insert_policy(&mut self, number: u32, source: IpNet, policy: u32) -> Result<(), DatapathError> {
        let length = NUMBER_BITS + u32::from(source.prefix_len());
        match (self, source) {
            (Self::V4 { policies, .. }, IpNet::V4(net)) => {
                insert(policies, &Key::new(length, after(number, net.network().octets())), policy)
            }
            (Self::V6 { policies, .. }, IpNet::V6(net)) => {
                insert(policies, &Key::new(length, after(number, net.network().octets())), policy)
            }
            _ => Err(other_family()),
        }
    }
}

/// Inserts an entry. The kernel keeps a few nodes ready for each CPU and makes more in the background: when it is late there
/// are none for a moment (ENOMEM).
fn insert<const N: usize>(trie: &mut Trie<N>, key: &Key<[u8; N]>, value: u32) -> Result<(), DatapathError>
where
    [u8; N]: Pod,
{
    let mut tries = 0;
    loop {
        match trie.insert(key, value, 0) {
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOMEM) && tries < MOST_TRIES =>
            {
                tries += 1;
                sleep(A_MOMENT);
            }
            result => return result.map_err(failed),
        }
    }
}

/// A key of the second trie: the number of the destination's prefix, then the source.
fn after<const S: usize, const N: usize>(number: u32, source: [u8; S]) -> [u8; N] {
    let mut key = [0; N];
    let (start, end) = key.split_at_mut(size_of::<u32>());
    start.copy_from_slice(&number.to_be_bytes());
    end.copy_from_slice(&source);
    key
}

fn take<const N: usize>(ebpf: &mut Ebpf, name: &str) -> Result<Trie<N>, DatapathError>
where
    [u8; N]: Pod,
{
    let map: Map = ebpf.take_map(name).ok_or_else(|| DatapathError::bpf(name)("there is no such map"))?;
    map.try_into().map_err(DatapathError::bpf(format!("opening the map {name}")))
}

fn failed(error: MapError) -> DatapathError {
    DatapathError::bpf("writing a policy into the tries")(error)
}

fn other_family() -> DatapathError {
    DatapathError::bpf("writing a policy into the tries")("it is of another family")
}
