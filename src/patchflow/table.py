"""Result tables: ours beside the published rows, as text, Markdown and JSON.

A table is built from per-image records. Means and standard deviations are over images (the sample
standard deviation, so one image has none). Nothing is dropped silently: a value that is not a
number makes its mean NaN, which text shows as "nan" and JSON as null.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from patchflow.errors import InputError
from patchflow.io.atomic import write_text
from patchflow.records import Record, strict


class Metric(NamedTuple):
    """How a metric is shown and compared.

    Attributes:
        name: Its key in records and JSON.
        label: Its column title.
        digits: Digits after the point.
        higher_is_better: The direction; None for figures that are only told, never ranked.
        unit: Its unit, or empty.
    """

    name: str
    label: str
    digits: int = 3
    higher_is_better: bool | None = False
    unit: str = ""

    @property
    def title(self) -> str:
        """The column title with the unit."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label


PSNR = Metric("psnr", "PSNR", 2, True, "dB")
SSIM = Metric("ssim", "SSIM", 3, True)
LPIPS = Metric("lpips", "LPIPS", 3, False)
SECONDS = Metric("seconds", "time", 1, None, "s")
IMAGE_METRICS = (PSNR, SSIM, LPIPS, SECONDS)
# Not ranked: the best coverage is the level that was asked for, and a width is good only at that coverage.
COVERAGE = Metric("coverage", "coverage", 3, None)
INTERVAL_WIDTH = Metric("interval_width", "interval width", 4, None)
INTERVAL_METRICS = (COVERAGE, INTERVAL_WIDTH)


