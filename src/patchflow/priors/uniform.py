r"""Uniform boxes, with hard or with soft walls."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Transported
from patchflow.errors import InputError


class Uniform(Transported):
    r"""The uniform law on a box, with hard or with soft walls.

    Constant inside; outside zero, or with soft walls

    .. math:: p(x) \propto \prod_i \exp(-\lambda\, \mathrm{dist}(x_i, [l_i, h_i])).

    Args:
        low: Lower corner: a number, or one value per coordinate.
        high: Upper corner.
        dim: Dimension; needed if both corners are numbers.
        wall: The decay :math:`\lambda` outside the box, in 1 / units of x; ``None`` for hard walls, outside which the
            energy is infinite.

    Raises:
        InputError: If the box is empty, the corners do not fit, or ``wall`` is not positive.

    References:
        Hagemann, Hertrich, Steidl, 2022, https://arxiv.org/abs/2111.12506 (the prior of scatterometry; its released
        sampler draws tails that are too long)
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: float | int | Tensor,
        high: float | int | Tensor,
        *,
        dim: int | None = None,
        wall: float | int | None = None,
    ) -> None:
        lower, upper = (
            torch.atleast_1d(torch.as_tensor(low)),
            torch.atleast_1d(torch.as_tensor(high)),
        )
        size = max(len(lower), len(upper), dim or 1)
        for corner in (lower, upper):
            if corner.ndim != 1 or len(corner) not in (1, size):
                raise InputError(
                    f"A corner of shape {tuple(corner.shape)} does not fit a box of dimension {size}; "
                    "give a number or one value per coordinate."
                )
        if not (lower < upper).all():
            raise InputError(f"The box from {low} to {high} is empty; give low < high.")
        if wall is not None and not 0 < wall < math.inf:
            raise InputError(
                f"The wall is {wall} but must be positive; leave it out for hard walls."
            )
        super().__init__(size)
        real = torch.get_default_dtype()
        self.register_buffer("low", lower.to(real).expand(size).clone())
        self.register_buffer("high", upper.to(real).expand(size).clone())
        self.wall = None if wall is None else float(wall)

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        outside = (self.low - x).clamp_min(0) + (x - self.high).clamp_min(0)
        volume = (self.high - self.low + self._tails()).log().sum()
        if self.wall is None:
            return torch.where(outside > 0, math.inf, 0 * x).sum(1) + volume
        return self.wall * outside.sum(1) + volume

    def from_normal(self, u: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Map normal scores to the box; see :meth:`Transported.from_normal`."""
        # From the nearer wall, so that both tails are exact.
        # erfc keeps the tail in single precision, where ndtr is zero from -6 on.
        tail = 0.5 * torch.erfc(u.abs() / math.sqrt(2))
        distance = tail * (self.high - self.low + self._tails())
        if self.wall is not None:
            within = distance - 1 / self.wall
            # The quantile of the exponential tail; where() evaluates both sides, hence the clamp.
            beyond = (self.wall * distance).clamp(torch.finfo(u.dtype).tiny, 1).log() / self.wall
            distance = torch.where(within < 0, beyond, within)
        return torch.where(u < 0, self.low + distance, self.high - distance)

    def to_normal(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Map points of the box to normal scores; see :meth:`Transported.to_normal`."""
        left = x - self.low < self.high - x
        distance = torch.where(left, x - self.low, self.high - x)
        if self.wall is not None:
            beyond = (self.wall * distance.clamp_max(0)).exp() / self.wall
            distance = torch.where(distance < 0, beyond, distance + 1 / self.wall)
        tail = distance / (self.high - self.low + self._tails())
        score = torch.special.ndtri(tail.clamp_min(torch.finfo(x.dtype).eps ** 2))
        return torch.where(left, score, -score)

    def _tails(self) -> float:
        return 0.0 if self.wall is None else 2 / self.wall
