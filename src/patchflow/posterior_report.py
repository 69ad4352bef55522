"""Posterior samples shown: a table for the terminal, a corner plot, an HTML file; all weighted."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter
from torch import Tensor

from patchflow import report_html as page
from patchflow.errors import InputError
from patchflow.figures import ACCENT, Curve, draw_curves
from patchflow.io.atomic import write_text
from patchflow.io.posterior import Posterior
from patchflow.report import versions

Truth = Tensor | Sequence[float | int] | None
_SHOWN = 10
_INK, _SOFT, _BLUE = "#222222", "#868e96", "#1c7ed6"
_BLUES = LinearSegmentedColormap.from_list("", ["#ffffff", "#a5d0f5", _BLUE, "#0b3a6b"])


def summarize(posterior: Posterior, level: float | int = 0.9) -> list[dict[str, Any]]:
    """Weighted statistics of each parameter.

    Args:
        posterior: The samples.
        level: The mass of the interval, which leaves the same mass on both sides.

    Returns:
        For each parameter ``name``, ``mean``, ``sd`` (unbiased for equal weights; NaN of a single
        sample), ``low``, ``median``, ``high`` (quantiles) and ``mcse``, the Monte-Carlo standard
        error of the mean: the standard deviation over the root of the effective sample size.

    Raises:
        InputError: The level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"The level {level} is not between 0 and 1: give one such as 0.9.")
    samples, weights = _numbers(posterior)
    mean, spread = weights @ samples, 1 - float(weights @ weights)
    sd = np.sqrt(weights @ (samples - mean) ** 2 / (spread if spread > 1e-12 else math.nan))
    mcse = sd / math.sqrt(_ess(posterior))
    low, median, high = _quantiles(samples, weights, [(1 - level) / 2, 0.5, (1 + level) / 2])
    columns = {"mean": mean, "sd": sd, "low": low, "median": median, "high": high, "mcse": mcse}
    return [
        {"name": name, **{key: float(column[i]) for key, column in columns.items()}}
        for i, name in enumerate(posterior.names)
    ]


def summary_text(posterior: Posterior) -> str:
    """The table of the parameters as aligned text, and what is known of the samples' quality.

    Args:
        posterior: The samples.
    """
    grid = _grid(posterior)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    grid.insert(1, ["-" * width for width in widths])
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in grid]
    return "\n".join([*map("  ".join, lines), "", *_quality(posterior)])


