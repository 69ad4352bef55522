r"""Operators: what was measured of an image, :math:`y = A x` or :math:`y = F(x)`.

Images are (batch, channels, height, width). Operators act on the last two axes; batch and channels are free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.numerics.linalg import conjugate_gradients, power_iteration

Shape = tuple[int, int]


class Operator(nn.Module, ABC):
    """A map between images.

    Attributes:
        domain_shape: Height and width of its inputs.
        range_shape: Height and width of its outputs.
    """

    def __init__(self, domain_shape: Shape, range_shape: Shape) -> None:
        super().__init__()
        self.domain_shape, self.range_shape = domain_shape, range_shape

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator to images ``(..., *domain_shape)``."""


class LinearOperator(Operator):
    r"""A linear operator :math:`A` with its adjoint.

    ``A @ B`` composes, ``A.T`` is the adjoint operator. Three methods have defaults that operators with
    structure replace by closed forms: ``solve``, ``nearest`` and ``initial``.
    """

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        r"""Apply :math:`A^\top` to ``(..., *range_shape)``."""

    def solve(self, b: Tensor, rho: float | int, init: Tensor | None = None) -> Tensor:
        r"""Solve :math:`(A^\top A + \rho I)\,x = b`, here by conjugate gradients.

        Args:
            b: Right-hand sides ``(batch, ..., *domain_shape)``.
            rho: The positive :math:`\rho`.
            init: A guess of x, from which iterative methods start.
        """
        tolerance = 1e-10 if b.dtype == torch.float64 else 1e-5
        return conjugate_gradients(
            lambda x: self.adjoint(self(x)) + rho * x, b, init, tolerance=tolerance
        )

    def nearest(self, v: Tensor, y: Tensor, rho: float | int) -> Tensor:
        r"""The minimiser of :math:`\|A x - y\|^2 + \rho \|x - v\|^2`.

        Args:
            v: Images ``(batch, ..., *domain_shape)``.
            y: Measurements ``(batch, ..., *range_shape)``.
            rho: The positive :math:`\rho`.
        """
        return self.solve(self.adjoint(y) + rho * v, rho, v)

    def initial(self, y: Tensor) -> Tensor:
        r"""A start image for the measurement ``y``, here :math:`(A^\top A + \rho I)^{-1} A^\top y` with a small rho."""
        return self.solve(self.adjoint(y), 1e-2)

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The adjoint operator."""
        return Adjoint(self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """The composition: ``(A @ B)(x) = A(B(x))``."""
        return Composition(self, other)


class Adjoint(LinearOperator):
    r"""The adjoint :math:`A^\top` as an operator; its adjoint is the original object."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.range_shape, operator.domain_shape)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        """Apply the adjoint."""
        return self.operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the operator."""
        return self.operator(y)

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The original operator."""
        return self.operator


class Composition(LinearOperator):
    """The composition of two operators; built by ``@``.

    Raises:
        InputError: If the inner range is not the outer domain.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        if outer.domain_shape != inner.range_shape:
            raise InputError(
                f"The outer operator takes {outer.domain_shape} but the inner one gives {inner.range_shape}; "
                "compose operators whose shapes fit."
            )
        super().__init__(inner.domain_shape, outer.range_shape)
        self.outer, self.inner = outer, inner

    def forward(self, x: Tensor) -> Tensor:
        """Apply the inner operator, then the outer one."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the outer adjoint, then the inner one."""
        return self.inner.adjoint(self.outer.adjoint(y))


class Identity(LinearOperator):
    """The identity: denoising."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``y``."""
        return y

    def solve(self, b: Tensor, rho: float | int, init: Tensor | None = None) -> Tensor:
        """Divide by ``1 + rho``; see :meth:`LinearOperator.solve`."""
        return b / (1 + rho)

    def initial(self, y: Tensor) -> Tensor:
        """The measurement itself."""
        return y


def adjoint_error(operator: LinearOperator, dtype: torch.dtype = torch.float64) -> float:
    r"""The mismatch :math:`|\langle Ax, y\rangle - \langle x, A^\top y\rangle| / (\|Ax\|\|y\|)` on random images."""
    x = torch.randn(2, 3, *operator.domain_shape, dtype=dtype)
    y = torch.randn(2, 3, *operator.range_shape, dtype=dtype)
    image = operator(x)
    difference = (image * y).sum() - (x * operator.adjoint(y)).sum()
    return float(difference.abs() / (image.norm() * y.norm()))


def operator_norm(operator: LinearOperator, iterations: int = 50) -> float:
    r"""The norm :math:`\|A\|`, from below, by power iteration on :math:`A^\top A`."""
    start = torch.randn(1, 1, *operator.domain_shape)
    return power_iteration(lambda x: operator.adjoint(operator(x)), start, iterations) ** 0.5


def check_shape(x: Tensor, expected: Shape) -> None:
    """Refuse images of another height and width.

    Raises:
        InputError: If they differ.
    """
    if tuple(x.shape[-2:]) != expected:
        raise InputError(
            f"The image has {x.shape[-2]} x {x.shape[-1]} pixels but the operator takes {expected[0]} x {expected[1]}; "
            "check the shape that the operator was made for."
        )


def apply_linear(
    x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a linear map whose derivative is given by its adjoint instead of found by autograd.

    For operators whose adjoint is faster than what autograd makes of them. Differentiable any number of times.

    Args:
        x: The input.
        there: The map.
        back: Its adjoint.
    """
    return _Linear.apply(x, there, back)  # pyright: ignore


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return apply_linear(grad_outputs[0], ctx.back, ctx.there), None, None
