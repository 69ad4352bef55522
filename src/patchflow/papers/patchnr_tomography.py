"""The tables of low-dose and limited-angle computed tomography with patchNR and its rivals.

LoDoPaB's geometry and noise. Truth: slices of one patient, reconstructed with two kernels, a soft one (B40f) and a
sharp one (B70f, whose own noise is truth here, too); the prior is learned from six slices of another patient and a
third kernel. Or, where it is at hand, LoDoPaB itself: the first 100 test images, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.io.lodopab import is_lodopab
from patchflow.learn_critic import learn_critic, noise
from patchflow.learn_mixture import learn_epll
from patchflow.learn_reference import learn_wpp
from patchflow.learn_scan import learn_scan
from patchflow.metrics import psnr, ssim
from patchflow.models import alr, fbp_unet, single_scan
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers import prost2021_local_ar as prost
from patchflow.papers import tomography_cases as slices
from patchflow.papers.altekrueger2023_patchnr import CT_PADDING
from patchflow.papers.comparison import Case, Solver, check_choice, compare, complete
from patchflow.papers.image_problems import Region
from patchflow.papers.library import Images, Lesson, Library, Teacher, check_finished
from patchflow.papers.pictures import Outcome, first_pictures
from patchflow.papers.rivals import learn_patchnr
from patchflow.papers.rows import by_name as image_method
from patchflow.papers.tomography_cases import KERNELS, TRAINING_SLICES
from patchflow.priors.patch import PatchPrior
from patchflow.problems.attenuation import to_hounsfield
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.tomography import ParallelBeam
from patchflow.records import Record
from patchflow.scan_network import ScanNetwork
from patchflow.table import SECONDS, Metric
from patchflow.tomography_methods import METHODS as BY_NAME
from patchflow.tomography_methods import Options, Task, TomographyMethod, method_of

Problem = Literal["ct-low-dose", "ct-limited-angle"]
# patchNR that starts at the result of single-image.
AFTER = "patchnr-after-single-image"
METHODS = (
    *("fbp", "tv", "tgv", "dip-tv", "wpp", "wpp-sinkhorn", "local-ar", "epll", "patchnr"),
    *("fbp-unet", "single-image", AFTER),
)
USUAL = tuple(method for method in METHODS if method != "dip-tv")
# Networks for a scan: they learn from its measurements, where other methods learn from images.
SCANNED = {"fbp-unet": fbp_unet, "single-image": single_scan}
NOISE_SEEDS = 3
# The largest noise that the critic sees in degraded patches: filtered backprojections have less than half of it.
CRITIC_NOISE = 0.05
# Smoothing of wpp-sinkhorn, in squared units of the image: the survey's, not tuned. The cost from a patch to the
# nearest reference is 6e-4 in the median; that of the tables of images, 1e-2, would mix a fifth of all references.
EPSILON = 1e-4
# What figures show as black and white, in HU: lungs and soft tissue at once.
WINDOW = (-1000.0, 400.0)
# Of the 765,000 patches of six slices.
EPLL_PATCHES = 300_000

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
    methods: Sequence[str] = USUAL,
    kernels: Sequence[str] = KERNELS,
    images: int | None = None,
    prior: PatchPrior | None = None,
    models: Path | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    before: Sequence[Record] = (),
    keep: Callable[[Sequence[Record]], None] | None = None,
) -> Outcome:
    """Run one of the two tables.

    Args:
        data: The folder with ``ct/``, or that of the unpacked LoDoPaB files.
        problem: Which table.
        methods: Which of :data:`METHODS` to run.
        kernels: Which of :data:`KERNELS` (not of LoDoPaB).
        images: Number of slices (of each kernel); by default nine, of LoDoPaB 100.
        prior: A trained patchNR; without it one is learned from six slices.
        models: Folder in which learned models are looked for and kept.
        seconds: Training time of patchNR and of the networks.
        seed: Seed of the noise: slice k has the seed ``seed + k``.
        before: See :func:`patchflow.papers.comparison.compare`.
        keep: As well.

    Returns:
        The table, the figures of each slice, and pictures of the first slice of each kernel. The table's noise floor
        is the standard deviation over three noise seeds on the first slice, of total variation if it runs, else of the
        first method.

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
        slices.lodopab_cases(data, images or 100, likelihood, kept)
        if original
        else slices.simulated_cases(data, kernels, images, fine, likelihood, kept, seed)
    )

    def pupils() -> tuple[Images, Images]:
        found = slices.training_images(data, seed)
        return found[:TRAINING_SLICES], found[TRAINING_SLICES:]

    measured = fine if kept == slice(None) else fine.select(kept)
    scanned = {
        method: partial(_scanned, make=make, likelihood=likelihood, fine=measured)
        for method, make in SCANNED.items()
    }
    library = Library(models, seconds, seed, TEACHERS | scanned, by_name)
    if prior is not None:
        library.priors["patchnr-lung"] = prior
    ordered = [method for method in METHODS if method in methods]

    def learned(method: str) -> nn.Module | None:
        return library.prior(method, problem if method in SCANNED else "lung", pupils)

    solvers = {
        method: solver(problem, method, learned(method)) for method in ordered if method != AFTER
    }
    if AFTER in ordered:
        network = learned("single-image")
        assert isinstance(network, ScanNetwork)
        solvers[AFTER] = solver(problem, AFTER, learned("patchnr"), network)
    first = cases[0]
    repeats = [
        first._replace(y=slices.simulate(first.truth, fine, seed + 1000 + k)[:, :, kept])
        for k in range(0 if original else NOISE_SEEDS)
    ]
    outcome = compare(
        cases,
        solvers,
        _measure,
        repeats=repeats,
        steady="tv" if "tv" in ordered else ordered[0],
        ranked=[metric.name for metric in METRICS if metric.higher_is_better],
        before=before,
        keep=keep,
    )
    training = "".join(
        f"; {key} learned in {time:.0f} s" for key, time in library.trainings.items()
    )
    missing = "36 of 180 degrees missing, " if problem == "ct-limited-angle" else ""
    started = any(by_name(method).refines for method in ordered if method != AFTER)
    start = (
        ", learned methods start at total variation (counted in their seconds)" if started else ""
    )
    protocol = (
        f"LoDoPaB geometry, {missing}{lodopab.PHOTONS} photons, {len(cases)} slices, range of each slice or 1{start}, "
        f"{torch.get_num_threads()} threads{training}"
    )
    table = outcome.table(problem, protocol, METRICS, PUBLISHED[problem] if original else None)
    whole = Region(slice(None), slice(None))
    regions = {case.group: whole for case in cases}
    pictures = first_pictures(
        outcome, cases, ordered, regions, show=_show, shown="{:g} to {:g} HU".format(*WINDOW)
    )
    return Outcome(table, outcome.records, pictures)