@dataclass(frozen=True)
class Row:
    """A method's figures over all images; if there are none, only published ones."""

    method: str
    published: Mapping[str, float | int] = field(default_factory=dict)
    mean: Mapping[str, float | int] = field(default_factory=dict)
    std: Mapping[str, float | int] = field(default_factory=dict)
    images: int = 0
    peak_mib: float | int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of results under one protocol.

    Attributes:
        name: The benchmark's name.
        protocol: What was measured and how, in a sentence.
        rows: The methods.
        floor: The noise floor by metric name: the standard deviation of the mean figure over seeds
            of the measurement's noise. Smaller differences between methods mean nothing.
        metrics: The columns.
    """

    name: str
    protocol: str
    rows: tuple[Row, ...]
    floor: Mapping[str, float | int] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = IMAGE_METRICS

    def text(self) -> str:
        """The table as aligned text; the best figure of each column is marked by ``*``."""
        header, rows = self.grid()
        # The mark takes a column of its own, so that the digits stay below each other.
        cells = [[cell + ("*" if best else " ") for cell, best in row] for row in rows]
        cells = [[title + " " for title in header], *cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [_aligned(row, widths) for row in cells]
        lines.insert(1, " ".join("-" * (width - 1) + " " for width in widths).rstrip())
        title = f"{self.name}: {self.protocol}"
        return "\n".join([title, "", *lines, self._legend("* best of our runs")])

    def __str__(self) -> str:
        return self.text()

    def markdown(self) -> str:
        """The table as Markdown; the best figure of each column is bold."""
        header, rows = self.grid()
        cells = [[f"**{cell}**" if best else cell for cell, best in row] for row in rows]
        rule = ["---", *["---:"] * (len(header) - 1)]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *cells]]
        lines = ["| " + " | ".join(row) + " |" for row in escaped]
        return "\n".join([*lines, "", self._legend("**bold**: best of our runs")])

    def grid(self) -> tuple[list[str], list[list[tuple[str, bool]]]]:
        """The column titles, and by row each cell's text and whether it is its column's best."""
        measured = [m for m in self.metrics if any(m.name in row.mean for row in self.rows)]
        printed = [m for m in self.metrics if any(m.name in row.published for row in self.rows)]
        with_memory = any(row.peak_mib is not None for row in self.rows)
        header = ["method", *(metric.title for metric in measured)]
        header += ["peak [MiB]"] if with_memory else []
        header += ["images", *(f"published {metric.title}" for metric in printed)]
        best = {metric.name: self._best(metric) for metric in measured}
        cells = []
        for row in self.rows:
            line = [(row.method, False)]
            for metric in measured:
                mean = row.mean.get(metric.name)
                text = _plus_minus(mean, row.std.get(metric.name), metric)
                line.append((text, mean is not None and mean == best[metric.name]))
            if with_memory:
                line.append((_number(row.peak_mib, 0), False))
            line.append((str(row.images) if row.images else "-", False))
            for metric in printed:
                line.append((_number(row.published.get(metric.name), metric.digits), False))
            cells.append(line)
        return header, cells

    def document(self) -> dict[str, Any]:
        """The table as the benchmark JSON's document; figures that are not finite become None."""
        return {
            "name": self.name,
            "protocol": self.protocol,
            "rows": [strict(asdict(row)) for row in self.rows],
            "floor": strict(dict(self.floor)),
        }

    def json(self) -> str:
        """The table as strict JSON."""
        return json.dumps(self.document(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def write_json(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all.

        Args:
            path: The file.

        Raises:
            InputError: The disk refuses.
        """
        write_text(path, self.json())

    def _best(self, metric: Metric) -> float | None:
        means = (row.mean.get(metric.name, math.nan) for row in self.rows)
        values = [mean for mean in means if not math.isnan(mean)]
        # Of one row, nothing is the best.
        if metric.higher_is_better is None or len(values) < 2:
            return None
        return max(values) if metric.higher_is_better else min(values)

    def _legend(self, mark: str) -> str:
        parts = [mark, "mean ± standard deviation over images"]
        labels = {metric.name: metric.label for metric in self.metrics}
        floors = [f"{labels.get(name, name)} {value:.2g}" for name, value in self.floor.items()]
        parts += ["noise floor: " + ", ".join(floors)] if floors else []
        return "; ".join(parts) + "."


def build_table(
    name: str,
    protocol: str,
    records: Iterable[Record],
    *,
    published: Mapping[str, Mapping[str, float | int]] | None = None,
    peak_mib: Mapping[str, float | int] | None = None,
    floor: Mapping[str, float | int] | None = None,
    metrics: Sequence[Metric] = IMAGE_METRICS,
) -> Table:
    """Build a table from per-image records; methods keep the order in which they appear.

    Args:
        name: The benchmark's name.
        protocol: What was measured and how, in a sentence.
        records: One per method and image; a figure missing for an image makes its mean NaN.
        published: Published figures by method; methods that were not run follow after the others.
        peak_mib: Peak memory by method, in MiB; methods without records follow as well.
        floor: The noise floor by metric name, see :class:`Table`.
        metrics: The columns.

    Raises:
        InputError: A method has an image twice, or a figure has no column.
    """
    published, peak_mib, floor = published or {}, peak_mib or {}, floor or {}
    _check_known("noise floor", floor, metrics)
    for method, figures in published.items():
        _check_known(f"published row of {method}", figures, metrics)
    groups: dict[str, list[Record]] = {}
    for record in records:
        group = groups.setdefault(record.method, [])
        if any(other.image == record.image for other in group):
            twice = f"The image {record.image} has two records of {record.method}"
            raise InputError(f"{twice}, but one is needed: remove one.")
        _check_known(f"record of {record.method}", record.values, metrics)
        group.append(record)
    rows = []
    for method in dict.fromkeys([*groups, *published, *peak_mib]):
        group, printed = groups.get(method, []), dict(published.get(method, {}))
        mean, std = _moments(group, metrics)
        rows.append(Row(method, printed, mean, std, len(group), peak_mib.get(method)))
    return Table(name, protocol, tuple(rows), dict(floor), tuple(metrics))


def _check_known(what: str, figures: Mapping[str, float | int], metrics: Sequence[Metric]) -> None:
    known = sorted(metric.name for metric in metrics)
    for name in figures:
        if name not in known:
            raise InputError(
                f"The {what} has the figure {name}, which is not one of {', '.join(known)}: "
                "declare it as a Metric of the table."
            )


def _moments(
    group: Sequence[Record], metrics: Sequence[Metric]
) -> tuple[dict[str, float], dict[str, float]]:
    mean, std = {}, {}
    for metric in metrics:
        if not any(metric.name in record.values for record in group):
            continue
        values = [float(record.values.get(metric.name, math.nan)) for record in group]
        mean[metric.name] = math.fsum(values) / len(values)
        finite = all(map(math.isfinite, values))
        std[metric.name] = statistics.stdev(values) if finite and len(values) > 1 else math.nan
    return mean, std


def _number(value: float | int | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _plus_minus(mean: float | int | None, std: float | int | None, metric: Metric) -> str:
    shown = [mean] if std is None or math.isnan(std) else [mean, std]
    return " ± ".join(_number(value, metric.digits) for value in shown)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return " ".join([first, *rest]).rstrip()
