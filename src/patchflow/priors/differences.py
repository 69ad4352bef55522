r"""Linear differences whose norms are penalised: the priors of total variation and its generalisation, for solvers.

References:
    Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D, 1992
    Bredies, Kunisch, Pock, "Total generalized variation", SIAM J. Imaging Sciences 3(3), 2010
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
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
    def lowest(self, slope: Fields, u: Fields) -> Tensor | float:
        r"""The smallest :math:`\langle s, v'\rangle` over a bounded set of auxiliary fields."""

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

    def lowest(self, slope: Fields, u: Fields) -> float:
        """There are no auxiliary fields."""
        return 0.0

    def symbols(self, k0: Tensor, k1: Tensor) -> list[Tensor]:
        """Forward differences in the Fourier domain."""
        return [
            torch.stack(torch.broadcast_tensors((1j * k0).exp() - 1, (1j * k1).exp() - 1))[:, None]
        ]


class SecondDifferences(Differences):
    r"""The differences of TGV-2: :math:`\nabla x - v`, and the symmetrised derivative :math:`E v` of the field v.

    The components of v sit between the pixels, where the differences of x are: component 0 at (i + 1/2, j),
    component 1 at (i, j + 1/2). Backward differences in its own direction bring a component back to the pixels,
    forward differences in the other direction both of them to (i + 1/2, j + 1/2), so that all of :math:`E v`,

    .. math:: (E v)_{00} = \delta_0^- v_0, \quad (E v)_{11} = \delta_1^- v_1,
              \quad (E v)_{01} = (E v)_{10} = \tfrac12 (\delta_1^+ v_0 + \delta_0^+ v_1),

    is a symmetric difference. What sticks out of the image is zero, also :math:`\nabla x - v`: an affine image with its
    slope as v has no differences.

    Args:
        ratio: The weight of the second kind against the first.

    Raises:
        InputError: If the ratio is not positive.
    """

    def __init__(self, ratio: float | int) -> None:
        if not ratio > 0:
            raise InputError(
                f"The ratio of the two orders is {ratio} but must be positive; 2 is usual."
            )
        self.ratio = ratio

    def start(self, x: Tensor) -> Fields:
        """The image and a field of zeros."""
        return x, x.new_zeros(2, *x.shape)

    def apply(self, u: Fields) -> Fields:
        """Both kinds of differences."""
        x, v = u
        first = image_gradient(x)
        first[0, :, :, :-1] -= v[0, :, :, :-1]
        first[1, :, :, :, :-1] -= v[1, :, :, :, :-1]
        return first, symmetrised_derivative(v)

    def adjoint(self, p: Fields) -> Fields:
        """See :meth:`Differences.adjoint`."""
        first, second = p
        v = minus_symmetrised_divergence(second)
        v[0, :, :, :-1] -= first[0, :, :, :-1]
        v[1, :, :, :, :-1] -= first[1, :, :, :, :-1]
        return minus_divergence(first), v

    def project(self, p: Fields, weight: float | int) -> Fields:
        """Onto balls of the radii ``weight`` and ``weight * ratio``."""
        return _shrink(p[0], weight), _shrink(p[1], weight * self.ratio)

    def value(self, image: Fields) -> Tensor:
        """TGV-2, if v is the best one for x."""
        return lengths(image[0]).sum() + self.ratio * lengths(image[1]).sum()

    def lowest(self, slope: Fields, u: Fields) -> Tensor:
        """Among fields that are nowhere longer than the longest difference of the image, or than 0.1 if it is flat."""
        longest = lengths(image_gradient(u[0])).max().clamp_min(0.1)
        return -longest * lengths(slope[1]).sum()

    def symbols(self, k0: Tensor, k1: Tensor) -> list[Tensor]:
        """Forward and backward differences in the Fourier domain."""
        a, b = torch.broadcast_tensors((1j * k0).exp() - 1, (1j * k1).exp() - 1)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        half = math.sqrt(0.5)
        first = [a, -one, zero], [b, zero, -one]
        # The conjugate of a forward difference is minus the backward one.
        second = [zero, -a.conj(), zero], [zero, zero, -b.conj()], [zero, half * b, half * a]
        return [torch.stack([torch.stack(row) for row in rows]) for rows in (first, second)]


def symmetrised_derivative(
    v: Float[Tensor, "2 batch channels height width"],
) -> Float[Tensor, "3 batch channels height width"]:
    r"""The rows :math:`(E v)_{00}, (E v)_{11}, \sqrt2 (E v)_{01}`: their Euclidean length is the Frobenius norm.

    Its norm is below sqrt(8).
    """
    e = v.new_zeros(3, *v.shape[1:])
    e[0, :, :, 1:-1] = v[0, :, :, 1:-1] - v[0, :, :, :-2]
    e[1, :, :, :, 1:-1] = v[1, :, :, :, 1:-1] - v[1, :, :, :, :-2]
    mixed = e[2, :, :, :-1, :-1]
    mixed += v[0, :, :, :-1, 1:] - v[0, :, :, :-1, :-1]
    mixed += v[1, :, :, 1:, :-1] - v[1, :, :, :-1, :-1]
    mixed *= math.sqrt(0.5)
    return e


def minus_symmetrised_divergence(
    e: Float[Tensor, "3 batch channels height width"],
) -> Float[Tensor, "2 batch channels height width"]:
    """The adjoint of :func:`symmetrised_derivative`."""
    v = e.new_zeros(2, *e.shape[1:])
    v[0, :, :, 1:-1] += e[0, :, :, 1:-1]
    v[0, :, :, :-2] -= e[0, :, :, 1:-1]
    v[1, :, :, :, 1:-1] += e[1, :, :, :, 1:-1]
    v[1, :, :, :, :-2] -= e[1, :, :, :, 1:-1]
    mixed = math.sqrt(0.5) * e[2, :, :, :-1, :-1]
    v[0, :, :, :-1, 1:] += mixed
    v[0, :, :, :-1, :-1] -= mixed
    v[1, :, :, 1:, :-1] += mixed
    v[1, :, :, :-1, :-1] -= mixed
    return v


def _shrink(p: Tensor, radius: float | int) -> Tensor:
    return p / (lengths(p) / radius).clamp_min(1)
