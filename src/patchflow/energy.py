r"""Energies: the one noun of the library.

An inverse problem is an energy :math:`E(x \mid y) = -\log p(x \mid y) + \mathrm{const}`. Priors, likelihoods,
posteriors and the training losses of flows are all energies, so one algebra composes them: sums of energies
are products of densities, multiples are powers.

>>> import torch
>>> class Quadratic(Energy):
...     def forward(self, x, condition=None):
...         return 0.5 * x.flatten(1).square().sum(1)
>>> posterior = Quadratic() + 3 * Quadratic()
>>> float(posterior(torch.ones(1, 2)))
4.0
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError


class Energy(nn.Module, ABC):
    r"""An energy :math:`E(x \mid y) = -\log p(x \mid y) + \mathrm{const}`, one value per batch entry.

    Subclasses implement :meth:`forward` and nothing else. Faster gradients live behind ``forward`` as autograd
    functions, so that solvers, samplers and users never choose between two paths.
    """

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        r"""Evaluate :math:`E(x \mid y)`.

        Args:
            x: Points, with a leading batch axis.
            condition: The measurement :math:`y`, with the same batch axis (or of batch size one), or ``None``.

        Returns:
            One energy per batch entry, in nats.
        """

    def value_and_grad(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch *event"]]:
        r"""Evaluate :math:`E(x \mid y)` and :math:`\nabla_x E(x \mid y)`, also under ``torch.no_grad()``.

        Args:
            x: Points, with a leading batch axis; not modified.
            condition: The measurement, as in :meth:`forward`.

        Returns:
            The detached energies and their gradients with respect to ``x``.
        """
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            value = self(point, condition)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    def __add__(self, other: Energy) -> Energy:
        """The sum of two energies: the product of their densities."""
        if not isinstance(other, Energy):
            return NotImplemented
        return Sum(*_terms(self), *_terms(other))

    def __rmul__(self, weight: float | int) -> Energy:
        """A multiple of an energy: a power of its density."""
        if not isinstance(weight, int | float):
            return NotImplemented
        return Scaled(self, weight)


class Sum(Energy):
    r"""The sum :math:`\sum_i E_i(x \mid y)` of energies; built by ``+``."""

    def __init__(self, *terms: Energy) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Add the terms' energies; see :meth:`Energy.forward`."""
        first, *others = (term(x, condition) for term in self.terms)
        for value in others:
            first = first + value
        return first


class Scaled(Energy):
    r"""The multiple :math:`w \, E(x \mid y)` of an energy; built by ``*``."""

    def __init__(self, energy: Energy, weight: float | int) -> None:
        super().__init__()
        self.energy, self.weight = energy, float(weight)

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Scale the energy; see :meth:`Energy.forward`. With the weight 0 the energy is not evaluated."""
        # 0 * inf is nan, but the zeroth power of a density is one even where the density vanishes.
        if self.weight == 0:
            return x.new_zeros(len(x))
        return self.weight * self.energy(x, condition)


class Interpolation(Energy):
    r"""The geometric path :math:`(1 - \lambda) E_0 + \lambda E_1` between two energies.

    Args:
        start: The energy :math:`E_0`, usually the latent law.
        end: The energy :math:`E_1`, usually the posterior.
        weight: The weight :math:`\lambda \in [0, 1]`; strictly inside if it is learned.
        learned: Whether :math:`\lambda`, as a logistic function of a parameter, is trained.

    Raises:
        InputError: If the weight is outside its range.
    """

    def __init__(
        self, start: Energy, end: Energy, weight: float | int, *, learned: bool = False
    ) -> None:
        super().__init__()
        if not (0 < weight < 1 if learned else 0 <= weight <= 1):
            raise InputError(
                f"The interpolation weight is {weight} but must lie in [0, 1]; a learned one strictly inside."
            )
        self.start, self.end, self.fixed = start, end, float(weight)
        self.logit = (
            nn.Parameter(torch.tensor(math.log(weight / (1 - weight)))) if learned else None
        )

    @property
    def weight(self) -> Tensor | float:
        r"""The weight :math:`\lambda`."""
        return self.fixed if self.logit is None else self.logit.sigmoid()

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Interpolate; see :meth:`Energy.forward`. At a fixed end only that energy is evaluated."""
        if self.logit is None and self.fixed in (0.0, 1.0):
            return (self.end if self.fixed else self.start)(x, condition)
        return torch.lerp(self.start(x, condition), self.end(x, condition), self.weight)


class Density(Energy):
    r"""A normalised energy, :math:`\int e^{-E(x \mid y)} dx = 1`, that can be sampled."""

    @property
    def exact(self) -> bool:
        """Whether the energy is the density's own value; that of a stochastic flow is one path's bound."""
        return True

    @abstractmethod
    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count *event"]:
        r"""Draw ``count`` independent samples of :math:`p(x \mid y)`.

        Args:
            count: The number of samples.
            condition: The measurement, of batch size one or ``count``, or ``None``.
        """

    def draw(
        self, count: int, condition: Tensor | None = None
    ) -> tuple[Float[Tensor, "count *event"], Float[Tensor, " count"]]:
        """Draw samples together with their energies; see :meth:`sample`."""
        x = self.sample(count, condition)
        return x, self(x, condition)


class Transported(Density):
    r"""A density that is the image of :math:`N(0, I)` under a known bijection :math:`x = S(u)`.

    Most priors of physical parameters are: boxes, normal and log-normal laws, products of one-dimensional laws. In the
    coordinates :math:`u` the prior is standard normal, which is where flows and samplers work best.

    Args:
        dim: Dimension of a sample.
    """

    # A tensor, so that samples follow the module's device and type.
    reference: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("reference", torch.zeros(()), persistent=False)

    @abstractmethod
    def from_normal(self, u: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        r"""The bijection :math:`x = S(u)`."""

    @abstractmethod
    def to_normal(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        r"""The inverse :math:`u = S^{-1}(x)`; finite also at the boundary of the support."""

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples; see :meth:`Density.sample`. The condition is not used."""
        return self.from_normal(torch.randn(count, self.dim).to(self.reference))


class Proximable(Energy):
    r"""An energy with a closed proximal map, for splitting methods."""

    @abstractmethod
    def prox(
        self, v: Float[Tensor, "batch *event"], step: float | int, condition: Tensor | None = None
    ) -> Float[Tensor, "batch *event"]:
        r"""The proximal map :math:`\arg\min_x \tfrac{1}{2\tau}\|x - v\|^2 + E(x \mid y)`.

        Args:
            v: The point to stay close to.
            step: The step :math:`\tau > 0`.
            condition: The measurement, as in :meth:`Energy.forward`.
        """


class Conditional(nn.Module, ABC):
    r"""A conditional law :math:`p(b \mid a, y)`: noise models, encoders, decoders, Langevin and diffusion steps."""

    @abstractmethod
    def draw(
        self, a: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Float[Tensor, " batch"]]:
        r"""Draw :math:`b \sim p(\cdot \mid a, y)` and return it with :math:`\log p(b \mid a, y)`."""

    @abstractmethod
    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        r"""The log-density :math:`\log p(b \mid a, y)`, normalised, in nats."""


def _terms(energy: Energy) -> Iterator[Energy]:
    # Nested sums are flattened, so that printing a posterior shows its terms.
    if isinstance(energy, Sum):
        for term in energy.terms:
            assert isinstance(term, Energy)
            yield term
    else:
        yield energy
