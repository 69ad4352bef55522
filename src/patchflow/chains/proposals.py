"""Proposals of Metropolis kernels: random walks, Langevin steps, independent draws; and their step sizes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchflow.chains.nets import MLP
from patchflow.energy import Density, Energy
from patchflow.errors import InputError


class Place(NamedTuple):
    """A point with what is known there: its energy, and what else the proposal needs (a gradient, its own energy)."""

    x: Tensor
    energy: Tensor
    extra: Tensor | None = None


class StepSize(nn.Module):
    r"""A positive step size, the same everywhere or a function :math:`\tau(y)` of the condition.

    It is not trained with the loss but adapted to an acceptance rate, see :func:`patchflow.chains.adaptation.adapt`.

    Args:
        value: Its value before adaptation.
        condition_dim: Dimension of the condition that it depends on; 0 for a constant.
        hidden: Width of the network of a step size that depends on the condition.

    Raises:
        InputError: If ``value`` is not positive.
    """

    def __init__(self, value: float | int, condition_dim: int = 0, *, hidden: int = 32) -> None:
        super().__init__()
        if not 0 < value < math.inf:
            raise InputError(f"The step size is {value} but must be positive and finite.")
        self.log_value = nn.Parameter(torch.tensor(math.log(value)), requires_grad=False)
        self.net = MLP(condition_dim, 1, hidden=hidden) if condition_dim else None
        if self.net is not None:
            last = self.net.linears[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.net.requires_grad_(False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The step size of each row, broadcastable to ``x``."""
        log_step = self.log_value
        if self.net is not None and condition is not None:
            log_step = log_step + self.net(condition)[:, 0]
        return log_step.exp().view(-1, *[1] * (x.ndim - 1))


class Proposal(nn.Module, ABC):
    """Where a Metropolis step may go."""

    @abstractmethod
    def locate(self, energy: Energy, x: Tensor, condition: Tensor | None) -> Place:
        """Evaluate at ``x`` what the proposal needs."""

    @abstractmethod
    def propose(
        self, energy: Energy, place: Place, condition: Tensor | None
    ) -> tuple[Place, Tensor]:
        r"""Draw :math:`x' \sim q(\cdot \mid x)`; return its place and :math:`\log q(x \mid x') - \log q(x' \mid x)`."""


class RandomWalk(Proposal):
    r"""Steps :math:`x' = x + \tau(y)\, \xi` with :math:`\xi \sim N(0, I)`: the proposal of Metropolis-Hastings.

    Args:
        step: The standard deviation :math:`\tau`: a number, or a :class:`StepSize` that may depend on the condition.
    """

    def __init__(self, step: float | int | StepSize) -> None:
        super().__init__()
        self.step = step if isinstance(step, StepSize) else StepSize(step)

    def locate(self, energy: Energy, x: Tensor, condition: Tensor | None) -> Place:
        """Evaluate the energy."""
        return Place(x, energy(x, condition))

    def propose(
        self, energy: Energy, place: Place, condition: Tensor | None
    ) -> tuple[Place, Tensor]:
        """Take a normal step; it is as likely as its reverse."""
        x = place.x + self.step(place.x, condition) * torch.randn_like(place.x)
        return self.locate(energy, x, condition), place.x.new_zeros(len(x))


