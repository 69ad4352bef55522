r"""Published procedures for images, by method: ``--preset paper``.

The weights are the papers', in the library's units. Patch priors minimise the sum of squares over pixels plus
:math:`\lambda` times a mean over patches, see :mod:`patchflow.papers.altekrueger2023_patchnr`. All take many times as
long as our own settings.

References:
    Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, Inverse Problems 39(6), 2023, https://arxiv.org/abs/2205.12021
    Piening, Altekrueger, Hertrich, Hagemann, Walther, Steidl, "Learning from small data sets: patch-based regularizers
    in inverse problems for image reconstruction", 2023, https://arxiv.org/abs/2312.16611 (EPLL, local adversarial)
    Hertrich, Houdard, Redenbach, IEEE TCI 8, 2022, https://arxiv.org/abs/2109.12880
    Baguer, Leuschner, Schmidt, "Computed tomography reconstruction using deep image prior and learned reconstruction
    methods", 2020, https://arxiv.org/abs/2003.04989
    Wang et al., "Early stopping for deep image prior", 2021, https://arxiv.org/abs/2112.06074
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from patchflow.methods import METHODS, Task, solver
from patchflow.networks.skip import SkipNet
from patchflow.numerics.patches import grid_shape
from patchflow.papers import altekrueger2023_patchnr as altekrueger
from patchflow.papers import prost2021_local_ar as prost
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import deep_image_prior, variational, wasserstein_patch
from patchflow.solution import Solution


class PatchProcedure(NamedTuple):
    """Adam on random patches.

    Attributes:
        lam: The weight of the mean over patches.
        steps: Steps.
        lr: Their size.
        patches: Random patches in each step.
    """

    lam: float
    steps: int
    lr: float
    patches: int


class Preset(NamedTuple):
    """A published procedure.

    Attributes:
        weight: Its weight for a likelihood and a prior, in the library's units.
        solve: Does it, with the weight of the task.
    """

    weight: Callable[[GaussianLikelihood, nn.Module | None], float]
    solve: Callable[[Task], Solution]


PATCHNR = PatchProcedure(
    altekrueger.LAMBDA, altekrueger.STEPS, altekrueger.STEP_SIZE, altekrueger.RANDOM_PATCHES
)
# The survey's README and scripts.
EPLL = PatchProcedure(0.35, 300, 0.03, 30_000)
LOCAL_AR = PatchProcedure(prost.LAMBDA, prost.STEPS, prost.STEP_SIZE, prost.RANDOM_PATCHES)
# The weight of the data term: |f(x) - y|^2 / (lambda S) against the mean of W_2^2 over S scales.
WPP_LAMBDA, WPP_STEPS, WPP_STEP_SIZE = 6000 / 36, 500, 0.01
# Of Wang et al. for denoising.
PATIENCE = 1000


def _patch_weight(
    procedure: PatchProcedure, likelihood: GaussianLikelihood, prior: nn.Module | None
) -> float:
    assert isinstance(prior, PatchPrior)
    return altekrueger.weight_of_lambda(
        likelihood.operator.domain_shape,
        noise=likelihood.std,
        lam=procedure.lam,
        size=prior.size,
    )


def _patches(procedure: PatchProcedure) -> Preset:
    solve = solver(
        variational.reconstruct,
        prior=PatchPrior,
        settings={
            "steps": procedure.steps,
            "lr": procedure.lr,
            "schedule": "constant",
            "random_patches": procedure.patches,
        },
    )
    return Preset(partial(_patch_weight, procedure), solve)


def _wpp_weight(likelihood: GaussianLikelihood, prior: nn.Module | None) -> float:
    assert isinstance(prior, MultiscalePrior)
    rows, columns = grid_shape(likelihood.operator.domain_shape, prior.size)
    scaled = len(prior.priors) * WPP_LAMBDA / likelihood.std**2
    return scaled * prior.size**2 / (rows * columns)


_WPP = solver(
    wasserstein_patch.reconstruct,
    prior=MultiscalePrior,
    settings={"steps": WPP_STEPS, "lr": WPP_STEP_SIZE, "stride": 1},
)


def _dip(task: Task) -> Solution:
    settings = {
        "network": SkipNet(out_channels=task.y.shape[1]).to(task.y),
        "isotropic": False,
        "steps": deep_image_prior.PUBLISHED_STEPS,
        "lr": deep_image_prior.PUBLISHED_LR,
        "schedule": "constant",
        "clip": 1.0,
        "learn_input": False,
        "patience": PATIENCE,
        "precision": "float32",
    }
    return solver(deep_image_prior.reconstruct, start=False, settings=settings)(task)


# The weight of the deep image prior for images is not published; it keeps ours.
PRESETS = {
    "patchnr": _patches(PATCHNR),
    "epll": _patches(EPLL),
    "local-ar": _patches(LOCAL_AR),
    "wpp": Preset(_wpp_weight, _WPP),
    "dip-tv": Preset(METHODS["dip-tv"].weight, _dip),
}
