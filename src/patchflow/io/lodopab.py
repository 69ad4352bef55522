"""The files of the LoDoPaB-CT data set: pairs of lung CT slices and simulated low-dose sinograms.

A part of the data set is cut into files of 128 slices, ``ground_truth_{part}_{number:03d}.hdf5``
and ``observation_{part}_{number:03d}.hdf5``, all in one folder, with the data set ``data`` in each.
Ground truth is scaled so that 1 means 81.35858 / m; observations are post-log, divided by the same,
from 4096 photons for each bin, 1000 angles over half a turn and 513 bins.

References:
    Leuschner, Schmidt, Baguer, Maass (2021), LoDoPaB-CT, a benchmark dataset for low-dose computed
    tomography reconstruction, https://doi.org/10.1038/s41597-021-00893-z
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.hdf5 import open_hdf5

Part = Literal["train", "validation", "test"]

SOURCE = "https://zenodo.org/record/3384092"
SLICES_PER_FILE = 128
# The number of slices of each part of the published data set.
SLICES: dict[Part, int] = {"train": 35820, "validation": 3522, "test": 3553}

_SHAPES = {"ground_truth": (362, 362), "observation": (1000, 513)}
_NAME = re.compile(r"(ground_truth|observation)_(train|validation|test)_\d{3}\.hdf5")


def is_lodopab(folder: str | Path) -> bool:
    """Whether a folder holds files that are named as those of the data set.

    Args:
        folder: The folder, which need not exist.

    Returns:
        Whether there is at least one; :func:`read_pairs` says what is missing.
    """
    folder = Path(folder)
    return folder.is_dir() and any(_NAME.fullmatch(entry.name) for entry in folder.iterdir())


def read_pairs(
    folder: str | Path, part: Part, indices: Sequence[int]
) -> tuple[Float[Tensor, "pairs 1 362 362"], Float[Tensor, "pairs 1 1000 513"]]:
    """Read pairs of a ground truth and its observation, and nothing else of their files.

    Args:
        folder: The folder of the unpacked files.
        part: Which part of the data set.
        indices: The numbers of the slices in this part, counted from 0 across its files, in the
            order in which they are wanted.

    Returns:
        The ground truth in [0, 1] and the observations, float32.

    Raises:
        InputError: There are no indices or one is out of range, a file is missing, not HDF5 or
            damaged, its data have another shape or type, or a value is not finite.
    """
    folder = Path(folder)
    if not indices:
        raise InputError("No slices are chosen, but at least one is needed: give their indices.")
    for index in indices:
        if not 0 <= index < SLICES[part]:
            raise InputError(
                f"The index {index} is out of range, because the {part} part has {SLICES[part]} "
                f"slices: choose from 0 to {SLICES[part] - 1}."
            )
    # Before anything is read: a forgotten download is to be known at once.
    for number in sorted({index // SLICES_PER_FILE for index in indices}):
        for kind in _SHAPES:
            _check_exists(_file(folder, kind, part, number))
    truth, observations = (_read(folder, kind, part, indices) for kind in _SHAPES)
    return truth, observations


def _file(folder: Path, kind: str, part: Part, number: int) -> Path:
    return folder / f"{kind}_{part}_{number:03d}.hdf5"


def _check_exists(path: Path) -> None:
    if not path.is_file():
        archive = path.name.rsplit("_", 1)[0] + ".zip"
        raise InputError(
            f"There is no file {path.name} of LoDoPaB-CT in {path.parent}: download {archive} from "
            f"{SOURCE} and unpack it there."
        )


def _read(folder: Path, kind: str, part: Part, indices: Sequence[int]) -> Tensor:
    values = np.empty((len(indices), 1, *_SHAPES[kind]), np.float32)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index // SLICES_PER_FILE, []).append(place)
    for number, wanted in places.items():
        path = _file(folder, kind, part, number)
        with open_hdf5(path, "LoDoPaB-CT file") as file:
            data = _data(file, path, _SHAPES[kind])
            for place in wanted:
                row = indices[place] % SLICES_PER_FILE
                if row >= len(data):
                    raise InputError(
                        f"The index {indices[place]} needs slice {row} of {path}, which has only "
                        f"{len(data)} slices: choose a smaller index, or download the file again "
                        f"from {SOURCE}."
                    )
                values[place, 0] = data[row]
                if not np.isfinite(values[place]).all():
                    raise InputError(
                        f"{path} has NaN or infinite values in slice {row}, but all have to be "
                        f"finite: download it again from {SOURCE}."
                    )
    return torch.from_numpy(values)


def _data(file: Any, path: Path, shape: tuple[int, int]) -> Any:
    data = file.get("data")
    if data is None:
        raise InputError(
            f"{path} has no dataset 'data', but a file of LoDoPaB-CT has: download it again from "
            f"{SOURCE}."
        )
    if data.dtype.kind != "f" or data.shape[1:] != shape or data.ndim != 3:
        raise InputError(
            f"{path} has data of shape {data.shape} and type {data.dtype}, but floating-point "
            f"(slices, {shape[0]}, {shape[1]}) is needed: download it again from {SOURCE}."
        )
    return data
