r"""Linear differences whose norms are penalised: the priors of total variation and its generalisation, for solvers.

References:
    Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D, 1992
    Bredies, Kunisch, Pock, "Total generalized variation", SIAM J. Imaging Sciences 3(3), 2010
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from patchflow.priors.variation import TotalVariation, image_gradient, lengths, minus_divergence

# The image (batch, channels, height, width), and behind it a stack of auxiliary fields; or stacks of differences.
Fields = tuple[Tensor, ...]


class Differences(ABC):
    """Norms of linear differences of the image, and of auxiliary fields if the prior has some."""

    @abstractmethod
    def start(self, x: Tensor) -> Fields:
        """The image, and auxiliary fields to begin with."""

    @abstractmethod
    def apply(self, u: Fields) -> Fields:
        """The differences; those across the border are zero."""

    @abstractmethod
    def adjoint(self, p: Fields) -> Fields:
        """The adjoint of :meth:`apply`."""

    @abstractmethod
    def project(self, p: Fields, weight: float | int) -> Fields:
        """Project onto the dual balls: the proximal map of the conjugate of ``weight`` times the norms."""

    @abstractmethod
    def value(self, image: Fields) -> Tensor:
        """The sum of the norms of differences, over the batch, too."""

    @abstractmethod
    def lowest(self, slope: Fields, image: Fields) -> Tensor | float:
        r"""The smallest :math:`\langle s, v'\rangle` over a bounded set of auxiliary fields, given the differences."""

    @abstractmethod
    def symbols(self, k0: Tensor, k1: Tensor) -> list[Tensor]:
        """The Fourier factors of :meth:`apply` in an infinite image, one (rows, fields, ...) for each of its outputs.

        Args:
            k0: Angular frequencies along the height.
            k1: Along the width.
        """


class FirstDifferences(Differences):
    """The gradient of the image; see :class:`patchflow.priors.variation.TotalVariation`."""

    def __init__(self, *, isotropic: bool = True) -> None:
        self.variation = TotalVariation(isotropic=isotropic)

    def start(self, x: Tensor) -> Fields:
        """The image alone."""
        return (x,)

    def apply(self, u: Fields) -> Fields:
        """The gradient."""
        return (image_gradient(u[0]),)

    def adjoint(self, p: Fields) -> Fields:
        """Minus the divergence."""
        return (minus_divergence(p[0]),)

    def project(self, p: Fields, weight: float | int) -> Fields:
        """See :meth:`patchflow.priors.variation.TotalVariation.project`."""
        return (self.variation.project(p[0], weight),)

    def value(self, image: Fields) -> Tensor:
        """The total variation."""
        if self.variation.isotropic:
            return lengths(image[0]).sum()
        return image[0].abs().sum()

    def lowest(self, slope: Fields, image: Fields) -> float:
        """There are no auxiliary fields."""
        return 0.0

    def symbols(self, k0: Tensor, k1: Tensor) -> list[Tensor]:
        """Forward differences in the Fourier domain."""
        return [
            torch.stack(torch.broadcast_tensors((1j * k0).exp() - 1, (1j * k1).exp() - 1))[:, None]
        ]
