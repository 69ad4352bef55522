"""Premade models by name: functions that compose public parts, with the literature's names."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from patchflow.chains.bijections import AffineCoupling, random_permutation
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain
from patchflow.errors import InputError
from patchflow.numerics.precision import Precision
from patchflow.priors.adversarial import Layer, PatchCritic
from patchflow.priors.critic import CriticPrior
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.priors.student_mixture import PatchStudentMixture
from patchflow.priors.wasserstein import TransportCost

Model = TypeVar("Model", bound=nn.Module)


def coupling_flow(
    dim: int,
    *,
    layers: int = 5,
    hidden: int = 256,
    depth: int = 2,
    clamp: float = 1.6,
    condition_dim: int = 0,
) -> Flow:
    r"""A normalizing flow of affine couplings with fixed random permutations between them.

    Args:
        dim: Dimension of the points.
        layers: Number of coupling blocks, each followed by the permutation of its number.
        hidden: Width of the subnetworks.
        depth: Hidden layers of the subnetworks.
        clamp: Soft clamp of the log-scales.
        condition_dim: Dimension of the condition; 0 for none.

    Raises:
        InputError: If ``layers`` is not positive.

    References:
        Ardizzone et al., "Analyzing inverse problems with invertible neural networks", 2019,
        https://arxiv.org/abs/1808.04730
    """
    arguments = dict(locals())
    if layers < 1:
        raise InputError(f"A flow of {layers} layers is not a flow; use at least 1.")
    kernels = []
    for layer in range(layers):
        kernels.append(AffineCoupling(dim, condition_dim, hidden=hidden, depth=depth, clamp=clamp))
        kernels.append(random_permutation(dim, seed=layer + 1))
    return named(Flow(StandardNormal(dim), Chain(*kernels)), "coupling_flow", arguments)


def patch_nr(
    *,
    size: int = 6,
    channels: int = 1,
    layers: int = 5,
    hidden: int = 256,
    clamp: float = 1.6,
    padding: int = 0,
    smoothing: float = 0.0,
    precision: Precision = "auto",
    preset: Literal["default", "paper"] = "default",
) -> PatchPrior:
    r"""PatchNR: the negative log-likelihood of a flow on all patches of an image.

    Train it with :func:`patchflow.learn_patches`, or with ``fit(prior.patch_energy, PatchSampler(images, size))``.

    Args:
        size: Side length of the patches in pixels.
        channels: Channels of the images; a colour patch is one vector.
        layers: Coupling blocks.
        hidden: Width of the subnetworks. 256 reaches the reconstruction quality of the paper's 512.
        clamp: Soft clamp of the log-scales.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        smoothing: Standard deviation of the noise on the patches that it learns from; 0.02 with patches of 8 x 8
            reconstructs photographs in [0, 1] best, smaller details need less. See there.
        precision: Precision of the networks in reconstruction; see
            :func:`patchflow.numerics.precision.autocast`.
        preset: ``"paper"`` is the published network: 5 blocks of width 512 on 6 x 6 patches, in float32. It overrides
            ``size``, ``layers``, ``hidden``, ``clamp``, ``smoothing`` and ``precision``.

    References:
        Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, "PatchNR: learning from very few images by patch
        normalizing flow regularization", 2023, https://arxiv.org/abs/2205.12021
    """
    arguments = dict(locals())
    if preset == "paper":
        size, layers, hidden, clamp, smoothing, precision = 6, 5, 512, 1.6, 0.0, "float32"
    flow = coupling_flow(channels * size**2, layers=layers, hidden=hidden, clamp=clamp)
    prior = PatchPrior(
        flow, size, channels, padding=padding, smoothing=smoothing, precision=precision
    )
    return named(prior, "patch_nr", arguments)


def epll(
    *,
    size: int = 6,
    channels: int = 1,
    components: int = 200,
    padding: int = 0,
    remove_mean: bool = False,
) -> PatchPrior:
    """EPLL: the negative log-likelihood of a Gaussian mixture with full covariances on all patches of an image.

    As it is made here all components are standard normal; learn it with :func:`patchflow.learn_epll`.

    Args:
        size: Side length of the patches in pixels.
        channels: Channels of the images; a colour patch is one vector.
        components: Number of components.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        remove_mean: Whether the mean of a patch is taken out, as in the original.

    Raises:
        InputError: If ``components`` is not positive.

    References:
        Zoran, Weiss, "From learning models of natural image patches to whole image restoration", ICCV 2011
    """
    arguments = dict(locals())
    if components < 1:
        raise InputError(f"A mixture of {components} components is none; use at least 1.")
    dim = channels * size**2 - remove_mean
    mixture = PatchMixture(
        torch.ones(components),
        torch.zeros(components, dim),
        torch.eye(dim).repeat(components, 1, 1),
        remove_mean=remove_mean,
    )
    return named(PatchPrior(mixture, size, channels, padding=padding), "epll", arguments)


def student_t(
    *, size: int = 6, channels: int = 1, components: int = 50, padding: int = 0
) -> PatchPrior:
    """The negative log-likelihood of a Student-t mixture on all patches of an image: EPLL with heavier tails.

    As it is made here all components are the same; learn it with :func:`patchflow.learn_student_t`.

    Args:
        size: Side length of the patches in pixels.
        channels: Channels of the images; a colour patch is one vector.
        components: Number of components.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.

    Raises:
        InputError: If ``components`` is not positive.

    References:
        Peel, McLachlan, "Robust mixture modelling using the t distribution", 2000,
        https://doi.org/10.1023/A:1008981510081
    """
    arguments = dict(locals())
    if components < 1:
        raise InputError(f"A mixture of {components} components is none; use at least 1.")
    dim = channels * size**2
    mixture = PatchStudentMixture(
        torch.ones(components),
        torch.zeros(components, dim),
        torch.eye(dim).repeat(components, 1, 1),
        torch.full((components,), 3.0),
    )
    return named(PatchPrior(mixture, size, channels, padding=padding), "student_t", arguments)


def alr(
    *,
    size: int = 6,
    channels: int = 1,
    padding: int = 0,
    precision: Precision = "auto",
) -> PatchPrior:
    """The adversarial local regulariser of the patch group: a small critic on all patches of an image.

    Train it with :func:`patchflow.learn_critic`.

    Args:
        size: Side length of the patches in pixels, at least 3.
        channels: Channels of the images; a colour patch is one vector.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        precision: See :func:`patch_nr`.

    Raises:
        InputError: If ``size`` is below 3.

    References:
        Piening, Altekrueger, Hertrich, Hagemann, Walther, Steidl, "Learning from small data sets: patch-based
        regularizers in inverse problems for image reconstruction", 2023, https://arxiv.org/abs/2312.16611
    """
    arguments = dict(locals())
    if size < 3:
        raise InputError(
            f"Patches of {size} x {size} have no structure to criticise; use 3 or more."
        )
    # The last kernel covers what is left of a patch: 3 x 3 of the published 6 x 6.
    layers = [Layer(64, 3, 1, 1), Layer(128, 3, 2, 1), Layer(1, (size + 1) // 2, 2)]
    critic = PatchCritic(layers, size, channels, slope=0.2, bias=False)
    prior = PatchPrior(critic, size, channels, padding=padding, precision=precision)
    return named(prior, "alr", arguments)


def local_ar(*, channels: int = 1, padding: int = 0, precision: Precision = "auto") -> CriticPrior:
    """The original local adversarial regulariser: a convolutional critic of 13 x 13 patches.

    It was trained on patches of 15 x 15, of which its layers see 13 x 13. Train it with
    :func:`patchflow.learn_critic` (``penalty=5``, ``perturb=patchflow.learn_critic.noise`` as published).

    Args:
        channels: Channels of the images.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        precision: See :func:`patch_nr`.

    References:
        Prost, Houdard, Almansa, Papadakis, "Learning local regularization for variational image restoration", 2021,
        https://arxiv.org/abs/2102.06155
    """
    arguments = dict(locals())
    layers = [
        Layer(128, 3),
        Layer(64, 3),
        Layer(64, 3, 3),
        Layer(64, 3),
        Layer(32, 1),
        Layer(32, 1),
    ]
    critic = PatchCritic(layers, 13, channels, slope=0.0, bias=True)
    return named(CriticPrior(critic, padding=padding, precision=precision), "local_ar", arguments)


def wpp(
    *,
    size: int = 8,
    channels: int = 1,
    count: int = 2000,
    scales: int = 1,
    epsilon: float = 0.0,
    rho: float | None = None,
    padding: int = 0,
) -> MultiscalePrior:
    r"""The Wasserstein patch prior: optimal transport of the patches of an image to reference patches.

    As it is made here all reference patches are zero; draw them with :func:`patchflow.learn_wpp`. As published:
    ``size=6, count=10_000, scales=2``.

    Args:
        size: Side length of the patches in pixels.
        channels: Channels of the images; a colour patch is one vector.
        count: Number of reference patches of each scale.
        scales: Number of scales, each half as large as the one before.
        epsilon: Entropic smoothing, in squared units of the image; 0 for none.
        rho: Penalty of using the reference patches unevenly, in squared units of the image; None: they are used alike.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.

    Raises:
        InputError: If ``count`` or ``scales`` is not positive.

    References:
        Hertrich, Houdard, Redenbach, "Wasserstein patch prior for image superresolution", IEEE TCI 8, 2022,
        https://arxiv.org/abs/2109.12880
    """
    arguments = dict(locals())
    if count < 1 or scales < 1:
        raise InputError(
            f"Got {count} reference patches and {scales} scales; use at least 1 of each."
        )
    costs = [
        TransportCost(
            torch.zeros(count, channels * size**2),
            epsilon=epsilon,
            rho=math.inf if rho is None else rho,
        )
        for _ in range(scales)
    ]
    priors = [PatchPrior(cost, size, channels, padding=padding) for cost in costs]
    return named(MultiscalePrior(priors), "wpp", arguments)


def named(model: Model, name: str, arguments: dict[str, Any]) -> Model:
    """The model, with the name and the arguments that rebuild it, for :func:`patchflow.models.save`."""
    model.made_by = (name, arguments)  # pyright: ignore[reportArgumentType]
    return model
