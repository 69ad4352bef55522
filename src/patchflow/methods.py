"""The reconstructions of images by name, each a function of the measurement, the start and one weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.image_models import SingleImage
from patchflow.networks.denoiser import Denoiser
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood
from patchflow.problems.operator import Identity
from patchflow.problems.resolution import lowers_resolution
from patchflow.reconstruct import (
    acnn,
    bm3d,
    deep_image_prior,
    epll,
    generalized_variation,
    plug_and_play,
    single_image,
    total_variation,
    variational,
    wasserstein_patch,
    wiener,
    wpp_flow,
)
from patchflow.resolution_models import SuperResolver
from patchflow.solution import Solution


class CriticSetting(NamedTuple):
    """The weight of an adversarial regulariser, and the steps of Adam and their peak."""

    weight: float
    steps: int
    lr: float


# By the model: highest PSNR on the validation image of super-resolution x4, see papers/prost2021_local_ar.py.
CRITICS = {
    "alr": CriticSetting(20.0, 72, 0.02),
    "local_ar": CriticSetting(40.0, 45, 0.02),
    "patch_gan": CriticSetting(20.0, 72, 0.02),
}

# What ``patchflow train`` calls a method's model, where that is another name.
_TRAIN = {"patchnr": "patch-nr", "dpir": "denoiser", "pnp-pnn": "pnn"}


class Task(NamedTuple):
    """What a method is given.

    Attributes:
        likelihood: The law of the measurement; that of images is Gaussian.
        y: The measurement.
        init: The start image.
        weight: The weight of the prior.
        prior: The learned prior or denoiser, for methods that need one.
        callback: Called after each step, see :func:`patchflow.solve.minimize`; not by splitting methods.
        progress: Show a progress line.
        settings: Arguments of the solver instead of its defaults: steps, lr, stride and the like.
    """

    likelihood: Likelihood
    y: Tensor
    init: Tensor
    weight: float
    prior: nn.Module | None = None
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None
    progress: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})


class Method(NamedTuple):
    """A reconstruction.

    Attributes:
        name: What it is called on the command line and in tables.
        solve: Does it.
        weight: The default weight for a likelihood and a prior.
        models: The models of ``patchflow train`` that it takes as a prior; none if it needs none.
        solves: Whether it can reconstruct for a likelihood.
    """

    name: str
    solve: Callable[[Task], Solution]
    weight: Callable[[GaussianLikelihood, nn.Module | None], float]
    models: tuple[str, ...] = ()
    solves: Callable[[GaussianLikelihood], bool] = lambda likelihood: True

    def check_prior(self, prior: nn.Module | None) -> None:
        """Refuse a missing prior, and that of another method.

        Raises:
            InputError: As said.
        """
        if not self.models:
            return
        command = f"train one with patchflow train {_TRAIN.get(self.name, self.name)} IMAGE."
        if prior is None:
            raise InputError(f"{self.name} needs --prior, a model file; {command}")
        made_by = vars(prior).get("made_by", ("",))[0]
        if made_by and made_by not in self.models:
            raise InputError(f"{self.name} does not take a model of {made_by}; {command}")


def solver(
    solve: Callable[..., Solution],
    *,
    prior: type[nn.Module] | None = None,
    start: bool = True,
    followed: bool = True,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Task], Solution]:
    """Let a function of :mod:`patchflow.reconstruct` solve tasks.

    Args:
        solve: The function of likelihood, prior, measurement and start.
        prior: The kind of prior that it takes, if any.
        start: Whether it takes a start.
        followed: Whether it takes a callback.
        settings: Other arguments of it, which those of the task go before.
    """

    def run(task: Task) -> Solution:
        given = (task.y, task.init) if start else (task.y,)
        if prior is not None:
            assert isinstance(task.prior, prior)
            given = (task.prior, *given)
        following = {"callback": task.callback} if followed else {}
        return solve(
            task.likelihood,
            *given,
            weight=task.weight,
            progress=task.progress,
            **following,
            **{**settings, **task.settings},
        )

    return run


def _gaussian(task: Task) -> GaussianLikelihood:
    assert isinstance(task.likelihood, GaussianLikelihood)
    return task.likelihood


def _tikhonov(task: Task) -> Solution:
    return Solution(wiener.tikhonov(_gaussian(task), task.y, weight=task.weight), [], 1, True)


def _bm3d(task: Task) -> Solution:
    likelihood = _gaussian(task)
    if not bm3d.is_direct(likelihood.operator):
        return solver(bm3d.reconstruct, followed=False)(task)
    std = likelihood.std * math.sqrt(task.weight)
    if isinstance(likelihood.operator, Identity):
        return Solution(bm3d.denoise(task.y, std), [], 1, True)
    stronger = GaussianLikelihood(likelihood.operator, std)
    return Solution(bm3d.deblur(stronger, task.y), [], 1, True)


def critic_setting(prior: nn.Module | None) -> CriticSetting:
    """That of the critic's form, the small one if it is of none."""
    form = "alr" if prior is None else vars(prior).get("made_by", ("alr",))[0]
    return CRITICS.get(form, CRITICS["alr"])


