"""Solvers of ``patchflow reconstruct`` for images: a method by name, with its flags and its weight, given or chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from patchflow import models
from patchflow.cli.image_samples import Sampling
from patchflow.cli.notes import choose
from patchflow.errors import InputError
from patchflow.image_models import SingleImage
from patchflow.methods import METHODS, WEIGHTLESS, Task
from patchflow.networks.denoiser import Denoiser
from patchflow.papers.presets import PRESETS
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import perception
from patchflow.resolution_models import SuperResolver
from patchflow.solution import Solution

ImageMethod = Literal[
    "patchnr",
    "epll",
    "wpp",
    "local-ar",
    "student-t",
    "patch-vae",
    "tv",
    "tgv",
    "tikhonov",
    "bm3d",
    "dip-tv",
    "dpir",
    "pnp-pnn",
    "single-image",
    "acnn",
    "wpp-net",
    "wpp-flow",
]
# What a model file of a method holds.
Prior = PatchPrior | MultiscalePrior | Denoiser | SingleImage | SuperResolver
Follow = Callable[[int, Tensor, float], Mapping[str, str]]
# Methods of splitting, whose record is no energy: what it is, and its axis.
SPLITTING = {
    "epll": ("image to its denoised one", "relative distance"),
    "bm3d": ("image to its denoised one", "relative distance"),
    "dpir": ("image to its denoised one", "relative distance"),
    "pnp-pnn": ("step", "root mean square"),
}
# Methods whose solver is Adam or L-BFGS on phases of the patch grid.
_VARIATIONAL = ("patchnr", "local-ar", "student-t", "patch-vae")
# Of samples: the whole prior. Not tuned.
SAMPLING_WEIGHT = 1.0


class Texture(NamedTuple):
    """The way to a better texture, see :mod:`patchflow.reconstruct.perception`.

    Attributes:
        share: How far, from 0 to 1.
        prior: The patch prior.
    """

    share: float
    prior: PatchPrior

    @classmethod
    def read(cls, perception: float, path: str | None) -> Texture | None:
        """Read the flags ``--perception`` and ``--texture``.

        Raises:
            InputError: If one is there without the other, the share is out of range, or the model is no patch prior.
        """
        if not 0 <= perception <= 1:
            raise InputError(
                f"--perception {perception} must lie between 0 (most accurate) and 1 (best texture)."
            )
        if (perception > 0) != (path is not None):
            raise InputError(
                f"Got --perception {perception} and --texture {path}: a share above 0 and a model of patchflow train "
                "patch-nr go together."
            )
        if path is None:
            return None
        prior = models.load(path, nn.Module)
        METHODS["patchnr"].check_prior(prior)
        assert isinstance(prior, PatchPrior)
        return cls(perception, prior)


@dataclass(frozen=True)
class Solver:
    """A method with its flags.

    Attributes:
        method: The method.
        steps: Number of steps; of the methods by Adam or L-BFGS, as the next three.
        stride: Stride of the patch grid.
        lr: Peak step of Adam.
        solver: Adam or L-BFGS.
        preset: The published procedure, or ours.
        weight: The weight; None for the default, ``"auto"`` for a choice without a ground truth.
        sampling: How samples of the posterior are drawn, whose mean is the reconstruction; None for none.
        texture: The patch prior and the share by which it moves the reconstruction; None for none.
        ensemble: Whether single-image takes the mean over turned and mirrored measurements.

    Raises:
        InputError: If a flag does not concern the method, or the weight is neither a number nor auto.
    """

    method: str
    steps: int | None
    stride: int | None
    lr: float | None
    solver: Literal["adam", "lbfgs"]
    preset: Literal["default", "paper"]
    weight: float | str | None
    sampling: Sampling | None = None
    texture: Texture | None = None
    ensemble: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(
                f"--method {self.method} is for --problem ct, not for images; use one of {', '.join(METHODS)}."
            )
        if self.sampling is not None:
            self._check_sampling(self.sampling)
        elif self.method not in _VARIATIONAL or self.preset == "paper":
            who = f"preset {self.preset}" if self.preset == "paper" else f"method {self.method}"
            for name, value in self._given.items():
                flag = "solver" if name == "method" else name
                raise InputError(f"--{flag} {value} says nothing about the {who}; leave it out.")
        if not self.ensemble and self.method != "single-image":
            raise InputError(
                f"--ensemble false says nothing about the method {self.method}; leave it out."
            )
        if self.preset == "paper" and self.method not in PRESETS:
            raise InputError(
                f"There is a preset paper of {', '.join(PRESETS)}, not of {self.method}."
            )
        if self.weight is not None and self.method in WEIGHTLESS:
            raise InputError(
                f"--weight {self.weight} says nothing about the method {self.method}; leave it out."
            )
        if isinstance(self.weight, str) and self.weight != "auto":
            raise InputError(f"The weight is {self.weight!r} but must be a number or auto.")

    def _check_sampling(self, sampling: Sampling) -> None:
        sampling.check()
        given = {key: value for key, value in self._given.items() if key != "steps"}
        unused = given | {
            name: value
            for name, value, default in (
                ("preset", self.preset, "default"),
                ("perception", self.texture and self.texture.share, None),
            )
            if value != default
        }
        for name, value in unused.items():
            flag = "solver" if name == "method" else name
            raise InputError(f"--{flag} {value} says nothing about --samples; leave one out.")
        if self.weight is not None and (self.weight == "auto" or sampling.method == "dpir"):
            raise InputError(
                f"--weight {self.weight} says nothing about --samples of {self.method}; leave it out"
                + (", or give a number." if self.weight == "auto" else ".")
            )

    @property
    def _given(self) -> Mapping[str, object]:
        """What the flags say of the solver, by its arguments."""
        method = None if self.solver == "adam" else self.solver
        flags = {"steps": self.steps, "stride": self.stride, "lr": self.lr, "method": method}
        return {name: value for name, value in flags.items() if value is not None}

    @property
    def setting(self) -> dict[str, object]:
        """What is not as by default, for error bars, which hold for one setting."""
        changed = {
            "solver" if name == "method" else name: value for name, value in self._given.items()
        }
        if self.preset != "default":
            changed["preset"] = self.preset
        if self.texture is not None:
            changed["perception"] = self.texture.share
        return changed | self._pass

    @property
    def _pass(self) -> dict[str, object]:
        return {} if self.ensemble else {"ensemble": False}

    def prior(self, path: str | None) -> Prior | None:
        """Read the model that the method needs.

        Raises:
            InputError: If it is missing or that of another method.
        """
        chosen = METHODS[self.method]
        if not chosen.models and path is not None:
            raise InputError(
                f"--prior {path} says nothing about the method {self.method}; leave it out."
            )
        if path is None:
            chosen.check_prior(None)
            return None
        prior = _load(path, published="dncnn" in chosen.models)
        chosen.check_prior(prior)
        assert isinstance(prior, Prior)
        return prior

    def run(
        self,
        likelihood: GaussianLikelihood,
        y: Tensor,
        prior: Prior | None,
        follow: Follow | None,
    ) -> tuple[Solution, float, list[str]]:
        """Reconstruct.

        Args:
            likelihood: The law of the measurement.
            y: The measurement.
            prior: What :meth:`prior` read.
            follow: Called after each step.

        Returns:
            The reconstruction, its weight, and what there is to say about the choice of the weight.
        """
        if self.sampling is not None:
            weight = SAMPLING_WEIGHT if self.weight is None else float(self.weight)
            return self.sampling.draw(likelihood, y, prior, weight), weight, []
        solution, weight, notes = self._reconstruct(likelihood, y, prior, follow)
        if self.texture is not None and not solution.interrupted:
            share, textures = self.texture
            x = perception.retexture(likelihood, textures, y, solution.x, share, progress=True)
            solution = solution._replace(x=x)
            notes = [*notes, f"Moved by {share:g} of the way to the best texture (--perception)."]
        return solution, weight, notes

    def _reconstruct(
        self,
        likelihood: GaussianLikelihood,
        y: Tensor,
        prior: Prior | None,
        follow: Follow | None,
    ) -> tuple[Solution, float, list[str]]:
        default = self._default_weight(likelihood, prior)
        if self.weight != "auto":
            weight = default if self.weight is None else float(self.weight)
            return self._solve(likelihood, y, weight, prior, follow), weight, []

        def solve(measurement: Tensor, weight: float) -> Solution:
            return self._solve(likelihood, measurement, weight, prior, None)

        choice, notes = choose(solve, likelihood, y, start=default, level="--noise")
        return choice.solution, choice.weight, notes

    def _default_weight(self, likelihood: GaussianLikelihood, prior: Prior | None) -> float:
        chosen = PRESETS if self.preset == "paper" else METHODS
        return chosen[self.method].weight(likelihood, prior)

    def _solve(
        self,
        likelihood: GaussianLikelihood,
        y: Tensor,
        weight: float,
        prior: Prior | None,
        follow: Follow | None,
    ) -> Solution:
        init = likelihood.operator.initial(y)
        task = Task(likelihood, y, init, weight, prior, follow, True, {**self._given, **self._pass})
        chosen = PRESETS if self.preset == "paper" else METHODS
        return chosen[self.method].solve(task)


def _load(path: str, *, published: bool) -> nn.Module:
    """Read a model file, or, where that serves, weights of a DnCNN as they are published, without our header."""
    try:
        return models.load(path, nn.Module)
    except InputError as error:
        if not published:
            raise
        try:
            return models.load_dncnn(path)
        except InputError:
            raise error from None
