"""The tables of low-dose and limited-angle computed tomography with patchNR and its rivals.

LoDoPaB's geometry and noise. Truth: slices of one patient, reconstructed with two kernels, a soft one (B40f) and a
sharp one (B70f, whose own noise is truth here, too); the prior is learned from six slices of another patient and a
third kernel. Or, where it is at hand, LoDoPaB itself: the first 100 test images, as in the paper.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchflow.errors import InputError
from patchflow.io.lodopab import is_lodopab, read_pairs
from patchflow.learn import learn_patches
from patchflow.metrics import psnr, ssim
from patchflow.models import patch_nr
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers.altekrueger2023_patchnr import CT_LAMBDA, CT_PADDING, weight_of_mean
from patchflow.priors.patch import PatchPrior
from patchflow.problems.attenuation import from_hounsfield
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.tomography import ParallelBeam
from patchflow.reconstruct import total_variation, variational
from patchflow.table import SECONDS, Metric, Record, Table, build_table

try:
    import resource
except ImportError:  # Windows keeps no high-water mark that Python reads.
    resource = None

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


class Slice(NamedTuple):
    """A slice with its measurement, and what its row is called: the kernel, or nothing."""

    name: str
    group: str
    truth: Tensor
    sinogram: Tensor


def run(
    data: Path,
    problem: Problem,
    *,
    methods: Sequence[str] = METHODS,
    kernels: Sequence[str] = KERNELS,
    images: int | None = None,
    prior: PatchPrior | None = None,
    seconds: float = 300.0,
    seed: int = 0,
) -> tuple[Table, list[Record]]:
    """Run one of the two tables.

    Args:
        data: The folder with ``ct/``, or that of the unpacked LoDoPaB files.
        problem: Which table.
        methods: Which of :data:`METHODS` to run.
        kernels: Which of :data:`KERNELS` (not of LoDoPaB).
        images: Number of slices (of each kernel); by default nine, of LoDoPaB 100.
        prior: A trained patchNR; without it one is learned from six slices.
        seconds: Training time of that patchNR.
        seed: Seed of the noise: slice k has the seed ``seed + k``.

    Returns:
        The table, and the figures of each slice. The table's noise floor is the standard deviation over three noise
        seeds on the first slice, of total variation if it runs, else of the first method.

    Raises:
        InputError: If a method or kernel is unknown or a file is missing.
    """
    for given, known in ((methods, METHODS), (kernels, KERNELS)):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise InputError(
                f"There is no {unknown[0] if unknown else ''!r}; choose from {', '.join(known)}."
            )
    if images is not None and images < 1:
        raise InputError(f"The number of images is {images} but must be at least 1.")
    original = is_lodopab(data)
    fine = lodopab.geometry(lodopab.FINE)
    slices = (
        _lodopab_slices(data, images or 100)
        if original
        else _slices(data, kernels, images, fine, seed)
    )
    training = ""
    if "patchnr" in methods and prior is None:
        prior, training = _learn(data, seconds, seed)
    operator = lodopab.geometry()
    kept = lodopab.LIMITED if problem == "ct-limited-angle" else slice(None)
    likelihood = lodopab.likelihood(operator.select(kept))
    solvers = _solvers(problem, prior)
    records, peaks = [], {}
    for method in methods:
        for item in tqdm(slices, desc=method, unit="slice", dynamic_ncols=True):
            label = f"{method}, {item.group}" if item.group else method
            y = item.sinogram[:, :, kept]
            records.append(Record(label, item.name, _measure(solvers[method], likelihood, y, item)))
            # The process's high-water mark: methods run from the smallest to the largest.
            if resource is not None:
                peaks[label] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    floor = {}
    if not original:
        method = "tv" if "tv" in methods else methods[0]
        repeats = []
        for k in range(NOISE_SEEDS):
            noisy = _simulate(slices[0].truth, fine, seed + 1000 + k)[:, :, kept]
            repeats.append(_measure(solvers[method], likelihood, noisy, slices[0]))
        ranked = [metric.name for metric in METRICS if metric.higher_is_better]
        floor = {name: statistics.stdev(values[name] for values in repeats) for name in ranked}
    missing = "36 of 180 degrees missing, " if problem == "ct-limited-angle" else ""
    protocol = (
        f"LoDoPaB geometry, {missing}{lodopab.PHOTONS} photons, {len(slices)} slices, range of each slice or 1, "
        f"{torch.get_num_threads()} threads{training}"
    )
    table = build_table(
        problem,
        protocol,
        records,
        published=PUBLISHED[problem] if original else None,
        peak_mib=peaks,
        floor=floor,
        metrics=METRICS,
    )
    return table, records


def _learn(data: Path, seconds: float, seed: int) -> tuple[PatchPrior, str]:
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


def _slices(
    data: Path, kernels: Sequence[str], images: int | None, fine: ParallelBeam, seed: int
) -> list[Slice]:
    hu = _load(data / "ct" / "lung_val_hu.npz")
    with open(data / "ct" / "lung_val.csv", newline="") as file:
        names = [line["kernel"] for line in csv.DictReader(file)]
    slices = []
    for kernel in kernels:
        first = names.index(kernel)
        for row in REPORTED[:images]:
            torch.manual_seed(seed + row)
            truth = from_hounsfield(hu[None, None, first + row], dither=True)
            sinogram = _simulate(truth, fine, seed + row)
            slices.append(Slice(str(first + row), kernel, truth, sinogram))
    return slices


def _simulate(truth: Tensor, fine: ParallelBeam, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return lodopab.simulate(truth, fine)


def _lodopab_slices(folder: Path, images: int) -> list[Slice]:
    truth, sinograms = read_pairs(folder, "test", range(images))
    pairs = zip(truth.split(1), sinograms.split(1), strict=True)
    return [Slice(str(k), "", x, y) for k, (x, y) in enumerate(pairs)]


def _solvers(
    problem: Problem, prior: PatchPrior | None
) -> dict[str, Callable[[Likelihood, Tensor], Tensor]]:
    def fbp(likelihood: Likelihood, y: Tensor) -> Tensor:
        operator = likelihood.operator
        assert isinstance(operator, ParallelBeam)
        return operator.initial(y)

    def tv(likelihood: Likelihood, y: Tensor, steps: int = TV_STEPS[problem]) -> Tensor:
        weight = TV_WEIGHTS[problem]
        return total_variation.reconstruct(
            likelihood, y, fbp(likelihood, y), weight=weight, max_iterations=steps
        ).x

    def patchnr(likelihood: Likelihood, y: Tensor) -> Tensor:
        assert prior is not None
        init = tv(likelihood, y, TV_STEPS[problem] // 2)
        weight = weight_of_mean(CT_LAMBDA, (init.shape[2], init.shape[3]), prior)
        return variational.reconstruct(
            likelihood,
            prior,
            y,
            init,
            weight=weight,
            steps=PATCHNR_STEPS[problem],
            lr=STEP_SIZE,
        ).x

    return {"fbp": fbp, "tv": tv, "patchnr": patchnr}


def _measure(
    solve: Callable[[Likelihood, Tensor], Tensor], likelihood: Likelihood, y: Tensor, item: Slice
) -> Mapping[str, float]:
    begun = time.perf_counter()
    x = solve(likelihood, y)
    seconds = time.perf_counter() - begun
    own = float(item.truth.max() - item.truth.min())
    figures = {
        "psnr": psnr(x, item.truth, own),
        "ssim": ssim(x, item.truth, own),
        "psnr_range_1": psnr(x, item.truth),
        "ssim_range_1": ssim(x, item.truth),
    }
    return {name: float(value[0]) for name, value in figures.items()} | {"seconds": seconds}
