"""Features of the measurement that networks see."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError

_KNOTS = 64


class NormalScores(nn.Module):
    r"""Coordinate by coordinate, an increasing map that makes the measurements standard normal.

    A linear interpolation between 64 quantiles of simulated measurements; beyond them a line. Intensities, counts and
    populations that span orders of magnitude become inputs that a network can use, and no information is lost.

    Args:
        dim: Dimension of the (flattened) measurement.
    """

    values: Tensor
    scores: Tensor
    ends: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        levels = (torch.arange(_KNOTS) + 0.5) / _KNOTS
        scores = torch.special.ndtri(levels)
        self.dim = dim
        self.register_buffer("scores", scores, persistent=False)
        # Before initialize: the identity.
        self.register_buffer("values", scores.expand(dim, _KNOTS).clone())
        self.register_buffer("ends", torch.ones(dim))

    @torch.no_grad()
    def initialize(self, y: Float[Tensor, "batch dim"]) -> None:
        """Take the quantiles of simulated measurements.

        Args:
            y: Measurements, at least 64.

        Raises:
            InputError: If there are too few, their dimension is another, or some are not finite.
        """
        if y.ndim != 2 or y.shape[1] != self.dim or len(y) < _KNOTS:
            raise InputError(
                f"Measurements of shape {tuple(y.shape)} cannot set the features of {self.dim} values; give at least "
                f"{_KNOTS} rows of {self.dim}."
            )
        if not y.isfinite().all():
            raise InputError(
                f"{int((~y.isfinite()).any(1).sum())} of {len(y)} simulated measurements are not finite; mend the "
                "forward model, or restrict the prior to where it works."
            )
        spread = y.std(0).clamp_min(1e-12)
        order = y.sort(0).values
        values = order[((torch.arange(_KNOTS) + 0.5) / _KNOTS * len(y)).long()].T
        # Ties (counts, saturated detectors) are pulled apart, so that the map increases strictly.
        apart = 1e-3 * spread[:, None] * torch.arange(_KNOTS).to(y) / _KNOTS
        self.values.copy_(values.cummax(1).values + apart)
        self.ends.copy_(1 / spread)

    def forward(self, y: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Map measurements to scores.

        Raises:
            InputError: If the dimension is another.
        """
        if y.ndim != 2 or y.shape[1] != self.dim:
            raise InputError(
                f"The measurement has the shape {tuple(y.shape)} but the model was made for (batch, {self.dim}); give "
                "the measurement of the same experiment."
            )
        columns = y.T.contiguous()
        right = torch.searchsorted(self.values, columns).clamp(1, _KNOTS - 1)
        low, high = self.values.gather(1, right - 1), self.values.gather(1, right)
        before, after = self.scores[right - 1], self.scores[right]
        inside = before + (after - before) * (columns - low) / (high - low)
        first, last = self.values[:, :1], self.values[:, -1:]
        slope = self.ends[:, None]
        scores = torch.where(columns < first, self.scores[0] + slope * (columns - first), inside)
        scores = torch.where(columns > last, self.scores[-1] + slope * (columns - last), scores)
        return scores.T
