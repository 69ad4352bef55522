"""Methods side by side: the same measurements, starts and clocks for all, a row for each method and kind of problem."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.likelihood import Likelihood
from patchflow.progress import progress_line
from patchflow.records import Record
from patchflow.solution import Solution
from patchflow.table import Metric, Table, build_table

try:
    import resource
except ImportError:  # Windows keeps no high-water mark that Python reads.
    resource = None


class Case(NamedTuple):
    """An image with its measurement.

    Attributes:
        image: The image's name.
        group: The kind of problem, which its rows are called after; empty if there is only one.
        truth: The image (1, channels, height, width).
        likelihood: The law of the measurement.
        y: The measurement.
    """

    image: str
    group: str
    truth: Tensor
    likelihood: Likelihood
    y: Tensor


Solver = Callable[[Case], Tensor]


class Comparison(NamedTuple):
    """What the methods gave.

    Attributes:
        records: The figures of each method and image.
        pictures: The new reconstructions of the first image of each kind of problem, by method and kind.
        floor: The noise floor of each metric that is ranked, see :class:`patchflow.table.Table`.
    """

    records: list[Record]
    pictures: dict[tuple[str, str], Tensor]
    floor: dict[str, float]

    def table(
        self,
        name: str,
        protocol: str,
        metrics: Sequence[Metric],
        published: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Table:
        """The table of these records; see :func:`patchflow.table.build_table`."""
        peaks: dict[str, float] = {}
        for record in self.records:
            if record.peak_mib is not None:
                peaks[record.method] = max(record.peak_mib, peaks.get(record.method, 0.0))
        return build_table(
            name,
            protocol,
            self.records,
            published=published,
            peak_mib=peaks,
            floor=self.floor,
            metrics=metrics,
        )


def complete(solution: Solution) -> Tensor:
    """The image of a solution.

    Raises:
        KeyboardInterrupt: If the user interrupted it: half a reconstruction is no figure.
    """
    if solution.interrupted:
        raise KeyboardInterrupt
    return solution.x


def check_choice(given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse unknown names and an empty choice.

    Raises:
        InputError: As said.
    """
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise InputError(
            f"There is no {unknown[0] if unknown else ''!r}; choose from {', '.join(known)}."
        )


def compare(
    cases: Sequence[Case],
    solvers: Mapping[str, Solver],
    measure: Callable[[Case, Tensor], Mapping[str, float]],
    *,
    repeats: Sequence[Case] = (),
    steady: str | None = None,
    ranked: Sequence[str] = ("psnr", "ssim"),
    leave_out: Collection[tuple[str, str]] = (),
    judge: Callable[[str, Case, Tensor], Mapping[str, float]] | None = None,
    before: Sequence[Record] = (),
    keep: Callable[[Sequence[Record]], None] | None = None,
) -> Comparison:
    """Solve all cases by all methods.

    The peak of memory is the process's high-water mark: methods run in the given order.

    Args:
        cases: The measured images.
        solvers: The methods, from the smallest in memory to the largest.
        measure: The figures of a reconstruction.
        repeats: The first image with other noise: the standard deviation of its figures is the noise floor.
        steady: The method that the floor is measured with; the last by default.
        ranked: The metrics that have a floor.
        leave_out: Methods and the kinds of problems that they cannot solve.
        judge: Further figures, which depend on the method, too; they have no floor, and their time is not counted.
        before: Figures of earlier runs on the same cases, which are kept and not taken again.
        keep: Called with all figures after each new one, so that an interruption loses nothing.
    """
    done = {(record.method, record.image): record for record in before}
    records, pictures = [], {}
    first = {case.group: case.image for case in reversed(cases)}
    for method, solve in solvers.items():
        possible = [case for case in cases if (method, case.group) not in leave_out]
        for case in progress_line(possible, title=method, unit="image"):
            label = f"{method}, {case.group}" if case.group else method
            if (label, case.image) in done:
                records.append(done[label, case.image])
                continue
            begun = time.perf_counter()
            x = solve(case)
            seconds = time.perf_counter() - begun
            values = dict(measure(case, x)) | {"seconds": seconds}
            if judge is not None:
                values |= judge(method, case, x)
            records.append(Record(label, case.image, values, _peak()))
            if case.image == first[case.group]:
                pictures[method, case.group] = x
            if keep is not None:
                keep(_joined(records, before))
    floor = {}
    if len(repeats) > 1:
        solve = solvers[steady or list(solvers)[-1]]
        figures = [measure(case, solve(case)) for case in repeats]
        floor = {name: statistics.stdev(values[name] for values in figures) for name in ranked}
    return Comparison(_joined(records, before), pictures, floor)


def _joined(records: Sequence[Record], before: Sequence[Record]) -> list[Record]:
    return [*records, *(record for record in before if record not in records)]


def _peak() -> float | None:
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
