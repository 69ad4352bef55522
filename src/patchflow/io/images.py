"""Images on disk: PNG, JPEG, TIFF and NumPy files as tensors in [0, 1], and back.

Images are tensors of shape (batch, channels, height, width), float32. The map between file and
tensor is decided here once:

- unsigned integers are divided by the largest value of their type (255, 65535), whatever the image
  holds;
- floating-point files are taken as they are and must lie in [0, 1], or leave it by no more than the
  slack granted to a noisy measurement;
- a declared ``value_range`` (lo, hi) replaces both: lo becomes 0 and hi becomes 1;
- signed integers (Hounsfield units, differences) have no natural range and need a declared one.

The formats themselves are in :mod:`patchflow.io.codecs`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import read_bytes, write_bytes
from patchflow.io.codecs import DEPTHS, Depth, decode, encode, format_of

ValueRange = tuple[int | float, int | float]

# The weights of skimage.color.rgb2gray (ITU-R BT.709 luma, as printed there).
LUMA = (0.2125, 0.7154, 0.0721)


def read_image(
    path: str | Path,
    *,
    value_range: ValueRange | None = None,
    grey: bool = False,
    slack: float | int = 0.0,
) -> Float[Tensor, "1 channels height width"]:
    """Read one image.

    Args:
        path: A .png, .jpg, .jpeg, .tif, .tiff or .npy file. A NumPy file holds (height, width),
            (channels, height, width) or (height, width, channels) with at most four channels, or
            (1, channels, height, width).
        value_range: The values (lo, hi) that become 0 and 1. Without it, unsigned integers are
            divided by the largest value of their type and floating-point values must lie in [0, 1].
        grey: Convert colour to grey with the weights of ``skimage.color.rgb2gray``.
        slack: How far floating-point values may leave the range, as a share of it, because a
            measurement is noisy; they are kept, not clipped. Integers may never leave it.

    Returns:
        The image, float32, in [0, 1] up to the slack.

    Raises:
        InputError: The file is missing, a folder, not such an image, truncated, empty, a stack,
        transparent, or has values that are not finite or outside the range, or the slack is
        negative.
    """
    images = read_stack(path, value_range=value_range, grey=grey, slack=slack)
    if len(images) > 1:
        raise InputError(
            f"{path} holds {len(images)} images, but one is needed: "
            "save the page that is meant as a file of its own."
        )
    return images


def read_stack(
    path: str | Path,
    *,
    value_range: ValueRange | None = None,
    grey: bool = False,
    slack: float | int = 0.0,
) -> Float[Tensor, "images channels height width"]:
    """Read all images of a file: the pages of a TIFF, the first axis of a NumPy array.

    Args:
        path: As in :func:`read_image`; a NumPy file may also hold (images, channels, height, width)
            or, with more than four images, (images, height, width).
        value_range: As in :func:`read_image`.
        grey: As in :func:`read_image`.
        slack: As in :func:`read_image`.

    Returns:
        The images, float32, in [0, 1] up to the slack; a file with one image is a stack of one.

    Raises:
        InputError: As :func:`read_image`, except for stacks.
    """
    path = Path(path)
    kind = format_of(path)
    array = decode(read_bytes(path, "image"), kind, path)
    scaled = _scale(array, value_range, slack, path)
    images = torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
    return to_grey(images) if grey else images


def write_image(
    path: str | Path,
    image: Float[Tensor, "images channels height width"],
    *,
    depth: Depth | None = None,
) -> None:
    """Write an image (or, as TIFF or NumPy, a stack), whole or not at all.

    With 8 and 16 bits, values are clipped to [0, 1] and rounded to the nearest level; as floating
    point they are stored as they are, so that nothing of a reconstruction is lost.

    Args:
        path: The file; its extension chooses the format.
        image: The image, nominally in [0, 1].
        depth: 8, 16 or "float"; by default 8 for PNG and JPEG, "float" for TIFF and NumPy.

    Raises:
        InputError: The format cannot hold the image or the depth, a pixel is not finite, or the
        disk refuses.
    """
    path = Path(path)
    kind = format_of(path)
    depth = DEPTHS[kind][0] if depth is None else depth
    if depth not in DEPTHS[kind]:
        raise InputError(
            f"{path} cannot have the depth {depth}: {kind} files hold "
            f"{' or '.join(str(known) for known in DEPTHS[kind])}; "
            "choose one of them, or a .tif file for floating point."
        )
    count, channels = image.shape[:2]
    if image.numel() == 0:
        raise InputError(
            f"The image for {path} has no pixels (shape {tuple(image.shape)}): give one that has."
        )
    if kind in ("PNG", "JPEG") and (count != 1 or channels not in (1, 3)):
        raise InputError(
            f"{path} cannot hold {count} image(s) of {channels} channel(s): {kind} files hold one "
            "grey or colour image; write a .tif file."
        )
    check_finite(image, path)
    array = _quantise(image, depth)
    write_bytes(path, encode(array, kind))


def to_grey(
    images: Float[Tensor, "images channels height width"],
) -> Float[Tensor, "images 1 height width"]:
    r"""Convert colour to grey, :math:`0.2125 R + 0.7154 G + 0.0721 B`; grey stays as it is.

    Args:
        images: Images with one or three channels.

    Raises:
        InputError: There are neither one nor three channels.
    """
    channels = images.shape[1]
    if channels == 1:
        return images
    if channels != 3:
        raise InputError(
            f"An image of {channels} channels cannot become grey: only one with 3 can; choose a "
            "channel."
        )
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def check_finite(image: Float[Tensor, "*shape"], path: str | Path) -> None:
    """Check that no pixel is NaN or infinite.

    Args:
        image: The pixels.
        path: The file that they come from or go to, for the message.

    Raises:
        InputError: Some are not; the message counts them.
    """
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise InputError(_not_finite(path, bad, image.numel()))


def check_varies(image: Float[Tensor, "*shape"], path: str | Path) -> None:
    """Check that an image is not constant: for training, where a constant one teaches nothing.

    Args:
        image: The pixels.
        path: The file that they come from, for the message.

    Raises:
        InputError: All pixels have the same value.
    """
    if image.numel() and bool((image == image.flatten()[0]).all()):
        raise InputError(
            f"{path} is constant (every pixel is {float(image.flatten()[0]):g}), so nothing can be "
            "learned from it: give an image with structure."
        )


def fingerprint(images: Iterable[Tensor]) -> str:
    """The SHA-256 of images: of each one's shape, type and bytes, in order.

    Args:
        images: Tensors of any shape and type.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for image in images:
        array = np.ascontiguousarray(image.detach().cpu().numpy())
        digest.update(f"{array.shape} {array.dtype.str};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def encode_png(image: Float[Tensor, "1 channels height width"], depth: Depth = 8) -> bytes:
    """Encode one grey or colour image as PNG.

    Args:
        image: The image, clipped to [0, 1].
        depth: 8 or 16 bits.

    Returns:
        The bytes of the file.
    """
    return encode(_quantise(image, depth), "PNG")


def _not_finite(path: str | Path, bad: int, total: int) -> str:
    return (
        f"{path} has {bad} NaN or infinite pixel(s) out of {total}: "
        "replace them by finite values before using the image."
    )


def _scale(
    array: np.ndarray, value_range: ValueRange | None, slack: float | int, path: Path
) -> np.ndarray:
    if not slack >= 0:
        raise InputError(
            f"The slack {slack:g} is not a share of the range: give one of at least 0."
        )
    if array.dtype.kind not in "buif":
        raise InputError(
            f"{path} holds values of type {array.dtype}, but integers or floating-point numbers "
            "are needed: convert the image."
        )
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise InputError(_not_finite(path, bad, array.size))
    if value_range is None:
        if array.dtype.kind == "b":
            return array.astype(np.float32)
        if array.dtype.kind == "u":
            # 32-bit integers do not fit float32, so divide in double; 8 and 16 bits save the
            # memory.
            wide = np.float64 if array.dtype.itemsize > 2 else np.float32
            scaled = array.astype(wide) / wide(np.iinfo(array.dtype).max)
            return scaled.astype(np.float32)
    low, high = (0.0, 1.0) if value_range is None else map(float, value_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(
            f"The value range {low:g}:{high:g} is not a range: give two finite numbers LO:HI with "
            "LO < HI."
        )
    smallest, largest = float(array.min()), float(array.max())
    if array.dtype.kind == "i" and value_range is None:
        raise InputError(
            f"{path} holds {array.dtype} values from {smallest:g} to {largest:g}, and signed "
            f"integers have no natural range: declare it, for example --range={smallest:g}:{largest:g}."
        )
    # A value that float32 rounded to 1.0000001 is not a mistake of the user's.
    margin = (1e-6 + (slack if array.dtype.kind == "f" else 0.0)) * (high - low)
    if smallest < low - margin or largest > high + margin:
        raise InputError(
            f"{path} has values from {smallest:g} to {largest:g}, outside the range "
            f"[{low:g}, {high:g}]: declare the range that it has, for example --range={smallest:g}:{largest:g}."
        )
    if (low, high) == (0.0, 1.0):
        return array.astype(np.float32)
    return ((array.astype(np.float64) - low) / (high - low)).astype(np.float32)


def _quantise(image: Tensor, depth: Depth) -> np.ndarray:
    array = image.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    if depth == "float":
        return array.astype(np.float32)
    levels = 255 if depth == 8 else 65535
    dtype = np.uint8 if depth == 8 else np.uint16
    return np.rint(np.clip(array.astype(np.float64), 0, 1) * levels).astype(dtype)
