"""The figures of each method and image of a table, and their CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchflow.errors import InputError
from patchflow.io.atomic import write_text

_PEAK = "peak_mib"


@dataclass(frozen=True)
class Record:
    """The figures of one method on one image.

    Attributes:
        method: The method.
        image: The image's name.
        values: Figures by metric name.
        peak_mib: The process's high-water mark of memory when they were taken, if it is known.
    """

    method: str
    image: str
    values: Mapping[str, float | int]
    peak_mib: float | None = None


def write_csv(path: str | Path, records: Iterable[Record]) -> None:
    """Write per-image records as CSV, whole or not at all.

    Args:
        path: The file.
        records: The records; one line each, with the method, the image and a column per figure; a
            figure that is missing or not finite becomes an empty cell.

    Raises:
        InputError: The disk refuses.
    """
    records = list(records)
    names = list(dict.fromkeys(name for record in records for name in record.values))
    with_peak = any(record.peak_mib is not None for record in records)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "image", *names, *([_PEAK] if with_peak else [])])
    for record in records:
        figures = [strict(record.values.get(name)) for name in names]
        peak = [strict(record.peak_mib)] if with_peak else []
        writer.writerow([record.method, record.image, *figures, *peak])
    write_text(path, buffer.getvalue())


def read_csv(path: str | Path) -> list[Record]:
    """Read what :func:`write_csv` wrote; empty cells become NaN.

    Args:
        path: The file.

    Raises:
        InputError: If it is missing or not such a file.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if list(reader.fieldnames or [])[:2] != ["method", "image"]:
                raise ValueError(f"the columns are {reader.fieldnames}")
            return [_record(line) for line in reader]
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path} is not a table of records (method, image and a number for each figure): {error}; "
            "give the file that patchflow benchmark --csv wrote."
        ) from error


def _record(line: dict[str, str]) -> Record:
    method, image = line.pop("method"), line.pop("image")
    figures = {name: float(cell) if cell else math.nan for name, cell in line.items()}
    return Record(method, image, figures, figures.pop(_PEAK, None))


def strict(value: Any) -> Any:
    """A figure, or a tree of them, with None in place of what is not finite, as JSON wants it."""
    if isinstance(value, dict):
        return {name: strict(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
