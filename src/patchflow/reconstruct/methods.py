"""The reconstructions of images by name, each a function of the measurement, the start and one weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import epll, generalized_variation, total_variation, variational, wiener
from patchflow.solution import Solution

Solve = Callable[[GaussianLikelihood, Tensor, Tensor, float, Energy | None], Solution]


class Method(NamedTuple):
    """A reconstruction.

    Attributes:
        name: What it is called on the command line and in tables.
        solve: Reconstructs from the likelihood, the measurement, the start, the weight and the learned prior.
        weight: The default weight for a standard deviation of the noise.
        train: What ``patchflow train`` calls the model it needs; empty if it needs none.
    """

    name: str
    solve: Solve
    weight: Callable[[float], float]
    train: str = ""


def _tv(
    likelihood: GaussianLikelihood, y: Tensor, init: Tensor, weight: float, prior: Energy | None
) -> Solution:
    return total_variation.reconstruct(likelihood, y, init, weight=weight)


def _tgv(
    likelihood: GaussianLikelihood, y: Tensor, init: Tensor, weight: float, prior: Energy | None
) -> Solution:
    return generalized_variation.reconstruct(likelihood, y, init, weight=weight)


def _tikhonov(
    likelihood: GaussianLikelihood, y: Tensor, init: Tensor, weight: float, prior: Energy | None
) -> Solution:
    return Solution(wiener.tikhonov(likelihood, y, weight=weight), [], 1, True)


def _epll(
    likelihood: GaussianLikelihood, y: Tensor, init: Tensor, weight: float, prior: Energy | None
) -> Solution:
    return epll.reconstruct(likelihood, check_prior("epll", prior), y, init, weight=weight)


def _patchnr(
    likelihood: GaussianLikelihood, y: Tensor, init: Tensor, weight: float, prior: Energy | None
) -> Solution:
    return variational.reconstruct(
        likelihood, check_prior("patchnr", prior), y, init, weight=weight
    )


METHODS = {
    method.name: method
    for method in (
        Method("tikhonov", _tikhonov, lambda std: 0.05 / std**2),
        Method("tv", _tv, lambda std: 0.035 / std),
        Method("tgv", _tgv, lambda std: 0.035 / std),
        Method("epll", _epll, lambda std: epll.DEFAULT_WEIGHT, "epll"),
        Method("patchnr", _patchnr, lambda std: variational.DEFAULT_WEIGHT, "patch-nr"),
    )
}


def check_prior(name: str, prior: Energy | None) -> PatchPrior:
    """The patch prior of a method.

    Raises:
        InputError: If there is none, or it is that of another method.
    """
    command = METHODS[name].train
    if not isinstance(prior, PatchPrior):
        raise InputError(
            f"{name} needs --prior, a model file; train one with patchflow train {command} IMAGE."
        )
    if (name == "epll") != isinstance(prior.patch_energy, PatchMixture):
        raise InputError(
            f"The prior is of another method than {name}; train one with patchflow train {command} IMAGE."
        )
    return prior
