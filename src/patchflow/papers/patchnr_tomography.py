"""The tables of low-dose and limited-angle computed tomography with patchNR and its rivals.

LoDoPaB's geometry and noise. Truth: slices of one patient, reconstructed with two kernels, a soft one (B40f) and a
sharp one (B70f, whose own noise is truth here, too); the prior is learned from six slices of another patient and a
third kernel. Or, where it is at hand, LoDoPaB itself: the first 100 test images, as in the paper.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.lodopab import is_lodopab, read_pairs
from patchflow.learn import learn_patches
from patchflow.metrics import psnr, ssim
from patchflow.models import load, patch_nr, save
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers.altekrueger2023_patchnr import CT_LAMBDA, CT_PADDING, weight_of_mean
from patchflow.papers.comparison import Case, Solver, check_choice, compare
from patchflow.priors.patch import PatchPrior
from patchflow.problems.attenuation import from_hounsfield
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.tomography import ParallelBeam
from patchflow.reconstruct import total_variation, variational
from patchflow.records import Record
from patchflow.table import SECONDS, Metric, Table

Problem = Literal["ct-low-dose", "ct-limited-angle"]
METHODS = ("fbp", "tv", "patchnr")
KERNELS = ("B40f", "B70f")
# Rows of the soft kernel for what had to be chosen, and rows for the table; those of the other kernel follow.
TUNING = (2, 10, 18)
REPORTED = (0, 4, 6, 8, 12, 14, 16, 20, 22)
# Best mean PSNR on the tuning rows among 15, 20, 30, 40 (low dose) and 15, 25, 40, 60 (limited angle).
TV_WEIGHTS: dict[Problem, float] = {"ct-low-dose": 30.0, "ct-limited-angle": 40.0}
TV_STEPS: dict[Problem, int] = {"ct-low-dose": 150, "ct-limited-angle": 300}
# Adam on images whose details are a few thousandths.
STEP_SIZE = 0.003
PATCHNR_STEPS: dict[Problem, int] = {"ct-low-dose": 400, "ct-limited-angle": 1000}
TRAINING_SLICES = 6
NOISE_SEEDS = 3

METRICS = (
    Metric("psnr", "PSNR", 2, True, "dB"),
    Metric("ssim", "SSIM", 3, True),
    Metric("psnr_range_1", "PSNR, range 1", 2, True, "dB"),
    Metric("ssim_range_1", "SSIM, range 1", 3, True),
    SECONDS,
)
# Means over the first 100 test images of LoDoPaB; the range is that of each image.
PUBLISHED: dict[Problem, dict[str, dict[str, float]]] = {
    "ct-low-dose": {
        "fbp": {"psnr": 30.37, "ssim": 0.739},
        "tv": {"psnr": 32.95, "ssim": 0.803},
        "dip-tv": {"psnr": 34.45, "ssim": 0.821},
        "epll": {"psnr": 34.89, "ssim": 0.821},
        "local-ar": {"psnr": 33.64, "ssim": 0.807},
        "patchnr": {"psnr": 35.19, "ssim": 0.829},
        "fbp-unet": {"psnr": 35.48, "ssim": 0.837},
    },
    "ct-limited-angle": {
        "fbp": {"psnr": 21.96, "ssim": 0.531},
        "dip-tv": {"psnr": 32.57, "ssim": 0.803},
        "epll": {"psnr": 32.78, "ssim": 0.801},
        "local-ar": {"psnr": 31.06, "ssim": 0.779},
        "patchnr": {"psnr": 33.20, "ssim": 0.811},
        "fbp-unet": {"psnr": 33.75, "ssim": 0.820},
    },
}


def run(
    data: Path,
    problem: Problem,
    *,
    methods: Sequence[str] = METHODS,
    kernels: Sequence[str] = KERNELS,
    images: int | None = None,
    prior: PatchPrior | None = None,
    models: Path | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    before: Sequence[Record] = (),
    keep: Callable[[Sequence[Record]], None] | None = None,
) -> tuple[Table, list[Record]]:
    """Run one of the two tables.

    Args:
        data: The folder with ``ct/``, or that of the unpacked LoDoPaB files.
        problem: Which table.
        methods: Which of :data:`METHODS` to run.
        kernels: Which of :data:`KERNELS` (not of LoDoPaB).
        images: Number of slices (of each kernel); by default nine, of LoDoPaB 100.
        prior: A trained patchNR; without it one is learned from six slices.
        models: Folder in which it is looked for (patchnr-lung.safetensors) and kept.
        seconds: Training time of that patchNR.
        seed: Seed of the noise: slice k has the seed ``seed + k``.
        before: See :func:`patchflow.papers.comparison.compare`.
        keep: As well.

    Returns:
        The table, and the figures of each slice. The table's noise floor is the standard deviation over three noise
        seeds on the first slice, of total variation if it runs, else of the first method.

    Raises:
        InputError: If a method or kernel is unknown or a file is missing.
    """
    check_choice(methods, METHODS)
    check_choice(kernels, KERNELS)
    if images is not None and images < 1:
        raise InputError(f"The number of images is {images} but must be at least 1.")
    original = is_lodopab(data)
    fine = lodopab.geometry(lodopab.FINE)
    kept = lodopab.LIMITED if problem == "ct-limited-angle" else slice(None)
    likelihood = lodopab.likelihood(lodopab.geometry().select(kept))
    cases = (
        _lodopab_cases(data, images or 100, likelihood, kept)
        if original
        else _cases(data, kernels, images, fine, likelihood, kept, seed)
    )
    training = ""
    if "patchnr" in methods and prior is None:
        prior, training = _learn(data, models, seconds, seed)
    first = cases[0]
    repeats = [
        first._replace(y=_simulate(first.truth, fine, seed + 1000 + k)[:, :, kept])
        for k in range(0 if original else NOISE_SEEDS)
    ]
    solvers = _solvers(problem, prior)
    outcome = compare(
        cases,
        {method: solvers[method] for method in methods},
        _measure,
        repeats=repeats,
        steady="tv" if "tv" in methods else methods[0],
        ranked=[metric.name for metric in METRICS if metric.higher_is_better],
        before=before,
        keep=keep,
    )
    missing = "36 of 180 degrees missing, " if problem == "ct-limited-angle" else ""
    protocol = (
        f"LoDoPaB geometry, {missing}{lodopab.PHOTONS} photons, {len(cases)} slices, range of each slice or 1, "
        f"{torch.get_num_threads()} threads{training}"
    )
    published = PUBLISHED[problem] if original else None
    return outcome.table(problem, protocol, METRICS, published), outcome.records


def _learn(data: Path, models: Path | None, seconds: float, seed: int) -> tuple[PatchPrior, str]:
    path = None if models is None else models / "patchnr-lung.safetensors"
    if path is not None and path.exists():
        return load(path, PatchPrior), ""
    images = training_images(data, seed)
    prior = patch_nr(padding=CT_PADDING)
    torch.manual_seed(seed)
    training = learn_patches(
        prior,
        images[:TRAINING_SLICES],
        images[TRAINING_SLICES:],
        steps=10**6,
        seconds=seconds,
        progress=True,
    )
    if path is not None:
        save(path, prior, images=images[:TRAINING_SLICES], seed=seed)
    return prior, f"; patchnr trained for {training.seconds:.0f} s ({training.steps} steps)"


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


def _cases(
    data: Path,
    kernels: Sequence[str],
    images: int | None,
    fine: ParallelBeam,
    likelihood: Likelihood,
    kept: slice,
    seed: int,
) -> list[Case]:
    hu = _load(data / "ct" / "lung_val_hu.npz")
    with open(data / "ct" / "lung_val.csv", newline="") as file:
        names = [line["kernel"] for line in csv.DictReader(file)]
    cases = []
    for kernel in kernels:
        first = names.index(kernel)
        for row in REPORTED[:images]:
            torch.manual_seed(seed + row)
            truth = from_hounsfield(hu[None, None, first + row], dither=True)
            y = _simulate(truth, fine, seed + row)[:, :, kept]
            cases.append(Case(str(first + row), kernel, truth, likelihood, y))
    return cases


def _simulate(truth: Tensor, fine: ParallelBeam, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return lodopab.simulate(truth, fine)


def _lodopab_cases(folder: Path, images: int, likelihood: Likelihood, kept: slice) -> list[Case]:
    truth, sinograms = read_pairs(folder, "test", range(images))
    pairs = zip(truth.split(1), sinograms.split(1), strict=True)
    return [Case(str(k), "", x, likelihood, y[:, :, kept]) for k, (x, y) in enumerate(pairs)]


def _solvers(problem: Problem, prior: PatchPrior | None) -> dict[str, Solver]:
    def fbp(case: Case) -> Tensor:
        operator = case.likelihood.operator
        assert isinstance(operator, ParallelBeam)
        return operator.initial(case.y)

    def tv(case: Case, steps: int = TV_STEPS[problem]) -> Tensor:
        weight = TV_WEIGHTS[problem]
        return total_variation.reconstruct(
            case.likelihood, case.y, fbp(case), weight=weight, max_iterations=steps
        ).x

    def patchnr(case: Case) -> Tensor:
        assert prior is not None
        init = tv(case, TV_STEPS[problem] // 2)
        weight = weight_of_mean(CT_LAMBDA, (init.shape[2], init.shape[3]), prior)
        return variational.reconstruct(
            case.likelihood,
            prior,
            case.y,
            init,
            weight=weight,
            steps=PATCHNR_STEPS[problem],
            lr=STEP_SIZE,
        ).x

    return {"fbp": fbp, "tv": tv, "patchnr": patchnr}


def _measure(case: Case, x: Tensor) -> Mapping[str, float]:
    own = float(case.truth.max() - case.truth.min())
    figures = {
        "psnr": psnr(x, case.truth, own),
        "ssim": ssim(x, case.truth, own),
        "psnr_range_1": psnr(x, case.truth),
        "ssim_range_1": ssim(x, case.truth),
    }
    return {name: float(value[0]) for name, value in figures.items()}