def by_name(name: str) -> TomographyMethod:
    """The method of a name, or that of which a row is a variant; see :func:`patchflow.papers.rows.by_name`."""
    name = "patchnr" if name == AFTER else name
    return method_of(name if name in BY_NAME else image_method(name).name)


def _show(image: Tensor) -> Tensor:
    low, high = WINDOW
    return (to_hounsfield(image) - low) / (high - low)


def _local_ar(lesson: Lesson) -> Energy:
    prior = alr(padding=CT_PADDING)
    record = learn_critic(
        prior,
        lesson.images,
        perturb=partial(noise, low=0.0, high=CRITIC_NOISE),
        steps=10**6,
        lr=prost.SMALL.lr,
        seconds=prost.SMALL.seconds,
        progress=True,
    )
    check_finished(record)
    return prior


def _epll(lesson: Lesson) -> Energy:
    prior, record = learn_epll(lesson.images, padding=CT_PADDING, count=EPLL_PATCHES, progress=True)
    check_finished(record)
    return prior


def _scanned(
    lesson: Lesson,
    *,
    make: Callable[..., ScanNetwork],
    likelihood: Likelihood,
    fine: ParallelBeam,
) -> nn.Module:
    model = make(likelihood.operator, lodopab.PHOTONS)
    record = learn_scan(
        model,
        lesson.images,
        lesson.validation,
        fine=fine,
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return model


TEACHERS: dict[str, Teacher] = {
    "wpp": lambda lesson: learn_wpp(lesson.images, size=6, scales=2, padding=CT_PADDING),
    "wpp-sinkhorn": lambda lesson: learn_wpp(
        lesson.images, size=6, scales=2, padding=CT_PADDING, epsilon=EPSILON
    ),
    "local-ar": _local_ar,
    "epll": _epll,
    "patchnr": lambda lesson: learn_patchnr(lesson, size=6, smoothing=0.0, padding=CT_PADDING),
}


def solver(
    problem: Problem, method: str, prior: nn.Module | None, start: ScanNetwork | None = None
) -> Solver:
    """A method with its default setting for a table; ``prior`` is what it learned, ``start`` networks to start at."""
    chosen = by_name(method)
    options = Options(limited=problem == "ct-limited-angle", start=start)

    def solve(case: Case) -> Tensor:
        operator = case.likelihood.operator
        assert isinstance(operator, ParallelBeam)
        torch.manual_seed(0)  # dip-tv draws its network
        task = Task(case.likelihood, case.y, operator.initial(case.y), prior)
        return complete(chosen.run(task, options))

    return solve


def _measure(case: Case, x: Tensor) -> Mapping[str, float]:
    own = float(case.truth.max() - case.truth.min())
    figures = {
        "psnr": psnr(x, case.truth, own),
        "ssim": ssim(x, case.truth, own),
        "psnr_range_1": psnr(x, case.truth),
        "ssim_range_1": ssim(x, case.truth),
    }
    return {name: float(value[0]) for name, value in figures.items()}
