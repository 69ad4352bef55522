r"""Total variation: :math:`\mathrm{TV}(x) = \sum_i |(\nabla x)_i|` over pixels.

References:
    Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D, 1992
    Chambolle, "An algorithm for total variation minimization and applications", 2004
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy


class TotalVariation(Energy):
    r"""Total variation with forward differences, zero across the border; colour channels are summed.

    Not differentiable where the image is flat: autograd gives a subgradient there. The exact minimiser with a data term
    comes from :func:`patchflow.reconstruct.total_variation.reconstruct`.

    Args:
        isotropic: Euclidean norm of the two differences at a pixel, or else the sum of their absolute values.
    """

    def __init__(self, *, isotropic: bool = True) -> None:
        super().__init__()
        self.isotropic = isotropic

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        p = image_gradient(x)
        if not self.isotropic:
            return p.abs().sum(0).flatten(1).sum(1)
        return lengths(p).flatten(1).sum(1)

    def project(
        self, p: Float[Tensor, "2 batch channels height width"], radius: float | int
    ) -> Float[Tensor, "2 batch channels height width"]:
        """Project onto the dual ball: the proximal map of the conjugate of ``radius * TV``."""
        if self.isotropic:
            return p / (lengths(p) / radius).clamp_min(1)
        return p.clamp(-radius, radius)


def lengths(p: Float[Tensor, "rows *event"]) -> Float[Tensor, "*event"]:
    """The Euclidean norm along the first axis; its subgradient at zero is zero."""
    # vector_norm along a first axis of two is eighty times as slow as this; and the slope of sqrt at zero is infinite.
    squares = p.square().sum(0)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def image_gradient(
    x: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "2 batch channels height width"]:
    """Forward differences along the height and the width, zero across the border. Its norm is below sqrt(8)."""
    p = x.new_zeros(2, *x.shape)
    p[0, :, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    p[1, :, :, :, :-1] = x[:, :, :, 1:] - x[:, :, :, :-1]
    return p


def minus_divergence(
    p: Float[Tensor, "2 batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """The adjoint of :func:`image_gradient`."""
    x = torch.zeros_like(p[0])
    x[:, :, :-1] -= p[0, :, :, :-1]
    x[:, :, 1:] += p[0, :, :, :-1]
    x[:, :, :, :-1] -= p[1, :, :, :, :-1]
    x[:, :, :, 1:] += p[1, :, :, :, :-1]
    return x
