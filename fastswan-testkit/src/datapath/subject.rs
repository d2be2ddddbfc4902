//! The programs under test.

use std::fmt;

/// A program under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Returns at once.
    Empty,
    /// Does what every program must that forwards.
    Floor,
    /// Finds the policy by two longest-prefix matches.
    Lpm,
    /// fastswan's.
    Ours,
}

impl Subject {
    /// All of them.
    pub(super) const ALL: [Self; 4] = [Self::Empty, Self::Floor, Self::Lpm, Self::Ours];

    /// Whether it changes the frame.
    pub(super) fn forwards(self) -> bool {
        self != Self::Empty
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::Floor => "floor",
            Self::Lpm => "lpm",
            Self::Ours => "fastswan",
        })
    }
}
