"""The symmetries of the square, on images: quarter turns and reflections, the last two axes being rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Symmetry(NamedTuple):
    """Quarter turns, and whether a reflection left to right follows.

    >>> image = torch.arange(6).view(2, 3)
    >>> [tuple(g(image).shape) for g in DIHEDRAL[:2]]
    [(2, 3), (3, 2)]
    >>> all(torch.equal(g.undo(g(image)), image) for g in DIHEDRAL)
    True
    """

    turns: int
    mirrored: bool

    def __call__(self, image: Tensor) -> Tensor:
        """Apply it; an odd number of turns exchanges height and width."""
        image = torch.rot90(image, self.turns, (-2, -1))
        return image.flip(-1) if self.mirrored else image

    def undo(self, image: Tensor) -> Tensor:
        """Apply its inverse."""
        return torch.rot90(image.flip(-1) if self.mirrored else image, -self.turns, (-2, -1))


DIHEDRAL = tuple(Symmetry(turns, mirrored) for mirrored in (False, True) for turns in range(4))


def symmetries(kernel: Float[Tensor, "rows columns"]) -> tuple[Symmetry, ...]:
    """The symmetries that leave a kernel as it is: always the identity, all eight for a Gaussian."""
    tolerance = 1e-6 * float(kernel.abs().max())
    return tuple(
        g
        for g in DIHEDRAL
        if g(kernel).shape == kernel.shape
        and torch.allclose(g(kernel), kernel, rtol=0, atol=tolerance)
    )


def self_ensemble(
    network: Callable[[Tensor], Tensor],
    image: Float[Tensor, "batch channels height width"],
    turns: Sequence[Symmetry] = DIHEDRAL,
) -> Float[Tensor, "batch outputs rows columns"]:
    """The mean of a map over turns and reflections of its input, each undone after it.

    Published is the median in place of the mean.

    Args:
        network: Any map of images.
        image: What it is applied to.
        turns: The symmetries; all eight by default.
    """
    results = (g.undo(network(g(image))) for g in turns)
    total = next(results)
    for result in results:
        total = total + result
    return total / len(turns)
