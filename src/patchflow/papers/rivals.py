"""What the methods of the tables learn from a few images, once per material, kept in files if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchflow import models
from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.learn import learn_patches
from patchflow.learn_denoiser import learn_denoiser
from patchflow.learn_gan import learn_gan
from patchflow.learn_mixture import learn_epll, learn_student_t
from patchflow.learn_reference import learn_wpp
from patchflow.methods import by_name
from patchflow.models import drunet, patch_gan, patch_nr, patch_vae, pnn
from patchflow.networks.denoiser import Denoiser
from patchflow.papers import prost2021_local_ar as prost
from patchflow.priors.expectation_maximization import MixtureFit
from patchflow.priors.student_maximization import StudentFit

# Smoothing of wpp-sinkhorn, in squared units of the image; published (survey): 1e-4 with 10,000 reference patches.
# Highest PSNR on the validation image of super-resolution among 0, 1e-3, 1e-2.
EPSILON = 1e-2
SHORT_SECONDS = 90.0
# Share of spoilt patches among the negatives of the critic of patch-gan. Highest PSNR on a part of the validation image
# of super-resolution, after 60 s on a loaded core (200 steps): 27.97 dB with the weight 20; 27.86 dB without them.
SPOILT = 0.5
# Of patchNR. Highest PSNR on a part of the validation image of super-resolution, after 240 to 300 s on one core: 6 x 6
# without smoothing 28.22 dB, with .01 28.21, with .02 28.27; 8 x 8 with .02 28.31.
SIZE, SMOOTHING = 8, 0.02

# Noise level of the network of pnp-pnn: to be tuned together with its weight.
PNN_LEVEL = 10 / 255

Images = Sequence[Tensor]


class Lesson(NamedTuple):
    """What is learned from.

    Attributes:
        images: The training images.
        validation: The validation images.
        seconds: Training time of patchNR and of the denoisers.
    """

    images: Images
    validation: Images
    seconds: float


Teacher = Callable[[Lesson], nn.Module]


def check_finished(record: Fit | MixtureFit | StudentFit) -> None:
    """Refuse half a training, which later runs would read as a whole one.

    Raises:
        KeyboardInterrupt: If the user interrupted it.
    """
    stopped = record.stopped == "interrupted" if isinstance(record, Fit) else record.interrupted
    if stopped:
        raise KeyboardInterrupt


def _epll(lesson: Lesson) -> nn.Module:
    prior, record = learn_epll(lesson.images, progress=True)
    check_finished(record)
    return prior


def _local_ar(lesson: Lesson) -> nn.Module:
    prior, record = prost.learn(prost.SMALL, lesson.images, progress=True)
    check_finished(record)
    return prior


def _student_t(lesson: Lesson) -> nn.Module:
    prior, record = learn_student_t(lesson.images, progress=True)
    check_finished(record)
    return prior


def _patch_gan(lesson: Lesson) -> nn.Module:
    prior = patch_gan()
    record = learn_gan(
        prior, lesson.images, spoilt=SPOILT, steps=10**6, seconds=SHORT_SECONDS, progress=True
    )
    check_finished(record)
    return prior


def _patch_vae(lesson: Lesson) -> nn.Module:
    prior = patch_vae()
    record = learn_patches(
        prior,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=SHORT_SECONDS,
        progress=True,
    )
    check_finished(record)
    return prior


def _patchnr(lesson: Lesson, seconds: float) -> nn.Module:
    return learn_patchnr(lesson._replace(seconds=seconds))


def learn_patchnr(
    lesson: Lesson, *, size: int = SIZE, smoothing: float = SMOOTHING, padding: int = 0
) -> nn.Module:
    """A patchNR, learned for the time of the lesson."""
    prior = patch_nr(size=size, smoothing=smoothing, padding=padding)
    record = learn_patches(
        prior,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return prior


def _denoiser(lesson: Lesson, denoiser: Denoiser) -> nn.Module:
    """A denoiser, learned for the time of the lesson."""
    record = learn_denoiser(
        denoiser,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return denoiser


TEACHERS: dict[str, Teacher] = {
    "epll": _epll,
    "wpp": lambda lesson: learn_wpp(lesson.images, scales=2),
    "wpp-sinkhorn": lambda lesson: learn_wpp(lesson.images, scales=2, epsilon=EPSILON),
    "local-ar": _local_ar,
    "patch-gan": _patch_gan,
    "student-t": _student_t,
    "patch-vae": _patch_vae,
    "patchnr-90s": lambda lesson: _patchnr(lesson, SHORT_SECONDS),
    "patchnr": learn_patchnr,
    "dpir": lambda lesson: _denoiser(lesson, drunet()),
    "pnp-pnn": lambda lesson: _denoiser(lesson, pnn(level=PNN_LEVEL)),
}


class Library:
    """Learned priors, each learned at its first use.

    Args:
        folder: Where models are kept: read if they are there, else written; None for nowhere.
        seconds: Training time of patchNR and of the denoisers.
        seed: Seed of the trainings.
        teachers: How each method learns; methods that are not there need no prior.

    Raises:
        InputError: If there is no such folder.
    """

    def __init__(
        self,
        folder: Path | None,
        seconds: float,
        seed: int,
        teachers: Mapping[str, Teacher] = TEACHERS,
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise InputError(f"There is no folder {folder} to keep the models in; make it.")
        self.teachers = teachers
        self.folder, self.seconds, self.seed = folder, seconds, seed
        self.priors: dict[str, nn.Module] = {}
        self.trainings: dict[str, float] = {}

    def prior(
        self, method: str, material: str, pupils: Callable[[], tuple[Images, Images]]
    ) -> nn.Module | None:
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
                self.priors[key] = _load(path, method)
            else:
                torch.manual_seed(self.seed)
                begun = time.perf_counter()
                lesson = Lesson(*pupils(), self.seconds)
                prior = self.teachers[method](lesson)
                self.trainings[key] = time.perf_counter() - begun
                self.priors[key] = prior
                if path is not None:
                    training = {"seconds": round(self.trainings[key], 1)}
                    models.save(
                        path, prior, images=lesson.images, seed=self.seed, training=training
                    )
        return self.priors[key]


def _load(path: Path, method: str) -> nn.Module:
    prior = models.load(path, nn.Module)
    by_name(method).check_prior(prior)
    return prior
