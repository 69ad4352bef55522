r"""Scatterometry: three parameters of a grating from 23 diffraction intensities, and its posterior by quadrature.

:math:`y_j = F_j(x) + a F_j(x) \eta_j + b \zeta_j` with :math:`a = 0.2,\ b = 0.01`; the forward map is the
published network
surrogate of a partial differential equation. The prior is uniform on :math:`[-1, 1]^3` with soft walls.

References:
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375 (wall 1000), and "Generalized normalizing flows via Markov chains", 2023,
    https://arxiv.org/abs/2111.12506 (wall 100, the talk's table)
    Heidenreich, Gross, Bär, "Bayesian approach to the statistical inverse problem of scatterometry", 2015,
    https://doi.org/10.1615/Int.J.UncertaintyQuantification.2015013050
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from patchflow.chains.nets import MLP
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.io.checkpoint import load_into, read_tensors
from patchflow.priors.uniform import Uniform
from patchflow.problems.likelihood import Likelihood, MixedNoise

RELATIVE, ABSOLUTE = 0.2, 0.01
MEASURED = 23
BINS = 50
# Energies evaluated at a time, and at most in the refinement of one posterior.
_BLOCK, _BUDGET = 32_768, 600_000


def problem(data: Path, wall: float | int) -> tuple[Likelihood, Uniform]:
    """The likelihood and the prior.

    Args:
        data: The folder with ``scatterometry/forward_model.safetensors``.
        wall: Decay of the prior outside the box: 100 in the talk's table, 1000 in the first paper.

    Raises:
        InputError: If the forward model is missing.
    """
    path = data / "scatterometry" / "forward_model.safetensors"
    if not path.exists():
        raise InputError(
            f"There is no {path}; convert forward_model_new.pt of the public repository PaulLyonel/conditionalSNF to "
            "safetensors, keys 0, 2, 4, 6.{weight, bias}."
        )
    forward = MLP(3, MEASURED, hidden=256, depth=3)
    load_into(forward, read_tensors(path), path)
    likelihood = Likelihood(forward.requires_grad_(False), MixedNoise(RELATIVE, ABSOLUTE))
    return likelihood, Uniform(-1, 1, dim=3, wall=wall)


@dataclass(frozen=True)
class GridPosterior:
    """A posterior on the box by quadrature.

    Attributes:
        masses: Probability of each of the 50 x 50 x 50 cells of the box, float64.
        points: The quadrature points that carry mass, (count, 3).
        weights: Their probabilities, float64.
        log_density: Their log-densities, normalised on the box.
        spacing: Side of the cell around each point.
    """

    masses: Float[Tensor, " cells"]
    points: Float[Tensor, "count 3"]
    weights: Float[Tensor, " count"]
    log_density: Float[Tensor, " count"]
    spacing: float

    def counts(self, samples: int) -> Float[Tensor, " cells"]:
        """How many of ``samples`` exact samples fall into each cell: multinomial, without any sampler's error."""
        drawn = torch.multinomial(self.masses, samples, replacement=True)
        return drawn.bincount(minlength=len(self.masses)).double()


@torch.no_grad()
def posterior_by_quadrature(energy: Energy, y: Float[Tensor, "1 data"]) -> GridPosterior:
    """Integrate :math:`e^{-E(x | y)}` over the cells of the box.

    Midpoints of all cells first; then the cells that carry mass, and their neighbours, are subdivided as finely as
    600,000 evaluations allow.

    Args:
        energy: The posterior energy.
        y: The measurement.
    """
    side = 2 / BINS
    axis = -1 + side * (torch.arange(BINS) + 0.5)
    centres = torch.cartesian_prod(axis, axis, axis)
    coarse = -_evaluate(energy, centres, y)
    grid = coarse.view(1, 1, BINS, BINS, BINS)
    near = F.max_pool3d(grid.float(), 3, stride=1, padding=1).flatten()
    carrying = (near > float(coarse.max()) - 18).nonzero()[:, 0]
    parts = max(2, min(10, int((_BUDGET / len(carrying)) ** (1 / 3))))
    offset = side * ((torch.arange(parts) + 0.5) / parts - 0.5)
    offsets = torch.cartesian_prod(offset, offset, offset)
    points = (centres[carrying, None] + offsets).flatten(0, 1)
    log_values = -_evaluate(energy, points, y).double()
    log_mass = log_values.logsumexp(0)
    weights = (log_values - log_mass).exp()
    masses = torch.zeros(BINS**3, dtype=torch.float64)
    masses.index_add_(0, carrying, weights.view(-1, parts**3).sum(1))
    log_density = log_values - log_mass - 3 * math.log(side / parts)
    return GridPosterior(masses, points, weights, log_density, side / parts)


def cell_counts(x: Float[Tensor, "count 3"]) -> Float[Tensor, " cells"]:
    """The histogram of samples over the cells of the box; samples outside are left out, as in the papers."""
    index = ((x + 1) * (BINS / 2)).floor().long()
    index = index[((index >= 0) & (index < BINS)).all(1)]
    flat = (index[:, 0] * BINS + index[:, 1]) * BINS + index[:, 2]
    return flat.bincount(minlength=BINS**3).double()


def histogram_kl(reference: Float[Tensor, " cells"], model: Float[Tensor, " cells"]) -> float:
    r"""The published score: :math:`KL(\text{reference} \| \text{model})` of histograms, each with 1e-10 added.

    It charges 11 nats for every reference sample in a cell that the model missed, so two exact samples score about 0.6.
    """
    p, q = (1e-10 + counts / counts.sum() for counts in (reference, model))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def _evaluate(energy: Energy, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([energy(block, y.expand(len(block), -1)) for block in x.split(_BLOCK)])
