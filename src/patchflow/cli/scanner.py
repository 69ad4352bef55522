"""A scanner that measures given slices: what ``simulate`` and ``train fbp-unet`` make of their flags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from patchflow.cli.scan import Scan, ScanFlags, kept_angles, midpoints, read_scan
from patchflow.cli.slices import Slices, check_grey
from patchflow.errors import InputError
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.problems.simulated_scan import refined
from patchflow.problems.tomography import ParallelBeam

# Pixels of the finer grid per pixel of the image, at least.
_FINER = 2


class Scanner(NamedTuple):
    """A geometry and a dose.

    Attributes:
        fine: The projector that measures, on a finer grid than that of the slices.
        size: Pixels along a side of the slices.
        photons: Mean number of photons per bin without an object.
    """

    fine: ParallelBeam
    size: int
    photons: float

    @property
    def operator(self) -> ParallelBeam:
        """The projector on the grid of the slices."""
        return refined(self.fine, (self.size, self.size))

    @property
    def view(self) -> float:
        """The side of the slices in metres."""
        return self.fine.pixel * self.fine.domain_shape[0]


def check_angles_flag(flags: ScanFlags) -> None:
    """Refuse flags without a number of angles, before anything is read.

    Raises:
        InputError: As said.
    """
    if flags.angles is None:
        raise InputError("ct needs --angles, the number of angles over 180 degrees, such as 1000.")


def scanner_for(
    found: Slices,
    names: Sequence[str],
    flags: ScanFlags,
    scan: str | None,
    bins: int | None,
    fine: int | None,
) -> Scanner:
    """The scanner of a sinogram that was taken so, or else that of the flags; what is assumed is printed.

    Args:
        found: The slices.
        names: Their files.
        flags: What the flags say about the scan, beside or instead of a sinogram.
        scan: The sinogram's file.
        bins: As in :func:`scanner_of`.
        fine: As in :func:`scanner_of`.

    Raises:
        InputError: As :func:`scanner_of` and :func:`scanner_like`, and if a flag says something else than the files.
    """
    if scan is None:
        return scanner_of(found, names, flags, bins, fine)
    if bins is not None:
        raise InputError(f"--bins {bins} says nothing beside --scan, which has its bins.")
    # The data set of HDF5 slices is not that of the sinogram.
    read = read_scan(scan, replace(flags, dataset=None))
    print(*read.notes, sep="\n", end="\n" if read.notes else "")
    return scanner_like(found, read, fine)


def scanner_of(
    found: Slices, names: Sequence[str], flags: ScanFlags, bins: int | None, fine: int | None
) -> Scanner:
    """The scanner of the flags, as LoDoPaB's where they say nothing.

    Args:
        found: The slices.
        names: Their files.
        flags: What the flags say about the scan.
        bins: Number of detector bins; by default one per pixel of the diagonal, an odd number.
        fine: Pixels along a side of the finer grid, 1000 by default or twice the image.

    Raises:
        InputError: If the slices are not grey squares of one size, a number is missing, or the grid is not finer.
    """
    check_angles_flag(flags)
    directions = midpoints(flags.angles or 0)
    if flags.limited is not None:
        directions = directions[kept_angles(directions, flags.limited)]
    size = _size(found)
    if flags.size not in (None, size):
        raise InputError(
            f"{found.names[0]} has {size} x {size} pixels but --size is {flags.size}; leave the flag out, or resample "
            "the slices."
        )
    view = _field_of_view(names, found, size, flags.field_of_view)
    bins = 2 * math.ceil(size / math.sqrt(2)) + 1 if bins is None else bins
    fine = _fine(size, fine)
    operator = ParallelBeam(
        (fine, fine),
        directions,
        bins,
        pixel=view / fine,
        spacing=math.sqrt(2) * view / bins,
    )
    photons = lodopab.PHOTONS if flags.photons is None else flags.photons
    return Scanner(operator, size, photons)


def scanner_like(found: Slices, scan: Scan, fine: int | None) -> Scanner:
    """The scanner that took a sinogram.

    Args:
        found: The slices.
        scan: The sinogram.
        fine: As in :func:`scanner_of`.

    Raises:
        InputError: If the slices have other pixels than the scan, or the grid is not finer.
    """
    size = _size(found)
    shape = scan.operator.domain_shape
    if shape != (size, size):
        raise InputError(
            f"{found.names[0]} has {size} x {size} pixels but the scan is of {shape[0]} x {shape[1]}; resample the "
            "slices."
        )
    fine = _fine(size, fine)
    return Scanner(refined(scan.operator, (fine, fine)), size, scan.photons)


def _fine(size: int, fine: int | None) -> int:
    fine = max(lodopab.FINE, _FINER * size) if fine is None else fine
    if fine <= size:
        raise InputError(
            f"--fine is {fine} but the image has {size} pixels along a side; the measured grid must be finer than that "
            "of the reconstruction, which would otherwise be too easy."
        )
    return fine


def _size(found: Slices) -> int:
    check_grey(found)
    first = found.images[0]
    for image, name in zip(found.images, found.names, strict=True):
        height, width = image.shape[2:]
        if height != width or image.shape != first.shape:
            raise InputError(
                f"{name} has {height} x {width} pixels but square slices of one size are needed (the first has "
                f"{first.shape[2]} x {first.shape[3]}); crop or pad it."
            )
    return first.shape[2]


def _field_of_view(images: Sequence[str], found: Slices, size: int, flag: float | None) -> float:
    if found.series is None:
        if flag is None:
            raise InputError(
                f"{images[0]} does not say how large the image is; give --field-of-view, its side in metres."
            )
        return flag
    down, across = found.series.spacing
    if not math.isclose(down, across, rel_tol=1e-3):
        raise InputError(
            f"{images[0]} has pixels of {down:g} x {across:g} mm but square ones are needed; resample it."
        )
    view = down * size / 1000
    if flag is not None and not math.isclose(flag, view, rel_tol=1e-3):
        raise InputError(
            f"{images[0]} has {size} pixels of {down:g} mm, together {view:g} m, but --field-of-view is {flag:g}; "
            "leave the flag out."
        )
    return view