def corner_plot(posterior: Posterior, truth: Truth = None, bins: int | None = None) -> bytes:
    """Histograms of the parameters on the diagonal, and of each pair below it.

    The contours hold 39 % and 86 % of the mass, as one and two standard deviations of a normal law
    do. The frame shows the central 99.8 % of each parameter.

    Args:
        posterior: The samples; of more than 10 parameters, the first 10 are shown.
        truth: The true parameters, shown as crossing lines.
        bins: Bins on an axis; by default from the effective sample size.

    Returns:
        The PNG; write it with :func:`patchflow.io.atomic.write_bytes`.

    Raises:
        InputError: The truth has not one value for each parameter, or there are no bins.
    """
    samples, weights = _numbers(posterior)
    dim, shown = samples.shape[1], min(samples.shape[1], _SHOWN)
    marks = None if truth is None else [float(value) for value in truth]
    if marks is not None and len(marks) != dim:
        raise InputError(f"The truth has {len(marks)} values for {dim} parameters: give one each.")
    if bins is not None and bins < 1:
        raise InputError(f"{bins} bins cannot be drawn: give at least 1.")
    # More bins than these show the noise of the samples.
    bins = bins or round(min(max(1.7 * _ess(posterior) ** (1 / 3), 12), 40))
    frames, side = _frames(samples, weights, marks), _side(dim)
    longest = round(12 * (side - 1) / shown)
    names = [n if len(n) <= longest else n[: longest - 1] + "…" for n in posterior.names]
    figure = Figure(figsize=(side, side), dpi=150, facecolor="white")
    figure.subplots_adjust(0.9 / side, 0.8 / side, 1 - 0.1 / side, 1 - 0.3 / side, 0.08, 0.08)
    for row, column in [(i, j) for i in range(shown) for j in range(i + 1)]:
        axes = figure.add_subplot(shown, shown, row * shown + column + 1)
        frame = frames[[column, row]]
        if row == column:
            counts, edges = np.histogram(samples[:, row], bins, tuple(frame[0]), weights=weights)
            axes.stairs(counts, edges, fill=True, fc="#c6ddf4", ec=_BLUE, lw=1.2)
            axes.set_yticks([])
            frame[1] = 0, 1.08 * counts.max()
        else:
            _map(axes, samples[:, [column, row]], weights, frame, bins)
            _label(axes.yaxis, frame[1], "" if column else names[row])
        _label(axes.xaxis, frame[0], "" if row < shown - 1 else names[column])
        if marks is not None:
            axes.axvline(marks[column], color=ACCENT, lw=1)
        if marks is not None and row != column:
            axes.axhline(marks[row], color=ACCENT, lw=1)
        axes.set(xlim=frame[0], ylim=frame[1])
        axes.spines[:].set_color(_SOFT)
    figure.align_labels()
    if shown < dim:
        figure.text(0.98, 0.96, f"the first {shown} of {dim} parameters", ha="right", size=14)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def write_posterior_report(
    path_html: str | Path,
    posterior: Posterior,
    *,
    title: str,
    command: str,
    truth: Truth = None,
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML file that shows samples and says how far they can be trusted.

    Args:
        path_html: The file; written whole or not at all.
        posterior: The samples.
        title: The heading.
        command: The exact command that repeats the run.
        truth: The true parameters, where they are known.
        notes: Warnings and remarks, shown at the top after those that the samples call for.

    Raises:
        InputError: As :func:`corner_plot`, or the disk refuses.
    """
    header, *rows = [[html.escape(cell) for cell in row] for row in _grid(posterior)]
    lines = (f"<tr><th scope=row>{r[0]}</th><td>{'</td><td>'.join(r[1:])}</td></tr>" for r in rows)
    table = (
        f"<div class=scroll><table><thead><tr><th>{'</th><th>'.join(header)}</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    # The figures of a grid are narrower than ten parameters need.
    corner = (
        f'<figure style="max-width:{96 * _side(len(posterior.names)):.0f}px"><picture>'
        '<img alt="corner plot" src="data:image/png;base64,'
        f'{base64.b64encode(corner_plot(posterior, truth)).decode("ascii")}"></picture></figure>'
    )
    remarks = ["Contours hold 39 % and 86 % of the mass."] if len(posterior.names) > 1 else []
    remarks += ["Thin lines show the truth."] if truth is not None else []
    first, *more = _quality(posterior)
    size, k = _ess(posterior), posterior.k_hat
    far = f"k-hat is {k:.2f}, above 0.7: few samples carry the weight, so no figure is reliable."
    few = f"The samples are worth only {size:.0f} independent ones: draw more."
    warnings = [note for note, applies in ((far, k > 0.7), (few, size < 100)) if applies]
    sections = [
        page.header_html(title, first, [*warnings, *notes]),
        page.section_html("Parameters", table, " ".join(more)),
        page.section_html("Samples", corner, " ".join(remarks)),
        page.section_html("Weights and data", page.grid_html(_drawings(posterior), "wide")),
        page.section_html("Command", page.command_html(command), "Select it to run it again."),
        page.section_html("Details", page.details_html(_details(posterior))),
    ]
    write_text(path_html, page.page_html(title, sections))


def _numbers(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    return posterior.samples.detach().double().cpu().numpy(), posterior.weights.cpu().numpy()


def _quantiles(samples: np.ndarray, weights: np.ndarray, places: Sequence[float]) -> np.ndarray:
    """The smallest samples below which at least these masses lie, (places, dim)."""
    order = samples.argsort(axis=0)
    mass = weights[order].cumsum(0)
    # Rounding must not carry a sum past its place.
    index = [[np.searchsorted(column, p - 1e-12) for column in mass.T] for p in places]
    return np.take_along_axis(np.take_along_axis(samples, order, 0), np.array(index), 0)


def _side(dim: int) -> float:
    return 4.4 if dim == 1 else min(1.2 + dim * max(1.1, 2.6 - 0.2 * dim), 12.2)


def _ess(posterior: Posterior) -> float:
    # Where few samples were drawn from many, they are worth less than what the posterior reports.
    own = 1 / float(posterior.weights.square().sum())
    return min(own, float(posterior.ess)) if posterior.ess > 0 else own


def _frames(samples: np.ndarray, weights: np.ndarray, marks: list[float] | None) -> np.ndarray:
    low, high = _quantiles(samples, weights, [0.001, 0.999])
    if marks is not None:
        low, high = np.minimum(low, marks), np.maximum(high, marks)
    # A parameter that never moves still needs an axis.
    moves = high - low > 1e-12 * np.abs(high) + 1e-280
    margin = np.where(moves, 0.06 * (high - low), np.maximum(0.5, 1e-3 * np.abs(high)))
    return np.stack([low - margin, high + margin], 1)


def _map(axes: Axes, pair: np.ndarray, weights: np.ndarray, frame: np.ndarray, bins: int) -> None:
    counts, *edges = np.histogram2d(pair[:, 0], pair[:, 1], bins, frame.tolist(), weights=weights)
    axes.pcolormesh(*edges, counts.T, cmap=_BLUES)
    # Zeros around it close the contours at the frame.
    smooth = gaussian_filter(np.pad(counts, 2), 1.0)
    centres = [e[0] + (e[1] - e[0]) * (np.arange(-2, bins + 2) + 0.5) for e in edges]
    falling = -np.sort(-smooth, axis=None)
    # The mass of a normal law in the plane within two standard deviations, and within one.
    levels = falling[np.searchsorted(falling.cumsum() / falling.sum(), [0.865, 0.393])]
    if levels[0] < levels[1] < falling[0]:
        axes.contour(*centres, smooth.T, levels, colors=[_SOFT, _INK], linewidths=1)


def _label(axis: Axis, frame: np.ndarray, name: str) -> None:
    """Ticks within the frame, and their numbers and the name where there is one."""
    low, high = frame[0] + 0.06 * np.ptp(frame), frame[1] - 0.06 * np.ptp(frame)
    for bins in range(3, 9):
        every = np.asarray(MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(*frame))
        ticks = every[(every > low) & (every < high)]
        if ticks.size > 1:
            break
    numbers = _digits(ticks, every[1] - every[0]) if name else [""] * ticks.size
    axis.set_ticks(ticks, numbers, size=8)
    long = isinstance(axis, XAxis) and max(map(len, numbers), default=0) > 4
    axis.set_tick_params(color=_SOFT, length=3, labelrotation=45 if long else 0)
    axis.set_label_text(name, size=9, parse_math=False)


def _digits(values: Sequence[float] | np.ndarray, step: float) -> list[str]:
    """Numbers with as many digits as it takes to see this step; minus zero loses its sign."""
    top = max((abs(value) for value in values if value == value), default=0.0)
    step = step if step > 1e-14 * top else 1e-3 * top
    last = math.floor(math.log10(step) + 1e-9) if top else 0
    if last >= -8 and (top == 0 or 1e-3 <= top < 1e6):
        return [f"{round(float(v), max(-last, 0)) + 0.0:.{max(-last, 0)}f}" for v in values]
    places = max(math.floor(math.log10(top)) - last, 0)
    return ["0" if abs(v) < 1e-9 * top else f"{v:.{places}e}" for v in values]


def _grid(posterior: Posterior) -> list[list[str]]:
    lines = [["parameter", "mean", "sd", "5 %", "50 %", "95 %", "mcse"]]
    for row in summarize(posterior):
        name, *figures, mcse = row.values()
        lines.append([name, *_digits(figures, row["sd"] / 100), f"{mcse:.2g}"])
    return lines


def _quality(posterior: Posterior) -> list[str]:
    """A line on the samples, and one on the acceptance if there are Metropolis layers."""
    count, size, k = len(posterior.samples), _ess(posterior), posterior.k_hat
    verdict = "good" if k < 0.5 else "usable" if k <= 0.7 else "unreliable"
    parts = [f"{count} samples", f"ESS {size:.0f} ({100 * size / count:.1f} %)"]
    parts.append("k-hat unknown" if math.isnan(k) else f"k-hat {k:.2f} ({verdict})")
    if posterior.log_evidence is not None:
        value, error = posterior.log_evidence
        parts.append(f"log Z {_digits([value], error / 10)[0]} ± {error:.2g}")
    rates = [f"{layer} {100 * rate:.0f} %" for layer, rate in posterior.acceptance.items()]
    return [", ".join(parts), *(["acceptance: " + ", ".join(rates)] if rates else [])]


def _drawings(posterior: Posterior) -> list[str]:
    drawings, y = [], posterior.observation.detach().double().cpu().tolist()
    weights = np.sort(_numbers(posterior)[1])[::-1]
    if weights[0] > 1.001 * weights[-1]:
        number = np.linspace(0, weights.size, min(weights.size, 500) + 1).astype(int)
        x, mass = 100 * number / weights.size, 100 * np.append(0, weights.cumsum())[number]
        axes = ("their share of the weight [%]", "heaviest samples [%]")
        ours = Curve("these samples", x.tolist(), mass.tolist(), *axes)
        drawing = draw_curves([ours, Curve("equal weights", [0, 100], [0, 100], *axes)])
        drawings.append(page.drawing_html("weights", "how few samples carry the result", drawing))
    if len(y) > 1:
        drawing = draw_curves([Curve("y", range(1, len(y) + 1), y, "y", "component")])
        drawings.append(page.drawing_html("observation", f"{len(y)} values", drawing))
    return drawings


def _details(posterior: Posterior) -> dict[str, Mapping[str, object]]:
    entries = {key: value for key, value in posterior.settings.items() if key != "command"}
    groups = {key.capitalize(): v for key, v in entries.items() if isinstance(v, Mapping)}
    plain = {key: v for key, v in entries.items() if key.capitalize() not in groups}
    return {"Settings": plain, "Versions": versions(), **groups}
