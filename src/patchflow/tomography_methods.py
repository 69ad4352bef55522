"""The reconstructions of computed tomography by name, each a function of sinogram, start, prior, weight and steps.

Methods that learned from images start at total variation: from filtered backprojection Adam takes thousands of steps to
fill in directions that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.methods import METHODS as IMAGE_METHODS
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import Likelihood
from patchflow.reconstruct import (
    deep_image_prior,
    generalized_variation,
    total_variation,
    variational,
    wasserstein_patch,
)
from patchflow.solution import Solution

# Of the scans that the weights were chosen on: LoDoPaB's.
TUNED_PHOTONS = 4096.0
# Peak step of Adam for images whose details are a few thousandths.
STEP_SIZE = 0.003


class Setting(NamedTuple):
    """The weight of a method, in nats, and the number of its steps."""

    weight: float
    steps: int


class Task(NamedTuple):
    """What a method is given.

    Attributes:
        likelihood: The law of the sinogram; its operator is a projector.
        y: The sinogram (1, 1, angles, bins).
        fbp: Filtered backprojection (1, 1, height, width).
        prior: The learned prior, for methods that need one.
        limited: Whether directions are missing: another default setting.
        photons: Mean number of photons per bin without an object.
        weight: The weight; None for the default.
        steps: Number of steps; None for the default.
        lr: Adam's peak step; None for the default.
        stride: Stride of the patch grid; None for the default.
        solver: Adam or L-BFGS.
        callback: Called after each step, see :func:`patchflow.solve.minimize`.
        progress: Show a progress line.
    """

    likelihood: Likelihood
    y: Tensor
    fbp: Tensor
    prior: Energy | None = None
    limited: bool = False
    photons: float = TUNED_PHOTONS
    weight: float | None = None
    steps: int | None = None
    lr: float | None = None
    stride: int | None = None
    solver: Literal["adam", "lbfgs"] = "adam"
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None
    progress: bool = False


class TomographyMethod(NamedTuple):
    """A reconstruction.

    Attributes:
        name: What it is called on the command line and in tables.
        title: Its full name.
        solve: Does it.
        low_dose: The default setting where all directions were measured, for :data:`TUNED_PHOTONS`.
        limited: The one where 36 of 180 degrees are missing.
        options: What it takes of :class:`Task`: weight, steps, lr, stride, solver.
        grows: The best weight grows with the root of the photons: one in nats per unit of variation.
        learned: It needs a prior, and starts at total variation.
    """

    name: str
    title: str
    solve: Callable[[Task, Setting], Solution]
    low_dose: Setting
    limited: Setting
    options: tuple[str, ...] = ()
    grows: bool = False
    learned: bool = False

    def setting(self, task: Task) -> Setting:
        """The setting of a task: what it says, and the default for the rest."""
        weight, steps = self.limited if task.limited else self.low_dose
        if self.grows:
            weight *= math.sqrt(task.photons / TUNED_PHOTONS)
        return Setting(
            weight if task.weight is None else task.weight,
            steps if task.steps is None else task.steps,
        )

    def run(self, task: Task) -> tuple[Solution, bool]:
        """Reconstruct.

        Returns:
            The solution, and whether the user interrupted it (Ctrl-C).
        """
        setting = self.setting(task)
        if not self.learned:
            found = self.solve(task, setting)
            return found, _stopped(found, setting.steps)
        first, steps = _start(task)
        if _stopped(first, steps):
            return first, True
        found = self.solve(task._replace(fbp=first.x), setting)
        return found, _stopped(found, setting.steps)

    def describe(self, task: Task) -> str:
        """A sentence that says how."""
        if not self.options:
            return f"{self.title}."
        weight, steps = self.setting(task)
        said = f"{self.title}, weight {weight:.4g}, "
        said += f"{steps} steps" if "lr" in self.options else f"at most {steps} iterations"
        return said + (", from total variation." if self.learned else ".")

    def check_prior(self, prior: Energy | None) -> None:
        """Refuse a missing prior, and that of another method.

        Raises:
            InputError: As said.
        """
        if self.learned:
            IMAGE_METHODS[self.name].check_prior(prior)


def _stopped(solution: Solution, steps: int) -> bool:
    """Whether the user interrupted a solver, which then returns what it has."""
    return solution.steps < steps and not solution.converged


def _start(task: Task) -> tuple[Solution, int]:
    own = METHODS["tv"].setting(task._replace(weight=None, steps=None))
    steps = own.steps // 2
    return _variation(task, Setting(own.weight, steps)), steps


def _fbp(task: Task, setting: Setting) -> Solution:
    return Solution(task.fbp, [], setting.steps, True)


def _variation(task: Task, setting: Setting) -> Solution:
    return total_variation.reconstruct(
        task.likelihood,
        task.y,
        task.fbp,
        weight=setting.weight,
        max_iterations=setting.steps,
        callback=task.callback,
        progress=task.progress,
    )


def _generalised(task: Task, setting: Setting) -> Solution:
    return generalized_variation.reconstruct(
        task.likelihood,
        task.y,
        task.fbp,
        weight=setting.weight,
        max_iterations=setting.steps,
        callback=task.callback,
        progress=task.progress,
    )


def _network(task: Task, setting: Setting) -> Solution:
    return deep_image_prior.reconstruct(
        task.likelihood,
        task.y,
        weight=setting.weight,
        steps=setting.steps,
        lr=deep_image_prior.LR if task.lr is None else task.lr,
        callback=task.callback,
        progress=task.progress,
    )


def _patches(task: Task, setting: Setting) -> Solution:
    assert isinstance(task.prior, PatchPrior)
    return variational.reconstruct(
        task.likelihood,
        task.prior,
        task.y,
        task.fbp,
        weight=setting.weight,
        method=task.solver,
        steps=setting.steps,
        lr=STEP_SIZE if task.lr is None else task.lr,
        stride=task.stride,
        callback=task.callback,
        progress=task.progress,
    )


def _transport(task: Task, setting: Setting) -> Solution:
    assert isinstance(task.prior, MultiscalePrior)
    return wasserstein_patch.reconstruct(
        task.likelihood,
        task.prior,
        task.y,
        task.fbp,
        weight=setting.weight,
        steps=setting.steps,
        lr=STEP_SIZE if task.lr is None else task.lr,
        stride=task.stride,
        callback=task.callback,
        progress=task.progress,
    )


_PATCH_OPTIONS = ("weight", "steps", "lr", "stride", "solver")
# Weights with the best mean PSNR on the tuning slices of papers/patchnr_tomography.py, by benchmarks/tune_ct.py; that
# patchNR is the paper's, 700 for the mean over the patches of 362 x 362 pixels.
METHODS = {
    method.name: method
    for method in (
        TomographyMethod(
            "fbp",
            "filtered backprojection",
            _fbp,
            Setting(0, 0),
            Setting(0, 0),
        ),
        TomographyMethod(
            "tv",
            "total variation",
            _variation,
            Setting(30, 150),
            Setting(40, 300),
            ("weight", "steps"),
            grows=True,
        ),
        TomographyMethod(
            "tgv",
            "total generalised variation",
            _generalised,
            Setting(30, 150),
            Setting(40, 300),
            ("weight", "steps"),
            grows=True,
        ),
        TomographyMethod(
            "dip-tv",
            "deep image prior with total variation",
            _network,
            Setting(30, 300),
            Setting(40, 300),
            ("weight", "steps", "lr"),
            grows=True,
        ),
        TomographyMethod(
            "wpp",
            "Wasserstein patch prior",
            _transport,
            Setting(2000, 200),
            Setting(2000, 200),
            _PATCH_OPTIONS[:-1],
            learned=True,
        ),
        TomographyMethod(
            "local-ar",
            "local adversarial regulariser",
            _patches,
            Setting(20, 200),
            Setting(20, 500),
            _PATCH_OPTIONS,
            learned=True,
        ),
        TomographyMethod(
            "epll",
            "expected patch log-likelihood",
            _patches,
            Setting(0.19, 400),
            Setting(0.19, 1000),
            _PATCH_OPTIONS,
            learned=True,
        ),
        TomographyMethod(
            "patchnr",
            "patchNR",
            _patches,
            Setting(0.1892, 400),
            Setting(0.1892, 1000),
            _PATCH_OPTIONS,
            learned=True,
        ),
    )
}


def method_of(name: str) -> TomographyMethod:
    """A method by name.

    Raises:
        InputError: If there is none of this name for tomography.
    """
    if name not in METHODS:
        raise InputError(f"{name} is not made for ct; use one of {', '.join(METHODS)}.")
    return METHODS[name]
