r"""A patch prior at several scales: patches of smaller versions of the image see larger structures.

.. math:: R(x) = \frac1S \sum_{s=0}^{S-1} 4^s R_s(G^s x),

where :math:`G` smooths by a Gaussian and keeps every second pixel. The factor counts every scale like the finest one.

References:
    Hertrich, Houdard, Redenbach, "Wasserstein patch prior for image superresolution", IEEE TCI 8, 2022,
    https://arxiv.org/abs/2109.12880
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.priors.patch import PatchPrior

# As published: taps and standard deviation of the Gaussian.
_TAPS, _STD = 4, 1.0


class MultiscalePrior(Energy):
    """Patch priors of one patch size, from the finest scale to the coarsest; see the module's formula.

    Args:
        priors: One prior per scale.

    Raises:
        InputError: If there is none, or their patches differ in size or channels.
    """

    def __init__(self, priors: Sequence[PatchPrior]) -> None:
        super().__init__()
        if len({(prior.size, prior.channels) for prior in priors}) != 1:
            raise InputError(
                f"Got {len(priors)} scales with patches of {[prior.size for prior in priors]} pixels; give at least "
                "one, all of one size and number of channels."
            )
        self.priors = nn.ModuleList(priors)
        self.size, self.channels = priors[0].size, priors[0].channels

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Average over the scales; see :meth:`Energy.forward`. The condition is not used."""
        return _average(self.priors, x)

    def phases(self, stride: int | None = None) -> tuple[MultiscalePhase, ...]:
        """Energies on the phases of a coarse patch grid; see :meth:`patchflow.priors.patch.PatchPrior.phases`."""
        scales = [prior.phases(stride) for prior in self._priors()]
        return tuple(MultiscalePhase(phases) for phases in zip(*scales, strict=True))

    def _priors(self) -> Iterator[PatchPrior]:
        for prior in self.priors:
            assert isinstance(prior, PatchPrior)
            yield prior

    def check(self, x: Tensor) -> None:
        """Refuse images that do not fit, before a long computation.

        Raises:
            InputError: If the number of channels is another, or the smallest version is smaller than a patch.
        """
        for k, prior in enumerate(self._priors()):
            x = shrink(x) if k else x
            prior.check(x)


class MultiscalePhase(Energy):
    """A multiscale prior on one phase of a coarse patch grid; built by :meth:`MultiscalePrior.phases`."""

    def __init__(self, phases: Sequence[Energy]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(phases)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Average over the scales; see :meth:`Energy.forward`."""
        return _average(self.scales, x)


def shrink(
    x: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels rows columns"]:
    """Smooth by a Gaussian, without what lies outside, and keep every second pixel."""
    line = torch.exp(-0.5 * ((torch.arange(_TAPS).to(x) - (_TAPS - 1) / 2) / _STD) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    flat = x.reshape(-1, 1, *x.shape[2:])
    smaller = functional.conv2d(flat, kernel[None, None], stride=2)
    return smaller.view(*x.shape[:2], *smaller.shape[2:])


def _average(energies: Iterable[nn.Module], x: Tensor) -> Tensor:
    values = []
    for k, energy in enumerate(energies):
        x = shrink(x) if k else x
        values.append(4**k * energy(x))
    return torch.stack(values).mean(0)
