"""Pictures of calibration: ranks of each parameter, and the expected coverage of all together."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from patchflow.errors import InputError
from patchflow.uncertainty.calibration import ecdf_band, ecdf_difference

# Blue and vermilion of Okabe and Ito, told apart by the colour-blind and in grey.
_INSIDE, _OUTSIDE = "#0072b2", "#d55e00"
_BAND, _INK = "#d9dee3", "#333333"


def draw_calibration(
    ranks: Int[Tensor, "datasets dim"],
    draws: int,
    levels: Float[Tensor, " levels"],
    coverage: Float[Tensor, " levels"],
    names: Sequence[str],
) -> bytes:
    """One panel per parameter and one for the coverage, each with what chance allows in grey.

    A parameter's panel has the distribution function of its ranks minus the uniform one and its
    simultaneous 95 % band: a curve that leaves it is vermilion. An S that is first above and then
    below zero means overconfidence, an arch a shift. Each calibrated parameter by itself leaves its
    band once in twenty times: of ten, one or more do in four pictures of ten.

    The last panel has the coverage beside the diagonal with the binomial 95 % interval at each
    level by itself; it is vermilion if the Kolmogorov-Smirnov test rejects at 5 %.

    Args:
        ranks: The ranks of :func:`patchflow.uncertainty.calibration.sbc_ranks`.
        draws: The number of draws that they are ranks among.
        levels: The levels of :func:`patchflow.uncertainty.calibration.tarp_coverage`.
        coverage: Its coverage.
        names: The names of the parameters.

    Returns:
        The PNG; write it with :func:`patchflow.io.atomic.write_bytes`.

    Raises:
        InputError: There is not one name for each parameter, or a rank is outside 0..draws.
    """
    datasets, dim = ranks.shape
    if len(names) != dim:
        raise InputError(
            f"There are {len(names)} names for {dim} parameters: give one name for each."
        )
    places, curves = (values.numpy() for values in ecdf_difference(ranks, draws))
    lower, upper = (values.numpy() for values in ecdf_band(draws, datasets))
    reach = 1.15 * float(max(abs(curves).max(), abs(lower).max(), abs(upper).max()))
    columns = _columns(dim + 1)
    rows = math.ceil((dim + 1) / columns)
    figure = Figure(
        figsize=(2.7 * columns + 0.3, 2.4 * rows + 0.2),
        dpi=130,
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        _draw_band(axes, places, lower, upper)
        curve = curves[:, index]
        outside = bool(((curve < lower - 1e-12) | (curve > upper + 1e-12)).any())
        axes.plot([0, 1], [0, 0], color=_INK, lw=0.7, ls=(0, (4, 3)))
        axes.plot(places, curve, color=_OUTSIDE if outside else _INSIDE, lw=1.6)
        axes.set(ylim=(-reach, reach), xlabel="fractional rank")
        axes.set_title(name, size=10, color=_INK)
        if index % columns == 0:
            axes.set_ylabel("ECDF difference")
    _draw_coverage(panels[dim], levels.cpu().numpy(), coverage.cpu().numpy(), datasets)
    for axes in panels[: dim + 1]:
        _tidy(axes)
    for axes in panels[dim + 1 :]:
        axes.set_visible(False)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


def _columns(panels: int) -> int:
    # Up to four panels stand in a row; of more, rows of three to five that leave the fewest blank.
    if panels <= 4:
        return panels
    return min((4, 3, 5), key=lambda columns: -panels % columns)


def _draw_band(axes: Axes, places: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
    axes.fill_between(places, lower, upper, color=_BAND, lw=0)


def _draw_coverage(axes: Axes, levels: np.ndarray, coverage: np.ndarray, datasets: int) -> None:
    lower, upper = (stats.binom.ppf(p, datasets, levels) / datasets for p in (0.025, 0.975))
    # At the levels 0 and 1 SciPy puts the quantile at -1 / datasets and the coverage is certain.
    _draw_band(axes, levels, np.clip(lower, 0, 1), np.clip(upper, 0, 1))
    axes.plot([0, 1], [0, 1], color=_INK, lw=0.7, ls=(0, (4, 3)))
    # The interval is pointwise and often left by chance; Kolmogorov's bound is for the whole curve.
    outside = bool(abs(coverage - levels).max() > stats.kstwo.ppf(0.95, datasets))
    axes.plot(levels, coverage, color=_OUTSIDE if outside else _INSIDE, lw=1.6)
    axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlabel="credibility", ylabel="coverage")
    axes.set_title("expected coverage", size=10, color=_INK)


def _tidy(axes: Axes) -> None:
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set(size=8.5, color=_INK)
    axes.yaxis.label.set(size=8.5, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
