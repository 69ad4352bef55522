"""Fan beams: a point source and a line of detectors that turn around the object."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.linalg import conjugate_gradients
from patchflow.numerics.rays import backproject_rays, project_rays
from patchflow.problems.operator import Shape
from patchflow.problems.projector import Projector, check_geometry


class FanBeam(Projector):
    r"""A point source and a flat detector that turn around the centre of the image, by sampling along the rays.

    At the angle :math:`\theta` the source is at :math:`-R_s e_\theta`, the detector's centre at :math:`R_d e_\theta`
    and its axis is :math:`n_\theta`, with :math:`e_\theta = (-\sin\theta, \cos\theta)`.

    Args:
        shape: Height and width of the image.
        angles: The angles in radians (angles,).
        bins: Number of detector bins.
        source: The distance :math:`R_s` from the source to the axis of rotation.
        detector: The distance :math:`R_d` from the axis of rotation to the detector; 0 is a virtual detector there.
        spacing: Width of a bin on the detector.
        pixel: Side length of a pixel.
        offset: Position of the middle bin along the detector.

    Raises:
        InputError: If the angles are not finite, an extent is not positive, or the source is inside the
            image.
    """

    angles: Tensor

    def __init__(
        self,
        shape: Shape,
        angles: Tensor,
        bins: int,
        *,
        source: float | int,
        detector: float | int,
        spacing: float | int,
        pixel: float | int = 1.0,
        offset: float | int = 0.0,
    ) -> None:
        check_geometry(shape, angles, bins, pixel=pixel, spacing=spacing)
        if detector < 0 or source <= math.hypot(*shape) * pixel / 2:
            raise InputError(
                f"The source is at {source} and the detector at {detector} from the centre; the source must be outside "
                f"the image (above {math.hypot(*shape) * pixel / 2:g}), the detector's distance not negative."
            )
        super().__init__(shape, (len(angles), bins))
        self.register_buffer("angles", angles.detach().double().cpu(), persistent=False)
        self.source, self.detector = float(source), float(detector)
        self.pixel, self.spacing, self.offset = float(pixel), float(spacing), float(offset)

    def initial(self, y: Tensor) -> Tensor:
        """Twenty steps of conjugate gradients on the normal equations."""
        return conjugate_gradients(
            lambda x: self.adjoint(self(x)), self.adjoint(y), max_iterations=20
        )

    def project(self, x: Tensor) -> Tensor:
        """Line integrals of images (images, height, width)."""
        return project_rays(x, *self._rays(x.device)).view(len(x), *self.range_shape) * self.pixel

    def backproject(self, y: Tensor) -> Tensor:
        """The adjoint, on sinograms (images, angles, bins)."""
        return backproject_rays(y.flatten(1), *self._rays(y.device), self.domain_shape) * self.pixel

    def _rays(self, device: torch.device) -> tuple[Tensor, Tensor]:
        bins = self.range_shape[1]
        u = (torch.arange(bins, dtype=torch.float64) - (bins - 1) / 2) * self.spacing + self.offset
        cosine, sine = self.angles.cos()[:, None], self.angles.sin()[:, None]
        length = self.source + self.detector
        # The normal (L n - u e) / |.| is orthogonal to the ray L e + u n.
        normals = torch.stack((length * cosine + u * sine, length * sine - u * cosine), -1)
        norm = torch.hypot(torch.tensor(length, dtype=torch.float64), u)
        offsets = (self.source * u / norm / self.pixel).expand(len(self.angles), -1)
        return (normals / norm[:, None]).flatten(0, 1).to(device), offsets.flatten().to(device)
