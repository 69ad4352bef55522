"""Models that the methods of the tables learn, once per material, kept in files if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patchflow import models
from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.learn_single_image import Problem
from patchflow.methods import Method
from patchflow.papers.rows import by_name
from patchflow.priors.expectation_maximization import MixtureFit
from patchflow.priors.patch import PatchPrior
from patchflow.priors.student_maximization import StudentFit
from patchflow.tomography_methods import TomographyMethod
from patchflow.uncertainty.novelty import has_density, novelty_record

Images = Sequence[Tensor]


class Lesson(NamedTuple):
    """What is learned from.

    Attributes:
        images: The training images.
        validation: The validation images.
        seconds: Training time of patchNR and of the networks.
        law: The law of the measurement of images of a shape, for networks that are trained for it.
    """

    images: Images
    validation: Images
    seconds: float
    law: Problem | None = None


Teacher = Callable[[Lesson], nn.Module]


def check_finished(record: Fit | MixtureFit | StudentFit) -> None:
    """Refuse half a training, which later runs would read as a whole one.

    Raises:
        KeyboardInterrupt: If the user interrupted it.
    """
    stopped = record.stopped == "interrupted" if isinstance(record, Fit) else record.interrupted
    if stopped:
        raise KeyboardInterrupt


class Library:
    """Learned priors, each learned at its first use.

    Args:
        folder: Where models are kept: read if they are there, else written; None for nowhere.
        seconds: Training time of patchNR and of the networks.
        seed: Seed of the trainings.
        teachers: How each method learns; methods that are not there need no prior.
        method_of: Finds the method that checks what a file holds.

    Raises:
        InputError: If there is no such folder.
    """

    def __init__(
        self,
        folder: Path | None,
        seconds: float,
        seed: int,
        teachers: Mapping[str, Teacher],
        method_of: Callable[[str], Method | TomographyMethod] = by_name,
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise InputError(f"There is no folder {folder} to keep the models in; make it.")
        self.teachers, self.method_of = teachers, method_of
        self.folder, self.seconds, self.seed = folder, seconds, seed
        self.priors: dict[str, nn.Module] = {}
        self.trainings: dict[str, float] = {}

    def prior(
        self,
        method: str,
        material: str,
        pupils: Callable[[], tuple[Images, Images]],
        law: Problem | None = None,
    ) -> nn.Module | None:
        """The prior of a method for a material, or None if it needs none.

        Args:
            method: The method.
            material: The name of the material.
            pupils: Reads the images to learn from and those to validate on, if they are needed.
            law: The measurement, for networks that are trained for it; the material's name must tell it, too.

        Raises:
            InputError: If a file holds another model.
        """
        if method not in self.teachers:
            return None
        key = f"{method}-{material}"
        if key not in self.priors:
            path = None if self.folder is None else self.folder / f"{key}.safetensors"
            if path is not None and path.exists():
                prior = models.load(path, nn.Module)
                self.method_of(method).check_prior(prior)
                self.priors[key] = prior
            else:
                torch.manual_seed(self.seed)
                begun = time.perf_counter()
                lesson = Lesson(*pupils(), self.seconds, law)
                prior = self.teachers[method](lesson)
                self.trainings[key] = time.perf_counter() - begun
                self.priors[key] = prior
                if path is not None:
                    training = {"seconds": round(self.trainings[key], 1), **_novelty(prior, lesson)}
                    models.save(
                        path, prior, images=lesson.images, seed=self.seed, training=training
                    )
        return self.priors[key]


def _novelty(prior: nn.Module, lesson: Lesson) -> Mapping[str, Any]:
    """Thresholds of a patch density on the validation images, for the reports of ``patchflow reconstruct``."""
    if not isinstance(prior, PatchPrior) or not has_density(prior):
        return {}
    try:
        return novelty_record(prior, lesson.validation)
    except InputError:  # too few pixels for thresholds: the table needs none
        return {}
