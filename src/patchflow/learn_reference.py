"""Draw the reference patches of the Wasserstein patch prior from one to six images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from patchflow import models
from patchflow.numerics.patches import PatchSampler, common_channels
from patchflow.priors.multiscale import MultiscalePrior, shrink
from patchflow.priors.patch import PatchPrior


def learn_wpp(
    images: Sequence[Tensor],
    *,
    size: int = 8,
    count: int = 2000,
    scales: int = 1,
    epsilon: float = 0.0,
    rho: float | None = None,
    padding: int = 0,
    dihedral: bool = False,
) -> MultiscalePrior:
    """Draw reference patches at random from all patches of the images, at each scale.

    Args:
        images: Training images, each (1, channels, height, width), of one number of channels.
        size: Side length of the patches in pixels.
        count: Number of reference patches of each scale.
        scales: Number of scales, each half as large as the one before.
        epsilon: See :func:`patchflow.models.wpp`.
        rho: See there.
        padding: See there.
        dihedral: Turn and mirror the patches at random; for images without a preferred direction.

    Returns:
        The prior, frozen, with its potentials zero.

    Raises:
        InputError: If there is no image, the numbers of channels differ, or an image (at the coarsest scale) is
            smaller than a patch.
    """
    prior = models.wpp(
        size=size,
        channels=common_channels(images),
        count=count,
        scales=scales,
        epsilon=epsilon,
        rho=rho,
        padding=padding,
    )
    for k, scale in enumerate(prior.priors):
        assert isinstance(scale, PatchPrior)
        images = [shrink(image) if k else image for image in images]
        reference = PatchSampler(images, size, count, dihedral=dihedral)()
        scale.patch_energy.load_state_dict(
            {"reference": reference, "psi": reference.new_zeros(count)}
        )
    return prior.requires_grad_(False)
