"""Pixels that were not measured: subsampling and inpainting."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.interpolation import cubic_matrix
from patchflow.numerics.linalg import conjugate_gradients
from patchflow.problems.operator import LinearOperator, Shape, check_shape


class Subsample(LinearOperator):
    """Keep every ``stride``-th pixel, starting at ``offset``.

    Raises:
        InputError: If the stride is not positive or the offset is outside [0, stride).
    """

    def __init__(self, shape: Shape, stride: int, offset: int = 0) -> None:
        if stride < 1 or not 0 <= offset < stride:
            raise InputError(
                f"Got stride {stride} and offset {offset}; the stride must be positive, the offset in [0, stride)."
            )
        super().__init__(
            shape,
            (math.ceil((shape[0] - offset) / stride), math.ceil((shape[1] - offset) / stride)),
        )
        self.stride, self.offset = stride, offset

    def forward(self, x: Tensor) -> Tensor:
        """Keep pixels; see :meth:`Operator.forward`."""
        check_shape(x, self.domain_shape)
        return x[..., self.offset :: self.stride, self.offset :: self.stride]

    def adjoint(self, y: Tensor) -> Tensor:
        """Put pixels back, zeros between; see :meth:`LinearOperator.adjoint`."""
        x = y.new_zeros(*y.shape[:-2], *self.domain_shape)
        x[..., self.offset :: self.stride, self.offset :: self.stride] = y
        return x

    def solve(self, b: Tensor, rho: float | int, init: Tensor | None = None) -> Tensor:
        """Divide pixel by pixel; see :meth:`LinearOperator.solve`."""
        return b / (self.adjoint(self(torch.ones_like(b))) + rho)

    def initial(self, y: Tensor) -> Tensor:
        """Bicubic interpolation, aligned with the kept pixels."""
        rows, columns = (
            cubic_matrix(count, small, self.stride, float(self.offset), False).to(y)
            for count, small in zip(self.domain_shape, self.range_shape, strict=True)
        )
        return rows @ y @ columns.T


class Mask(LinearOperator):
    """Inpainting: measured pixels are kept, hidden ones are zero.

    Args:
        mask: True where a pixel was measured (height, width).

    Raises:
        InputError: If every pixel is hidden.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim != 2:
            raise InputError(f"The mask has shape {tuple(mask.shape)} but must be (height, width).")
        if not mask.any():
            raise InputError(
                "The mask hides everything; it must be true (white) where pixels were measured."
            )
        super().__init__((mask.shape[0], mask.shape[1]), (mask.shape[0], mask.shape[1]))
        self.register_buffer("mask", mask.bool())

    def forward(self, x: Tensor) -> Tensor:
        """Set hidden pixels to zero; see :meth:`Operator.forward`."""
        check_shape(x, self.domain_shape)
        return torch.where(self.mask, x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        """Set hidden pixels to zero; see :meth:`LinearOperator.adjoint`."""
        return self(y)

    def solve(self, b: Tensor, rho: float | int, init: Tensor | None = None) -> Tensor:
        """Divide pixel by pixel; see :meth:`LinearOperator.solve`."""
        return b / (self.mask.to(b.dtype) + rho)

    def initial(self, y: Tensor) -> Tensor:
        """Fill hidden pixels by the harmonic function of their surroundings."""
        kept = self(y)

        def laplacian(x: Tensor) -> Tensor:
            # The graph Laplacian of the pixel grid: symmetric, no flow across the border.
            p = functional.pad(x, (1, 1, 1, 1), mode="replicate")
            sides = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
            return 4 * x - sides

        def hidden(x: Tensor) -> Tensor:
            return torch.where(self.mask, 0, x)

        def apply(x: Tensor) -> Tensor:
            return torch.where(self.mask, x, laplacian(hidden(x)))

        return kept + hidden(
            conjugate_gradients(
                apply, -hidden(laplacian(kept)), tolerance=1e-4, max_iterations=2000
            )
        )
