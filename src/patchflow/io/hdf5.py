"""HDF5 files: opened with a sentence for each fault, the data set in them chosen, stacks read.

h5py is an optional dependency, imported where it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import existing_file

EXTENSIONS = (".h5", ".hdf5")


def require_h5py(path: str | Path) -> Any:
    """Import h5py.

    Args:
        path: The file that needs it, for the message.

    Returns:
        The module.

    Raises:
        InputError: It is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        remedy = "pip install patchflow[io]"
        raise InputError(f"{path} is an HDF5 file, which needs h5py: {remedy}.") from error
    return h5py


@contextlib.contextmanager
def open_hdf5(path: str | Path, kind: str = "HDF5 file") -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Args:
        path: The file.
        kind: What the file is to be, for the message ("sinogram").

    Yields:
        The open ``h5py.File``.

    Raises:
        InputError: h5py is not installed, or the file is missing, a folder, not HDF5 or damaged, be
            it only where the block reads it.
    """
    h5py = require_h5py(path)
    path = existing_file(path, kind)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    # What HDF5 finds wrong with a file reaches Python as any of these, here or in the block.
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).strip("'\"").rstrip(".")[:120]
        raise InputError(
            f"{path} is not an HDF5 file or is damaged ({reason}), but a readable {kind} is "
            "needed: save or download it again."
        ) from error


def choose_dataset(file: Any, dataset: str | None, path: str | Path) -> Any:
    """Find the data set that is meant: the named one, else ``data``, else the only candidate.

    Args:
        file: The open ``h5py.File``.
        dataset: The name of the data set, ``"group/name"``; without it, ``"data"`` is taken, else
            the only one of two or three axes that holds numbers, in whatever group.
        path: The file, for the message.

    Returns:
        The ``h5py.Dataset``.

    Raises:
        InputError: There is no such data set, or there are several; the message lists all.
    """
    h5py = require_h5py(path)
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(visit)
    listed = ", ".join(f"{name} {item.shape}" for name, item in found.items()) or "none"
    if dataset is not None:
        if dataset.strip("/") not in found:
            raise InputError(
                f"{path} has no dataset '{dataset}', but one of these is needed: {listed}; choose "
                "by --dataset."
            )
        return found[dataset.strip("/")]
    if "data" in found:
        return found["data"]
    fit = [item for item in found.values() if item.ndim in (2, 3) and item.dtype.kind in "iuf"]
    if len(fit) != 1:
        raise InputError(
            f"{path} has {len(fit)} datasets of numbers with 2 or 3 axes and none called 'data' "
            f"(it has: {listed}), but one is needed: choose it by --dataset."
        )
    return fit[0]


def read_array(dataset: Any, path: str | Path) -> np.ndarray:
    """Read a data set as a whole.

    Args:
        dataset: The ``h5py.Dataset``.
        path: The file, for the message.

    Returns:
        Its values, as they are stored.

    Raises:
        InputError: It has no values.
    """
    # An HDF5 data set without a shape has a type but no elements.
    if dataset.shape is None or 0 in dataset.shape:
        raise InputError(
            f"{path} has an empty dataset '{dataset.name.strip('/')}' of shape {dataset.shape}, "
            "but values are needed: save it again, or choose another by --dataset."
        )
    return np.asarray(dataset[()])


def read_number(
    attributes: Mapping[str, Any], name: str, path: str | Path, unit: str | None = None
) -> float | None:
    """Read an attribute that is a number, and check the attribute ``{name}_units`` if it is there.

    Args:
        attributes: The attributes of a file or a data set.
        name: The name of the attribute.
        path: The file, for the message.
        unit: The unit that is needed.

    Returns:
        The number, or None if there is no such attribute.

    Raises:
        InputError: It is not one number, or its unit is another one.
    """
    if name not in attributes:
        return None
    if unit is not None:
        check_unit(name, attributes.get(f"{name}_units"), (unit,), path)
    array = np.asarray(attributes[name])
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise InputError(
            f"{path} has the {name} {attributes[name]!r}, but one number is needed: correct the "
            "attribute."
        )
    return float(array.item())


def read_shape(
    attributes: Mapping[str, Any], name: str, path: str | Path, unit: str
) -> tuple[int, int] | None:
    """Read an attribute that is a height and a width, as :func:`read_number` reads numbers."""
    if name not in attributes:
        return None
    check_unit(name, attributes.get(f"{name}_units"), (unit,), path)
    array = np.asarray(attributes[name])
    if array.shape != (2,) or array.dtype.kind not in "iu":
        raise InputError(
            f"{path} has the {name} {attributes[name]}, but two integers (height, width) are "
            "needed: correct it."
        )
    return int(array[0]), int(array[1])


def check_unit(name: str, found: Any, known: tuple[str, ...], path: str | Path) -> None:
    """Check the unit that a file states.

    Args:
        name: What has the unit, for the message.
        found: The stated unit, text or bytes; None where the file states none.
        known: The spellings of the unit that is needed.
        path: The file, for the message.

    Raises:
        InputError: The unit is another one.
    """
    text = found.decode(errors="replace") if isinstance(found, bytes) else found
    if found is not None and text not in known:
        raise InputError(
            f"{path} has {name} in the unit '{text}', but '{known[0]}' is needed: convert the "
            "values and the unit."
        )


def as_stack(array: np.ndarray, path: str | Path) -> Float[Tensor, "slices 1 height width"]:
    """Turn numbers into slices of one channel, single precision, without scaling them.

    Args:
        array: (height, width), (slices, height, width) or (slices, 1, height, width).
        path: The file that they come from, for the message.

    Returns:
        The slices, float32.

    Raises:
        InputError: The array has another shape, is empty, holds no real numbers, or some are not
            finite in single precision.
    """
    shape = array.shape
    if array.dtype.kind not in "iuf":
        raise InputError(
            f"{path} holds values of type {array.dtype}, but integers or floating-point numbers "
            "are needed: convert them, or choose another dataset."
        )
    if array.ndim not in (2, 3) and not (array.ndim == 4 and shape[1] == 1):
        raise InputError(
            f"{path} holds an array of shape {shape}, but 2 axes, or 3 with the slices first, are "
            "needed: save it in such a shape, or choose another dataset."
        )
    if array.size == 0:
        raise InputError(
            f"{path} holds an empty array of shape {shape}, but values are needed: save it again."
        )
    # Too large for single precision becomes infinite, which is found below.
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(single)))
    if bad:
        raise InputError(
            f"{path} has {bad} NaN or infinite value(s) out of {array.size}, but all have to be "
            "finite: replace them (in a sinogram, zero counts before taking the logarithm)."
        )
    return torch.from_numpy(single.reshape(-1, 1, *shape[-2:]))


def read_hdf5_images(
    path: str | Path, dataset: str | None = None
) -> Float[Tensor, "images 1 height width"]:
    """Read grey images of an HDF5 file, without scaling them.

    Args:
        path: A .h5 or .hdf5 file.
        dataset: The name of the data set; without it, ``"data"``, else the only one of two or three
            axes that holds numbers. Two axes are one image; of three, the first counts the images.

    Returns:
        The images as they are stored, float32.

    Raises:
        InputError: h5py is not installed, or the file is missing, not HDF5 or damaged, or the data
            set is not to be found, empty, of another shape or not finite.
    """
    with open_hdf5(path, "image file") as file:
        array = read_array(choose_dataset(file, dataset, path), path)
    return as_stack(array, path)
