"""Low-resolution images: the likelihood that made one, from the image alone, and whether the two fit together."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.blur import Blur, downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Shape


def low_resolution(
    shape: Shape,
    scale: int = 2,
    *,
    noise: float | int = 0.01,
    kernel_size: int = 16,
    std: float | int | None = None,
    boundary: Literal["circular", "valid"] = "valid",
) -> GaussianLikelihood:
    """The likelihood of a low-resolution image: Gaussian blur, one pixel in ``scale`` kept, white noise.

    >>> low_resolution((153, 233)).operator.domain_shape
    (320, 480)

    Args:
        shape: Height and width of the low-resolution image.
        scale: Image pixels per measured pixel.
        noise: Standard deviation of the noise.
        kernel_size: Side length of the kernel in image pixels.
        std: Standard deviation of the Gaussian in image pixels; half the scale by default.
        boundary: ``"valid"`` measures only where the kernel fits: the image is larger by the kernel's size less the
            scale, and its outer frame is a guess. ``"circular"`` takes the image as periodic.

    Returns:
        The likelihood.

    Raises:
        InputError: If the scale is not a whole number of at least 2, the image is empty, or the kernel is smaller than
            the scale.
    """
    if not isinstance(scale, int) or scale < 2:
        raise InputError(f"The scale is {scale} but must be a whole number of at least 2.")
    if min(shape) < 1 or kernel_size < scale:
        raise InputError(
            f"Got an image of {shape[0]} x {shape[1]} pixels and a kernel of {kernel_size} x {kernel_size}; the image "
            f"must not be empty, and the kernel at least as large as the scale {scale}."
        )
    extra = kernel_size - scale if boundary == "valid" else 0
    large = (shape[0] * scale + extra, shape[1] * scale + extra)
    operator = downsample(large, scale, kernel_size=kernel_size, std=std, boundary=boundary)
    return GaussianLikelihood(operator, noise)


def check_low_resolution(likelihood: GaussianLikelihood, y: Tensor) -> Blur:
    """Refuse what cannot be super-resolved from itself, before a long computation.

    Args:
        likelihood: The operator and the noise.
        y: The measurement.

    Returns:
        The operator.

    Raises:
        InputError: If the operator does not lower the resolution, or the measurement is not one image of its range or
            not finite.
    """
    operator = likelihood.operator
    if not isinstance(operator, Blur) or operator.stride < 2:
        raise InputError(
            f"The operator is a {type(operator).__name__} that does not lower the resolution; give a Blur with a "
            "stride of 2 or more, such as downsample(shape, 2)."
        )
    if len(y) != 1 or tuple(y.shape[2:]) != operator.range_shape:
        raise InputError(
            f"The measurement has shape {tuple(y.shape)} but the operator gives one image of "
            f"{operator.range_shape[0]} x {operator.range_shape[1]} pixels; give the operator of its size."
        )
    bad = int((~y.isfinite()).sum())
    if bad:
        raise InputError(
            f"{bad} of {y.numel()} values of the measurement are not finite; mend them."
        )
    return operator
