"""What the methods of the tables learn from a few images, once per material, kept in files if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from patchflow import models
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.learn import learn_patches
from patchflow.learn_mixture import learn_epll
from patchflow.learn_reference import learn_wpp
from patchflow.models import patch_nr
from patchflow.papers import prost2021_local_ar as prost

# Smoothing of wpp-sinkhorn, in squared units of the image; published (survey): 1e-4 with 10,000 reference patches.
# Highest PSNR on the validation image of super-resolution among 0, 1e-3, 1e-2.
EPSILON = 1e-2
SHORT_SECONDS = 90.0
# Of patchNR. Highest PSNR on a part of the validation image of super-resolution, after 240 to 300 s on one core: 6 x 6
# without smoothing 28.22 dB, with .01 28.21, with .02 28.27; 8 x 8 with .02 28.31.
SIZE, SMOOTHING = 8, 0.02

Images = Sequence[Tensor]


class Lesson(NamedTuple):
    """What is learned from.

    Attributes:
        images: The training images.
        validation: The validation images.
        seconds: Training time of patchNR.
    """

    images: Images
    validation: Images
    seconds: float


Teacher = Callable[[Lesson], Energy]


def _patchnr(lesson: Lesson, seconds: float) -> Energy:
    return learn_patchnr(lesson._replace(seconds=seconds))


def learn_patchnr(
    lesson: Lesson, *, size: int = SIZE, smoothing: float = SMOOTHING, padding: int = 0
) -> Energy:
    """A patchNR, learned for the time of the lesson."""
    prior = patch_nr(size=size, smoothing=smoothing, padding=padding)
    learn_patches(
        prior,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    return prior


TEACHERS: dict[str, Teacher] = {
    "epll": lambda lesson: learn_epll(lesson.images, progress=True)[0],
    "wpp": lambda lesson: learn_wpp(lesson.images, scales=2),
    "wpp-sinkhorn": lambda lesson: learn_wpp(lesson.images, scales=2, epsilon=EPSILON),
    "local-ar": lambda lesson: prost.learn(prost.SMALL, lesson.images, progress=True)[0],
    "patchnr-90s": lambda lesson: _patchnr(lesson, SHORT_SECONDS),
    "patchnr": learn_patchnr,
}


class Library:
    """Learned priors, each learned at its first use.

    Args:
        folder: Where models are kept: read if they are there, else written; None for nowhere.
        seconds: Training time of patchNR.
        seed: Seed of the trainings.
        teachers: How each method learns; methods that are not there need no prior.
    """

    def __init__(
        self,
        folder: Path | None,
        seconds: float,
        seed: int,
        teachers: Mapping[str, Teacher] = TEACHERS,
    ) -> None:
        self.teachers = teachers
        self.folder, self.seconds, self.seed = folder, seconds, seed
        self.priors: dict[str, Energy] = {}
        self.trainings: dict[str, float] = {}

    def prior(
        self, method: str, material: str, pupils: Callable[[], tuple[Images, Images]]
    ) -> Energy | None:
        """The prior of a method for a material, or None if it needs none.

        Args:
            method: The method.
            material: The name of the material.
            pupils: Reads the images to learn from and those to validate on, if they are needed.

        Raises:
            InputError: If a file holds another model.
        """
        if method not in self.teachers:
            return None
        key = f"{method}-{material}"
        if key not in self.priors:
            path = None if self.folder is None else self.folder / f"{key}.safetensors"
            if path is not None and path.exists():
                self.priors[key] = models.load(path, Energy)
            else:
                torch.manual_seed(self.seed)
                begun = time.perf_counter()
                lesson = Lesson(*pupils(), self.seconds)
                prior = self.teachers[method](lesson)
                self.trainings[key] = time.perf_counter() - begun
                if path is not None:
                    self._keep(path, prior, lesson.images, self.trainings[key])
                self.priors[key] = prior
        return self.priors[key]

    def _keep(self, path: Path, prior: Energy, images: Images, seconds: float) -> None:
        if not path.parent.is_dir():
            raise InputError(f"There is no folder {path.parent} to keep the models in; make it.")
        training = {"seconds": round(seconds, 1)}
        models.save(path, prior, images=images, seed=self.seed, training=training)
