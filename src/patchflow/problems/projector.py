"""What projectors have in common: the adjoint as derivative, and checks of geometries and sinograms."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod

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
