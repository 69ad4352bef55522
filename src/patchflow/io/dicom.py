"""CT series in DICOM files: read in Hounsfield units, and written back as a derived series.

A file is read only if it says what its numbers mean: its rescale type is HU, or its modality is CT
and it declares no other unit. A missing slope is 1; a missing intercept is 0 only for signed values
of CT, because unsigned ones could not tell air from water. Padding outside the scanner's circle
stays what the rescale makes of it. Nothing is anonymised: a derived series names the patient.

References:
    DICOM PS3.3, sections C.7.6 (image), C.8.2 (CT image) and C.11.1 (rescale).
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import existing_file, read_bytes, write_bytes
from patchflow.io.images import check_finite

_TOLERANCE = 1e-3  # of positions in mm, of spacing and orientation: files hold rounded decimals
# Stored as signed 16 bits, where values from -1024 HU on read the same as unsigned.
_INTERCEPT = -1024
# They describe the source's stored numbers, or sign or depict it: wrong for the derived image.
_STALE = re.compile(
    "PixelPadding|(Smallest|Largest)(Image)?Pixel|RealWorldValueMapping|VOILUTSequence|IconImage|"
    "DigitalSignatures|MACParameters|InstanceCreat|DataSetTrailingPadding"
)
_COUNTS = {"PixelSpacing": 2, "ImageOrientationPatient": 6, "ImagePositionPatient": 3}


@dataclass(frozen=True, eq=False)
class Series:
    """A CT series, its slices in the order of their positions.

    Attributes:
        hu: Hounsfield units, (slices, 1, height, width), float32.
        spacing: The distance of rows and of columns in mm.
        positions: The coordinates of the slices along their normal in mm; NaN where not told.
        headers: The pydicom dataset of each slice, without pixels.
    """

    hu: Tensor
    spacing: tuple[float, float]
    positions: tuple[float, ...]
    headers: tuple[Any, ...]


class _Slice(NamedTuple):
    path: Path
    header: Any
    hu: np.ndarray


def read_series(paths: str | Path | Sequence[str | Path]) -> Series:
    """Read the slices of one CT series.

    They are sorted by their position along the slice normal; without positions, by their instance
    numbers; without these, they stay in the order given (in a folder, that of the names).

    Args:
        paths: DICOM files, and folders, of which all DICOM files are taken, but no folders in them.

    Returns:
        The series.

    Raises:
        InputError: A file is missing, damaged, not DICOM, compressed without a decoder for it, not
            one grey image in Hounsfield units, or unlike the others; or two slices share their place.
    """
    _pydicom()
    given = [paths] if isinstance(paths, (str, Path)) else paths
    slices = [_read_slice(file) for path in given for file in _files(Path(path))]
    if not slices:
        raise InputError("No DICOM file was given, but a series has at least one: name its files.")
    for item in slices[1:]:
        _check_alike(slices[0], item)
    positions = [_position(item) for item in slices]
    known = not any(map(math.isnan, positions))
    numbers = [value for item in slices for value in _numbers(item, "InstanceNumber")]
    keys, name = (positions, "position") if known else (numbers, "InstanceNumber")
    order = list(range(len(slices)))
    if len(keys) == len(slices):
        order.sort(key=lambda i: keys[i])
        for i, j in zip(order, order[1:], strict=False):
            if keys[j] - keys[i] < _TOLERANCE:
                both = f"{slices[i].path} and {slices[j].path} have the same {name} {keys[i]:g}"
                raise InputError(f"{both}, but each slice has its own: give one volume, once.")
    rows, columns = _numbers(slices[0], "PixelSpacing")
    return Series(
        torch.from_numpy(np.stack([slices[i].hu for i in order])[:, None]),
        (rows, columns),
        tuple(positions[i] if known else math.nan for i in order),
        tuple(slices[i].header for i in order),
    )


def write_series(
    folder: str | Path, hu: Float[Tensor, "slices 1 height width"], template: Series, method: str
) -> list[Path]:
    """Write a derived series: new pixels under the headers of the series that they come from.

    Values are rounded to 1 HU and clipped to what 16 bits hold, [-33792, 31743] HU. Geometry,
    patient and study stay; the series and its images get UIDs of their own.

    Args:
        folder: A folder that is empty, or that does not exist in one that does.
        hu: Hounsfield units, one slice for each of the template.
        template: The series as read.
        method: What made the pixels, for the descriptions: at most 64 ASCII characters.

    Returns:
        The files, in the order of the slices.

    Raises:
        InputError: As :func:`check_series_folder`; the shape is not the template's, a value is not
            finite, the method cannot be a description, or the disk refuses. No file is left then.
    """
    check_series_folder(folder)
    if hu.shape != template.hu.shape:
        fault = f"The slices have the shape {tuple(hu.shape)}, not {tuple(template.hu.shape)}"
        raise InputError(f"{fault} as their template: give one of the same size for each of it.")
    check_finite(hu, folder)
    if not re.fullmatch(r"(?=.*\S)[ -\[\]-~]{1,64}", method):
        rule = "one to 64 ASCII characters without a backslash"
        raise InputError(f"The method {method!r} is not {rule}: choose another name.")
    levels = np.rint(hu.detach().cpu().double().numpy()[:, 0]) - _INTERCEPT
    stored = np.clip(levels, -(2**15), 2**15 - 1).astype("<i2")
    series = _pydicom().uid.generate_uid()
    # All are encoded before the first is written, so that a header that cannot be leaves nothing.
    pairs = zip(template.headers, stored, strict=True)
    encoded = [_encode(*pair, method, series) for pair in pairs]
    paths = [Path(folder) / f"slice_{i + 1:04d}.dcm" for i in range(len(encoded))]
    try:
        for path, data in zip(paths, encoded, strict=True):
            write_bytes(path, data, parents=True)
    except BaseException:
        # A part of a series looks like a whole one.
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def check_series_folder(folder: str | Path) -> None:
    """Check that a series can be written to the folder; before long computations.

    Args:
        folder: The folder, which need not exist.

    Raises:
        InputError: pydicom is missing, or the folder is a file, not empty, or in none that exists.
    """
    _pydicom()
    path = Path(folder).absolute()
    if not path.parent.is_dir():
        raise InputError(f"{folder} cannot be made: there is no {path.parent}: create it.")
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        raise InputError(
            f"{folder} is not an empty folder, but a series needs one: name a new one."
        )


def _pydicom() -> Any:
    try:
        import pydicom.pixels
    except ImportError as error:
        raise InputError("There is no pydicom for DICOM: pip install 'patchflow[io]'.") from error
    return pydicom


def _files(path: Path) -> list[Path]:
    is_dicom = _pydicom().misc.is_dicom
    if not path.is_dir():
        if not is_dicom(existing_file(path, "DICOM file")):
            fault = f"{path} is not a DICOM file, because 'DICM' is missing at byte 128"
            raise InputError(f"{fault}: check the name, or rewrite it by dcmconv +F of DCMTK.")
        return [path]
    # A DICOMDIR lists the files of a medium and has no image.
    inside = (p for p in sorted(path.iterdir()) if p.is_file() and p.name.upper() != "DICOMDIR")
    files = [file for file in inside if is_dicom(existing_file(file))]
    if not files:
        raise InputError(f"{path} has no DICOM file, but a series has one: check the folder.")
    return files


def _read_slice(path: Path) -> _Slice:
    pydicom, data = _pydicom(), read_bytes(path, "DICOM file")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        # All elements are decoded here, nested ones too, because nobody expects damage later.
        list(dataset.iterall())
        for fault in _faults(dataset):
            raise InputError(f"{path} {fault}.")
        slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
        hu = pydicom.pixels.pixel_array(dataset) * float(slope) + float(intercept)
        check_finite(torch.from_numpy(hu), path)
    except InputError:
        raise
    except Exception as error:  # pydicom and its decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{path} is damaged or unusual ({reason}): try gdcmconv --raw.") from error
    # Not the dataset itself: it keeps the bytes of the whole file.
    header = pydicom.Dataset(dataset)
    del header.PixelData
    return _Slice(path, header, hu.astype(np.float32))


def _faults(dataset: Any) -> Iterator[str]:
    pixels, get = _pydicom().pixels, dataset.get
    if "PixelData" not in dataset:
        yield "has no pixel data, but an image is needed: leave it out"
    if (get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in dataset:
        yield "is a multi-frame image, but a file is one slice: split it by emf2sf of dcm4che"
    colour = get("PhotometricInterpretation")
    if get("SamplesPerPixel", 1) != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
        yield f"is a colour image ({colour}), but Hounsfield units are grey: give the CT image"
    modality, unit = get("Modality"), get("RescaleType") or ""
    slope, intercept = get("RescaleSlope", 1), get("RescaleIntercept")
    # Signed values without a rescale can be Hounsfield units; unsigned ones have no room for air.
    bare = intercept is None and (modality != "CT" or get("PixelRepresentation") != 1)
    other = unit != "HU" and (modality != "CT" or unit)
    if bare or other or not slope or "ModalityLUTSequence" in dataset:
        scale = f"rescale type '{unit}', slope {slope} and intercept {intercept}"
        yield f"has the modality {modality}, {scale}, not Hounsfield units: give CT images"
    if not (get("SOPClassUID") and get("SOPInstanceUID") and get("SeriesInstanceUID")):
        yield "lacks a UID of its class, image or series, but each needs one: export it again"
    if "LOCALIZER" in (get("ImageType") or ()):
        yield "is a localizer, but slices are needed: leave it out"
    spacing = get("PixelSpacing")
    if not spacing or not min(spacing) > 0:
        yield f"has the PixelSpacing {spacing}, but two positive numbers are needed: add them"
    syntax: Any = dataset.file_meta.TransferSyntaxUID
    if (name := syntax.name) == "Explicit VR Big Endian":
        yield f"is stored as {name}, retired in 2006: convert it by dcmconv +te of DCMTK"
    if not pixels.get_decoder(syntax).is_available:
        remedy = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        fault = f"is compressed as {name}, but no decoder of it is installed"
        yield f"{fault}: {remedy}, or convert it with gdcmconv --raw"


def _numbers(item: _Slice, name: str) -> tuple[float, ...]:
    value, count = item.header.get(name), _COUNTS.get(name, 1)
    values = () if value is None else tuple(map(float, np.atleast_1d(value)))
    if values and not (len(values) == count and all(map(math.isfinite, values))):
        raise InputError(f"{item.path} has the {name} {value}, not {count} number(s): correct it.")
    return values


def _position(item: _Slice) -> float:
    axes, corner = (_numbers(item, f"Image{name}Patient") for name in ("Orientation", "Position"))
    return float(np.dot(np.cross(axes[:3], axes[3:]), corner)) if axes and corner else math.nan


def _check_alike(first: _Slice, second: _Slice) -> None:
    for name in ("SeriesInstanceUID", "Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        a, b = first.header.get(name), second.header.get(name)
        same = a == b
        if name in _COUNTS:
            u, v = _numbers(first, name), _numbers(second, name)
            same = len(u) == len(v) and np.allclose(u, v, rtol=0, atol=_TOLERANCE)
        if not same:
            pair = f"{first.path} has the {name} {a} and {second.path} has {b}"
            raise InputError(f"{pair}, but a volume has one: give the files of one series.")


def _encode(header: Any, pixels: np.ndarray, method: str, series: str) -> bytes:
    pydicom = _pydicom()
    new = copy.deepcopy(header)
    for element in header:
        # Overlays, in the groups 0x60xx, are drawings on the source's image.
        if _STALE.match(element.keyword) or element.tag.group & 0xFF00 == 0x6000:
            del new[element.tag]
    source = pydicom.Dataset()
    source.ReferencedSOPClassUID = header.get("SOPClassUID")
    source.ReferencedSOPInstanceUID = header.get("SOPInstanceUID")
    new.SourceImageSequence = [source]
    new.SOPInstanceUID, new.SeriesInstanceUID = pydicom.uid.generate_uid(), series
    kind = np.atleast_1d(header.get("ImageType") or ()).tolist()[2:]
    new.ImageType = ["DERIVED", "SECONDARY", *(kind or ["AXIAL"])]
    new.SeriesDescription, new.DerivationDescription = method, f"patchflow: {method}"
    new.RescaleSlope, new.RescaleIntercept, new.RescaleType = 1, _INTERCEPT, "HU"
    new.BitsAllocated, new.BitsStored, new.HighBit, new.PixelRepresentation = 16, 16, 15, 1
    new.add_new("PixelData", "OW", pixels.tobytes())
    new.file_meta = pydicom.dataset.FileMetaDataset()
    new.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    buffer = io.BytesIO()
    new.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
