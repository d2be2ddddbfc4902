//! What packets are aimed at.

use ipnet::IpNet;

/// What packets are aimed at, beside the policies.
#[derive(Clone, Debug, Default)]
pub(super) struct Aims {
    pub(super) destinations: Vec<IpNet>,
    pub(super) sources: Vec<IpNet>,
    pub(super) tos: Vec<u8>,
    pub(super) ports: Vec<u16>,
    pub(super) lengths: Vec<usize>,
    /// Half of all packets are neighbour solicitations.
    pub(super) solicitations: bool,
}

impl Aims {
    pub(super) fn add(&mut self, other: &Self) {
        self.destinations.extend(&other.destinations);
        self.sources.extend(&other.sources);
        self.tos.extend(&other.tos);
        self.ports.extend(&other.ports);
        self.lengths.extend(&other.lengths);
        self.solicitations |= other.solicitations;
    }
}
