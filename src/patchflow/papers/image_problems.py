"""Problems of the tables: what is measured, on which images, and what is learned from.

Of each material there is one image to learn from, one to choose parameters on, and images to report. Nothing is
chosen on reported images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.images import read_image
from patchflow.papers.comparison import Case
from patchflow.problems.blur import Blur, downsample, gaussian_kernel
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity, LinearOperator, Shape
from patchflow.problems.sampling import Mask

# Side and corner of the hole, as in the survey's inpainting.
HOLE, HOLE_CORNER = 40, 180
MISSING = 0.8
# Not the seed of a noise: the same numbers would choose the pixels and make the noise.
_MASK_SEED = 314_159


class Region(NamedTuple):
    """Where figures are taken: rows and columns."""

    rows: slice
    columns: slice

    def __call__(self, image: Tensor) -> Tensor:
        """Cut the region out of an image (1, channels, height, width)."""
        return image[:, :, self.rows, self.columns]


class ImageProblem(NamedTuple):
    """A kind of problem: the group of its rows.

    Attributes:
        group: The rows' name; empty if the table has only one kind.
        material: The images: ``material`` or ``lentils``.
        operator: The operator for a shape of images, the same for all.
        std: The standard deviation of the noise.
        region: Where figures are taken.
    """

    group: str
    material: str
    operator: Callable[[Path, Shape], LinearOperator]
    std: float
    region: Region

    def case(self, data: Path, path: Path, seed: int, *, side: int | None = None) -> Case:
        """Read an image and simulate its measurement.

        Args:
            data: The data folder.
            path: The image.
            seed: Seed of the noise.
            side: Take only the upper left corner of so many pixels along each side.
        """
        truth = read_image(path, grey=True)[:, :, :side, :side]
        operator = self.operator(data, (truth.shape[2], truth.shape[3]))
        likelihood = GaussianLikelihood(operator, self.std)
        torch.manual_seed(seed)
        return Case(path.stem, self.group, truth, likelihood, likelihood.simulate(truth))


def _border(width: int) -> Region:
    inside = slice(width, -width) if width else slice(None)
    return Region(inside, inside)


def _levin(data: Path, shape: Shape) -> LinearOperator:
    path = data / "kernels" / "levin09.npz"
    if not path.exists():
        raise InputError(
            f"There is no {path}; the kernels are those of Levin et al. 2009 (webee.technion.ac.il/people/anat.levin)."
        )
    with np.load(path) as kernels:
        kernel = torch.from_numpy(kernels[kernels.files[0]]).to(torch.get_default_dtype())
    return Blur(kernel / kernel.sum(), shape, "reflect")


def _gaussian(data: Path, shape: Shape) -> LinearOperator:
    return Blur(gaussian_kernel(15, 2.0), shape, "periodic")


def _hole(data: Path, shape: Shape) -> LinearOperator:
    mask = torch.ones(shape)
    mask[HOLE_CORNER : HOLE_CORNER + HOLE, HOLE_CORNER : HOLE_CORNER + HOLE] = 0
    return Mask(mask)


def _random(data: Path, shape: Shape) -> LinearOperator:
    return Mask(torch.rand(shape, generator=torch.Generator().manual_seed(_MASK_SEED)) >= MISSING)


_IN_HOLE = slice(HOLE_CORNER, HOLE_CORNER + HOLE)
PROBLEMS: dict[str, tuple[ImageProblem, ...]] = {
    "patchnr-superresolution": (
        ImageProblem("", "material", lambda data, shape: downsample(shape), 0.01, _border(40)),
    ),
    "deblurring": (
        ImageProblem("motion", "lentils", _levin, 5 / 255, _border(0)),
        ImageProblem("Gaussian", "material", _gaussian, 0.01, _border(0)),
    ),
    "inpainting": (
        ImageProblem("hole", "material", _hole, 0.01, Region(_IN_HOLE, _IN_HOLE)),
        ImageProblem("80 % missing", "material", _random, 0.01, _border(0)),
    ),
    "denoising": tuple(
        ImageProblem(
            f"sigma {std}", "material", lambda data, shape: Identity(shape), std, _border(0)
        )
        for std in (0.05, 0.1)
    ),
}


def training_image(data: Path, material: str) -> Tensor:
    """The image to learn from."""
    return read_image(_existing(data / "material" / f"img_learn_{material}.png"), grey=True)


def validation_path(data: Path, material: str) -> Path:
    """The image to choose parameters on."""
    return _existing(data / "material" / f"img_val_{material}.png")


def reported_paths(data: Path, material: str, images: int | None = None) -> Sequence[Path]:
    """The images to report.

    Args:
        data: The data folder.
        material: ``material`` or ``lentils``.
        images: How many; all by default.

    Raises:
        InputError: If there is none.
    """
    folder = data / "material"
    if material != "material":
        return [_existing(folder / f"img_test_{material}.png")]
    paths = sorted(
        (folder / "test").glob("img*.png"),
        key=lambda path: int(re.findall(r"\d+", path.name)[-1]),
    )[:images]
    if not paths:
        raise InputError(
            f"There is no image in {folder / 'test'}; the 100 test images are in the folder testset_superres of the "
            "paper's public repository FabianAltekrueger/patchNR."
        )
    return paths


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(
            f"There is no {path}; give --data the folder with material/, whose images are in the papers' public "
            "repositories (FabianAltekrueger/patchNR)."
        )
    return path
