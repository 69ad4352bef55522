r"""Residual equations :math:`x + g(x) = z` with a contraction :math:`g`: solutions, derivatives, log-determinants.

By Banach's theorem there is one solution; if :math:`\|z - x - g(x)\| \le r` then :math:`x` is within
:math:`r / (1 - c)` of it, where :math:`c` is the Lipschitz constant of :math:`g`.

References:
    Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019,
    https://arxiv.org/abs/1811.00995
    Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019,
    https://arxiv.org/abs/1906.02735
    Bai, Kolter, Koltun, "Deep equilibrium models", 2019, https://arxiv.org/abs/1909.01377 (implicit derivatives)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchflow.errors import NumericalError

Map = Callable[[Tensor], Tensor]
# Returns the value (batch, dim) and the Jacobian (batch, dim, dim).
MapWithJacobian = Callable[[Tensor], tuple[Tensor, Tensor]]

# Rounding errors of a residual, in units of the largest number in it.
_ROUNDING = 16
# Terms of the series of a log-determinant that are always there.
_SURE = 2


@torch.no_grad()
def fixed_point(
    function: Map,
    target: Float[Tensor, "batch dim"],
    *,
    lipschitz: float,
    tolerance: float,
) -> Float[Tensor, "batch dim"]:
    r"""Solve :math:`x + g(x) = z` by :math:`x \leftarrow z - g(x)`, whose error falls by :math:`c` a step.

    Args:
        function: The contraction g, row by row.
        target: Right-hand sides z.
        lipschitz: Its constant c, in the Euclidean norm.
        tolerance: Largest error of a solution, relative to one plus its largest coordinate; not below rounding.

    Raises:
        NumericalError: If the tolerance is not reached in as many steps as the constant promises.
    """
    x, residual = target, -function(target)
    steps = _enough(residual, target, lipschitz, tolerance)
    for _ in range(steps):
        if _small(residual, x, target, lipschitz, tolerance):
            return x
        x = x + residual
        residual = target - x - function(x)
    raise _missed(residual, lipschitz, tolerance, steps)


@torch.no_grad()
def newton(
    function: MapWithJacobian,
    target: Float[Tensor, "batch dim"],
    *,
    lipschitz: float,
    tolerance: float,
) -> Float[Tensor, "batch dim"]:
    r"""Solve :math:`x + g(x) = z` by Newton's method, with the fixed-point step as a safeguard.

    A row takes Newton's step if that lowers its residual by at least the factor :math:`c` that the fixed-point step
    guarantees, and the fixed-point step otherwise: so it is never slower than that, and usually needs some five steps.
    Arguments and errors as in :func:`fixed_point`; ``function`` also returns the Jacobians.
    """
    x = target
    value, jacobian = function(x)
    residual = -value
    unit = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
    steps = _enough(residual, target, lipschitz, tolerance)
    for _ in range(steps):
        if _small(residual, x, target, lipschitz, tolerance):
            return x
        bold = x + torch.linalg.solve(unit + jacobian, residual[:, :, None])[:, :, 0]
        value, jacobian = function(bold)
        after = target - bold - value
        fine = after.norm(dim=1) <= lipschitz * residual.norm(dim=1)
        if fine.all():
            x, residual = bold, after
            continue
        x = torch.where(fine[:, None], bold, x + residual)
        value, jacobian = function(x)
        residual = target - x - value
    raise _missed(residual, lipschitz, tolerance, steps)


def _wanted(x: Tensor, lipschitz: float, tolerance: float) -> float:
    """The residual, relative to the numbers in it, that proves the tolerance, or that is mere rounding."""
    rounding = _ROUNDING * math.sqrt(x.shape[1]) * torch.finfo(x.dtype).eps
    return max((1 - lipschitz) * tolerance, rounding)


def _small(residual: Tensor, x: Tensor, target: Tensor, lipschitz: float, tolerance: float) -> bool:
    size = 1 + torch.maximum(x.abs().amax(1), target.abs().amax(1))
    return bool((residual.norm(dim=1) <= _wanted(x, lipschitz, tolerance) * size).all())


def _enough(residual: Tensor, target: Tensor, lipschitz: float, tolerance: float) -> int:
    """How often to look at residuals that start here and fall by the constant a step, until they are small."""
    ratios = residual.norm(dim=1) / (1 + target.abs().amax(1))
    first, last = max(ratios.tolist(), default=0.0), _wanted(target, lipschitz, tolerance)
    if not last < first < math.inf:
        return 1
    return 2 + math.ceil(math.log(last / first) / math.log(lipschitz))


def _missed(residual: Tensor, lipschitz: float, tolerance: float, steps: int) -> NumericalError:
    error = float(residual.norm(dim=1).max()) / (1 - lipschitz)
    return NumericalError(
        f"The inverse of a residual block is known to {error:.1e} but should be to {tolerance:.1e} after {steps} "
        f"steps, which a Lipschitz constant of {lipschitz:g} promises; give finite points, and a map that has it."
    )


def differentiable(
    point: Float[Tensor, "batch dim"],
    residual: Float[Tensor, "batch dim"],
    function: Map,
    *,
    lipschitz: float,
    tolerance: float,
) -> Float[Tensor, "batch dim"]:
    r"""A solution of :math:`x + g(x) = z` with its derivatives, by the implicit function theorem.

    :math:`dx = (I + J)^{-1}\, d(z - x - g(x))`, so a gradient :math:`v` in :math:`x` becomes the solution of
    :math:`u + J^\top u = v` in the residual, found by the fixed point of products with :math:`J^\top`.

    Args:
        point: The solution x, detached.
        residual: :math:`z - x - g(x)` at the detached point, as a graph of z and of the parameters of g.
        function: The contraction g.
        lipschitz: Its constant c.
        tolerance: Accuracy of the gradient, relative to its largest entry.
    """
    with torch.enable_grad():
        leaf = point.detach().requires_grad_(True)
        value = function(leaf)

    def pull(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(value, leaf, u, retain_graph=True)
        return product

    def solve(g: Tensor) -> Tensor:
        # The tolerance is relative to numbers of size one, and the gradient of a mean is small.
        scale = g.abs().max().clamp_min(torch.finfo(g.dtype).tiny)
        return scale * fixed_point(pull, g / scale, lipschitz=lipschitz, tolerance=tolerance)

    found = _Implicit.apply(point, residual, solve)
    assert isinstance(found, Tensor)
    return found


class _Implicit(torch.autograd.Function):
    """The identity in the point; a gradient goes to the residual, through the transposed linear equation."""

    @staticmethod
    def forward(ctx: Any, point: Tensor, residual: Tensor, solve: Map) -> Tensor:
        ctx.solve = solve
        return point + residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.solve(grad_outputs[0]), None


def log_det_estimate(
    function: Map,
    x: Float[Tensor, "batch dim"],
    *,
    lipschitz: float,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
    r"""An unbiased estimate of :math:`\log\det(I + J)` with an unbiased gradient, for one product with J a term.

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k
        = \mathbb{E} \sum_{k=1}^{N} \frac{(-1)^{k+1}}{k} \frac{v^\top J^k v}{P(N \ge k)},

    with random signs :math:`v` (Hutchinson) and a random last term (Russian roulette): the first two always, each
    later one with probability :math:`c`, given the one before. Then the variance is finite for every contraction; a
    smaller probability is cheaper and may have none. The gradient is that of :math:`u^\top J v` with the fixed
    :math:`u = \sum_k (-1)^{k+1} (J^\top)^{k-1} v / P(N \ge k)`, a Neumann series for :math:`(I + J)^{-\top} v`, so its
    memory does not grow with the terms. All rows share :math:`N`; each has its own :math:`v`.

    Args:
        function: The contraction g, row by row.
        x: Where J is the Jacobian of g.
        lipschitz: The constant c of g.

    Returns:
        The values g(x), and the estimates.
    """
    # Of frozen parameters at constant points nothing is differentiable.
    learning = torch.is_grad_enabled() and (x.requires_grad or function(x).requires_grad)
    extra = math.floor(math.log(1 - float(torch.rand(()))) / math.log(lipschitz))
    v = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
    with torch.enable_grad():
        point = x if x.requires_grad and learning else x.detach().requires_grad_(True)
        value = function(point)
    estimate, neumann, product = x.new_zeros(len(x)), torch.zeros_like(x), v
    for k in range(1, _SURE + extra + 1):
        weight = (-1) ** (k + 1) / lipschitz ** max(0, k - _SURE)
        neumann = neumann + weight * product
        (product,) = torch.autograd.grad(value, point, product, retain_graph=True)
        estimate = estimate + weight / k * (product * v).sum(1)
    if not learning:
        return value.detach(), estimate
    (row,) = torch.autograd.grad(value, point, neumann, create_graph=True)
    slope = (row * v).sum(1)
    return value, estimate + slope - slope.detach()
