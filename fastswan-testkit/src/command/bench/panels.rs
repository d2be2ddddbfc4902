//! Drawings with a panel for each set of figures.

use std::path::Path;

use anyhow::anyhow;
use plotters::{coord::Shift, prelude::*};

/// Width and height of a panel, and how many there are beside each other at most.
const PANEL: (u32, u32) = (420, 320);
const COLUMNS: usize = 3;

/// The colours of the programs.
pub(super) const LPM: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
pub(super) const OURS: RGBColor = RGBColor(0x00, 0x72, 0xb2);
pub(super) const FLOOR: RGBColor = RGBColor(0x80, 0x80, 0x80);

/// Where a panel is drawn.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What becomes of that.
pub(super) type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// Writes an SVG file.
pub(super) fn draw<P>(
    file: &Path,
    panels: &[P],
    draw_panel: impl Fn(&Area<'_>, &P) -> Drawn,
) -> anyhow::Result<()> {
    let columns = panels.len().clamp(1, COLUMNS);
    let lines = panels.len().div_ceil(columns).max(1);
    let size = (PANEL.0 * u32::try_from(columns)?, PANEL.1 * u32::try_from(lines)?);
    let root = SVGBackend::new(file, size).into_drawing_area();
    let areas = root.split_evenly((lines, columns));
    root.fill(&WHITE)
        .and_then(|()| areas.iter().zip(panels).try_for_each(|(area, panel)| draw_panel(area, panel)))
        .and_then(|()| root.present())
        .map_err(|error| anyhow!("{error}"))
}
