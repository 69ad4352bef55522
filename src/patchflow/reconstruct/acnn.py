"""Super-resolution by a trained network (ACNN, WPPNet): one evaluation, or the mean over the turns of the measurement.

References:
    Tian, Xu, Zuo, Lin, Zhang, "Asymmetric CNN for image superresolution", 2021, https://arxiv.org/abs/2103.13634
    Timofte, Rothe, Van Gool, "Seven ways to improve example-based single image super resolution", CVPR 2016,
    https://arxiv.org/abs/1511.02228 (the mean over turns and reflections)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.numerics.dihedral import DIHEDRAL, self_ensemble, symmetries
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import cell_offset, from_cells
from patchflow.resolution_models import SuperResolver
from patchflow.solution import Solution


@torch.no_grad()
def reconstruct(
    likelihood: GaussianLikelihood,
    model: SuperResolver,
    y: Float[Tensor, "batch channels height width"],
    *,
    ensemble: bool = True,
) -> Solution:
    """Apply a network to the measurement that it was trained for.

    Args:
        likelihood: The operator and the noise.
        model: The network.
        y: The measurement.
        ensemble: Whether to average over the turns and reflections that leave the kernel as it is, if the cells
            of the measured pixels lie in its middle.

    Returns:
        The image; pixels outside of all cells are interpolated.

    Raises:
        InputError: If the network was trained for something else.
    """
    model.check(y)
    operator = model.operator_of(likelihood)
    corner = zip(cell_offset(operator), operator.anchor, operator.kernel.shape, strict=True)
    # Cells that cannot lie in the middle of the kernel would be displaced by a turn.
    centred = all(2 * (first + anchor) + operator.stride == n for first, anchor, n in corner)
    turns = symmetries(operator.kernel) if ensemble and centred else DIHEDRAL[:1]
    cells = self_ensemble(model, y, turns)
    return Solution(from_cells(operator, cells, operator.initial(y)), [], 1, True)
