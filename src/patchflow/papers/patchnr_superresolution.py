"""The table of super-resolution of a material (x4) with patchNR and its rivals, on the published test images.

One training image, one validation image; nothing is chosen on test images. The metrics leave out 40 pixels on
each side, with data range 1, as in the paper.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.io.images import read_image
from patchflow.learn import learn_patches
from patchflow.metrics import LPIPS, crop, psnr, ssim
from patchflow.models import patch_nr
from patchflow.papers.altekrueger2023_patchnr import CROP, NOISE, PUBLISHED, SIZE
from patchflow.priors.patch import PatchPrior
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import total_variation
from patchflow.reconstruct.variational import DEFAULT_WEIGHT, reconstruct
from patchflow.table import Record, Table, build_table

try:
    import resource
except ImportError:  # Windows keeps no high-water mark that Python reads.
    resource = None

METHODS = ("bicubic", "tv", "patchnr-90s", "patchnr")
# Training times in seconds; "patchnr" without a model is trained as long as the caller says.
SHORT_TRAINING = 90.0
# Highest PSNR on the validation image among 2, 2.5, 3, 3.5, 4, 5, 6, 12: 27.87 dB; 27.03 dB if not isotropic.
TV_WEIGHT = 3.5
NOISE_SEEDS = 3
# Part of a patch's energy that the literature leaves out.
_CONSTANT = SIZE**2 / 2 * math.log(2 * math.pi)


def run(
    data: Path,
    *,
    methods: Sequence[str] = METHODS,
    images: int | None = None,
    prior: PatchPrior | None = None,
    seconds: float = 300.0,
    seed: int = 0,
) -> tuple[Table, list[Record]]:
    """Run the table.

    Args:
        data: The folder with ``material/`` and ``weights/``.
        methods: Which of :data:`METHODS` to run.
        images: Number of test images; all by default.
        prior: A trained patchNR for ``"patchnr"``; without it one is learned from the training image.
        seconds: Training time of that patchNR; ``"patchnr-90s"`` always learns for 90 seconds.
        seed: Seed of the noise: image k has the seed ``seed + k``.

    Returns:
        The table, and the figures of each image. The table's noise floor is the standard deviation over three noise
        seeds on the first image, of the last method.

    Raises:
        InputError: If a method is unknown or a file is missing.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise InputError(
            f"There is no method {unknown[0] if unknown else ''!r}; choose from {', '.join(METHODS)}."
        )
    if images is not None and images < 1:
        raise InputError(f"The number of images is {images} but must be at least 1.")
    tests = sorted(
        (data / "material" / "test").glob("img*.png"),
        key=lambda path: int(re.findall(r"\d+", path.name)[-1]),
    )[:images]
    if not tests:
        raise InputError(
            f"There is no image in {data / 'material' / 'test'}; the 100 test images are in the folder "
            "testset_superres of "
            "the paper's public repository FabianAltekrueger/patchNR."
        )
    lpips = LPIPS(
        data / "weights" / "lpips_squeezenet11_features.safetensors",
        data / "weights" / "lpips_v0.1_squeeze_lin.safetensors",
    )
    priors = {} if prior is None else {"patchnr": prior}
    trainings = ""
    for method, budget in (("patchnr-90s", SHORT_TRAINING), ("patchnr", seconds)):
        if method in methods and method not in priors:
            priors[method], training = _learn(data / "material", budget, seed)
            trainings += (
                f"; {method} trained for {training.seconds:.0f} s ({training.steps} steps) to "
                f"{training.best - _CONSTANT:.2f} nats per validation patch (without 18 log 2 pi)"
            )
    solvers = _solvers(priors)
    records, peaks = [], {}
    for method in methods:
        for k, path in enumerate(tqdm(tests, desc=method, unit="image", dynamic_ncols=True)):
            values = _measure(solvers[method], read_image(path, grey=True), seed + k, lpips)
            records.append(Record(method, path.stem, values))
        # The process's high-water mark: methods run from the smallest to the largest.
        if resource is not None:
            peaks[method] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    repeats = [
        _measure(solvers[methods[-1]], read_image(tests[0], grey=True), seed + 1000 + k, lpips)
        for k in range(NOISE_SEEDS)
    ]
    floor = {
        name: statistics.stdev(values[name] for values in repeats)
        for name in ("psnr", "ssim", "lpips")
    }
    protocol = (
        f"material x4, {len(tests)} test images, noise {NOISE}, {CROP}-pixel border removed, data range 1, "
        f"{torch.get_num_threads()} threads{trainings}"
    )
    table = build_table(
        "patchnr-superresolution",
        protocol,
        records,
        published=PUBLISHED,
        peak_mib=peaks,
        floor=floor,
    )
    return table, records


def _learn(folder: Path, seconds: float, seed: int) -> tuple[PatchPrior, Fit]:
    torch.manual_seed(seed)
    prior = patch_nr()
    training = learn_patches(
        prior,
        [read_image(folder / "img_learn_material.png", grey=True)],
        [read_image(folder / "img_val_material.png", grey=True)],
        steps=10**6,
        seconds=seconds,
        progress=True,
    )
    return prior, training


def _solvers(
    priors: Mapping[str, PatchPrior],
) -> dict[str, Callable[[GaussianLikelihood, Tensor], Tensor]]:
    def bicubic(likelihood: GaussianLikelihood, y: Tensor) -> Tensor:
        return likelihood.operator.initial(y)

    def tv(likelihood: GaussianLikelihood, y: Tensor) -> Tensor:
        init = bicubic(likelihood, y)
        return total_variation.reconstruct(likelihood, y, init, weight=TV_WEIGHT).x

    def patchnr(likelihood: GaussianLikelihood, y: Tensor, prior: PatchPrior) -> Tensor:
        return reconstruct(likelihood, prior, y, bicubic(likelihood, y), weight=DEFAULT_WEIGHT).x

    learned = {name: partial(patchnr, prior=prior) for name, prior in priors.items()}
    return {"bicubic": bicubic, "tv": tv, **learned}


def _measure(
    solve: Callable[[GaussianLikelihood, Tensor], Tensor], truth: Tensor, seed: int, lpips: LPIPS
) -> dict[str, float]:
    shape = (truth.shape[2], truth.shape[3])
    likelihood = GaussianLikelihood(downsample(shape), NOISE)
    torch.manual_seed(seed)
    y = likelihood.simulate(truth)
    begun = time.perf_counter()
    x = solve(likelihood, y)
    seconds = time.perf_counter() - begun
    x, truth = crop(x.clamp(0, 1), CROP), crop(truth, CROP)
    figures = {"psnr": psnr(x, truth), "ssim": ssim(x, truth), "lpips": lpips(x, truth)}
    return {name: float(value[0]) for name, value in figures.items()} | {"seconds": seconds}
