//! What becomes of policies.

use fastswan::PassReason;

/// What the policies of a group go through, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Steady,
    /// They are given to the other device, with another next hop.
    Moves,
    /// They are removed, and added again with another next hop.
    ComesAndGoes,
    /// Their associations are removed, and come back when the policy has been given to the other device.
    LosesAssociation,
    /// A more specific software policy shadows a part of each, which the packets are of, and goes again.
    Shadowed,
    /// Likewise, but two software policies take turns: the packets are of what both shadow, and must never be forwarded.
    AlwaysShadowed,
}

impl Kind {
    /// How many there are.
    pub(super) const COUNT: u32 = 6;

    /// All of them.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::Steady,
        Self::Moves,
        Self::ComesAndGoes,
        Self::LosesAssociation,
        Self::Shadowed,
        Self::AlwaysShadowed,
    ];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Moves => "moves",
            Self::ComesAndGoes => "comes and goes",
            Self::LosesAssociation => "loses association",
            Self::Shadowed => "shadowed",
            Self::AlwaysShadowed => "always shadowed",
        }
    }

    /// How many versions a change makes: packets are forwarded in even ones and pass in odd ones.
    pub(super) fn stride(self) -> u32 {
        if self == Self::Moves { 2 } else { 1 }
    }

    /// Why packets pass that are to pass; `None` if none are.
    pub(super) fn reason(self) -> Option<PassReason> {
        match self {
            Self::Steady | Self::Moves => None,
            Self::ComesAndGoes => Some(PassReason::NoPolicy),
            Self::LosesAssociation => Some(PassReason::NoSa),
            Self::Shadowed | Self::AlwaysShadowed => Some(PassReason::Shadowed),
        }
    }
}