def _local_ar(task: Task) -> Solution:
    _, steps, lr = critic_setting(task.prior)
    settings = {"steps": steps, "lr": lr}
    return solver(variational.reconstruct, prior=PatchPrior, settings=settings)(task)


def _dpir(task: Task) -> Solution:
    settings = {"levels": plug_and_play.noise_levels(_gaussian(task))}
    return solver(plug_and_play.dpir, prior=Denoiser, followed=False, settings=settings)(task)


def _single_image(task: Task) -> Solution:
    assert isinstance(task.prior, SingleImage)
    return single_image.reconstruct(task.likelihood, task.prior, task.y, **task.settings)


def _super_resolver(solve: Callable[..., Solution]) -> Callable[[Task], Solution]:
    def run(task: Task) -> Solution:
        assert isinstance(task.prior, SuperResolver)
        return solve(_gaussian(task), task.prior, task.y)

    return run


def _patchnr_weight(likelihood: GaussianLikelihood, prior: nn.Module | None) -> float:
    smoothed = isinstance(prior, PatchPrior) and prior.smoothing > 0
    return variational.SMOOTHED_WEIGHT if smoothed else variational.DEFAULT_WEIGHT


def _variation_weight(likelihood: GaussianLikelihood, prior: nn.Module | None) -> float:
    return total_variation.default_weight(likelihood)


METHODS = {
    method.name: method
    for method in (
        Method(
            "tikhonov",
            _tikhonov,
            lambda likelihood, prior: wiener.SUPER_RESOLUTION_WEIGHT,
            solves=lambda likelihood: wiener.is_periodic(likelihood.operator),
        ),
        Method("tv", solver(total_variation.reconstruct), _variation_weight),
        Method("tgv", solver(generalized_variation.reconstruct), _variation_weight),
        Method(
            "bm3d",
            _bm3d,
            # Where BM3D is the whole method, the weight is that of the variance of the noise.
            lambda law, prior: 1.0 if bm3d.is_direct(law.operator) else bm3d.DEFAULT_WEIGHT,
        ),
        Method(
            "epll",
            solver(epll.reconstruct, prior=PatchPrior, followed=False),
            lambda likelihood, prior: epll.DEFAULT_WEIGHT,
            ("epll",),
        ),
        Method(
            "wpp",
            solver(wasserstein_patch.reconstruct, prior=MultiscalePrior),
            lambda likelihood, prior: wasserstein_patch.DEFAULT_WEIGHT,
            ("wpp",),
        ),
        Method(
            "local-ar",
            _local_ar,
            lambda likelihood, prior: critic_setting(prior).weight,
            tuple(CRITICS),
        ),
        Method("dip-tv", solver(deep_image_prior.reconstruct, start=False), _variation_weight),
        Method(
            "dpir",
            _dpir,
            lambda likelihood, prior: plug_and_play.DEFAULT_WEIGHT,
            ("drunet", "dncnn"),
        ),
        Method(
            "pnp-pnn",
            solver(plug_and_play.reconstruct, prior=ProximalDenoiser),
            lambda likelihood, prior: plug_and_play.PNN_WEIGHT,
            ("pnn",),
        ),
        *(
            Method(
                name,
                solver(variational.reconstruct, prior=PatchPrior),
                lambda likelihood, prior: variational.DEFAULT_WEIGHT,
                (name.replace("-", "_"),),
            )
            for name in ("student-t", "patch-vae")
        ),
        Method(
            "patchnr",
            solver(variational.reconstruct, prior=PatchPrior),
            _patchnr_weight,
            ("patch_nr",),
        ),
        Method("single-image", _single_image, lambda law, prior: 1.0, ("single_image",)),
        *(
            Method(
                name,
                _super_resolver(solve),
                lambda law, prior: 1.0,
                (name.replace("-", "_"),),
                lambda law: lowers_resolution(law.operator),
            )
            for name, solve in (
                ("acnn", acnn.reconstruct),
                ("wpp-net", acnn.reconstruct),
                ("wpp-flow", wpp_flow.reconstruct),
            )
        ),
    )
}
# Methods that have no weight, or had it in their training.
WEIGHTLESS = ("single-image", "acnn", "wpp-net", "wpp-flow")
