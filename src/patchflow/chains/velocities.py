r"""Velocity fields of continuous flows, with their divergence.

A :class:`Velocity` is a map :math:`v(t, x, y)`. Its divergence is exact, by autograd or in closed form, or estimated by
Hutchinson's :math:`\epsilon^\top \nabla v\, \epsilon` with random signs :math:`\epsilon`.

References:
    Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", 2018,
    https://arxiv.org/abs/1806.07366
    Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: free-form continuous dynamics for scalable reversible
    generative models", 2019, https://arxiv.org/abs/1810.01367
    Onken, Wu Fung, Li, Ruthotto, "OT-Flow: fast and accurate continuous normalizing flows via optimal transport", 2021,
    https://arxiv.org/abs/2006.00104
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchflow.errors import InputError


class Velocity(nn.Module, ABC):
    r"""A velocity field :math:`v(t, x, y)`.

    Args:
        dim: Dimension of the points.

    Raises:
        InputError: If the dimension is not positive.
    """

    # Whether the exact divergence costs no more than an estimate, in every dimension.
    closed_form = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"The dimension is {dim} but must be positive.")
        self.dim = dim

    @abstractmethod
    def forward(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> Float[Tensor, "batch dim"]:
        """The velocity.

        Args:
            time: The time, between 0 at the data and 1 at the latent law.
            x: Points.
            condition: The measurement y, (batch, condition_dim), or ``None``.
        """

    def with_divergence(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """The velocity and its exact divergence: by autograd, at the cost of one backward pass a coordinate."""
        unit = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return self._probed(time, x, condition, [row.expand_as(x) for row in unit])

    def with_estimate(
        self,
        time: Float[Tensor, ""],
        x: Float[Tensor, "batch dim"],
        condition: Tensor | None,
        noise: Float[Tensor, "batch dim"],
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        r"""The velocity and Hutchinson's estimate :math:`\epsilon^\top \nabla v\, \epsilon` of its divergence.

        Args:
            time: The time.
            x: Points.
            condition: The measurement.
            noise: The random signs :math:`\epsilon`, the same along a path.
        """
        return self._probed(time, x, condition, [noise])

    def _probed(
        self, time: Tensor, x: Tensor, condition: Tensor | None, probes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        r"""The velocity, and the sum of :math:`p^\top \nabla v\, p` over the probes."""
        # Of frozen parameters at constant points nothing is differentiable.
        inputs = (x, *([] if condition is None else [condition]), *self.parameters())
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        with torch.enable_grad():
            point = x if learning and x.requires_grad else x.detach().requires_grad_(True)
            v, total = self(time, point, condition), x.new_zeros(len(x))
            for probe in probes:
                (row,) = torch.autograd.grad(
                    v, point, probe, create_graph=learning, retain_graph=True
                )
                total = total + (row * probe).sum(1)
        return (v, total) if learning else (v.detach(), total.detach())


class VelocityNet(Velocity):
    r"""A fully connected network of point, time and condition, with tanh between its layers.

    Args:
        dim: Dimension of the points.
        condition_dim: Dimension of the condition; 0 for none.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers.

    Raises:
        InputError: If a size is not positive.
    """

    def __init__(
        self, dim: int, condition_dim: int = 0, *, hidden: int = 64, depth: int = 3
    ) -> None:
        super().__init__(dim)
        if min(hidden, depth) < 1:
            raise InputError(f"Got {depth} layers of width {hidden}; use at least 1.")
        sizes = [dim + 1 + condition_dim, *[hidden] * depth]
        self.first = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.last = nn.Linear(hidden, dim)
        with torch.no_grad():  # start near the identity
            self.last.weight.mul_(0.1)
            self.last.bias.zero_()

    def forward(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> Float[Tensor, "batch dim"]:
        """The velocity; see :meth:`Velocity.forward`."""
        h = _stacked(time, x, condition)
        for linear in self.first:
            h = linear(h).tanh()
        return self.last(h)

    def with_divergence(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """The velocity and its exact divergence, by tangents that walk through the layers beside the values."""
        h, tangents = _stacked(time, x, condition), None
        for linear in self.first:
            assert isinstance(linear, nn.Linear)
            h = linear(h).tanh()
            slope = (1 - h.square())[:, None, :]
            # One row per coordinate of x.
            pushed = linear.weight.T[: self.dim] if tangents is None else tangents @ linear.weight.T
            tangents = slope * pushed
        assert tangents is not None
        return self.last(h), torch.einsum("bih,ih->b", tangents, self.last.weight)


class Slopes(NamedTuple):
    """Derivatives of a potential.

    Attributes:
        point: The gradient in x, (batch, dim).
        time: The derivative in t, (batch,).
        laplacian: The sum of the second derivatives in x, (batch,).
    """

    point: Tensor
    time: Tensor
    laplacian: Tensor


class Potential(Velocity):
    r"""OT-Flow's velocity :math:`v = -\nabla_x \Phi` of a potential, with all derivatives in closed form.

    With :math:`s = (x, t, y)`, :math:`\sigma(a) = \log(2 \cosh a)` and a residual network of two layers,

    .. math:: \Phi(s) = w^\top \big(u + \sigma(K_1 u + b_1)\big) + \tfrac12 \|A s\|^2 + b^\top s, \qquad
        u = \sigma(K_0 s + b_0).

    The paths of optimal transport are straight and their velocity is the gradient of a potential, which solves the
    Hamilton-Jacobi-Bellman equation :math:`\partial_t \Phi = \tfrac12 \|\nabla \Phi\|^2`; see
    :class:`~patchflow.chains.continuous.TransportKL`.

    Args:
        dim: Dimension of the points.
        condition_dim: Dimension of the condition; 0 for none.
        hidden: Width of the network.
        rank: Rows of the matrix A, at most ``dim + 1 + condition_dim``.

    Raises:
        InputError: If a size is not positive.

    References:
        Onken, Wu Fung, Li, Ruthotto, "OT-Flow: fast and accurate continuous normalizing flows via optimal transport",
        2021, https://arxiv.org/abs/2006.00104
    """

    closed_form = True

    def __init__(
        self, dim: int, condition_dim: int = 0, *, hidden: int = 32, rank: int = 10
    ) -> None:
        super().__init__(dim)
        if min(hidden, rank) < 1:
            raise InputError(f"Got the width {hidden} and the rank {rank}; use at least 1.")
        size = dim + 1 + condition_dim
        self.opening, self.middle = nn.Linear(size, hidden), nn.Linear(hidden, hidden)
        self.weight = nn.Parameter(0.1 * torch.randn(hidden) / math.sqrt(hidden))
        self.quadratic = nn.Parameter(0.1 * torch.randn(min(rank, size), size))
        self.linear = nn.Parameter(torch.zeros(size))

    def value(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> Float[Tensor, " batch"]:
        r"""The potential :math:`\Phi`."""
        s = _stacked(time, x, condition)
        u = _log_cosh(self.opening(s))
        rest = 0.5 * (s @ self.quadratic.T).square().sum(1) + s @ self.linear
        return (u + _log_cosh(self.middle(u))) @ self.weight + rest

    def slopes(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> Slopes:
        """The derivatives of the potential."""
        s = _stacked(time, x, condition)
        a = self.opening(s)
        # tanh is the derivative of log cosh, 1 - tanh^2 the second one.
        first = a.tanh()
        second = self.middle(_log_cosh(a)).tanh()
        through = self.weight + (second * self.weight) @ self.middle.weight
        gradient = (first * through) @ self.opening.weight
        gradient = gradient + s @ self.quadratic.T @ self.quadratic + self.linear
        inwards = self.opening.weight[:, : self.dim]
        bends = (1 - first.square()) * through
        outer = (bends * inwards.square().sum(1)).sum(1)
        onwards = (first[:, None, :] * inwards.T) @ self.middle.weight.T
        inner = (onwards.square().sum(1) * (1 - second.square())) @ self.weight
        laplacian = outer + inner + self.quadratic[:, : self.dim].square().sum()
        return Slopes(gradient[:, : self.dim], gradient[:, self.dim], laplacian)

    def forward(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> Float[Tensor, "batch dim"]:
        """The velocity; see :meth:`Velocity.forward`."""
        return -self.slopes(time, x, condition).point

    def with_divergence(
        self, time: Float[Tensor, ""], x: Float[Tensor, "batch dim"], condition: Tensor | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """The velocity and minus the Laplacian of the potential."""
        slopes = self.slopes(time, x, condition)
        return -slopes.point, -slopes.laplacian


def _stacked(time: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
    parts = [x, time.to(x.dtype).expand(len(x), 1)]
    return torch.cat(parts if condition is None else [*parts, condition], 1)


def _log_cosh(a: Tensor) -> Tensor:
    return a.abs() + F.softplus(-2 * a.abs())
