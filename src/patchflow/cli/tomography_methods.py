"""How ``patchflow reconstruct --problem ct`` makes an image of a sinogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from patchflow.cli.scan import Scan
from patchflow.cli.slices import Units
from patchflow.errors import InputError
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers.patchnr_tomography import PATCHNR_STEPS, STEP_SIZE, TV_WEIGHTS
from patchflow.priors.patch import PatchPrior
from patchflow.reconstruct import total_variation, variational
from patchflow.solution import Solution

METHODS = ("patchnr", "tv", "fbp")
TITLES = {"patchnr": "patchNR", "tv": "total variation", "fbp": "filtered backprojection"}

# Total variation before patchNR: Adam alone takes thousands of steps to fill in directions that were not measured.
_START_STEPS = 100
_TV_STEPS = 300
# With fewer degrees some directions are missing, and Adam needs more steps.
_FULL = 170.0
_STEPS, _LIMITED_STEPS = PATCHNR_STEPS["ct-low-dose"], PATCHNR_STEPS["ct-limited-angle"]


@dataclass(frozen=True)
class Choices:
    """What the flags of ``reconstruct`` say, beside those of the scan.

    Attributes:
        method: The method.
        prior: The model file.
        weight: The weight of the prior; None for the default of the method.
        steps: Number of steps; None for the default.
        lr: Adam's peak step; None for the default.
        stride: Stride of the patch grid.
        solver: The solver of patchNR.
        preset: Whether to take the published procedure.
        truth: The true slices.
        units: The units of truth and output.
        template: The DICOM series whose headers the output takes.
        report: Folder for the report.
    """

    method: str
    prior: str | None
    weight: float | None
    steps: int | None
    lr: float | None
    stride: int | None
    solver: Literal["adam", "lbfgs"]
    preset: Literal["default", "paper"]
    truth: str | None
    units: Units
    template: str | None
    report: str | None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"{self.method} is not made for ct; use one of {', '.join(METHODS)}.")
        if self.method == "patchnr" and self.prior is None:
            raise InputError(
                "patchnr needs --prior, a model file; train one with patchflow train patch-nr slices/*.dcm."
            )
        for flag, value in (("--weight", self.weight), ("--lr", self.lr)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(
                    f"{flag} is {value:g} but must be positive; leave it out for the default."
                )
        for flag, value in (("--steps", self.steps), ("--stride", self.stride)):
            if value is not None and value < 1:
                raise InputError(f"{flag} is {value} but must be at least 1.")


class Result(NamedTuple):
    """The reconstruction of a slice, and how it came about.

    Attributes:
        x: The image.
        fbp: Filtered backprojection.
        history: The energies along the way.
        interrupted: Whether the user stopped it.
    """

    x: Tensor
    fbp: Tensor
    history: list[float]
    interrupted: bool = False


Follow = Callable[[int, Tensor, float], Mapping[str, str] | None]


def solver_of(
    scan: Scan, prior: PatchPrior | None, choices: Choices
) -> tuple[Callable[[Tensor, Follow | None], Result], str]:
    """What reconstructs a slice, and a sentence that says how.

    Args:
        scan: The measurement and its law.
        prior: The patch prior, for patchNR.
        choices: What the flags say.
    """
    likelihood, operator = scan.likelihood, scan.operator
    limited = scan.covered < _FULL
    tv_weight = _tv_weight(scan.photons, limited)

    def variation(
        y: Tensor, fbp: Tensor, weight: float, steps: int, follow: Follow | None
    ) -> Result:
        found = total_variation.reconstruct(
            likelihood, y, fbp, weight=weight, max_iterations=steps, callback=follow, progress=True
        )
        return Result(found.x, fbp, found.history, _stopped(found, steps))

    if choices.method == "fbp":
        return lambda y, follow: Result(fbp := operator.initial(y), fbp, []), (
            "Filtered backprojection, Hann window up to 0.64 of the highest frequency."
        )
    if prior is None:
        weight = tv_weight if choices.weight is None else choices.weight
        steps = choices.steps or _TV_STEPS
        return (
            lambda y, follow: variation(y, operator.initial(y), weight, steps, follow),
            f"Total variation, weight {weight:.4g}, at most {steps} iterations.",
        )
    weight = choices.weight
    if weight is None:
        weight = paper.weight_of_mean(paper.CT_LAMBDA, operator.domain_shape, prior)
    if choices.preset == "paper":
        steps = choices.steps or (paper.CT_LIMITED_STEPS if limited else paper.CT_STEPS)

        def published(y: Tensor, follow: Follow | None) -> Result:
            fbp = operator.initial(y)
            found = paper.reconstruct_ct(
                likelihood,
                prior,
                y,
                fbp,
                weight=weight,
                steps=steps,
                callback=follow,
                progress=True,
            )
            return Result(found.x, fbp, found.history, _stopped(found, steps))

        return published, (
            f"patchNR as published, weight {weight:.4g}, {steps} steps of {paper.CT_RANDOM_PATCHES} random patches "
            "from filtered backprojection."
        )
    steps = choices.steps or (_LIMITED_STEPS if limited else _STEPS)
    lr = STEP_SIZE if choices.lr is None else choices.lr

    def patchnr(y: Tensor, follow: Follow | None) -> Result:
        first = variation(y, operator.initial(y), tv_weight, _START_STEPS, follow)
        if first.interrupted:
            return first
        found = variational.reconstruct(
            likelihood,
            prior,
            y,
            first.x,
            weight=weight,
            method=choices.solver,
            steps=steps,
            lr=lr,
            stride=choices.stride,
            callback=follow,
            progress=True,
        )
        return Result(found.x, first.fbp, found.history, _stopped(found, steps))

    return patchnr, (
        f"patchNR, weight {weight:.4g}, {steps} steps, from total variation (weight {tv_weight:.4g}, at most "
        f"{_START_STEPS} iterations)."
    )


def _stopped(solution: Solution, steps: int) -> bool:
    """Whether the user interrupted a solver, which then returns what it has."""
    return solution.steps < steps and not solution.converged


def _tv_weight(photons: float, limited: bool) -> float:
    tuned = TV_WEIGHTS["ct-limited-angle" if limited else "ct-low-dose"]
    # The noise falls with the root of the photons, and the best weight in nats rises with one over the noise.
    return tuned * math.sqrt(photons / lodopab.PHOTONS)
