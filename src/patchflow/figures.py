"""Figures drawn by matplotlib: grids of panels for papers, maps and curves for the report."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from patchflow.errors import InputError
from patchflow.panels import (
    Panel,
    Region,
    check_panel,
    cut_region,
    sampling_of,
    visible_pixels,
    zoom_region,
)

ACCENT = "#e8590c"
_COLOURS = (ACCENT, "#1c7ed6", "#2f9e44", "#9c36b5", "#f08c00", "#868e96")
# Of maps of -1, 0 and 1.
_SIGNS = ("#1c7ed6", "#ced4da", ACCENT)


class Curve(NamedTuple):
    """A curve over iterations, epochs or seconds; curves of one ``axis`` label share a picture."""

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    axis: str = "objective"
    x_axis: str = "iteration"


class Drawing(NamedTuple):
    """A drawing as PNG: on white, and on no ground with ink for light and for dark pages."""

    on_white: bytes
    for_light: bytes
    for_dark: bytes


def figure_grid(
    panels: Sequence[Panel],
    *,
    zoom: Region | None = None,
    columns: int | None = None,
    width: float | int = 10.0,
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
        check_panel(panel)
    reference = panels[-1]
    zoom = zoom_region(zoom, reference)
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
        pixels = visible_pixels(panel.image)
        below = head + text
        axes = _axes(figure, left, below, side - gap, tall, width, total)
        _show(axes, pixels)
        sampling = sampling_of(panel.image, reference.image)
        if sampling is not None:
            down, right = sampling
            corner = (zoom.left / right - 0.5, zoom.top / down - 0.5)
            extent = (zoom.width / right, zoom.height / down)
            axes.add_patch(Rectangle(corner, *extent, fill=False, ec=ACCENT, lw=1.4))
            inset = _axes(figure, left, below + tall + gap, side - gap, zoomed, width, total)
            _show(inset, cut_region(pixels, zoom, sampling))
            for spine in inset.spines.values():
                spine.set(visible=True, color=ACCENT, linewidth=1.4)
    return _png(figure)


def draw_map(values: np.ndarray, colours: str, *, from_zero: bool) -> Drawing:
    """A map of values in false colours; what is not finite stays blank.

    Args:
        values: The values, (height, width).
        colours: The name of a matplotlib colour map.
        from_zero: Whether the colours begin at 0, or at the 0.5th percentile; they end at the
            99.5th, or at the largest value where fewer pixels are above the lowest colour.
    """
    values = values.astype(np.float32, copy=False)
    finite = values[np.isfinite(values)]
    finite = finite if finite.size else np.zeros(1, np.float32)
    low = 0.0 if from_zero else float(np.percentile(finite, 0.5))
    high = float(np.percentile(finite, 99.5))
    high = high if high > low else max(float(finite.max()), low + 1e-9)

    def draw(ink: str) -> Figure:
        figure, axes = _map_axes(values)
        colour_map: Colormap = matplotlib.colormaps[colours]
        picture = axes.imshow(values, cmap=colour_map, vmin=low, vmax=high, interpolation="nearest")
        ends = "max" if from_zero else "both"
        bar = figure.colorbar(picture, ax=axes, shrink=0.9, extend=ends)
        bar.ax.tick_params(colors=ink)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        return figure

    return _drawing(draw)


def draw_signs(values: np.ndarray, names: tuple[str, str, str]) -> Drawing:
    """A map of -1, 0 and 1 in three colours with a legend.

    Args:
        values: The values, (height, width).
        names: What -1, 0 and 1 are.
    """

    def draw(ink: str) -> Figure:
        figure, axes = _map_axes(values)
        colours = ListedColormap(_SIGNS)
        axes.imshow(values, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        figure.legend(
            handles=[Patch(color=c, label=n) for c, n in zip(_SIGNS, names, strict=True)],
            loc="outside upper left",
            ncols=3,
            frameon=False,
            labelcolor=ink,
        )
        return figure

    return _drawing(draw)


def _map_axes(values: np.ndarray) -> tuple[Figure, Axes]:
    aspect = values.shape[0] / values.shape[1]
    figure = Figure(
        figsize=(6.4, min(max(5.2 * aspect, 1.5), 9) + 0.3), dpi=130, layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def draw_curves(curves: Sequence[Curve]) -> Drawing:
    """Curves of one axis label in one picture; the labels are taken from the first one.

    Args:
        curves: The curves, at least one.

    Raises:
        InputError: A curve has not as many places as values.
    """
    for curve in curves:
        if len(curve.x) != len(curve.y):
            raise InputError(
                f"The curve {curve.label} has {len(curve.x)} places but {len(curve.y)} values: "
                "give as many."
            )

    def draw(ink: str) -> Figure:
        figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            colour = _COLOURS[index % len(_COLOURS)]
            # The first curve is what the picture is about: it lies on top.
            order = 3 - index / len(curves)
            axes.plot(curve.x, curve.y, color=colour, lw=1.8, label=curve.label, zorder=order)
        axes.set_xlabel(curves[0].x_axis, color=ink)
        axes.set_ylabel(curves[0].axis, color=ink)
        axes.tick_params(colors=ink)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        if len(curves) > 1:
            # Above, where no curve is.
            axes.legend(
                frameon=False,
                labelcolor=ink,
                ncols=3,
                loc="lower left",
                bbox_to_anchor=(0, 1),
                borderaxespad=0,
            )
        return figure

    return _drawing(draw)


def _drawing(draw: Callable[[str], Figure]) -> Drawing:
    white = draw("#222222")
    white.set_facecolor("white")
    light, dark = (_png(draw(ink), transparent=True) for ink in ("#222222", "#e6e6e6"))
    return Drawing(_png(white), light, dark)


def _axes(
    figure: Figure,
    left: float | int,
    top: float | int,
    wide: float | int,
    tall: float | int,
    width: float | int,
    total: float | int,
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
