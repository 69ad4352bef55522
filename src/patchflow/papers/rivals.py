"""What the methods of the tables learn from one image, once per material, kept in files if asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from patchflow import models
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.learn import learn_patches
from patchflow.learn_critic import learn_critic
from patchflow.learn_mixture import learn_epll
from patchflow.learn_reference import learn_wpp
from patchflow.models import alr, patch_nr
from patchflow.papers.image_problems import ImageProblem
from patchflow.problems.likelihood import GaussianLikelihood

# Smoothing of wpp-sinkhorn, in squared units of the image; published (survey): 1e-4 with 10,000 reference patches.
# Highest PSNR on the validation image of super-resolution among 0, 1e-3, 1e-2.
EPSILON = 1e-2
# Seconds of training.
CRITIC_SECONDS, SHORT_SECONDS = 120.0, 90.0


class Lesson(NamedTuple):
    """What is learned from.

    Attributes:
        problem: The problem, for critics, which learn its artefacts.
        data: The data folder.
        image: The training image.
        validation: The validation image.
        seconds: Training time of patchNR.
    """

    problem: ImageProblem
    data: Path
    image: Tensor
    validation: Tensor
    seconds: float


def _patchnr(lesson: Lesson, seconds: float) -> Energy:
    prior = patch_nr()
    learn_patches(
        prior,
        [lesson.image],
        [lesson.validation],
        steps=10**6,
        seconds=seconds,
        progress=True,
    )
    return prior


def _critic(lesson: Lesson) -> Energy:
    prior = alr()
    shape = (lesson.image.shape[2], lesson.image.shape[3])
    likelihood = GaussianLikelihood(lesson.problem.operator(lesson.data, shape), lesson.problem.std)
    learn_critic(
        prior,
        [lesson.image],
        degrade=lambda x: likelihood.operator.initial(likelihood.simulate(x)),
        steps=10**6,
        seconds=CRITIC_SECONDS,
        progress=True,
    )
    return prior


TEACHERS: dict[str, Callable[[Lesson], Energy]] = {
    "epll": lambda lesson: learn_epll([lesson.image], progress=True)[0],
    "wpp": lambda lesson: learn_wpp([lesson.image], scales=2),
    "wpp-sinkhorn": lambda lesson: learn_wpp([lesson.image], scales=2, epsilon=EPSILON),
    "local-ar": _critic,
    "patchnr-90s": lambda lesson: _patchnr(lesson, SHORT_SECONDS),
    "patchnr": lambda lesson: _patchnr(lesson, lesson.seconds),
}
# Those that learn about one operator.
_ONE_PROBLEM = ("local-ar",)


class Library:
    """Learned priors, each learned at its first use.

    Args:
        data: The data folder.
        folder: Where models are kept: read if they are there, else written; None for nowhere.
        seconds: Training time of patchNR.
        seed: Seed of the trainings.
    """

    def __init__(self, data: Path, folder: Path | None, seconds: float, seed: int) -> None:
        self.data, self.folder, self.seconds, self.seed = data, folder, seconds, seed
        self.priors: dict[str, Energy] = {}
        self.trainings: dict[str, float] = {}

    def prior(
        self, method: str, problem: ImageProblem, name: str, image: Tensor, validation: Tensor
    ) -> Energy | None:
        """The prior of a method for a problem, or None if it needs none.

        Args:
            method: The method.
            problem: The problem.
            name: The table's name.
            image: The image to learn from.
            validation: The image to validate on.

        Raises:
            InputError: If a file holds another model.
        """
        if method not in TEACHERS:
            return None
        key = f"{method}-{problem.material}"
        if method in _ONE_PROBLEM:
            key += f"-{name}-{problem.group}".replace(" ", "-").replace("%", "percent").rstrip("-")
        if key not in self.priors:
            path = None if self.folder is None else self.folder / f"{key}.safetensors"
            if path is not None and path.exists():
                self.priors[key] = models.load(path, Energy)
            else:
                torch.manual_seed(self.seed)
                begun = time.perf_counter()
                lesson = Lesson(problem, self.data, image, validation, self.seconds)
                prior = TEACHERS[method](lesson)
                self.trainings[key] = time.perf_counter() - begun
                if path is not None:
                    self._keep(path, prior, image, self.trainings[key])
                self.priors[key] = prior
        return self.priors[key]

    def _keep(self, path: Path, prior: Energy, image: Tensor, seconds: float) -> None:
        if not path.parent.is_dir():
            raise InputError(f"There is no folder {path.parent} to keep the models in; make it.")
        training = {"seconds": round(seconds, 1)}
        models.save(path, prior, images=[image], seed=self.seed, training=training)
