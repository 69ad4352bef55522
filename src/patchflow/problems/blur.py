r"""Blur, and super-resolution: blur kept at some pixels.

Blur here is *correlation*, as in the published code: :math:`y_i = \sum_u k_u\, x_{s i + u - a}` with a kernel
:math:`k`, its anchor :math:`a` and a stride :math:`s`. Flip the kernel for a convolution.

References:
    Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, "PatchNR: learning from very few images by patch normalizing
    flow regularization", 2023, https://arxiv.org/abs/2205.12021
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.fourier import fold_power, multiply, solve_subsampled, transfer_function
from patchflow.numerics.interpolation import cubic_matrix
from patchflow.problems.operator import LinearOperator, Shape, apply_linear, check_shape

Boundary = Literal["periodic", "reflect", "valid"]


class Blur(LinearOperator):
    """Correlation with a kernel, kept at every ``stride``-th pixel.

    Args:
        kernel: The kernel (rows, columns).
        shape: Height and width of the image.
        boundary: How the image goes on outside: ``"periodic"``, ``"reflect"`` (without repeating the border), or
            ``"valid"``: only where the kernel fits, so the output is smaller.
        stride: Distance of the kept pixels.
        anchor: Row and column of the kernel that sits on the kept pixel; its middle by default. Not used by
            ``"valid"``, where the kernel starts on it.

    Raises:
        InputError: If the kernel is not a finite matrix of positive sum, does not fit into the image, or the
            stride is not positive.
    """

    kernel: Tensor

    def __init__(
        self,
        kernel: Float[Tensor, "rows columns"],
        shape: Shape,
        boundary: Boundary = "reflect",
        *,
        stride: int = 1,
        anchor: tuple[int, int] | None = None,
    ) -> None:
        rows, columns = kernel.shape
        if not (kernel.isfinite().all() and float(kernel.sum()) > 0):
            raise InputError(
                f"The kernel's sum is {float(kernel.sum()):g} but must be finite and positive; normalise it."
            )
        if stride < 1:
            raise InputError(f"The stride is {stride} but must be at least 1.")
        if boundary == "valid":
            anchor = (0, 0)
            covered = (shape[0] - rows + 1, shape[1] - columns + 1)
        else:
            anchor = ((rows - 1) // 2, (columns - 1) // 2) if anchor is None else anchor
            covered = shape
        largest = (shape[0] - 1, shape[1] - 1) if boundary == "reflect" else shape
        if min(covered) < 1 or rows > largest[0] or columns > largest[1]:
            raise InputError(
                f"A kernel of {rows} x {columns} does not fit into an image of {shape[0]} x {shape[1]} pixels with the "
                f"boundary {boundary!r}; crop the kernel or use a larger image."
            )
        super().__init__(shape, (math.ceil(covered[0] / stride), math.ceil(covered[1] / stride)))
        self.boundary, self.stride, self.anchor = boundary, stride, anchor
        # Not persistent: a state dict loaded in place would leave the remembered spectrum behind.
        self.register_buffer("kernel", kernel, persistent=False)
        self._spectra: tuple[Tensor, torch.dtype, Tensor, Tensor] | None = None
        # Direct correlation costs rows * columns / stride^2 products a pixel; an FFT pair about as much as 64.
        self._fast = rows * columns > 64 * stride**2

    def forward(self, x: Tensor) -> Tensor:
        """Correlate; see :meth:`Operator.forward`."""
        check_shape(x, self.domain_shape)
        return apply_linear(x, self._correlate, self._spread)

    def adjoint(self, y: Tensor) -> Tensor:
        """Spread each pixel over its kernel; see :meth:`LinearOperator.adjoint`."""
        check_shape(y, self.range_shape)
        return apply_linear(y, self._spread, self._correlate)

    def _correlate(self, x: Tensor) -> Tensor:
        if self.boundary == "reflect" or (self.boundary == "periodic" and not self._fast):
            for axis in (-2, -1):
                x = x.index_select(axis, self._index(axis, x.device))
        if self._fast:
            rows, columns = (slice(0, n * self.stride, self.stride) for n in self.range_shape)
            return multiply(x, self._spectrum(x.dtype)[0])[..., rows, columns]
        flat = x.reshape(-1, 1, *x.shape[-2:])
        y = functional.conv2d(flat, self.kernel[None, None].to(x.dtype), stride=self.stride)
        return y.view(*x.shape[:-2], *self.range_shape)

    def _spread(self, y: Tensor) -> Tensor:
        if self._fast:
            grid = self._extended if self.boundary == "reflect" else self.domain_shape
            x = y.new_zeros(*y.shape[:-2], *grid)
            rows, columns = (slice(0, n * self.stride, self.stride) for n in self.range_shape)
            x[..., rows, columns] = y
            return self._fold(multiply(x, self._spectrum(y.dtype)[0].conj()))
        flat = y.reshape(-1, 1, *self.range_shape)
        # One small correlation for each phase of the large grid: five times as fast as a transposed convolution.
        stride, (rows, columns) = self.stride, self.kernel.shape
        tall, wide = math.ceil(rows / stride), math.ceil(columns / stride)
        kernel = self.kernel.to(y.dtype)
        kernel = functional.pad(kernel, (0, wide * stride - columns, 0, tall * stride - rows))
        phases = kernel.view(tall, stride, wide, stride).permute(1, 3, 0, 2).flip(2, 3)
        phases = phases.reshape(stride**2, 1, tall, wide)
        x = functional.conv2d(flat, phases, padding=(tall - 1, wide - 1))
        x = functional.pixel_shuffle(x, stride)
        padded = self._extended
        x = functional.pad(x, (0, padded[1] - x.shape[3], 0, padded[0] - x.shape[2]))
        return self._fold(x).view(*y.shape[:-2], *self.domain_shape)

    def _fold(self, x: Tensor) -> Tensor:
        """Add what lies outside of the image to where it was taken from."""
        for axis in (-2, -1):
            if x.shape[axis] > self.domain_shape[axis]:
                shape = list(x.shape)
                shape[axis] = self.domain_shape[axis]
                x = x.new_zeros(shape).index_add(axis, self._index(axis, x.device), x)
        return x

    def solve(self, b: Tensor, rho: float | int, init: Tensor | None = None) -> Tensor:
        """Exactly, in the Fourier domain, if periodic and divisible by the stride; see :meth:`LinearOperator.solve`."""
        if not self._diagonal:
            return super().solve(b, rho, init)
        transfer, folded = self._spectrum(b.dtype)
        return solve_subsampled(b, rho, transfer, folded, self.stride)

    def nearest(self, v: Tensor, y: Tensor, rho: float | int) -> Tensor:
        """Exactly, in the Fourier domain, if possible; see :meth:`LinearOperator.nearest`."""
        if not self._diagonal:
            return super().nearest(v, y, rho)
        # From the residual of v: solve would divide a cancelled difference by rho.
        return v + self.adjoint(multiply(y - self(v), 1 / (rho + self._spectrum(v.dtype)[1])))

    @property
    def _diagonal(self) -> bool:
        """Whether the Fourier transform makes the operator diagonal."""
        height, width = self.domain_shape
        return self.boundary == "periodic" and not (height % self.stride or width % self.stride)

    def initial(self, y: Tensor) -> Tensor:
        """Bicubic interpolation, aligned with the operator's grid: the pixels of ``y`` sit on the kernel's centroid."""
        shifts = self.shift
        matrices = [
            cubic_matrix(count, small, self.stride, shift, self.boundary == "periodic").to(y)
            for count, small, shift in zip(self.domain_shape, self.range_shape, shifts, strict=True)
        ]
        return matrices[0] @ y @ matrices[1].T

    @property
    def shift(self) -> tuple[float, float]:
        """Position of the measured pixel (0, 0) in the image, in image pixels."""
        mass = self.kernel / self.kernel.sum()
        return tuple(
            float((mass.sum(1 - axis) * torch.arange(size).to(mass)).sum()) - self.anchor[axis]
            for axis, size in enumerate(mass.shape)
        )  # pyright: ignore

    @property
    def covered(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """First row and the one after the last that the measured pixels cover, each ``stride`` wide; columns as well.

        Beyond, :meth:`initial` reflects, unless the image is periodic.
        """
        half, margin = (self.stride - 1) / 2, 1e-3  # of the rounding of a centroid
        return tuple(
            (
                max(math.ceil(shift - half - margin), 0),
                min(math.floor(shift + (small - 1) * self.stride + half + margin) + 1, count),
            )
            for count, small, shift in zip(
                self.domain_shape, self.range_shape, self.shift, strict=True
            )
        )  # pyright: ignore

    def _spectrum(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Half the time of a solve; solvers call it hundreds of times with the same kernel.
        cached = self._spectra
        if cached is None or cached[0] is not self.kernel or cached[1] != dtype:
            height, width = grid = (
                self._extended if self.boundary == "reflect" else self.domain_shape
            )
            anchor = self.anchor if self.boundary == "periodic" else (0, 0)
            transfer = transfer_function(self.kernel.to(dtype), grid, anchor)
            folded = transfer.real
            if not (height % self.stride or width % self.stride):
                folded = fold_power(transfer, grid, self.stride)
            cached = self._spectra = (self.kernel, dtype, transfer, folded)
        return cached[2], cached[3]

    @property
    def _extended(self) -> Shape:
        """The image with as much around it as the kernel needs."""
        if self.boundary == "valid":
            return self.domain_shape
        return (
            self.domain_shape[0] + self.kernel.shape[0] - 1,
            self.domain_shape[1] + self.kernel.shape[1] - 1,
        )

    def _index(self, axis: int, device: torch.device) -> Tensor:
        """For each pixel of the extended axis, the pixel of the image that is there."""
        size, extent, before = self.kernel.shape[axis], self.domain_shape[axis], self.anchor[axis]
        index = torch.arange(-before, extent + size - 1 - before, device=device)
        if self.boundary == "periodic":
            return index % extent
        index = index.abs()
        return torch.where(index < extent, index, 2 * (extent - 1) - index)


def downsample(
    shape: Shape,
    stride: int = 4,
    *,
    kernel_size: int = 16,
    std: float | int | None = None,
    boundary: Literal["circular", "valid"] = "circular",
    kernel: Float[Tensor, "rows columns"] | None = None,
) -> Blur:
    """The paper's super-resolution operators: a Gaussian blur, kept at every ``stride``-th pixel.

    ``"circular"`` extends the image periodically at the bottom and the right only (600 x 600 becomes 150 x 150
    at stride 4); ``"valid"``, the zero-shot operator, does not extend it (320 x 480 becomes 153 x 233 at stride 2).

    Args:
        shape: Height and width of the image; divisible by the stride if circular.
        stride: The scale.
        kernel_size: Side length of the kernel.
        std: Standard deviation of the Gaussian, in pixels; half the stride by default, as in the paper.
        boundary: See above.
        kernel: A kernel in place of the Gaussian.

    Raises:
        InputError: If the shape is not divisible by the stride, or the kernel does not fit.
    """
    if boundary == "circular" and (shape[0] % stride or shape[1] % stride):
        raise InputError(
            f"An image of {shape[0]} x {shape[1]} pixels is not divisible by the scale {stride}; crop it."
        )
    if kernel is None:
        kernel = gaussian_kernel(kernel_size, stride / 2 if std is None else std)
    return Blur(
        kernel,
        shape,
        boundary="periodic" if boundary == "circular" else "valid",
        stride=stride,
        anchor=(0, 0),
    )


def gaussian_kernel(size: int, std: float | int) -> Float[Tensor, "size size"]:
    """A Gaussian sampled on ``size`` x ``size`` pixels around their middle, of sum 1.

    Raises:
        InputError: If the standard deviation is not positive.
    """
    if not std > 0:
        raise InputError(f"The standard deviation is {std} but must be positive.")
    line = torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / std) ** 2)
    return torch.outer(line, line) / line.sum() ** 2
