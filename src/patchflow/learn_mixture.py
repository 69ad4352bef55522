"""Learn mixtures, Gaussian ones (EPLL) and Student-t ones, from the patches of one to six images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchflow import models
from patchflow.errors import InputError
from patchflow.numerics.patches import common_channels, dihedral_orders, extract_patches
from patchflow.priors.expectation_maximization import MixtureFit, fit_mixture
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_mixture import mean_free_basis
from patchflow.priors.student_maximization import StudentFit, fit_student_mixture


def learn_epll(
    images: Sequence[Tensor],
    *,
    size: int = 6,
    components: int = 200,
    padding: int = 0,
    remove_mean: bool = False,
    dihedral: bool = False,
    count: int | None = None,
    floor: float | int = 1e-6,
    tolerance: float | int = 5e-3,
    max_iterations: int = 500,
    progress: bool = False,
) -> tuple[PatchPrior, MixtureFit]:
    """Fit a mixture to all patches of the images.

    Args:
        images: Training images, each (1, channels, height, width), of one number of channels.
        size: Side length of the patches in pixels.
        components: Number of components.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        remove_mean: Whether the mean of a patch is taken out, as in the original EPLL.
        dihedral: Turn and mirror each patch at random; for images without a preferred direction.
        count: Number of patches, drawn at random without replacement; all by default.
        floor: See :func:`patchflow.priors.expectation_maximization.fit_mixture`.
        tolerance: See there.
        max_iterations: See there.
        progress: Show a progress line.

    Returns:
        The prior, whose number of components is that of those that own patches, and the record of the fit.

    Raises:
        InputError: If there is no image, the numbers of channels differ, an image is smaller than a patch, or
            the patches do not suffice.
    """
    channels = common_channels(images)
    points = _points(images, size, count, dihedral)
    if remove_mean:
        points = points @ mean_free_basis(points.shape[1]).to(points).T
    record = fit_mixture(
        points,
        components,
        floor=floor,
        tolerance=tolerance,
        max_iterations=max_iterations,
        progress=progress,
    )
    prior = models.epll(
        size=size,
        channels=channels,
        components=len(record.weights),
        padding=padding,
        remove_mean=remove_mean,
    )
    state = {
        "log_weights": record.weights.log(),
        "means": record.means,
        "covariances": record.covariances,
    }
    prior.patch_energy.load_state_dict(state)
    return prior.requires_grad_(False), record


def learn_student_t(
    images: Sequence[Tensor],
    *,
    size: int = 6,
    components: int = 50,
    padding: int = 0,
    dihedral: bool = False,
    count: int | None = 50_000,
    floor: float | int = 1e-6,
    tolerance: float | int = 5e-3,
    max_iterations: int = 500,
    progress: bool = False,
) -> tuple[PatchPrior, StudentFit]:
    """Fit a Student-t mixture to the patches of the images.

    Args:
        images: Training images, each (1, channels, height, width), of one number of channels.
        size: Side length of the patches in pixels.
        components: Number of components.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.
        dihedral: Turn and mirror each patch at random; for images without a preferred direction.
        count: Number of patches, drawn at random without replacement; None for all.
        floor: See :func:`patchflow.priors.student_maximization.fit_student_mixture`.
        tolerance: See there.
        max_iterations: See there.
        progress: Show a progress line.

    Returns:
        The prior, whose number of components is that of those that own patches, and the record of the fit.

    Raises:
        InputError: If there is no image, the numbers of channels differ, an image is smaller than a patch, or
            the patches do not suffice.
    """
    channels = common_channels(images)
    record = fit_student_mixture(
        _points(images, size, count, dihedral),
        components,
        floor=floor,
        tolerance=tolerance,
        max_iterations=max_iterations,
        progress=progress,
    )
    prior = models.student_t(
        size=size, channels=channels, components=len(record.weights), padding=padding
    )
    state = {
        "gaussian.log_weights": record.weights.log(),
        "gaussian.means": record.means,
        "gaussian.covariances": record.scatters,
        "degrees": record.degrees,
    }
    prior.patch_energy.load_state_dict(state)
    return prior.requires_grad_(False), record


def _points(images: Sequence[Tensor], size: int, count: int | None, dihedral: bool) -> Tensor:
    """All patches, or so many at random, turned and mirrored if asked for."""
    points = torch.cat([extract_patches(image[0], size) for image in images])
    if count is not None and count < 1:
        raise InputError(f"The number of patches is {count} but must be at least 1.")
    if count is not None and count < len(points):
        points = points[torch.randperm(len(points))[:count]]
    if dihedral:
        orders = dihedral_orders(images[0].shape[1], size)
        points = points.gather(1, orders[torch.randint(len(orders), (len(points),))])
    return points
