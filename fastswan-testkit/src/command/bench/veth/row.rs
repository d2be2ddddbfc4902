//! A row of what is measured, for people and for programs.

use std::fmt;

use fastswan_testkit::datapath::{
    Spread,
    veth::{Figures, Measured},
};
use serde_json::{Value, json};

/// What the contestants do with some policies on some CPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) policies: u32,
    pub(super) figures: Figures,
}

/// The heads of the columns.
pub(super) const HEAD: &str =
    "policies  cpus forwards                         Mpps          fastswan/this        this/one CPU";

impl fmt::Display for Row {
    /// A line for each contestant.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policies, figures: Figures { cpus, contestants } } = self;
        let spread = |Spread { median, min, max }| format!("{median:.2} ({min:.2} to {max:.2})");
        for measured in contestants {
            let Measured { contestant, mpps, ours, scaling, lost, rounds_with_losses } = *measured;
            let scaling = if *cpus == 1 { String::new() } else { spread(scaling) };
            write!(
                f,
                "{policies:>8} {cpus:>5} {:<16} {:>20} {:>22} {scaling:>19}",
                contestant.name(),
                spread(mpps),
                spread(ours),
            )?;
            if rounds_with_losses > 0 {
                write!(f, "  lost in {rounds_with_losses} rounds: up to {:.3} %", lost.max * 100.0)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl Row {
    pub(super) fn json(&self) -> Value {
        let Self { policies, figures: Figures { cpus, contestants } } = self;
        let mut row = json!({ "policies": policies, "cpus": cpus });
        for measured in contestants {
            let Measured { contestant, mpps, ours, scaling, lost, rounds_with_losses } = *measured;
            let name = contestant.name();
            row[format!("{name}_mpps")] = mpps.median.into();
            row[format!("{name}_min_mpps")] = mpps.min.into();
            row[format!("{name}_max_mpps")] = mpps.max.into();
            for (ratio, spread) in
                [(format!("ours_to_{name}"), ours), (format!("{name}_to_one_cpu"), scaling)]
            {
                row[format!("{ratio}_min")] = spread.min.into();
                row[format!("{ratio}_max")] = spread.max.into();
                row[ratio] = spread.median.into();
            }
            row[format!("{name}_lost_max")] = lost.max.into();
            row[format!("{name}_rounds_with_losses")] = rounds_with_losses.into();
        }
        row
    }
}
