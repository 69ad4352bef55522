r"""The mean log-likelihood of a Student-t mixture as one function of its coefficients, to be differentiated twice.

With the features :math:`\phi` of the points (:mod:`patchflow.numerics.quadratic`) and
:math:`\delta_{nk} = \theta_k^\top \phi_n` the squared distances,

.. math:: F(\theta, a, \nu) = -\frac1N \sum_n \log \sum_k \exp j_{nk}, \qquad
          j_{nk} = a_k - \tfrac{\nu_k + d}{2} \log\bigl(1 + \tfrac{\delta_{nk}}{\nu_k}\bigr).

With the responsibilities :math:`r_{nk}`, and :math:`c_{nk} = -\partial j_{nk} / \partial \delta_{nk}`,
:math:`e_{nk} = \partial j_{nk} / \partial \nu_k`, the gradient is

.. math:: \nabla_{\theta_k} F = \frac1N \sum_n r_{nk} c_{nk} \phi_n, \quad
          \nabla_{a_k} F = -\frac1N \sum_n r_{nk}, \quad \nabla_{\nu_k} F = -\frac1N \sum_n r_{nk} e_{nk},

and the product of the Hessian with a direction is the derivative of these sums along it, in closed form. Gradient and
product each go once through the points, in pieces that stay in the cache: automatic differentiation would write
many arrays of the size of all points times all components.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Points of a piece: a row of responsibilities of 30 components in single precision is then about 240 kB.
_PIECE = 2048

Triple = tuple[Tensor, Tensor, Tensor]


def mean_energy(
    rows: Float[Tensor, "count features"],
    theta: Float[Tensor, "components features"],
    offsets: Float[Tensor, " components"],
    degrees: Float[Tensor, " components"],
    dim: int,
) -> Float[Tensor, ""]:
    r"""The function :math:`F` of the module, twice differentiable in the coefficients.

    Args:
        rows: The features of the points.
        theta: The coefficients :math:`\theta_k` of the squared distances.
        offsets: The numbers :math:`a_k`.
        degrees: The degrees of freedom :math:`\nu_k`.
        dim: The dimension of the points.
    """
    found = _Value.apply(theta, offsets, degrees, rows, dim, torch.is_grad_enabled())
    assert isinstance(found, Tensor)
    return found


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        theta: Tensor,
        offsets: Tensor,
        degrees: Tensor,
        rows: Tensor,
        dim: int,
        wanted: bool,
    ) -> Tensor:
        value, slopes = _gradient(rows, dim, theta, offsets, degrees, wanted)
        ctx.save_for_backward(theta, offsets, degrees, *slopes)
        ctx.rows, ctx.dim = rows, dim  # pyright: ignore
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        found = _Slope.apply(*ctx.saved_tensors, ctx.rows, ctx.dim)  # pyright: ignore
        return *(slopes[0] * f for f in found), None, None, None


class _Slope(torch.autograd.Function):
    """The gradient, which the value knows already; its derivative is the product with the Hessian."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        theta: Tensor,
        offsets: Tensor,
        degrees: Tensor,
        slope_theta: Tensor,
        slope_offsets: Tensor,
        slope_degrees: Tensor,
        rows: Tensor,
        dim: int,
    ) -> Triple:
        ctx.save_for_backward(theta, offsets, degrees)
        ctx.rows, ctx.dim = rows, dim  # pyright: ignore
        return slope_theta.clone(), slope_offsets.clone(), slope_degrees.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *direction: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        found = _product(ctx.rows, ctx.dim, *ctx.saved_tensors, direction)  # pyright: ignore
        return *found, None, None, None, None, None, None


class _Piece:
    """What value, gradient and product share: of each component and point of a piece."""

    def __init__(
        self, phi: Tensor, theta: Tensor, offsets: Tensor, nu: Tensor, tail: Tensor
    ) -> None:
        self.squared = (theta @ phi.mT).clamp_min_(0)
        self.inverse = (self.squared + nu).reciprocal_()
        self.logs = (self.squared / nu).log1p_()
        joint = (self.logs * -tail).add_(offsets)
        top = joint.amax(0)
        self.shares = joint.sub_(top).exp_()
        sums = self.shares.sum(0)
        self.log_likelihood = sums.log().add_(top)
        self.shares.div_(sums)
        self.pull = self.inverse * tail

    def push(self, nu: Tensor) -> Tensor:
        """The derivative of the joint log-densities in the degrees of freedom, exact for large ones too."""
        return (self.pull * self.squared).div_(nu).sub_(self.logs, alpha=0.5)


