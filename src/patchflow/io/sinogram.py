r"""Sinograms on disk: line integrals with the geometry and the dose that they were measured with.

A sinogram holds post-log values, :math:`-\log(N / N_0) / s` with counts :math:`N`, photons :math:`N_0` and a scale
:math:`s`; the slices of a file share its metadata. HDF5 files hold both: the data set ``data`` of shape (slices,
angles, bins), its attributes ``detector_spacing`` [m], ``pixel_spacing`` [m], ``image_shape``, ``photons``,
``attenuation_scale`` [1/m] and ``offset`` [m], each with its unit in ``*_units``, and beside it the data set ``angles``
[rad]. Beside ``theta`` [degrees], as in Data Exchange files (De Carlo et al., 2014, https://dxfile.readthedocs.io), the
data are projections, (angles, slices, bins), unless their attribute ``axes`` is ``y:theta:x``; counts are refused.
Attributes of the file itself go for every data set. All metadata is optional; NumPy and TIFF files have none.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import read_bytes, write_bytes
from patchflow.io.codecs import decode
from patchflow.io.hdf5 import (
    EXTENSIONS,
    as_stack,
    check_unit,
    choose_dataset,
    open_hdf5,
    read_array,
    read_number,
    read_shape,
    require_h5py,
)

_FORMAT = 1
_READABLE = (*EXTENSIONS, ".npy", ".tif", ".tiff")
# The numbers among the attributes and their units.
_UNITS = {
    "detector_spacing": "m",
    "pixel_spacing": "m",
    "photons": "photons/bin",
    "attenuation_scale": "1/m",
    "offset": "m",
}
_SHAPE_UNIT = "pixels"


@dataclass(frozen=True, eq=False)
class Sinogram:
    r"""Line integrals of slices with one geometry; what is not known is None.

    Attributes:
        data: The values :math:`-\log(N / N_0) / s`, (slices, 1, angles, bins), float32.
        angles: The directions in radians, (angles,), float64.
        detector_spacing: The width of a bin in metres.
        pixel_spacing: The width of a pixel of the image in metres.
        image_shape: The (height, width) of the image in pixels.
        photons: The mean number :math:`N_0` of photons for each bin without an object.
        attenuation_scale: The attenuation in 1/m that an image value of 1 stands for.
        offset: How far the detector's centre lies from the axis of rotation, in metres.

    Raises:
        InputError: The data are empty, of another shape or not finite, the angles do not fit them
            or :func:`check_angles` refuses them, or a length, count or scale is not positive.
    """

    data: Tensor
    angles: Tensor | None = None
    detector_spacing: float | int | None = None
    pixel_spacing: float | int | None = None
    image_shape: tuple[int, int] | None = None
    photons: float | int | None = None
    attenuation_scale: float | int | None = None
    offset: float | int | None = None

    def __post_init__(self) -> None:
        for fault in _faults(self):
            raise InputError(fault)
        if self.angles is not None:
            check_angles(self.angles)


def check_angles(angles: Tensor) -> None:
    """Check that angles can be radians: that they are finite and run once around at most.

    Args:
        angles: The angles in radians, of any shape.

    Raises:
        InputError: There are none, some are not finite, or they span more than a full turn (and
            1 %, because an end point may be there twice), as degrees do.
    """
    if angles.numel() == 0:
        raise InputError("There are no angles, but at least one is needed: give the directions.")
    bad = int((~torch.isfinite(angles)).sum())
    if bad:
        raise InputError(
            f"{bad} of {angles.numel()} angles are NaN or infinite, but all have to be finite: "
            "correct them."
        )
    low, high = float(angles.min()), float(angles.max())
    turns = (high - low) / (2 * math.pi)
    if turns > 1.01:
        raise InputError(
            f"The angles run from {low:g} to {high:g}, which as radians is {turns:.3g} turns; they "
            "are probably degrees: multiply them by pi / 180, or take radians modulo 2 pi."
        )


def read_sinogram(path: str | Path, *, dataset: str | None = None) -> Sinogram:
    """Read a sinogram; one of two axes (angles, bins) is a single slice.

    Args:
        path: A .h5 or .hdf5 file in the layout of this module, a .npy file of shape (angles, bins)
            or (slices, angles, bins), or a .tif or .tiff file whose pages are slices.
        dataset: The data set of an HDF5 file; without it, ``"data"``, else the only one of two or
            three axes that holds numbers.

    Returns:
        The sinogram, with the metadata that the file has.

    Raises:
        InputError: The file is missing, damaged or of another format, the data set is not to be
            found, values are integers, or they are not a :class:`Sinogram`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _READABLE:
        remedy = "save its array as .npy" if suffix == ".npz" else "convert it to one of these"
        raise InputError(
            f"{path} has the extension '{suffix}', but a sinogram is one of "
            f"{', '.join(_READABLE)}: {remedy}."
        )
    if suffix in EXTENSIONS:
        return _read_hdf5(path, dataset)
    if dataset is not None:
        raise InputError(
            f"{path} has no datasets to choose '{dataset}' from, only .h5 and .hdf5 files have: "
            "leave out --dataset."
        )
    content = read_bytes(path, "sinogram")
    return Sinogram(
        _line_integrals(_npy(content, path) if suffix == ".npy" else _tiff(content, path), path)
    )


