"""Linear algebra without matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchflow.errors import InputError


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    init: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
) -> Tensor:
    r"""Solve :math:`M x = b` for a symmetric positive definite :math:`M`, each batch entry by itself.

    Args:
        apply: The map :math:`M`, on tensors of the shape of ``b``, acting on each batch entry separately.
        b: Right-hand sides, with a leading batch axis.
        init: Start; zero by default.
        tolerance: Stop when every residual is below this fraction of its right-hand side.
        max_iterations: Stop after this many iterations in any case.

    Raises:
        InputError: If the tolerance is not positive.

    References:
        Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952
    """
    if tolerance <= 0:
        raise InputError(f"The tolerance is {tolerance} but must be positive, for example 1e-6.")

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).view(-1, *[1] * (u.ndim - 1))

    x = torch.zeros_like(b) if init is None else init.clone()
    residual = b - apply(x)
    direction = residual.clone()
    squared = dot(residual, residual)
    target = tolerance**2 * dot(b, b)
    tiny = torch.finfo(b.dtype).tiny
    for _ in range(max_iterations):
        if bool((squared <= target).all()):
            break
        image = apply(direction)
        # An entry that is solved has direction zero; the floor keeps it where it is.
        step = squared / dot(direction, image).clamp_min(tiny)
        x = x + step * direction
        residual = residual - step * image
        before, squared = squared, dot(residual, residual)
        direction = residual + squared / before.clamp_min(tiny) * direction
    return x


def power_iteration(apply: Callable[[Tensor], Tensor], init: Tensor, iterations: int = 50) -> float:
    r"""The largest eigenvalue of a symmetric positive semi-definite map, from below.

    Args:
        apply: The map.
        init: A start with a component along the leading eigenvector, such as random numbers.
        iterations: Number of products.
    """
    x = init / init.norm()
    value = torch.zeros(())
    for _ in range(iterations):
        image = apply(x)
        value = (x * image).sum()
        x = image / image.norm().clamp_min(torch.finfo(x.dtype).tiny)
    return float(value)
