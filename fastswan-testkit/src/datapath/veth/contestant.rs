//! What forwards.

use std::fmt;

use super::super::subject::Subject;

/// What forwards in the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// An XDP program that does what every program must that forwards.
    Floor,
    /// An XDP program that finds the policy by two longest-prefix matches.
    Lpm,
    /// fastswan's, with its table and all its checks.
    Ours,
    /// The kernel, without XDP and without policies.
    Kernel,
    /// The kernel, without XDP, with as many outbound policies as the others know. They have no templates: the kernel looks up
    /// the packet's policy, and forwards the packet as it is.
    KernelPolicies,
}

impl Contestant {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Floor, Self::Lpm, Self::Ours, Self::Kernel, Self::KernelPolicies];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Lpm => "lpm",
            Self::Ours => "ours",
            Self::Kernel => "kernel",
            Self::KernelPolicies => "kernel_policies",
        }
    }

    /// The program, if it is one.
    pub(super) fn program(self) -> Option<Subject> {
        match self {
            Self::Floor => Some(Subject::Floor),
            Self::Lpm => Some(Subject::Lpm),
            Self::Ours => Some(Subject::Ours),
            Self::Kernel | Self::KernelPolicies => None,
        }
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
