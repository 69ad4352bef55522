r"""The projectors of the ASTRA toolbox: another engine for parallel and fan beam, the only one for cone beam.

An optional dependency: ``pip install 'patchflow[astra]'``. On the CPU ASTRA backprojects with the weights that it
projects with. On a GPU it projects by rays and backprojects by pixels, so adjoints and gradients match only roughly.

Geometries made here have ASTRA's axes at :math:`(x, y) = (p_1, -p_0)` for images, :math:`(x, y, z) = (p_1, p_0, z)` for
volumes: then its arrays are our images and sinograms as they are, since its rows go down in two dimensions and up in
three. See :mod:`patchflow.problems.tomography` for :math:`p` and the angles.

References:
    van Aarle, Palenstijn, Cant, et al., "Fast and flexible X-ray tomography using the ASTRA toolbox", Optics Express
    24(22), 2016, https://doi.org/10.1364/OE.24.025129; geometries: https://astra-toolbox.com/docs/index.html
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.linalg import conjugate_gradients
from patchflow.problems.fan_beam import FanBeam
from patchflow.problems.operator import Shape, apply_linear
from patchflow.problems.projector import Projector
from patchflow.problems.tomography import ParallelBeam

# The projector of each type of geometry, if none is named.
_PLANE = {"parallel": "linear", "fanflat": "line_fanflat"}
_PLANE |= {f"{kind}_vec": name for kind, name in _PLANE.items()}
_SPACE = dict.fromkeys(
    ("parallel3d", "parallel3d_vec", "cone", "cone_vec", "cyl_cone_vec"), "cuda3d"
)


class AstraProjector(Projector):
    """Line integrals of images or volumes by ASTRA, in any of its geometries.

    Images are (batch, channels, rows, columns), their sinograms (batch, channels, angles, bins). Volumes are (batch,
    channels, slices, rows, columns), their sinograms (batch, channels, detector rows, angles, bins).

    ASTRA computes in float32, here in main memory. Other types are converted and the result is converted back: in
    float64 it has the precision of float32 all the same. Tensors on a GPU are copied to main memory and back.

    Args:
        volume_geometry: From ``astra.create_vol_geom``; the pixels of images must be squares. It is copied.
        projection_geometry: From ``astra.create_proj_geom``, with as many dimensions. It is copied.
        projector: ASTRA's name of the way to integrate: ``"linear"``, ``"strip"`` or ``"line"`` for parallel beams,
            ``"line_fanflat"`` or (for geometries without vectors) ``"strip_fanflat"`` for fan beams, ``"cuda"`` for
            both, ``"cuda3d"`` for volumes. By default the first that fits.

    Attributes:
        domain_shape: The shape of an image or volume.
        range_shape: The shape of its sinograms.
        projector: The projector that was chosen.

    Raises:
        InputError: If ASTRA is not installed, the geometries do not fit each other or the projector, pixels are not
            squares, or the projector needs a GPU and there is none.
    """

    # Three numbers for volumes: wider than the pairs of the base class.
    domain_shape: tuple[int, ...]
    range_shape: tuple[int, ...]

    def __init__(
        self,
        volume_geometry: Mapping[str, Any],
        projection_geometry: Mapping[str, Any],
        projector: str | None = None,
    ) -> None:
        astra = _require_astra()
        kind, known = projection_geometry.get("type"), _PLANE | _SPACE
        sizes = {"GridRowCount", "GridColCount"} | ({"GridSliceCount"} if kind in _SPACE else set())
        if kind not in known or {n for n in volume_geometry if n.startswith("Grid")} != sizes:
            raise InputError(
                f"Got a projection geometry of type {kind!r} and a volume geometry with {', '.join(volume_geometry)}; "
                f"make both, of one dimension, by astra.create_vol_geom and create_proj_geom ({', '.join(known)})."
            )
        projector = projector or known[kind]
        if kind in _PLANE:
            _check_squares(volume_geometry)
        if projector.startswith("cuda") and not astra.use_cuda():
            raise InputError(
                f"The projector {projector!r} of {kind!r} needs an ASTRA with CUDA and an NVIDIA GPU, and one of "
                "them is missing; use a machine that has both, or measure slices with a parallel or fan beam."
            )
        # Copies, because a geometry that is changed later would no longer have these shapes.
        copies = copy.deepcopy((dict(volume_geometry), dict(projection_geometry)))
        try:
            domain, measured = (tuple(map(int, astra.functions.geom_size(g))) for g in copies)
            created = astra.create_projector(projector, *copies[::-1])
        # Its classes of errors depend on the version.
        except Exception as error:
            raise InputError(
                f"ASTRA refuses the projector {projector!r} with the geometry {kind!r} ({error}); check the numbers in "
                "both geometries, and that this projector is made for this geometry."
            ) from error
        (astra.projector if kind in _PLANE else astra.projector3d).delete(created)
        # The base class is annotated with pairs; what it does with them also holds for triples.
        super().__init__((domain[-2], domain[-1]), (measured[-2], measured[-1]))
        self.domain_shape, self.range_shape = domain, measured
        self.volume_geometry, self.projection_geometry = copies
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        """Integrate along the rays ``(..., *domain_shape)``."""
        _check_last_axes("image or volume", x, self.domain_shape)
        return apply_linear(x, self.project, self.backproject)

    def adjoint(self, y: Tensor) -> Tensor:
        """Backproject ``(..., *range_shape)``; on a GPU this is only roughly the adjoint."""
        _check_last_axes("sinogram", y, self.range_shape)
        return apply_linear(y, self.backproject, self.project)

    def solve(self, b: Tensor, rho: float | int, init: Tensor | None = None) -> Tensor:
        """See :meth:`LinearOperator.solve`; in float32, beyond which the residual is ASTRA's rounding."""
        return super().solve(b.float(), rho, init if init is None else init.float()).to(b)

    def initial(self, y: Tensor) -> Tensor:
        """Twenty steps of conjugate gradients on the normal equations."""
        b = self.adjoint(y)
        return conjugate_gradients(lambda x: self.adjoint(self(x)), b, max_iterations=20)

    def normal_spectrum(self, shape: Shape) -> Tensor:
        """See :meth:`Projector.normal_spectrum`; of images only."""
        if len(self.domain_shape) != 2:
            raise InputError(
                f"The operator measures volumes {self.domain_shape}, not images; use patchflow.minimize instead."
            )
        return super().normal_spectrum(shape)

    def project(self, x: Tensor) -> Tensor:
        """Line integrals of ``(..., *domain_shape)``, without a gradient."""
        return self._run("FP", "VolumeDataId", x, self.domain_shape, self.range_shape)

    def backproject(self, y: Tensor) -> Tensor:
        """The adjoint of :meth:`project`, of ``(..., *range_shape)``."""
        return self._run("BP", "ReconstructionDataId", y, self.range_shape, self.domain_shape)

    def _run(
        self, task: str, volume: str, x: Tensor, shape: tuple[int, ...], result: tuple[int, ...]
    ) -> Tensor:
        """Let ASTRA do a task, which knows the image or volume as ``volume``, on each entry of x."""
        astra = _require_astra()
        plane = len(shape) == 2
        images, sinograms = self.volume_geometry, self.projection_geometry
        data = astra.data2d if plane else astra.data3d
        module = astra.projector if plane else astra.projector3d
        task = task + ("" if plane else "3D") + ("_CUDA" if "cuda" in self.projector else "")
        inputs = x.detach().to("cpu", torch.float32).reshape(-1, *shape).contiguous().numpy()
        outputs = np.zeros((len(inputs), *result), dtype=np.float32)
        # Nothing in ASTRA outlives the call: its objects are numbers, which the copy of a module would free again.
        with contextlib.ExitStack() as call:
            projector = astra.create_projector(self.projector, sinograms, images)
            call.callback(module.delete, projector)
            for pair in zip(inputs, outputs, strict=True):
                image, sinogram = pair if task.startswith("FP") else pair[::-1]
                settings: dict[str, Any] = {"type": task, "ProjectorId": projector}
                with contextlib.ExitStack() as entry:
                    settings[volume] = data.link("-vol", images, image)
                    entry.callback(data.delete, settings[volume])
                    linked = data.link("-sino", sinograms, sinogram)
                    entry.callback(data.delete, linked)
                    algorithm = astra.algorithm.create(settings | {"ProjectionDataId": linked})
                    entry.callback(astra.algorithm.delete, algorithm)
                    astra.algorithm.run(algorithm)
        return torch.from_numpy(outputs).view(*x.shape[: x.ndim - len(shape)], *result).to(x)


