r"""EPLL: the expected patch log-likelihood of a Gaussian mixture, by half-quadratic splitting.

.. math:: \min_{x, z_i} \; -\log p(y \mid x) + \frac{w}{p^2} \sum_i \Big\{ \frac{1}{2 s^2} \|P_i x - z_i\|^2
          - \log p(z_i) \Big\}, \qquad s \to 0.

For each :math:`s` every patch is denoised by the Wiener filter of its most probable component
(:meth:`patchflow.priors.patch_mixture.PatchMixture.denoise`), overlapping patches are averaged, and the data are met by
their exact proximal step. The published schedule takes all patches in each of five steps; here many steps take one
phase of a coarse patch grid each, at the cost of few. The other way to the same minimum is
:func:`patchflow.reconstruct.variational.reconstruct`, with the mixture as patch energy: any operator, any noise.

References:
    Zoran, Weiss, "From learning models of natural image patches to whole image restoration", ICCV 2011
    Parameswaran, Deledalle, Denis, Nguyen, "Accelerating GMM-based patch priors for image restoration: three
    ingredients for a 100x speed-up", 2018, https://arxiv.org/abs/1710.08124
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.energy import Proximable
from patchflow.errors import InputError
from patchflow.numerics.patches import add_patches, extract_patches, grid_shape
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.solution import Solution
from patchflow.splitting import half_quadratic_splitting

# On the validation image of super-resolution x4, among weights .1 to 3, first levels .05 to .2, last ones .002 to .03,
# 8 to 128 steps and strides 1 to 6.
DEFAULT_WEIGHT = 0.2
LEVELS, STEPS = (0.1, 0.02), 128


def geometric_levels(first: float, last: float, steps: int) -> list[float]:
    """Levels :math:`s` that fall geometrically.

    Args:
        first: The first level, in units of the image.
        last: The last one.
        steps: Their number.
    """
    return [first * (last / first) ** (k / max(1, steps - 1)) for k in range(steps)]


def published_levels(noise: float) -> list[float]:
    r"""The published levels :math:`s^{-2} = (1, 4, 8, 16, 32)\, \sigma^{-2}`, for weight 1 and stride 1.

    Args:
        noise: The standard deviation :math:`\sigma` of the noise.
    """
    return [noise * beta**-0.5 for beta in (1, 4, 8, 16, 32)]


@torch.no_grad()
def reconstruct(
    data: Proximable,
    prior: PatchPrior,
    y: Tensor,
    init: Float[Tensor, "batch channels height width"],
    *,
    weight: float = DEFAULT_WEIGHT,
    levels: Sequence[float] = tuple(geometric_levels(*LEVELS, STEPS)),
    stride: int | None = None,
    progress: bool = False,
) -> Solution:
    r"""Half-quadratic splitting with falling levels :math:`s`.

    Args:
        data: The data term, with its exact proximal map.
        prior: A patch prior whose patch energy is a :class:`patchflow.priors.patch_mixture.PatchMixture`.
        y: The measurement.
        init: The start image, aligned with the operator's grid (``operator.initial(y)``).
        weight: The weight :math:`w`; 1 counts the patch energies as nats of the image.
        levels: The levels :math:`s`, one per step, in units of the image.
        stride: Stride of the patch grid whose phase cycles; the patch size by default: each step tiles the image.
        progress: Show a progress line.

    Returns:
        All patches of the last point, denoised at the last level, and the distance of x and z at each step.

    Raises:
        InputError: If the prior is not one of a mixture or does not fit the image, or a number is out of range.
    """
    mixture = mixture_of(prior)
    prior.check(init)
    if not (weight > 0 and levels and min(levels) > 0 and (stride is None or stride > 0)):
        raise InputError(
            f"Got weight {weight}, levels {list(levels)} and stride {stride}; all must be positive, at least one level."
        )
    phases = itertools.cycle(prior.phases(stride))

    def denoise(x: Tensor, std: float) -> Tensor:
        phase = next(phases)
        return filter_patches(x, mixture, prior, std, phase.stride, phase.phase)

    solution = half_quadratic_splitting(
        data,
        denoise,
        init,
        y,
        betas=[level**-2 for level in levels],
        weight=weight,
        progress=progress,
    )
    x = filter_patches(solution.x, mixture, prior, levels[-1])
    return solution._replace(x=x)


def filter_patches(
    x: Float[Tensor, "batch channels height width"],
    mixture: PatchMixture,
    prior: PatchPrior,
    std: float,
    stride: int = 1,
    phase: tuple[int, int] = (0, 0),
) -> Float[Tensor, "batch channels height width"]:
    """The average of the denoised patches on a grid; pixels that no patch covers are kept.

    Args:
        x: Images.
        mixture: The mixture.
        prior: The prior, for its patch size and padding.
        std: The standard deviation of the noise.
        stride: Stride of the grid.
        phase: Row and column of its first patch.
    """
    size, padding = prior.size, prior.padding
    x = functional.pad(x, [padding] * 4, mode="reflect") if padding else x
    height, width = x.shape[2:]
    result = x.clone()
    if height >= size + phase[0] and width >= size + phase[1]:
        counts = x.new_zeros(1, height, width)
        grid = grid_shape((height, width), size, stride, phase)
        ones = x.new_ones(grid[0] * grid[1], size**2)
        add_patches(counts, ones, size, stride, phase)
        for image in result:
            patches = mixture.denoise(extract_patches(image, size, stride, phase), std)
            sums = torch.zeros_like(image)
            add_patches(sums, patches, size, stride, phase)
            image.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), image))
    return result[:, :, padding : height - padding, padding : width - padding]


@torch.no_grad()
def component_map(
    x: Float[Tensor, "batch channels height width"], prior: PatchPrior, std: float = 0.0
) -> Float[Tensor, "batch 1 rows columns"]:
    """The number of the most probable component of each patch, as a picture: one value per patch position.

    Args:
        x: Images.
        prior: A patch prior whose patch energy is a mixture.
        std: The standard deviation of noise on the images, which widens the components.

    Raises:
        InputError: If the prior is not one of a mixture, or does not fit the images.
    """
    mixture = mixture_of(prior).blurred(std**2)
    prior.check(x)
    rows, columns = grid_shape((x.shape[2], x.shape[3]), prior.size)
    maps = [mixture.component(extract_patches(image, prior.size)) for image in x]
    return torch.stack(maps).view(-1, 1, rows, columns).to(x)


def mixture_of(prior: PatchPrior) -> PatchMixture:
    """The mixture of a patch prior.

    Raises:
        InputError: If it has another patch energy.
    """
    if not isinstance(prior.patch_energy, PatchMixture):
        raise InputError(
            f"EPLL needs a Gaussian mixture but the prior's patch energy is a {type(prior.patch_energy).__name__}; "
            "train one with patchflow train epll, or patchflow.learn_epll."
        )
    return prior.patch_energy
