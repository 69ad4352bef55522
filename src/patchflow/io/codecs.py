"""Image formats: the bytes of PNG, JPEG, TIFF and NumPy files as arrays, and back.

Arrays have the shape (images, height, width, channels) and the type of the file, so nothing is
scaled here. PNG and JPEG go through imagecodecs because Pillow silently reduces 16-bit colour PNG
to 8 bits. A PNG or JPEG decoder may also fill what a truncated file lacks with grey, so the end of
the file is checked here.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Literal, NamedTuple

import imagecodecs
import numpy as np
import tifffile

from patchflow.errors import InputError

Depth = Literal[8, 16, "float"]

_KINDS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".npy": "NumPy",
}
# The depths that each format can hold; the first is its default.
DEPTHS: dict[str, tuple[Depth, ...]] = {
    "PNG": (8, 16),
    "JPEG": (8,),
    "TIFF": ("float", 8, 16),
    "NumPy": ("float", 8, 16),
}


class _Raw(NamedTuple):
    """A decoded file: (images, height, width, channels), and whether the last channel is alpha."""

    array: np.ndarray
    alpha: bool


def format_of(path: Path) -> str:
    """The format that a file's extension stands for, a key of ``DEPTHS``.

    Args:
        path: The file, which need not exist.

    Raises:
        InputError: The extension is not one of ours.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{path} has the extension '{path.suffix}', which is not one of {', '.join(_KINDS)}: "
            "convert the image to one of these."
        )
    return kind


def decode(data: bytes, kind: str, path: Path) -> np.ndarray:
    """Decode the content of an image file; a channel of full opacity is left out.

    Args:
        data: The bytes of the file.
        kind: The format, a key of ``DEPTHS``.
        path: The file, for the messages.

    Returns:
        The pixels as they are stored, (images, height, width, channels).

    Raises:
        InputError: They are not such an image, or it is truncated, empty or transparent.
    """
    if not data:
        raise InputError(f"{path} is an empty file, but a {kind} image is needed: save it again.")
    try:
        raw = _DECODERS[kind](data, path)
    except InputError:
        raise
    # The decoders raise whatever their C libraries and parsers run into; to a user it is all one
    # thing.
    except Exception as error:
        raise InputError(
            f"{path} is not a {kind} image or is damaged ({_first_words(error)}): "
            "save or download it again."
        ) from error
    if raw.array.size == 0:
        raise InputError(
            f"{path} is an image without pixels (shape {raw.array.shape}): save it again."
        )
    return _opaque(raw, path)


def encode(array: np.ndarray, kind: str) -> bytes:
    """Encode pixels as a file.

    Args:
        array: The pixels, (images, height, width, channels), of a type that the format holds.
        kind: The format, a key of ``DEPTHS``.

    Returns:
        The bytes of the file.
    """
    return _ENCODERS[kind](array)


def _first_words(error: Exception) -> str:
    # One line, and no full stops: the message around it is one sentence.
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _opaque(raw: _Raw, path: Path) -> np.ndarray:
    if not raw.alpha:
        return raw.array
    alpha = raw.array[..., -1]
    full = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1
    if np.any(alpha != full):
        share = float(np.mean(alpha != full))
        raise InputError(
            f"{path} has an alpha channel that is not fully opaque ({share:.1%} of the pixels): "
            "flatten it onto a background first."
        )
    return raw.array[..., :-1]


def _channels_last(array: np.ndarray) -> np.ndarray:
    return array[None, :, :, None] if array.ndim == 2 else array[None]


def _decode_png(data: bytes, path: Path) -> _Raw:
    array = _channels_last(imagecodecs.png_decode(data))
    # The decoder returns as soon as it has its rows; a file cut later than that is still a damaged
    # file.
    position, chunk = 8, b""
    while position + 12 <= len(data) and chunk != b"IEND":
        chunk = data[position + 4 : position + 8]
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    if chunk != b"IEND" or position > len(data):
        raise InputError(f"{path} is a truncated PNG image: save or download it again.")
    return _Raw(array, alpha=array.shape[-1] in (2, 4))


