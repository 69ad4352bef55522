"""The progress line of whatever takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Seconds between renewals on a terminal, and in a log.
_TERMINAL, _LOG = 0.1, 30.0


def progress_line(
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "step",
    title: str | None = None,
    shown: bool = True,
) -> tqdm[Any]:
    """A progress line on standard error: on a terminal it keeps moving, in a log it is renewed now and then.

    Args:
        items: What it goes through, if it does.
        total: How many, if they do not say it.
        initial: How many are done.
        unit: What they are.
        title: What stands before it.
        shown: Whether there is any line.
    """
    return tqdm(
        items,
        total=total,
        initial=initial,
        unit=unit,
        desc=title,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=_TERMINAL if sys.stderr.isatty() else _LOG,
    )