def astra_parallel_beam(operator: ParallelBeam, projector: str = "linear") -> AstraProjector:
    """The geometry of a parallel beam, measured by ASTRA.

    Args:
        operator: The beam, of which only the geometry is used.
        projector: ``"linear"`` is Joseph's method, as in :class:`ParallelBeam`, and gives the same numbers; ``"strip"``
            integrates over the width of a bin, ``"line"`` has the length in each pixel; ``"cuda"`` needs a GPU.

    Raises:
        InputError: See :class:`AstraProjector`.
    """
    normal, along = _directions(operator.angles)
    vectors = np.concatenate((-along, operator.offset * normal, operator.spacing * normal), 1)
    create = _require_astra().create_proj_geom
    geometry = create("parallel_vec", operator.range_shape[1], vectors)
    return AstraProjector(_volume(operator.domain_shape, operator.pixel), geometry, projector)


def astra_fan_beam(operator: FanBeam, projector: str = "line_fanflat") -> AstraProjector:
    """The geometry of a fan beam, measured by ASTRA.

    Args:
        operator: The beam, of which only the geometry is used.
        projector: ``"line_fanflat"`` has the length in each pixel, ``"strip_fanflat"`` (only without offset) integrates
            over the width of a bin, ``"cuda"`` needs a GPU. None of the CPU's is the method of :class:`FanBeam`.

    Raises:
        InputError: See :class:`AstraProjector`.
    """
    create, bins = _require_astra().create_proj_geom, operator.range_shape[1]
    if operator.offset:
        normal, along = _directions(operator.angles)
        centre = operator.detector * along + operator.offset * normal
        vectors = np.concatenate((-operator.source * along, centre, operator.spacing * normal), 1)
        geometry = create("fanflat_vec", bins, vectors)
    else:
        # Strips need the geometry without vectors; a quarter turn takes our axes to ASTRA's.
        angles = operator.angles.cpu().double().numpy() - math.pi / 2
        distances = operator.source, operator.detector
        geometry = create("fanflat", operator.spacing, bins, angles, *distances)
    return AstraProjector(_volume(operator.domain_shape, operator.pixel), geometry, projector)


