"""Low-resolution images: the likelihood that made one, the cells of its pixels, and pairs to learn from."""

from __future__ import annotations

from typing import Literal, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.blur import Blur, downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import LinearOperator, Shape


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


def lowers_resolution(operator: LinearOperator) -> TypeGuard[Blur]:
    """Whether an operator is a blur that is kept at some pixels only."""
    return isinstance(operator, Blur) and operator.stride > 1


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
    if not lowers_resolution(operator):
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


def cell_offset(operator: Blur) -> tuple[int, int]:
    """Row and column in the image of the first pixel of the cell of the measured pixel (0, 0); may be negative.

    The cell of a measured pixel are the ``stride`` x ``stride`` pixels around it: around the centroid of its kernel, to
    the nearest pixel, and inside of the kernel.
    """
    corner = []
    for shift, anchor, size in zip(
        operator.shift, operator.anchor, operator.kernel.shape, strict=True
    ):
        first = round(shift + anchor - (operator.stride - 1) / 2 - 1e-3)  # of a centroid's rounding
        corner.append(max(0, min(first, size - operator.stride)) - anchor)
    return corner[0], corner[1]


def from_cells(
    operator: Blur, cells: Float[Tensor, "batch channels rows columns"], init: Tensor
) -> Float[Tensor, "batch channels height width"]:
    """The image whose cells are given: pixels that belong to no measured pixel are taken from another image.

    Args:
        operator: The operator, periodic or not.
        cells: The cells side by side, ``stride`` times as many pixels as measured ones along each axis.
        init: An image (batch, channels, height, width) of the operator's domain.
    """
    if operator.boundary == "periodic" and tuple(cells.shape[2:]) == operator.domain_shape:
        return cells.roll(cell_offset(operator), (2, 3))
    there, here = [], []
    for offset, small, large in zip(
        cell_offset(operator), cells.shape[2:], operator.domain_shape, strict=True
    ):
        first, last = max(offset, 0), min(offset + small, large)
        there.append(slice(first, last))
        here.append(slice(first - offset, last - offset))
    x = init.clone()
    x[:, :, there[0], there[1]] = cells[:, :, here[0], here[1]]
    return x


class LowResolution:
    r"""Makes pairs for learning: clean crops lose their resolution, :math:`y = A x + \sigma \xi`.

    What lies outside of a crop is not guessed: the kernel goes only where it fits, so that the wanted pixels, the cells
    of the measured ones, are fewer than those of the crop.

    >>> import torch
    >>> from patchflow.problems.blur import gaussian_kernel
    >>> degrade = LowResolution(gaussian_kernel(16, 2.0), 4, 0.01)
    >>> degrade.side(32)
    44
    >>> wanted, given = degrade(torch.rand(2, 1, 44, 44))
    >>> tuple(wanted.shape), tuple(given.shape)
    ((2, 1, 32, 32), (2, 1, 8, 8))

    Args:
        kernel: The kernel of the blur.
        stride: The scale.
        std: The standard deviation of the noise.

    Raises:
        InputError: If the stride is not a whole number of at least 2, the kernel is smaller, or the noise is negative.
    """

    def __init__(
        self, kernel: Float[Tensor, "rows columns"], stride: int, std: float | int
    ) -> None:
        if stride < 2 or min(kernel.shape) < stride or not std >= 0:
            raise InputError(
                f"Got the scale {stride}, a kernel of {kernel.shape[0]} x {kernel.shape[1]} and the noise {std}; the "
                "scale must be at least 2, the kernel as large, and the noise not negative."
            )
        self.kernel, self.stride, self.std = kernel, stride, float(std)

    def side(self, wanted: int) -> int:
        """How large a crop must be of which so many pixels are wanted along a side.

        Raises:
            InputError: If the scale does not divide that number.
        """
        if wanted < self.stride or wanted % self.stride:
            raise InputError(
                f"Crops of {wanted} x {wanted} pixels are not divisible by the scale {self.stride}; use a multiple of "
                "it."
            )
        return wanted + max(self.kernel.shape) - self.stride

    def __call__(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[
        Float[Tensor, "batch channels rows columns"],
        Float[Tensor, "batch channels small_h small_w"],
    ]:
        """Degrade.

        Args:
            x: Clean images.

        Returns:
            What is wanted, and the measurement of it.
        """
        operator = Blur(self.kernel.to(x), (x.shape[2], x.shape[3]), "valid", stride=self.stride)
        y = operator(x)
        top, left = cell_offset(operator)
        rows, columns = (self.stride * n for n in y.shape[2:])
        wanted = x[:, :, top : top + rows, left : left + columns]
        return wanted, y + self.std * torch.randn_like(y)
