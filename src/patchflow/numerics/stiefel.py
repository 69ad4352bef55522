r"""The Stiefel manifold: matrices with orthonormal columns (or, if they are wide, rows), and ways back to it.

For a tall :math:`T` (rows :math:`\ge` columns) the manifold is :math:`T^\top T = I`. A gradient :math:`G` at :math:`T`
gives the skew matrix

.. math:: W = \hat W - \hat W^\top, \qquad \hat W = G T^\top - \tfrac12 T (T^\top G T^\top),

and :math:`W T` is the tangent part of :math:`G`. Two curves leave :math:`T` in the direction :math:`-W T` and stay on
the manifold: Cayley's transform and the projection, which is the polar factor. Wide matrices are treated as their
transposes.

References:
    Wen, Yin, "A feasible method for optimization with orthogonality constraints", 2013
    Higham, "Computing the polar decomposition, with applications", 1986
    Hasannasab, Hertrich, Neumayer, Plonka, Setzer, Steidl, "Parseval proximal neural networks", 2020,
    https://arxiv.org/abs/1912.10480
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError

Matrix = Float[Tensor, "rows columns"]


def polar(t: Matrix, *, iterations: int | None = None) -> Matrix:
    r"""The nearest matrix with orthonormal columns (or rows): :math:`T (T^\top T)^{-1/2}`.

    Args:
        t: A matrix of full rank.
        iterations: Steps of Newton's iteration :math:`Y \leftarrow 2 Y (I + Y^\top Y)^{-1}`, which near the manifold
            doubles the number of digits in each (four as published for networks); None: exactly, by singular values.

    Raises:
        InputError: If the number of iterations is not positive.
    """
    if iterations is not None and iterations < 1:
        raise InputError(f"Got {iterations} iterations of Newton's method; use at least 1.")
    if t.shape[0] < t.shape[1]:
        return polar(t.mT, iterations=iterations).mT
    if iterations is None:
        u, _, v = torch.linalg.svd(t, full_matrices=False)
        return u @ v
    identity = torch.eye(t.shape[1]).to(t)
    for _ in range(iterations):
        t = 2 * torch.linalg.solve(identity + t.mT @ t, t, left=False)
    return t


def tangent(t: Matrix, gradient: Matrix) -> Matrix:
    r"""The part of a gradient that is tangent to the manifold at :math:`T`, :math:`W T`.

    Args:
        t: A point of the manifold.
        gradient: The gradient :math:`G` there.
    """
    if t.shape[0] < t.shape[1]:
        return tangent(t.mT, gradient.mT).mT
    inner = t.mT @ gradient
    return gradient - 0.5 * t @ (inner + inner.mT)


def cayley(t: Matrix, gradient: Matrix, step: float | int) -> Matrix:
    r"""The point :math:`(I + \tfrac\tau2 W)^{-1} (I - \tfrac\tau2 W)\, T` of Cayley's curve, orthonormal for all steps.

    :math:`W` has at most the rank of twice the columns, so that the system to solve has at most that size. To go where
    another method (such as Adam) wants to go, give the difference of the two points as the gradient and the step 1.

    Args:
        t: A point of the manifold.
        gradient: The gradient :math:`G` there.
        step: The step :math:`\tau`; positive goes downhill.
    """
    if t.shape[0] < t.shape[1]:
        return cayley(t.mT, gradient.mT, step).mT
    # W = P G T' - T G' P = U V' with P = I - T T' / 2; the inverse by Woodbury's identity.
    half = gradient - 0.5 * t @ (t.mT @ gradient)
    u, v = torch.cat((half, t), 1), torch.cat((t, -half), 1)
    identity = torch.eye(u.shape[1]).to(t)
    return t - step * u @ torch.linalg.solve(identity + 0.5 * step * v.mT @ u, v.mT @ t)


def project(t: Matrix, gradient: Matrix, step: float | int) -> Matrix:
    r"""The polar factor of :math:`T - \tau W T`: a step along the tangent, and back by projection.

    Args:
        t: A point of the manifold.
        gradient: The gradient :math:`G` there.
        step: The step :math:`\tau`; positive goes downhill.
    """
    return polar(t - step * tangent(t, gradient))


def orthonormal(
    matrix: Float[Tensor, "*batch rows columns"],
) -> Float[Tensor, "*batch rows columns"]:
    r"""A point of the Stiefel manifold, :math:`Q^\top Q = I`, from any matrix of full column rank.

    :math:`Q` is the factor of :math:`M = Q R` with a positive diagonal of :math:`R`: unique, smooth in :math:`M`, and
    onto the manifold, so an unconstrained optimiser of :math:`M` walks on it.

    Args:
        matrix: The matrices M, at least as many rows as columns.
    """
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1, 1).to(q.dtype)[..., None, :]


def orthonormality_error(t: Matrix) -> float:
    r"""The largest entry of :math:`|T^\top T - I|` (of :math:`|T T^\top - I|` for a wide matrix)."""
    if t.shape[0] < t.shape[1]:
        t = t.mT
    return float((t.mT @ t - torch.eye(t.shape[1]).to(t)).abs().max())