def astra_cone_beam(
    shape: tuple[int, int, int],
    angles: Tensor,
    detector_shape: Shape,
    *,
    source: float | int,
    detector: float | int,
    spacing: float | int,
    pixel: float | int = 1.0,
) -> AstraProjector:
    """A point source and a flat detector that turn around a volume; needs a GPU.

    Volumes are (batch, channels, slices, height, width), sinograms (batch, channels, rows, angles, bins). The rows go
    up as the slices do. In the plane of the source it is a :class:`FanBeam`.

    Args:
        shape: Slices, height and width of the volume.
        angles: The angles in radians (angles,).
        detector_shape: Rows and bins of the detector.
        source: The distance from the source to the axis of rotation.
        detector: The distance from the axis of rotation to the detector; 0 is a virtual detector there.
        spacing: Width and height of a bin.
        pixel: Side length of a voxel.

    Raises:
        InputError: If ASTRA or a GPU is missing, or a number is refused by :class:`FanBeam` or by ASTRA.
    """
    rows, bins = detector_shape
    # Its checks; what is wrong with the third axis ASTRA says.
    fan = FanBeam(
        shape[1:], angles, bins, source=source, detector=detector, spacing=spacing, pixel=pixel
    )
    # In three dimensions y is p_0, in two its negative.
    normal, along = (np.pad(v * (1, -1), ((0, 0), (0, 1))) for v in _directions(fan.angles))
    up = np.tile((0.0, 0.0, fan.spacing), (len(angles), 1))
    vectors = np.concatenate((-source * along, detector * along, spacing * normal, up), 1)
    geometry = _require_astra().create_proj_geom("cone_vec", rows, bins, vectors)
    return AstraProjector(_volume(shape, fan.pixel), geometry)


def _require_astra() -> Any:
    try:
        import astra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("This needs ASTRA: run pip install 'patchflow[astra]'.") from error
    return astra


def _volume(shape: tuple[int, ...], pixel: float) -> dict[str, Any]:
    """The geometry of (height, width) or (slices, height, width), centred."""
    *slices, height, width = shape
    window = [side * n * pixel / 2 for n in (width, height, *slices) for side in (-1, 1)]
    return _require_astra().create_vol_geom(height, width, *slices, *window)


def _directions(angles: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The axis of the detector and the direction of the central ray (angles, 2), in ASTRA's x and y."""
    theta = angles.detach().cpu().double().numpy()
    cosine, sine = np.cos(theta), np.sin(theta)
    return np.stack((sine, -cosine), 1), np.stack((cosine, sine), 1)


def _check_squares(geometry: Mapping[str, Any]) -> None:
    window = geometry.get("option", {})
    sides = []
    for axis, n in ("X", geometry["GridColCount"]), ("Y", geometry["GridRowCount"]):
        low, high = window.get(f"WindowMin{axis}", -n / 2), window.get(f"WindowMax{axis}", n / 2)
        sides.append((high - low) / n)
    # ASTRA 2.5 refuses wide pixels but measures wrong lengths in high ones.
    if not math.isclose(*sides, rel_tol=1e-4):
        raise InputError(
            f"The pixels are {sides[0]:g} wide and {sides[1]:g} high but must be squares; resample the image."
        )


def _check_last_axes(what: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape[x.ndim - len(expected) :]) != expected:
        raise InputError(
            f"The {what} has the shape {tuple(x.shape)} but the operator needs (batch, channels, "
            f"{', '.join(map(str, expected))}); check the order of the axes, and what the operator was made for."
        )
