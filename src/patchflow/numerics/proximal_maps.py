r"""Penalties of a tensor with closed proximal maps, for block-wise methods.

.. math:: \operatorname{prox}_{\tau f}(v) = \arg\min_x \tfrac{1}{2\tau} \|x - v\|^2 + f(x).

The indicator of a set is 0 on it and infinite elsewhere; its map is a projection. The sets need not be convex.

References:
    Parikh, Boyd, "Proximal algorithms", 2014, https://doi.org/10.1561/2400000003
    Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient projections onto the l1-ball for learning in high dimensions",
    2008
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.stiefel import orthonormality_error, polar

# How far from a set its indicator is still 0, in the square root of the precision.
_SLACK = 10.0
# The same for projections by a few steps of an iteration.
_ROUGH = 1e-3


class Penalty(NamedTuple):
    r"""A penalty and its proximal map.

    Attributes:
        value: The penalty :math:`f` of a tensor; infinite where it is not allowed.
        prox: The proximal map of :math:`v` and :math:`\tau`.
    """

    value: Callable[[Tensor], float]
    prox: Callable[[Tensor, float], Tensor]


def free() -> Penalty:
    """No penalty."""
    return Penalty(lambda x: 0.0, lambda v, step: v)


def box(low: float | int, high: float | int) -> Penalty:
    """The indicator of the box of all tensors with entries between ``low`` and ``high``.

    Raises:
        InputError: If the box is empty.
    """
    if not low <= high:
        raise InputError(f"The box from {low} to {high} is empty; give the lower bound first.")
    return Penalty(
        lambda x: _indicator(bool(((x >= low) & (x <= high)).all())),
        lambda v, step: v.clamp(low, high),
    )


def l1(weight: float | int) -> Penalty:
    """The sum of the absolute values, times a weight; its map is soft shrinkage.

    Raises:
        InputError: If the weight is negative or not finite.
    """
    _check_weight(weight)
    return Penalty(
        lambda x: weight * float(x.abs().sum()),
        lambda v, step: v.sign() * (v.abs() - step * weight).clamp_min(0),
    )


def simplex() -> Penalty:
    """The indicator of the probability simplex, row by row along the last axis."""
    return Penalty(
        lambda x: _indicator(
            float((x.sum(-1) - 1).abs().max()) <= _slack(x) and float(x.min()) >= 0
        ),
        lambda v, step: _project_simplex(v),
    )


def stiefel(iterations: int | None = None) -> Penalty:
    """The indicator of the matrices with orthonormal columns (or, if they are wide, rows).

    Args:
        iterations: See :func:`patchflow.numerics.stiefel.polar`, whose iteration projects.
    """
    return Penalty(
        lambda x: _indicator(
            orthonormality_error(x) <= (_slack(x) if iterations is None else _ROUGH)
        ),
        lambda v, step: polar(v, iterations=iterations),
    )


def nuclear(weight: float | int) -> Penalty:
    """The sum of the singular values of a matrix, times a weight; its map shrinks them.

    Raises:
        InputError: If the weight is negative or not finite.
    """
    _check_weight(weight)

    def prox(v: Tensor, step: float) -> Tensor:
        left, values, right = torch.linalg.svd(v, full_matrices=False)
        return left * (values - step * weight).clamp_min(0) @ right

    return Penalty(lambda x: weight * float(torch.linalg.svdvals(x).sum()), prox)


def _project_simplex(v: Tensor) -> Tensor:
    # The threshold t with sum max(v - t, 0) = 1, from the sorted entries.
    ordered = v.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, v.shape[-1] + 1).to(v)
    last = (ordered * rank > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, last - 1) / last
    return (v - threshold).clamp_min(0)


def _indicator(inside: bool) -> float:
    return 0.0 if inside else math.inf


def _slack(x: Tensor) -> float:
    return _SLACK * math.sqrt(torch.finfo(x.dtype).eps)


def _check_weight(weight: float | int) -> None:
    if not 0 <= weight < math.inf:
        raise InputError(f"The weight is {weight} but must be 0 or more and finite.")
