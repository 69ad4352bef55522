"""What several commands share: threads and seed, the value range, loading a prior."""

from __future__ import annotations

from pathlib import Path

import torch

from patchflow.errors import InputError


def start(seed: int, threads: int | None) -> None:
    """Seed torch and set its number of threads.

    Raises:
        InputError: If ``threads`` is not positive.
    """
    if threads is not None:
        if threads < 1:
            raise InputError(f"The number of threads is {threads} but must be at least 1.")
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def value_range(text: str | None) -> tuple[float, float] | None:
    """Parse LO:HI.

    Raises:
        InputError: If the text is not two increasing numbers.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise InputError(f"The range {text!r} is not LO:HI with LO < HI; write for example 0:4095.")
    return low, high


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output file before any long computation, not after it.

    Raises:
        InputError: If the folder is missing or the extension is not one of ``suffixes``.
    """
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} for {path.name} does not exist; make it first.")
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"{path} has the extension {path.suffix!r}; use one of {', '.join(suffixes)}."
        )