def _decode_jpeg(data: bytes, path: Path) -> _Raw:
    array = _channels_last(imagecodecs.jpeg8_decode(data))
    if not _jpeg_ends(data):
        raise InputError(f"{path} is a truncated JPEG image: save or download it again.")
    if array.dtype != np.uint8 or array.shape[-1] not in (1, 3):
        raise InputError(
            f"{path} is a JPEG image of type {array.dtype} with {array.shape[-1]} channels (CMYK "
            "or 12 bits?), but 8-bit grey or RGB is needed: convert it."
        )
    return _Raw(array, alpha=False)


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end marker is there: libjpeg fills what is missing with grey."""
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= len(data):
            return False
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            # A segment states its length; its content (a thumbnail!) may hold anything, end markers
            # included.
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _decode_tiff(data: bytes, path: Path) -> _Raw:
    # tifffile logs what it then also raises; the user is to read one sentence.
    logger = logging.getLogger("tifffile")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return _decode_series(file, len(data), path)
    finally:
        logger.disabled = was_disabled


def _decode_series(file: tifffile.TiffFile, size: int, path: Path) -> _Raw:
    for page in file.pages:
        offsets, counts = page.dataoffsets, page.databytecounts
        if any(offset + count > size for offset, count in zip(offsets, counts, strict=True)):
            raise InputError(f"{path} is a truncated TIFF image: save or download it again.")
    if len(file.series) != 1:
        shapes = ", ".join(str(series.shape) for series in file.series[:4])
        raise InputError(
            f"{path} holds {len(file.series)} groups of images of shapes {shapes}, but images of "
            "one shape are needed: save them separately."
        )
    series, page = file.series[0], file.series[0].keyframe
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise InputError(
            f"{path} is a TIFF image with a colour palette, but grey or RGB is needed: convert it."
        )
    array = series.asarray()
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
        array = ~array if array.dtype.kind == "b" else np.iinfo(array.dtype).max - array
    axes = series.axes
    # ImageJ calls its channels C; samples of one pixel are S.
    channel = axes.find("S") if "S" in axes else axes.find("C")
    order = [axis for axis in range(array.ndim) if axis != channel and axes[axis] not in "YX"]
    order += [axes.index("Y"), axes.index("X")]
    if channel >= 0:
        order.append(channel)
    else:
        array, order = array[..., None], [*order, array.ndim]
    array = array.transpose(order)
    alpha = any(
        extra in (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
        for extra in page.extrasamples
    )
    return _Raw(array.reshape(-1, *array.shape[-3:]), alpha)


def _decode_npy(data: bytes, path: Path) -> _Raw:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.ndim == 2:
        array = array[None, :, :, None]
    elif array.ndim == 3 and array.shape[0] <= 4:
        array = array.transpose(1, 2, 0)[None]
    elif array.ndim == 3 and array.shape[2] <= 4:
        array = array[None]
    elif array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    else:
        raise InputError(
            f"{path} holds an array of {array.ndim} axes, but 2 to 4 are needed (images, channels, "
            "height, width): save it in such a shape."
        )
    return _Raw(array, alpha=False)


def _encode_png(array: np.ndarray) -> bytes:
    return bytes(imagecodecs.png_encode(_without_single_channel(array[0]), level=6))


def _encode_jpeg(array: np.ndarray) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(_without_single_channel(array[0]), level=95))


def _encode_tiff(array: np.ndarray) -> bytes:
    channels = array.shape[-1]
    buffer = io.BytesIO()
    pages = _without_single_channel(array)
    tifffile.imwrite(
        buffer,
        pages if len(pages) > 1 else pages[0],
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        compression="zlib",
        predictor=True,
    )
    return buffer.getvalue()


def _encode_npy(array: np.ndarray) -> bytes:
    images = array.transpose(0, 3, 1, 2)
    if len(images) == 1 and images.shape[1] <= 4:
        images = images[0, 0] if images.shape[1] == 1 else images[0]
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(images), allow_pickle=False)
    return buffer.getvalue()


def _without_single_channel(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)


_DECODERS = {"PNG": _decode_png, "JPEG": _decode_jpeg, "TIFF": _decode_tiff, "NumPy": _decode_npy}
_ENCODERS = {"PNG": _encode_png, "JPEG": _encode_jpeg, "TIFF": _encode_tiff, "NumPy": _encode_npy}
