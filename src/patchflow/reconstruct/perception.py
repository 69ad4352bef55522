r"""The way from the most accurate image to one that looks like its material.

The mean of the posterior has the smallest error and is too smooth; images of the posterior's law look right and have
twice its squared error. The best estimates in between, for the squared error at a given distance of the laws, lie on
the line between the two,

.. math:: x_t = (1 - t)\, \bar x + t\, \tilde x, \qquad 0 \le t \le 1.

Here :math:`\bar x` is an accurate reconstruction, as of a network, and :math:`\tilde x` is where a few steps of patchNR
lead from there, with a small weight: they return the texture that the network has averaged out.

References:
    Blau, Michaeli, "The perception-distortion tradeoff", CVPR 2018, https://arxiv.org/abs/1711.06077
    Freirich, Michaeli, Meir, "A theory of the distortion-perception tradeoff in Wasserstein space", NeurIPS 2021,
    https://arxiv.org/abs/2107.02555 (the line)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.priors.patch import PatchPrior
from patchflow.solve import minimize

# Chosen on a part of the validation image of super-resolution, by LPIPS half of the way, among 30 and 100 steps with
# the weights .05 and .1, and 400 with .05.
WEIGHT, STEPS = 0.05, 30


def retexture(
    likelihood: Energy,
    prior: PatchPrior,
    y: Tensor,
    x: Float[Tensor, "batch channels height width"],
    perception: float | int,
    *,
    weight: float | int = WEIGHT,
    steps: int = STEPS,
    progress: bool = False,
) -> Float[Tensor, "batch channels height width"]:
    r"""Move a reconstruction towards the texture that a patch prior knows.

    Args:
        likelihood: :math:`-\log p(y \mid x)`.
        prior: The patch prior.
        y: The measurement.
        x: The accurate reconstruction :math:`\bar x`.
        perception: The share t: 0 leaves x as it is; one half looks better at about the same error; 1 is the end.
        weight: The weight of the prior.
        steps: Steps of Adam, each on another phase of the patch grid.
        progress: Show a progress line.

    Raises:
        InputError: If the share is not in [0, 1], the weight is negative, or there is no step.
    """
    if not 0 <= perception <= 1:
        raise InputError(
            f"The perception is {perception} but must lie between 0 (most accurate) and 1 (best texture)."
        )
    if not weight >= 0 or steps < 1:
        raise InputError(
            f"Got weight {weight} and {steps} steps; the weight must not be negative, and one step is the least."
        )
    prior.check(x)
    if perception == 0:
        return x
    energies = [likelihood + float(weight) * phase for phase in prior.phases()]
    found = minimize(energies, x, y, steps=steps, progress=progress)
    return x + perception * (prior.denoise(found.x) - x)
