//! A row of what is measured, for people and for programs.

use std::fmt;

use fastswan::policy::Family;
use fastswan_testkit::datapath::{Figures, Mix, Spread, Temperature};
use serde_json::{Value, json};

/// What the programs cost with some policies and some packets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) mix: Mix,
    pub(super) family: Family,
    pub(super) temperature: Temperature,
    pub(super) policies: u32,
    pub(super) figures: Figures,
}

/// The heads of the columns.
pub(super) const HEAD: &str = "mix          family temperature  policies                    lpm            floor               fastswan       lpm/fastswan";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mix, family, temperature, policies, figures } = self;
        // What is added makes 0 of a negative zero.
        let whole = |figure: f64| figure.round() + 0.0;
        let spread =
            |Spread { median, min, max }| format!("{} ({} to {})", whole(median), whole(min), whole(max));
        let tenths = |Spread { median, min, max }| format!("{median:.1} ({min:.1} to {max:.1})");
        write!(
            f,
            "{:<12} {:<6} {:<11} {policies:>9} {:>22} {:>16} {:>22} {:>18}",
            mix.name(),
            name(*family),
            temperature.name(),
            spread(figures.lpm),
            spread(figures.floor),
            spread(figures.ours),
            tenths(figures.ratio)
        )
    }
}

impl Row {
    pub(super) fn json(&self) -> Value {
        let Self { mix, family, temperature, policies, figures } = self;
        let Figures { lpm, floor, ours, ratio } = figures;
        json!({
            "mix": mix.name(),
            "family": name(*family),
            "temperature": temperature.name(),
            "policies": policies,
            "lpm_ns": lpm.median,
            "lpm_min_ns": lpm.min,
            "lpm_max_ns": lpm.max,
            "floor_ns": floor.median,
            "floor_min_ns": floor.min,
            "floor_max_ns": floor.max,
            "ours_ns": ours.median,
            "ours_min_ns": ours.min,
            "ours_max_ns": ours.max,
            "ratio": ratio.median,
            "ratio_min": ratio.min,
            "ratio_max": ratio.max,
        })
    }
}

/// What a family is called in reports.
pub(super) fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}
