"""How ``patchflow reconstruct --problem ct`` makes an image of a sinogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchflow import models
from patchflow.cli.scan import Scan
from patchflow.cli.slices import Units
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.tomography_methods import Options, Task, TomographyMethod, method_of

# With fewer degrees some directions are missing.
_FULL = 170.0


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
        solver: The solver of methods with a patch energy.
        preset: Whether to take the published procedure.
        truth: The true slices.
        units: The units of truth and output.
        template: The DICOM series whose headers the output takes.
        report: Folder for the report.

    Raises:
        InputError: If a flag does not concern the method or is out of range.
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
        for name in ("weight", "steps", "lr", "stride", "solver"):
            value = getattr(self, name)
            published = self.preset == "paper" and name in ("lr", "stride", "solver")
            if value not in (None, "adam") and (published or name not in self.chosen.takes):
                who = "preset paper" if published else f"method {self.method}"
                raise InputError(f"--{name} {value} says nothing about the {who}; leave it out.")
        if self.preset == "paper" and self.method != "patchnr":
            raise InputError(f"The preset paper is that of patchnr, not of {self.method}.")
        if self.prior is None:
            self.chosen.check_prior(None)
        elif not self.chosen.learned:
            raise InputError(
                f"--prior {self.prior} says nothing about the method {self.method}; leave it out."
            )
        for flag, value in (("--weight", self.weight), ("--lr", self.lr)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(
                    f"{flag} is {value:g} but must be positive; leave it out for the default."
                )
        for flag, value in (("--steps", self.steps), ("--stride", self.stride)):
            if value is not None and value < 1:
                raise InputError(f"{flag} is {value} but must be at least 1.")

    @property
    def chosen(self) -> TomographyMethod:
        """The method of this name."""
        return method_of(self.method)

    @property
    def _options(self) -> Options:
        return Options(
            weight=self.weight,
            steps=self.steps,
            lr=self.lr,
            stride=self.stride,
            solver=self.solver,
        )

    def options(self, scan: Scan) -> Options:
        """The options of the method for a scan."""
        return self._options._replace(
            shape=scan.operator.domain_shape,
            limited=scan.covered < _FULL,
            photons=scan.photons,
        )

    def load(self, shape: tuple[int, int]) -> PatchPrior | MultiscalePrior | None:
        """Read the model that the method needs.

        Args:
            shape: Height and width of the slices.

        Raises:
            InputError: If it is that of another method, or of other images.
        """
        if not self.chosen.learned or self.prior is None:
            return None
        prior = models.load(self.prior, Energy)
        self.chosen.check_prior(prior)
        assert isinstance(prior, PatchPrior | MultiscalePrior)
        prior.check(torch.zeros(1, 1, *shape))
        return prior


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
    scan: Scan, prior: PatchPrior | MultiscalePrior | None, choices: Choices
) -> tuple[Callable[[Tensor, Follow | None], Result], str]:
    """What reconstructs a slice, and a sentence that says how.

    Args:
        scan: The measurement and its law.
        prior: What :meth:`Choices.load` read.
        choices: What the flags say.
    """
    if choices.preset == "paper" and isinstance(prior, PatchPrior):
        return _published(scan, prior, choices)
    method, options = choices.chosen, choices.options(scan)

    def solve(y: Tensor, follow: Follow | None) -> Result:
        fbp = scan.operator.initial(y)
        task = Task(scan.likelihood, y, fbp, prior, callback=follow, progress=True)
        found = method.run(task, options)
        return Result(found.x, fbp, found.history, found.interrupted)

    said = method.describe(options)
    return solve, said[0].upper() + said[1:] if method.name != "patchnr" else said


def _published(
    scan: Scan, prior: PatchPrior, choices: Choices
) -> tuple[Callable[[Tensor, Follow | None], Result], str]:
    options = choices.options(scan)
    steps = choices.steps or (paper.CT_LIMITED_STEPS if options.limited else paper.CT_STEPS)
    weight = choices.weight
    if weight is None:
        weight = paper.weight_of_mean(paper.CT_LAMBDA, options.shape, prior)

    def solve(y: Tensor, follow: Follow | None) -> Result:
        fbp = scan.operator.initial(y)
        found = paper.reconstruct_ct(
            scan.likelihood,
            prior,
            y,
            fbp,
            weight=weight,
            steps=steps,
            callback=follow,
            progress=True,
        )
        return Result(found.x, fbp, found.history, found.interrupted)

    return solve, (
        f"patchNR as published, weight {weight:.4g}, {steps} steps of {paper.CT_RANDOM_PATCHES} random patches "
        "from filtered backprojection."
    )
