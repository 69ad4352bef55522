"""Grey slices from the command line: DICOM series, HDF5, TIFF and NumPy stacks, and their units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import read_bytes
from patchflow.io.codecs import decode, format_of
from patchflow.io.dicom import Series, read_series
from patchflow.io.hdf5 import EXTENSIONS, read_hdf5_images
from patchflow.io.images import ValueRange, check_finite, fingerprint, read_stack
from patchflow.problems.attenuation import MU_MAX, from_hounsfield

Units = Literal["normalised", "hu"]
# DICOM files often have no extension.
_DICOM = ("", ".dcm", ".dicom", ".ima")
# Reconstructions leave [0, 1] a little, where nothing held them back.
SLACK = 0.25
# Air is at -1000 HU.
_AIR = -100.0


class Slices(NamedTuple):
    """Images of files.

    Attributes:
        images: The images, each (1, channels, height, width), in [0, 1]: of CT in units of the largest attenuation.
        names: What to call each image in a message.
        series: The series of DICOM files.
        note: What was converted, or empty.
        prints: Of slices in Hounsfield units, the fingerprints of these: of the same slices by whatever file, and
            without the noise that undoes their rounding. Empty for others.
    """

    images: list[Tensor]
    names: list[str]
    series: Series | None = None
    note: str = ""
    prints: Sequence[str] = ()


def read_slices(
    paths: Sequence[str],
    *,
    units: Units = "normalised",
    dataset: str | None = None,
    dither: bool = False,
    value_range: ValueRange | None = None,
    grey: bool = False,
    slack: float = 0.0,
) -> Slices:
    """Read all images of all files.

    Args:
        paths: Files of one kind: DICOM files or folders of one series, or image files and HDF5 files.
        units: Of image and HDF5 files: Hounsfield units, or values that are in [0, 1] as they are. DICOM files are in
            Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        dither: Undo the rounding of Hounsfield units to integers by noise, see
            :func:`patchflow.problems.attenuation.from_hounsfield`.
        value_range: The values that become 0 and 1, see :func:`patchflow.io.images.read_stack`.
        grey: Convert colour images to grey.
        slack: How far normalised values may leave [0, 1].

    Raises:
        InputError: If a file cannot be read, the kinds are mixed, or the values do not have the units.
    """
    dicom = [path for path in paths if is_dicom(path)]
    if dicom and len(dicom) < len(paths):
        other = next(path for path in paths if not is_dicom(path))
        raise InputError(
            f"{dicom[0]} is a DICOM file or folder but {other} is not; give files of one kind."
        )
    if (dicom or units == "hu") and value_range is not None:
        raise InputError(
            f"{paths[0]} is in Hounsfield units, which have their own range; leave out --range."
        )
    if dicom:
        return _read_dicom(dicom, dither)
    images, names, notes, prints = [], [], [], []
    for path in paths:
        if units == "hu":
            hu = _read_hounsfield(path, dataset)
            notes.append(_converted(path, hu))
            prints += _prints(hu)
            stack = _from_hounsfield(hu, path, dither)
        else:
            stack = _read_normalised(path, dataset, value_range, grey, slack)
        images += stack.split(1)
        names += [path] if len(stack) == 1 else [f"{path}, image {k}" for k in _numbers(stack)]
    return Slices(images, names, None, "\n".join(notes), prints)


def read_reference(path: str, units: Units) -> Slices:
    """Read slices to compare with: nothing is dithered, and they may leave [0, 1] a little.

    Raises:
        InputError: As :func:`read_slices`, and if the images are in colour.
    """
    found = read_slices([path], units=units, slack=SLACK)
    check_grey(found)
    return found


def check_grey(slices: Slices) -> None:
    """Refuse what no CT slice is.

    Raises:
        InputError: If an image has another number of channels than one.
    """
    for image, name in zip(slices.images, slices.names, strict=True):
        if image.shape[1] != 1:
            raise InputError(
                f"{name} has {image.shape[1]} channels but a CT slice has one; save it as a grey image."
            )


def is_dicom(path: str) -> bool:
    """Whether a path is meant as DICOM: a folder, or a file with no extension or one of DICOM's."""
    return Path(path).is_dir() or Path(path).suffix.lower() in _DICOM


def _read_dicom(paths: Sequence[str], dither: bool) -> Slices:
    series = read_series(list(paths))
    label = paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
    images = _from_hounsfield(series.hu, label, dither)
    note = f"{_converted(label, series.hu)} Pixels of {series.spacing[0]:g} x {series.spacing[1]:g} mm."
    names = [f"{label}, slice {k}" for k in _numbers(images)]
    return Slices(list(images.split(1)), names, series, note, _prints(series.hu))


def _prints(hu: Tensor) -> list[str]:
    return [fingerprint([slice_.float()]) for slice_ in hu.split(1)]


def _numbers(stack: Tensor) -> list[int]:
    return [k + 1 for k in range(len(stack))]


def _converted(label: str, hu: Tensor) -> str:
    return (
        f"{label}: {len(hu)} slice(s) from {float(hu.min()):g} to {float(hu.max()):g} HU, converted to attenuation in "
        f"units of {MU_MAX:.2f}/m, cut off at 0 and 1."
    )


def _from_hounsfield(hu: Tensor, label: str, dither: bool) -> Tensor:
    # Only integers were rounded.
    dither = dither and bool((hu == hu.round()).all())
    try:
        return from_hounsfield(hu, dither=dither)
    except InputError as error:
        raise InputError(f"{label} cannot be used: {error}") from error


def _read_hounsfield(path: str, dataset: str | None) -> Tensor:
    if Path(path).suffix.lower() in EXTENSIONS:
        return read_hdf5_images(path, dataset)
    array = decode(read_bytes(path, "image"), format_of(Path(path)), Path(path))
    if array.shape[3] != 1 or array.dtype.kind not in "if":
        raise InputError(
            f"{path} holds {array.dtype} values in {array.shape[3]} channel(s), but Hounsfield units are signed "
            "integers or floating-point numbers in one; save them so, or say --units normalised."
        )
    hu = torch.from_numpy(array[:, None, :, :, 0].astype("float32"))
    check_finite(hu, path)
    return hu


def _read_normalised(
    path: str, dataset: str | None, value_range: ValueRange | None, grey: bool, slack: float
) -> Tensor:
    if Path(path).suffix.lower() not in EXTENSIONS:
        try:
            return read_stack(path, value_range=value_range, grey=grey, slack=slack)
        except InputError:
            _refuse_hounsfield(path)
            raise
    stack = read_hdf5_images(path, dataset)
    if value_range is not None:
        stack = (stack - value_range[0]) / (value_range[1] - value_range[0])
    low, high = float(stack.min()), float(stack.max())
    if low < -slack - 1e-6 or high > 1 + slack + 1e-6:
        raise InputError(
            f"{path} has values from {low:g} to {high:g} but normalised attenuations are in [0, 1]; say --units hu if "
            "they are Hounsfield units, else convert them."
        )
    return stack


def _refuse_hounsfield(path: str) -> None:
    """Say so if values that could not be read as normalised ones look like Hounsfield units."""
    array = decode(read_bytes(path, "image"), format_of(Path(path)), Path(path))
    if array.dtype.kind in "if" and array.size and float(array.min()) < _AIR:
        raise InputError(
            f"{path} has values from {float(array.min()):g} to {float(array.max()):g} but normalised ones are in "
            "[0, 1]; say --units hu if they are Hounsfield units, else declare their --range."
        )
