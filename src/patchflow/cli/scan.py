"""A scan: the sinogram of a file, its geometry and its dose, of the file and of the flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.sinogram import Sinogram, read_sinogram
from patchflow.numerics.ramp import covered_degrees, misses_directions
from patchflow.problems.attenuation import MU_MAX
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.tomography import ParallelBeam

Value = TypeVar("Value")

# Numbers of a file and of a flag that were rounded differently agree.
_TOLERANCE = 1e-3
# No scanner is wider, in metres: such a number is in millimetres.
_WIDEST = 3.0
# Bins without a photon count as 0.1 or so; exp(-10) photons are no measurement.
_DARKEST = 10.0


@dataclass(frozen=True)
class ScanFlags:
    """What the flags say about a scan; None where they say nothing.

    Attributes:
        angles: Number of angles, equally spaced over 180 degrees, before some are left out.
        photons: Mean number of photons per bin without an object.
        size: Pixels along a side of the image.
        field_of_view: Side of the image in metres.
        limited: Angles A:B to keep, in degrees.
        dataset: The data set of an HDF5 file that has several.
    """

    angles: int | None = None
    photons: float | None = None
    size: int | None = None
    field_of_view: float | None = None
    limited: str | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--angles", self.angles), ("--size", self.size)):
            if value is not None and value < 2:
                raise InputError(f"{flag} is {value} but must be at least 2; correct it.")
        if self.photons is not None and not 0 < self.photons < math.inf:
            raise InputError(
                f"--photons is {self.photons:g} but must be positive: the photons per bin without an object."
            )
        if self.field_of_view is not None and not 0 < self.field_of_view <= _WIDEST:
            raise InputError(
                f"--field-of-view is {self.field_of_view:g} but must be positive and at most {_WIDEST:g}; give the "
                "side of the image in metres, for example 0.26."
            )


@dataclass(frozen=True, eq=False)
class Scan:
    """A measurement and its law.

    Attributes:
        y: Line integrals (slices, 1, angles, bins) of images in units of the largest attenuation.
        operator: The projector of the kept angles.
        photons: Mean number of photons per bin without an object.
        notes: What was assumed because neither the file nor a flag says it.
    """

    y: Tensor
    operator: ParallelBeam
    photons: float
    notes: tuple[str, ...]

    @property
    def likelihood(self) -> Likelihood:
        """The law of the measurement given an image."""
        return Likelihood(self.operator, PoissonNoise(self.photons, MU_MAX))

    @property
    def covered(self) -> float:
        """The share of the half turn that was measured, in degrees."""
        return covered_degrees(self.operator.angles)

    @property
    def limited(self) -> bool:
        """Whether directions are missing."""
        return misses_directions(self.operator.angles)


def read_scan(path: str, flags: ScanFlags) -> Scan:
    """Read a sinogram, and complete its metadata by the flags.

    Args:
        path: The file.
        flags: What the flags say.

    Raises:
        InputError: If the file cannot be read, a flag contradicts it, neither says what is needed, the values are no
            line integrals, or no angle is kept.
    """
    found = read_sinogram(path, dataset=flags.dataset)
    rows, bins = found.data.shape[2:]
    notes = []
    angles = found.angles
    said = _said_angles(path, (rows, bins), flags, known=angles is not None)
    if angles is None:
        needed = "the number of angles, equally spaced over 180 degrees"
        angles = _required(said, "--angles", needed, path)
        notes.append(
            f"The angles are the midpoints of {flags.angles} equal parts of 180 degrees, as in LoDoPaB."
        )
    shape, pixel = _grid(path, found, flags)
    photons = _photons(path, found, flags)
    spacing = found.detector_spacing
    if spacing is None:
        spacing = math.sqrt(2) * max(shape) * pixel / bins
        notes.append(
            f"The detector is {spacing * bins:.4g} m wide, the diagonal of the image, as in LoDoPaB."
        )
    scale = found.attenuation_scale
    if scale is None:
        scale = MU_MAX
        notes.append(f"The line integrals are divided by {MU_MAX:.2f}/m, as in LoDoPaB.")
    _check_values(path, found.data, photons, scale)
    kept = slice(None) if flags.limited is None else kept_angles(angles, flags.limited)
    if found.angles is None and len(angles[kept]) < rows:
        notes.append(
            f"{rows - len(angles[kept])} of the {rows} measured angles are left out, those outside of --limited "
            f"{flags.limited}; if the file has only these, give --angles of all 180 degrees."
        )
    operator = ParallelBeam(
        shape,
        angles[kept],
        bins,
        pixel=pixel,
        spacing=spacing,
        offset=0.0 if found.offset is None else found.offset,
    )
    y = (found.data[:, :, kept] * (scale / MU_MAX)).to(torch.get_default_dtype())
    return Scan(y, operator, photons, tuple(notes))


def _said_angles(
    path: str, found: tuple[int, int], flags: ScanFlags, *, known: bool
) -> Tensor | None:
    """The angles of the flags: all, or only those kept if the file has no others; None without --angles."""
    rows, bins = found
    if flags.angles is None:
        return None
    angles = midpoints(flags.angles)
    if flags.angles == rows:
        return angles
    if flags.limited is not None:
        angles = angles[kept_angles(angles, flags.limited)]
        if len(angles) == rows:
            return angles
    remedy = "correct one"
    if flags.angles == bins:
        remedy = "its axes are exchanged: transpose it"
    elif known:
        remedy = "leave --angles out, since the file says its angles"
    raise InputError(
        f"{path} has {rows} angles x {bins} bins but --angles is {flags.angles}; {remedy}."
    )


def midpoints(angles: int) -> Tensor:
    """The midpoints of equal parts of 180 degrees, in radians."""
    return (torch.arange(angles, dtype=torch.float64) + 0.5) * (math.pi / angles)


def kept_angles(angles: Tensor, text: str) -> Tensor:
    """Which angles lie between A and B degrees; those that differ by 180 degrees are the same.

    Args:
        angles: The angles in radians.
        text: A:B.

    Returns:
        A mask.

    Raises:
        InputError: If the text is not A:B with 0 <= A < B <= 180, or no angle is left.
    """
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = 0.0
    if not 0 <= low < high <= 180:
        raise InputError(
            f"--limited is {text!r} but must be A:B in degrees with 0 <= A < B <= 180; write for example 18:162."
        )
    # Rounded, because 180 degrees less a rounding error is 0 degrees.
    degrees = torch.rad2deg(angles.double()).mul(1e9).round().div(1e9) % 180
    kept = (degrees >= low) & (degrees <= high)
    if not bool(kept.any()):
        raise InputError(
            f"--limited {text} keeps none of the {len(angles)} angles, which lie between {float(degrees.min()):.4g} "
            f"and {float(degrees.max()):.4g} degrees; give a range that has some."
        )
    return kept


def _grid(path: str, found: Sinogram, flags: ScanFlags) -> tuple[tuple[int, int], float]:
    shape = found.image_shape
    if shape is None:
        size = _required(flags.size, "--size", "the pixels along a side of the image", path)
        shape = (size, size)
    elif flags.size is not None and shape != (flags.size, flags.size):
        raise InputError(
            f"{path} was measured of an image of {shape[0]} x {shape[1]} pixels but --size is {flags.size}; leave the "
            "flag out, or correct the file."
        )
    width = max(shape)
    pixel = found.pixel_spacing
    if pixel is None:
        meaning = "the side of the image in metres"
        return shape, _required(flags.field_of_view, "--field-of-view", meaning, path) / width
    view = flags.field_of_view
    if view is not None and not math.isclose(view, pixel * width, rel_tol=_TOLERANCE):
        raise InputError(
            f"{path} has {width} pixels of {pixel:g} m, together {pixel * width:g} m, but --field-of-view is {view:g}; "
            "leave the flag out, or correct the file."
        )
    return shape, float(pixel)


def _photons(path: str, found: Sinogram, flags: ScanFlags) -> float:
    if found.photons is None:
        meaning = "the mean number of photons per bin without an object"
        return float(_required(flags.photons, "--photons", meaning, path))
    if flags.photons is not None and not math.isclose(
        flags.photons, found.photons, rel_tol=_TOLERANCE
    ):
        raise InputError(
            f"{path} was measured with {found.photons:g} photons per bin but --photons is {flags.photons:g}; leave the "
            "flag out, or correct the file."
        )
    return float(found.photons)


def _required(value: Value | None, flag: str, meaning: str, path: str) -> Value:
    if value is None:
        raise InputError(f"{path} does not say {meaning}; give {flag}.")
    return value


def _check_values(path: str, data: Tensor, photons: float, scale: float) -> None:
    low, high = float(data.min()) * scale, float(data.max()) * scale
    if high > math.log(photons) + _DARKEST:
        raise InputError(
            f"{path} has the line integral {high:.3g} (the value {high / scale:.3g} times {scale:.4g}/m), which lets "
            f"none of {photons:g} photons pass; give -log(counts / photons) / {scale:.4g}, not counts, or the file's "
            "attenuation_scale."
        )
    # Where nothing absorbs, counting noise makes line integrals a little negative.
    if low < -max(1.0, 8 / math.sqrt(photons)):
        raise InputError(
            f"{path} has the line integral {low:.3g}, which would be {math.exp(min(-low, 700)):.3g} times the "
            f"{photons:g} photons of air; check --photons, and give -log(counts / photons), not counts."
        )
