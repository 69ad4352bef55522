"""Error bars in the tables of images: fitted on the validation image alone, judged on the test images.

For each method and kind of problem one measurement of the validation image is simulated and reconstructed by that
method, and intervals that cover 90 % of its pixels are fitted, as ``patchflow calibrate`` does
(:mod:`patchflow.uncertainty.intervals`). Of each test image it is told what share of its pixels they cover, and their
mean width, where all its figures are taken. A method whose errors are the same on new images has a coverage near the
level; more is not better, so nothing is ranked by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from patchflow.errors import InputError
from patchflow.papers.comparison import Case, Solver
from patchflow.papers.image_problems import ImageProblem, Region, validation_path
from patchflow.records import Record
from patchflow.table import INTERVAL_METRICS
from patchflow.uncertainty.intervals import Intervals, check_images, fit_intervals

LEVEL = 0.9
# Beside the seeds of the test images, which are 0, 1, 2, ..., and those of the noise floor, 1000, 1001, ...
CALIBRATION_SEED = 999


def calibration_case(data: Path, problem: ImageProblem, seed: int = 0) -> Case:
    """The validation image of a kind of problem with a measurement of its own.

    Args:
        data: The data folder.
        problem: The kind of problem.
        seed: The seed of the table.

    Raises:
        InputError: If the image is missing or too small for intervals.
    """
    path = validation_path(data, problem.material)
    case = problem.case(data, path, seed + CALIBRATION_SEED)
    check_images([case.truth], LEVEL)
    return case


class TableIntervals:
    """The intervals of each method and kind of problem, each fitted at its first use.

    Args:
        calibration: The validation image with its measurement, by kind of problem.
        solvers: The methods.
        regions: Where figures are taken, by kind of problem.
        level: The share of the pixels to cover.
    """

    def __init__(
        self,
        calibration: Mapping[str, Case],
        solvers: Mapping[str, Solver],
        regions: Mapping[str, Region],
        level: float = LEVEL,
    ) -> None:
        self.calibration, self.solvers, self.regions = calibration, solvers, regions
        self.level = level
        self._fitted: dict[tuple[str, str], Intervals] = {}

    def fitted(self, method: str, group: str) -> Intervals:
        """The intervals of a method for a kind of problem."""
        if (method, group) not in self._fitted:
            case = self.calibration[group]
            x = self.solvers[method](case)
            self._fitted[method, group] = fit_intervals([x], [case.truth], level=self.level)
        return self._fitted[method, group]

    def __call__(self, method: str, case: Case, x: Tensor) -> Mapping[str, float]:
        """The share of the pixels of a reconstruction that are covered, and the mean width."""
        region = self.regions[case.group]
        # Of the whole image, then cut: the contrast at the edge of the region is that of its surroundings, too.
        low, high = (region(end) for end in self.fitted(method, case.group)(x))
        truth = region(case.truth)
        covered = (low <= truth) & (truth <= high)
        figures = (covered.to(x).mean(), (high - low).mean())
        return {m.name: float(v) for m, v in zip(INTERVAL_METRICS, figures, strict=True)}


def check_kept(records: Sequence[Record], intervals: bool) -> None:
    """Refuse to go on with figures of a table with other columns: their means would be of a part of the images.

    Args:
        records: The figures of an interrupted run.
        intervals: Whether the table has the columns of intervals.

    Raises:
        InputError: If a record lacks them, or has them in a table without.
    """
    for record in records:
        there = [math.isfinite(record.values.get(m.name, math.nan)) for m in INTERVAL_METRICS]
        if intervals and not all(there):
            raise InputError(
                f"The kept figures of {record.method} on {record.image} lack the columns of --intervals "
                f"({', '.join(m.name for m in INTERVAL_METRICS)}); leave --intervals out, or take all of them anew "
                "into another file."
            )
        if not intervals and any(there):
            raise InputError(
                f"The kept figures of {record.method} on {record.image} have the columns of --intervals, which new "
                "ones would lack; add --intervals, or give another file."
            )
