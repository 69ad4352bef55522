"""The report: an HTML file that shows a reconstruction, and figures for papers.

The file is self-contained (images inlined, no script, no request to anywhere, enforced by a content
security policy), reads on a phone, follows the browser's dark or light mode, and prints. Beside it
lie the images as PNG files in full resolution.
"""

from __future__ import annotations

import base64
import html
import io
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from patchflow.errors import InputError
from patchflow.io.atomic import write_bytes, write_text
from patchflow.io.checkpoint import library_version
from patchflow.io.images import encode_png
from patchflow.table import Table

_INLINE_PIXELS = 1200
_ACCENT = "#e8590c"
_ERROR_MAP, _NLL_MAP = "inferno", "viridis"


class Region(NamedTuple):
    """A rectangle of pixels of the reconstruction."""

    top: int
    left: int
    height: int
    width: int


class Panel(NamedTuple):
    """A labelled image (1, channels, height, width) with a one-line caption."""

    label: str
    image: Tensor
    caption: str = ""


class Curve(NamedTuple):
    """A curve over iterations, epochs or seconds; curves of one ``axis`` label share a picture."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    axis: str = "objective"
    x_axis: str = "iteration"


@dataclass(frozen=True)
class Report:
    """All that a report shows, as plain tensors, numbers and strings.

    Attributes:
        title: The heading.
        command: The exact command that repeats the run.
        measurement: What was measured.
        reconstruction: What was made of it, (1, channels, height, width), in [0, 1].
        baseline: The simple reconstruction to compare with, such as the aligned bicubic one.
        others: Further methods, in the order in which they are shown.
        truth: The truth, where it is known.
        summary: A sentence below the title.
        table: The metrics.
        curves: Convergence curves.
        nll_map: Negative log-likelihood of the patch around each pixel, (height, width), in nats.
        zoom: The region shown enlarged; by default the one of highest variance of the
            reconstruction.
        versions: Versions of software and platform.
        seed: The seed.
        timings: Seconds by step.
        settings: Everything that was chosen.
        notes: Warnings and remarks, shown at the top.
        measurement_is_image: Whether the measurement shows the same scene (a sinogram does not):
            then it is zoomed too.
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
    nll_map: Float[Tensor, "height width"] | None = None
    zoom: Region | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    seed: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    measurement_is_image: bool = True

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
        _check_panel(panel)
    zoom = _zoom(report.zoom, report.reconstruction)
    pictures: dict[str, bytes] = {}
    shown = [_figure(panel, _picture(panel, report, pictures)) for panel in panels]
    zooms = _zoom_figures(report, zoom)
    maps = _maps(report, pictures)
    curves = _curves(report.curves, pictures)
    for name, data in pictures.items():
        write_bytes(folder / name, data, parents=True)
    sections = [
        _header(report),
        _section("Results", _table(report.table) if report.table else ""),
        _section("Images", _grid(shown)),
        _section(
            "Zoom",
            _grid(zooms, "zooms"),
            f"Rows {zoom.top} to {zoom.top + zoom.height - 1}, columns {zoom.left} to "
            f"{zoom.left + zoom.width - 1} of the reconstruction.",
        ),
        _section("Maps", _grid(maps, "wide")),
        _section("Convergence", _grid(curves, "wide")),
        _section("Command", f"<pre>{_text(report.command)}</pre>", "Select it to run it again."),
        _section("Details", _details(report)),
    ]
    page = _PAGE.format(title=_text(report.title), style=_STYLE, body="\n".join(sections))
    path = folder / "report.html"
    write_text(path, page, parents=True)
    return path


