"""What a solver returns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Samples(NamedTuple):
    """Samples of the posterior of an image.

    Attributes:
        x: The samples of each chain; independent draws are chains of one.
        energies: The energy of the posterior of each, in nats, of samplers that know it.
        acceptance: The share of accepted steps, of samplers that reject.
        step: The step size, of Markov chains.
        interrupted: Whether the user stopped it (Ctrl-C): x is what there was.
    """

    x: Float[Tensor, "chains draws channels height width"]
    energies: Float[Tensor, "chains draws"] | None
    acceptance: float | None
    step: float | None
    interrupted: bool = False

    @property
    def images(self) -> Float[Tensor, "samples channels height width"]:
        """The samples of all chains."""
        return self.x.flatten(0, 1)


class Solution(NamedTuple):
    """The result of a solver.

    Attributes:
        x: The last point.
        history: The monitored value (an energy, or the measure of convergence of the solver) after each step.
        steps: The number of steps taken.
        converged: Whether the tolerance was reached; None if there is none: as many steps as were asked for.
        interrupted: Whether the user stopped it (Ctrl-C): x is the point so far.
        std: The standard deviation of each value, of methods that sample.
        samples: Samples of the posterior, of which x is the mean.
    """

    x: Tensor
    history: list[float]
    steps: int
    converged: bool | None
    interrupted: bool = False
    std: Tensor | None = None
    samples: Samples | None = None
