"""The table of zero-shot super-resolution x2: each method sees one low-resolution photograph and nothing else.

The paper's protocol: photographs of BSD68 without their last row and column, a Gaussian blur of 16 x 16 pixels and
standard deviation 1 where it fits into the image, every second pixel, noise 0.01. What methods learn, they learn from
that measurement, so that learning belongs to the time of each image. Figures are taken inside of the 7 pixels that no
measured pixel covers. Weights and settings were chosen on other photographs (``benchmarks/zero_shot.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchflow import zero_shot
from patchflow.errors import InputError
from patchflow.io.images import read_image
from patchflow.methods import Task
from patchflow.metrics import LPIPS, psnr, ssim
from patchflow.papers.altekrueger2023_patchnr import PUBLISHED_ZERO_SHOT
from patchflow.papers.comparison import Case, Solver, check_choice, compare, complete
from patchflow.papers.image_problems import Region
from patchflow.papers.library import Lesson, check_finished
from patchflow.papers.pictures import Outcome, first_pictures
from patchflow.papers.rivals import TEACHERS
from patchflow.papers.rows import by_name
from patchflow.papers.tuned import WEIGHTS
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import dual_sr, zssr
from patchflow.records import Record
from patchflow.table import IMAGE_METRICS

NAME = "zero-shot-superresolution"
METHODS = (
    *("bicubic", "tv", "tgv", "wpp", "epll", "zssr", "dual-sr", "patchnr", "patchnr-paper"),
    "dip-tv",
)
# Of the paper's table; the others are ours to add.
USUAL = ("bicubic", "tv", "zssr", "patchnr", "dip-tv")
SCALE, NOISE, FRAME = 2, 0.01, 7
REGION = Region(slice(FRAME, -FRAME), slice(FRAME, -FRAME))
NOISE_SEEDS = 3


def run(
    data: Path,
    *,
    methods: Sequence[str] = USUAL,
    images: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    before: Sequence[Record] = (),
    keep: Callable[[Sequence[Record]], None] | None = None,
) -> Outcome:
    """Run the table.

    Args:
        data: The folder with ``noncommercial/bsd68/`` and ``weights/``.
        methods: Which of :data:`METHODS`.
        images: Number of images; all by default.
        seconds: Time in which patchnr, zssr and dual-sr learn from each image; their defaults (120 s) if not given.
        seed: Seed of training and noise: image k has the seed ``seed + k``.
        before: See :func:`patchflow.papers.comparison.compare`.
        keep: As well.

    Returns:
        The table, whose noise floor is the standard deviation over three noise seeds on the first image of total
        variation, or of the first method.

    Raises:
        InputError: If a method is unknown or a file is missing.
    """
    check_choice(methods, METHODS)
    paths = _paths(data, images)
    cases = [measured(path, seed + k) for k, path in enumerate(paths)]
    lpips = LPIPS(
        data / "weights" / "lpips_squeezenet11_features.safetensors",
        data / "weights" / "lpips_v0.1_squeeze_lin.safetensors",
    )

    def measure(case: Case, x: Tensor) -> Mapping[str, float]:
        x, truth = REGION(x.clamp(0, 1)), REGION(case.truth)
        figures = {"psnr": psnr(x, truth), "ssim": ssim(x, truth), "lpips": lpips(x, truth)}
        return {key: float(value[0]) for key, value in figures.items()}

    ordered = [method for method in METHODS if method in methods]
    outcome = compare(
        cases,
        {method: solver(method, seconds, seed) for method in ordered},
        measure,
        repeats=[measured(paths[0], seed + 1000 + k) for k in range(NOISE_SEEDS)],
        steady="tv" if "tv" in ordered else ordered[0],
        ranked=("psnr", "ssim", "lpips"),
        before=before,
        keep=keep,
    )
    protocol = (
        f"{len(cases)} photographs, x{SCALE}, noise {NOISE:g}, each method learns from its measurement alone, "
        f"{FRAME} pixels cropped, data range 1, {torch.get_num_threads()} threads"
    )
    table = outcome.table(NAME, protocol, IMAGE_METRICS, PUBLISHED_ZERO_SHOT)
    return Outcome(table, outcome.records, first_pictures(outcome, cases, ordered, {"": REGION}))


def measured(path: Path, seed: int) -> Case:
    """Read a photograph, without its last row and column, and simulate its measurement.

    Args:
        path: The photograph.
        seed: Seed of the noise.
    """
    truth = read_image(path, grey=True)[:, :, :-1, :-1]
    operator = downsample((truth.shape[2], truth.shape[3]), SCALE, boundary="valid")
    likelihood = GaussianLikelihood(operator, NOISE)
    torch.manual_seed(seed)
    return Case(path.stem, "", truth, likelihood, likelihood.simulate(truth))


def solver(method: str, seconds: float | None, seed: int, weight: float | None = None) -> Solver:
    """A method that sees the measurement of a case, and nothing else.

    Args:
        method: One of :data:`METHODS`.
        seconds: Time in which patchnr, zssr and dual-sr learn; their defaults if not given.
        seed: Seed of what is learned.
        weight: The weight of the prior; that of the table by default.
    """

    def solve(case: Case) -> Tensor:
        likelihood, y = case.likelihood, case.y
        assert isinstance(likelihood, GaussianLikelihood)
        start = likelihood.operator.initial(y)
        torch.manual_seed(seed)
        if method == "bicubic":
            return start
        if method == "zssr":
            limit = zssr.SECONDS if seconds is None else seconds
            return complete(zssr.reconstruct(likelihood, y, seconds=limit))
        if method == "dual-sr":
            limit = dual_sr.SECONDS if seconds is None else seconds
            return complete(dual_sr.reconstruct(likelihood, y, seconds=limit))
        if method in ("patchnr", "patchnr-paper"):
            preset = "paper" if method == "patchnr-paper" else "default"
            limit = None if preset == "paper" else seconds
            found = zero_shot.reconstruct(
                likelihood, y, weight=weight, seconds=limit, preset=preset
            )
            check_finished(found.training)
            return complete(found.solution)
        chosen = by_name(method)
        prior = TEACHERS[method](Lesson([y], [y], 0.0)) if method in TEACHERS else None
        own = WEIGHTS[NAME, ""].get(method) if weight is None else weight
        own = chosen.weight(likelihood, prior) if own is None else own
        return complete(chosen.solve(Task(likelihood, y, start, own, prior)))

    return solve


def _paths(data: Path, images: int | None) -> Sequence[Path]:
    if images is not None and images < 1:
        raise InputError(f"The number of images is {images} but must be at least 1.")
    folder = data / "noncommercial" / "bsd68"
    paths = sorted(folder.glob("test*.png"))[:images]
    if not paths:
        raise InputError(
            f"There is no image in {folder}; the 68 photographs are in the folder data/BSD68 of the public repository "
            "johertrich/Proximal_Neural_Networks."
        )
    return paths
