"""What a solver returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Solution(NamedTuple):
    """The result of a solver.

    Attributes:
        x: The last point.
        history: The monitored value (an energy, or the measure of convergence of the solver) after each step.
        steps: The number of steps taken.
        converged: Whether the tolerance was reached; None if there is none: as many steps as were asked for.
        interrupted: Whether the user stopped it (Ctrl-C): x is the point so far.
        std: The standard deviation of each value, of methods that sample.
    """

    x: Tensor
    history: list[float]
    steps: int
    converged: bool | None
    interrupted: bool = False
    std: Tensor | None = None
