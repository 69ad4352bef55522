r"""Likelihoods: a forward model and a noise model, as an energy :math:`E(x \mid y) = -\log p(y \mid F(x))`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Conditional, Energy, Proximable
from patchflow.errors import InputError
from patchflow.problems.operator import LinearOperator

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class ProximableNoise(Conditional):
    r"""A noise whose energy :math:`D(a) = -\log p(b \mid a)` is convex, with a proximal map value by value."""

    @abstractmethod
    def prox(
        self, v: Float[Tensor, "batch *event"], step: float | int, b: Tensor
    ) -> Float[Tensor, "batch *event"]:
        r"""Solve :math:`\arg\min_a \; D(a) + \tfrac{1}{2\tau} \|a - v\|^2`.

        Args:
            v: Points in the space of measurements.
            step: The step :math:`\tau`.
            b: The measurement.
        """

    @abstractmethod
    def precision(self, b: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """The curvature of D in each value where a equals the measurement: one over the variance."""


class GaussianNoise(ProximableNoise):
    r"""Additive noise, :math:`b = a + \sigma \xi` with :math:`\xi \sim N(0, I)`.

    Args:
        std: The standard deviation :math:`\sigma`, in the units of the measurement: a number, or a tensor of one
            for each value of a measurement.

    Raises:
        InputError: If ``std`` is not positive and finite, or neither a number nor a tensor.
    """

    std: float | int | Tensor

    def __init__(self, std: float | int | Tensor) -> None:
        super().__init__()
        if not isinstance(std, (float, int, Tensor)):
            raise InputError(
                f"The noise level is a {type(std).__name__}; give a number or a tensor (torch.as_tensor)."
            )
        levels = torch.as_tensor(std)
        if not bool(((levels > 0) & levels.isfinite()).all()):
            raise InputError(
                f"The noise level is {std} but must be positive and finite; for exact data use their rounding error."
            )
        if isinstance(std, Tensor):
            self.register_buffer("std", std.detach().clone())
        else:
            self.std = std

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add noise; see :meth:`Conditional.draw`."""
        b = a + self.std * torch.randn_like(a)
        return b, self.log_prob(b, a)

    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """The normalised log-density; see :meth:`Conditional.log_prob`."""
        residual = ((b - a) / self.std).flatten(1)
        level = torch.as_tensor(self.std, dtype=a.dtype, device=a.device)
        constant = level.log().expand(b.shape[1:]).sum() + residual.shape[1] * _HALF_LOG_2PI
        return -0.5 * residual.square().sum(1) - constant

    def prox(
        self, v: Float[Tensor, "batch *event"], step: float | int, b: Tensor
    ) -> Float[Tensor, "batch *event"]:
        """A weighted mean of ``v`` and ``b``; see :meth:`ProximableNoise.prox`."""
        return v + step * (b - v) / (step + self.std**2)

    def precision(self, b: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """See :meth:`ProximableNoise.precision`."""
        return torch.ones_like(b) / self.std**2


class MixedNoise(Conditional):
    r"""Multiplicative and additive normal noise, :math:`b_j = a_j + \alpha a_j \eta_j + \beta \zeta_j`.

    So :math:`b_j \sim N(a_j,\ \alpha^2 a_j^2 + \beta^2)`: photon counting with read-out noise, scatterometry.

    Args:
        relative: The level :math:`\alpha` of the multiplicative part.
        absolute: The level :math:`\beta` of the additive part, in the units of the measurement.

    Raises:
        InputError: If ``absolute`` is not positive or ``relative`` is negative.
    """

    def __init__(self, relative: float | int, absolute: float | int) -> None:
        super().__init__()
        if not (0 < absolute < math.inf and 0 <= relative < math.inf):
            raise InputError(
                f"The noise levels are {relative} (relative) and {absolute} (absolute); the first must not be "
                "negative, the second must be positive."
            )
        self.relative, self.absolute = float(relative), float(absolute)

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add noise; see :meth:`Conditional.draw`."""
        b = a + self._variance(a).sqrt() * torch.randn_like(a)
        return b, self.log_prob(b, a)

    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """The normalised log-density; see :meth:`Conditional.log_prob`."""
        variance = self._variance(a)
        terms = (b - a).square() / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * terms.flatten(1).sum(1)

    def _variance(self, a: Tensor) -> Tensor:
        return self.relative**2 * a.square() + self.absolute**2


class Likelihood(Energy):
    r"""The energy :math:`E(x \mid y) = -\log p(y \mid F(x))` of any forward model.

    Args:
        operator: The forward model :math:`F`: any callable of a batch, differentiable by autograd.
        noise: The law of the measurement given :math:`F(x)`.
    """

    def __init__(self, operator: Callable[[Tensor], Tensor], noise: Conditional) -> None:
        super().__init__()
        self.operator, self.noise = operator, noise

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for the measurement ``condition``; see :meth:`Energy.forward`.

        Raises:
            InputError: If there is no measurement.
        """
        return -self.noise.log_prob(_measured(condition), self.operator(x))

    def simulate(self, x: Tensor) -> Tensor:
        """Draw a measurement of ``x``."""
        return self.noise.draw(self.operator(x))[0]


class GaussianLikelihood(Likelihood, Proximable):
    r"""A linear operator with Gaussian noise, the likelihood that has a closed proximal map.

    .. math:: E(x \mid y) = \frac{1}{2\sigma^2} \|A x - y\|^2 + m \log(\sigma\sqrt{2\pi})

    Args:
        operator: The operator :math:`A`.
        std: The standard deviation :math:`\sigma` of the noise.

    Raises:
        InputError: If ``std`` is not positive.
    """

    operator: LinearOperator

    def __init__(self, operator: LinearOperator, std: float | int) -> None:
        super().__init__(operator, GaussianNoise(std))
        self.std = float(std)

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for the measurement ``condition``; see :meth:`Energy.forward`.

        Raises:
            InputError: If there is no measurement, or one of another shape than the operator's.
        """
        return super().forward(x, self._checked(condition, x))

    def prox(
        self,
        v: Float[Tensor, "batch *event"],
        step: float | int,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "batch *event"]:
        r"""Solve :math:`(A^\top A + \rho I)\,x = A^\top y + \rho v` with :math:`\rho = \sigma^2 / \tau`."""
        return self.operator.nearest(v, self._checked(condition, v), self.std**2 / step)

    def _checked(self, condition: Tensor | None, x: Tensor) -> Tensor:
        """The measurement of images like ``x``."""
        y = _measured(condition)
        shape = (*x.shape[1:-2], *self.operator.range_shape)
        if y.shape[1:] != shape:
            raise InputError(
                f"The measurement has the shape {tuple(y.shape[1:])} but the operator gives {shape}; pass what this "
                "operator measured, or make the operator for this measurement."
            )
        return y


def _measured(condition: Tensor | None) -> Tensor:
    if condition is None:
        raise InputError("A likelihood needs the measurement; pass it as condition.")
    return condition
