"""Matrices whose spectral norm is known: bounded from above, or orthonormal by construction."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# With 2^10 power steps the bound exceeds the norm of a matrix of width 128 by at most 0.24 %.
_SQUARINGS = 10


def spectral_bound(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    r"""An upper bound of the largest singular value, by power iteration that squares its matrix.

    With :math:`G = W^\top W` (or :math:`W W^\top`, whichever is smaller, of size n) and :math:`p = 2^{10}`,

    .. math:: \|W\|_2 \le \big(\operatorname{tr} G^p\big)^{1/2p} \le n^{1/2p}\, \|W\|_2 .

    Ten squarings are :math:`p` steps of the power iteration from every start at once. A power iteration from one start
    converges from below, so a network that is divided by its result may miss its constant; it also has a state, on
    which values depend. This bound is a function of the matrix alone.

    Args:
        weight: The matrix W.

    Returns:
        The bound, differentiable once.

    References:
        Delattre, Barthelemy, Araujo, Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by Gram
        iteration", 2023, https://arxiv.org/abs/2305.16173
    """
    bound = _SpectralBound.apply(weight)
    assert isinstance(bound, Tensor)
    return bound


class _SpectralBound(torch.autograd.Function):
    """The Schatten norm of order 2p, with its gradient W G^(p-1) ||W|| / tr(G^p)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
        tiny = torch.finfo(weight.dtype).tiny
        power = tall.T @ tall
        below = torch.eye(len(power), dtype=weight.dtype, device=weight.device)
        # Matrices are kept at norm one, their logarithmic factors apart; `below` becomes G^(p-1).
        factor = power.norm().clamp_min(tiny).log()
        power, factor_below = power / power.norm().clamp_min(tiny), torch.zeros_like(factor)
        for _ in range(_SQUARINGS):
            below, factor_below = below @ power, factor_below + factor
            norm = below.norm().clamp_min(tiny)
            below, factor_below = below / norm, factor_below + norm.log()
            power = power @ power
            norm = power.norm().clamp_min(tiny)
            power, factor = power / norm, 2 * factor + norm.log()
        trace = power.trace().clamp_min(tiny)
        value = ((factor + trace.log()) / 2 ** (_SQUARINGS + 1)).exp()
        slope = tall @ below * (value * (factor_below - factor).exp() / trace)
        ctx.save_for_backward(slope if tall is weight else slope.T)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope


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
