"""Premade models by name: functions that compose public parts, with the literature's names."""

from __future__ import annotations

from typing import Literal

from patchflow.chains.bijections import AffineCoupling, random_permutation
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain
from patchflow.errors import InputError
from patchflow.numerics.precision import Precision
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.patch import PatchPrior


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
    if layers < 1:
        raise InputError(f"A flow of {layers} layers is not a flow; use at least 1.")
    kernels = []
    for layer in range(layers):
        kernels.append(AffineCoupling(dim, condition_dim, hidden=hidden, depth=depth, clamp=clamp))
        kernels.append(random_permutation(dim, seed=layer + 1))
    return Flow(StandardNormal(dim), Chain(*kernels))


def patch_nr(
    *,
    size: int = 6,
    channels: int = 1,
    layers: int = 5,
    hidden: int = 256,
    clamp: float = 1.6,
    padding: int = 0,
    precision: Precision = "auto",
    preset: Literal["default", "paper"] = "default",
) -> PatchPrior:
    r"""PatchNR: the negative log-likelihood of a flow on all patches of an image.

    Train it with ``fit(prior.patch_energy, PatchSampler(images, size))``.

    Args:
        size: Side length of the patches in pixels.
        channels: Channels of the images; a colour patch is one vector.
        layers: Coupling blocks.
        hidden: Width of the subnetworks. 256 reaches the reconstruction quality of the paper's 512.
        clamp: Soft clamp of the log-scales.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        precision: Precision of the networks in reconstruction; see
            :func:`patchflow.numerics.precision.autocast`.
        preset: ``"paper"`` is the published network: 5 blocks of width 512 on 6 x 6 patches, in float32. It overrides
            ``size``, ``layers``, ``hidden``, ``clamp`` and ``precision``.

    References:
        Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, "PatchNR: learning from very few images by patch
        normalizing flow regularization", 2023, https://arxiv.org/abs/2205.12021
    """
    if preset == "paper":
        size, layers, hidden, clamp, precision = 6, 5, 512, 1.6, "float32"
    flow = coupling_flow(channels * size**2, layers=layers, hidden=hidden, clamp=clamp)
    return PatchPrior(flow, size, channels, padding=padding, precision=precision)
