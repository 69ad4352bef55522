"""Problems by name, built from flags and the shape of an image or a measurement."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import existing_file
from patchflow.io.images import read_image
from patchflow.problems.blur import Blur, downsample
from patchflow.problems.likelihood import GaussianLikelihood, GaussianNoise, Likelihood
from patchflow.problems.operator import Identity, LinearOperator
from patchflow.problems.sampling import Mask

NAMES = ("super-resolution", "deblurring", "inpainting", "denoising", "ct")
# Flags of images that say nothing about a sinogram, and flags of sinograms alone, with their defaults.
_IMAGE_FLAGS = {
    **{"noise": 0.01, "scale": 4, "boundary": None, "kernel": None, "mask": None},
    **{"range": None, "grey": False, "samples": None, "chain": "mala"},
    **{"perception": 0.0, "texture": None, "budget": None, "ensemble": True},
}
_CT_FLAGS = {
    **dict.fromkeys(("angles", "photons", "bins", "size", "field_of_view", "limited", "fine")),
    **{"units": "normalised", "template": None, "dataset": None, "scan": None, "start": None},
}


def refuse_foreign_flags(problem: str, given: Mapping[str, object]) -> None:
    """Refuse flags of computed tomography for other problems, and those of others for it.

    Args:
        problem: The problem.
        given: All flags of the command.

    Raises:
        InputError: If one of them was given.
    """
    for name, default in (_IMAGE_FLAGS if problem == "ct" else _CT_FLAGS).items():
        if name in given and given[name] != default:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} {given[name]} says nothing about the problem {problem}; leave it out."
            )


@dataclass(frozen=True)
class Settings:
    """What the flags say about the measurement.

    Attributes:
        problem: One of ``super-resolution``, ``deblurring``, ``inpainting``, ``denoising``, or a Python file
            that defines ``likelihood``.
        noise: Standard deviation of the noise, in units of the image range.
        scale: Super-resolution: pixels of the image per pixel of the measurement, along an axis.
        boundary: Super-resolution: ``circular`` (the paper's) or ``valid`` (zero-shot). Deblurring: ``periodic``,
            ``reflect`` or ``valid``.
        kernel: The blur kernel, an image or .npy file; for super-resolution instead of the Gaussian.
        mask: Inpainting: an image that is white where pixels were measured.
    """

    problem: str
    noise: float = 0.01
    scale: int = 4
    boundary: Literal["circular", "periodic", "reflect", "valid"] | None = None
    kernel: str | None = None
    mask: str | None = None

    def likelihood(self, shape: tuple[int, int], *, measured: bool) -> GaussianLikelihood:
        """Build the likelihood.

        Args:
            shape: Height and width of the measurement, or of the image.
            measured: Whether ``shape`` is that of the measurement.

        Raises:
            InputError: If the problem is unknown or a flag does not fit it.
        """
        if self.problem.endswith(".py"):
            return self._from_file
        noise = self.std
        if self.problem == "super-resolution":
            return GaussianLikelihood(self._downsample(shape, measured), noise)
        if self.problem == "deblurring":
            return GaussianLikelihood(self._blur(shape, measured), noise)
        if self.problem == "inpainting":
            return GaussianLikelihood(self._mask(shape), noise)
        if self.problem == "denoising":
            return GaussianLikelihood(Identity(shape), noise)
        near = difflib.get_close_matches(self.problem, NAMES, 1, cutoff=0.3)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"choose one of {', '.join(NAMES)}, or a Python file."
        )
        raise InputError(f"There is no problem named {self.problem!r}; {hint}")

    @property
    def std(self) -> float:
        """The standard deviation of the noise: of the flag, or of the problem file.

        Raises:
            InputError: If it is not positive, or the file defines no likelihood.
        """
        if self.problem.endswith(".py"):
            return self._from_file.std
        if not self.noise > 0:
            raise InputError(
                f"The noise is {self.noise} but must be positive; for clean 8-bit data use their rounding error, 0.001."
            )
        return self.noise

    @cached_property
    def _from_file(self) -> GaussianLikelihood:
        return _linear_likelihood(self.problem)

    def _downsample(self, shape: tuple[int, int], measured: bool) -> LinearOperator:
        if self.scale < 2:
            raise InputError(f"The scale is {self.scale} but must be at least 2.")
        boundary = self.boundary or "circular"
        if boundary not in ("circular", "valid"):
            raise InputError(
                f"Super-resolution has no boundary {boundary!r}; use circular or valid."
            )
        kernel = None if self.kernel is None else _read_kernel(self.kernel)
        sides = (16, 16) if kernel is None else kernel.shape
        if measured:
            extra = [0 if boundary == "circular" else side - self.scale for side in sides]
            height, width = (
                extent * self.scale + e for extent, e in zip(shape, extra, strict=True)
            )
            shape = (height, width)
        return downsample(shape, stride=self.scale, boundary=boundary, kernel=kernel)

    def _blur(self, shape: tuple[int, int], measured: bool) -> LinearOperator:
        if self.kernel is None:
            raise InputError("Deblurring needs --kernel, an image or .npy file of the blur kernel.")
        kernel = _read_kernel(self.kernel)
        boundary = self.boundary or "reflect"
        if boundary == "circular":
            boundary = "periodic"
        if measured and boundary == "valid":
            shape = (shape[0] + kernel.shape[0] - 1, shape[1] + kernel.shape[1] - 1)
        return Blur(kernel, shape, boundary=boundary)

    def _mask(self, shape: tuple[int, int]) -> LinearOperator:
        if self.mask is None:
            raise InputError(
                "Inpainting needs --mask, an image that is white where pixels were measured."
            )
        mask = read_image(self.mask, grey=True)[0, 0] > 0.5
        if tuple(mask.shape) != shape:
            raise InputError(
                f"The mask {self.mask} has {mask.shape[0]} x {mask.shape[1]} pixels but the image has "
                f"{shape[0]} x {shape[1]}; give a mask of the image's size."
            )
        return Mask(mask)


def _read_kernel(path: str) -> Tensor:
    if path.endswith(".npy"):
        data = existing_file(path, "kernel file")
        try:
            kernel = torch.from_numpy(np.load(data, allow_pickle=False)).to(torch.float32)
        except (ValueError, EOFError, TypeError) as error:
            raise InputError(
                f"{path} is not a NumPy file of numbers; save it with numpy.save."
            ) from error
    else:
        kernel = read_image(path, grey=True)[0, 0]
    if kernel.ndim != 2 or not kernel.isfinite().all() or not kernel.sum() > 0:
        raise InputError(
            f"The kernel in {path} has shape {tuple(kernel.shape)} and sum {float(kernel.sum()):g}; "
            "it must be a finite matrix of positive sum."
        )
    return kernel / kernel.sum()


def run_file(path: str) -> dict[str, Any]:
    """Run a problem file, which may import others from its folder, and return the variables that it assigned.

    Raises:
        InputError: If there is no such file, or it fails.
    """
    file = existing_file(path, "problem file")
    specification = importlib.util.spec_from_file_location(Path(path).stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise failure_in_file(path, error) from error
    finally:
        sys.path.remove(folder)
    return vars(module)


def failure_in_file(path: str, error: Exception) -> InputError:
    """What to say when code of a problem file raised ``error``: the last line of the file that took part in it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).name == Path(path).name]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
    return InputError(
        f"{path} failed in line {line} ({type(error).__name__}: {error}); mend the file."
    )


def likelihood_of(path: str, variables: Mapping[str, Any]) -> Likelihood:
    """The likelihood that a problem file assigned.

    Raises:
        InputError: If there is none.
    """
    likelihood = variables.get("likelihood")
    if not isinstance(likelihood, Likelihood):
        raise InputError(
            f"{path} defines no likelihood; it must assign a patchflow.Likelihood to that name."
        )
    return likelihood


def _linear_likelihood(path: str) -> GaussianLikelihood:
    likelihood = likelihood_of(path, run_file(path))
    if isinstance(likelihood, GaussianLikelihood):
        return likelihood
    operator, law = likelihood.operator, likelihood.noise
    if (
        not isinstance(operator, LinearOperator)
        or not isinstance(law, GaussianNoise)
        or isinstance(law.std, torch.Tensor)
    ):
        raise InputError(
            f"The likelihood in {path} has a {type(operator).__name__} with {type(law).__name__}, but this command "
            "needs a LinearOperator with GaussianNoise of one level; use the Python interface (patchflow.minimize) for "
            "others."
        )
    return GaussianLikelihood(operator, law.std)
