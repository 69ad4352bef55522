"""Tables of images: super-resolution, deblurring, inpainting and denoising, all methods side by side.

Every method gets the same measurements and the same start. Its one weight is the best of a grid on the validation image
(``benchmarks/tune.py``); everything else is its default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.io.images import read_image
from patchflow.methods import WEIGHTLESS, Task
from patchflow.metrics import LPIPS, psnr, ssim
from patchflow.papers import image_problems as problems
from patchflow.papers.altekrueger2023_patchnr import PUBLISHED
from patchflow.papers.comparison import Case, Solver, check_choice, compare, complete
from patchflow.papers.image_problems import ImageProblem
from patchflow.papers.library import Images, Library
from patchflow.papers.pictures import Outcome, first_pictures
from patchflow.papers.rivals import TEACHERS
from patchflow.papers.rows import by_name
from patchflow.papers.table_intervals import LEVEL, TableIntervals, calibration_case, check_kept
from patchflow.papers.tuned import WEIGHTS
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Shape
from patchflow.records import Record
from patchflow.table import IMAGE_METRICS, INTERVAL_METRICS

# From the smallest in memory to the largest. The start is bicubic interpolation, harmonic filling, or the measurement.
METHODS = (
    *("bicubic", "tikhonov", "tv", "tgv", "bm3d", "wpp", "wpp-sinkhorn", "local-ar", "patch-gan"),
    *("epll", "student-t", "patch-vae", "pnp-pnn", "dpir", "acnn", "wpp-net", "wpp-flow"),
    *("single-image-denoiser", "single-image", "patchnr-90s", "patchnr", "dip-tv"),
)
# Run if no methods are chosen: those that take at most two minutes for an image, with what the project installs.
USUAL = ("bicubic", "tv", "tgv", "wpp", "wpp-sinkhorn", "local-ar", "epll", "patchnr")
NOISE_SEEDS = 3
# Images by default where the material has a hundred: super-resolution is the paper's table.
_IMAGES = {"patchnr-superresolution": None, "deblurring": 2, "inpainting": 2, "denoising": 2}


def run(
    data: Path,
    name: str,
    *,
    methods: Sequence[str] = USUAL,
    images: int | None = None,
    models: Path | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    intervals: bool = False,
    before: Sequence[Record] = (),
    keep: Callable[[Sequence[Record]], None] | None = None,
) -> Outcome:
    """Run a table.

    Args:
        data: The folder with ``material/``, ``weights/`` and ``kernels/``.
        name: One of :data:`patchflow.papers.image_problems.PROBLEMS`.
        methods: Which of :data:`METHODS`.
        images: Number of test images of the material; all for super-resolution, else two by default.
        models: Folder in which learned models are kept and looked for.
        seconds: Training time of patchNR and of the networks; ``patchnr-90s`` always learns for 90 seconds.
        seed: Seed of training and noise: image k has the seed ``seed + k``.
        intervals: Whether to add coverage and width of 90 % intervals, see :mod:`patchflow.papers.table_intervals`.
        before: See :func:`patchflow.papers.comparison.compare`.
        keep: As well.

    Returns:
        The table, whose noise floor is the standard deviation over three noise seeds on the first image of the method
        that is fastest after the start.

    Raises:
        InputError: If a method is unknown, a file is missing, or ``before`` has other columns.
    """
    check_choice(methods, METHODS)
    check_kept(before, intervals)
    if images is not None and images < 1:
        raise InputError(f"The number of images is {images} but must be at least 1.")
    library = Library(models, seconds, seed, TEACHERS)
    groups = problems.PROBLEMS[name]
    cases = []
    for problem in groups:
        count = _IMAGES[name] if images is None else images
        paths = problems.reported_paths(data, problem.material, count)
        cases += [problem.case(data, path, seed + k) for k, path in enumerate(paths)]
    lpips = LPIPS(
        data / "weights" / "lpips_squeezenet11_features.safetensors",
        data / "weights" / "lpips_v0.1_squeeze_lin.safetensors",
    )
    by_group = {problem.group: problem for problem in groups}
    ordered = [method for method in METHODS if method in methods]
    regions = {group: problem.region for group, problem in by_group.items()}
    solvers = {method: solver(method, name, by_group, library, data) for method in ordered}
    known = {p.group: calibration_case(data, p, seed) for p in groups} if intervals else {}
    first = problems.reported_paths(data, groups[0].material, 1)[0]
    repeats = [groups[0].case(data, first, seed + 1000 + k) for k in range(NOISE_SEEDS)]
    for method in ordered:  # all that is learned, before the clocks run
        for problem in groups:
            if any(_solves(method, case) for case in cases if case.group == problem.group):
                learned(method, problem, library, data)

    def measure(case: Case, x: Tensor) -> Mapping[str, float]:
        region = regions[case.group]
        x, truth = region(x.clamp(0, 1)), region(case.truth)
        figures = {"psnr": psnr(x, truth), "ssim": ssim(x, truth), "lpips": lpips(x, truth)}
        return {key: float(value[0]) for key, value in figures.items()}

    outcome = compare(
        cases,
        solvers,
        measure,
        repeats=repeats,
        steady=next((m for m in ordered if m != "bicubic" and _solves(m, repeats[0])), ordered[0]),
        ranked=("psnr", "ssim", "lpips"),
        leave_out=[(m, case.group) for m in ordered for case in cases if not _solves(m, case)],
        judge=TableIntervals(known, solvers, regions) if intervals else None,
        before=before,
        keep=keep,
    )
    untuned = [
        method
        for method in ordered
        if method not in ("bicubic", *WEIGHTLESS)
        and any(_tuned(name, group, method) is None for group in by_group)
    ]
    defaults = f" (defaults for a kind: {', '.join(untuned)})" if untuned else ""
    spent = "".join(f"; {key}: {time:.0f} s" for key, time in library.trainings.items())
    protocol = (
        f"{len(cases)} measurements, data range 1, weights chosen on the validation image{defaults}, "
        f"{torch.get_num_threads()} threads"
        + (f", {LEVEL:.0%} intervals of that image" if intervals else "")
        + (f"; learned{spent[1:]}" if spent else "")
    )
    published = PUBLISHED if name == "patchnr-superresolution" else None
    metrics = (*IMAGE_METRICS, *INTERVAL_METRICS)
    table = outcome.table(name, protocol, metrics, published)
    return Outcome(table, outcome.records, first_pictures(outcome, cases, ordered, regions))


def learned(method: str, problem: ImageProblem, library: Library, data: Path) -> nn.Module | None:
    """The prior or the network of a method for a problem, or None if it needs none."""

    def pupils() -> tuple[Images, Images]:
        image = problems.training_image(data, problem.material)
        return [image], [read_image(problems.validation_path(data, problem.material), grey=True)]

    def law(shape: Shape) -> GaussianLikelihood:
        return GaussianLikelihood(problem.operator(data, shape), problem.std)

    # A prior serves all problems of a material, a network the one that it was trained for.
    trained = method == "single-image" and problem.group
    name = f"{problem.material}-{_slug(problem.group)}" if trained else problem.material
    return library.prior(method, name, pupils, law)


def _slug(group: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-")


def solver(
    method: str, name: str, by_group: Mapping[str, ImageProblem], library: Library, data: Path
) -> Solver:
    """A method as the table runs it: with its learned prior and its tuned weight.

    Args:
        method: One of :data:`METHODS`.
        name: The table.
        by_group: Its kinds of problems.
        library: What has been learned.
        data: The data folder.
    """

    def start(case: Case) -> Tensor:
        return _gaussian(case).operator.initial(case.y)

    def solve(case: Case) -> Tensor:
        problem = by_group[case.group]
        prior = learned(method, problem, library, data)
        chosen = by_name(method)
        likelihood = _gaussian(case)
        weight = _tuned(name, problem.group, method)
        if weight is None:
            weight = chosen.weight(likelihood, prior)
        torch.manual_seed(0)  # dip-tv draws its network
        return complete(chosen.solve(Task(likelihood, case.y, start(case), weight, prior)))

    return start if method == "bicubic" else solve


def _solves(method: str, case: Case) -> bool:
    return method == "bicubic" or by_name(method).solves(_gaussian(case))


def _tuned(name: str, group: str, method: str) -> float | None:
    return WEIGHTS.get((name, group), {}).get(method.removesuffix("-90s"))


def _gaussian(case: Case) -> GaussianLikelihood:
    assert isinstance(case.likelihood, GaussianLikelihood)
    return case.likelihood