def busiest_region(image: Float[Tensor, "1 channels height width"], size: int) -> Region:
    """The square of highest variance, searched on a grid of an eighth of its size.

    Args:
        image: The image.
        size: The side of the square, in pixels; cut to the image.
    """
    height, width = image.shape[-2:]
    tall, wide = min(size, height), min(size, width)
    grey = image.detach().double().cpu().mean(1, keepdim=True)
    step = max(1, size // 8)
    mean = F.avg_pool2d(grey, (tall, wide), stride=step)
    variance = F.avg_pool2d(grey.square(), (tall, wide), stride=step) - mean.square()
    row, column = divmod(int(variance.flatten().argmax()), variance.shape[-1])
    return Region(row * step, column * step, tall, wide)


def figure_grid(
    panels: Sequence[Panel],
    *,
    zoom: Region | None = None,
    columns: int | None = None,
    width: float = 10.0,
    dpi: int = 150,
    title: str = "",
) -> bytes:
    """One PNG of labelled panels, each with its zoom below; for READMEs and benchmarks.

    Args:
        panels: The images; the zoom is in pixels of the last one and scaled for smaller ones of the
            same scene.
        zoom: The enlarged region; by default the one of highest variance of the last panel.
        columns: Panels per row; by default all in one row, up to five.
        width: The width of the picture, in inches.
        dpi: Pixels per inch.
        title: A title above all.

    Returns:
        The PNG; write it with :func:`patchflow.io.atomic.write_bytes`.

    Raises:
        InputError: There are no panels, an image is not (1, channels, height, width), or the zoom
        lies outside.
    """
    if not panels:
        raise InputError("A figure of 0 panels cannot be drawn: give at least one.")
    for panel in panels:
        _check_panel(panel)
    reference = panels[-1]
    zoom = _zoom(zoom, reference)
    columns = min(columns or 5, len(panels))
    rows = math.ceil(len(panels) / columns)
    height, across = reference.image.shape[-2:]
    # The layout is computed here rather than by matplotlib's engines: panels must not shrink for
    # long labels.
    side, gap, top = width / columns, 0.08, 0.5 if title else 0.06
    tall = (side - gap) * height / across
    zoomed = (side - gap) * zoom.height / zoom.width
    text = 0.26 + (0.2 if any(panel.caption for panel in panels) else 0.0)
    block = text + tall + gap + zoomed + 0.12
    total = top + rows * block
    figure = Figure(figsize=(width, total), dpi=dpi, facecolor="white")
    if title:
        figure.text(0.5, 1 - 0.3 / total, title, ha="center", va="center", size=13, weight="bold")
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left, head = column * side + gap / 2, top + row * block
        middle = (left + (side - gap) / 2) / width
        figure.text(
            middle, 1 - (head + 0.13) / total, panel.label, ha="center", va="center", size=10
        )
        if panel.caption:
            place = 1 - (head + 0.34) / total
            figure.text(
                middle, place, panel.caption, ha="center", va="center", size=8.5, color="#555"
            )
        pixels = _pixels(panel.image)
        below = head + text
        axes = _axes(figure, left, below, side - gap, tall, width, total)
        _show(axes, pixels)
        sampling = _sampling(panel.image, reference.image)
        if sampling is not None:
            down, across = sampling
            corner = (zoom.left / across - 0.5, zoom.top / down - 0.5)
            extent = (zoom.width / across, zoom.height / down)
            box = Rectangle(corner, *extent, fill=False, ec=_ACCENT, lw=1.4)
            axes.add_patch(box)
            inset = _axes(figure, left, below + tall + gap, side - gap, zoomed, width, total)
            _show(inset, _cut(pixels, zoom, sampling))
            for spine in inset.spines.values():
                spine.set(visible=True, color=_ACCENT, linewidth=1.4)
    return _png(figure)


def _axes(
    figure: Figure, left: float, top: float, wide: float, tall: float, width: float, total: float
) -> Axes:
    place = (left / width, 1 - (top + tall) / total, wide / width, tall / total)
    return figure.add_axes(place)


def _show(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _png(figure: Figure, *, transparent: bool = False) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=transparent, dpi="figure")
    return buffer.getvalue()


def _check_panel(panel: Panel) -> None:
    shape = tuple(panel.image.shape)
    if len(shape) != 4 or shape[0] != 1 or 0 in shape:
        raise InputError(
            f"The panel {panel.label} has the shape {shape}, but (1, channels, height, width) is "
            "needed: "
            "give one image."
        )


def _zoom(zoom: Region | None, panel: Panel) -> Region:
    height, width = panel.image.shape[-2:]
    if zoom is None:
        return busiest_region(panel.image, max(16, min(96, min(height, width) // 5)))
    inside = 0 <= zoom.top < zoom.top + zoom.height <= height
    if not (inside and 0 <= zoom.left < zoom.left + zoom.width <= width):
        raise InputError(
            f"The zoom {tuple(zoom)} (top, left, height, width) does not lie in the {height} x "
            f"{width} pixels of "
            f"{panel.label}: choose another region."
        )
    return zoom


def _sampling(image: Tensor, reference: Tensor) -> tuple[float, float] | None:
    """Reference pixels per pixel, down and across; None if this can only be another scene."""
    down = reference.shape[-2] / image.shape[-2]
    across = reference.shape[-1] / image.shape[-1]
    return (down, across) if math.isclose(down, across, rel_tol=0.03) else None


def _pixels(image: Tensor) -> np.ndarray:
    """The image as (height, width, 3), clipped; of other numbers of channels, the mean."""
    image = image.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    if image.shape[1] != 3:
        image = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return image[0].permute(1, 2, 0).numpy()


def _cut(pixels: np.ndarray, zoom: Region, sampling: tuple[float, float]) -> np.ndarray:
    """The zoomed region, exactly, of an image of another sampling: coarse pixels may be cut."""
    rows, columns = (
        # At least one sample per pixel of either image, so that neither loses detail.
        np.clip((start + size * (np.arange(count) + 0.5) / count) // ratio, 0, limit - 1)
        for start, size, ratio, limit in (
            (zoom.top, zoom.height, sampling[0], pixels.shape[0]),
            (zoom.left, zoom.width, sampling[1], pixels.shape[1]),
        )
        for count in [max(size, round(size / ratio))]
    )
    return pixels[rows.astype(int)][:, columns.astype(int)]


def _as_png(pixels: np.ndarray) -> bytes:
    grey = bool((pixels[..., :1] == pixels).all())
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return encode_png(tensor[:, :1] if grey else tensor)


def _picture(panel: Panel, report: Report, pictures: dict[str, bytes]) -> bytes:
    image = panel.image.detach().float().cpu()
    if panel is report.measurement and not report.measurement_is_image:
        # A sinogram has its own units; shown from its smallest to its largest value.
        low, high = image.min(), image.max()
        image = (image - low) / (high - low).clamp_min(1e-12)
    pixels = _pixels(image)
    data = _as_png(pixels)
    pictures[_file_name(panel.label, pictures)] = data
    factor = math.ceil(max(image.shape[-2:]) / _INLINE_PIXELS)
    if factor > 1:
        return _as_png(_pixels(F.avg_pool2d(image, factor, ceil_mode=True)))
    return data


def _file_name(label: str, taken: Mapping[str, bytes]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "image"
    name, number = f"{slug}.png", 2
    while name in taken:
        name, number = f"{slug}-{number}.png", number + 1
    return name


def _zoom_figures(report: Report, zoom: Region) -> list[str]:
    figures = []
    for panel in report.panels():
        if panel is report.measurement and not report.measurement_is_image:
            continue
        sampling = _sampling(panel.image, report.reconstruction.image)
        if sampling is not None:
            cut = _as_png(_cut(_pixels(panel.image), zoom, sampling))
            figures.append(_figure(panel._replace(caption=""), cut))
    return figures


def _maps(report: Report, pictures: dict[str, bytes]) -> list[str]:
    figures = []
    if report.truth is not None:
        x, truth = report.reconstruction.image, report.truth.image
        if x.shape != truth.shape:
            raise InputError(
                f"The reconstruction of shape {tuple(x.shape)} and the truth of shape "
                f"{tuple(truth.shape)} "
                "cannot be subtracted: give images of the same size."
            )
        error = (x.detach().float() - truth.detach().float()).abs().mean(1)[0].cpu().numpy()
        caption = "absolute error of the reconstruction (colours end at the 99.5th percentile)"
        figures.append(_heat_map("error map", caption, error, _ERROR_MAP, pictures, zero=True))
    if report.nll_map is not None:
        values = report.nll_map.detach().float().cpu().numpy()
        caption = "nats per patch, centred at the pixel: high where the prior is surprised"
        label = "patch negative log-likelihood"
        figures.append(_heat_map(label, caption, values, _NLL_MAP, pictures, zero=False))
    return figures


def _heat_map(
    label: str,
    caption: str,
    values: np.ndarray,
    colours: str,
    pictures: dict[str, bytes],
    *,
    zero: bool,
) -> str:
    finite = values[np.isfinite(values)]
    finite = finite if finite.size else np.zeros(1, np.float32)
    low = 0.0 if zero else float(np.percentile(finite, 0.5))
    high = max(float(np.percentile(finite, 99.5)), low + 1e-9)

    def draw(ink: str) -> Figure:
        aspect = values.shape[0] / values.shape[1]
        figure = Figure(
            figsize=(6.4, min(max(5.2 * aspect, 1.5), 9) + 0.3), dpi=130, layout="constrained"
        )
        axes = figure.add_subplot()
        colour_map: Colormap = matplotlib.colormaps[colours]
        picture = axes.imshow(values, cmap=colour_map, vmin=low, vmax=high, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(picture, ax=axes, shrink=0.9, extend="max" if zero else "both")
        bar.ax.tick_params(colors=ink)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        return figure

    return _two_tone(label, caption, draw, pictures)


def _curves(curves: Sequence[Curve], pictures: dict[str, bytes]) -> list[str]:
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        if len(curve.x) != len(curve.y):
            raise InputError(
                f"The curve {curve.label} has {len(curve.x)} places but {len(curve.y)} values: "
                "give as many."
            )
        groups.setdefault((curve.axis, curve.x_axis), []).append(curve)
    figures = []
    for (axis, x_axis), group in groups.items():

        def draw(
            ink: str,
            group: Sequence[Curve] = group,
            axis: str = axis,
            x_axis: str = x_axis,
        ) -> Figure:
            figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained")
            axes = figure.add_subplot()
            for curve, colour in zip(group, _cycle(len(group)), strict=True):
                axes.plot(curve.x, curve.y, color=colour, lw=1.8, label=curve.label)
            axes.set_xlabel(x_axis, color=ink)
            axes.set_ylabel(axis, color=ink)
            axes.tick_params(colors=ink)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(ink)
            if len(group) > 1:
                axes.legend(frameon=False, labelcolor=ink)
            return figure

        caption = "" if len(group) > 1 else group[0].label
        figures.append(_two_tone(axis, caption, draw, pictures))
    return figures


def _cycle(count: int) -> list[str]:
    colours = [_ACCENT, "#1c7ed6", "#2f9e44", "#9c36b5", "#f08c00", "#868e96"]
    return [colours[index % len(colours)] for index in range(count)]


def _two_tone(
    label: str, caption: str, draw: Callable[[str], Figure], pictures: dict[str, bytes]
) -> str:
    """A drawing with ink for light and for dark pages; the file beside the report is on white."""
    file = draw("#222222")
    file.set_facecolor("white")
    pictures[_file_name(label, pictures)] = _png(file)
    light, dark = (_png(draw(ink), transparent=True) for ink in ("#222222", "#e6e6e6"))
    return (
        f"<figure><figcaption><b>{_text(label)}</b> "
        f"<span>{_text(caption)}</span></figcaption><picture>"
        f'<source media="print" srcset="{_inline(light)}">'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        f'<img alt="{_text(label)}" src="{_inline(light)}"></picture></figure>'
    )


def _figure(panel: Panel, data: bytes) -> str:
    # Not left out when empty: all pictures of a row begin at the same height.
    caption = f"<span>{_text(panel.caption)}</span>"
    return (
        f"<figure><figcaption><b>{_text(panel.label)}</b>{caption}</figcaption>"
        f'<img alt="{_text(panel.label)}" src="{_inline(data)}"></figure>'
    )


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _header(report: Report) -> str:
    summary = f"<p class=summary>{_text(report.summary)}</p>" if report.summary else ""
    notes = "".join(f"<p class=note>{_text(note)}</p>" for note in report.notes)
    return f"<header><h1>{_text(report.title)}</h1>{summary}{notes}</header>"


def _section(title: str, body: str, remark: str = "") -> str:
    if not body:
        return ""
    remark = f"<p class=remark>{_text(remark)}</p>" if remark else ""
    return f"<section><h2>{_text(title)}</h2>{remark}{body}</section>"


def _grid(figures: Sequence[str], style: str = "") -> str:
    return f'<div class="grid {style}">{"".join(figures)}</div>' if figures else ""


def _table(table: Table) -> str:
    header, rows = table.grid()
    titles = "".join(f"<th>{_text(title)}</th>" for title in header)
    lines = []
    for (method, _), *cells in rows:
        figures = (
            f"<td><b>{_text(cell)}</b></td>" if best else f"<td>{_text(cell)}</td>"
            for cell, best in cells
        )
        lines.append(f"<tr><th scope=row>{_text(method)}</th>{''.join(figures)}</tr>")
    return (
        f"<p class=remark>{_text(table.protocol)}</p><div "
        f"class=scroll><table><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _details(report: Report) -> str:
    seed = {} if report.seed is None else {"seed": report.seed}
    timings = {name: f"{seconds:.2f} s" for name, seconds in report.timings.items()}
    groups = {
        "Settings": {**report.settings, **seed},
        "Timings": timings,
        "Versions": report.versions,
    }
    blocks = []
    for title, entries in groups.items():
        if entries:
            lines = "".join(
                f"<tr><th scope=row>{_text(key)}</th><td>{_text(value)}</td></tr>"
                for key, value in entries.items()
            )
            blocks.append(f"<div><h3>{title}</h3><table><tbody>{lines}</tbody></table></div>")
    return f"<div class=details>{''.join(blocks)}</div>" if blocks else ""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src
'unsafe-inline'"> <meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #66707a; --page: #ffffff; --card: #f5f6f7;
  --line: #dfe3e6; --accent: #e8590c; --note: #fff4e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #9aa4ad; --page: #16181a;
  --card: #202326; --line: #33383d; --note: #33261a; } }
@media print { :root { color-scheme: light; --ink: #1d1f21; --soft: #66707a; --page: #ffffff;
  --card: #ffffff; --line: #dfe3e6; --note: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0 0 .3rem; color: var(--soft); font-weight: 600; }
.summary { margin: 0; color: var(--soft); font-size: 1.05rem; }
.remark { margin: 0 0 .6rem; color: var(--soft); font-size: .9rem; }
.note { margin: .8rem 0 0; padding: .5rem .8rem; background: var(--note);
  border-left: 4px solid var(--accent); border-radius: 0 6px 6px 0; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 215px), 1fr)); }
.zooms figcaption span { display: none; }
.zooms { grid-template-columns: repeat(auto-fit, minmax(min(46%, 170px), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  align-items: start; }
.wide figure { max-width: 800px; }
figure { margin: 0; max-width: 460px; break-inside: avoid; }
figcaption { font-size: .9rem; line-height: 1.35; margin-bottom: .3rem; }
figcaption span { display: block; min-height: 1.35em; color: var(--soft);
  font-variant-numeric: tabular-nums; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px;
  image-rendering: pixelated; }
picture img { image-rendering: auto; border-radius: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
td, th { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-weight: 400; vertical-align: top; }
thead th { color: var(--soft); }
th:first-child { text-align: left; }
td b { color: var(--accent); }
pre { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
  font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.details { display: grid; gap: 1.4rem 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); align-items: start; }
.details table { width: 100%; }
.details th { color: var(--soft); }
.details td { white-space: normal; overflow-wrap: anywhere; padding-right: 0; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } section { break-inside: auto;
}
  h2 { break-after: avoid; } }
"""
