//! A drawing of what is measured: a panel for each mix, family and temperature, nanoseconds over policies.

use std::path::Path;

use fastswan_testkit::datapath::{Figures, Spread};
use plotters::prelude::*;

use super::{
    super::panels::{self, Area, Drawn, FLOOR, LPM, OURS},
    row::{Row, name},
};

/// The programs by name, with the colours of their lines.
type Line = (&'static str, RGBColor, fn(&Figures) -> Spread);

const LINES: [Line; 3] = [
    ("lpm", LPM, |figures| figures.lpm),
    ("fastswan", OURS, |figures| figures.ours),
    ("floor", FLOOR, |figures| figures.floor),
];

/// Writes an SVG file.
pub(super) fn draw(rows: &[Row], file: &Path) -> anyhow::Result<()> {
    let same_panel = |one: &Row, other: &Row| {
        (one.mix, one.family, one.temperature) == (other.mix, other.family, other.temperature)
    };
    let mut panels: Vec<Vec<Row>> = Vec::new();
    for row in rows {
        match panels.iter_mut().find(|panel| same_panel(&panel[0], row)) {
            Some(panel) => panel.push(*row),
            None => panels.push(vec![*row]),
        }
    }
    panels::draw(file, &panels, |area, panel| draw_panel(area, panel))
}

fn draw_panel(area: &Area<'_>, rows: &[Row]) -> Drawn {
    let first = rows[0];
    let title = format!("{}, {}, {}", first.mix.name(), name(first.family), first.temperature.name());
    let most =
        rows.iter().flat_map(|row| LINES.map(|(.., figure)| figure(&row.figures).max)).fold(10.0, f64::max);
    let policies = rows.iter().map(|row| f64::from(row.policies));
    let widest = policies.clone().fold(10.0, f64::max);
    let narrowest = policies.fold(widest, f64::min);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(35)
        .y_label_area_size(50)
        .build_cartesian_2d((narrowest..widest * 1.2).log_scale(), (LEAST..most * 1.2).log_scale())?;
    let whole = |number: &f64| format!("{number:.0}");
    chart
        .configure_mesh()
        .x_desc("policies")
        .y_desc("ns per packet")
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .light_line_style(WHITE)
        .draw()?;
    for (program, colour, figure) in LINES {
        let points: Vec<(f64, f64)> = rows
            .iter()
            .map(|row| (f64::from(row.policies), figure(&row.figures).median.max(LEAST)))
            .collect();
        let dots = points.iter().map(|point| Circle::new(*point, 2, colour.filled()));
        chart.draw_series(dots)?;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(program)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
}

/// The least that is drawn, in nanoseconds: a logarithmic axis has no 0.
const LEAST: f64 = 1.0;