def write_sinogram(path: str | Path, sinogram: Sinogram) -> None:
    """Write a sinogram with its metadata as HDF5, whole or not at all.

    Args:
        path: A .h5 or .hdf5 file.
        sinogram: The sinogram; data are stored as float32 and angles as float64.

    Raises:
        InputError: The extension is another one, h5py is not installed, or the disk refuses.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in EXTENSIONS:
        raise InputError(
            f"{path} has the extension '{suffix}', but sinograms are written as "
            f"{' or '.join(EXTENSIONS)}: choose one of these."
        )
    values = sinogram.data.detach().cpu().to(torch.float32).squeeze(1).numpy()
    # In memory first: what HDF5 raises on a full disk is not an OSError with a number.
    buffer = io.BytesIO()
    with require_h5py(path).File(buffer, "w") as file:
        file.attrs["patchflow_format"] = _FORMAT
        chunks = (1, *values.shape[1:])
        data = file.create_dataset("data", data=values, chunks=chunks, compression="gzip")
        for name, value in _numbers(sinogram).items():
            if value is not None:
                data.attrs[name] = np.float64(value)
                data.attrs[f"{name}_units"] = _UNITS[name]
        if sinogram.image_shape is not None:
            data.attrs["image_shape"] = np.array(sinogram.image_shape, np.int64)
            data.attrs["image_shape_units"] = _SHAPE_UNIT
        if sinogram.angles is not None:
            angles = sinogram.angles.detach().cpu().to(torch.float64).numpy()
            file.create_dataset("angles", data=angles).attrs["units"] = "rad"
    write_bytes(path, buffer.getbuffer())


def _numbers(sinogram: Sinogram) -> dict[str, float | int | None]:
    return {name: getattr(sinogram, name) for name in _UNITS}


def _faults(sinogram: Sinogram) -> Iterator[str]:
    data, angles = sinogram.data, sinogram.angles
    shape = tuple(data.shape)
    if len(shape) != 4 or shape[1] != 1 or 0 in shape:
        yield (
            f"A sinogram has the shape {shape}, but (slices, 1, angles, bins) is needed: reshape."
        )
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        yield (
            f"A sinogram has {bad} NaN or infinite value(s) out of {data.numel()}, but all have to "
            "be finite: raise zero counts before taking the logarithm."
        )
    if angles is not None and tuple(angles.shape) != shape[2:3]:
        yield (
            f"Angles of shape {tuple(angles.shape)} do not fit data with {shape[2]} angles: give "
            "one for each."
        )
    for name, value in _numbers(sinogram).items():
        positive = name != "offset"
        if value is None or (math.isfinite(value) and (value > 0 or not positive)):
            continue
        needed = "positive finite" if positive else "finite"
        needed += f" number [{_UNITS[name]}]"
        yield f"The {name} is {value:g}, but a {needed} is needed: correct it."
    if sinogram.image_shape is not None and min(sinogram.image_shape) < 1:
        yield (
            f"The image_shape is {sinogram.image_shape}, but a positive height and width are "
            "needed: correct it."
        )


def _line_integrals(array: np.ndarray, path: Path) -> Tensor:
    # Read as line integrals, raw counts would give an image of nonsense without any error.
    if array.dtype.kind in "iu":
        raise InputError(
            f"{path} holds integers ({array.dtype}), as raw counts are, but floating-point line "
            "integrals are needed: convert counts by -log(counts / photons) / scale."
        )
    return as_stack(array, path)


def _npy(content: bytes, path: Path) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    # NumPy's parser raises whatever it runs into; to a user it is all one thing.
    except Exception as error:
        raise InputError(
            f"{path} is not a NumPy array of numbers or is damaged, but a sinogram is needed: save "
            "it again."
        ) from error


def _tiff(content: bytes, path: Path) -> np.ndarray:
    pages = decode(content, "TIFF", path)
    if pages.shape[3] != 1:
        raise InputError(
            f"{path} has pages of {pages.shape[3]} channels, but a sinogram has one: save each "
            "slice as a grey page."
        )
    return pages[..., 0]


def _read_hdf5(path: Path, dataset: str | None) -> Sinogram:
    with open_hdf5(path, "sinogram") as file:
        if (version := read_number(file.attrs, "patchflow_format", path) or 0) > _FORMAT:
            remedy = f"but this version reads {_FORMAT}: upgrade patchflow."
            raise InputError(f"{path} has the format {version:g}, {remedy}")
        chosen = choose_dataset(file, dataset, path)
        own = dict(chosen.attrs)
        attributes = {k: v for k, v in file.attrs.items() if k.removesuffix("_units") not in own}
        attributes |= own
        array = read_array(chosen, path)
        theta = "theta" in chosen.parent and "angles" not in (*chosen.parent, *attributes)
        if theta and array.ndim == 3 and _angle_first(attributes):
            array = array.swapaxes(0, 1)
        data, angles = _line_integrals(array, path), _angles(chosen, attributes, theta, path)
    numbers = {name: read_number(attributes, name, path, unit) for name, unit in _UNITS.items()}
    image_shape = read_shape(attributes, "image_shape", path, _SHAPE_UNIT)
    try:
        return Sinogram(data, angles, image_shape=image_shape, **numbers)
    except InputError as error:
        raise InputError(f"{path} is not a sinogram that can be used: {error}") from error


def _angle_first(attributes: dict[str, Any]) -> bool:
    """Whether a stack of a Data Exchange file is one of projections, as by default."""
    axes = attributes.get("axes", "theta:y:x")
    named = axes.decode(errors="replace") if isinstance(axes, bytes) else str(axes)
    return named.startswith("theta")


def _angles(chosen: Any, attributes: dict[str, Any], theta: bool, path: Path) -> Tensor | None:
    known, factor = ("rad", "radian", "radians"), 1.0
    if theta:
        known, factor = ("degrees", "degree", "deg"), math.pi / 180
    if (beside := chosen.parent.get("theta" if theta else "angles")) is not None:
        values, unit = beside[()], beside.attrs.get("units")
    elif "angles" in attributes:
        values, unit = attributes["angles"], attributes.get("angles_units")
    else:
        return None
    check_unit("angles", unit, known, path)
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise InputError(
            f"{path} has angles of type {array.dtype}, but numbers [rad] are needed: save them so."
        )
    return torch.from_numpy(factor * np.ascontiguousarray(array, np.float64))
