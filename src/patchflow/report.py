"""The report: an HTML file that shows a reconstruction, and figures for papers.

The file is self-contained (images inlined, no script, no request to anywhere, enforced by a content
security policy), reads on a phone, follows the browser's dark or light mode, and prints. Beside it
lie the images as PNG files in full resolution.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from patchflow.figures import Curve, Drawing, draw_curves, draw_map, draw_signs, figure_grid
from patchflow.io.atomic import write_bytes, write_text
from patchflow.io.checkpoint import library_version
from patchflow.panels import (
    Panel,
    Region,
    Window,
    busiest_region,
    check_panel,
    cut_region,
    error_of,
    png_of,
    sampling_of,
    visible_pixels,
    zoom_region,
)
from patchflow.report_html import (
    command_html,
    details_html,
    drawing_html,
    grid_html,
    header_html,
    image_html,
    page_html,
    section_html,
    table_html,
)
from patchflow.table import Table

__all__ = [
    "Curve",
    "Panel",
    "Region",
    "Report",
    "Window",
    "busiest_region",
    "figure_grid",
    "versions",
    "write_report",
]

_INLINE_PIXELS = 1200
_ERROR_MAP, _NLL_MAP, _COMPONENTS_MAP = "inferno", "viridis", "nipy_spectral"


@dataclass(frozen=True)
class Report:
    """All that a report shows, as plain tensors, numbers and strings.

    Attributes:
        title: The heading.
        command: The exact command that repeats the run.
        measurement: What was measured.
        reconstruction: What was made of it, (1, channels, height, width), in units of the windows.
        baseline: The simple reconstruction to compare with, such as the aligned bicubic one.
        others: Further methods, in the order in which they are shown.
        truth: The truth, where it is known.
        summary: A sentence below the title.
        table: The metrics.
        curves: Convergence curves.
        profiles: Values along a line through the images.
        nll_map: Negative log-likelihood of the patch around each pixel, (height, width), in nats.
        width: The width of the error bar of each pixel, in the units of the images.
        novelty: The pixels that are unlike a reference: 1 where they are more surprising, -1 where smoother, else 0.
        std_map: Standard deviation of the samples at each pixel, (height, width).
        components: The component of a mixture that each patch belongs to, (rows, columns).
        zoom: The region shown enlarged; by default the busiest one of the reconstruction.
        versions: Versions of software and platform.
        seed: The seed.
        timings: Seconds by step.
        settings: Everything that was chosen.
        notes: Warnings and remarks, shown at the top.
        measurement_is_image: Whether it shows the same scene and is zoomed, too; no sinogram does.
        windows: The values that are black and white; all images are shown once in each window.
        unit: The unit of the images' values, for the error map.
    """

    title: str
    command: str
    measurement: Panel
    reconstruction: Panel
    baseline: Panel | None = None
    others: Sequence[Panel] = ()
    truth: Panel | None = None
    summary: str = ""
    table: Table | None = None
    curves: Sequence[Curve] = ()
    profiles: Sequence[Curve] = ()
    nll_map: Float[Tensor, "height width"] | None = None
    width: Float[Tensor, "height width"] | None = None
    novelty: Int[Tensor, "height width"] | None = None
    std_map: Float[Tensor, "height width"] | None = None
    components: Float[Tensor, "rows columns"] | None = None
    zoom: Region | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    seed: int | None = None
    timings: Mapping[str, float | int] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    measurement_is_image: bool = True
    windows: Sequence[Window] = (Window(),)
    unit: str = ""

    def panels(self) -> list[Panel]:
        """The images in the order in which they are shown."""
        panels = [self.measurement, self.baseline, *self.others, self.reconstruction, self.truth]
        return [panel for panel in panels if panel is not None]


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch, patchflow and the platform, and the number of threads."""
    return {
        "patchflow": library_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def write_report(folder: str | Path, report: Report) -> Path:
    """Write ``report.html`` and its PNG files into a folder, which is made if it is missing.

    Each file is written whole or not at all, the HTML last.

    Args:
        folder: The folder.
        report: What to show.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: An image is not (1, channels, height, width), sizes differ, the zoom lies
        outside, or the disk refuses.
    """
    folder = Path(folder)
    panels = report.panels()
    for panel in panels:
        check_panel(panel)
    zoom = zoom_region(report.zoom, report.reconstruction)
    pictures: dict[str, bytes] = {}
    images = _images(report, pictures)
    zooms = [_zoom_section(report, zoom, window) for window in report.windows]
    maps = _maps(report, pictures)
    profiles = _curves(report.profiles, pictures)
    curves = _curves(report.curves, pictures)
    for name, data in pictures.items():
        write_bytes(folder / name, data, parents=True)
    sections = [
        header_html(report.title, report.summary, report.notes),
        section_html("Results", table_html(report.table) if report.table else ""),
        *images,
        *zooms,
        section_html("Maps", grid_html(maps, "wide")),
        section_html("Profile", grid_html(profiles, "wide")),
        section_html("Convergence", grid_html(curves, "wide")),
        section_html("Command", command_html(report.command), "Select it to run it again."),
        section_html("Details", details_html(_details(report))),
    ]
    path = folder / "report.html"
    write_text(path, page_html(report.title, sections), parents=True)
    return path


def _images(report: Report, pictures: dict[str, bytes]) -> list[str]:
    sections, scenes = [], report.panels()
    if not report.measurement_is_image:
        scenes = scenes[1:]
        # A sinogram has its own units; shown once, from its smallest to its largest value.
        low, high = report.measurement.image.min(), report.measurement.image.max()
        own = Window("", float(low), max(float(high), float(low) + 1e-12))
        figure = _image(report.measurement, own, pictures)
        sections.append(section_html("Measurement", grid_html([figure])))
    for window in report.windows:
        title = f"Images, {window.label}" if window.label else "Images"
        figures = [_image(panel, window, pictures) for panel in scenes]
        sections.append(section_html(title, grid_html(figures)))
    return sections


def _image(panel: Panel, window: Window, pictures: dict[str, bytes]) -> str:
    return image_html(panel.label, panel.caption, _picture(panel, window, pictures))


def _picture(panel: Panel, window: Window, pictures: dict[str, bytes]) -> bytes:
    image = window(panel.image.detach().float().cpu())
    data = png_of(visible_pixels(image))
    pictures[_file_name(f"{panel.label} {window.label}", pictures)] = data
    factor = math.ceil(max(image.shape[-2:]) / _INLINE_PIXELS)
    if factor > 1:
        return png_of(visible_pixels(F.avg_pool2d(image, factor, ceil_mode=True)))
    return data


def _file_name(label: str, taken: Mapping[str, bytes]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "image"
    name, number = f"{slug}.png", 2
    while name in taken:
        name, number = f"{slug}-{number}.png", number + 1
    return name


def _zoom_section(report: Report, zoom: Region, window: Window) -> str:
    figures = []
    for panel in report.panels():
        if panel is report.measurement and not report.measurement_is_image:
            continue
        sampling = sampling_of(panel.image, report.reconstruction.image)
        if sampling is not None:
            cut = png_of(cut_region(visible_pixels(window(panel.image)), zoom, sampling))
            figures.append(image_html(panel.label, "", cut))
    return section_html(
        f"Zoom, {window.label}" if window.label else "Zoom",
        grid_html(figures, "zooms"),
        f"Rows {zoom.top} to {zoom.top + zoom.height - 1}, columns {zoom.left} to "
        f"{zoom.left + zoom.width - 1} of the reconstruction.",
    )


def _maps(report: Report, pictures: dict[str, bytes]) -> list[str]:
    unit = f" in {report.unit}" if report.unit else ""
    error = None if report.truth is None else error_of(report.reconstruction, report.truth)
    maps = (
        (
            "error map",
            f"absolute error of the reconstruction{unit} (colours end at the 99.5th percentile)",
            *(error, _ERROR_MAP, True),
        ),
        (
            "patch negative log-likelihood",
            "nats per patch, centred at the pixel: high where the prior is surprised",
            *(report.nll_map, _NLL_MAP, False),
        ),
        ("standard deviation", "of the samples", report.std_map, _ERROR_MAP, True),
        ("width of the error bars", f"of pixels{unit}", report.width, _ERROR_MAP, True),
        (
            "components",
            "of the mixture, that each patch belongs to: similar colours mean nothing",
            *(report.components, _COMPONENTS_MAP, True),
        ),
    )
    figures = []
    for label, caption, values, colours, from_zero in maps:
        if values is not None:
            drawing = draw_map(values.detach().cpu().numpy(), colours, from_zero=from_zero)
            figures.append(_drawn(label, caption, drawing, pictures))
    if report.novelty is not None:
        drawing = draw_signs(report.novelty.cpu().numpy(), ("smoother", "as known", "surprising"))
        figures.append(
            _drawn("novelty", "what the density of patches does not know", drawing, pictures)
        )
    return figures


def _curves(curves: Sequence[Curve], pictures: dict[str, bytes]) -> list[str]:
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.axis, curve.x_axis), []).append(curve)
    figures = []
    for (axis, _), group in groups.items():
        caption = "" if len(group) > 1 else group[0].label
        figures.append(_drawn(axis, caption, draw_curves(group), pictures))
    return figures


def _drawn(label: str, caption: str, drawing: Drawing, pictures: dict[str, bytes]) -> str:
    pictures[_file_name(label, pictures)] = drawing.on_white
    return drawing_html(label, caption, drawing)


def _details(report: Report) -> dict[str, Mapping[str, object]]:
    seed = {} if report.seed is None else {"seed": report.seed}
    timings = {name: f"{seconds:.2f} s" for name, seconds in report.timings.items()}
    return {
        "Settings": {**report.settings, **seed},
        "Timings": timings,
        "Versions": report.versions,
    }
