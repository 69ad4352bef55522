"""What projectors have in common: the adjoint as derivative, and checks of geometries and sinograms."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.operator import LinearOperator, Shape, apply_linear, check_shape


class Projector(LinearOperator):
    """A linear operator whose derivative is its adjoint, whichever way it is computed."""

    def forward(self, x: Tensor) -> Tensor:
        """Integrate along the rays; see :meth:`Operator.forward`."""
        check_shape(x, self.domain_shape)
        return apply_linear(x, self._there, self._back)

    def adjoint(self, y: Tensor) -> Tensor:
        """Backproject; see :meth:`LinearOperator.adjoint`."""
        check_sinogram(y, self.range_shape)
        return apply_linear(y, self._back, self._there)

    def normal_spectrum(self, shape: Shape) -> Float[Tensor, "height half"]:
        r"""The Fourier factors of :math:`A^\top A` in a large image, for ``rfft2`` on a grid of this shape.

        They are :math:`c / |\xi|`, with :math:`c` fitted to the operator.
        """
        return self._spectrum(shape, torch.ones(()))

    def _spectrum(self, shape: Shape, coverage: Tensor) -> Tensor:
        k0 = 2 * math.pi * torch.fft.fftfreq(shape[0], dtype=torch.float64)[:, None]
        k1 = 2 * math.pi * torch.fft.rfftfreq(shape[1], dtype=torch.float64)
        # The lowest frequency of the image itself bounds what it can tell of those below.
        factors = coverage / torch.hypot(k0, k1).clamp_min(math.pi / max(self.domain_shape))
        height, width = self.domain_shape

        def apply(x: Tensor) -> Tensor:
            spread = torch.fft.irfft2(factors * torch.fft.rfft2(x, s=shape), s=shape)
            return spread[..., :height, :width]

        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((1, 1, height, width), generator=generator, dtype=torch.float64)
        # Smooth, because the interpolation along the rays damps what is not.
        smooth = apply(noise)
        return factors * (self(smooth).square().sum() / (apply(smooth) * smooth).sum())

    def _there(self, x: Tensor) -> Tensor:
        result = self.project(x.reshape(-1, *self.domain_shape))
        return result.view(*x.shape[:-2], *self.range_shape)

    def _back(self, y: Tensor) -> Tensor:
        result = self.backproject(y.reshape(-1, *self.range_shape))
        return result.view(*y.shape[:-2], *self.domain_shape)

    @abstractmethod
    def project(
        self, x: Float[Tensor, "images height width"]
    ) -> Float[Tensor, "images angles bins"]:
        """Line integrals of some images."""

    @abstractmethod
    def backproject(
        self, y: Float[Tensor, "images angles bins"]
    ) -> Float[Tensor, "images height width"]:
        """The adjoint of :meth:`project`."""


def check_sinogram(y: Tensor, expected: Shape) -> None:
    """Refuse sinograms of another number of angles or bins.

    Raises:
        InputError: If they differ.
    """
    if tuple(y.shape[-2:]) != expected:
        raise InputError(
            f"The sinogram has {y.shape[-2]} angles x {y.shape[-1]} bins but the operator measures {expected[0]} x "
            f"{expected[1]}; check the number of angles, and whether the two axes are exchanged."
        )


def check_geometry(
    shape: Shape, angles: Tensor, bins: int | None, *, pixel: float, spacing: float
) -> None:
    """Refuse extents that are not positive and angles that are not numbers; warn of angles that look like degrees.

    Raises:
        InputError: As said.
    """
    if min(shape) < 2 or pixel <= 0 or spacing <= 0 or (bins is not None and bins < 2):
        raise InputError(
            f"Got an image of {shape[0]} x {shape[1]} pixels of {pixel} and {bins} bins of {spacing}; numbers of "
            "pixels and bins must be at least 2, lengths positive."
        )
    if angles.ndim != 1 or not len(angles) or not bool(angles.isfinite().all()):
        raise InputError(
            f"The angles have shape {tuple(angles.shape)}; give a list of at least one finite angle in radians."
        )
    span = float(angles.max() - angles.min())
    if span > 2 * math.pi * 1.01:
        # Not refused: golden-ratio scans make many turns.
        warnings.warn(
            f"The angles span {span:.4g} radians, which is {span / 2 / math.pi:.1f} turns; if they are degrees, "
            "convert them with torch.deg2rad, else take them modulo 2 pi.",
            stacklevel=3,
        )
