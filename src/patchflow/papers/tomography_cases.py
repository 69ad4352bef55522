"""The slices that the tables of tomography learn from and measure: two patients, or LoDoPaB itself."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.lodopab import is_lodopab, read_pairs
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers.comparison import Case
from patchflow.problems.attenuation import from_hounsfield
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.tomography import ParallelBeam

KERNELS = ("B40f", "B70f")
# Rows of the soft kernel for what had to be chosen, and rows for the table; those of the other kernel follow.
TUNING = (2, 10, 18)
REPORTED = (0, 4, 6, 8, 12, 14, 16, 20, 22)
TRAINING_SLICES = 6


def training_images(data: Path, seed: int = 0) -> list[Tensor]:
    """Six slices to learn from, and two more to validate on.

    Args:
        data: As in :func:`run`.
        seed: Seed of the dither.

    Raises:
        InputError: If a file is missing.
    """
    if is_lodopab(data):
        truth, _ = read_pairs(data, "train", range(TRAINING_SLICES))
        held, _ = read_pairs(data, "validation", range(2))
        return list(torch.cat((truth, held)).split(1))
    hu = _load(data / "ct" / "lung_train_hu.npz")
    torch.manual_seed(seed)
    rows = [round(k * (len(hu) - 1) / (TRAINING_SLICES - 1)) for k in range(TRAINING_SLICES)]
    held = [row + 3 for row in (rows[1], rows[3])]
    return list(from_hounsfield(hu[[*rows, *held], None], dither=True).split(1))


def _load(path: Path) -> Tensor:
    try:
        with np.load(path) as file:
            return torch.from_numpy(file["hu"].astype(np.float32))
    except OSError as error:
        raise InputError(
            f"There is no {path}; give --data the folder with ct/, or the folder of the unpacked LoDoPaB data set "
            "(https://zenodo.org/record/3384092)."
        ) from error


def simulated_cases(
    data: Path,
    kernels: Sequence[str],
    images: int | None,
    fine: ParallelBeam,
    likelihood: Likelihood,
    kept: slice,
    seed: int,
    rows: Sequence[int] | None = None,
    patient: Literal["val", "train"] = "val",
) -> list[Case]:
    """Slices of a patient, measured with noise.

    Args:
        data: The folder with ``ct/``.
        kernels: Which of :data:`KERNELS`, or of the patient's.
        images: Number of slices of each kernel; None for all of :data:`REPORTED`.
        fine: The projector that simulates.
        likelihood: The law of the sinograms.
        kept: The measured angles.
        seed: Slice k has the seed ``seed + k``.
        rows: The slices.
        patient: The one of validation, or that from which methods learn, with a kernel of its own.

    Raises:
        InputError: If a file is missing.
    """
    hu = _load(data / "ct" / f"lung_{patient}_hu.npz")
    with open(data / "ct" / f"lung_{patient}.csv", newline="") as file:
        names = [line["kernel"] for line in csv.DictReader(file)]
    cases = []
    for kernel in kernels:
        first = names.index(kernel)
        for row in (REPORTED if rows is None else rows)[:images]:
            torch.manual_seed(seed + row)
            truth = from_hounsfield(hu[None, None, first + row], dither=True)
            y = simulate(truth, fine, seed + row)[:, :, kept]
            cases.append(Case(str(first + row), kernel, truth, likelihood, y))
    return cases


def simulate(truth: Tensor, fine: ParallelBeam, seed: int) -> Tensor:
    """The sinogram of a slice by all angles, with the noise of a seed."""
    torch.manual_seed(seed)
    return lodopab.simulate(truth, fine)


def lodopab_cases(folder: Path, images: int, likelihood: Likelihood, kept: slice) -> list[Case]:
    """The first test images of LoDoPaB with their own measurements."""
    truth, sinograms = read_pairs(folder, "test", range(images))
    pairs = zip(truth.split(1), sinograms.split(1), strict=True)
    return [Case(str(k), "", x, likelihood, y[:, :, kept]) for k, (x, y) in enumerate(pairs)]
