r"""Computed tomography in two dimensions: line integrals of an image, and filtered backprojection.

Axis 0 of the image is the coordinate :math:`p_0`, axis 1 is :math:`p_1`; the origin is the centre of the image. At the
angle :math:`\theta` a parallel beam measures, for each bin at :math:`t`, the integral along the line

.. math:: \{p : \langle p, n_\theta\rangle = t\}, \qquad n_\theta = (\cos\theta, \sin\theta).

Sinograms are (batch, channels, angles, bins). Lengths have the unit of ``pixel``: with metres, an image of attenuations
in 1/m becomes line integrals without a unit.

References:
    Natterer, "The mathematics of computerized tomography", 1986
    Leuschner, Schmidt, Otero Baguer, Maass, "LoDoPaB-CT, a benchmark dataset for low-dose computed tomography
    reconstruction", Scientific Data 8, 2021, https://doi.org/10.1038/s41597-021-00893-z
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.radon import joseph_matrix, plan_parallel, transpose_matrix
from patchflow.numerics.ramp import Window, angle_weights, filter_projections
from patchflow.numerics.rays import backproject_rays, project_rays
from patchflow.problems.operator import Shape
from patchflow.problems.projector import Projector, check_geometry, check_sinogram

GIB = 2**30
# Default for the sparse matrices; LoDoPaB's geometry takes 0.45 GiB in float32.
MEMORY_LIMIT = 2 * GIB
# Zero in an infinite image. Measured in limited-angle total variation: 0.1 needs half the steps of 0.01 or 1.
_UNMEASURED = 0.1
# Columns of a product with a sparse matrix: measured, 16 cost 1.7 times as much as 8, 64 cost 30 times.
_COLUMNS = 16


class ParallelBeam(Projector):
    r"""The parallel-beam transform, by Joseph's method; forward and adjoint match to rounding.

    Args:
        shape: Height and width of the image.
        angles: The angles :math:`\theta` in radians (angles,), any set.
        bins: Number of detector bins; by default as many as the diagonal of the image needs, an odd number.
        pixel: Side length of a pixel.
        spacing: Width of a bin; that of a pixel by default.
        offset: Where the centre of the detector meets the axis of rotation: the middle bin measures :math:`t` = offset.
        engine: ``"matrix"``: sparse matrices that angles share by symmetry, the fastest. ``"sampling"``: the image is
            sampled along the rays, in little memory. ``"auto"``: the first within the memory limit.
        memory_limit: Bytes that the matrices may take in float32.

    Attributes:
        angles: The angles, float64.
        engine: The engine that was chosen.
        matrix_bytes: What the matrices take in float32, built or not: known before anything is built.

    Raises:
        InputError: If the angles are not finite, an extent is not positive, or the matrices would exceed
            the limit although they were asked for.
    """

    angles: Tensor

    def __init__(
        self,
        shape: Shape,
        angles: Tensor,
        bins: int | None = None,
        *,
        pixel: float | int = 1.0,
        spacing: float | int | None = None,
        offset: float | int = 0.0,
        engine: Literal["auto", "matrix", "sampling"] = "auto",
        memory_limit: float | int = MEMORY_LIMIT,
    ) -> None:
        spacing = pixel if spacing is None else spacing
        check_geometry(shape, angles, bins, pixel=pixel, spacing=spacing)
        if bins is None:
            bins = 2 * math.ceil(math.hypot(*shape) * pixel / spacing / 2) + 1
        super().__init__(shape, (len(angles), bins))
        self.register_buffer("angles", angles.detach().double().cpu(), persistent=False)
        self.pixel, self.spacing, self.offset = float(pixel), float(spacing), float(offset)
        self._plan = plan_parallel(shape, self.angles, self._offsets())
        entries = self._plan.entries()
        # A matrix and its transpose; a value and a column of four bytes each.
        self.matrix_bytes = 2 * 8 * entries
        # Columns and starts of rows are counted in 32 bits.
        fits = self.matrix_bytes <= memory_limit and entries < 2**31
        if engine == "matrix" and not fits:
            raise InputError(
                f"The matrices of {len(angles)} angles and {bins} bins would take {self.matrix_bytes / GIB:.1f} GiB, "
                f"more than the limit of {memory_limit / GIB:.1f}; use engine='sampling' or raise memory_limit."
            )
        self.engine = ("matrix" if fits else "sampling") if engine == "auto" else engine
        self._built: tuple[torch.device, torch.dtype] | None = None
        self._forwards: list[Tensor] = []
        self._transposes: list[Tensor] = []

    def describe(self) -> str:
        """The engine and its memory, in a sentence."""
        angles, bins = self.range_shape
        rays = f"{angles} angles x {bins} bins of {self.domain_shape[0]} x {self.domain_shape[1]} pixels"
        need = f"{self.matrix_bytes / GIB:.2f} GiB"
        if self.engine == "matrix":
            return f"{rays}: sparse matrices of {need}"
        return f"{rays}: sampled along the rays (sparse matrices would take {need})"

    def select(self, angles: slice | Tensor) -> ParallelBeam:
        """The operator of some of the angles, for a limited-angle or a sparse measurement.

        Args:
            angles: A slice, or indices or a mask.
        """
        return ParallelBeam(
            self.domain_shape,
            self.angles[angles],
            self.range_shape[1],
            pixel=self.pixel,
            spacing=self.spacing,
            offset=self.offset,
            engine="sampling" if self.engine == "sampling" else "auto",
        )

    def filtered_backprojection(
        self, y: Tensor, *, window: Window = "hann", frequency_scaling: float | int = 1.0
    ) -> Tensor:
        r"""Invert by filtered backprojection, :math:`\sum_\theta w_\theta\,(h * y_\theta)(\langle p, n_\theta\rangle)`.

        The weight of an angle is half the way to both its neighbours; directions that were not measured (a gap of more
        than twice the median) count as zero, which gives the usual streaks.

        Args:
            y: Sinograms (..., angles, bins).
            window: See :func:`patchflow.numerics.ramp.filter_projections`.
            frequency_scaling: See there.
        """
        check_sinogram(y, self.range_shape)
        filtered = filter_projections(
            y, self.spacing, window=window, frequency_scaling=frequency_scaling
        )
        # The adjoint spreads each ray over pixel**2 / spacing: what the rays of one direction give a pixel.
        weights = angle_weights(self.angles).to(y) * (self.spacing / self.pixel**2)
        return self.adjoint(filtered * weights[:, None])

    def initial(self, y: Tensor) -> Tensor:
        """Filtered backprojection with the Hann window up to 0.64 of the highest frequency."""
        return self.filtered_backprojection(y, frequency_scaling=0.641025641025641)

    def normal_spectrum(self, shape: Shape) -> Tensor:
        """See :meth:`Projector.normal_spectrum`; directions that were not measured keep a tenth."""
        k0 = torch.fft.fftfreq(shape[0], dtype=torch.float64)[:, None]
        k1 = torch.fft.rfftfreq(shape[1], dtype=torch.float64)
        direction = torch.atan2(k1, k0) % math.pi
        measured = (self.angles % math.pi).sort().values
        # From each direction to its neighbours among the angles, around the half turn.
        measured = torch.cat((measured[-1:] - math.pi, measured, measured[:1] + math.pi))
        after = torch.searchsorted(measured, direction).clamp(1, len(measured) - 1)
        distance = torch.minimum(direction - measured[after - 1], measured[after] - direction)
        near = distance <= 2 * measured.diff().median()
        return self._spectrum(shape, torch.where(near, 1.0, _UNMEASURED))

    def project(self, x: Tensor) -> Tensor:
        """Line integrals of images (images, height, width)."""
        if self.engine == "sampling":
            y = project_rays(x, *self._rays(x.device))
            return y.view(len(x), *self.range_shape) * self.pixel
        # Memory traffic grows faster than the number of columns beyond this.
        few = max(1, _COLUMNS // max(len(block.orientations) for block in self._plan.blocks))
        return torch.cat([self._project(part) for part in x.split(few)])

    def _project(self, x: Tensor) -> Tensor:
        parts = []
        for block, matrix in zip(self._plan.blocks, self._matrices(x), strict=True):
            turned = torch.stack([o.apply(x).flatten(1) for o in block.orientations])
            parts.append((matrix @ turned.permute(2, 0, 1).flatten(1)).view(-1, len(x)))
        rays = torch.cat(parts)[self._plan.index.to(x.device).flatten()]
        return rays.T.reshape(len(x), *self.range_shape) * self.pixel

    def backproject(self, y: Tensor) -> Tensor:
        """The adjoint, on sinograms (images, angles, bins)."""
        if self.engine == "sampling":
            x = backproject_rays(y.flatten(1), *self._rays(y.device), self.domain_shape)
            return x * self.pixel
        few = max(1, _COLUMNS // max(len(block.orientations) for block in self._plan.blocks))
        return torch.cat([self._backproject(part) for part in y.split(few)])

    def _backproject(self, y: Tensor) -> Tensor:
        sizes = [len(b.orientations) * self._plan.rays(b) for b in self._plan.blocks]
        rays = y.new_zeros(sum(sizes), len(y))
        rays.index_add_(0, self._plan.index.to(y.device).flatten(), y.flatten(1).T)
        total = y.new_zeros(len(y), *self.domain_shape)
        for block, part, transpose in zip(
            self._plan.blocks, rays.split(sizes), self._transposed(y), strict=True
        ):
            count = len(block.orientations)
            turned = transpose @ part.view(-1, count * len(y))
            turned = turned.view(*block.shape, count, len(y)).permute(2, 3, 0, 1)
            for image, orientation in zip(turned, block.orientations, strict=True):
                total += orientation.undo(image)
        return total * self.pixel

    def _offsets(self) -> Tensor:
        """The distances of the bins from the axis of rotation, in pixels."""
        bins = self.range_shape[1]
        t = (torch.arange(bins, dtype=torch.float64) - (bins - 1) / 2) * self.spacing + self.offset
        return t / self.pixel

    def _rays(self, device: torch.device) -> tuple[Tensor, Tensor]:
        normals = torch.stack((self.angles.cos(), self.angles.sin()), 1)
        offsets = self._offsets()
        rays = normals.repeat_interleave(len(offsets), 0), offsets.repeat(len(normals))
        return rays[0].to(device), rays[1].to(device)

    def _matrices(self, like: Tensor) -> list[Tensor]:
        """The matrices of the blocks, built when first used and kept for one device and type."""
        if self._built != (like.device, like.dtype):
            self._built = (like.device, like.dtype)
            self._transposes = []
            self._forwards = [
                _sparse(
                    joseph_matrix(block, self._plan.offsets, like.dtype),
                    (self._plan.rays(block), math.prod(block.shape)),
                ).to(like.device)
                for block in self._plan.blocks
            ]
        return self._forwards

    def _transposed(self, like: Tensor) -> list[Tensor]:
        """Their transposes: what is only measured needs none."""
        forwards = self._matrices(like)
        if not self._transposes:
            self._transposes = [
                _sparse(transpose_matrix(matrix.cpu()), (matrix.shape[1], matrix.shape[0])).to(
                    like.device
                )
                for matrix in forwards
            ]
        return self._transposes


def _sparse(parts: tuple[Tensor, Tensor, Tensor], shape: Shape) -> Tensor:
    with warnings.catch_warnings():
        # That sparse matrices are a young feature of torch helps nobody here.
        warnings.filterwarnings("ignore", message="Sparse CSR")
        return torch.sparse_csr_tensor(*parts, shape, check_invariants=False)