def _gradient(
    rows: Tensor,
    dim: int,
    theta: Tensor,
    offsets: Tensor,
    degrees: Tensor,
    wanted: bool,
) -> tuple[Tensor, Triple]:
    """The value, and the gradient where it is wanted; summed in double precision."""
    (coefficients, a, nu), sums, total = _columns(rows, theta, offsets, degrees)
    tail = 0.5 * (nu + dim)
    for phi in rows.split(_PIECE):
        piece = _Piece(phi, coefficients, a, nu, tail)
        total -= piece.log_likelihood.sum(dtype=torch.float64)
        if wanted:
            sums[2].sub_((piece.push(nu) * piece.shares).sum(1))
            sums[1].sub_(piece.shares.sum(1))
            sums[0].add_(piece.pull.mul_(piece.shares) @ phi)
    value = (total / len(rows)).to(theta.dtype)
    return value, _means(sums, len(rows), theta)


def _product(
    rows: Tensor,
    dim: int,
    theta: Tensor,
    offsets: Tensor,
    degrees: Tensor,
    direction: tuple[Tensor, ...],
) -> Triple:
    """The product of the Hessian with a direction."""
    (coefficients, a, nu), sums, _ = _columns(rows, theta, offsets, degrees)
    (theta_dot, a_dot, nu_dot), _, _ = _columns(rows, *direction)
    tail, moves = 0.5 * (nu + dim), bool(theta_dot.any())
    for phi in rows.split(_PIECE):
        piece = _Piece(phi, coefficients, a, nu, tail)
        squared_dot = theta_dot @ phi.mT if moves else torch.zeros_like(piece.squared)
        push = piece.push(nu)
        # j' = a' - c delta' + e nu', r' = r (j' - mean of j'), c' = u (nu' / 2 - c (nu' + delta')).
        joint_dot = (push * nu_dot).add_(a_dot).addcmul_(piece.pull, squared_dot, value=-1)
        mean = (piece.shares * joint_dot).sum(0)
        shares_dot = joint_dot.sub_(mean).mul_(piece.shares)
        # e' = (1/nu - u - tail (1/nu^2 - u^2)) nu' + u (c - 1/2) delta', with 1/nu - u = u delta / nu.
        gap = piece.squared.mul_(piece.inverse).div_(nu)
        push_dot = (piece.inverse + 1 / nu).mul_(-tail).add_(1).mul_(gap).mul_(nu_dot)
        push_dot.add_((piece.pull - 0.5).mul_(piece.inverse).mul_(squared_dot))
        pull_dot = squared_dot.add_(nu_dot).mul_(piece.pull).sub_(0.5 * nu_dot).neg_()
        pull_dot.mul_(piece.inverse)
        sums[1].sub_(shares_dot.sum(1))
        sums[2].sub_((push.mul_(shares_dot).addcmul_(piece.shares, push_dot)).sum(1))
        weights = pull_dot.mul_(piece.shares).addcmul_(piece.pull, shares_dot)
        sums[0].add_(weights @ phi)
    return _means(sums, len(rows), theta)


def _means(sums: Triple, count: int, like: Tensor) -> Triple:
    theta, offsets, degrees = ((s / count).to(like) for s in sums)
    return theta, offsets, degrees


def _columns(
    rows: Tensor, theta: Tensor, offsets: Tensor, degrees: Tensor
) -> tuple[Triple, Triple, Tensor]:
    """The coefficients, as columns and in the type of the points, and sums for each and for the value."""
    columns = (theta.to(rows), offsets.to(rows)[:, None], degrees.to(rows)[:, None])
    zeros = [torch.zeros_like(t, dtype=torch.float64) for t in (theta, offsets, degrees)]
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    return columns, (zeros[0], zeros[1], zeros[2]), total