class LangevinProposal(Proposal):
    r"""Steps :math:`x' = x - \tau \nabla E(x) + \sqrt{2\tau}\, \xi`, with :math:`\tau = \tau(y)`.

    With the drawn noise :math:`\xi` and the noise :math:`\tilde\xi` that would step back,
    :math:`\log q(x \mid x') - \log q(x' \mid x) = \tfrac12 (\|\xi\|^2 - \|\tilde\xi\|^2)`.

    Args:
        step: The time step :math:`\tau`: a number, or a :class:`StepSize` that may depend on the condition.
    """

    def __init__(self, step: float | int | StepSize) -> None:
        super().__init__()
        self.step = step if isinstance(step, StepSize) else StepSize(step)

    def locate(self, energy: Energy, x: Tensor, condition: Tensor | None) -> Place:
        """Evaluate the energy and its gradient, as a graph only where somebody differentiates them."""
        learned = x.requires_grad or any(p.requires_grad for p in energy.parameters())
        if torch.is_grad_enabled() and learned:
            point = x if x.requires_grad else x.detach().requires_grad_(True)
            value = energy(point, condition)
            (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        else:
            value, gradient = energy.value_and_grad(x, condition)
        # Where the energy is infinite its gradient means nothing, and may be nan.
        return Place(x, value, torch.where(by_row(value.isfinite(), x), gradient, 0.0))

    def propose(
        self, energy: Energy, place: Place, condition: Tensor | None
    ) -> tuple[Place, Tensor]:
        """Take a step of the discretised Langevin equation."""
        assert place.extra is not None
        step, noise = self.step(place.x, condition), torch.randn_like(place.x)
        x = place.x - step * place.extra + (2 * step).sqrt() * noise
        new = self.locate(energy, x, condition)
        assert new.extra is not None
        back = (place.x - x + step * new.extra) / (2 * step).sqrt()
        return new, 0.5 * (noise.flatten(1).square().sum(1) - back.flatten(1).square().sum(1))


class DifferenceWalk(Proposal):
    r"""Steps :math:`x' = x + \gamma (a - b) + \epsilon \xi` along differences of points drawn from a fixed population.

    The population knows scales, correlations and modes, so the steps need no tuning to them: with probability 0.1
    :math:`\gamma = 1`, which jumps between modes, otherwise :math:`\gamma = s\, 2.38 / \sqrt{2d}`. The law of the
    step is symmetric because the population does not move with the chain.

    Args:
        population: Points of each group of rows, (groups, size, dim); row k belongs to group k // (rows / groups).
        scale: The factor :math:`s`.

    References:
        ter Braak, Vrugt, "Differential evolution Markov chain with snooker updater and fewer chains", 2008,
        https://doi.org/10.1007/s11222-008-9104-9
    """

    population: Tensor
    jitter: Tensor

    def __init__(self, population: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("population", population)
        self.register_buffer("jitter", 1e-3 * population.std(1, keepdim=True))
        self.step = scale * 2.38 / math.sqrt(2 * population.shape[2])

    def locate(self, energy: Energy, x: Tensor, condition: Tensor | None) -> Place:
        """Evaluate the energy."""
        return Place(x, energy(x, condition))

    def propose(
        self, energy: Energy, place: Place, condition: Tensor | None
    ) -> tuple[Place, Tensor]:
        """Step along a difference; it is as likely as its reverse."""
        groups, points, dim = self.population.shape
        x = place.x.view(groups, -1, dim)
        shape = (2, groups, x.shape[1], 1)
        picks = torch.randint(points, shape, device=x.device).expand(-1, -1, -1, dim)
        first, second = (self.population.gather(1, pick) for pick in picks)
        jump, size = torch.rand(2, groups, x.shape[1], 1, device=x.device).to(x)
        length = torch.where(jump < 0.2, 1.0, self.step * 10 ** (-1.5 * size))
        moved = x + length * (first - second) + self.jitter * torch.randn_like(x)
        moved = moved.view(-1, dim)
        return self.locate(energy, moved, condition), moved.new_zeros(len(moved))


class Independent(Proposal):
    r"""Proposals from a density, wherever the chain is: independence Metropolis, with a flow as the density.

    Args:
        density: The density :math:`q(\cdot \mid y)`; a flow must be bijective, since its exact density is needed.

    Raises:
        InputError: If a flow's density is not exact.
    """

    def __init__(self, density: Density) -> None:
        super().__init__()
        if not density.exact:
            raise InputError(
                "Independence Metropolis needs the exact density of its proposal, but this flow has stochastic layers; "
                "give its bijective part."
            )
        self.density = density

    def locate(self, energy: Energy, x: Tensor, condition: Tensor | None) -> Place:
        """Evaluate the energy and that of the proposal."""
        return Place(x, energy(x, condition), self.density(x, condition))

    def propose(
        self, energy: Energy, place: Place, condition: Tensor | None
    ) -> tuple[Place, Tensor]:
        """Draw afresh."""
        assert place.extra is not None
        x, own = self.density.draw(len(place.x), condition)
        return Place(x, energy(x, condition), own), own - place.extra


def by_row(flags: Tensor, x: Tensor) -> Tensor:
    """Flags of the rows, broadcastable to ``x``."""
    return flags.view(-1, *[1] * (x.ndim - 1))
