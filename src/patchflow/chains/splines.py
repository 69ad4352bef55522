r"""Rational-quadratic spline couplings.

References:
    Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019, https://arxiv.org/abs/1906.04032
    Gregory, Delbourgo, "Piecewise rational quadratic interpolation to monotonic data", 1982,
    https://doi.org/10.1093/imanum/2.2.123
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from patchflow.chains.kernel import Kernel, Step
from patchflow.chains.nets import MLP, joined
from patchflow.errors import InputError

# Smallest width, height and slope of a bin, in units of the mean ones: what keeps the inverse stable.
_SMALLEST = 1e-3


def rational_quadratic(
    x: Float[Tensor, "batch dim"],
    shape: Float[Tensor, "batch dim parameters"],
    *,
    bound: float | int,
    inverse: bool,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    r"""An increasing map of the line: a rational-quadratic spline on :math:`[-B, B]`, the identity outside.

    Args:
        x: Points.
        shape: Unconstrained parameters, :math:`3K - 1` per coordinate: widths, heights, inner slopes of K bins.
        bound: The half-width :math:`B`.
        inverse: Evaluate the inverse map.

    Returns:
        The values, and the logarithms of the derivatives.
    """
    bins = (shape.shape[-1] + 1) // 3
    # All gathers and formulas run on the flattened coordinates that lie inside.
    inside = x.abs() < bound
    y, log_slope = x.clone(), torch.zeros_like(x)
    x, shape = x[inside], shape[inside]
    left, width = _bins(shape[:, :bins], bound)
    low, height = _bins(shape[:, bins : 2 * bins], bound)
    # With raw parameters zero all slopes are one, and the spline is the identity.
    offset = math.log(math.expm1(1 - _SMALLEST))
    slopes = _SMALLEST + F.softplus(F.pad(shape[:, 2 * bins :] + offset, (1, 1), value=offset))
    edges = low if inverse else left
    k = (torch.searchsorted(edges.contiguous(), x[:, None], right=True) - 1).clamp(0, bins - 1)
    left, width, low, height = (values.gather(1, k)[:, 0] for values in (left, width, low, height))
    before, after = slopes.gather(1, k)[:, 0], slopes.gather(1, k + 1)[:, 0]
    mean = height / width
    bend = before + after - 2 * mean
    if inverse:
        rise = x - low
        a = height * (mean - before) + rise * bend
        b = height * before - rise * bend
        c = -mean * rise
        # The root that stays finite when a vanishes.
        t = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
        value = left + t * width
    else:
        t = (x - left) / width
        value = low + height * (mean * t.square() + before * t * (1 - t)) / (
            mean + bend * t * (1 - t)
        )
    slope = mean.square() * (
        after * t.square() + 2 * mean * t * (1 - t) + before * (1 - t).square()
    )
    log_derivative = slope.log() - 2 * (mean + bend * t * (1 - t)).log()
    y = y.masked_scatter(inside, value)
    log_slope = log_slope.masked_scatter(inside, -log_derivative if inverse else log_derivative)
    return y, log_slope


def _bins(raw: Tensor, bound: float | int) -> tuple[Tensor, Tensor]:
    """Left edges and sizes of bins that fill [-bound, bound]."""
    bins = raw.shape[-1]
    sizes = 2 * bound * (_SMALLEST / bins + (1 - _SMALLEST) * raw.softmax(-1))
    return sizes.cumsum(-1) - sizes - bound, sizes


class SplineCoupling(Kernel):
    r"""A coupling of both halves by rational-quadratic splines: bends where an affine coupling only stretches.

    Forward, with :math:`z = (z_1, z_2)`: :math:`x_1 = S_{\theta_2(z_2, y)}(z_1)`,
    :math:`x_2 = S_{\theta_1(x_1, y)}(z_2)`,
    coordinate by coordinate; :math:`\log|\det|` is the sum of the logarithms of the slopes. In dimension one the spline
    depends on the condition only.

    Args:
        dim: Dimension of the points.
        condition_dim: Dimension of the condition that the networks see; 0 for none.
        bins: Bins of the splines.
        bound: The splines act on :math:`[-B, B]`; outside they are the identity.
        hidden: Width of the networks.
        depth: Their hidden layers.

    Raises:
        InputError: If there are fewer than 2 bins, or the bound is not positive.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int = 0,
        *,
        bins: int = 8,
        bound: float | int = 5.0,
        hidden: int = 64,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if bins < 2 or not bound > 0:
            raise InputError(
                f"Got {bins} bins on [-{bound}, {bound}]; use at least 2, and a positive bound."
            )
        self.dim, self.bound, self.split = dim, bound, dim // 2
        rest, count = dim - self.split, 3 * bins - 1
        if self.split + condition_dim == 0:
            raise InputError(
                "A spline in dimension 1 needs a condition to depend on; use dim >= 2."
            )
        self.net1 = MLP(self.split + condition_dim, rest * count, hidden=hidden, depth=depth)
        self.net2 = (
            MLP(rest + condition_dim, self.split * count, hidden=hidden, depth=depth)
            if self.split
            else None
        )
        for net in (self.net1, self.net2):
            if net is not None:  # start near the identity
                with torch.no_grad():
                    net.linears[-1].weight.mul_(0.1)
                    net.linears[-1].bias.zero_()

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map latent to data; see :meth:`Kernel.forward`."""
        z1, z2 = x[:, : self.split], x[:, self.split :]
        x1, log2 = self._bend(self.net2, z1, z2, condition, inverse=False)
        x2, log1 = self._bend(self.net1, z2, x1, condition, inverse=False)
        return Step(torch.cat((x1, x2), 1), log1 + log2)

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map data to latent; see :meth:`Kernel.reverse`."""
        x1, x2 = x[:, : self.split], x[:, self.split :]
        z2, log1 = self._bend(self.net1, x2, x1, condition, inverse=True)
        z1, log2 = self._bend(self.net2, x1, z2, condition, inverse=True)
        return Step(torch.cat((z1, z2), 1), log1 + log2)

    def _bend(
        self, net: MLP | None, x: Tensor, other: Tensor, condition: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        if net is None:
            return x, x.new_zeros(len(x))
        shape = net(joined(other, condition)).unflatten(1, (x.shape[1], -1))
        y, log_slope = rational_quadratic(x, shape, bound=self.bound, inverse=inverse)
        return y, log_slope.sum(1)
