//! A drawing of what is measured: a panel for each number of CPUs, with bars of Mpps for each number of policies.

use std::path::Path;

use fastswan_testkit::datapath::veth::{Contestant, Measured};
use plotters::prelude::*;

use super::{
    super::panels::{self, Area, Drawn, FLOOR, LPM, OURS},
    row::Row,
};

/// The width of all bars for a number of policies: the rest is a gap.
const GROUP: f64 = 0.85;

fn colour(contestant: Contestant) -> RGBColor {
    match contestant {
        Contestant::Floor => FLOOR,
        Contestant::Lpm => LPM,
        Contestant::Ours => OURS,
        Contestant::Kernel => RGBColor(0x00, 0x9e, 0x73),
        Contestant::KernelPolicies => RGBColor(0xf0, 0xe4, 0x42),
    }
}

/// Writes an SVG file.
pub(super) fn draw(rows: &[Row], file: &Path) -> anyhow::Result<()> {
    let mut panels: Vec<Vec<Row>> = Vec::new();
    for row in rows {
        match panels.iter_mut().find(|panel| panel[0].figures.cpus == row.figures.cpus) {
            Some(panel) => panel.push(*row),
            None => panels.push(vec![*row]),
        }
    }
    panels::draw(file, &panels, |area, panel| draw_panel(area, panel))
}

fn draw_panel(area: &Area<'_>, rows: &[Row]) -> Drawn {
    let cpus = rows[0].figures.cpus;
    let title = if cpus == 1 { "one CPU".to_owned() } else { format!("{cpus} CPUs") };
    let all = rows.iter().flat_map(|row| row.figures.contestants);
    let most = all.map(|measured| measured.mpps.max).fold(1.0, f64::max);
    // Far below the numbers that a float does not hold.
    #[allow(clippy::cast_precision_loss)]
    let (groups, bar) = (rows.len() as f64, GROUP / Contestant::ALL.len() as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(35)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..groups, 0.0..most * 1.7)?;
    // There is a label in the middle of each group.
    let policies = |place: &f64| {
        let row = rows.iter().zip(0_u32..).find(|(_, group)| (f64::from(*group) + 0.5 - place).abs() < 0.01);
        row.map_or_else(String::new, |(row, _)| row.policies.to_string())
    };
    chart
        .configure_mesh()
        .x_desc("policies")
        .y_desc("Mpps")
        .x_labels(2 * rows.len() + 1)
        .x_label_formatter(&policies)
        .disable_x_mesh()
        .light_line_style(WHITE)
        .draw()?;
    for (contestant, place) in Contestant::ALL.into_iter().zip(0_u32..) {
        let colour = colour(contestant);
        let bars = rows.iter().zip(0_u32..).flat_map(|(row, group)| {
            let of_this = row.figures.contestants.into_iter().filter(move |it| it.contestant == contestant);
            of_this.flat_map(move |Measured { mpps, .. }| {
                let left = f64::from(group) + (1.0 - GROUP) / 2.0 + f64::from(place) * bar;
                let whisker = [(left + bar / 2.0, mpps.min), (left + bar / 2.0, mpps.max)];
                [
                    Rectangle::new([(left, 0.0), (left + bar * 0.9, mpps.median)], colour.filled())
                        .into_dyn(),
                    PathElement::new(whisker, BLACK).into_dyn(),
                ]
            })
        });
        chart
            .draw_series(bars)?
            .label(contestant.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
}
