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
        InputError: If the folder is missing, the path is a folder, or the extension is not one of ``suffixes``.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file in it.")
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} for {path.name} does not exist; make it first.")
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"{path} has the extension {path.suffix!r}; use one of {', '.join(suffixes)}."
        )


def check_stack(path: Path, images: int) -> None:
    """Refuse a stack for a format that holds one image, before any long computation.

    Raises:
        InputError: If there are several images and ``path`` is a PNG or JPEG.
    """
    if images > 1 and path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        raise InputError(
            f"{path} can hold one image, but there are {images}; use .tif or .npy for a stack."
        )


def output_folder(path: str) -> Path:
    """Make the folder of a report before any long computation.

    Raises:
        InputError: If it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The folder {path} cannot be made ({error.strerror}); give another one."
        ) from error
    return folder
